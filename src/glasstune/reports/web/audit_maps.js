/* Heat maps as tables whose cells take the focus; numbers as the page writes them.

   A cell is {kind, level, text, words, pick}: `kind` a style (plus, minus, none, zero, bad, unknown,
   unreached, loose, frozen), `level` 0 to 1, `text` what stands in a wide cell, `words` what is told
   on hover and focus, `pick` a function for a click. No cell is null. */
const maps = (() => {
  const { el } = glasstune;
  /* What stands in a cell that is no plain number: a sign for each, so that none is a colour. */
  const SIGNS = { minus: "−", none: "×", zero: "0", bad: "!", unknown: "?", unreached: "·", loose: "○", frozen: "" };
  const MEANS = {
    minus: "below zero (hatched)", none: "no gradient", zero: "gradient is zero", bad: "NaN or Inf",
    unknown: "unknown", unreached: "not reached by the term", loose: "in no optimiser group", frozen: "frozen",
  };
  const WIDE = 46; // Pixels in which a number can be read.

  /* Four digits, as number() of audit_page.py writes them. */
  function number(value, digits = 4) {
    if (value === null || value === undefined) return "unknown";
    if (value === 0) return "0";
    const size = Math.floor(Math.log10(Math.abs(Number(value.toPrecision(digits)))));
    if (size < -5 || size >= digits) {
      return value.toExponential(digits - 1).replace(/\.?0+e/, "e").replace(/e([+-])(\d)$/, "e$10$2");
    }
    return String(Number(value.toPrecision(digits)));
  }

  /* As share_text() of audit_page.py writes it: what is not zero does not read as zero. */
  function percent(share) {
    if (share === null || share === undefined) return "unknown";
    const size = Math.abs(share) * 100;
    const digits = size === 0 || size >= 0.05 ? 1 : Math.min(6, -Math.floor(Math.log10(size)));
    return `${(share * 100).toFixed(digits)}%`.replace("-", "−");
  }
  const signed = (value) => (value === null || value === undefined ? "unknown" : `${value < 0 ? "−" : "+"}${Math.abs(value).toFixed(3)}`);

  /* A few digits for a narrow cell. */
  function brief(value) {
    const text = number(value, 2);
    return text.length <= 6 ? text : value.toExponential(0).replace("e-0", "e-").replace("e+0", "e");
  }

  /* A scale by logarithm over values above zero: value to 0.08..1. */
  function byLogarithm(values) {
    const logs = values.filter((value) => value > 0).map(Math.log10);
    const low = Math.min(...logs);
    const high = Math.max(...logs);
    const level = (value) => (high > low ? 0.08 + (0.92 * (Math.log10(value) - low)) / (high - low) : 0.6);
    return logs.length ? { low: 10 ** low, high: 10 ** high, level } : null;
  }

  /* Draws a map into `box`: columns and rows are {label, title}; `cell(row, column)`. */
  function draw(box, { label, corner, columns, rows, cell, told }) {
    const focused = box.contains(document.activeElement) ? document.activeElement.place : null;
    const room = (box.clientWidth - Math.min(260, box.clientWidth * 0.36)) / columns.length;
    const wide = room >= WIDE;
    const narrow = box.clientWidth < 560;
    const every = room >= 22 || columns.some((column) => Number.isNaN(Number(column.label))) ? 1 : 5;
    const table = el("table", { class: `heat${wide ? " wide" : ""}`, role: "grid", "aria-label": label });
    table.style.setProperty("--cell", `${Math.floor(Math.min(96, Math.max(15, room - 3)))}px`);
    const heads = columns.map((column, index) => {
      const whole = wide && column.title.length * 7 < Math.min(96, room); // There is room for all of it.
      const shown = index % every === 0 ? (whole ? column.title : column.label) : "";
      const upright = !wide && shown.length > 2;
      return el("th", { scope: "col", role: "columnheader", title: column.title, class: upright ? "upright" : null, "aria-label": column.title },
        el("span", {}, shown));
    });
    table.append(el("thead", {}, el("tr", { role: "row" }, el("td", { role: "presentation" }, corner), heads)));
    const body = el("tbody");
    const used = new Set();
    let first = true;
    rows.forEach((row, r) => {
      const cells = columns.map((column, c) => {
        const made = cell(r, c);
        if (!made) return el("td", { role: "gridcell", class: "absent" });
        used.add(made.kind);
        const sign = SIGNS[made.kind];
        const text = wide && made.text !== undefined ? made.text : sign || "";
        const square = el("td", { role: "gridcell", class: `cell ${made.kind}`, tabindex: -1, "aria-label": made.words },
          text === "" ? null : el("span", { "aria-hidden": "true" }, text));
        if (made.level !== undefined) square.style.setProperty("--depth", `${Math.round(made.level * 58)}%`);
        if (first) { square.tabIndex = 0; first = false; }
        square.place = [r, c];
        square.made = made;
        return square;
      });
      body.append(el("tr", { role: "row" }, el("th", { scope: "row", role: "rowheader", title: row.title }, el("code", {}, narrow ? row.short || row.label : row.label)), cells));
    });
    table.append(body);
    box.replaceChildren(table);
    box.onmouseover = (event) => { const at = event.target.closest(".cell"); if (at) told(at.made.words); };
    box.onfocusin = box.onmouseover;
    table.addEventListener("focusin", box.onmouseover);
    table.addEventListener("click", (event) => { const at = event.target.closest(".cell"); if (at && at.made.pick) at.made.pick(); });
    table.addEventListener("keydown", (event) => keydown(table, event));
    if (focused) focus(table, find(table, focused[0], focused[1]));
    return used;
  }

  const find = (table, r, c) => [...table.querySelectorAll(".cell")].find((at) => at.place[0] === r && at.place[1] === c);

  function focus(table, to) {
    if (!to) return;
    table.querySelectorAll('.cell[tabindex="0"]').forEach((each) => (each.tabIndex = -1));
    to.tabIndex = 0;
    to.focus();
  }

  function keydown(table, event) {
    const at = event.target.closest(".cell");
    if (!at || event.ctrlKey || event.altKey || event.metaKey) return;
    if ((event.key === "Enter" || event.key === " ") && at.made.pick) {
      event.preventDefault();
      at.made.pick();
      return;
    }
    const [r, c] = at.place;
    const cells = [...table.querySelectorAll(".cell")];
    const row = cells.filter((each) => each.place[0] === r);
    const column = cells.filter((each) => each.place[1] === c);
    const next = {
      ArrowRight: () => row[row.indexOf(at) + 1], ArrowLeft: () => row[row.indexOf(at) - 1],
      ArrowDown: () => column[column.indexOf(at) + 1], ArrowUp: () => column[column.indexOf(at) - 1],
      Home: () => row[0], End: () => row[row.length - 1],
    }[event.key];
    if (!next) return;
    event.preventDefault();
    focus(table, next());
  }

  /* What the colours and the signs that occur mean. */
  function legend(box, used, scale, from, to, words) {
    const parts = [];
    if (scale) {
      const steps = [0.08, 0.31, 0.54, 0.77, 1].map((level) => {
        const step = el("i", { class: "cell plus" });
        step.style.setProperty("--depth", `${Math.round(level * 58)}%`);
        return step;
      });
      parts.push(el("span", { class: "ramp" }, from, " ", steps, " ", to, " ", el("small", {}, words)));
    }
    for (const kind of Object.keys(MEANS)) {
      if (!used.has(kind)) continue;
      const sample = el("i", { class: `cell ${kind}` }, SIGNS[kind]);
      sample.style.setProperty("--depth", "45%");
      parts.push(el("span", {}, sample, ` ${MEANS[kind]}`));
    }
    box.replaceChildren(...parts);
  }

  /* A row of radio buttons in a fieldset; `then` hears of the chosen key. */
  function choice(fieldset, name, options, then) {
    const legendText = fieldset.querySelector("legend");
    fieldset.replaceChildren(legendText, ...options.map(([key, words], index) =>
      el("label", {},
        el("input", { type: "radio", name, value: key, checked: index === 0, onchange: () => then(key) }),
        el("span", {}, words))));
  }

  return { draw, legend, choice, number, brief, percent, signed, byLogarithm };
})();

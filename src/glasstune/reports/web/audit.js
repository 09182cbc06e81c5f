/* The page of a gradient audit: two heat maps, the matrix of cosines, the table of parameters. */
(() => {
  const { data, el, announce, drawn, typed, commas } = glasstune;
  const { number, brief, percent, signed } = maps;
  const { terms, layers, columns, prefix, reasons, parameters } = data;
  const byId = (id) => document.getElementById(id);
  document.querySelectorAll(".js-only").forEach((part) => (part.hidden = false));

  const STATUS = {
    nonfinite: "NaN or Inf", none: "no gradient", not_in_optimizer: "in no optimiser group",
    zero: "gradient is zero", ok: "ok", frozen: "frozen",
  };
  const HEALTHY = new Set(["frozen", "packed", "partner_zero", "weight_zero", "expert_without_tokens"]);
  const missing = data.known ? "not finite" : "unknown";

  const shorter = (name) => (prefix && name.startsWith(prefix) ? name.slice(prefix.length) : name);
  /* `layers.3` is headed 3 where most names are like it. */
  function headings(names) {
    const parts = names.map((name) => /^(.*?)(?:^|\.)(\d+)$/.exec(shorter(name)));
    const stems = parts.map((part) => part && part[1]);
    const often = (stem) => stems.filter((each) => each === stem).length;
    const common = stems.filter((stem) => stem !== null).sort((a, b) => often(b) - often(a))[0];
    return names.map((name, index) => {
      const title = shorter(name);
      return { title, label: parts[index] && stems[index] === common ? parts[index][2] : title.split(".").slice(-2).join(".") };
    });
  }

  const telling = (box) => (words) => {
    box.textContent = words;
    if (document.activeElement?.classList.contains("cell")) announce(words);
  };

  /* ---- Layers and terms. ---- */

  const layersBox = byId("map-layers");
  if (layersBox) {
    const couples = terms.flatMap((_, b) => terms.slice(0, b).map((_, a) => [a, b]));
    const kinds = [["norm", "Norm"], ["share", "Share of the step"], ...(couples.length ? [["cosine", "Agreement"]] : [])];
    const about = {
      norm: "Norm of each term's own gradient, without its weight; colours by logarithm.",
      share: "What part of the layer's step each weighted term is. The shares of a layer sum to 100 %; below zero a term works against the step.",
      cosine: "Cosine between the gradients of two terms; below zero they point apart.",
    };
    const heads = headings(layers.map((layer) => layer.layer));
    const told = telling(byId("map-told"));
    let chosen = "norm";

    const drawLayers = () => {
      const scale = chosen === "norm" ? maps.byLogarithm(layers.flatMap((layer) => layer.norms.filter((norm) => norm !== null))) : null;
      const most = chosen === "share" ? Math.max(1, ...layers.flatMap((layer) => layer.shares.map((share) => Math.abs(share ?? 0)))) : 1;
      const pairs = chosen === "cosine";
      const rows = pairs
        ? couples.map(([a, b]) => ({ label: `${terms[a]} · ${terms[b]}`, title: `${terms[a]} and ${terms[b]}` }))
        : terms.map((name) => ({ label: name, title: name }));
      const value = (r, c) => {
        if (pairs) return layers[c].cosines[couples[r][0]][couples[r][1]];
        return chosen === "norm" ? layers[c].norms[r] : layers[c].shares[r];
      };
      const cell = (r, c) => {
        const found = value(r, c);
        const where = `${heads[c].title} · ${rows[r].title}: `;
        const all = pairs ? "" : ` · norm ${layers[c].norms[r] === null ? "not finite" : number(layers[c].norms[r])}, share ${percent(layers[c].shares[r])}`;
        const pick = () => reveal(layers[c].layer);
        if (found === null) {
          const bad = chosen === "norm";
          return { kind: bad ? "bad" : "unknown", text: bad ? "!" : "?", words: `${where}${bad ? "not finite" : "unknown"}${all}`, pick };
        }
        if (chosen === "norm") {
          return found === 0
            ? { kind: "zero", text: "0", words: `${where}norm 0${all.replace(/^ · norm 0/, "")}`, pick }
            : { kind: "plus", level: scale.level(found), text: brief(found), words: where + all.slice(3), pick };
        }
        const text = pairs ? signed(found).replace("0.", ".").slice(0, 4) : `${(found * 100).toFixed(0)}%`.replace("-", "−");
        return {
          kind: found < 0 ? "minus" : "plus", level: Math.min(1, Math.abs(found) / most), text,
          words: pairs ? `${where}cosine ${signed(found)}` : where + all.slice(3), pick,
        };
      };
      const used = maps.draw(layersBox, { label: `${kinds.find(([key]) => key === chosen)[1]} by term and layer`, corner: pairs ? "Pair" : "Term", columns: heads, rows, cell, told });
      const ends = { norm: scale && [number(scale.low, 2), number(scale.high, 2), "norm, logarithmic"], share: ["0%", percent(most), "of the layer's step"], cosine: ["0", "1", "cosine"] }[chosen];
      maps.legend(byId("map-legend"), used, ends, ...(ends || []));
      byId("map-about").textContent = about[chosen];
      byId("map-told").textContent = "Point at a square, or use Tab and the arrow keys; Enter shows the layer's parameters.";
    };
    maps.choice(byId("map-choice"), "map", kinds, (key) => { chosen = key; drawLayers(); announce(about[key]); });
    drawn(layersBox, drawLayers);
  }

  /* ---- The matrix of cosines, over all or in one layer. ---- */

  const select = byId("matrix-layer");
  if (select) {
    select.append(el("option", { value: "" }, "all parameters"), ...layers.map((layer, index) => el("option", { value: index }, shorter(layer.layer))));
    const drawMatrix = () => {
      const found = select.value === "" ? data.whole : layers[Number(select.value)].cosines;
      byId("matrix").querySelectorAll("tbody tr").forEach((row, a) => {
        row.querySelectorAll("td").forEach((square, b) => {
          const value = found[a][b];
          square.textContent = signed(value);
          square.className = value === null ? "cell unknown" : `cell ${value < -1e-6 ? "minus" : "plus"}`;
          square.style.setProperty("--depth", `${Math.round(Math.abs(value ?? 0) * 58)}%`);
        });
      });
    };
    select.addEventListener("change", () => { drawMatrix(); announce(`Cosines over ${select.selectedOptions[0].textContent}`); });
    drawMatrix();
  }

  /* ---- Every parameter at its place: names down, layers across. ---- */

  /* What a name says beyond its layer; PEFT's usual ends say nothing. */
  function local(row) {
    const layer = columns[row.layer];
    const rest = row.name.startsWith(`${layer}.`) ? row.name.slice(layer.length + 1) : row.name;
    return rest.replace(/\.default\.weight$/, "");
  }
  parameters.forEach((row) => { row.local = local(row); });

  const placesBox = byId("map-places");
  const trainedRows = parameters.filter((row) => row.status !== "frozen");
  const places = [...new Set(trainedRows.map((row) => row.local))];
  const used = [...new Set(trainedRows.map((row) => row.layer))];
  const at = new Map(trainedRows.map((row) => [`${row.local}\n${row.layer}`, row]));
  const placeHeads = headings(used.map((index) => columns[index]));
  const drawable = places.length > 0 && places.length <= 120;
  let of = "step";
  let measure = "norm";

  function placeValue(row) {
    if (of === "step") return row.increment ? row.increment[0] : null;
    const [, norm, share] = row.terms[Number(of)];
    return measure === "norm" ? norm : share;
  }

  function placeCell(row, scale) {
    const words = `${shorter(columns[row.layer])} · ${row.local}: `;
    const why = row.reason === undefined ? "" : ` · ${reasons[row.reason].text}`;
    const pick = () => reveal(columns[row.layer], row.name);
    const sign = (kind, text, more = why) => ({ kind, text: undefined, words: `${words}${text}${more}`, pick });
    if (of !== "step") {
      const [reached, norm, share] = row.terms[Number(of)];
      const told = `${terms[Number(of)]} norm ${norm === null ? missing : number(norm)}, share ${percent(share)}`;
      if (reached === "unknown" && norm === null) return sign("unknown", `${terms[Number(of)]}: unknown whether it is reached`, "");
      if (norm === null) return sign(data.known ? "bad" : "unknown", told, "");
      if (reached === false) return sign("unreached", `not reached by ${terms[Number(of)]}`);
      if (norm === 0) return sign("zero", told);
      if (measure === "share") {
        if (share === null) return sign("unknown", told);
        return { kind: share < 0 ? "minus" : "plus", level: Math.min(1, Math.abs(share)), text: `${(share * 100).toFixed(0)}%`.replace("-", "−"), words: words + told, pick };
      }
      return { kind: "plus", level: scale.level(norm), text: brief(norm), words: words + told, pick };
    }
    if (row.status === "none") return sign("none", "no gradient");
    if (row.status === "nonfinite") return sign("bad", "NaN or Inf");
    const norm = placeValue(row);
    if (norm === null) return sign("unknown", "unknown");
    if (norm === 0) return sign("zero", "its gradient is zero");
    const told = `${words}norm ${number(norm)}`;
    if (row.status === "not_in_optimizer") return { kind: "loose", level: scale.level(norm), words: `${told}, in no optimiser group`, pick };
    return { kind: "plus", level: scale.level(norm), text: brief(norm), words: told, pick };
  }

  function drawPlaces() {
    const shares = of !== "step" && measure === "share";
    const scale = shares ? null : maps.byLogarithm(trainedRows.map(placeValue).filter((value) => value !== null));
    const kinds = maps.draw(placesBox, {
      label: "Gradient by parameter and layer", corner: "Parameter", columns: placeHeads,
      rows: places.map((name) => ({ label: name, title: name, short: name.split(".").slice(-2).join(".") })),
      cell: (r, c) => { const row = at.get(`${places[r]}\n${used[c]}`); return row ? placeCell(row, scale) : null; },
      told: telling(byId("place-told")),
    });
    const ends = shares ? ["0%", "100%", "of the parameter's step"] : scale && [number(scale.low, 2), number(scale.high, 2), "norm, logarithmic"];
    maps.legend(byId("place-legend"), kinds, ends, ...(ends || []));
    byId("place-told").textContent = "Point at a square, or use Tab and the arrow keys; Enter shows it in the table.";
  }

  if (drawable) {
    maps.choice(byId("place-choice"), "place", [["step", "the whole step"], ...terms.map((name, index) => [String(index), name])], (key) => {
      of = key;
      byId("place-measure").hidden = of === "step";
      drawPlaces();
    });
    maps.choice(byId("place-measure"), "measure", [["norm", "Norm"], ["share", "Share"]], (key) => { measure = key; drawPlaces(); });
    drawn(placesBox, drawPlaces);
  } else {
    placesBox.closest("div:not(.heat-box)").querySelectorAll("h3:first-child, .controls:has(#place-choice), #map-places, #place-legend, #place-told")
      .forEach((part) => (part.hidden = true));
  }

  /* ---- The table: layers folded, their parameters below, all numbers of one below that. ---- */

  const body = byId("rows");
  const filter = byId("row-filter");
  const needs = (row) => row.status !== "ok" && row.status !== "frozen" && !(row.reason !== undefined && HEALTHY.has(reasons[row.reason].code));
  const only = { all: () => true, trained: (row) => row.trained, needs };
  const counts = Object.fromEntries(Object.entries(only).map(([key, test]) => [key, parameters.filter(test).length]));
  let which = counts.trained ? "trained" : "all";
  const open = new Set(parameters.filter(needs).slice(0, 400).map((row) => row.layer));
  const told = new Set(); // Parameters whose numbers are unfolded.
  const HEAD = ["Parameter", "Status", "requires_grad", "Value", "Gradient before", "Gradient after", ...terms.map((name) => `∂ ${name}`)];
  byId("rows-head").append(...HEAD.map((words, index) => el("th", { scope: "col", class: index > 2 ? "number" : null, title: index > 5 ? `norm of the gradient of ${words.slice(2)}, and its share` : null }, words)));

  function summary(found, none) {
    if (!found) return el("td", { class: "number nothing" }, none);
    const [norm, , , nan, inf] = found;
    const bad = [nan ? `${commas(nan)} NaN` : null, inf ? `${commas(inf)} Inf` : null].filter(Boolean).join(", ");
    return el("td", { class: "number" }, number(norm), bad ? el("small", {}, bad) : null);
  }

  function termCell(found) {
    if (!found) return el("td", { class: "number" });
    const [reached, norm, share] = found;
    if (reached === false) return el("td", { class: "number soft" }, "not reached");
    return el("td", { class: "number" }, norm === null ? (reached === "unknown" ? "unknown" : missing) : number(norm),
      el("small", {}, share === null ? null : percent(share)));
  }

  function parameterRow(row) {
    const button = el("button", { type: "button", class: "fold", "aria-expanded": String(told.has(row.name)) }, el("code", {}, row.local));
    button.addEventListener("click", () => { told.has(row.name) ? told.delete(row.name) : told.add(row.name); show(); refocus(row.name); });
    const line = el("tr", { class: "parameter", "data-name": row.name, "data-status": row.status },
      el("th", { scope: "row" }, button, el("small", {}, `${row.shape.join(" × ") || "scalar"} · ${row.dtype}`)),
      el("td", { class: `status ${row.status}` }, STATUS[row.status] || row.status, row.reason === undefined ? null : el("small", {}, reasons[row.reason].code)),
      el("td", {}, row.trained ? "True" : "False"),
      summary(row.value, "–"), summary(row.grad_before, "None"), summary(row.grad_after, "None"),
      terms.map((_, index) => termCell(row.terms && row.terms[index])));
    return told.has(row.name) ? [line, detail(row)] : [line];
  }

  /* All that the record has of a parameter. */
  function detail(row) {
    const five = (label, found, none) => el("tr", {}, el("th", { scope: "row" }, label),
      found ? [number(found[0]), number(found[1]), percent(found[2]), commas(found[3]), commas(found[4])].map((text) => el("td", { class: "number" }, text))
        : el("td", { colspan: 5 }, none));
    const inside = [
      el("p", {}, el("code", {}, row.name), ` · ${row.held === undefined ? "no optimiser was given" : row.held ? "in the optimiser" : "in no group of the optimiser"}`),
    ];
    if (row.reason !== undefined) {
      const { text, module, line } = reasons[row.reason];
      inside.push(el("p", {}, text, module ? [" · module ", el("code", {}, module)] : null, line ? [" at ", el("code", {}, line)] : null));
    }
    inside.push(el("table", { class: "five" },
      el("thead", {}, el("tr", {}, el("td"), ["norm", "largest", "zeros", "NaN", "Inf"].map((words) => el("th", { scope: "col", class: "number" }, words)))),
      el("tbody", {}, five("value", row.value, "not read (packed, or not asked for)"), five("gradient before", row.grad_before, "None"),
        five("added by the backward", row.increment, "None"), five("gradient after", row.grad_after, "None"))));
    for (const [name, text] of Object.entries(row.texts || {})) inside.push(el("pre", { tabindex: 0 }, `${name} = ${text}`));
    return el("tr", { class: "detail" }, el("td", { colspan: HEAD.length }, el("div", {}, inside)));
  }

  function layerRow(index, rows, isOpen, filtered) {
    const of = columns[index];
    const norms = rows.filter((row) => row.increment).map((row) => row.increment[0]);
    const tally = {};
    rows.forEach((row) => { tally[row.status] = (tally[row.status] || 0) + 1; });
    const words = Object.keys(STATUS).filter((key) => tally[key]).map((key) => `${tally[key]} ${STATUS[key]}`).join(" · ");
    const button = el("button", { type: "button", class: "fold", "aria-expanded": String(isOpen) }, el("code", {}, shorter(of)));
    button.addEventListener("click", () => {
      (isOpen ? shut : opened)(index, filtered);
      show();
      body.querySelector(`tr.layer[data-layer="${index}"] button`)?.focus();
    });
    return el("tr", { class: `layer${rows.some(needs) ? " bad" : ""}`, "data-layer": index },
      el("th", { scope: "row", title: of }, button),
      el("td", { colspan: HEAD.length - 1 }, el("span", {}, words), norms.length ? el("span", { class: "soft" }, `gradient norm ${number(Math.hypot(...norms))}`) : null));
  }

  let shutWhileFiltered = new Set();
  const shut = (index, filtered) => (filtered ? shutWhileFiltered.add(index) : open.delete(index));
  const opened = (index, filtered) => (filtered ? shutWhileFiltered.delete(index) : open.add(index));

  function matching() {
    const query = filter.value.trim().toLowerCase();
    const words = (row) => [row.name, row.status.replaceAll("_", " "), STATUS[row.status],
      ...(row.reason === undefined ? [] : Object.values(reasons[row.reason]))].join("\n").toLowerCase();
    return [parameters.filter((row) => only[which](row) && (!query || words(row).includes(query))), query !== ""];
  }

  const MOST = 3000; // More rows at once would only make the browser slow.

  function show() {
    const [rows, filtered] = matching();
    const groups = new Map();
    rows.forEach((row) => groups.set(row.layer, [...(groups.get(row.layer) || []), row]));
    const lines = [];
    let shown = 0;
    for (const [index, own] of groups) {
      const isOpen = filtered ? !shutWhileFiltered.has(index) : open.has(index);
      lines.push(layerRow(index, own, isOpen, filtered));
      if (isOpen && shown < MOST) lines.push(...own.slice(0, MOST - shown).flatMap(parameterRow));
      if (isOpen) shown += own.length;
    }
    if (shown > MOST) lines.push(el("tr", {}, el("td", { colspan: HEAD.length }, `${commas(shown - MOST)} more rows: filter to see them.`)));
    body.replaceChildren(...lines);
    byId("rows-none").hidden = rows.length > 0;
    return rows.length;
  }

  function refocus(name) {
    [...body.querySelectorAll("tr.parameter")].find((line) => line.dataset.name === name)?.querySelector("button").focus();
  }

  /* Opens a layer, and a parameter's numbers, and goes there. */
  function reveal(layer, name) {
    filter.value = "";
    const index = columns.indexOf(layer);
    if (index < 0) return;
    if (name === undefined ? !parameters.some((row) => row.layer === index && only[which](row)) : !only[which](parameters.find((row) => row.name === name))) choose("all");
    open.add(index);
    if (name !== undefined) told.add(name);
    show();
    if (name !== undefined) refocus(name);
    else body.querySelector(`tr.layer[data-layer="${index}"] button`)?.focus();
    document.activeElement.scrollIntoView({ block: "center" });
  }

  function choose(key) {
    which = key;
    document.querySelectorAll("#row-choice input").forEach((input) => (input.checked = input.value === key));
  }

  maps.choice(byId("row-choice"), "rows", [
    ["trained", `trained (${commas(counts.trained)})`], ["needs", `what needs a look (${commas(counts.needs)})`], ["all", `all (${commas(counts.all)})`],
  ], (key) => { choose(key); shutWhileFiltered = new Set(); announce(`${commas(show())} parameters match`); });
  choose(which);
  typed(filter, () => { shutWhileFiltered = new Set(); announce(`${commas(show())} parameters match`); });
  byId("rows-unfold").addEventListener("click", () => { columns.forEach((_, index) => open.add(index)); shutWhileFiltered = new Set(); show(); });
  byId("rows-fold").addEventListener("click", () => { open.clear(); shutWhileFiltered = new Set(columns.keys()); show(); });
  show();
})();

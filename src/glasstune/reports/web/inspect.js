/* The page of `glasstune inspect`: the tree to unfold, its filter, the map of bytes. */
(() => {
  const { data, el, size, commas, count, percent, announce, drawn, typed } = glasstune;
  const { nodes, precisions } = data;
  const hasLora = nodes.some((node) => node.lora);
  const ROWS = 3000; // More rows at once would only make the browser slow.

  /* ---- The tree. An item is a node at its place. ---- */

  function item(name, last, times, index, parent) {
    const label = times > 1 ? `${name}-${last}` : name;
    const path = parent && parent.path ? `${parent.path}.${label}` : label;
    return { name, last, times, label, path, node: nodes[index], parent, level: parent ? parent.level + 1 : 1, kids: null };
  }

  function kids(of) {
    of.kids ??= (of.node.children || []).map(([name, last, times, index]) => item(name, last, times, index, of));
    return of.kids;
  }

  function each(of, visit) {
    visit(of);
    kids(of).forEach((kid) => each(kid, visit));
  }

  const root = item("", "", 1, data.root, null);
  const rows = document.getElementById("tree-rows");
  const filter = document.getElementById("tree-filter");
  const only = document.getElementById("tree-stays");
  let open = new Set();
  let shut = new Set(); // What the reader folded while a filter held it open.
  let found = null; // While filtering: items that match, and those with a match below.
  let current = root;

  function foldAll() {
    open = new Set([root]);
    // The way to the blocks stays open: a page that shows one line tells nothing.
    each(root, (at) => {
      if (at.level <= 3 && at.node.children && at.times === 1) open.add(at);
    });
  }

  function unfoldAll() {
    open = new Set();
    each(root, (at) => at.node.children && open.add(at));
  }

  function isOpen(at) {
    if (found && found.below.has(at)) return !shut.has(at);
    return open.has(at);
  }

  function toggle(at) {
    if (!at.node.children) return;
    const was = isOpen(at);
    if (found && found.below.has(at)) (was ? shut.add(at) : shut.delete(at));
    else if (was) open.delete(at);
    else open.add(at);
    current = at;
    show(true);
  }

  /* Everything of an item that the filter reads, in lower case. Digits of the query stand for a
     block inside a folded run: "h.7." finds (0-29). */
  function text(at, query) {
    const numbers = query.match(/\d+/g) || [];
    const paths = [at.path];
    for (const number of numbers) {
      const chain = [];
      for (let up = at; up && up.parent; up = up.parent) {
        const inside = up.times > 1 && Number(number) >= Number(up.name) && Number(number) <= Number(up.last);
        chain.unshift(inside ? number : up.label);
      }
      paths.push(chain.join("."));
    }
    const cells = at.node.cells.flatMap((cell) => (cell ? [cell.class, cell.dtype, cell.reason, cell.code] : []));
    return [...paths, at.node.class, ...cells, at.node.lora && at.node.lora.text].filter(Boolean).join("\n").toLowerCase();
  }

  function search() {
    const query = filter.value.trim().toLowerCase();
    const stays = only !== null && only.checked;
    shut = new Set();
    found = null;
    if (query || stays) {
      found = { match: new Set(), below: new Set(), inside: !stays };
      each(root, (at) => {
        if (stays && !at.node.stays) return;
        if (query && !text(at, query).includes(query)) return;
        found.match.add(at);
        for (let up = at.parent; up && !found.below.has(up); up = up.parent) found.below.add(up);
      });
      announce(`${found.match.size} modules match`);
    }
    show(false);
  }

  function visible() {
    const list = [];
    const walk = (at, inside) => {
      if (found && !inside && !found.match.has(at) && !found.below.has(at)) return;
      list.push(at);
      if (isOpen(at)) kids(at).forEach((kid) => walk(kid, inside || (found && found.inside && found.match.has(at))));
    };
    walk(root, false);
    return found && !found.match.size ? [] : list;
  }

  function show(focus) {
    const list = visible();
    if (!list.includes(current)) current = list[0] || root;
    rows.replaceChildren(...list.slice(0, ROWS).map(row));
    if (list.length > ROWS) {
      rows.append(el("tr", {}, el("td", { colspan: 9 }, `${commas(list.length - ROWS)} more modules: filter to see them.`)));
    }
    document.getElementById("tree-none").hidden = list.length > 0;
    if (focus) rows.querySelector('[tabindex="0"]')?.focus({ preventScroll: false });
  }

  function row(at) {
    const { node } = at;
    const branch = Boolean(node.children);
    const line = el("tr", {
      role: "row", "aria-level": at.level, tabindex: at === current ? 0 : -1,
      "aria-expanded": branch ? String(isOpen(at)) : null,
      class: found && found.match.has(at) ? "match" : null,
      "data-path": at.path,
      onclick: (event) => {
        if (String(document.getSelection())) return; // Someone marks text to copy it.
        current = at;
        if (branch) toggle(at);
        else show(true);
        event.preventDefault();
      },
    }, nameCell(at), precisions.map((precision, index) => cell(at, precision, index)), hasLora && loraCell(at));
    line.item = at;
    return line;
  }

  function nameCell(at) {
    const { node } = at;
    const times = at.times > 1 ? `${at.times} x ` : "";
    const facts = [
      node.shape && node.shape.join(" × "),
      node.parameters ? `${count(node.parameters)} parameters` : null,
      node.tied ? `tied to ${node.tied}` : null,
      node.own ? (node.trainable ? "trained" : "frozen") : null,
    ].filter(Boolean).join(" · ");
    const why = sharedReason(node);
    const name = el("div", { class: "name" },
      el("span", { class: "twist", "aria-hidden": "true" }, node.children ? (isOpen(at) ? "▾" : "▸") : ""),
      el("span", {},
        el("code", {}, at.label ? el("b", {}, `(${at.label}): `) : null, times, node.class, node.detail && !node.children ? el("i", {}, `(${node.detail})`) : null),
        facts ? el("small", {}, facts) : null,
        why ? el("small", {}, `stays at 16 bit: ${why}`) : null));
    name.style.setProperty("--level", at.level - 1);
    return el("th", { role: "rowheader", scope: "row" }, name);
  }

  /* The reason why a module stays, where it is the same at every quantised precision. */
  function sharedReason(node) {
    const cells = node.cells.filter((own, index) => precisions[index].bits !== 16);
    const reasons = new Set(cells.map((own) => (own && !own.quantised && (own.bytes || node.tied) ? own.reason : null)));
    return reasons.size === 1 ? [...reasons][0] : null;
  }

  function cell(at, precision, index) {
    const { node } = at;
    const own = node.cells[index];
    const bytes = node.bytes[index];
    if (!bytes && !(own && own.quantised)) return el("td", { role: "gridcell" });
    const notes = [];
    let mark = "";
    if (own && own.class && own.class !== node.class) mark = `→ ${own.class}`;
    else if (own && own.bytes && own.dtype) mark = own.dtype;
    if (own) {
      const extra = Object.entries(own.parts || {}).filter(([part]) => part === "scales" || part === "code");
      if (own.quantised) {
        notes.push([own.dtype, ...extra.map(([part, value]) => `${part} ${size(value)}`),
          own.transient ? `expands to ${size(own.transient)}` : null].filter(Boolean).join(" · "));
      } else if (own.reason && precision.bits !== 16 && !sharedReason(node)) notes.push(`stays: ${own.reason}`);
    }
    const times = at.times > 1;
    if (times) notes.push(`${size(bytes * at.times)} together`);
    const bar = el("span", { class: `share ${kind(own, precision, node)}`, "aria-hidden": "true" });
    bar.style.setProperty("--share", Math.min(1, (bytes * run(at)) / precision.total));
    return el("td", { role: "gridcell", "data-label": precision.label },
      el("span", { class: "line" },
        el("span", { class: own && own.quantised ? "changed" : "" }, mark),
        el("span", { class: "number" }, bytes ? (times ? `${at.times} × ${size(bytes)}` : size(bytes)) : "")),
      bytes ? bar : null,
      notes.map((note) => el("small", {}, note)));
  }

  /* How often an item stands in the model, with the runs that it is inside of. */
  function run(at) {
    let times = 1;
    for (let up = at; up; up = up.parent) times *= up.times;
    return times;
  }

  function kind(own, precision, node) {
    if (node.children && !(own && own.bytes)) return "part-other";
    if (own && own.quantised) return precision.bits === 8 ? "part-8" : "part-4";
    return own && own.dtype ? "part-16" : "part-other";
  }

  function loraCell(at) {
    const { lora } = at.node;
    if (!lora) return el("td", { role: "gridcell" });
    const all = lora.weight_bytes + lora.gradient_bytes + lora.optimizer_bytes;
    return el("td", { role: "gridcell", "data-label": "Adapter" },
      el("span", { class: "line" }, el("span", { class: "changed" }, `+ ${lora.text}`), el("span", { class: "number" }, size(all))),
      el("small", {}, `${commas(lora.parameters)} parameters${lora.lora_alpha === null ? "" : ` · alpha ${lora.lora_alpha}`}`));
  }

  function keydown(event) {
    const at = event.target.item;
    if (!at || event.ctrlKey || event.altKey || event.metaKey) return;
    const list = visible();
    const index = list.indexOf(at);
    let to = null;
    if (event.key === "ArrowDown") to = list[index + 1];
    else if (event.key === "ArrowUp") to = list[index - 1];
    else if (event.key === "Home") to = list[0];
    else if (event.key === "End") to = list[list.length - 1];
    else if (event.key === "Enter" || event.key === " ") toggle(at);
    else if (event.key === "ArrowRight") {
      if (at.node.children && !isOpen(at)) toggle(at);
      else if (isOpen(at)) to = list[index + 1];
    } else if (event.key === "ArrowLeft") {
      if (isOpen(at) && at.node.children) toggle(at);
      else to = at.parent;
    } else return;
    event.preventDefault();
    if (to) {
      current = to;
      for (const line of rows.children) {
        line.tabIndex = line.item === to ? 0 : -1;
        if (line.item === to) line.focus();
      }
    }
  }

  /* Opens the way to an item and puts the focus on it. */
  function reveal(at) {
    filter.value = "";
    if (only) only.checked = false;
    found = null;
    for (let up = at.parent; up; up = up.parent) open.add(up);
    current = at;
    show(true);
    document.activeElement.scrollIntoView({ block: "center" });
  }

  rows.addEventListener("keydown", keydown);
  typed(filter, search);
  only?.addEventListener("change", search);
  document.getElementById("tree-unfold").addEventListener("click", () => { unfoldAll(); shut = new Set(); show(false); });
  document.getElementById("tree-fold").addEventListener("click", () => { foldAll(); show(false); });
  let modules = 0;
  each(root, () => { modules += 1; });
  if (modules <= 60) unfoldAll();
  else {
    foldAll();
    each(root, (at) => at.times > 1 && at.level <= 4 && open.add(at));
  }
  show(false);

  /* ---- The map of bytes. ---- */

  const area = document.getElementById("map-area");
  const detail = document.getElementById("map-detail");
  const note = document.getElementById("map-note");
  let chosen = precisions.length - 1;

  function box(at, index, times, prefix = "") {
    const precision = precisions[index];
    const { node } = at;
    const own = node.cells[index];
    const label = prefix && at.label ? `${prefix}.${at.label}` : prefix || at.label || node.class;
    const all = times * at.times;
    const value = node.bytes[index] * all;
    const holders = kids(at).filter((kid) => kid.node.bytes[index] > 0);
    // A module that only holds one other is no box of its own.
    if (holders.length === 1 && !(own && own.bytes)) return box(holders[0], index, all, at.parent ? label : "");
    const below = holders.map((kid) => box(kid, index, all));
    const blocks = at.times > 1 ? `${at.times} × ` : "";
    const state = !own || !own.dtype ? "" : own.quantised ? own.class : `${own.dtype}`;
    const leaf = below.length === 0;
    if (!leaf && own && own.bytes) {
      below.push({ label: "own", size: size(own.bytes * all), value: own.bytes * all, kids: [], pick: () => reveal(at),
        style: kind(own, precision, {}), words: `${at.path}: ${size(own.bytes * all)} of its own, ${state}` });
    }
    const each = all > 1 && leaf ? ` (${all} × ${size(node.bytes[index])})` : "";
    return {
      label: leaf ? label : `${label} · ${blocks}${node.class}`,
      size: size(value), value, kids: below, pick: () => reveal(at), count: all,
      style: leaf ? kind(own, precision, {}) : largest(below).style, // Too small for a frame.
      words: `${at.path || node.class}: ${size(value)}${each}, ${percent(value / precision.total)}${state ? `, ${state}` : ""}`,
    };
  }

  const largest = (boxes) => boxes.reduce((best, each) => (each.value > best.value ? each : best));

  function drawMap(width) {
    if (!width || !precisions.length) return;
    const precision = precisions[chosen];
    const height = Math.round(Math.min(560, Math.max(380, width * 0.42)));
    const missing = treemap.draw(area, box(root, chosen, 1), width, height, `Bytes by module, ${precision.label}`,
      (words) => { detail.textContent = words; });
    const bytes = missing.reduce((sum, each) => sum + each.value, 0);
    const parts = missing.reduce((sum, each) => sum + each.count, 0);
    note.textContent = missing.length ? `${commas(parts)} modules with ${size(bytes)} together are too small to draw.` : "";
    detail.textContent = `${precision.label}: ${size(precision.total)}. Point at an area, or use Tab and the arrow keys.`;
  }

  precisions.forEach((precision, index) => {
    document.getElementById("map-choice").append(el("label", {},
      el("input", { type: "radio", name: "map-precision", value: precision.key, checked: index === chosen,
        onchange: () => { chosen = index; drawMap(area.clientWidth); announce(`${precision.label}: ${size(precision.total)}`); } }),
      el("span", {}, precision.label)));
  });
  treemap.keys(area);
  drawn(area, drawMap);

  /* ---- The rest of the table of errors. ---- */

  document.getElementById("errors-more")?.addEventListener("click", (event) => {
    document.querySelectorAll("tr.more").forEach((line) => { line.hidden = false; });
    event.target.remove();
  });
})();

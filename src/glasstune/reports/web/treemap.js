/* A squarified treemap (Bruls, Huizing, van Wijk 2000) of nested boxes, as HTML elements.

   A box is {label, size, value, style, words, pick, kids: [boxes]}: `value` is its area, `size` the
   text under its label, `style` a class, `words` what is told on hover and focus, `pick` a function
   for a click. */
const treemap = (() => {
  const { el } = glasstune;
  const HEAD = 21; // Height of a group's title, in pixels.
  const GAP = 2;
  const SLIVER = 6; // Nor is anything drawn that is thinner than this.
  const SMALL = 90; // Boxes with fewer square pixels are drawn together, or left out.

  /* Splits a rectangle among values sorted from large to small; gives rectangles in that order. */
  function squarify(values, x, y, width, height) {
    const total = values.reduce((sum, value) => sum + value, 0);
    const placed = [];
    if (total <= 0 || width <= 0 || height <= 0) return values.map(() => null);
    const scale = (width * height) / total;
    let start = 0;
    while (start < values.length) {
      const side = Math.min(width, height);
      let sum = 0;
      let end = start;
      let best = Infinity;
      while (end < values.length) {
        const next = sum + values[end] * scale;
        const worst = Math.max(
          (side * side * values[start] * scale) / (next * next),
          (next * next) / (side * side * values[end] * scale),
        );
        if (worst > best) break;
        best = worst;
        sum = next;
        end += 1;
      }
      const thick = sum / side;
      let along = 0;
      for (let index = start; index < end; index += 1) {
        const length = (values[index] * scale) / thick;
        placed.push(
          width >= height
            ? { x, y: y + along, width: thick, height: length }
            : { x: x + along, y, width: length, height: thick },
        );
        along += length;
      }
      if (width >= height) { x += thick; width -= thick; } else { y += thick; height -= thick; }
      start = end;
    }
    return placed;
  }

  /* Puts the small ones of `boxes` into one, so that none is a sliver that nobody can read. */
  function gathered(boxes, area) {
    const total = boxes.reduce((sum, box) => sum + box.value, 0);
    const sorted = boxes.filter((box) => box.value > 0).sort((a, b) => b.value - a.value);
    const fits = (box) => (box.value / total) * area >= SMALL;
    const kept = sorted.filter(fits);
    const small = sorted.filter((box) => !fits(box));
    if (small.length === 0) return { kept, left: [] };
    const value = small.reduce((sum, box) => sum + box.value, 0);
    if ((value / total) * area < SMALL) return { kept, left: small };
    const count = small.reduce((sum, box) => sum + (box.count || 1), 0);
    const size = glasstune.size(value);
    kept.push({
      label: `${count} smaller`, size, value, style: "part-other",
      words: `${count} smaller modules: ${size} together`, kids: [], pick: small[0].pick,
    });
    return { kept, left: [] };
  }

  /* Draws `box` into `area` at a width and height; `tell(words)` hears of hover and focus.
     Returns the boxes that were too small to draw. */
  function draw(area, box, width, height, label, tell) {
    const tiles = [];
    const missing = [];
    const place = (element, at) => {
      element.style.left = `${at.x}px`;
      element.style.top = `${at.y}px`;
      element.style.width = `${Math.max(0, at.width - GAP)}px`;
      element.style.height = `${Math.max(0, at.height - GAP)}px`;
    };
    const walk = (boxes, x, y, w, h) => {
      const { kept, left } = gathered(boxes, w * h);
      missing.push(...left);
      const places = squarify(kept.map((each) => each.value), x, y, w, h);
      kept.forEach((each, index) => {
        const at = places[index];
        if (Math.min(at.width, at.height) < SLIVER) {
          missing.push(each);
        } else if (each.kids.length && at.width > 60 && at.height > 50) {
          const title = el("div", { class: "map-head", title: each.words },
            el("b", {}, each.label), " ", el("span", {}, each.size));
          place(title, { ...at, height: HEAD });
          const frame = el("div", { class: "map-group" });
          place(frame, at);
          area.append(frame, title);
          walk(each.kids, at.x + 3, at.y + HEAD, at.width - 6, at.height - HEAD - 3);
        } else {
          tiles.push([each, at]);
        }
      });
    };
    area.replaceChildren();
    area.style.height = `${height}px`;
    area.setAttribute("role", "group");
    area.setAttribute("aria-label", label);
    walk(box.kids.length ? box.kids : [box], 0, 0, width, height);
    tiles.forEach(([each, at], index) => {
      const tile = el("button", {
        type: "button", class: `tile ${each.style}`, tabindex: index === 0 ? 0 : -1,
        "aria-label": each.words, title: each.words,
        onclick: () => each.pick && each.pick(),
        onfocus: () => tell(each.words), onmouseenter: () => tell(each.words),
      });
      const upright = at.width < 84 && at.height > 130; // Too narrow for words: they stand.
      const [along, across] = upright ? [at.height, at.width] : [at.width, at.height];
      if (upright) tile.classList.add("upright");
      if (along > 46 && across > 22) tile.append(el("b", {}, each.label));
      if (along > 46 && across > 38) tile.append(el("span", {}, each.size));
      place(tile, at);
      area.append(tile);
    });
    return missing;
  }

  /* Arrow keys go from tile to tile; one of them is in the order of Tab. */
  function keys(area) {
    area.addEventListener("keydown", (event) => {
      const tiles = [...area.querySelectorAll(".tile")];
      const at = tiles.indexOf(document.activeElement);
      const to = {
        ArrowRight: at + 1, ArrowDown: at + 1, ArrowLeft: at - 1, ArrowUp: at - 1,
        Home: 0, End: tiles.length - 1,
      }[event.key];
      if (at < 0 || to === undefined) return;
      event.preventDefault();
      const next = tiles[Math.max(0, Math.min(tiles.length - 1, to))];
      tiles[at].tabIndex = -1;
      next.tabIndex = 0;
      next.focus();
    });
  }

  return { draw, keys, squarify };
})();

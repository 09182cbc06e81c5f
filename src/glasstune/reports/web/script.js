"use strict";

/* Shared by every page: the page's data, safe building of elements, numbers, announcements.
   Data reaches the document as text or attributes only; nothing here parses HTML. */
const glasstune = (() => {
  const source = document.getElementById("page-data");
  const data = source ? JSON.parse(source.textContent) : null;

  const SVG = "http://www.w3.org/2000/svg";

  /* el("td", {class: "number", onclick: f}, "text", otherElement, null, [list]) */
  function el(tag, attributes = {}, ...children) {
    return fill(document.createElement(tag), attributes, children);
  }

  function svg(tag, attributes = {}, ...children) {
    return fill(document.createElementNS(SVG, tag), attributes, children);
  }

  function fill(element, attributes, children) {
    for (const [name, value] of Object.entries(attributes)) {
      if (value === null || value === undefined || value === false) continue;
      if (typeof value === "function") element.addEventListener(name.slice(2), value);
      else element.setAttribute(name, value === true ? "" : String(value));
    }
    for (const child of children.flat(Infinity)) {
      if (child !== null && child !== undefined && child !== false) element.append(child);
    }
    return element;
  }

  /* Decimal bytes, as numbers.py writes them. */
  function size(count) {
    let value = count;
    for (const unit of ["B", "kB", "MB"]) {
      if (Math.abs(value) < 999.95) return unit === "B" ? `${value} B` : `${value.toFixed(1)} ${unit}`;
      value /= 1000;
    }
    return `${value.toLocaleString("en", { minimumFractionDigits: 2, maximumFractionDigits: 2 })} GB`;
  }

  const commas = (count) => count.toLocaleString("en");

  function count(value) {
    const fixed = (number, digits) =>
      number.toLocaleString("en", { minimumFractionDigits: digits, maximumFractionDigits: digits });
    if (value >= 1e9) return `${fixed(value / 1e9, 2)} billion`;
    if (value >= 1e6) return `${fixed(value / 1e6, 2)} million`;
    if (value >= 1e4) return `${fixed(value / 1e3, 1)} thousand`;
    return commas(value);
  }

  function percent(share) {
    if (share > 0 && share < 0.001) return "under 0.1%";
    if (share > 0.999 && share < 1) return "over 99.9%";
    return `${(share * 100).toFixed(1)}%`;
  }

  /* Tells screen readers what changed. */
  function announce(text) {
    document.getElementById("live").textContent = text;
  }

  /* Calls `draw` now and whenever the element's width changes. */
  function drawn(element, draw) {
    let width = -1;
    const again = () => {
      const now = Math.round(element.clientWidth);
      if (now !== width) {
        width = now;
        draw(now);
      }
    };
    new ResizeObserver(again).observe(element);
    again();
  }

  /* Calls `then` when typing pauses. */
  function typed(input, then, pause = 120) {
    let timer = 0;
    input.addEventListener("input", () => {
      clearTimeout(timer);
      timer = setTimeout(() => then(input.value), pause);
    });
  }

  return { data, el, svg, size, commas, count, percent, announce, drawn, typed };
})();

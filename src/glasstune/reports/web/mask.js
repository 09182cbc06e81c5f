/* The page of `glasstune data`: draws the tokens of a row when it is unfolded. */
(() => {
  const { data, el, commas, announce } = glasstune;
  const STATES = { t: "trained", c: "context", s: "special", p: "padding" };
  const STEP = 400; // Tokens in one piece of the document; the browser skips pieces out of sight.
  const tell = document.getElementById("tell");
  const boxes = [...document.querySelectorAll("details.row")];

  /* ---- Text that can be seen: line breaks, tabs, blanks, control characters. ---- */

  // Blanks in a row or at the end, and what has no shape of its own; joiners stay, words need them.
  const HIDDEN = /\r\n|[\n\r\t]| {2,}| $|[\u0000-\u001f\u007f-\u00a0\u00ad\u061c\u1680\u180e\u2000-\u200b\u200e\u200f\u2028-\u202f\u205f-\u206f\u3000\ufeff\ufff9-\ufffb]/g;
  const GLYPHS = { "\n": "↵", "\t": "→", "\r": "␍", "\r\n": "␍↵" };

  function visible(text) {
    const parts = [];
    let at = 0;
    for (const found of text.matchAll(HIDDEN)) {
      if (found.index > at) parts.push(text.slice(at, found.index));
      parts.push(...glyph(found[0]));
      at = found.index + found[0].length;
    }
    if (at < text.length) parts.push(text.slice(at));
    return parts;
  }

  function glyph(hidden) {
    if (hidden in GLYPHS) {
      const sign = el("i", { class: "ws" }, GLYPHS[hidden]);
      return hidden.includes("\n") ? [sign, "\n"] : [sign];
    }
    if (hidden[0] === " ") return [el("i", { class: "ws" }, "·".repeat(hidden.length))];
    return [el("i", { class: "odd" }, code(hidden))];
  }

  const code = (letter) => `U+${letter.codePointAt(0).toString(16).toUpperCase().padStart(4, "0")}`;

  /* The text as one line, for the words about a token. */
  function quoted(text) {
    if (text === "") return "(part of a character)";
    const shown = text.replace(/[\u0000-\u001f\u007f-\u00a0\u00ad\u061c\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff]/g,
      (letter) => ({ "\n": "\\n", "\t": "\\t", "\r": "\\r" })[letter] || code(letter));
    return `“${shown}”`;
  }

  /* ---- Tokens. ---- */

  function token(row, at) {
    const state = STATES[row.states[at]];
    const text = row.texts[at];
    const control = state === "trained" && row.special.has(at);
    const classes = `t ${state}${control ? " control" : ""}${text.startsWith(" ") && text.trim() ? " sp" : ""}`;
    const other = row.instead[at];
    const span = el("span", { class: classes, tabindex: -1 },
      text === "" ? el("i", { class: "ws" }, "▫") : visible(text),
      other === undefined ? null : el("b", { class: "instead" }, visible(other)));
    span.place = [row, at, 1];
    return span;
  }

  /* Padding is one mark, however long: all of it is the same token. */
  function padding(row, start, end) {
    const span = el("span", { class: "t padding", tabindex: -1 }, `padding × ${commas(end - start)}`);
    span.place = [row, start, end - start];
    return span;
  }

  function words(row, at, count) {
    const state = STATES[row.states[at]];
    const number = row.documents.findIndex((each) => at >= each.start && at < each.end);
    const where = count > 1 ? `positions ${commas(at)} to ${commas(at + count - 1)}` : `position ${commas(at)}`;
    const parts = [
      `${quoted(row.texts[at])} · id ${row.ids[at]}`,
      `${state} ${data.marks[state]}${row.special.has(at) ? " (control token)" : ""}`,
    ];
    if (row.instead[at] !== undefined) parts.push(`trained here: ${quoted(row.instead[at])}`);
    parts.push(where);
    if (number >= 0) {
      parts.push(`document ${number + 1}, its token ${commas(at - row.documents[number].start)}`, ...turnAt(row.documents[number], at));
    }
    return parts.join(" · ");
  }

  /* Tokens from start to end; those that are not trained lie in a span that can be folded. */
  function tokens(row, start, end) {
    const pieces = [];
    let piece = null;
    let rest = null;
    for (let at = start; at < end; at += 1) {
      const trained = row.states[at] === "t";
      if (!piece || piece.count >= STEP) {
        piece = el("span", { class: "piece" });
        piece.count = 0;
        pieces.push(piece);
        rest = null;
      }
      piece.count += 1;
      if (trained) {
        rest = null;
        piece.append(token(row, at));
        continue;
      }
      if (!rest) {
        rest = el("span", { class: "rest" });
        rest.gap = el("span", { class: "gap" });
        rest.size = 0;
        rest.append(rest.gap);
        piece.append(rest);
      }
      rest.size += 1;
      rest.gap.textContent = `⋯ ${commas(rest.size)} not trained ⋯`;
      rest.append(token(row, at));
    }
    return pieces;
  }

  function document_(row, each, index) {
    const title = el("h4", {},
      el("b", {}, `Document ${index + 1}`), el("code", {}, each.origin || "no origin"), el("span", {}, each.source),
      el("span", {}, `positions ${commas(each.start)} to ${commas(each.end - 1)}`),
      el("span", {}, `${commas(each.end - each.start)} tokens, ${commas(each.trained)} trained`));
    const keys = "arrow keys go from one to the next";
    if (!each.turns.length) {
      return el("section", { class: "doc" }, title,
        el("p", { class: "tokens", role: "group", "aria-label": `Tokens of document ${index + 1}; ${keys}` },
          tokens(row, each.start, each.end)));
    }
    return el("section", { class: "doc" }, title, each.turns.map((turn, number) => el("div", { class: "turn" },
      el("h5", {}, el("small", {}, `turn ${number}`), " ", el("b", {}, turn.role)),
      el("p", { class: "tokens", role: "group", "aria-label": `Tokens of document ${index + 1}, turn ${number}, ${turn.role}; ${keys}` },
        tokens(row, turn.start, turn.end)))));
  }

  /* The turn that a position belongs to, for the words about a token. */
  function turnAt(each, at) {
    const number = each.turns.findIndex((turn) => at >= turn.start && at < turn.end);
    return number < 0 ? [] : [`turn ${number}, ${each.turns[number].role}`];
  }

  function draw(box) {
    const body = box.querySelector(".body");
    if (body.childElementCount) return;
    const row = data.rows[Number(box.dataset.at)];
    if (!(row.special instanceof Set)) row.special = new Set(row.special);
    body.append(...row.documents.map((each, index) => document_(row, each, index)));
    const end = row.documents.reduce((last, each) => Math.max(last, each.end), 0);
    if (end < row.texts.length) {
      body.append(el("section", { class: "doc" }, el("h4", {}, el("b", {}, "behind the documents")),
        el("p", { class: "tokens", role: "group", "aria-label": "Padding" },
          el("span", { class: "rest" },
            el("span", { class: "gap" }, `⋯ ${commas(row.texts.length - end)} not trained ⋯`), padding(row, end, row.texts.length)))));
    }
    body.querySelectorAll(".tokens").forEach((list) => {
      const first = list.querySelector(".t");
      if (first) first.tabIndex = 0;
    });
  }

  for (const box of boxes) {
    box.addEventListener("toggle", () => box.open && draw(box));
    if (box.open) draw(box);
  }

  /* ---- What is told of a token, and the keys. ---- */

  function told(target) {
    const span = target.closest?.(".t");
    if (!span || !span.place) return null;
    tell.textContent = words(...span.place);
    return span;
  }

  const seen = (span) => span.getClientRects().length > 0;

  const middle = (box) => (box.top + box.bottom) / 2;

  /* The token in the line above or below that lies nearest. */
  function across(list, from, down) {
    const own = from.getClientRects()[0];
    const lines = list.map((span) => {
      const at = span.getClientRects()[0];
      return { span, apart: (middle(at) - middle(own)) * (down ? 1 : -1), aside: Math.abs(at.left - own.left) };
    }).filter((each) => each.apart > own.height / 2);
    const next = Math.min(...lines.map((each) => each.apart)) + own.height / 2;
    const line = lines.filter((each) => each.apart < next);
    return line.reduce((best, each) => (!best || each.aside < best.aside ? each : best), null)?.span;
  }

  function keydown(event) {
    const span = event.target.closest(".t");
    if (!span || event.ctrlKey || event.altKey || event.metaKey) return;
    const list = [...span.closest(".body").querySelectorAll(".tokens .t")].filter(seen);
    const at = list.indexOf(span);
    const to = {
      ArrowRight: () => list[at + 1], ArrowLeft: () => list[at - 1],
      Home: () => list[0], End: () => list[list.length - 1],
      ArrowDown: () => across(list, span, true), ArrowUp: () => across(list, span, false),
    }[event.key];
    if (!to) return;
    event.preventDefault();
    const next = to();
    if (!next) return;
    if (next.closest(".tokens") === span.closest(".tokens")) span.tabIndex = -1;
    else next.closest(".tokens").querySelectorAll('[tabindex="0"]').forEach((each) => (each.tabIndex = -1));
    next.tabIndex = 0;
    next.focus();
  }

  const section = document.getElementById("rows");
  section.addEventListener("mouseover", (event) => told(event.target));
  section.addEventListener("focusin", (event) => {
    const span = told(event.target);
    if (span) announce(tell.textContent);
  });
  section.addEventListener("keydown", keydown);

  const only = document.getElementById("only-trained");
  only?.addEventListener("change", () => {
    section.classList.toggle("only", only.checked);
    announce(only.checked ? "Only trained tokens are shown" : "All tokens are shown");
  });
  document.getElementById("rows-unfold")?.addEventListener("click", () => boxes.forEach((box) => (box.open = true)));
  document.getElementById("rows-fold")?.addEventListener("click", () => boxes.forEach((box) => (box.open = false)));
})();

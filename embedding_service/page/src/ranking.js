// A ranked list of items with their scores: each leads to the item, and can be added to the session.
import { element } from "./dom.js";

export function drawRanking(list, items, { onSelect, onAdd, onPoint, positions }) {
  const best = Math.max(...items.map((item) => Math.abs(item.score)), 1e-9);
  list.replaceChildren(...items.map((item, place) => {
    const { key, score } = item;
    const lead = element("button", { type: "button", className: "item" },
      element("span", { className: "key", textContent: key }), element("span", { className: "score", textContent: score.toFixed(3) }));
    const bar = element("span", { className: "bar" });
    bar.style.width = `${Math.max(0, 100 * score / best)}%`;
    lead.append(bar);
    lead.addEventListener("click", () => onSelect(key));
    const add = element("button", { type: "button", className: "quiet", textContent: "+", "aria-label": `Add ${key} to the session`, title: "Add to the session" });
    add.addEventListener("click", () => onAdd(key));
    const line = element("li", {}, lead, add);
    for (const kind of ["pointerenter", "focusin"]) line.addEventListener(kind, () => onPoint(positions()[place] ?? -1));
    for (const kind of ["pointerleave", "focusout"]) line.addEventListener(kind, () => onPoint(-1));
    return line;
  }));
}

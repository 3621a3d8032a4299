// A text field that completes keys, after the WAI-ARIA pattern "combobox with list autocomplete".
import { count, element } from "./dom.js";
import { ask } from "./service.js";

const PAUSE_MS = 60;

export class Combobox {
  // input: the text field; onChoose(item) is called with { key, row, count }, or { key } for what was typed out.
  constructor(input, onChoose) {
    Object.assign(this, { input, onChoose, items: [], active: -1 });
    this.list = element("ul", { className: "completions", id: `${input.id}-list`, role: "listbox", hidden: true,
      "aria-label": "Completions" });
    input.after(this.list);
    for (const [name, value] of Object.entries({ role: "combobox", "aria-autocomplete": "list", "aria-expanded": "false",
      "aria-controls": this.list.id, autocomplete: "off", spellcheck: "false", autocapitalize: "off" }))
      input.setAttribute(name, value);
    input.addEventListener("input", () => this.complete(PAUSE_MS));
    input.addEventListener("focus", () => { if (!this.chosen) this.complete(0); });
    input.addEventListener("blur", () => this.close());
    input.addEventListener("keydown", (event) => this.press(event));
    this.list.addEventListener("mousedown", (event) => event.preventDefault());
    this.list.addEventListener("click", (event) => {
      const option = event.target.closest("li");
      if (option) this.choose(this.items[Number(option.dataset.place)]);
    });
  }

  complete(pause) {
    this.chosen = false;
    clearTimeout(this.timer);
    this.timer = setTimeout(async () => {
      this.request?.abort();
      this.request = new AbortController();
      const { signal } = this.request;
      try {
        const { document: found } = await ask("v1/keys", [["prefix", this.input.value.trim()], ["limit", 10]], { signal });
        if (!signal.aborted && document.activeElement === this.input) this.show(found.items);
      } catch (error) {
        if (error.name !== "AbortError") this.close();
      }
    }, pause);
  }

  show(items) {
    this.items = items;
    this.active = -1;
    this.list.replaceChildren(...items.map((item, place) => element("li", { role: "option", id: `${this.list.id}-${place}`,
      "aria-selected": "false", "data-place": place }, element("span", { textContent: item.key }),
      element("small", { textContent: count(item.count) }))));
    if (!items.length) this.list.append(element("li", { className: "none", textContent: "no key begins so" }));
    this.list.hidden = false;
    this.input.setAttribute("aria-expanded", "true");
  }

  close() {
    clearTimeout(this.timer);
    this.request?.abort();
    this.list.hidden = true;
    this.input.setAttribute("aria-expanded", "false");
    this.input.removeAttribute("aria-activedescendant");
  }

  press(event) {
    const open = !this.list.hidden;
    if (event.key === "ArrowDown" || event.key === "ArrowUp") {
      event.preventDefault();
      if (!open) return this.complete(0);
      this.mark(this.active + (event.key === "ArrowDown" ? 1 : -1));
    } else if (event.key === "Enter") {
      event.preventDefault();
      const typed = this.input.value.trim();
      if (open && this.active >= 0) this.choose(this.items[this.active]);
      else if (typed) this.choose(this.items.find((item) => String(item.key) === typed) ?? { key: typed });
    } else if (event.key === "Escape" && open) {
      event.preventDefault();
      this.close();
    }
  }

  mark(place) {
    const options = [...this.list.querySelectorAll("[role=option]")];
    if (!options.length) return;
    this.active = place < -1 ? options.length - 1 : place >= options.length ? -1 : place;
    options.forEach((option, i) => option.setAttribute("aria-selected", String(i === this.active)));
    if (this.active < 0) return this.input.removeAttribute("aria-activedescendant");
    this.input.setAttribute("aria-activedescendant", options[this.active].id);
    options[this.active].scrollIntoView({ block: "nearest" });
  }

  choose(item) {
    this.chosen = true;
    this.close();
    this.onChoose(item);
  }
}

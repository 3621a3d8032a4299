// A session that is put together by hand, and what is recommended for it.
import { byId, element } from "./dom.js";

export class Session {
  // onChange(items): the items, oldest first
  constructor(onChange) {
    this.items = [];
    this.onChange = onChange;
    byId("clear").addEventListener("click", () => this.set([]));
  }

  add(key) {
    this.set([...this.items, key]);
  }

  set(items) {
    this.items = items;
    this.draw();
    this.onChange(items);
  }

  draw() {
    byId("clear").hidden = !this.items.length;
    byId("session-empty").hidden = this.items.length > 0;
    byId("session").replaceChildren(...this.items.map((key, place) => {
      const remove = element("button", { className: "quiet", type: "button", textContent: "×", "aria-label": `Remove ${key} from the session` });
      remove.addEventListener("click", () => {
        this.set(this.items.filter((_, other) => other !== place));
        const next = byId("session").querySelectorAll("button")[Math.min(place, this.items.length - 1)];
        (next ?? byId("session-input")).focus();
      });
      return element("li", {}, element("span", { textContent: key }), remove);
    }));
  }
}

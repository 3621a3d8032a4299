// element("p", { className: "note", textContent: "..." }, ...children); properties with a dash are attributes.
export function element(tag, properties = {}, ...children) {
  return filled(document.createElement(tag), properties, children);
}

export function graphic(tag, attributes = {}, ...children) {
  const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...children);
  return node;
}

export const byId = (id) => document.getElementById(id);

const units = ["B", "kB", "MB", "GB", "TB"];

export function bytes(size) {
  const power = Math.min(units.length - 1, Math.max(0, Math.floor(Math.log10(Math.max(size, 1)) / 3)));
  return `${(size / 1000 ** power).toPrecision(3).replace(/\.0+$/, "")} ${units[power]}`;
}

export const count = (number) => number.toLocaleString("en");

// So many significant digits, but never an exponent where the number is large: 1.23, 123, 1,234.
export const digits = (number, num) => (Math.round(Math.abs(number)) >= 10 ** num ? count(Math.round(number)) : number.toPrecision(num));

function filled(node, properties, children) {
  for (const [name, value] of Object.entries(properties)) {
    if (name.includes("-") || name === "role") node.setAttribute(name, value);
    else node[name] = value;
  }
  node.append(...children.filter((child) => child != null));
  return node;
}

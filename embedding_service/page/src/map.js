// The catalogue on a plane: deck.gl draws the points by WebGL 2, a few labels are elements above them.
import { Deck, LinearInterpolator, OrthographicView } from "@deck.gl/core";
import { LineLayer, ScatterplotLayer } from "@deck.gl/layers";
import { element } from "./dom.js";
import { PointGrid } from "./nearest_point.js";
import { PointLayer } from "./point_layer.js";

export const PALETTE = ["#4c78a8", "#f58518", "#54a24b", "#e45756", "#72b7b2", "#b279a2", "#d9b400", "#9d755d", "#ff8fa3",
  "#7f6bd6", "#8bbf3f", "#8a8f98"];
const COLORS = PALETTE.map((color) => [1, 3, 5].map((at) => parseInt(color.slice(at, at + 2), 16)));
const DIMMED_ALPHA = 26;
const PICK_PIXELS = 9;
const FLIGHT_MS = 450;
const MAX_LABELS = 12;
const LEGEND_PIXELS = 236;
const OUTSIDE = 0.01; // of the points on either side: islands far off do not decide what is shown at first
const SHOWN_NEAR = 0.7;
const dark = matchMedia("(prefers-color-scheme: dark)");
const still = matchMedia("(prefers-reduced-motion: reduce)");

export class CatalogueMap {
  // host: the focusable element it fills. onHover(row or -1), onPick(row), onProblem(text), labelOf(row) -> text or undefined.
  constructor(host, { onHover, onPick, onProblem, labelOf }) {
    Object.assign(this, { host, onHover, onPick, labelOf, hovered: -1, focus: -1, near: [], session: [], shown: null });
    this.labels = element("div", { className: "labels", "aria-hidden": "true" });
    this.canvas = element("canvas");
    host.append(this.canvas, this.labels);
    this.deck = new Deck({
      canvas: this.canvas,
      views: new OrthographicView({ flipY: false }),
      controller: { inertia: 220, dragRotate: false, doubleClickZoom: true, keyboard: false, scrollZoom: { smooth: true, speed: 0.012 } },
      deviceProps: { webgl: { antialias: false } }, // the points are smooth by themselves
      layers: [],
      useDevicePixels: Math.min(devicePixelRatio, 2),
      pickingRadius: 0,
      getCursor: ({ isDragging }) => (isDragging ? "grabbing" : this.hovered >= 0 ? "pointer" : "grab"),
      onViewStateChange: ({ viewState }) => { this.view = viewState; },
      onAfterRender: () => this.rendered(),
      onClick: ({ x, y }) => { const row = this.at(x, y); if (row >= 0) onPick(row); },
      onError: (error) => { this.problem = String(error.message ?? error); onProblem(this.problem); },
      onLoad: () => { this.canvas.tabIndex = -1; }, // the host takes the focus
    });
    host.addEventListener("pointermove", (event) => this.hover(event));
    host.addEventListener("pointerleave", () => this.setHovered(-1));
    host.addEventListener("keydown", (event) => this.press(event));
    dark.addEventListener("change", () => this.draw());
  }

  // places: Float32Array [2 rows]; codes: Uint8Array [rows]
  setPoints(places, codes, { keepView = false } = {}) {
    this.places = places;
    this.codes = codes;
    this.grid = new PointGrid(places);
    this.bulk = this.box([...Array(places.length / 2).keys()], OUTSIDE);
    const extent = Math.max(...this.bulk.map(([from, to]) => to - from), 1e-9);
    this.radius = 0.28 * extent / Math.sqrt(places.length / 2);
    this.paint();
    if (!keepView) this.fit();
  }

  setCodes(codes) {
    this.codes = codes;
    this.paint();
  }

  // Only the points of one code keep their colour; null: all.
  setShown(code) {
    this.shown = code;
    this.paint();
  }

  // Rows that stand out: one in focus, those near it, those of the session; -1s have no place on the map.
  mark({ focus = this.focus, near = this.near, session = this.session }) {
    Object.assign(this, { focus, near, session });
    this.draw();
  }

  paint() {
    const alpha = this.codes.length > 60_000 ? 150 : this.codes.length > 15_000 ? 175 : 205;
    this.colors = new Uint8Array(4 * this.codes.length);
    for (let i = 0; i < this.codes.length; i++) {
      const code = this.codes[i];
      this.colors.set(COLORS[code % COLORS.length], 4 * i);
      this.colors[4 * i + 3] = this.shown === null || this.shown === code ? alpha : DIMMED_ALPHA;
    }
    this.draw();
  }

  draw() {
    if (!this.places) return;
    const place = (row) => [this.places[2 * row], this.places[2 * row + 1]];
    const here = (rows) => rows.filter((row) => row >= 0 && 2 * row < this.places.length);
    const ink = dark.matches ? [240, 243, 248] : [20, 24, 32];
    const color = (row) => COLORS[this.codes[row] % COLORS.length];
    const num = this.places.length / 2;
    const rings = (id, rows, radius, width, ring = ink) => new ScatterplotLayer({
      id, data: here(rows), getPosition: place, getRadius: radius, radiusUnits: "pixels", stroked: true, lineWidthUnits: "pixels",
      getLineWidth: width, getLineColor: ring, getFillColor: color, updateTriggers: { getFillColor: this.codes, getPosition: this.places },
    });
    const [focus] = here([this.focus]);
    this.deck.setProps({ layers: [
      new PointLayer({
        id: "points", places: this.places, colors: this.colors, radius: this.radius,
        radiusMinPixels: num > 60_000 ? 1 : num > 15_000 ? 1.4 : 2.1, radiusMaxPixels: 5,
        parameters: { depthWriteEnabled: false, depthCompare: "always" },
      }),
      new LineLayer({
        id: "ties", data: focus === undefined ? [] : here(this.near), getSourcePosition: () => place(focus), getTargetPosition: place,
        getColor: [...ink, 70], getWidth: 1, widthUnits: "pixels", updateTriggers: { getSourcePosition: [focus, this.places], getTargetPosition: this.places },
      }),
      rings("near", this.near, 4, 1.25),
      rings("session", this.session, 5, 2.5, [232, 93, 36]),
      rings("focus", [this.focus], 7, 2.5),
    ] });
  }

  fit() {
    this.fly(this.bulk, 0);
  }

  // Show a row, and most of those near it, where they are on the map: not one far off that is drawn elsewhere.
  show([focus, ...near]) {
    const isHere = (row) => row >= 0 && 2 * row < this.places.length;
    if (!isHere(focus)) return;
    const apart = (row) => Math.hypot(...[0, 1].map((axis) => this.places[2 * row + axis] - this.places[2 * focus + axis]));
    const here = near.filter(isHere).sort((a, b) => apart(a) - apart(b));
    this.fly(this.box([focus, ...here.slice(0, Math.ceil(SHOWN_NEAR * here.length))], 0), FLIGHT_MS);
  }

  // The rectangle of rows, without the `outside` share that lies farthest off on either side.
  box(rows, outside) {
    return [0, 1].map((axis) => {
      const sorted = Float32Array.from(rows, (row) => this.places[2 * row + axis]).sort();
      const cut = Math.floor(outside * sorted.length);
      return [sorted[cut], sorted[sorted.length - 1 - cut]];
    });
  }

  fly([[left, right], [bottom, top]], duration) {
    const { clientWidth: width, clientHeight: height } = this.host;
    const whole = Math.max(...this.bulk.map(([from, to]) => to - from), 1e-9);
    const aside = width > 560 ? LEGEND_PIXELS : 0; // the legend covers the left side
    const room = [right - left, top - bottom].map((extent) => Math.max(extent * 1.3, whole / 5));
    const zoom = Math.log2(Math.min(Math.max(width - aside, 80) / room[0], Math.max(height, 80) / room[1]));
    const limits = { minZoom: Math.log2(Math.min(width, height) / whole) - 2, maxZoom: Math.log2(Math.min(width, height) / whole) + 9 };
    this.move({ target: [(left + right) / 2 - aside / 2 / 2 ** zoom, (bottom + top) / 2], zoom, ...limits }, duration);
  }

  move(view, duration) {
    this.view = { ...this.view, ...view };
    const transition = duration && !still.matches
      ? { transitionDuration: duration, transitionInterpolator: new LinearInterpolator(["target", "zoom"]), transitionEasing: (t) => 1 - (1 - t) ** 3 }
      : { transitionDuration: 0 };
    this.deck.setProps({ initialViewState: { ...this.view, ...transition } });
  }

  press(event) {
    const step = 0.15 * this.host.clientHeight / 2 ** (this.view?.zoom ?? 0);
    const [x, y] = this.view?.target ?? [0, 0];
    const moves = {
      ArrowLeft: { target: [x - step, y] }, ArrowRight: { target: [x + step, y] },
      ArrowUp: { target: [x, y + step] }, ArrowDown: { target: [x, y - step] },
      "+": { zoom: this.view?.zoom + 0.5 }, "=": { zoom: this.view?.zoom + 0.5 }, "-": { zoom: this.view?.zoom - 0.5 },
    };
    if (![this.host, this.canvas].includes(event.target) || event.ctrlKey || event.metaKey || event.altKey) return;
    if (event.key === "0") this.fit();
    else if (moves[event.key]) this.move(moves[event.key], 120);
    else return;
    event.preventDefault();
  }

  at(x, y) {
    const viewport = this.deck.getViewports()[0];
    if (!viewport || !this.grid) return -1;
    const [px, py] = viewport.unproject([x, y]);
    return this.grid.nearest(px, py, PICK_PIXELS / 2 ** viewport.zoom);
  }

  hover(event) {
    if (event.buttons) return;
    const { left, top } = this.host.getBoundingClientRect();
    this.setHovered(this.at(event.clientX - left, event.clientY - top));
  }

  setHovered(row) {
    if (row === this.hovered) return;
    this.hovered = row;
    this.onHover(row);
    this.placeLabels();
  }

  rendered() {
    this.numFrames = (this.numFrames ?? 0) + 1;
    this.placeLabels();
  }

  // Names of what stands out, the more important first, where they do not cover each other.
  placeLabels() {
    const viewport = this.deck.getViewports()[0];
    if (!viewport || !this.places) return;
    const rows = [...new Set([this.hovered, this.focus, ...this.session, ...this.near])];
    const taken = [];
    const wanted = [];
    for (const row of rows) {
      if (row < 0 || 2 * row >= this.places.length || wanted.length === MAX_LABELS) continue;
      const text = this.labelOf(row);
      if (text === undefined) continue;
      const [x, y] = viewport.project([this.places[2 * row], this.places[2 * row + 1]]);
      const width = 8 + 6.6 * Math.min(text.length, 34);
      const before = x + width + 10 > this.host.clientWidth;
      const box = before ? [x - width - 10, y - 10, x - 9, y + 10] : [x + 9, y - 10, x + width + 10, y + 10];
      if (x < 0 || y < 0 || x > this.host.clientWidth || y > this.host.clientHeight) continue;
      if (taken.some((other) => box[0] < other[2] && other[0] < box[2] && box[1] < other[3] && other[1] < box[3])) continue;
      taken.push(box);
      wanted.push({ text, x, y, before, kind: row === this.hovered ? "hovered" : row === this.focus ? "focus" : "" });
    }
    while (this.labels.children.length < wanted.length) this.labels.append(element("span"));
    [...this.labels.children].forEach((label, i) => {
      label.hidden = i >= wanted.length;
      if (label.hidden) return;
      const { text, x, y, before, kind } = wanted[i];
      if (label.textContent !== text) label.textContent = text;
      label.className = kind;
      label.style.transform = `translate(${Math.round(x) + (before ? -10 : 10)}px, ${Math.round(y) - 10}px)${before ? " translateX(-100%)" : ""}`;
    });
  }
}

// The page: what is chosen (an item, a session, a view) is in the address, so that a link shows what one sees.
import { Combobox } from "./combobox.js";
import { byId, count, element } from "./dom.js";
import { CatalogueMap, PALETTE } from "./map.js";
import { drawRanking } from "./ranking.js";
import { readTensors } from "./safetensors.js";
import { ask, askBytes } from "./service.js";
import { Session } from "./session.js";
import { agreed, drawFigures, drawVersions } from "./version.js";

const NUM_NEAR = 20;
const HEALTH_MS = 5000;
const CLUSTER = "k-means";
const LAYOUT_NAMES = { umap: "UMAP", pca: "PCA" };

const state = { version: "", item: null, tensors: null, labels: {}, layout: "", colour: CLUSTER, near: [], recommended: [] };
const keyOfRow = new Map();
const rowOfKey = new Map();
const asking = new Set();
let map;

// --- keys and rows

function learn(items) {
  for (const { key, row } of items) {
    keyOfRow.set(row, key);
    rowOfKey.set(String(key), row);
  }
}

async function rowsOf(keys) {
  const unknown = keys.filter((key) => !rowOfKey.has(String(key)));
  if (unknown.length) learn((await ask("v1/keys", unknown.map((key) => ["key", key]))).document.items);
  return keys.map((key) => rowOfKey.get(String(key)) ?? -1);
}

async function learnRows(rows) {
  const unknown = rows.filter((row) => row >= 0 && !keyOfRow.has(row) && !asking.has(row));
  if (!unknown.length) return;
  unknown.forEach((row) => asking.add(row));
  try {
    learn((await ask("v1/keys", unknown.map((row) => ["row", row]))).document.items);
  } finally {
    unknown.forEach((row) => asking.delete(row));
  }
}

// --- an item and its neighbours

async function select(key, { fly = true } = {}) {
  state.item = key;
  byId("search").value = key;
  writeAddress();
  const status = byId("near-status");
  try {
    const { document: answer, milliseconds } = await ask("v1/similar", [["key", key], ["k", NUM_NEAR]]);
    if (state.item !== key) return;
    status.textContent = `${answer.items.length} neighbours in ${milliseconds.toFixed(1)} ms`;
    byId("near-title").textContent = key;
    drawRanking(byId("near"), answer.items, ranking(() => state.near));
    const rows = await rowsOf([key, ...answer.items.map((item) => item.key)]);
    if (state.item !== key) return;
    state.near = rows.slice(1);
    map?.mark({ focus: rows[0], near: state.near });
    if (fly) map?.show(rows);
    noteVersion(answer.version);
  } catch (error) {
    if (state.item !== key) return;
    state.near = [];
    byId("near-title").textContent = key;
    byId("near").replaceChildren();
    map?.mark({ focus: -1, near: [] });
    status.textContent = error.code === "key_not_found" ? `${key} is not in the vocabulary` : error.message;
  }
}

const ranking = (positions) => ({ onSelect: select, onAdd: (key) => session.add(key), onPoint: (row) => map?.setHovered(row), positions });

// --- a session and what is recommended for it

const session = new Session(recommend);

async function recommend(items) {
  writeAddress();
  const status = byId("recommended-status");
  const list = byId("recommended");
  const asked = (recommend.last = {});
  if (!items.length) {
    list.replaceChildren();
    status.textContent = "";
    state.recommended = [];
    return map?.mark({ session: [] });
  }
  const parameters = [...items.map((key) => ["items", key]), ["k", NUM_NEAR], ["exclude_seen", byId("exclude-seen").checked]];
  try {
    const { document: answer, milliseconds } = await ask("v1/recommend", parameters);
    if (asked !== recommend.last) return;
    drawRanking(list, answer.items, ranking(() => state.recommended));
    status.textContent = `${answer.items.length} recommendations in ${milliseconds.toFixed(1)} ms`
      + (answer.cold_start ? "; nothing of the session is known: these are the most frequent" : answer.unknown.length ? `; not known: ${answer.unknown.join(", ")}` : "");
    const rows = await rowsOf([...new Set([...items, ...answer.items.map((item) => item.key)])]);
    if (asked !== recommend.last) return;
    state.recommended = answer.items.map((item) => rowOfKey.get(String(item.key)) ?? -1);
    map?.mark({ session: rows.slice(0, new Set(items).size) });
    noteVersion(answer.version);
  } catch (error) {
    if (asked !== recommend.last) return;
    list.replaceChildren();
    status.textContent = error.message;
  }
}

// --- the map

function drawMap({ keepView = false } = {}) {
  const places = state.tensors[`layout.${state.layout}`];
  map.setPoints(places, state.tensors[`colour.${state.colour}`], { keepView });
  drawLegend();
}

function segmented(host, names, labels, chosen, onChoose) {
  host.replaceChildren(...names.map((name) => {
    const input = element("input", { type: "radio", name: host.id, value: name, checked: name === chosen });
    input.addEventListener("change", () => onChoose(name));
    return element("label", {}, input, element("span", { textContent: labels[name] ?? name }));
  }));
  host.hidden = names.length < 2;
}

// One line per colour; of clusters the most frequent items tell what they are.
async function drawLegend() {
  const codes = state.tensors[`colour.${state.colour}`];
  const { colour, version } = state;
  const counts = new Array(256).fill(0);
  const first = new Map();
  codes.forEach((code, row) => {
    if (counts[code]++ < 2) first.set(code, [...(first.get(code) ?? []), row]);
  });
  const used = [...first.keys()].sort((a, b) => a - b);
  let names = state.labels[colour];
  if (!names) {
    await learnRows([...first.values()].flat()).catch(() => {});
    if (colour !== state.colour || version !== state.version) return;
    names = Object.fromEntries(used.map((code) => [code, first.get(code).map((row) => keyOfRow.get(row) ?? "").join(", ")]));
  }
  byId("legend").replaceChildren(...used.map((code) => {
    const dot = element("i");
    dot.style.background = PALETTE[code % PALETTE.length];
    const toggle = element("button", { type: "button", "aria-pressed": "false", title: names[code] }, dot,
      element("span", { textContent: names[code] }), element("small", { textContent: count(counts[code]) }));
    toggle.addEventListener("click", () => {
      const on = toggle.getAttribute("aria-pressed") !== "true";
      for (const other of byId("legend").querySelectorAll("button")) other.setAttribute("aria-pressed", "false");
      toggle.setAttribute("aria-pressed", String(on));
      map.setShown(on ? code : null);
    });
    return element("li", {}, toggle);
  }));
  map.setShown(null);
}

async function loadMap() {
  const told = byId("map-told");
  try {
    const { tensors, metadata } = readTensors(await askBytes("v1/map"));
    const about = JSON.parse(metadata.about);
    state.tensors = tensors;
    state.labels = JSON.parse(metadata.labels);
    const named = (kind) => Object.keys(tensors).filter((name) => name.startsWith(kind)).map((name) => name.slice(kind.length));
    const layouts = Object.keys(LAYOUT_NAMES).filter((name) => named("layout.").includes(name));
    state.layout = layouts.includes(state.layout) ? state.layout : layouts[0];
    state.colour = named("colour.").includes(state.colour) ? state.colour : CLUSTER;
    segmented(byId("layouts"), layouts, LAYOUT_NAMES, state.layout, (name) => {
      state.layout = name;
      drawMap();
    });
    const colours = byId("colours");
    colours.replaceChildren(...named("colour.").sort((a, b) => (b === CLUSTER) - (a === CLUSTER) || a.localeCompare(b))
      .map((name) => element("option", { value: name, textContent: name === CLUSTER ? "cluster" : name, selected: name === state.colour })));
    colours.onchange = () => {
      state.colour = colours.value;
      map.setCodes(tensors[`colour.${state.colour}`]);
      drawLegend();
    };
    const shown = tensors[`layout.${state.layout}`].length / 2;
    told.textContent = shown < about.num_items ? `the ${count(shown)} most frequent of ${count(about.num_items)} items` : `${count(shown)} items`;
    byId("map-tools").hidden = false;
    map ??= new CatalogueMap(byId("map"), {
      onHover: (row) => { if (row >= 0) learnRows([row]).then(() => map.placeLabels(), () => {}); },
      onPick: async (row) => { await learnRows([row]); select(keyOfRow.get(row), { fly: false }); byId("near-title").scrollIntoView({ block: "nearest" }); },
      onProblem: (text) => { told.textContent = `the map cannot be drawn here: ${text}`; },
      labelOf: (row) => (keyOfRow.has(row) ? String(keyOfRow.get(row)) : undefined),
    });
    drawMap();
  } catch (error) {
    byId("map-tools").hidden = true;
    told.textContent = error.message;
    if (!error.status) throw error;
  }
}

// --- the version

function noteVersion(version) {
  if (version === state.version || noteVersion.busy) return;
  noteVersion.busy = true;
  load().finally(() => { noteVersion.busy = false; });
}

async function load() {
  const [{ document: about }, { document: figures }] = await Promise.all([ask("v1/version"), ask("v1/figures")]);
  state.version = figures.version;
  keyOfRow.clear();
  rowOfKey.clear();
  byId("version").textContent = figures.version;
  byId("catalogue").textContent = `${count(about.num_items)} items, ${about.dim} dimensions${about.details.model ? `, ${about.details.model.replace("_", " ")}` : ""}`;
  drawFigures(figures, { model: about.details.model, numItems: about.num_items, dim: about.dim });
  if (byId("view-version").checked) refreshVersions();
  await loadMap();
  if (state.item !== null) await select(state.item);
  if (session.items.length) await recommend(session.items);
}

async function watch() {
  if (document.hidden) return;
  try {
    const { document: health } = await ask("v1/health");
    byId("alert").hidden = true;
    if (state.version) noteVersion(health.version);
  } catch (error) {
    complain(error);
  }
}

function complain(error) {
  byId("alert").textContent = error.message;
  byId("alert").hidden = false;
}

// --- the address

function writeAddress() {
  const told = new URLSearchParams();
  if (byId("view-version").checked) told.set("view", "version");
  if (state.item !== null) told.set("item", state.item);
  for (const key of session.items) told.append("session", key);
  history.replaceState(null, "", told.size ? `#${told}` : location.pathname);
}

function readAddress() {
  const told = new URLSearchParams(location.hash.slice(1));
  byId(told.get("view") === "version" ? "view-version" : "view-explore").checked = true;
  state.item = told.get("item");
  session.items = told.getAll("session");
  session.draw();
}

const refreshVersions = () => drawVersions(() => load().catch(complain));

function showView() {
  const version = byId("view-version").checked;
  if (version && state.version) refreshVersions();
  byId("explore").hidden = version;
  byId("live").hidden = !version;
  writeAddress();
}

async function start() {
  readAddress();
  showView();
  for (const id of ["view-explore", "view-version"]) byId(id).addEventListener("change", showView);
  new Combobox(byId("search"), ({ key, row }) => {
    if (row !== undefined) learn([{ key, row }]);
    select(key);
  });
  new Combobox(byId("session-input"), ({ key }) => {
    byId("session-input").value = "";
    session.add(key);
  });
  byId("exclude-seen").addEventListener("change", () => recommend(session.items));
  byId("fit").addEventListener("click", () => map?.fit());
  addEventListener("keydown", (event) => {
    if (event.key !== "/" || event.target.matches("input, textarea, select") || byId("dialog").open) return;
    event.preventDefault();
    byId("view-explore").click();
    byId("search").focus();
  });
  for (;;) {
    try {
      await load();
      break;
    } catch (error) {
      complain(error);
      if (error.status !== 401 || !(await agreed("This service asks for a token.", { always: true }))) break;
      byId("alert").hidden = true;
    }
  }
  document.body.dataset.loaded = "true";
  setInterval(watch, HEALTH_MS);
}

globalThis.lexshard = { get map() { return map; }, state };
start();

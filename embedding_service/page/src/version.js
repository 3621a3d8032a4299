// What the manifest says of the live version, what its probe finds, and the versions beside it where there are several.
import { byId, bytes, count, digits, element, graphic } from "./dom.js";
import { ask, change, hasToken, setToken } from "./service.js";

const share = (value) => (value == null ? "–" : value.toFixed(value > 0.9995 && value < 1 ? 4 : 3));
const ms = (value) => (value == null ? "–" : `${digits(value, 3)} ms`);
const INDEX_NAMES = { recommend: "Recommendations", similar: "Similar items" };

export function drawFigures(figures, { model, numItems, dim }) {
  const facts = [
    ["Version", figures.version], ["Run", figures.name], ["Published", figures.created.replace("T", " ").replace("+00:00", " UTC")],
    ["Model", model ?? "–"], ["Items", count(numItems)], ["Dimensions", dim], ["On disk", bytes(figures.bytes)],
  ];
  byId("facts").replaceChildren(...facts.map(drawFact));
  byId("indexes").replaceChildren(...Object.entries(figures.indexes).map(drawIndex));
  const rows = validationRows(figures.figures);
  byId("validation").hidden = !rows.length;
  byId("validation-rows").replaceChildren(...rows.map(([name, value]) => drawFact([name, Number.isInteger(value) ? count(value) : digits(value, 4)])));
}

const drawFact = ([name, value]) => element("div", {}, element("dt", { textContent: name }), element("dd", { textContent: value }));

function drawIndex([name, index]) {
  const { recall } = index;
  const parameters = Object.entries(index.parameters).map(([key, value]) => `${key} ${value}`).join(", ");
  const inUse = index.curve?.find((point) => settings(point) === settings(index));
  const facts = [
    ["Index", index.factory + (parameters ? `, ${parameters}` : "")], ["Metric", index.metric === "ip" ? "inner product" : "cosine"],
    ["Size", `${bytes(index.bytes)}, ${Math.round(index.bytes / index.rows)} B an item`], ["Built in", `${digits(index.build_seconds, 3)} s`],
    ["Measured on", `${count(recall.num_queries)} ${recall.queries} queries`],
    ...(inUse ? [["A query alone", `${digits(inUse.microseconds, 3)} µs`]] : []),
  ];
  return element("article", { className: "card" },
    element("h3", { textContent: INDEX_NAMES[name] ?? name }),
    element("p", { className: "figure" }, element("strong", { textContent: share(recall.value) }), ` recall@${recall.k}`),
    element("p", { className: recall.met ? "good" : "bad", textContent: `target ${share(recall.target)} ${recall.met ? "met" : "missed"}` }),
    element("p", { id: `probed-${name}`, hidden: true }),
    element("dl", {}, ...facts.map(drawFact)),
    index.curve?.length > 1 ? drawCurve(index) : null); // exact search has one point, which needs no picture
}

// What the service finds on the queries that it is asked, beside what the export has measured.
function drawProbed({ here }) {
  for (const found of here?.recall ?? []) {
    const line = byId(`probed-${found.index}`);
    if (!line || found.version !== here.live) continue;
    line.replaceChildren(element("strong", { textContent: share(found.recall) }),
      ` ± ${found.half_width.toFixed(3)} recall@${found.k} now, on ${count(found.num_queries)} recent queries${found.low ? ": less than was measured" : ""}`);
    line.className = found.low ? "bad" : "";
    line.hidden = false;
  }
}

const settings = ({ parameters }) => JSON.stringify(Object.entries(parameters).sort());

// Recall against microseconds of a query, the latter on a logarithmic scale.
function drawCurve(index) {
  const { curve, recall } = index;
  const [width, height, left, bottom] = [340, 180, 40, 30];
  const times = curve.map((point) => Math.log10(Math.max(point.microseconds, 0.1)));
  const low = Math.min(recall.target, ...curve.map((point) => point.recall));
  const [from, to] = [Math.min(...times) - 0.05, Math.max(...times) + 0.05];
  const x = (time) => left + (width - left - 12) * (time - from) / (to - from);
  const y = (value) => 10 + (height - bottom - 10) * (1 - (value - low) / Math.max(1 - low, 1e-6));
  const text = (at, up, anchor, value) => graphic("text", { x: at, y: up, "text-anchor": anchor }, value);
  const dots = curve.map((point, i) => graphic("circle", {
    cx: x(times[i]), cy: y(point.recall), r: settings(point) === settings(index) ? 6 : 3.5,
    class: settings(point) === settings(index) ? "chosen" : "",
  }, graphic("title", {}, `recall ${share(point.recall)}, ${digits(point.microseconds, 3)} µs, ${Object.entries(point.parameters).map(([k, v]) => `${k} ${v}`).join(", ")}`)));
  const sorted = curve.map((point, i) => [x(times[i]), y(point.recall)]).sort((a, b) => a[0] - b[0]);
  const label = `Recall against latency at ${curve.length} settings; the one in use is marked`;
  return graphic("svg", { viewBox: `0 0 ${width} ${height}`, class: "curve", role: "img", "aria-label": label },
    graphic("line", { x1: left, x2: width - 12, y1: y(recall.target), y2: y(recall.target), class: "target" }),
    graphic("polyline", { points: sorted.map((point) => point.join(",")).join(" ") }), ...dots,
    text(left - 6, y(1) + 4, "end", "1"), text(left - 6, y(low) + 4, "end", low.toFixed(2)),
    text(left, height - 8, "start", `${digits(10 ** from, 2)} µs`), text(width - 12, height - 8, "end", `${digits(10 ** to, 2)} µs a query`));
}

// Of a run: the metrics of its best validation; else the manifest's numbers as they are.
function validationRows(figures) {
  const { validation, best_epoch: best, ...others } = figures;
  if (!Array.isArray(validation)) return Object.entries(figures).filter(([, value]) => typeof value === "number");
  const chosen = validation.find((entry) => entry.epoch === best) ?? validation.at(-1) ?? {};
  return Object.entries({ ...chosen, ...others }).filter(([, value]) => typeof value === "number");
}

// The versions, or nothing where the service has but one: it answers 404 then.
export async function drawVersions(onChange) {
  let listing;
  try {
    ({ document: listing } = await ask("v1/versions"));
  } catch {
    byId("versions").hidden = true;
    return;
  }
  byId("versions").hidden = false;
  drawProbed(listing);
  const { versions, live, canary, previous, admission } = listing;
  const back = byId("roll-back");
  back.hidden = !previous.length;
  back.textContent = previous.length ? `Roll back to ${previous.at(-1)}` : "";
  back.onclick = () => changed("v1/versions/rollback", {}, `Roll back to ${previous.at(-1)}?`, onChange);
  byId("admission").textContent = admission && admission.state !== "live" ? `${admission.version}: ${admission.state}${admission.reason ? `, ${admission.reason}` : ""}` : "";
  byId("version-rows").replaceChildren(...[...versions].reverse().map((entry) => {
    const state = entry.version === live ? "live" : entry.version === canary ? `canary, ${digits(100 * listing.share, 2)} %` : entry.version === previous.at(-1) ? "previous" : "";
    const activate = element("button", { type: "button", textContent: "Activate", "aria-label": `Activate ${entry.version}` });
    activate.addEventListener("click", () => changed("v1/versions/activate", { version: entry.version, wait_seconds: 30 }, `Make ${entry.version} live?`, onChange));
    const { traffic = {} } = entry;
    const cells = [count(traffic.requests ?? 0), ms(traffic.p50_ms), ms(traffic.p99_ms),
      traffic.ctr == null ? "–" : `${digits(100 * traffic.ctr, 3)} % (${digits(100 * traffic.ctr_low, 2)} to ${digits(100 * traffic.ctr_high, 2)})`];
    return element("tr", {}, element("th", { scope: "row" }, entry.version, state ? element("small", { className: `state ${state.split(",")[0]}`, textContent: state }) : null),
      ...cells.map((text) => element("td", { textContent: text })), element("td", {}, drawGates(entry)),
      element("td", {}, entry.version === live || entry.problem ? null : activate));
  }));
}

function drawGates({ gates, against, problem }) {
  if (problem) return element("span", { className: "bad", textContent: problem });
  if (!gates?.length) return element("span", { textContent: "–" });
  const failed = gates.filter((gate) => !gate.passed).length;
  return element("details", {}, element("summary", { className: failed ? "bad" : "good", textContent: failed ? `${failed} of ${gates.length} missed` : `${gates.length} passed` }),
    element("dl", { className: "gates" }, ...gates.map((gate) => element("div", {},
      element("dt", { textContent: gate.gate.replaceAll("_", " ") }),
      element("dd", { className: gate.passed ? "" : "bad", textContent: `${gate.value == null ? "not measured" : gate.value.toFixed(4)} (limit ${gate.limit})${gate.note ? `, ${gate.note}` : ""}` })))),
    against ? element("small", { textContent: `against ${against}` }) : null);
}

async function changed(path, body, question, onChange) {
  if (!(await agreed(question))) return;
  const told = byId("versions-told");
  told.textContent = "working...";
  try {
    await change(path, body);
    told.textContent = "done";
  } catch (error) {
    if (error.status === 401) setToken("");
    told.textContent = error.message;
  }
  onChange();
}

// Asks whether, and for the token where there is none yet.
export function agreed(question, { always = false } = {}) {
  const dialog = byId("dialog");
  byId("dialog-question").textContent = question;
  byId("token-field").hidden = hasToken() && !always;
  byId("token").value = "";
  dialog.returnValue = "";
  dialog.showModal();
  return new Promise((resolve) => dialog.addEventListener("close", () => {
    if (dialog.returnValue === "yes" && byId("token").value) setToken(byId("token").value.trim());
    resolve(dialog.returnValue === "yes");
  }, { once: true }));
}

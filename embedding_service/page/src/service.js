// What the page asks the service, which is where the page itself came from.
const base = new URL(".", location.href.split(/[?#]/)[0]);
const TOKEN = "lexshard token";

export class Refusal extends Error {
  constructor(status, code, message) {
    super(message);
    Object.assign(this, { status, code });
  }
}

export const hasToken = () => Boolean(sessionStorage.getItem(TOKEN));
export const setToken = (token) => sessionStorage.setItem(TOKEN, token);

// { document, milliseconds }. Throws Refusal.
export async function ask(path, parameters = [], options = {}) {
  const started = performance.now();
  const text = await (await send(path, parameters, options)).text();
  return { document: parsed(text), milliseconds: performance.now() - started };
}

export async function askBytes(path, parameters = []) {
  return (await send(path, parameters, {})).arrayBuffer();
}

export const change = (path, body) =>
  ask(path, [], { method: "POST", body: JSON.stringify(body), headers: { "content-type": "application/json" } });

async function send(path, parameters, options) {
  const address = new URL(path, base);
  for (const [name, value] of parameters) address.searchParams.append(name, value);
  const token = sessionStorage.getItem(TOKEN);
  const headers = { ...options.headers, ...(token ? { authorization: `Bearer ${token}` } : {}) };
  let response;
  try {
    response = await fetch(address, { ...options, headers });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Refusal(0, "unreachable", "the service does not answer");
  }
  if (response.ok) return response;
  let told = {};
  try {
    told = JSON.parse(await response.text()).error ?? {};
  } catch { /* a proxy's own words */ }
  throw new Refusal(response.status, told.code ?? "unknown", told.message ?? `${response.status} ${response.statusText}`);
}

// Integers beyond 2^53 stay what they are, as text: they are keys.
function parsed(text) {
  return JSON.parse(text, (_, value, context) =>
    typeof value === "number" && !Number.isSafeInteger(value) && /^-?\d+$/.test(context?.source ?? "") ? context.source : value);
}

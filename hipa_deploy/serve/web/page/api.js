// Talking to the service: requests, the API key, and errors in the service's own words.

const KEY = "hipa-api-key"; // in sessionStorage: it is gone when the tab is closed

/**
 * An answer that is no image. `field` is that of the request which cannot be used, or null.
 * `retryAfter` is in seconds, or null.
 */
export class ServiceError extends Error {
  constructor(words, { status = 0, code = null, field = null, retryAfter = null } = {}) {
    super(words);
    this.status = status;
    this.code = code;
    this.field = field;
    this.retryAfter = retryAfter;
  }
}

let askForKey = null; // shows the dialog; resolves to a key, or to null
let asking = null; // the dialog that is open, shared by all requests that wait for a key

/** Say who asks the user for a key: `ask(words)` resolves to the key, or to null. */
export function onKeyNeeded(ask) {
  askForKey = ask;
}

/** GET some JSON. */
export async function getJson(path, signal) {
  const answer = await send(path, { signal, headers: { accept: "application/json" } });
  return answer.json();
}

/**
 * Make the image of an order (see `order.js`).
 *
 * Returns the PNG as the service sent it, the seed, the time from here to here, and the service's
 * own times, all in milliseconds.
 */
export async function makeImage(order, signal) {
  const request = order.task === "generate" ? jsonRequest(order) : formRequest(order);
  request.headers.accept = "image/png";
  const started = performance.now();
  const path = order.refined ? "hipa/refine" : `hipa/${order.task}`;
  const answer = await send(path, { ...request, method: "POST", signal });
  const blob = await answer.blob();
  return {
    blob,
    seed: answer.headers.get("x-hipa-seed") ?? order.seed,
    roundTrip: performance.now() - started,
    times: readTimes(answer.headers.get("server-timing") ?? ""),
  };
}

function jsonRequest(order) {
  const fields = { model: order.model, prompt: order.prompt };
  if (order.width) fields.width = order.width;
  if (order.height) fields.height = order.height;
  if (order.steps) fields.steps = order.steps;
  // A seed has up to 63 bits, and a number of JavaScript 53: its digits are written as they are.
  const body = JSON.stringify(fields).replace(/}$/, `,"seed":${order.seed}}`);
  return { body, headers: { "content-type": "application/json" } };
}

function formRequest(order) {
  const form = new FormData();
  form.set("model", order.model);
  form.set("prompt", order.prompt);
  form.set("image", order.source, "image");
  if (order.task !== "upscale") form.set("seed", order.seed);
  if (order.width) form.set("width", order.width);
  if (order.height) form.set("height", order.height);
  if (order.strength) form.set("strength", order.strength);
  if (order.scale !== undefined) form.set("scale", order.scale);
  if (order.mask) {
    form.set("mask", order.mask, "mask.png");
    form.set("feather", order.feather);
    if (order.match !== undefined) form.set("match", order.match);
  }
  return { body: form, headers: {} };
}

/** Send a request, with the key if there is one; ask for the key where the service needs it. */
async function send(path, options) {
  for (;;) {
    const key = sessionStorage.getItem(KEY);
    const headers = { ...options.headers };
    if (key) headers.authorization = `Bearer ${key}`;
    const answer = await reach(path, { ...options, headers });
    if (answer.ok) return answer;
    const error = await errorOf(answer);
    if (error.status !== 401 || !askForKey) throw error;
    // Another request may have brought a newer key while this one was under way.
    if (sessionStorage.getItem(KEY) === key) await newKey(key ? error.message : "", error);
    options.signal?.throwIfAborted();
  }
}

async function reach(path, options) {
  try {
    return await fetch(path, options);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ServiceError(
      "The service does not answer. Check that it is running and that you are connected, then try again.",
      { code: "unreachable" },
    );
  }
}

async function newKey(words, error) {
  asking ??= askForKey(words).finally(() => { asking = null; });
  const key = await asking;
  if (key === null) throw error;
  sessionStorage.setItem(KEY, key);
}

async function errorOf(answer) {
  const wait = Number.parseInt(answer.headers.get("retry-after") ?? "", 10);
  let error = {};
  try {
    error = (await answer.json()).error ?? {};
  } catch {
    // A proxy before the service answers with a page of its own.
  }
  return new ServiceError(error.message ?? `The service answered with status ${answer.status}.`, {
    status: answer.status,
    code: error.code ?? null,
    field: error.param ?? null,
    retryAfter: Number.isFinite(wait) ? wait : null,
  });
}

/** `queue;dur=1.2, make;dur=30` as {queue: 1.2, make: 30}. */
function readTimes(header) {
  const times = {};
  for (const [, name, value] of header.matchAll(/(\w+);dur=([\d.]+)/g)) times[name] = Number(value);
  return times;
}

// The page: what happens when something changes. Each part lives in a module of its own.

import { getJson, makeImage, onKeyNeeded, ServiceError } from "./api.js";
import { Form, FormProblem } from "./form.js";
import { History } from "./history.js";
import { askForKey } from "./key_dialog.js";
import { Newest } from "./newest.js";
import { orderOf, readFacts } from "./png_facts.js";
import { Refining } from "./refining.js";
import { Result } from "./result.js";
import { MISSING_MASK, Source } from "./source.js";

const SHORTEST_DELAY = 90; // milliseconds after a keystroke before a request leaves
const LONGEST_DELAY = 400;
const SETTLED = 1500; // milliseconds that an image must stand before it is kept
const MOST_TRIES = 5; // of a request that a busy service sends away
const MOST_IDEAS = 6;
const NOT_CONNECTED = "The service does not answer yet. The page goes on asking it.";

const byId = (id) => document.getElementById(id);

let about = { prompts: {}, models: {}, limits: { prompt: Infinity, body: Infinity, pixels: Infinity } };
let lastRoundTrip = SHORTEST_DELAY;
let settling = null;
let tries = 0;
let asked = 0; // counts what was asked for: reading the mask takes a moment, and may be overtaken
let tryAgain = makeNow; // what the button beside an error does
let refusal = null; // why the page has given up asking what the service offers

const form = new Form(formChanged);
const result = new Result();
const source = new Source({ changed: (what) => formChanged(what), received });
const history = new History({
  list: byId("history"),
  help: byId("history-help"),
  forget: byId("forget"),
  restore,
});
const refining = new Refining(refine);
const newest = new Newest({ run: makeImage, done, failed, busy });

// ---- asking for images ----

/**
 * Ask for the image of what the form says now.
 *
 * `delay`: wait a moment, more keystrokes may come. `keep`: the user asked for it by a key or a
 * button, so it goes into the history at once, and what is missing is said as an error.
 */
async function ask({ delay = false, keep = false, again = false } = {}) {
  const number = ++asked;
  newest.stop();
  clearTimeout(settling);
  if (!again) tries = 0;
  result.stale(result.shown !== null);
  if (!form.bundle) {
    // What was typed is asked for when the service answers. The button still loads the page anew.
    if (keep) showError(refusal ?? new Error(NOT_CONNECTED));
    return;
  }
  tryAgain = makeNow;
  let order;
  try {
    order = form.read();
    await source.fit(form.task, form.target);
  } catch (error) {
    if (number === asked) showError(error);
    return;
  }
  const parts = order && form.task !== "generate" ? await source.parts(form.task) : {};
  if (number !== asked) return; // overtaken while the mask was read
  const missing = source.missing(form.task);
  showEmpty(missing);
  if (!order || !parts) {
    // Everything that was painted may have been erased again.
    const words = order ? MISSING_MASK : "Type a prompt first: what the image shows.";
    if (keep) showError(new FormProblem(missing ?? words, order ? null : form.prompt));
    else hideError();
    return;
  }
  if (order.prompt.length > about.limits.prompt) {
    showError(new FormProblem(`The prompt has ${order.prompt.length} characters. This service reads at most ${about.limits.prompt}.`, form.prompt));
    return;
  }
  if (!again) hideError();
  const wait = Math.min(LONGEST_DELAY, Math.max(SHORTEST_DELAY, lastRoundTrip));
  newest.request({ ...order, ...parts, keep }, delay ? wait : 0);
}

function formChanged(what) {
  if (what !== "other" && what !== "mask") showIdeas();
  const isLive = byId("live").checked && form.task !== "upscale";
  // A new image or another task shows something at once; strokes and words only while one wants it.
  if (isLive || what === "task" || what === "image") {
    ask({ delay: true });
    return;
  }
  if (newest.active) hideError(); // it may say that the page tries again by itself
  newest.stop();
  asked += 1;
  result.stale(result.shown !== null);
  if (form.bundle) source.fit(form.task, form.target).catch(showError);
  showEmpty(source.missing(form.task));
}

async function done(order, made) {
  lastRoundTrip = made.roundTrip;
  tries = 0;
  hideError();
  service("ready");
  const { keep, ...plain } = order;
  const entry = { order: plain, blob: made.blob, seed: made.seed, latency: latencyWords(made) };
  const number = asked;
  if (!(await result.show(entry))) return;
  history.mark(entry.blob);
  offerWhatFollows(entry.order);
  const settle = () => {
    history.add(entry);
    say(`Image ready after ${Math.round(made.roundTrip)} milliseconds.`);
  };
  if (keep) settle();
  if (number !== asked) result.stale(true); // something has changed while the image was decoded
  else if (!keep) settling = setTimeout(settle, SETTLED);
}

function failed(order, error) {
  if (error.name === "AbortError") return;
  tries += 1;
  // A large model takes minutes to load, and then makes the image that was asked for.
  const patient = tries < MOST_TRIES || error.code === "not_ready";
  const again = error instanceof ServiceError && error.retryAfter !== null && patient;
  if (error.code === "unreachable") service("down");
  const wasStale = result.isStale;
  showError(error, again ? " The page tries again by itself." : "");
  if (order.refined) result.stale(wasStale); // the draft is what it was
  tryAgain = order.refined ? refine : makeNow;
  if (!again) return;
  newest.request(order, error.retryAfter * 1000);
  byId("stop").disabled = false;
}

function latencyWords({ roundTrip, times }) {
  const total = `${Math.round(roundTrip)} ms`;
  if (times.make === undefined) return total;
  const parts = [`model ${Math.round(times.make)}`];
  if (times.queue >= 1) parts.push(`queue ${Math.round(times.queue)}`);
  return `${total} (${parts.join(", ")})`;
}

// ---- what the page says ----

function busy(isBusy) {
  byId("result-frame").closest(".board").setAttribute("aria-busy", String(isBusy));
  byId("stop").disabled = !isBusy;
}

function showError(error, more = "") {
  byId("error-words").textContent = error.message + more;
  byId("error").hidden = false;
  byId("retry").hidden = error instanceof FormProblem;
  form.mark(error.control ?? form.controlOf(error.field));
  result.stale(result.shown !== null);
}

function hideError() {
  byId("error").hidden = true;
}

function say(words) {
  byId("status").textContent = words;
}

function service(state, words) {
  const line = byId("service");
  if (line.dataset.state === state && !words) return;
  line.dataset.state = state;
  const backends = [...new Set(form.models.map((model) => model.backend).filter(Boolean))].join(", ");
  const ready = backends ? `Ready on ${backends}` : "Ready";
  line.textContent = words ?? { ready, down: "The service does not answer" }[state];
}

function showEmpty(missing) {
  if (result.shown) return;
  const { example } = about.prompts[form.bundle?.id] ?? {};
  const typed = form.prompt.value.trim() !== "";
  if (missing) result.empty(missing);
  else if (form.task === "upscale") result.empty("Press “Make the image”.");
  else if (!typed && example) result.empty(`Type what the image shows, such as “${example}”.`);
  else if (!typed) result.empty("Type what the image shows. The image changes while you type.");
}

/** Prompts that the model surely knows: its example, or those of a closed set that are like yours. */
function showIdeas() {
  const { example, known = [] } = about.prompts[form.bundle?.id] ?? {};
  const typed = form.prompt.value.trim().toLowerCase();
  let ideas = example ? [example] : [];
  if (known.length) ideas = known.filter((prompt) => prompt.toLowerCase().includes(typed));
  if (!known.length && typed) ideas = [];
  ideas = ideas.filter((prompt) => prompt.toLowerCase() !== typed).slice(0, MOST_IDEAS);
  byId("idea-list").replaceChildren(...ideas.map(ideaButton));
  byId("ideas").hidden = ideas.length === 0;
}

function ideaButton(prompt) {
  const button = document.createElement("button");
  button.type = "button";
  button.textContent = prompt;
  button.addEventListener("click", () => {
    form.prompt.value = prompt;
    showIdeas();
    form.prompt.focus();
    ask({ keep: true });
  });
  return button;
}

// ---- images that come in ----

/** A dropped or pasted file. Where the task needs no image, find out what it may be for. */
async function received(file) {
  if (!form.bundle) {
    showError(refusal ?? new Error(NOT_CONNECTED));
    return true;
  }
  if (form.task !== "generate") return false;
  const facts = await readFacts(file);
  if (typeof facts?.prompt === "string" && /^\d+$/.test(facts.seed ?? "")) {
    restoreFacts(facts);
    return true;
  }
  const task = form.tasks.find((one) => one !== "generate");
  if (!task) {
    showError(new FormProblem("This service has no model that takes an image. The file is no image of hipa-deploy with a prompt and a seed either.", null));
    return true;
  }
  form.setTask(task);
  showIdeas();
  return false;
}

/** Put what a PNG says of its making into the form; make it again, if its model is served here. */
function restoreFacts(facts) {
  const order = orderOf(facts, form.models, about.models ?? {});
  if (!order) {
    newest.stop();
    asked += 1;
    clearTimeout(settling);
    form.prompt.value = facts.prompt;
    form.seed.value = facts.seed;
    showIdeas();
    showError(new FormProblem(`The prompt and the seed were read from the image. ${absenceOf(facts)}`, null));
    return;
  }
  form.write(order);
  const steps = facts.refine?.steps;
  if (Number.isInteger(steps)) refining.fill(order.model, steps);
  showIdeas();
  say("The model, the prompt and the settings were read from the image.");
  ask({ keep: true });
}

/** Why the image of a PNG cannot be made here. */
function absenceOf(facts) {
  if (typeof facts.bundle_name !== "string") return "It does not name its model.";
  const name = facts.bundle_name.slice(0, 100);
  const isKnown = form.models.some((model) => model.id === name);
  if (isKnown) return `Its model ${name} is served here in another version, or without its adaptor.`;
  return `Its model ${name} is not served here. The form names another one.`;
}

async function restore(entry) {
  newest.stop();
  const number = ++asked;
  clearTimeout(settling);
  hideError();
  const { order } = entry;
  form.write(order);
  showIdeas();
  try {
    if (form.bundle && order.source) await source.restore(order.source, order.mask, order.task, form.target);
    else if (form.bundle) await source.fit(form.task, form.target);
    if (number !== asked) return;
    if (!(await result.show(entry))) return;
  } catch (error) {
    showError(error);
    return;
  }
  history.mark(entry.blob);
  offerWhatFollows(order);
  say("The image is back.");
  // Without a service nobody knows yet what it serves.
  if (!form.bundle || form.models.some((model) => model.id === order.model)) return;
  showError(new FormProblem(`The image is back, but its model ${order.model} is not served here. The form names another one.`, null));
  result.stale(false);
}

/** What can be done with the image that is shown: a draft can be refined, if its model can. */
function offerWhatFollows(order) {
  byId("use").disabled = !form.bundle;
  refining.offer(order, form.models);
}

/** The final image of the draft that is shown: many steps of the base model from its own noise. */
function refine() {
  const wasStale = result.isStale;
  let steps;
  try {
    steps = refining.read();
  } catch (error) {
    showError(error);
    result.stale(wasStale); // the draft is what it was
    refining.steps.focus();
    return;
  }
  form.mark(null);
  asked += 1;
  tries = 0;
  clearTimeout(settling);
  hideError();
  history.add(result.shown);
  const { order, seed } = result.shown;
  say(`The image is refined in ${steps} steps.`);
  newest.request({ ...order, seed, refined: true, steps, keep: true });
}

// ---- keys and buttons ----

function makeNow() {
  ask({ keep: true });
}

function newSeed() {
  form.newSeed();
  ask({ keep: true });
}

function stop() {
  asked += 1;
  newest.stop();
  hideError(); // it may say that the page tries again by itself
  say("Stopped.");
}

byId("controls").addEventListener("submit", (event) => {
  event.preventDefault();
  makeNow();
});
byId("dice").addEventListener("click", newSeed);
byId("stop").addEventListener("click", stop);
byId("retry").addEventListener("click", () => tryAgain());
byId("live").addEventListener("change", () => { if (byId("live").checked) ask({ delay: true }); });
byId("prompt").addEventListener("keydown", (event) => {
  // While a Japanese or Chinese word is composed, Enter chooses its characters.
  if (event.key !== "Enter" || event.shiftKey || event.ctrlKey || event.metaKey || event.isComposing) return;
  event.preventDefault();
  makeNow();
});
addEventListener("keydown", (event) => {
  if (byId("key-dialog").open) return;
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
    event.preventDefault();
    if (form.task === "upscale") makeNow();
    else newSeed();
  } else if (event.key === "Escape" && (newest.active || !byId("error").hidden)) {
    stop();
  }
});
byId("download").addEventListener("click", (event) => {
  if (!result.shown) event.preventDefault();
  else history.add(result.shown);
});
byId("use").addEventListener("click", () => {
  history.add(result.shown);
  form.setTask(form.nextTask);
  source.use(result.shown.blob);
  ask({ delay: true });
});

// ---- the beginning ----

async function start() {
  onKeyNeeded(askForKey);
  // A phone has room for the prompt and the image; the settings are one touch away.
  byId("settings").open = matchMedia("(min-width: 60rem)").matches;
  let problem = await meetService();
  // Old images can be seen without a service. One that comes back needs the models of its form.
  await history.load();
  const isLate = problem !== null;
  if (problem) {
    showError(problem);
    tryAgain = () => location.reload();
  }
  while (problem && isAway(problem)) {
    service("down");
    await pause(problem.retryAfter ?? 1);
    problem = await meetService();
  }
  if (problem) {
    refusal = problem;
    service("down", "Not connected");
    showError(problem);
    return;
  }
  tryAgain = makeNow;
  if (isLate) await catchUp();
  else if (byId("settings").open) form.prompt.focus();
  await untilReady();
}

/** What was done before the service answered: an image that came back, or words that were typed. */
async function catchUp() {
  hideError();
  if (result.shown && !result.isStale) await restore(result.shown);
  else if (form.prompt.value.trim() && byId("live").checked) ask({ delay: true });
}

/** Learn what the service offers; give the error where it does not say. */
async function meetService() {
  try {
    about = await getJson("page/about");
    await offerModels();
  } catch (error) {
    return error;
  }
  return null;
}

/** Whether a service is not there: nobody answers, or a proxy before it says so, or to wait. */
function isAway(problem) {
  return problem.code === "unreachable" || [429, 502, 503, 504].includes(problem.status);
}

/** The time between two questions whether the service is there, or ready. */
function pause(seconds = 1) {
  return new Promise((resolve) => setTimeout(resolve, 1000 * Math.max(1, seconds)));
}

async function offerModels() {
  const { models } = await getJson("hipa/models");
  source.limits = about.limits;
  form.offer(models);
  refining.show(models, about.limits.steps);
  byId("use").hidden = form.nextTask === null;
  showIdeas();
  await source.fit(form.task, form.target);
  showEmpty(source.missing(form.task));
}

/** Say that the models load, and when they have. */
async function untilReady() {
  let answers = true;
  while (!form.models.every((model) => model.ready)) {
    if (answers) service("loading", "Loading the models…");
    await pause();
    try {
      const { models } = await getJson("hipa/models");
      form.models = models;
      answers = true;
    } catch (error) {
      // Until it answers again: one that cannot load its models has ended.
      answers = !isAway(error);
      if (!answers) service("down");
    }
  }
  service("ready");
}

start();

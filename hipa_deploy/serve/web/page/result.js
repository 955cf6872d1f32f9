// The image that was made: shown with what made it, compared with the source, downloaded.

import { readFacts } from "./png_facts.js";

const SMALL = 256; // pixels; a smaller image is shown with sharp pixels

const byId = (id) => document.getElementById(id);

export class Result {
  constructor() {
    this.shown = null; // {order, blob, seed, latency}
    this.number = 0; // counts what was to be shown: decoding takes a moment, and may be overtaken
    this.image = byId("result");
    this.before = byId("before");
    this.compare = byId("compare");
    this.compare.addEventListener("input", () => this.#cut());
  }

  /**
   * Show an entry; resolves when its pixels are on the page.
   *
   * Resolves to false where a later entry came meanwhile: that one is shown, and this one never.
   */
  async show(entry) {
    const number = ++this.number;
    const { order, blob, seed, latency } = entry;
    const url = URL.createObjectURL(blob);
    const next = new Image();
    next.src = url;
    await next.decode();
    if (number !== this.number) {
      URL.revokeObjectURL(url);
      return false;
    }
    URL.revokeObjectURL(this.image.src);
    this.shown = entry;
    this.image.src = url;
    this.image.alt = order.prompt || "The enlarged image";
    this.image.hidden = false;
    this.image.classList.toggle("small", Math.max(next.naturalWidth, next.naturalHeight) < SMALL);
    this.image.classList.remove("stale");
    byId("empty").hidden = true;
    byId("result-frame").dataset.empty = "false";
    byId("latency").textContent = latency;
    this.#caption(order, seed);
    this.#showBefore(order.source);
    this.#offer(url, order, seed);
    this.#facts(blob); // a moment later
    return true;
  }

  /** Dim the image where it is not that of the form any more. */
  stale(isStale) {
    this.image.classList.toggle("stale", isStale);
  }

  /** Whether it is dimmed. */
  get isStale() {
    return this.image.classList.contains("stale");
  }

  /** What to do where there is no image yet. */
  empty(words) {
    byId("empty-words").textContent = words;
  }

  #caption(order, seed) {
    const how = document.createElement("span");
    how.className = "hint";
    const steps = order.steps ? ` in ${order.steps} steps` : "";
    const made = order.refined ? ` · refined${steps}` : "";
    how.textContent = order.task === "upscale" ? order.model : `seed ${seed} · ${order.model}${made}`;
    byId("caption").replaceChildren(order.prompt, how);
  }

  #showBefore(source) {
    URL.revokeObjectURL(this.before.src);
    this.before.hidden = !source;
    byId("compare-field").hidden = !source;
    if (!source) return;
    this.before.src = URL.createObjectURL(source);
    this.before.classList.toggle("small", this.image.classList.contains("small"));
    this.#cut();
  }

  #cut() {
    this.before.style.clipPath = `inset(0 ${100 - this.compare.valueAsNumber}% 0 0)`;
  }

  #offer(url, order, seed) {
    const link = byId("download");
    const words = order.prompt.toLowerCase().replace(/[^\p{L}\p{N}]+/gu, "-").replace(/^-|-$/g, "");
    link.href = url;
    const made = order.refined ? "-refined" : "";
    link.download = `${words.slice(0, 60) || order.task}-${seed}${made}.png`;
    link.removeAttribute("aria-disabled");
  }

  async #facts(blob) {
    const facts = await readFacts(blob);
    if (this.shown?.blob !== blob) return;
    byId("facts").hidden = facts === null;
    const rows = Object.entries(facts ?? {}).flatMap(([name, value]) => {
      const term = document.createElement("dt");
      const text = document.createElement("dd");
      term.textContent = name;
      text.textContent = value !== null && typeof value === "object" ? JSON.stringify(value) : String(value);
      return [term, text];
    });
    byId("fact-list").replaceChildren(...rows);
  }
}

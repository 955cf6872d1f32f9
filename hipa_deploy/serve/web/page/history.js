// The strip of kept images: click or Enter restores one, arrows move along, Delete removes.

import { Store } from "./store.js";

const MOST = 60; // images; the oldest goes

async function areEqual(one, other) {
  const [bytes, others] = await Promise.all([one.arrayBuffer(), other.arrayBuffer()]);
  const there = new Uint8Array(others);
  return new Uint8Array(bytes).every((byte, at) => byte === there[at]);
}

export class History {
  /** `restore(entry)` is called with what `add` was given. */
  constructor({ list, help, forget, restore }) {
    Object.assign(this, { list, help, forget, restore });
    this.entries = []; // newest first, as they are shown
    this.store = null;
    list.addEventListener("keydown", (event) => this.#key(event));
    forget.addEventListener("click", () => this.#clear());
  }

  async load() {
    this.store = await Store.open();
    try {
      const old = (await this.store.all()).sort((one, other) => other.id - one.id);
      for (const entry of old.reverse()) this.#show(entry);
    } catch {
      // A damaged store of the browser costs the old images, and nothing else.
    }
  }

  /** Keep an image: {order, blob, seed, latency}. One that is kept already is not kept twice. */
  async add(entry) {
    if (this.entries.some(({ entry: one }) => one.blob === entry.blob)) return;
    const latest = this.entries[0]?.entry.blob;
    // Typed and kept after a moment, and then asked for by Enter too.
    if (latest?.size === entry.blob.size && (await areEqual(latest, entry.blob))) {
      this.mark(latest);
      return;
    }
    const newest = Math.max(Date.now(), (this.entries[0]?.entry.id ?? 0) + 1);
    const kept = { ...entry, id: newest };
    this.#show(kept);
    this.mark(kept.blob);
    try {
      await this.store?.put(kept);
      while (this.entries.length > MOST) await this.#remove(this.entries.length - 1);
    } catch {
      // The disk is full: the image stays in this page.
    }
  }

  /** Mark the image that is shown large. */
  mark(blob) {
    for (const { entry, button } of this.entries) {
      if (entry.blob === blob) button.setAttribute("aria-current", "true");
      else button.removeAttribute("aria-current");
    }
  }

  #show(entry) {
    const url = URL.createObjectURL(entry.blob);
    const image = new Image();
    image.src = url;
    image.alt = "";
    const button = document.createElement("button");
    button.type = "button";
    button.title = entry.order.prompt;
    button.setAttribute("aria-label", `${entry.order.prompt || "no prompt"}, seed ${entry.seed}`);
    button.append(image);
    button.addEventListener("click", () => {
      this.#focusable(button);
      this.restore(entry);
    });
    const item = document.createElement("li");
    item.append(button);
    this.list.prepend(item);
    this.entries.unshift({ entry, button, item, url });
    this.#focusable(button);
    this.#count();
  }

  #key(event) {
    const at = this.entries.findIndex(({ button }) => button === document.activeElement);
    if (at < 0) return;
    const last = this.entries.length - 1;
    const places = { ArrowLeft: at - 1, ArrowRight: at + 1, Home: 0, End: last };
    if (event.key in places) {
      this.#focus(Math.min(last, Math.max(0, places[event.key])));
    } else if (event.key === "Delete") {
      this.#remove(at);
      if (this.entries.length) this.#focus(Math.min(at, this.entries.length - 1));
      else this.help.focus();
    } else {
      return;
    }
    event.preventDefault();
  }

  #focus(at) {
    const { button } = this.entries[at];
    this.#focusable(button);
    button.focus();
    button.scrollIntoView({ block: "nearest", inline: "nearest" });
  }

  /** One place in the order of the Tab key for the whole strip. */
  #focusable(chosen) {
    for (const { button } of this.entries) button.tabIndex = button === chosen ? 0 : -1;
  }

  async #remove(at) {
    const [{ entry, item, url }] = this.entries.splice(at, 1);
    item.remove();
    URL.revokeObjectURL(url);
    this.#count();
    if (this.entries.length) this.#focusable(this.entries[0].button);
    await this.store?.remove(entry.id);
  }

  async #clear() {
    for (const { url } of this.entries) URL.revokeObjectURL(url);
    this.entries = [];
    this.list.replaceChildren();
    this.#count();
    await this.store?.clear();
  }

  #count() {
    this.forget.disabled = this.entries.length === 0;
    this.help.textContent = this.entries.length
      ? "Choose one to have it back with its prompt and seed. Arrows move along, Delete removes. They stay in this browser."
      : "Images that you keep appear here. They stay in this browser.";
  }
}

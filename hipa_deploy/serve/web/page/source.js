// The user's own image: dropped, pasted or chosen; shown, and painted on to repaint a part of it.

import { Brush } from "./brush.js";
import { prepare } from "./prepare.js";

export const MISSING_MASK = "Paint over the part of your image that is to be made anew.";

const byId = (id) => document.getElementById(id);

export class Source {
  /**
   * `changed(what)` is called when the "image" or the "mask" is another; `received(file)` before a file is
   * taken, and may answer true to deal with it alone.
   */
  constructor({ changed, received }) {
    Object.assign(this, { changed, received });
    this.file = null; // as the user gave it
    this.ready = null; // {blob, width, height, note}: what is sent
    this.target = null; // {task, width, height} that it was made ready for
    this.preparing = null; // a promise
    this.limits = { pixels: Infinity, body: Infinity };
    this.image = byId("source-image");
    this.canvas = byId("mask");
    this.brush = new Brush({
      canvas: this.canvas,
      ring: byId("brush-ring"),
      size: byId("brush-size"),
      sizeValue: byId("brush-size-value"),
      erase: byId("erase"),
      undo: byId("undo"),
      clear: byId("clear"),
      changed: () => this.changed("mask"),
    });
    this.#listen();
  }

  /** Show what a task needs, and make the image ready for it. */
  async fit(task, target) {
    byId("source-board").hidden = task === "generate";
    byId("source-title").textContent = task === "control" ? "Control image" : "Your image";
    this.#showBrush(task);
    if (task === "generate" || !this.file) return;
    const wanted = { task: task === "upscale" ? task : "fit", ...target };
    const same = this.target && Object.keys(wanted).every((key) => wanted[key] === this.target[key]);
    if (!same) {
      this.target = wanted;
      this.preparing = this.#prepare(this.file, task, wanted);
    }
    await this.preparing; // another call may have begun it
    this.#showBrush(task);
  }

  /** The image and the mask to send, for a task; null while one of them is missing. */
  async parts(task) {
    if (!this.ready) return null;
    if (task !== "inpaint") return { source: this.ready.blob };
    const mask = await this.brush.mask();
    return mask && { source: this.ready.blob, mask };
  }

  /** What is missing before an image can be made, in words; null if nothing is. */
  missing(task) {
    if (task === "generate") return null;
    if (!this.ready && task === "control") return "Drop, paste or choose a control image to follow.";
    if (!this.ready) return "Drop, paste or choose an image to begin with.";
    if (task === "inpaint" && this.brush.empty) return MISSING_MASK;
    return null;
  }

  /** Put the image and the mask of the history back. */
  async restore(source, mask, task, target) {
    this.use(source);
    await this.fit(task, target);
    if (mask) await this.brush.restore(mask);
  }

  /** Take a file of the user. */
  async take(file) {
    if (await this.received(file)) return;
    this.use(file);
    this.changed("image");
  }

  /** Put a file in place of the image; `fit` makes it ready. */
  use(file) {
    this.file = file;
    this.target = null;
  }

  #showBrush(task) {
    const paint = task === "inpaint" && this.ready !== null;
    this.canvas.hidden = !paint;
    byId("brush-tools").hidden = !paint;
  }

  async #prepare(file, task, wanted) {
    // Until the new image is ready there is none: the old one must not be sent in its place.
    this.ready = null;
    try {
      const ready = await prepare(file, task, wanted, this.limits);
      if (this.file !== file || this.target !== wanted) return; // another one has come meanwhile
      this.ready = ready;
      await this.#show();
    } catch (error) {
      if (this.file === file) this.#drop();
      throw error;
    }
  }

  /** Show that there is no image. */
  #drop() {
    this.file = null;
    this.target = null;
    this.image.hidden = true;
    byId("drop-words").hidden = false;
    byId("drop").dataset.empty = "true";
    byId("source-note").textContent = "";
  }

  async #show() {
    const { blob, width, height, note } = this.ready;
    URL.revokeObjectURL(this.image.src);
    this.image.src = URL.createObjectURL(blob);
    this.image.classList.toggle("small", Math.max(width, height) < 256);
    this.image.hidden = false;
    byId("drop-words").hidden = true;
    byId("drop").dataset.empty = "false";
    byId("source-note").textContent = note;
    this.brush.reset(width, height);
    await this.image.decode();
  }

  #listen() {
    const input = byId("file");
    byId("choose").addEventListener("click", () => input.click());
    input.addEventListener("change", () => {
      if (input.files[0]) this.take(input.files[0]);
      input.value = ""; // so that the same file can be chosen again
    });
    const frame = byId("drop");
    const over = (on) => { frame.dataset.over = String(on); };
    // Anywhere on the page: a browser would otherwise leave the page and open the file.
    addEventListener("dragover", (event) => {
      if (!event.dataTransfer?.types.includes("Files")) return;
      event.preventDefault();
      over(true);
    });
    addEventListener("dragleave", (event) => { if (!event.relatedTarget) over(false); });
    addEventListener("drop", (event) => {
      over(false);
      const file = event.dataTransfer?.files[0];
      if (!file) return;
      event.preventDefault();
      this.take(file);
    });
    addEventListener("paste", (event) => {
      const file = [...(event.clipboardData?.files ?? [])].find(({ type }) => type.startsWith("image/"));
      if (!file) return;
      event.preventDefault();
      this.take(file);
    });
  }
}

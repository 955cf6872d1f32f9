// Painting a mask over an image, with pointer or keyboard.
//
// The canvas has exactly the pixels of the image that is sent. What is painted is opaque there; the
// style sheet makes the canvas translucent. Strokes are kept, so that the last one can be undone.

const STEP = 0.02; // of the shorter side: how far an arrow key moves the brush

export class Brush {
  /** `changed()` is called after each stroke, undo and clear. */
  constructor({ canvas, ring, size, sizeValue, erase, undo, clear, changed }) {
    Object.assign(this, { canvas, ring, size, sizeValue, erase, undoButton: undo, clearButton: clear, changed });
    this.pen = canvas.getContext("2d", { willReadFrequently: true });
    this.strokes = [];
    this.base = null; // a mask that was restored from the history
    this.stroke = null; // the one under way
    this.cursor = { x: 0, y: 0 };
    this.#listen();
  }

  /** Begin anew on an image of these pixels. */
  reset(width, height) {
    this.canvas.width = width;
    this.canvas.height = height;
    this.strokes = [];
    this.base = null;
    this.stroke = null;
    this.cursor = { x: width / 2, y: height / 2 };
    this.#paintAll();
  }

  /** Take a mask of the history, white where it was painted. */
  async restore(blob) {
    const bitmap = await createImageBitmap(blob);
    const layer = new OffscreenCanvas(bitmap.width, bitmap.height);
    const pen = layer.getContext("2d");
    pen.drawImage(bitmap, 0, 0);
    const image = pen.getImageData(0, 0, layer.width, layer.height);
    const [red, green, blue] = this.#colour();
    for (let at = 0; at < image.data.length; at += 4) {
      const painted = image.data[at] >= 128;
      image.data.set([red, green, blue, painted ? 255 : 0], at);
    }
    pen.putImageData(image, 0, 0);
    this.strokes = [];
    this.base = layer;
    this.#paintAll();
  }

  get empty() {
    return this.strokes.length === 0 && this.base === null;
  }

  /** The mask as PNG: white where it is painted, black elsewhere; null if nothing is painted. */
  async mask() {
    const { width, height } = this.canvas;
    const image = this.pen.getImageData(0, 0, width, height);
    let painted = 0;
    for (let at = 0; at < image.data.length; at += 4) {
      // The edge of a stroke is smooth on the screen; a mask is one or the other.
      const level = image.data[at + 3] >= 128 ? 255 : 0;
      painted += level;
      image.data.set([level, level, level, 255], at);
    }
    if (painted === 0) return null;
    const out = new OffscreenCanvas(width, height);
    out.getContext("2d").putImageData(image, 0, 0);
    return out.convertToBlob({ type: "image/png" });
  }

  undo() {
    if (this.strokes.pop()) this.#edited();
  }

  clear() {
    if (this.empty) return;
    this.strokes = [];
    this.base = null;
    this.#edited();
  }

  /** Diameter of the brush in pixels of the image. */
  get diameter() {
    const shorter = Math.min(this.canvas.width, this.canvas.height);
    return Math.max(1, Math.round((shorter * this.size.valueAsNumber) / 100));
  }

  #listen() {
    const { canvas } = this;
    canvas.addEventListener("pointerdown", (event) => {
      if (event.button !== 0) return;
      canvas.setPointerCapture(event.pointerId);
      this.#begin(this.#place(event));
    });
    // No gesture: a browser takes the tap after a quick stroke for the end of a fling, and drops it.
    canvas.addEventListener("touchstart", (event) => event.preventDefault(), { passive: false });
    canvas.addEventListener("pointermove", (event) => {
      this.#showRing(this.#place(event));
      if (!this.stroke) return;
      // Between two frames a fast pen passes several places.
      const passed = event.getCoalescedEvents?.() ?? [];
      for (const one of passed.length ? passed : [event]) this.#go(this.#place(one));
    });
    canvas.addEventListener("pointerup", () => this.#end());
    canvas.addEventListener("pointercancel", () => this.#end());
    canvas.addEventListener("pointerleave", () => { if (!this.stroke) this.ring.hidden = true; });
    canvas.addEventListener("focus", () => { if (canvas.matches(":focus-visible")) this.#showRing(this.cursor); });
    canvas.addEventListener("blur", () => { this.ring.hidden = true; });
    canvas.addEventListener("keydown", (event) => this.#key(event));
    this.size.addEventListener("input", () => this.#showSize());
    this.erase.addEventListener("click", () => {
      const on = this.erase.getAttribute("aria-pressed") !== "true";
      this.erase.setAttribute("aria-pressed", String(on));
    });
    this.undoButton.addEventListener("click", () => this.undo());
    this.clearButton.addEventListener("click", () => this.clear());
    this.#showSize();
  }

  #key(event) {
    const step = Math.max(1, STEP * Math.min(this.canvas.width, this.canvas.height));
    const moves = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
    if (event.key in moves) {
      const [right, down] = moves[event.key];
      const x = Math.min(this.canvas.width, Math.max(0, this.cursor.x + right * step));
      const y = Math.min(this.canvas.height, Math.max(0, this.cursor.y + down * step));
      this.#showRing({ x, y });
    } else if (event.key === " ") {
      this.#begin(this.cursor);
      this.#end();
    } else if (event.key === "[" || event.key === "]") {
      this.size.valueAsNumber += event.key === "]" ? 5 : -5;
      this.#showSize();
      this.#showRing(this.cursor);
    } else if (event.key.toLowerCase() === "z" && (event.ctrlKey || event.metaKey)) {
      this.undo();
    } else {
      return;
    }
    event.preventDefault();
  }

  #place(event) {
    const box = this.canvas.getBoundingClientRect();
    return {
      x: ((event.clientX - box.left) * this.canvas.width) / box.width,
      y: ((event.clientY - box.top) * this.canvas.height) / box.height,
    };
  }

  #begin(place) {
    const erase = this.erase.getAttribute("aria-pressed") === "true";
    this.stroke = { diameter: this.diameter, erase, places: [place] };
    this.#paint(this.stroke);
  }

  #go(place) {
    this.stroke.places.push(place);
    this.#paint({ ...this.stroke, places: this.stroke.places.slice(-2) });
  }

  #end() {
    if (!this.stroke) return;
    this.strokes.push(this.stroke);
    this.stroke = null;
    this.#edited();
  }

  #edited() {
    this.#paintAll();
    this.changed();
  }

  #paintAll() {
    this.pen.clearRect(0, 0, this.canvas.width, this.canvas.height);
    if (this.base) this.pen.drawImage(this.base, 0, 0, this.canvas.width, this.canvas.height);
    for (const stroke of this.strokes) this.#paint(stroke);
    this.undoButton.disabled = this.strokes.length === 0;
    this.clearButton.disabled = this.empty;
    this.#showSize();
  }

  #paint({ diameter, erase, places }) {
    const { pen } = this;
    const [red, green, blue] = this.#colour();
    pen.globalCompositeOperation = erase ? "destination-out" : "source-over";
    pen.strokeStyle = `rgb(${red} ${green} ${blue})`;
    pen.fillStyle = pen.strokeStyle;
    pen.lineCap = "round";
    pen.lineJoin = "round";
    pen.lineWidth = diameter;
    // A canvas draws no line of length 0, so that a touch without a move needs a disc.
    pen.beginPath();
    pen.arc(places[0].x, places[0].y, diameter / 2, 0, 2 * Math.PI);
    pen.fill();
    pen.beginPath();
    pen.moveTo(places[0].x, places[0].y);
    for (const place of places.slice(1)) pen.lineTo(place.x, place.y);
    pen.stroke();
    pen.globalCompositeOperation = "source-over";
  }

  #colour() {
    const text = getComputedStyle(this.canvas).getPropertyValue("--paint").trim();
    return [1, 3, 5].map((at) => Number.parseInt(text.slice(at, at + 2), 16));
  }

  #showSize() {
    this.sizeValue.textContent = `${this.diameter} px`;
  }

  #showRing(place) {
    this.cursor = place;
    const { ring, canvas } = this;
    const scale = canvas.clientWidth / canvas.width;
    ring.style.left = `${place.x * scale}px`;
    ring.style.top = `${place.y * scale}px`;
    ring.style.width = `${this.diameter * scale}px`;
    ring.style.height = `${this.diameter * scale}px`;
    ring.hidden = false;
  }
}

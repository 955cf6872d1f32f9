// The controls: what the user asks for, and which of them the chosen model has.

export const TASKS = {
  generate: "Generate",
  edit: "Edit",
  inpaint: "Inpaint",
  upscale: "Upscale",
  control: "Control",
};
// They do not change a picture: they take none, or one to follow, such as edges or a pose.
const FROM_PROMPT = ["generate", "control"];
// Fields of a request whose control has another name.
const CONTROL_OF = { steps: "refine-steps", size: "width" };
const SEED_LIMIT = 2n ** 63n; // the service's seeds are below

/** A value of the form that cannot be sent, in words, and the control that holds it. */
export class FormProblem extends Error {
  constructor(words, control) {
    super(words);
    this.control = control;
  }
}

const byId = (id) => document.getElementById(id);

export class Form {
  /** `changed(what)` hears of every change: "prompt", "task", "model" or "other". */
  constructor(changed) {
    this.changed = changed;
    this.models = [];
    this.tasks = [];
    for (const id of ["prompt", "seed", "model", "adaptor", "width", "height", "strength", "feather", "match", "scale", "live"]) {
      this[id] = byId(id);
    }
    this.prompt.addEventListener("input", () => changed("prompt"));
    for (const control of [this.seed, this.width, this.height, this.feather, this.scale]) {
      control.addEventListener("input", () => {
        this.#showValues();
        changed("other");
      });
    }
    for (const control of [this.adaptor, this.strength, this.match]) {
      control.addEventListener("change", () => changed("other"));
    }
    this.model.addEventListener("change", () => {
      this.#modelChosen();
      changed("model");
    });
    byId("tasks").addEventListener("change", () => {
      this.#taskChosen();
      changed("task");
    });
    this.#showValues();
  }

  /** Offer the models of the service, and the tasks that they are for. */
  offer(models) {
    this.models = models;
    const tasks = Object.keys(TASKS).filter((task) => models.some((model) => model.task === task));
    const labels = tasks.map((task) => {
      const label = document.createElement("label");
      const radio = document.createElement("input");
      radio.type = "radio";
      radio.name = "task";
      radio.value = task;
      radio.checked = task === tasks[0];
      label.append(radio, TASKS[task]);
      return label;
    });
    byId("tasks").replaceChildren(...labels);
    byId("task-group").hidden = tasks.length < 2;
    this.tasks = tasks;
    this.#taskChosen();
  }

  get task() {
    return document.querySelector("[name=task]:checked")?.value ?? "generate";
  }

  /** The task that goes on with an image that was made: the present one, if it can; null without any. */
  get nextTask() {
    if (!FROM_PROMPT.includes(this.task)) return this.task;
    return this.tasks.find((task) => !FROM_PROMPT.includes(task)) ?? null;
  }

  /** The chosen bundle, without its adaptor. */
  get bundle() {
    return this.models.find((model) => model.id === this.model.value);
  }

  /** Width and height of the result in pixels. */
  get target() {
    const { bundle } = this;
    return {
      width: this.width.valueAsNumber || bundle.width.own,
      height: this.height.valueAsNumber || bundle.height.own,
    };
  }

  /** Choose a task that the service has; says whether it was another one before. */
  setTask(task) {
    const radio = document.querySelector(`[name=task][value="${task}"]`);
    if (!radio || radio.checked) return false;
    radio.checked = true;
    this.#taskChosen();
    return true;
  }

  newSeed() {
    // 32 bits: enough never to meet one again, and short enough to read aloud.
    this.seed.value = String(crypto.getRandomValues(new Uint32Array(1))[0]);
  }

  /**
   * What the form asks for, without image and mask.
   *
   * Throws a `FormProblem`; null while there is no prompt, which is no error yet.
   */
  read() {
    this.mark(null);
    const { task, bundle } = this;
    if (!bundle) return null;
    const prompt = this.prompt.value.trim();
    if (!prompt && task !== "upscale") return null;
    const order = { task, model: this.adaptor.value || bundle.id, prompt, seed: this.#readSeed() };
    if (task !== "upscale") {
      order.width = this.#readSize("width");
      order.height = this.#readSize("height");
    }
    if (task === "edit") order.strength = this.strength.value;
    if (task === "inpaint") {
      order.feather = this.feather.value;
      order.match = this.match.checked;
    }
    if (task === "control") order.scale = this.scale.value;
    return order;
  }

  /** Put an order of the history back. */
  write(order) {
    this.setTask(order.task);
    const bundle = order.model.split(":")[0];
    if (this.models.some((model) => model.id === bundle)) {
      this.model.value = bundle;
      this.#modelChosen();
      if ([...this.adaptor.options].some((option) => option.value === order.model)) this.adaptor.value = order.model;
    }
    this.prompt.value = order.prompt;
    this.seed.value = order.seed;
    if (order.width) this.width.value = order.width;
    if (order.height) this.height.value = order.height;
    if (order.strength) this.strength.value = order.strength;
    if (order.feather !== undefined) this.feather.value = order.feather;
    if (order.match !== undefined) this.match.checked = order.match;
    if (order.scale !== undefined) this.scale.value = order.scale;
    this.#showValues();
    this.mark(null);
  }

  /** The control of a field that the service names in an error; null for one that has none here. */
  controlOf(field) {
    return this.#controls.find((control) => control.id === (CONTROL_OF[field] ?? field)) ?? null;
  }

  /** Mark the control that holds a wrong value; null marks none. */
  mark(control) {
    for (const one of this.#controls) {
      if (one === control) one.setAttribute("aria-invalid", "true");
      else one.removeAttribute("aria-invalid");
    }
  }

  get #controls() {
    const { prompt, seed, model, adaptor, width, height, strength, feather, scale } = this;
    return [prompt, seed, model, adaptor, width, height, strength, feather, scale, byId("refine-steps")];
  }

  #readSeed() {
    if (this.task === "upscale") return "0";
    const digits = this.seed.value.trim();
    if (!/^[0-9]{1,19}$/.test(digits) || BigInt(digits) >= SEED_LIMIT) {
      throw new FormProblem(`Seed: expected a whole number from 0 to ${SEED_LIMIT - 1n}.`, this.seed);
    }
    return String(BigInt(digits)); // JSON has no leading zeros
  }

  #readSize(side) {
    const { own, min, max, multiple } = this.bundle[side];
    if (min === max) return null;
    const size = this[side].value.trim() === "" ? own : this[side].valueAsNumber;
    if (!(size >= min && size <= max && size % multiple === 0)) {
      const name = side === "width" ? "Width" : "Height";
      throw new FormProblem(`${name}: expected ${min} to ${max} in steps of ${multiple}.`, this[side]);
    }
    return size;
  }

  #taskChosen() {
    const { task } = this;
    const fitting = this.models.filter((model) => model.task === task && model.adaptor === null);
    const options = fitting.map((model) => new Option(model.id, model.id));
    this.model.replaceChildren(...options);
    byId("feather-field").hidden = task !== "inpaint";
    byId("match-field").hidden = task !== "inpaint";
    byId("scale-field").hidden = task !== "control";
    // An enlargement draws no noise of its own choice, and takes as long as the image is large.
    byId("seed-field").hidden = task === "upscale";
    byId("live-field").hidden = task === "upscale";
    this.prompt.placeholder = task === "upscale" ? "What the image shows (may stay empty)" : "What the image shows";
    this.#modelChosen();
  }

  #modelChosen() {
    const { bundle } = this;
    if (!bundle) return;
    const adapted = this.models.filter((model) => model.id.startsWith(`${bundle.id}:`));
    const options = adapted.map((model) => new Option(model.adaptor, model.id));
    this.adaptor.replaceChildren(new Option("its own", ""), ...options);
    byId("adaptor-field").hidden = options.length === 0;
    for (const side of ["width", "height"]) {
      const { own, min, max, multiple } = bundle[side];
      Object.assign(this[side], { min, max, step: multiple, value: own });
    }
    const fixed = bundle.width.min === bundle.width.max && bundle.height.min === bundle.height.max;
    byId("size-fields").hidden = fixed || bundle.task === "upscale";
    this.strength.replaceChildren(...bundle.strengths.map((value) => new Option(value, value)));
    byId("strength-field").hidden = bundle.strengths.length < 2;
    byId("control-help").hidden = !bundle.controlnet;
    byId("control-help").textContent = `As the ControlNet ${bundle.controlnet} was trained to see it, such as edges, depth or a pose.`;
  }

  #showValues() {
    byId("feather-value").textContent = `${this.feather.value} px`;
    byId("scale-value").textContent = this.scale.valueAsNumber.toFixed(2);
  }
}

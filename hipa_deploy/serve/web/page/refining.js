// The second button: the final image of the draft that is shown, in as many steps as its field says.

import { FormProblem } from "./form.js";

const byId = (id) => document.getElementById(id);

export class Refining {
  /** `start()` is called when the user asks for the final image. */
  constructor(start) {
    this.button = byId("refine");
    this.steps = byId("refine-steps");
    this.filledFor = null; // the bundle whose number of steps the field has
    this.button.addEventListener("click", start);
    this.steps.addEventListener("keydown", (event) => {
      if (event.key !== "Enter" || event.ctrlKey || event.metaKey || event.isComposing) return;
      event.preventDefault();
      if (!this.button.disabled) start();
    });
  }

  /** Show the button if one of the models refines; `limits` is {min, max} of the steps. */
  show(models, limits) {
    byId("refine-group").hidden = !models.some((model) => model.refine);
    Object.assign(this.steps, limits);
  }

  /** Offer to refine the image of an order, if it is a draft and its model can. */
  offer(order, models) {
    const model = models.find(({ id }) => id === order.model);
    const isDraft = order.task === "generate" && !order.refined;
    this.button.disabled = !isDraft || !model?.refine;
    this.steps.disabled = this.button.disabled;
    this.steps.removeAttribute("aria-invalid");
    if (!model?.refine) return;
    const isOther = this.filledFor !== bundleOf(order.model);
    // The user's own number stays for all drafts of a bundle.
    if (order.steps) this.fill(order.model, order.steps);
    else if (isOther) this.fill(order.model, Math.min(model.refine.steps, Number(this.steps.max)));
  }

  /** Put a number of steps into the field, for the images of a model. */
  fill(model, steps) {
    this.filledFor = bundleOf(model);
    this.steps.value = steps;
  }

  /** The number of steps; throws a `FormProblem`. */
  read() {
    const { min, max, valueAsNumber } = this.steps;
    const isFitting = Number.isInteger(valueAsNumber) && valueAsNumber >= min && valueAsNumber <= max;
    if (!isFitting) {
      throw new FormProblem(`Steps: expected a whole number from ${min} to ${max}.`, this.steps);
    }
    return valueAsNumber;
  }
}

/** The bundle of a model, which may be one of its adaptors. */
function bundleOf(model) {
  return model.split(":")[0];
}

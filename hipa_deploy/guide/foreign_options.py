"""Options that users of other tools look for, and what they are here."""

from __future__ import annotations

IMAGE_COMMANDS = ("generate", "edit", "inpaint", "upscale", "control")

_ONE_STEP = (
    "One step, always: the adaptor taught the model to make an image in one. "
    "Leave it out. hipa-evaluate compares with the model in many steps."
)
_GUIDANCE = (
    "There is no guidance at run time: the adaptor learned it from its teacher. Leave it out. To "
    "change it, set guidance in the recipe's table [teacher], and train."
)
_NEGATIVE = (
    "There is no negative prompt without guidance: the adaptor learned guidance from its teacher. "
    "Leave it out, and say in the prompt what the image shows."
)
_SCHEDULER = "There is no scheduler: the one step is part of the bundle's graph. Leave it out."
_DEVICE = "Name what runs the models: --backend, such as onnxruntime, tensorrt or rtx."

_REASONS = {
    "--steps": _ONE_STEP,
    "--num-inference-steps": _ONE_STEP,
    "--num_inference_steps": _ONE_STEP,
    "--guidance": _GUIDANCE,
    "--guidance-scale": _GUIDANCE,
    "--guidance_scale": _GUIDANCE,
    "--cfg": _GUIDANCE,
    "--cfg-scale": _GUIDANCE,
    "--negative-prompt": _NEGATIVE,
    "--negative_prompt": _NEGATIVE,
    "--scheduler": _SCHEDULER,
    "--sampler": _SCHEDULER,
    "--sampling-method": _SCHEDULER,
    "--device": _DEVICE,
    "--provider": _DEVICE,
}

# What hipa-generate has in their place, for a bundle with the base model.
_REFINE = " For the base model in many steps there is --refine"
_IN_GENERATE = {_ONE_STEP: f"{_REFINE}.", _GUIDANCE: f"{_REFINE}, with --guidance."}


def why_not(option: str, command: str) -> str | None:
    """Why a command that makes images has no such option; None for an option that no tool has."""
    if command not in IMAGE_COMMANDS:
        return None
    reason = _REASONS.get(option)
    if reason is None:
        return None
    instead = _IN_GENERATE.get(reason, "") if command == "generate" else ""
    return f"No such option: {option}. {reason}{instead}"

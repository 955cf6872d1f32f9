"""How large the stages of an export will be, from the headers of the model's files."""

from __future__ import annotations

import math
from pathlib import Path

from hipa_deploy.bundle.manifest import TEACHER_STAGE
from hipa_deploy.engines.build.memory_plan import (
    DECODER_STAGE,
    TINY_BYTES_PER_PIXEL,
    TINY_WEIGHTS_MIB,
)
from hipa_deploy.engines.targets.run_memory import StageSize, engine_activations_mib
from hipa_deploy.export.export_options import ExportOptions
from hipa_deploy.export.export_request import BYTES, SAFETY, early_model, has_safety_checker
from hipa_deploy.export.task import asked_size, choose_task
from hipa_deploy.models.weights.early_check import known_shapes
from hipa_deploy.tasks import takes_source

TEXT_PARTS = ("text_encoder", "text_encoder_2")
DECODER_PARTS = ("decoder.", "post_quant_conv.")
ENCODER_PARTS = ("encoder.", "quant_conv.")
# What a graph of one step has no need of: its timestep is folded into biases.
TIME_PARTS = ("time_embedding.", "time_emb_proj.")
# The most values that are held at once, for each place of the latents and channel of the UNet's
# first level, and for each pixel and channel of the decoder's last level. These are the graphs of
# SD 1.5 and SD 2.1 at both of their sizes, with fused attention (docs/memory.json).
UNET_VALUES = 20
CONTROL_VALUES = 6  # more with a ControlNet beside the UNet, of SD 1.5's graph
DECODER_VALUES = 8


def predicted_sizes(options: ExportOptions) -> tuple[StageSize, ...] | None:
    """Predict what each stage of an export will take, in MiB, without torch.

    The weights follow from the files' headers. The activations of UNet and decoder follow from the
    size of the images. Those of an image encoder and a safety checker are not predicted, and count
    nothing.

    Args:
        options: a request that ``check_request`` has passed.

    Returns:
        The stages in the order in which they run, with the safety checker, and the base UNet that
        refines; None where the weights are in files that torch alone can read.

    Raises:
        HipaError: as ``check_request``.

    """
    model = early_model(options.model)
    settings = choose_task(options, model)
    step = model.one_step(settings.timestep, *asked_size(options))
    pixels = _largest(options, "batch", options.batch)
    pixels *= _largest(options, "height", step.height)
    pixels *= _largest(options, "width", step.width)
    scale = step.height * step.width // math.prod(step.latent_shape[1:])
    wide = BYTES[options.dtype]

    weights = _weights(options, model.folder, takes_source(settings.task), wide)
    if weights is None:
        return None
    unet_channels = model.config.unet["block_out_channels"][0]
    unet_values = UNET_VALUES
    if options.controlnet is not None:
        unet_values += CONTROL_VALUES
    activations = {
        "unet": unet_values * unet_channels * (pixels // scale) * wide,
        DECODER_STAGE: DECODER_VALUES * model.config.vae["block_out_channels"][0] * pixels * wide,
    }
    for part in TEXT_PARTS:
        activations[part] = 0
    if options.decoder is not None:
        weights[DECODER_STAGE] = TINY_WEIGHTS_MIB * wide // BYTES["fp16"]
        activations[DECODER_STAGE] = TINY_BYTES_PER_PIXEL * pixels * wide // BYTES["fp16"]

    if options.fuse:
        generator = weights.pop("unet") + weights.pop(DECODER_STAGE)
        weights["generator"] = generator
        activations["generator"] = max(activations["unet"], activations[DECODER_STAGE])
    if options.safety and has_safety_checker(model.folder):
        checker = _count(known_shapes(model.folder / SAFETY))
        if checker < 0:
            return None
        weights[SAFETY] = -(-checker * wide >> 20)
    if options.with_teacher:
        whole = _count(known_shapes(model.folder / "unet"))
        weights[TEACHER_STAGE] = -(-whole * wide >> 20)
        activations[TEACHER_STAGE] = activations["unet"]
    sizes = []
    for stage, mib in weights.items():
        held = None if stage not in activations else engine_activations_mib(activations[stage])
        sizes.append(StageSize(stage=stage, weights=mib, activations=held))
    return tuple(sizes)


def _largest(options: ExportOptions, axis: str, static: int) -> int:
    """The most that an axis can be."""
    return options.dynamic[axis].max if axis in options.dynamic else static


def _weights(
    options: ExportOptions, folder: Path, has_source: bool, wide: int
) -> dict[str, int] | None:
    """MiB of the weights of each stage; None where torch alone can read them."""
    numbers: dict[str, int] = {}
    if options.prompts is None:
        for part in TEXT_PARTS:
            if (folder / part).is_dir():
                numbers[part] = _count(known_shapes(folder / part))
    vae = known_shapes(folder / "vae")
    if has_source:
        numbers["vae_encoder"] = _count(vae, ENCODER_PARTS)
    unet = known_shapes(folder / "unet")
    if unet is not None and options.layout == "onestep":
        unet = _without_time(unet)
    numbers["unet"] = _count(unet)
    if options.controlnet is not None:
        controlnet = known_shapes(options.controlnet)
        if controlnet is None:
            return None
        numbers["unet"] += _count(_without_time(controlnet))
    numbers[DECODER_STAGE] = _count(vae, DECODER_PARTS)
    if min(numbers.values()) < 0:
        return None
    return {stage: -(-count * wide >> 20) for stage, count in numbers.items()}


def _without_time(shapes: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """The weights of a network whose timestep is folded."""
    kept = {}
    for name, shape in shapes.items():
        if not any(part in name for part in TIME_PARTS):
            kept[name] = shape
    return kept


def _count(shapes: dict[str, tuple[int, ...]] | None, starts: tuple[str, ...] = ("",)) -> int:
    """How many numbers the weights are whose names start so; -1 where they are not known."""
    if shapes is None:
        return -1
    return sum(math.prod(shape) for name, shape in shapes.items() if name.startswith(starts))

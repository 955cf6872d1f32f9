"""A part of a model from its folder, whole: the one loader of training, evaluation and export.

``from_pretrained`` of diffusers and transformers fills a weight that the files lack with random
numbers, and leaves out one that the configuration has no place for. It only warns of both. Here
both are errors, and so is a shape that differs.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hipa_deploy.errors import HipaError
from hipa_deploy.models.weights.early_check import known_shapes
from hipa_deploy.models.weights.part_config import NOT_FUSED, build, read_config
from hipa_deploy.models.weights.weight_file import each_tensor
from hipa_deploy.models.weights.weight_files import current_name, find_weights
from hipa_deploy.models.weights.weight_identity import COMPUTED, check_types

if TYPE_CHECKING:
    from torch import Tensor, nn

PARTS = ("text_encoder", "unet", "vae")
CONFIG = "config.json"
ALIGNMENT = 64  # bytes, of torch's memory on a CPU
TEXT_PREFIX = "text_model."
# A whole CLIP has an image half and projections beside its text encoder.
BESIDE_TEXT = re.compile(r"(vision_model|visual_projection|text_projection)\..*|logit_scale")
# How names of tensors begin in the layout of CompVis and Stability, of a whole model and of a part.
ORIGINAL = (
    "model.diffusion_model.",
    "first_stage_model.",
    "cond_stage_model.",
    "conditioner.",
    "input_blocks.",
    "encoder.down.",
    "decoder.up.",
)
# What peft puts into the names of weights that a LoRA is loaded beside.
BESIDE_LORA = (".base_layer.", ".lora_A.", ".lora_B.")
TEXT_LAYER = re.compile(r"(?:text_model\.)?encoder\.layers\.(\d+)\..*")


def check_weights(folder: Path, also: Iterable[str] = ()) -> None:
    """Check that every part of a model has files of weights, before any is loaded.

    Args:
        folder: a diffusers folder.
        also: parts that not every model has, such as 'text_encoder_2'.

    Raises:
        HipaError: a part has none, or lacks a shard; or the UNet's or the VAE's are of a type that
            no model is loaded from.

    """
    for part in dict.fromkeys((*PARTS, *also)):
        find_weights(folder / part)
    # Those whose identity a bundle or an adaptor has.
    for part in ("unet", "vae"):
        check_types(folder / part)


def check_part(kind: Any, where: Path) -> None:
    """Check by the headers of a part's files that they hold the weights that its class has.

    What only torch can read is checked when it is loaded.

    Args:
        kind: as for ``load_part``.
        where: the part's folder.

    Raises:
        HipaError: as ``load_part``, but for what the values of the weights show.

    """
    shapes = known_shapes(where)
    if shapes is None:
        return
    stored = {name: shape for name, shape in shapes.items() if not name.endswith(COMPUTED)}
    _check_fit(_empty(kind, where), stored, where)


def load_part(kind: Any, where: Path) -> Any:
    """Load a part in float32, frozen, in evaluation mode, on the CPU.

    Args:
        kind: a model class of diffusers, or CLIPTextModel of transformers.
        where: the part's folder, with config.json and weights.

    Raises:
        HipaError: the folder is incomplete or damaged, its weights and its configuration are of
            different models, or a weight is not finite.

    Example:
        >>> unet = load_part(UNet2DConditionModel, Path("stable-diffusion-v1-5/unet"))
        >>> unet.dtype, unet.training
        (torch.float32, False)

    """
    return fill_part(_empty(kind, where), where)


def fill_part(module: Any, where: Path) -> Any:
    """Give a module without weights those of a folder: float32, frozen, in evaluation mode.

    Args:
        module: as the folder's configuration describes it, on the device 'meta'.
        where: the part's folder.

    Raises:
        HipaError: as ``load_part``.

    """
    _fill(module, _read(where), where)
    return module.requires_grad_(False).eval()


def _read(where: Path) -> dict[str, Tensor]:
    """Return the weights of a folder in float32, by their current names."""
    import torch

    tensors: dict[str, Tensor] = {}
    for path in find_weights(where):
        # One by one, so that a part in half precision is never in memory twice.
        for name, stored in each_tensor(path):
            if name.endswith(COMPUTED):
                continue
            if not stored.is_floating_point():
                raise HipaError(
                    f"{path}: weight {name} holds {stored.dtype}. Expected floating-point numbers."
                )
            weight = stored.float()
            if not torch.isfinite(weight).all():
                raise HipaError(
                    f"{path}: weight {name} holds NaN or infinity. Expected finite weights."
                )
            # Where a matrix starts decides how it is multiplied, and so how a result is rounded.
            # In a file it starts anywhere: in torch's own memory, every file gives equal results.
            if weight.data_ptr() % ALIGNMENT:
                weight = weight.clone()
            tensors[current_name(name)] = weight
    return tensors


def _empty(kind: Any, where: Path) -> nn.Module:
    """Make the module that config.json describes, without memory for its weights."""
    module = build(kind, read_config(where, CONFIG), where / CONFIG)
    number_positions(module)
    return module


def number_positions(module: nn.Module) -> None:
    """Number the positions of a CLIP that was made without memory: these numbers are in no file."""
    import torch

    for part in module.modules():
        numbers = getattr(part, COMPUTED, None)
        if isinstance(numbers, torch.Tensor):
            count = numbers.shape[-1]
            setattr(part, COMPUTED, torch.arange(count).expand((1, -1)))


def _fill(module: nn.Module, tensors: dict[str, Tensor], where: Path) -> None:
    """Give ``module`` its weights, after a check that they are its own."""
    shapes = {name: tuple(weight.shape) for name, weight in tensors.items()}
    own_names = _check_fit(module, shapes, where)
    weights = {own: tensors[name] for name, own in own_names.items()}
    module.load_state_dict(weights, assign=True)


def _check_fit(
    module: nn.Module, stored: Mapping[str, tuple[int, ...]], where: Path
) -> dict[str, str]:
    """Check that the weights in files are those of a module.

    Args:
        module: without memory for its weights.
        stored: the shape of each, by its current name.
        where: the part's folder, for messages.

    Returns:
        The name in ``module`` of each stored weight that it uses.

    Raises:
        HipaError: they are not.

    """
    expected = module.state_dict()
    own_names = {name: name for name in stored}
    # transformers names the text encoder without the prefix since 5.6.
    if not any(name.startswith(TEXT_PREFIX) for name in expected):
        own_names = {name: name.removeprefix(TEXT_PREFIX) for name in stored}

    missing = sorted(expected.keys() - set(own_names.values()))
    original = [name for name in stored if name.startswith(ORIGINAL)]
    if missing and original:
        raise HipaError(
            f"{where}: its weights have the names of the original layout, such as {original[0]}. "
            "Expected those of diffusers, which converts the file: "
            f'{type(module).__name__}.from_single_file(FILE, config="{where}")'
            ".save_pretrained(FOLDER)."
        )
    if missing and any(part in name for name in stored for part in BESIDE_LORA):
        raise HipaError(f"{where} {NOT_FUSED}")
    if missing:
        more = f" and {len(missing) - 1} more are" if len(missing) > 1 else " is"
        raise HipaError(f"{where}: weight {missing[0]}{more} missing. Copy the model again.")
    used = {}
    for name, own in own_names.items():
        if own in expected:
            _check_shape(where, own, stored[name], tuple(expected[own].shape))
            used[name] = own
        elif not _is_left_out(module, own):
            raise HipaError(
                f"{where}: config.json has no place for weight {own}. Expected both of one model. "
                "Copy the model again."
            )
    return used


def _is_left_out(module: nn.Module, name: str) -> bool:
    """Whether the files of a text encoder may hold a weight that it does not use.

    Layers beyond those of config.json are left out on purpose: that is how a folder says clip skip.
    """
    layers = getattr(module.config, "num_hidden_layers", None)
    if layers is None:
        return False
    match = TEXT_LAYER.fullmatch(name)
    if match:
        return int(match[1]) >= layers
    return BESIDE_TEXT.fullmatch(name) is not None


def _check_shape(where: Path, name: str, got: tuple[int, ...], expected: tuple[int, ...]) -> None:
    if got != expected:
        raise HipaError(
            f"{where}: weight {name} has the shape {list(got)}, and config.json asks for "
            f"{list(expected)}. Expected both of one model. Copy the model again."
        )

"""A ControlNet (``--controlnet``): where it lies, and whether it fits the base model.

A ControlNet sees a control image - edges, depth, a pose - beside the noise, and adds what its
blocks give to those of the UNet (Zhang, Rao and Agrawala 2023, arXiv 2302.05543). It is a folder of
diffusers, or a file in the original layout, as control_v11p_sd15_canny.pth is. Such a file does not
say its configuration: it is the base UNet's, as the original training copies that.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hipa_deploy.disk.files import new_folder
from hipa_deploy.errors import HipaError, as_line, brief, first_line, reason_of
from hipa_deploy.models.weights.converted_once import converted_once
from hipa_deploy.models.weights.load_part import check_part, load_part
from hipa_deploy.models.weights.part_config import build, checked_values, read_config
from hipa_deploy.models.weights.weight_file import is_pickled, load_tensors, read_layout
from hipa_deploy.models.weights.weight_files import DIFFUSERS, find_weights

if TYPE_CHECKING:
    from diffusers.models.controlnets.controlnet import ControlNetModel
    from torch import Tensor

CONFIG = "config.json"
KIND = "ControlNetModel"
# How names begin in the files of the original training; some tools write others.
PREFIX = "control_model."
PREFIXES = (PREFIX, "controlnet.", "module.")
# What only other networks for control have in their files, and what these are.
OTHERS = {
    "difference": "the difference of a ControlNet to another model",
    "lora_controlnet": "a Control-LoRA",
    "task_embedding": "a ControlNet of several tasks in one (union)",
    "adapter.body.0.in_conv.weight": "a T2I-Adapter",
    "body.0.in_conv.weight": "a T2I-Adapter",
}
# Of SDXL's, which diffusers' conversion leaves out.
ADDED = {
    "label_emb.0.0": "add_embedding.linear_1",
    "label_emb.0.2": "add_embedding.linear_2",
}
# The ControlNets of a reference picture average what they give over all places. Their files do not
# say so, and their names do (control_v11e_sd15_shuffle.pth).
POOLED = "shuffle"
# Masked pixels of its control images are -1, which no image of 8 bits can hold.
UNHEARD = "inpaint"
ORDERS = ("rgb", "bgr")
# Only ControlNets have it: the last convolution of what reads the control image.
ORIGINAL = "input_hint_block.14.weight"
CURRENT = "controlnet_cond_embedding.conv_out.weight"  # the same by diffusers' names
FAMILY = "Expected a ControlNet of the model's family."
# The defaults of ControlNetModel that a request is checked against; a test compares them.
DEFAULTS: dict[str, Any] = {
    "in_channels": 4,
    "conditioning_channels": 3,
    "block_out_channels": (320, 640, 1280, 1280),
    "layers_per_block": 2,
    "cross_attention_dim": 1280,
    "addition_embed_type": None,
    "class_embed_type": None,
    "conditioning_embedding_out_channels": (16, 32, 96, 256),
    "controlnet_conditioning_channel_order": "rgb",
    "num_class_embeds": None,
    "encoder_hid_dim": None,
    "encoder_hid_dim_type": None,
    "resnet_time_scale_shift": "default",
}
# Nothing here gives what these would take.
UNSUPPORTED = ("class_embed_type", "num_class_embeds", "encoder_hid_dim", "encoder_hid_dim_type")
# What both must have in common, so that the blocks' outputs can be added. UNet2DConditionModel has
# the same defaults.
SAME = ("in_channels", "block_out_channels", "layers_per_block", "cross_attention_dim")


def controlnet_folder(controlnet: Path, model: Path) -> Path:
    """The diffusers folder of a ControlNet; a single file is converted into the user's cache.

    Args:
        controlnet: a folder, or a file of weights in the original layout or by diffusers' names.
        model: the base model's folder, whose UNet says the configuration of a single file.

    Raises:
        HipaError: there is nothing, it is no ControlNet, or it does not fit the model.

    Example:
        >>> controlnet_folder(Path("control_v11p_sd15_canny.pth"), Path("sd15")).name
        'control_v11p_sd15_canny'

    """
    check_there(controlnet)
    return controlnet if controlnet.is_dir() else _converted(controlnet, model)


def check_there(controlnet: Path) -> None:
    """Check what can be known of a ControlNet without the base model.

    Raises:
        HipaError: there is nothing, or it is no ControlNet.

    """
    if not controlnet.exists():
        raise HipaError(
            f"--controlnet {controlnet} does not exist. Expected a ControlNetModel folder, or a "
            "file of a ControlNet's weights."
        )
    if controlnet.is_dir():
        _config(controlnet)
    else:
        _check_file(controlnet)


def check_controlnet(controlnet: Path, unet: Mapping[str, Any], vae_factor: int) -> None:
    """Check by its configuration that a ControlNet fits a UNet.

    Args:
        controlnet: its diffusers folder.
        unet: keywords of the base model's UNet.
        vae_factor: pixels a latent: the control image is reduced as many times.

    Raises:
        HipaError: it does not, or it takes something else than an image of three colours.

    """
    config = _config(controlnet)
    values = {**DEFAULTS, **checked_values(DEFAULTS, config, controlnet / CONFIG)}
    for key in SAME:
        got = _plain(values[key])
        wanted = _plain(unet.get(key, DEFAULTS[key]))
        if got != wanted:
            raise HipaError(
                f"--controlnet {controlnet} has {key}={brief(got)}, and the model's UNet "
                f"{brief(wanted)}. It is for another family of models: SD 1.x, 2.x and SDXL each "
                "have their own ControlNets."
            )
    added = values["addition_embed_type"]
    if added != unet.get("addition_embed_type"):
        raise HipaError(
            f"--controlnet {controlnet} has addition_embed_type={brief(added)}, and the model's "
            f"UNet {brief(unet.get('addition_embed_type'))}. Give a ControlNet of its family."
        )
    for key in UNSUPPORTED:
        if values[key] is not None:
            raise _unsupported(controlnet, key, values[key])
    if values["resnet_time_scale_shift"] != "default":
        raise _unsupported(controlnet, "resnet_time_scale_shift", values["resnet_time_scale_shift"])
    order = values["controlnet_conditioning_channel_order"]
    if order not in ORDERS:
        raise HipaError(
            f"--controlnet {controlnet} has controlnet_conditioning_channel_order={brief(order)}. "
            f"Expected one of: {', '.join(ORDERS)}."
        )
    channels = values["conditioning_channels"]
    if channels != 3:
        raise HipaError(
            f"--controlnet {controlnet} takes control images of {channels} channels. Expected 3: "
            "red, green and blue."
        )
    # Each level of the small network that reads the control image halves it, but for the first.
    factor = 2 ** (len(values["conditioning_embedding_out_channels"]) - 1)
    if factor != vae_factor:
        raise HipaError(
            f"--controlnet {controlnet} reduces the control image {factor} times, and the model's "
            f"VAE reduces images {vae_factor} times. Give a ControlNet of its family."
        )
    find_weights(controlnet)


def load_controlnet(controlnet: Path) -> ControlNetModel:
    """Load a ControlNet in float32, frozen, on the CPU.

    Raises:
        HipaError: as ``load_part``.

    """
    from diffusers.models.controlnets.controlnet import ControlNetModel

    network: ControlNetModel = load_part(ControlNetModel, controlnet)
    return network


def check_whole(controlnet: Path) -> None:
    """Check by the headers of its files that a ControlNet has its weights, before any is loaded.

    Raises:
        HipaError: weights are missing, or are another network's.

    """
    from diffusers.models.controlnets.controlnet import ControlNetModel

    try:
        check_part(ControlNetModel, controlnet)
    except HipaError as error:
        raise HipaError(f"--controlnet: {reason_of(error)}.") from None


def control_warning(controlnet: Path) -> str | None:
    """Warn of a ControlNet whose control images cannot be given here; None of others.

    Its name alone says what it is for.
    """
    # A snapshot of the hub's cache has the repository's name two folders above.
    above = [parent.name for parent in controlnet.absolute().parents[:2]]
    names = [controlnet.name, *(name for name in above if name.startswith("models--"))]
    if not any(UNHEARD in name.lower() for name in names):
        return None
    return (
        f"{controlnet} is by its name a ControlNet for inpainting. Masked pixels of its control "
        "images are -1, and an image of 8 bits has no such number: it will see them as black."
    )


def _unsupported(controlnet: Path, key: str, value: Any) -> HipaError:
    return HipaError(f"--controlnet {controlnet} has {key}={brief(value)}, which is not supported.")


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, list | tuple) else value


def _config(folder: Path) -> dict[str, Any]:
    """The configuration of a folder.

    Raises:
        HipaError: it has none, or one of another class.

    """
    if not (folder / CONFIG).is_file():
        raise HipaError(
            f"--controlnet {folder} has no {CONFIG}. Expected a {KIND} folder of diffusers, or a "
            "file of a ControlNet's weights."
        )
    config = read_config(folder, CONFIG)
    kind = config.get("_class_name", KIND)
    if kind != KIND:
        raise HipaError(f"--controlnet {folder} is of the class {brief(kind)}. Expected {KIND}.")
    return config


def _check_file(file: Path) -> None:
    """Check that a file holds a ControlNet, by the names of its tensors.

    Raises:
        HipaError: it cannot be read, or holds none.

    """
    names = list(load_tensors(file)) if is_pickled(file) else list(read_layout(file))
    inner = set(_inner_names(names).values())
    for name, kind in OTHERS.items():
        if name in names or name in inner:
            raise HipaError(
                f"--controlnet {file} is {kind}, which is another network. Expected a ControlNet."
            )
    if ORIGINAL not in inner and CURRENT not in inner:
        raise HipaError(
            f"--controlnet {file} holds no ControlNet: no weight {PREFIX}{ORIGINAL} in it, and no "
            f"{CURRENT}. LoRAs for control, T2I-Adapters and ControlNet-XS are other networks."
        )


def _inner_names(names: Iterable[str]) -> dict[str, str]:
    """The ControlNet's tensors in a file: the name there, and its name within the ControlNet.

    A whole checkpoint has the base model beside it, by names without the prefix.
    """
    names = list(names)
    for prefix in PREFIXES:
        if any(name.startswith(prefix) for name in names):
            inner = [name for name in names if name.startswith(prefix)]
            return {name: name.removeprefix(prefix) for name in inner}
    return {name: name for name in names}


def _converted(file: Path, model: Path) -> Path:
    """The folder of a ControlNet in one file, with the configuration of the model's UNet."""
    unet = read_config(model / "unet", CONFIG)
    convert = partial(_convert, file, unet, model)
    return converted_once("controlnets", file, unet, file.stat().st_size, convert)


def _convert(file: Path, unet: Mapping[str, Any], model: Path, out: Path) -> None:
    """Write the ControlNet of a file as the diffusers folder ``out``."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    config = _config_for(unet, model)
    config["global_pool_conditions"] = POOLED in file.stem.lower()
    tensors = _current_tensors(file, config)
    with new_folder(out) as scratch:
        text = json.dumps({"_class_name": KIND, **config}, indent=2, default=str)
        (scratch / CONFIG).write_text(text + "\n", encoding="utf-8")
        try:
            save_file(tensors, scratch / f"{DIFFUSERS}.safetensors")
        except (OSError, SafetensorError) as error:
            raise HipaError(
                f"--controlnet {file} cannot be stored in {out.parent}: {first_line(error)}"
            ) from None
        try:
            check_whole(scratch)
        except HipaError as error:
            # Its words name the folder that is made here.
            words = reason_of(error).removeprefix(f"--controlnet: {scratch}: ")
            raise HipaError(
                f"--controlnet {file} does not fit the model: {words.partition('. ')[0]}. {FAMILY}"
            ) from None


def _current_tensors(file: Path, config: Mapping[str, Any]) -> dict[str, Tensor]:
    """The ControlNet's tensors of a file, by diffusers' names.

    Raises:
        HipaError: one is missing or unknown.

    """
    from diffusers.loaders.single_file_utils import convert_controlnet_checkpoint

    every = load_tensors(file)
    stored: dict[str, Tensor] = {}
    for name, inner in _inner_names(every).items():
        stored[inner] = every[name]
    with as_line(f"--controlnet {file} cannot be converted", FAMILY):
        converted = dict(convert_controlnet_checkpoint(stored, config))
    for name, weight in stored.items():
        layer, _, kind = name.rpartition(".")
        if layer in ADDED:
            converted[f"{ADDED[layer]}.{kind}"] = weight

    # A copy of each: tensors that share memory cannot be stored.
    tensors: dict[str, Tensor] = {}
    for name, weight in converted.items():
        if weight is None:
            raise HipaError(f"--controlnet {file} lacks the weight {name}. {FAMILY}")
        tensors[name] = weight.clone().contiguous()
    if len(tensors) != len(stored):
        raise HipaError(
            f"--controlnet {file} has {len(stored)} weights, of which {len(tensors)} are known. "
            f"{FAMILY}"
        )
    return tensors


def _config_for(unet: Mapping[str, Any], model: Path) -> dict[str, Any]:
    """The configuration of a ControlNet for a UNet: the original training copies the UNet's."""
    import torch
    from diffusers import UNet2DConditionModel
    from diffusers.models.controlnets.controlnet import ControlNetModel

    module: Any = build(UNet2DConditionModel, unet, model / "unet" / CONFIG)
    with torch.device("meta"):
        network = ControlNetModel.from_unet(module, load_weights_from_unet=False)
    return {key: value for key, value in network.config.items() if not key.startswith("_")}

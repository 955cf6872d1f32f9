"""A ControlNet of random weights for a tiny model, whose outputs are not zero."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import ControlNetModel, UNet2DConditionModel
from safetensors.torch import load_file, save_file

from tests.original_layout import Weights, unet_names

# A ControlNet without attention, as SDXL's small ones are.
SMALL = {
    "down_block_types": ("DownBlock2D",) * 3,
    "mid_block_type": "UNetMidBlock2D",
    "transformer_layers_per_block": (0, 0, 0),
}


def make_controlnet(
    model: Path, folder: Path, seed: int = 0, levels: int = 3, *, small: bool = False
) -> Path:
    """Write a ControlNetModel folder for a model.

    Args:
        model: a diffusers folder.
        folder: where to write.
        seed: of the random weights.
        levels: of the network that reads the control image, one more than it halves it.
        small: without attention, as SDXL's small ones are; the model has three levels.

    Returns:
        ``folder``.

    """
    unet = UNet2DConditionModel.from_pretrained(model, subfolder="unet")
    torch.manual_seed(seed)
    widths = (8, 8, 16, 16)[:levels]
    network = ControlNetModel.from_unet(
        unet, conditioning_embedding_out_channels=widths, load_weights_from_unet=False
    )
    if small:
        network = ControlNetModel.from_config({**network.config, **SMALL})
    # A new ControlNet adds nothing: its last convolutions are zero.
    for name, weight in network.named_parameters():
        if name.startswith(("controlnet_down_blocks", "controlnet_mid_block")):
            torch.nn.init.normal_(weight, std=0.5)
        if "conv_out" in name:
            torch.nn.init.normal_(weight, std=0.2)
    network.save_pretrained(folder)
    return folder


def write_original(folder: Path, path: Path, prefix: str = "control_model.") -> Path:
    """Write a ControlNet in the layout of the original training, as lllyasviel's files have it.

    The names are those of the other direction in diffusers'
    scripts/convert_original_controlnet_to_diffusers.py.

    Args:
        folder: a ControlNetModel folder with four levels in what reads the control image.
        path: the file to write, .safetensors or .pth.
        prefix: of every name.

    Returns:
        ``path``.

    """
    weights = load_file(folder / "diffusion_pytorch_model.safetensors")
    of_control = ("controlnet_", "middle_block_out")
    renamed: Weights = unet_names(
        {name: weight for name, weight in weights.items() if not name.startswith(of_control)}
    )
    for name, weight in weights.items():
        if name.startswith("controlnet_down_blocks."):
            _, number, kind = name.rsplit(".", 2)
            renamed[f"zero_convs.{number}.0.{kind}"] = weight
        elif name.startswith("controlnet_mid_block."):
            renamed[f"middle_block_out.0.{name.rpartition('.')[2]}"] = weight
        elif name.startswith("controlnet_cond_embedding."):
            layer, _, kind = name.removeprefix("controlnet_cond_embedding.").rpartition(".")
            renamed[f"input_hint_block.{_hint_number(layer)}.{kind}"] = weight
    stored = {prefix + name: weight.contiguous().clone() for name, weight in renamed.items()}
    if path.suffix == ".safetensors":
        save_file(stored, path)
    else:
        torch.save(stored, path)
    return path


def _hint_number(layer: str) -> int:
    """The number of a layer among the original's: an activation stands between each two."""
    if layer == "conv_in":
        return 0
    if layer == "conv_out":
        return 14
    return 2 * (int(layer.rpartition(".")[2]) + 1)

"""Low-rank layers on the VAE's encoder, beside the UNet's: for super-resolution.

Its encoder sees a blurred, enlarged image. OSEDiff adapts both too, and leaves the decoder as it is
(Wu et al. 2024, https://arxiv.org/abs/2406.08177). diffusers loads the file with
``vae.load_lora_adapter(folder, prefix=None, weight_name="vae_encoder_lora.safetensors")``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from hipa_deploy.errors import HipaError, as_line
from hipa_deploy.models.adaptor_folder import ENCODER_WEIGHTS, read_metadata
from hipa_deploy.models.lora.lora_file import read_lora
from hipa_deploy.models.lora.merge_lora import module_names
from hipa_deploy.models.weights.weight_file import load_tensors

ADAPTER = "default"  # peft's name of the adapter that trains
# Every convolution and projection of AutoencoderKL's encoder.
LAYERS = (
    r"encoder\.(.+\.)?(conv_in|conv_out|conv1|conv2|conv_shortcut|conv|to_q|to_k|to_v|to_out\.0)"
)


def add_encoder_adaptor(vae: Any, rank: int, seed: int) -> None:
    """Add trainable low-rank layers of scale 1 to the encoder of a frozen AutoencoderKL.

    Their B matrices are zero, so that the encoder's function does not change yet. ``seed`` alone
    decides their A matrices.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        vae.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=LAYERS), ADAPTER)


def save_encoder_adaptor(vae: Any, folder: Path, dtype: torch.dtype = torch.float32) -> None:
    """Write ENCODER_WEIGHTS into ``folder``, with its LoRA configuration in the header.

    Raises:
        HipaError: a weight is not finite in ``dtype``.

    """
    check_storable(get_peft_model_state_dict(vae, adapter_name=ADAPTER), dtype, "vae.")
    vae.save_lora_adapter(folder, ADAPTER, weight_name=ENCODER_WEIGHTS)
    finish_file(folder / ENCODER_WEIGHTS, dtype)


def check_storable(weights: Mapping[str, Tensor], dtype: torch.dtype, prefix: str = "") -> None:
    """Refuse adapter weights that cannot be stored in ``dtype``, before anything is written.

    Args:
        weights: adapter weights by name.
        dtype: float32 or float16.
        prefix: what a message puts before a name.

    Raises:
        HipaError: a weight is not finite (a training that diverged), or too large for ``dtype``.

    """
    for name, weight in weights.items():
        if not torch.isfinite(weight).all():
            raise HipaError(f"adaptor weight {prefix}{name} is not finite. Nothing was written.")
        if not torch.isfinite(weight.to(dtype)).all():
            largest = float(weight.abs().max())
            raise HipaError(
                f"adaptor weight {prefix}{name} is as large as {largest:.3g}. Expected at most "
                f"{torch.finfo(dtype).max:g} in the recipe's adaptor.dtype, {dtype}. "
                "Nothing was written. Set it to float32."
            )


def finish_file(path: Path, dtype: torch.dtype) -> None:
    """Store the tensors of a written safetensors file in ``dtype``; its header stays."""
    if dtype != torch.float32:
        with safe_open(path, framework="pt") as file:
            header = file.metadata()
        tensors = {name: tensor.to(dtype) for name, tensor in load_tensors(path).items()}
        save_file(tensors, path, header)
    path.chmod(0o644)  # safetensors makes it readable for its owner alone


def attach_encoder_adaptor(vae: Any, folder: Path) -> None:
    """Add the encoder's part of a trained adaptor, if it has one, for inference.

    Raises:
        HipaError: the file is damaged or does not fit.

    """
    if not (folder / ENCODER_WEIGHTS).exists():
        return
    attach_lora(vae, "vae", folder / ENCODER_WEIGHTS)


def attach_lora(module: Any, part: str, path: Path) -> None:
    """Add the adapter weights of a file to ``module`` for inference, in place.

    Names, rank and alpha alone are taken from the file. peft would take more from its header:
    expressions that choose the layers, names of modules to import.

    Args:
        module: a model of diffusers.
        part: what names in the file may begin with, 'unet' or 'vae'.
        path: the file.

    Raises:
        HipaError: it cannot be read, is no plain LoRA, or does not fit ``module``.

    """
    lora = read_lora(path, module_names({part: module}))
    weights = {}
    ranks = {}
    alphas = {}
    for key, layer in lora.layers.items():
        if set(layer.tensors) - {"alpha"} != {"down", "up"} or layer.rank is None:
            raise HipaError(f"{path}: layer {key} is no plain LoRA. Expected one of hipa-train.")
        weights[f"{key.module}.lora_A.weight"] = layer.tensors["down"]
        weights[f"{key.module}.lora_B.weight"] = layer.tensors["up"]
        ranks[key.module] = layer.rank
        alphas[key.module] = layer.scaling * layer.rank
    first = next(iter(ranks))
    # Only what differs from the first layer becomes a pattern.
    config = LoraConfig(
        r=ranks[first],
        lora_alpha=alphas[first],
        target_modules=sorted(ranks),
        rank_pattern=_others(ranks, ranks[first]),
        alpha_pattern=_others(alphas, alphas[first]),
    )
    with as_line(f"adaptor {path} cannot be loaded", "Use it with the model that it was made for."):
        module.add_adapter(config, ADAPTER)
        expected = get_peft_model_state_dict(module, adapter_name=ADAPTER)
        if not same_shapes(weights, expected):
            raise HipaError(f"adaptor {path} does not fit this model: its shapes are others.")
        set_peft_model_state_dict(module, weights, adapter_name=ADAPTER)


def _others(values: dict[str, Any], usual: Any) -> dict[str, Any]:
    return {rf"^{re.escape(name)}": value for name, value in values.items() if value != usual}


def load_encoder_weights(vae: Any, folder: Path) -> None:
    """Copy the encoder's part of an adaptor, if any, into the layers of ``add_encoder_adaptor``.

    Raises:
        HipaError: the file is damaged, or it has other layers or another rank.

    """
    if not (folder / ENCODER_WEIGHTS).exists():
        return
    weights = load_tensors(folder / ENCODER_WEIGHTS)

    # A recipe with encoder_rank = 0 added no layers; peft cannot be asked for weights then.
    expected = {}
    if hasattr(vae, "peft_config"):
        expected = get_peft_model_state_dict(vae, adapter_name=ADAPTER)
    if not same_shapes(weights, expected):
        rank = read_metadata(folder).encoder_rank
        raise HipaError(
            f"adaptor {folder} has encoder_rank {rank}, the recipe another. "
            f"Set adaptor.encoder_rank = {rank}."
        )
    set_peft_model_state_dict(vae, weights, adapter_name=ADAPTER)


def same_shapes(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    """Whether two sets of weights have the same names and shapes."""
    if a.keys() != b.keys():
        return False
    return all(a[name].shape == b[name].shape for name in a)

"""The ``config.json`` of a model's part, within bounds, before a library builds anything of it.

diffusers and transformers believe a configuration: they build a million layers, and some keys let
them fetch code. So only the keys that the part's class has by name are passed on, and every value
is checked. The limits are far beyond those of Stable Diffusion.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hipa_deploy.disk.reading import MIB, read_json
from hipa_deploy.errors import HipaError, as_line, brief

if TYPE_CHECKING:
    from torch import nn

AGAIN = "Copy the model again."
# What diffusers and peft save where a LoRA is loaded and not fused, and what to do about it.
ADAPTER = "adapter_config.json"
NOT_FUSED = (
    "was saved with a LoRA that is loaded and not fused. Call pipe.fuse_lora() and "
    "pipe.unload_lora_weights() before pipe.save_pretrained(FOLDER); or give the model without "
    "it, and the LoRA with --lora."
)
MAX_CONFIG = MIB  # bytes; published ones have a few thousand
_MAX_TEXT = 200  # characters of a value
_MAX_VALUES = 100  # in a list, with the lists within it
_MAX_DEPTH = 3  # of lists in lists
_MAX_FLOAT = 1e6
_MAX_WHOLE = 16_384  # widths, sizes and channels
_MAX_BLOCKS = 400  # of a part, together; SDXL's UNet has about 100
_MAX_BETAS = 100_000
# Keys whose limit is another.
_LARGEST = {
    "vocab_size": 2_000_000,
    "pad_token_id": 2_000_000,
    "bos_token_id": 2_000_000,
    "eos_token_id": 2_000_000,
    "num_train_timesteps": _MAX_BETAS,
    "original_inference_steps": _MAX_BETAS,
    "steps_offset": _MAX_BETAS,
    "num_hidden_layers": 128,
    "layers_per_block": 32,
    "transformer_layers_per_block": 64,
    "reverse_transformer_layers_per_block": 64,
    "num_encoder_blocks": 32,
    "num_decoder_blocks": 32,
    "upsampling_scaling_factor": 16,
    "solver_order": 10,
    "sample_size": 4096,
}
# A count that is 0 builds a part without layers, or divides by zero. That of a level's transformers
# may be 0: SDXL's small ControlNets have levels without attention.
_FROM_ONE = (
    "in_channels", "out_channels", "latent_channels", "block_out_channels", "layers_per_block",
    "encoder_block_out_channels", "decoder_block_out_channels", "norm_num_groups", "vocab_size",
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "max_position_embeddings", "attention_head_dim", "cross_attention_dim", "num_train_timesteps",
    "sample_size", "upsampling_scaling_factor", "conv_in_kernel", "conv_out_kernel",
)  # fmt: skip
# DPMSolverMultistepScheduler's default is minus infinity, and its files say so.
_ANY_FLOAT = ("lambda_min_clipped",)
_LEVELS = ("block_out_channels", "encoder_block_out_channels", "decoder_block_out_channels")
_MAX_LEVELS = 8


def read_config(folder: Path, name: str) -> dict[str, Any]:
    """Read a JSON file of a diffusers folder, such as unet/config.json.

    Raises:
        HipaError: the file does not exist or is too large, or does not hold a JSON object.

    """
    path = folder / name
    if not path.exists():
        if path.with_name(ADAPTER).exists():
            raise HipaError(f"{path.parent} {NOT_FUSED}")
        raise HipaError(
            f"{folder}: no readable {name} in it. Expected a StableDiffusionPipeline folder."
        )
    content = read_json(path, max_bytes=MAX_CONFIG, remedy=AGAIN, infinite=True)
    if not isinstance(content, dict):
        raise HipaError(f"{path} is not JSON of a diffusers folder. {AGAIN}")
    return content


def defaults_of(kind: Any) -> dict[str, Any]:
    """The keywords of a class of diffusers or transformers that have a default, and their values.

    Example:
        >>> defaults_of(UNet2DConditionModel)["in_channels"]
        4

    """
    parameters = inspect.signature(kind.__init__).parameters.values()
    return {
        parameter.name: parameter.default
        for parameter in parameters
        if parameter.default is not inspect.Parameter.empty
    }


def known_values(kind: Any, config: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """What a configuration says for the keywords of ``kind``, checked; other keys are left out.

    Args:
        kind: a class of diffusers, or CLIPTextConfig.
        config: the content of the file.
        path: of the file, for messages.

    Raises:
        HipaError: a value of another type than the default's, or beyond its limit; the message
            names its key.

    Example:
        >>> known_values(AutoencoderKL, {"latent_channels": 4, "auto_map": "x"}, path)
        {'latent_channels': 4}

    """
    defaults = defaults_of(kind)
    known = checked_values(defaults, config, path)
    blocks = _count_blocks({**defaults, **known})
    if blocks > _MAX_BLOCKS:
        raise HipaError(
            f"{path} asks for {blocks} blocks of layers. Expected at most {_MAX_BLOCKS}. {AGAIN}"
        )
    return known


def checked_values(
    defaults: Mapping[str, Any], config: Mapping[str, Any], path: Path
) -> dict[str, Any]:
    """What a configuration says for the keys of ``defaults``; other keys are left out.

    Args:
        defaults: of a class, by keyword.
        config: the content of the file.
        path: of the file, for messages.

    Raises:
        HipaError: as ``known_values``.

    """
    known = {key: value for key, value in config.items() if key in defaults}
    for key, value in known.items():
        problem = _problem(key, value, defaults[key])
        if problem:
            raise HipaError(f"{path} has {key}={brief(value)}. Expected {problem}. {AGAIN}")
    return known


def build(kind: Any, config: Mapping[str, Any], path: Path, device: str = "meta") -> nn.Module:
    """The module that a configuration describes.

    Args:
        kind: a model class of diffusers, or CLIPTextModel of transformers.
        config: the content of the file, or part of it; see ``known_values``.
        path: of the file, for messages.
        device: where its weights are; 'meta' is without memory for them.

    Raises:
        HipaError: as ``known_values``; or the library refuses the values.

    """
    import torch

    module: nn.Module
    is_diffusers = hasattr(kind, "load_config")
    known = known_values(kind if is_diffusers else kind.config_class, config, path)
    with as_line(f"{path} cannot be used", AGAIN), torch.device(device):
        module = kind.from_config(known) if is_diffusers else kind(kind.config_class(**known))
    return module


def _problem(key: str, value: Any, default: Any) -> str | None:
    """What is expected in place of ``value``; None where it is well."""
    if value is None:
        must = isinstance(default, int | float | tuple) and not isinstance(default, bool)
        return f"a value such as {default}" if must else None
    if key == "trained_betas":
        most, deepest = _MAX_BETAS, 1
    else:
        most, deepest = _MAX_VALUES, _MAX_DEPTH
    if key in _LEVELS and not (isinstance(value, list | tuple) and 0 < len(value) <= _MAX_LEVELS):
        return f"a list of 1 to {_MAX_LEVELS} numbers"
    for number, scalar in enumerate(_scalars(value, deepest), start=1):
        if number > most:
            return f"at most {most} values"
        problem = _scalar_problem(key, scalar, default)
        if problem:
            return problem
    return None


def _scalars(value: Any, deepest: int) -> Iterator[Any]:
    """The values of a list, and of the lists within it; a list that is too deep is one of them."""
    if isinstance(value, list | tuple) and deepest:
        for part in value:
            yield from _scalars(part, deepest - 1)
    else:
        yield value


def _scalar_problem(key: str, value: Any, default: Any) -> str | None:
    example = default
    while isinstance(example, tuple) and example:
        example = example[0]
    if isinstance(value, str):
        if not (example is None or isinstance(example, str)):
            return f"a value such as {default}"
        return None if value.isprintable() and len(value) <= _MAX_TEXT else "a short word"
    if isinstance(value, bool) or value is None:
        # null in a list, as in only some levels' attention.
        is_count = isinstance(example, int | float) and not isinstance(example, bool)
        return f"a value such as {default}" if is_count or isinstance(example, str) else None
    if isinstance(value, int):
        if isinstance(example, str):
            return f"a value such as {default}"
        least = 1 if key in _FROM_ONE else 0
        most = _LARGEST.get(key, _MAX_WHOLE)
        return None if least <= value <= most else f"a whole number from {least} to {most}"
    if isinstance(value, float):
        if isinstance(example, bool | str) or key in _FROM_ONE or key in _LARGEST:
            return f"a value such as {default}"
        if key in _ANY_FLOAT:
            return None
        is_small = math.isfinite(value) and abs(value) <= _MAX_FLOAT
        return None if is_small else f"a number within {_MAX_FLOAT:g}"
    return f"a value such as {default}"


def _count_blocks(values: Mapping[str, Any]) -> int:
    """How many blocks of layers the values ask for; transformers count each of their layers."""
    blocks = sum(_numbers(values.get("num_hidden_layers")))
    blocks += sum(_numbers(values.get("num_encoder_blocks")))
    blocks += sum(_numbers(values.get("num_decoder_blocks")))
    levels = values.get("block_out_channels") or ()
    layers = _numbers(values.get("layers_per_block"))
    transformers = [1, *_numbers(values.get("transformer_layers_per_block"))]
    return blocks + len(levels) * max(layers, default=0) * max(transformers)


def _numbers(value: Any) -> list[int]:
    return [scalar for scalar in _scalars(value, _MAX_DEPTH) if isinstance(scalar, int)]

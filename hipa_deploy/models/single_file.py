"""A Stable Diffusion checkpoint in one .safetensors file becomes a diffusers folder, once.

The folder lies in the user's cache.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from rich.console import Console

from hipa_deploy.errors import HipaError, first_line
from hipa_deploy.files import new_folder, user_cache
from hipa_deploy.hashing import file_sha256, folder_sha256
from hipa_deploy.models.configurations import MODELS, context_width, write_config

UNET = "model.diffusion_model."
FIRST_LAYER = UNET + "input_blocks.0.0.weight"
CROSS_ATTENTION = UNET + "input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"
PARTS = {"unet": UNET, "vae": "first_stage_model.", "text_encoder": "cond_stage_model."}
DTYPES = {
    "F16": "float16",
    "BF16": "bfloat16",
    "F32": "float32",
    "F64": "float64",
}  # safetensors' names, torch's
Shapes = dict[str, tuple[int, ...]]  # of every tensor in the file


def converted(checkpoint: Path, config: str | None = None) -> Path:
    """The diffusers folder of a checkpoint of SD 1.x or 2.x in the original layout.

    The first call converts it.

    ``config`` is one of ``MODELS``, or a diffusers folder whose configurations and tokenizer to
    take; SD 1.x needs none. The folder is found again by the contents of both. Weights keep the
    precision they are stored in. Of weights that have an averaged copy beside them (EMA), the plain
    ones are taken, as diffusers does.

    Raises:
        HipaError: another kind of file or model, a damaged or incomplete one, or a config that is
        missing or unfit.

    """
    shapes = _read_shapes(checkpoint)
    _check_kind(checkpoint, shapes)
    config = _choose_config(checkpoint, shapes, config)
    with Console(stderr=True).status(
        f"reading {checkpoint.name}; the first time it becomes a diffusers folder"
    ):
        out = user_cache() / "models" / _key(checkpoint, config) / checkpoint.stem
        if not out.is_dir():
            _convert(checkpoint, config, out)
    return out


def _read_shapes(checkpoint: Path) -> Shapes:
    if checkpoint.suffix != ".safetensors":
        raise HipaError(
            f"model {checkpoint} is a {checkpoint.suffix or 'nameless'} file. "
            "Expected a diffusers folder or a "
            ".safetensors checkpoint: other kinds can run code when they are loaded."
        )
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(checkpoint, "numpy") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118  # no dict
    except (OSError, SafetensorError) as error:
        raise HipaError(
            f"model {checkpoint} is damaged: {first_line(error)}. Copy it again."
        ) from None


def _check_kind(checkpoint: Path, shapes: Shapes) -> None:
    expected = "Expected an SD 1.x or 2.x checkpoint"
    if any(name.startswith("conditioner.") for name in shapes):
        raise HipaError(
            f"model {checkpoint} is an SDXL checkpoint, with two text encoders. {expected}."
        )
    if FIRST_LAYER not in shapes:
        lora = any("lora" in name for name in shapes)
        got = "holds LoRA weights, not a model" if lora else f"has no weight {FIRST_LAYER}"
        raise HipaError(f"model {checkpoint} {got}. {expected} in the original layout.")
    channels = shapes[FIRST_LAYER][1]
    if channels != 4:
        got = f"its UNet takes {channels} channels (inpainting or editing?)"
        raise HipaError(f"model {checkpoint}: {got}, expected 4. Use a text-to-image model.")
    for part, prefix in PARTS.items():
        if not any(name.startswith(prefix) for name in shapes):
            raise HipaError(
                f"model {checkpoint} has no {part} (no weight {prefix}…). "
                f"{expected} with all its parts."
            )


def _choose_config(checkpoint: Path, shapes: Shapes, config: str | None) -> str:
    """A name of ``MODELS`` or a folder."""
    if config is not None and config not in MODELS:
        if not (Path(config) / "model_index.json").is_file():
            names = ", ".join(MODELS)
            raise HipaError(
                f"--config {config} is no diffusers folder. "
                f"Expected one with a tokenizer, or: {names}."
            )
        return config
    width = shapes[CROSS_ATTENTION][1] if CROSS_ATTENTION in shapes else 0
    fitting = [name for name in MODELS if context_width(name) == width]
    if config in fitting:
        return str(config)
    got = (
        f"its text contexts are {width} wide"
        if width
        else "it has no text contexts where SD 1.x and 2.x have them"
    )
    if not fitting:
        raise HipaError(
            f"model {checkpoint}: {got}. Name the model it was made from: --config FOLDER."
        )
    if config is not None:
        raise HipaError(
            f"model {checkpoint}: {got}, unlike {config}'s. "
            f"Expected --config {' or '.join(fitting)}."
        )
    if len(fitting) > 1:
        raise HipaError(
            f"model {checkpoint} is SD 2.x, "
            "whose 512-pixel (eps) and 768-pixel (v) weights look alike. "
            f"Say which it is: --config {' or --config '.join(fitting)}."
        )
    return fitting[0]


def _key(checkpoint: Path, config: str) -> str:
    settings = MODELS[config] if config in MODELS else folder_sha256(Path(config), "*.json")
    key = {"format": 1, "checkpoint": file_sha256(checkpoint), "config": settings}
    return hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:24]


def _convert(checkpoint: Path, config: str, out: Path) -> None:
    import torch
    from diffusers import StableDiffusionPipeline
    from diffusers.utils import logging
    from safetensors import SafetensorError

    logging.disable_progress_bar()
    none = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    with new_folder(out) as scratch:
        folder = write_config(config, scratch) if config in MODELS else Path(config)
        try:
            pipe = StableDiffusionPipeline.from_single_file(
                str(checkpoint), config=str(folder), local_files_only=True, **none
            )
        # diffusers and transformers raise whatever a wrong shape or a missing part meets.
        except Exception as error:
            got = first_line(error)
            raise HipaError(
                f"model {checkpoint} cannot be converted. Is it complete, and of {config}? {got}"
            ) from None
        for part, prefix in PARTS.items():
            module = getattr(pipe, part)
            _check_complete(checkpoint, part, module)
            # Loaded as float32, which holds every smaller format exactly; stored as it was.
            torch.nn.Module.to(module, getattr(torch, _stored_dtype(checkpoint, prefix)))
        try:
            pipe.save_pretrained(scratch)
        except (OSError, SafetensorError) as error:
            raise HipaError(
                f"model {checkpoint} cannot be stored in {out.parent}: {first_line(error)}"
            ) from None


def _check_complete(checkpoint: Path, part: str, module: Any) -> None:
    """A weight that the file lacks was never made: it is left on the meta device."""
    for name, weight in module.named_parameters():
        if weight.is_meta:
            raise HipaError(
                f"model {checkpoint} is incomplete: weight {name} of its {part} is missing. "
                "Copy it again."
            )


def _stored_dtype(checkpoint: Path, prefix: str) -> str:
    """torch's name of the precision that all weights of the part have; float32 if they differ."""
    from safetensors import safe_open

    with safe_open(checkpoint, "numpy") as file:
        names = [name for name in file.keys() if name.startswith(prefix)]  # noqa: SIM118
        found = {file.get_slice(name).get_dtype() for name in names}
    kinds = found & DTYPES.keys()  # the rest are numbers of positions
    return DTYPES[kinds.pop()] if len(kinds) == 1 else "float32"

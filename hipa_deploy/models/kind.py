"""What kind of model a diffusers folder holds, and why another kind is not supported."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from hipa_deploy.errors import HipaError
from hipa_deploy.tasks import Task

PARTS = {"unet": "UNet2DConditionModel", "text_encoder": "CLIPTextModel", "vae": "AutoencoderKL"}
# What a UNet may take beside noise, a timestep and one text context. Folding the timestep would
# drop it, and the graph would be wrong.
UNSUPPORTED = (
    "addition_embed_type",
    "class_embed_type",
    "num_class_embeds",
    "encoder_hid_dim_type",
    "encoder_hid_dim",
    "time_cond_proj_dim",
    "class_embeddings_concat",
)


def read_config(folder: Path, name: str) -> dict[str, Any]:
    """A JSON file of a diffusers folder, such as unet/config.json.

    Raises:
        HipaError: there is no such file, or it is not JSON.

    """
    path = folder / name
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except OSError:
        raise HipaError(
            f"{folder}: no readable {name} in it. Expected a StableDiffusionPipeline folder."
        ) from None
    except (ValueError, TypeError):
        raise HipaError(
            f"{path} is not JSON of a diffusers folder. Copy the model again."
        ) from None


def check_pipeline(folder: Path, index: dict[str, Any]) -> None:
    """Check that model_index.json lists one CLIP text encoder, a UNet2DConditionModel and a KL VAE.

    Raises:
        HipaError: it lists other parts.

    """
    if "text_encoder_2" in index:
        kind = index.get("_class_name", "a pipeline of another kind")
        raise HipaError(
            f"{folder} is {kind}: two text encoders are not supported. Use an SD 1.x or 2.x model."
        )
    for part, expected in PARTS.items():
        found = (index.get(part) or [None, None])[1]
        if found != expected:
            kind = index.get("_class_name", "a pipeline of no name")
            raise HipaError(
                f"{folder} is {kind}: its {part} is {found}, expected {expected}. "
                "Use an SD 1.x or 2.x model."
            )


def latent_channels(folder: Path) -> int:
    """Channels C of the VAE's latents."""
    return int(read_config(folder, "vae/config.json").get("latent_channels", 4))


def check_unet(folder: Path, task: Task = "generate") -> None:
    """Check that the UNet takes noise of the VAE's latents, a timestep and one text context alone.

    For inpainting it may take a mask and the source's latents as well, in channels of their own.
    """
    config = read_config(folder, "unet/config.json")
    for key in UNSUPPORTED:
        if config.get(key):
            raise HipaError(
                f"{folder}: the UNet has {key}={config[key]!r}, which is not supported."
            )
    latent = latent_channels(folder)
    for way, key, inpainting in (
        ("takes", "in_channels", 2 * latent + 1),
        ("gives", "out_channels", latent),
    ):
        got = config.get(key, 4)
        if got == latent or (task == "inpaint" and got == inpainting):
            continue
        if got == inpainting:
            raise HipaError(
                f"{folder}: the UNet takes {got} channels, expected {latent}: "
                "it is made for inpainting. "
                f"Use it for the task inpaint, or a text-to-image model for {task}."
            )
        raise HipaError(
            f"{folder}: the UNet {way} {got} channels, expected {latent}, as its VAE gives. "
            "Use a text-to-image model, not one for inpainting or editing."
        )

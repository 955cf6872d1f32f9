"""Checks that a diffusers folder holds a supported kind of model, by its configuration files."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hipa_deploy.errors import HipaError
from hipa_deploy.tasks import Task, is_inpainting_unet

PARTS = {"unet": "UNet2DConditionModel", "text_encoder": "CLIPTextModel", "vae": "AutoencoderKL"}
# What a UNet may take besides noise, a timestep and one text context. The export would drop these
# inputs when it folds the timestep, and the graph would give wrong images.
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
    """Read a JSON file of a diffusers folder, such as unet/config.json.

    Raises:
        HipaError: the file does not exist, or does not hold a JSON object.

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


def check_pipeline(folder: Path, index: Mapping[str, Any]) -> None:
    """Check that a pipeline has one CLIP text encoder, a UNet2DConditionModel and a KL VAE.

    Args:
        folder: the diffusers folder, for messages.
        index: the content of its model_index.json, where each part is [library, class].

    Raises:
        HipaError: the pipeline has another text encoder, UNet or VAE, or lacks one.

    """
    if "text_encoder_2" in index:
        pipeline = index.get("_class_name", "a pipeline of another kind")
        raise HipaError(
            f"{folder} is {pipeline}: two text encoders are not supported. "
            "Use an SD 1.x or 2.x model."
        )
    for part, expected in PARTS.items():
        found = listed_class(index, part)
        if found != expected:
            pipeline = index.get("_class_name", "a pipeline of no name")
            raise HipaError(
                f"{folder} is {pipeline}: its {part} is {found}, expected {expected}. "
                "Use an SD 1.x or 2.x model."
            )


def listed_class(index: Mapping[str, Any], part: str) -> Any:
    """Return the class that model_index.json lists for a part: the second of [library, class].

    An entry of another form is returned as it is, for the message that refuses it; a part that is
    not listed, or is an empty list, gives None.
    """
    entry = index.get(part)
    if not isinstance(entry, list):
        return entry
    return entry[1] if len(entry) > 1 else None


def check_unet(
    folder: Path, unet: Mapping[str, Any], latent_channels: int, task: Task = "generate"
) -> None:
    """Check that a UNet takes only noise, a timestep and one text context.

    For inpainting it may take a mask and the source's latents as well, in channels of their own.

    Args:
        folder: the diffusers folder, for messages.
        unet: keywords of UNet2DConditionModel, with defaults filled in.
        latent_channels: channels C of the VAE's latents.
        task: what the UNet is to be used for.

    Raises:
        HipaError: the UNet has another input, or other channels than the VAE's latents.

    """
    for key in UNSUPPORTED:
        if unet.get(key):
            raise HipaError(f"{folder}: the UNet has {key}={unet[key]!r}, which is not supported.")

    # Of a UNet with 2 C + 1 channels the use is known, so the message can say what to do with it.
    in_channels = unet["in_channels"]
    made_for_inpainting = is_inpainting_unet(in_channels, latent_channels)
    if made_for_inpainting and task != "inpaint":
        raise HipaError(
            f"{folder}: the UNet takes {in_channels} channels, expected {latent_channels}: it is "
            "made for inpainting. Use it for the task inpaint, or a text-to-image model for "
            f"{task}."
        )
    if not made_for_inpainting and in_channels != latent_channels:
        raise _wrong_channels(folder, "takes", in_channels, latent_channels)
    out_channels = unet["out_channels"]
    if out_channels != latent_channels:
        raise _wrong_channels(folder, "gives", out_channels, latent_channels)


def _wrong_channels(folder: Path, verb: str, got: Any, expected: int) -> HipaError:
    """Return the error for a UNet whose channels are not those of the VAE's latents."""
    return HipaError(
        f"{folder}: the UNet {verb} {got} channels, expected {expected}, as its VAE gives. "
        "Use a text-to-image model, not one for inpainting or editing."
    )

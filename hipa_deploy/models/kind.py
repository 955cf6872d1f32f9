"""Checks that a diffusers folder holds a supported kind of model, by its configuration files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hipa_deploy.disk.reading import shown
from hipa_deploy.errors import HipaError, brief
from hipa_deploy.tasks import Task, is_inpainting_unet

PARTS = {"unet": "UNet2DConditionModel", "text_encoder": "CLIPTextModel", "vae": "AutoencoderKL"}
# None is a part that the pipeline does without; stable_diffusion is the safety checker's, which is
# never loaded.
LIBRARIES = ("diffusers", "transformers", "stable_diffusion", None)
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


def check_pipeline(folder: Path, index: Mapping[str, Any]) -> None:
    """Check that a pipeline has one CLIP text encoder, a UNet2DConditionModel and a KL VAE.

    Libraries are checked as well as classes, of every part: diffusers imports whatever a
    model_index.json names.

    Args:
        folder: the diffusers folder, for messages.
        index: the content of its model_index.json, where each part is [library, class].

    Raises:
        HipaError: the pipeline has another text encoder, UNet or VAE, or lacks one.

    """
    if "text_encoder_2" in index:
        pipeline = index.get("_class_name", "a pipeline of another kind")
        raise HipaError(
            f"{folder} is {_word(pipeline)}: two text encoders are not supported. "
            "Use an SD 1.x or 2.x model."
        )
    for part, expected in PARTS.items():
        found = listed_class(index, part)
        if found != expected:
            pipeline = index.get("_class_name", "a pipeline of no name")
            raise HipaError(
                f"{folder} is {_word(pipeline)}: its {part} is {_word(found)}, "
                f"expected {expected}. Use an SD 1.x or 2.x model."
            )
    for part, entry in index.items():
        if isinstance(entry, list) and entry and entry[0] not in LIBRARIES:
            raise HipaError(
                f"{folder}: model_index.json takes {_word(part)} from {_word(entry[0])}. Expected "
                "diffusers or transformers. Use a model without code of its own."
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


def _word(value: Any) -> str:
    """A name of the file's, for a message."""
    return shown(value) if isinstance(value, str) else brief(value)


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
            raise HipaError(
                f"{folder}: the UNet has {key}={brief(unet[key])}, which is not supported."
            )

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

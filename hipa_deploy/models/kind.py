"""Checks that a diffusers folder holds a supported kind of model, by its configuration files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hipa_deploy.disk.reading import shown
from hipa_deploy.errors import HipaError, brief
from hipa_deploy.tasks import Task, is_inpainting_unet

PARTS = {"unet": "UNet2DConditionModel", "text_encoder": "CLIPTextModel", "vae": "AutoencoderKL"}
# SDXL, SDXL-Turbo, SSD-1B and Segmind-Vega have a second text encoder, which gives a pooled vector.
SECOND = "text_encoder_2"
SECOND_CLASS = "CLIPTextModelWithProjection"
TEXT_TIME = "text_time"  # SDXL's addition_embed_type: pooled vector, sizes and crop
SIZE_NUMBERS = 6  # original height and width, crop's top and left, target height and width
REFINER_NUMBERS = 5  # of SDXL's refiner: an aesthetic score in place of the target's size
USABLE = "Use an SD 1.x or 2.x model, SDXL, SSD-1B or Segmind-Vega."
# None is a part that the pipeline does without; stable_diffusion is the safety checker's, which is
# never loaded.
LIBRARIES = ("diffusers", "transformers", "stable_diffusion", None)
# What a UNet may take besides noise, a timestep and one text context. The export would drop these
# inputs when it folds the timestep, and the graph would give wrong images.
UNSUPPORTED = (
    "class_embed_type",
    "num_class_embeds",
    "encoder_hid_dim_type",
    "encoder_hid_dim",
    "time_cond_proj_dim",
    "class_embeddings_concat",
)


def check_pipeline(folder: Path, index: Mapping[str, Any]) -> None:
    """Check that a pipeline has a UNet2DConditionModel, a KL VAE and CLIP's text encoders.

    They are one text encoder, or two as SDXL has them.

    Libraries are checked as well as classes, of every part: diffusers imports whatever a
    model_index.json names.

    Args:
        folder: the diffusers folder, for messages.
        index: the content of its model_index.json, where each part is [library, class].

    Raises:
        HipaError: the pipeline has another text encoder, UNet or VAE, or lacks one; or is SDXL's
            refiner.

    """
    pipeline = _word(index.get("_class_name", "a pipeline of no name"))
    expected_parts = dict(PARTS)
    if has_second_encoder(index):
        expected_parts[SECOND] = SECOND_CLASS
        if listed_class(index, SECOND) == SECOND_CLASS and not listed_class(index, "text_encoder"):
            raise HipaError(
                f"{folder} is {pipeline} without the first text encoder, as SDXL's refiner is: it "
                "finishes images of another model in many steps. Use SDXL's base model."
            )
    for part, expected in expected_parts.items():
        found = listed_class(index, part)
        if found != expected:
            raise HipaError(
                f"{folder} is {pipeline}: its {part} is {_word(found)}, expected {expected}. "
                f"{USABLE}"
            )
    for part, entry in index.items():
        if isinstance(entry, list) and entry and entry[0] not in LIBRARIES:
            raise HipaError(
                f"{folder}: model_index.json takes {_word(part)} from {_word(entry[0])}. Expected "
                "diffusers or transformers. Use a model without code of its own."
            )


def has_second_encoder(index: Mapping[str, Any]) -> bool:
    """Whether a model_index.json lists a second text encoder, as SDXL's does."""
    return listed_class(index, SECOND) is not None


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
    folder: Path,
    unet: Mapping[str, Any],
    latent_channels: int,
    task: Task = "generate",
    pooled_width: int | None = None,
) -> None:
    """Check that a UNet takes only noise, a timestep and one text context.

    For inpainting it may take a mask and the source's latents as well, in channels of their own.
    SDXL's takes a pooled vector and six numbers of size and crop besides.

    Args:
        folder: the diffusers folder, for messages.
        unet: keywords of UNet2DConditionModel, with defaults filled in.
        latent_channels: channels C of the VAE's latents.
        task: what the UNet is to be used for.
        pooled_width: of the second text encoder's vector; None without one.

    Raises:
        HipaError: the UNet has another input, or other channels than the VAE's latents; or it is
            SDXL's and its text encoders are not, or the other way round.

    """
    _check_added(folder, unet, pooled_width)
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


def _check_added(folder: Path, unet: Mapping[str, Any], pooled_width: int | None) -> None:
    """Check what a UNet takes besides the text context against the model's text encoders."""
    added = unet.get("addition_embed_type")
    if added not in (None, TEXT_TIME):
        raise HipaError(
            f"{folder}: the UNet has addition_embed_type={brief(added)}, which is not supported."
        )
    if added is None and pooled_width is None:
        return
    if pooled_width is None:
        raise HipaError(
            f"{folder}: the UNet takes a pooled vector, as SDXL's does, and model_index.json lists "
            f"no {SECOND} that gives it. Copy the whole model again."
        )
    if added is None:
        raise HipaError(
            f"{folder} has two text encoders, and a UNet that takes no pooled vector "
            f"(addition_embed_type). {USABLE}"
        )
    each = unet.get("addition_time_embed_dim")
    width = unet.get("projection_class_embeddings_input_dim")
    if not _is_width(each) or not _is_width(width):
        raise HipaError(
            f"{folder}: unet/config.json has addition_time_embed_dim={brief(each)} and "
            f"projection_class_embeddings_input_dim={brief(width)}. Expected two widths. "
            "Copy the model again."
        )
    assert isinstance(each, int)
    if width == pooled_width + REFINER_NUMBERS * each:
        raise HipaError(
            f"{folder}: the UNet takes an aesthetic score, as SDXL's refiner does. "
            "Use SDXL's base model."
        )
    expected = pooled_width + SIZE_NUMBERS * each
    if width != expected:
        raise HipaError(
            f"{folder}: the UNet takes a pooled vector and sizes of {width} numbers together, and "
            f"its {SECOND} with {SIZE_NUMBERS} sizes of {each} gives {expected}: a pooled vector "
            f"of {pooled_width}. Use the text encoders that the UNet was trained with."
        )


def _is_width(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _wrong_channels(folder: Path, verb: str, got: Any, expected: int) -> HipaError:
    """Return the error for a UNet whose channels are not those of the VAE's latents."""
    return HipaError(
        f"{folder}: the UNet {verb} {got} channels, expected {expected}, as its VAE gives. "
        "Use a text-to-image model, not one for inpainting or editing."
    )

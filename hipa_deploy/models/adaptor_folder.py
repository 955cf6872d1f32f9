"""The adaptor's folder: its file names and hashes, and its metadata, ``hipa_adaptor.json``.

The folder loads with diffusers' ``pipe.load_lora_weights``. The scheduler in its ``scheduler/`` is
exact for the one step.
"""

from __future__ import annotations

import hashlib
import math
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from hipa_deploy.bundle.manifest import EmbeddingInfo, LoraInfo, RefineSettings
from hipa_deploy.bundle.text_settings import TextSettings
from hipa_deploy.disk.hashing import file_sha256
from hipa_deploy.disk.reading import read_record, shown
from hipa_deploy.errors import HipaError
from hipa_deploy.models.model_config import SCHEDULER, ModelConfig
from hipa_deploy.models.weights.part_config import read_config
from hipa_deploy.models.weights.weight_file import read_layout
from hipa_deploy.models.weights.weight_identity import (
    has_identity,
    hint_of_0_1_0,
    weights_identity,
)
from hipa_deploy.record import Record
from hipa_deploy.tasks import TrainedTask

WEIGHTS = "pytorch_lora_weights.safetensors"
ENCODER_WEIGHTS = "vae_encoder_lora.safetensors"  # only where the VAE encoder is adapted too
METADATA = "hipa_adaptor.json"
MAX_RANK = 16_384  # of a matrix that is no wider
Pixels = Annotated[int, Field(ge=1, le=65_536)]
Strength = Annotated[float, Field(gt=0, le=1)]


class TrainingTime(Record):
    """How long a training ran on one kind of device.

    Attributes:
        device: torch's name of it: cpu, cuda, …
        card: the GPU's name as its driver says it, or the CPU's.
        processes: how many trained together, each on a device of its own.
        hours: of wall-clock time, with the making of teacher pairs and the measurements.
        steps: optimiser steps of these hours.

    """

    device: str = Field(max_length=100)
    card: str = Field(max_length=200)
    processes: int = Field(ge=1, le=1_000_000)
    hours: float = Field(ge=0, allow_inf_nan=False)
    steps: int = Field(ge=0)


class AdaptorMetadata(Record):
    """``hipa_adaptor.json``: what an adaptor was made from and how.

    It says enough to refuse the adaptor for any other model.

    Attributes:
        schema_version: version of this file's format.
        base_unet_sha256: hash of the weights of the UNet that the adaptor is for (of its files, in
            adaptors of 0.1.0).
        prompts_sha256: hash of the training prompts.
        rank: rank of the adapter weights.
        alpha: scale of the adapter weights; they are multiplied by alpha / rank.
        targets: names of the adapted layers.
        timestep: of the one step; for an edit that of the largest strength.
        prediction_type: what the UNet predicts.
        alpha_bar: cumulative signal power at ``timestep``.
        resolution: height and width of the training images, in pixels.
        steps_trained: optimiser steps.
        recipe: the training recipe.
        task: what the adaptor is for.
        strengths: of an edit, in descending order; empty for other tasks.
        upscale: factor of the task upscale; without meaning for other tasks.
        initial_sha256: hash of the adaptor that the training started from, if any.
        earlier_prompts_sha256: hashes of the prompts of earlier trainings: of the adaptor that this
            one started from, of those before it, and of all that were averaged.
        encoder_rank: rank of the VAE encoder's adapter weights, 0 where there are none.
        base_vae_sha256: hash of the VAE that the encoder's adapter weights are for.
        text: how the prompts were encoded; in older adaptors one chunk of 77 tokens.
        loras: merged into the base model before the training; the adaptor needs them too. The base
            model's hash is that of the model without them.
        embeddings: words that the base model was given for the training.
        training: hours and devices, summed over all sessions of the run; empty in older adaptors.

    """

    schema_version: Literal[1] = 1
    base_unet_sha256: str
    prompts_sha256: str
    rank: int = Field(ge=1, le=MAX_RANK)
    alpha: float = Field(allow_inf_nan=False)
    targets: tuple[str, ...] = Field(max_length=1000)
    timestep: int = Field(ge=0, le=100_000)
    prediction_type: str = Field(max_length=100)
    alpha_bar: float = Field(ge=0, le=1)
    resolution: tuple[Pixels, Pixels]
    steps_trained: int = Field(ge=0)
    recipe: dict[str, Any]
    task: TrainedTask = "generate"
    strengths: tuple[Strength, ...] = Field(default=(), max_length=100)
    upscale: int = Field(default=4, ge=2, le=8)
    initial_sha256: str | None = None
    earlier_prompts_sha256: tuple[str, ...] = Field(default=(), max_length=1000)
    encoder_rank: int = Field(default=0, ge=0, le=MAX_RANK)
    base_vae_sha256: str | None = None
    text: TextSettings = TextSettings()
    loras: tuple[LoraInfo, ...] = ()
    embeddings: tuple[EmbeddingInfo, ...] = ()
    training: tuple[TrainingTime, ...] = Field(default=(), max_length=1000)

    @property
    def all_prompts_sha256(self) -> tuple[str, ...]:
        """Hashes of the prompts of every training that this adaptor has had, each once."""
        return tuple(dict.fromkeys((*self.earlier_prompts_sha256, self.prompts_sha256)))


def unet_sha256(model_folder: Path) -> str:
    """Hash the UNet's weights that are loaded from a model's folder: ``base_unet_sha256``."""
    return weights_identity(model_folder / "unet")


def weights_sha256(folder: Path) -> str:
    """Hash an adaptor's weights: one file, or two where the VAE encoder is adapted too.

    Raises:
        HipaError: a file is missing or damaged.

    """
    unet = _whole_file_sha256(folder / WEIGHTS)
    if not (folder / ENCODER_WEIGHTS).exists():
        return unet
    encoder = _whole_file_sha256(folder / ENCODER_WEIGHTS)
    return hashlib.sha256((unet + encoder).encode()).hexdigest()


def _whole_file_sha256(path: Path) -> str:
    """The hash of a .safetensors file whose size is what its header says.

    A file of holes may have any size, and hashing takes seconds a gigabyte.
    """
    read_layout(path)
    return file_sha256(path)


def read_metadata(folder: Path, model_folder: Path | None = None) -> AdaptorMetadata:
    """Read the metadata of an adaptor folder, and check that it fits a model.

    Args:
        folder: the adaptor's folder.
        model_folder: the diffusers folder of the model that the adaptor is to be used with; None
            leaves that check out.

    Raises:
        HipaError: the folder is not an adaptor's or is incomplete, or the adaptor was trained on
            another model.

    """
    if not (folder / METADATA).exists():
        raise HipaError(
            f"adaptor {folder} has no {METADATA}. Expected a folder that hipa-train wrote."
        )
    metadata = read_record(
        folder / METADATA, AdaptorMetadata, "Copy the adaptor again, or update hipa-deploy."
    )

    # Adapter weights are a difference to the weights of one model: on another one they would load
    # and give bad images.
    if model_folder is not None and not has_identity(
        model_folder / "unet", metadata.base_unet_sha256
    ):
        raise HipaError(
            f"adaptor {folder} was trained on another base model than {model_folder} "
            f"(UNet hashes differ).{hint_of_0_1_0(metadata.base_unet_sha256)}"
            f"{_other_family(folder, model_folder)}"
        )

    # The same weights, as a checkpoint's that was converted with another configuration.
    if model_folder is not None:
        predicts = read_config(model_folder, SCHEDULER).get("prediction_type", "epsilon")
        if predicts != metadata.prediction_type:
            raise HipaError(
                f"adaptor {folder} was trained on a model that predicts "
                f"{shown(metadata.prediction_type)}, and {model_folder} predicts "
                f"{shown(str(predicts))}. Correct prediction_type in its {SCHEDULER}, or use the "
                "configuration of the training (--config)."
            )

    # An adaptor of the VAE encoder is bound to its VAE in the same way.
    if metadata.encoder_rank and not (folder / ENCODER_WEIGHTS).is_file():
        raise HipaError(
            f"adaptor {folder} lacks {ENCODER_WEIGHTS}, the adapter weights of the VAE's encoder. "
            "Copy it again."
        )
    vae = metadata.base_vae_sha256
    if model_folder is not None and vae and not has_identity(model_folder / "vae", vae):
        raise HipaError(
            f"adaptor {folder} was trained with another VAE than {model_folder}'s "
            "(VAE hashes differ)."
        )
    return metadata


def check_schedule(folder: Path, metadata: AdaptorMetadata, config: ModelConfig) -> None:
    """Check that a model's noise schedule is the one that an adaptor was trained with.

    Args:
        folder: the adaptor's folder, for the message.
        metadata: of the adaptor.
        config: of the model.

    Raises:
        HipaError: the schedule leaves another share of the signal at the adaptor's timestep.

    """
    alpha_bar = config.alpha_bar(metadata.timestep)
    if not same_signal(alpha_bar, metadata.alpha_bar):
        raise HipaError(
            f"adaptor {folder} was trained with another noise schedule: alpha_bar is "
            f"{metadata.alpha_bar:.4g} at timestep {metadata.timestep}, and {alpha_bar:.4g} in "
            f"{config.folder}. Correct the betas, or rescale_betas_zero_snr, in its {SCHEDULER}, "
            "or use the configuration of the training (--config)."
        )


def same_signal(one: float, other: float) -> bool:
    """Whether two values of alpha_bar at one timestep are those of one noise schedule.

    Sums of 1000 small numbers may differ in their last digits between two computers.
    """
    return math.isclose(one, other, rel_tol=1e-3, abs_tol=1e-6)


def _other_family(folder: Path, model_folder: Path) -> str:
    """A sentence about an adaptor whose base model was of another family; empty for the same.

    The text contexts' width tells the families apart: the adaptor's own layers take it as well.
    """
    model = read_config(model_folder, "unet/config.json").get("cross_attention_dim")
    for name, layout in read_layout(folder / WEIGHTS).items():
        if not name.endswith("attn2.to_k.lora_A.weight"):
            continue
        width = layout.shape[-1]
        if isinstance(model, int) and model != width:
            return f" It is for {_family(width)}, and the model has {_family(model)}."
        break
    return ""


def _family(width: int) -> str:
    """What the width of text contexts says of a model."""
    names = {768: "SD 1.x", 1024: "SD 2.x", 2048: "SDXL, SSD-1B or Segmind-Vega"}
    contexts = f"text contexts {width} wide"
    return f"{contexts} ({names[width]})" if width in names else contexts


def teacher_settings(adaptor: Path | None) -> RefineSettings:
    """Sampler, steps and guidance of the teacher that an adaptor learned from.

    A LoRA that others made does not say, and gets the defaults of ``RefineSettings``.

    Raises:
        HipaError: the adaptor's record has values that no teacher takes.

    """
    if adaptor is None or not (adaptor / METADATA).exists():
        return RefineSettings()
    recorded = read_metadata(adaptor).recipe.get("teacher")
    if not isinstance(recorded, dict):
        return RefineSettings()
    known = {name: recorded[name] for name in RefineSettings.model_fields if name in recorded}
    try:
        return RefineSettings(**known)
    except ValueError:
        raise HipaError(
            f"adaptor {adaptor}: {METADATA} has a teacher of {shown(str(known))}. Expected 2 to "
            "1000 steps, a guidance of 1 to 30, and the sampler ddim or dpmsolver++. Copy the "
            "adaptor again."
        ) from None

"""What the configuration files of a diffusers folder say: the one reader of every command.

Training and export ask the same questions here, so a model is accepted or refused alike, and one that
leaves a key out means what the class of diffusers or transformers means by it: the published SD 1.x
folders have no ``scaling_factor`` in ``vae/config.json``, for example.

Reading needs diffusers and transformers, for the defaults of their classes. They are imported when a
configuration is read, not with this module.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hipa_deploy.errors import HipaError, first_line
from hipa_deploy.models.kind import check_pipeline, check_unet, read_config
from hipa_deploy.tasks import Task, is_inpainting_unet

if TYPE_CHECKING:
    from torch import Tensor

PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")
# What describes the noise schedule itself, whatever samples along it.
SCHEDULE_KEYS = (
    "num_train_timesteps",
    "beta_start",
    "beta_end",
    "beta_schedule",
    "trained_betas",
    "prediction_type",
    "rescale_betas_zero_snr",
)
# Settings with which a scheduler of this family leaves it: x0 is then no function of alpha_bar alone.
LEAVING = ("use_flow_sigmas", "snr_shift_scale")
LEAST_SIGNAL = 1e-6  # of alpha_bar: below it eps says nothing about x0


@dataclass(frozen=True)
class ModelConfig:
    """The configuration of a Stable Diffusion folder, with the defaults of its classes filled in.

    Attributes:
        folder: the diffusers folder.
        unet: keywords of UNet2DConditionModel.
        vae: keywords of AutoencoderKL.
        text_encoder: keywords of CLIPTextConfig.
        scheduler: keywords of the scheduler's class.

    Example:
        >>> config = ModelConfig.read(folder_of_sd15)
        >>> config.native_latents, config.native_size, config.scaling_factor
        ((4, 64, 64), (512, 512), 0.18215)

    """

    folder: Path
    unet: Mapping[str, Any]
    vae: Mapping[str, Any]
    text_encoder: Mapping[str, Any]
    scheduler: Mapping[str, Any]

    @classmethod
    def read(cls, folder: Path, task: Task | None = None) -> ModelConfig:
        """Read and check the configuration files of ``folder``.

        Args:
            folder: a diffusers folder.
            task: also check that the UNet is one for this task.

        Raises:
            HipaError: no such files; a pipeline of another kind; a scheduler that is not of DDPM's
                family; a prediction type other than epsilon, v_prediction or sample.

        """
        from diffusers import AutoencoderKL, UNet2DConditionModel
        from transformers import CLIPTextConfig

        index = read_config(folder, "model_index.json")
        check_pipeline(folder, index)
        if task is not None:
            check_unet(folder, task)
        text = CLIPTextConfig.from_dict(read_config(folder, "text_encoder/config.json"))
        config = cls(
            folder=folder,
            unet=_with_defaults(UNet2DConditionModel, read_config(folder, "unet/config.json")),
            vae=_with_defaults(AutoencoderKL, read_config(folder, "vae/config.json")),
            text_encoder=text.to_dict(),
            scheduler=_read_scheduler(folder, index),
        )
        if config.prediction_type not in PREDICTION_TYPES:
            raise HipaError(
                f"{folder} predicts {config.prediction_type!r}. "
                f"Expected one of: {', '.join(PREDICTION_TYPES)}."
            )
        return config

    @property
    def prediction_type(self) -> str:
        """What the UNet predicts: epsilon, v_prediction or sample."""
        kind: str = self.scheduler["prediction_type"]
        return kind

    @property
    def latent_channels(self) -> int:
        """Channels C of the latents [B, C, h, w]."""
        return int(self.vae["latent_channels"])

    @property
    def vae_factor(self) -> int:
        """Pixels a latent, in each direction: every level of the VAE but the last halves the image."""
        return 2 ** (len(self.vae["block_out_channels"]) - 1)

    @property
    def scaling_factor(self) -> float:
        """Latents are multiplied by it before noise is added."""
        return float(self.vae["scaling_factor"])

    @property
    def size_multiple(self) -> int:
        """Heights and widths in pixels are multiples of this, so that every level halves evenly."""
        return self.vae_factor * 2 ** (len(self.unet["block_out_channels"]) - 1)

    @property
    def text_width(self) -> int:
        """Width D of a text context [B, L, D]."""
        return int(self.text_encoder["hidden_size"])

    @property
    def is_inpainting(self) -> bool:
        """Whether the UNet was made for inpainting: it sees mask and source beside the noise."""
        return is_inpainting_unet(int(self.unet["in_channels"]), self.latent_channels)

    @property
    def native_latents(self) -> tuple[int, int, int]:
        """[C, h, w] of the latents at the size that the model was trained for.

        Raises:
            HipaError: the configuration does not say that size.

        """
        size = self.unet["sample_size"]
        if isinstance(size, int):
            size = (size, size)
        if not isinstance(size, list | tuple) or len(size) != 2:
            raise HipaError(
                f"{self.folder}: unet/config.json does not say what size the model is for "
                f"(sample_size is {size}). Write the latent size there, such as 64 for 512 pixels; "
                "an export can take --height and --width in its place."
            )
        height, width = size
        return self.latent_channels, int(height), int(width)

    @property
    def native_size(self) -> tuple[int, int]:
        """Height and width in pixels that the model was trained for.

        Raises:
            HipaError: the configuration does not say it.

        """
        _, height, width = self.native_latents
        return height * self.vae_factor, width * self.vae_factor

    @property
    def schedule(self) -> dict[str, Any]:
        """The noise schedule as scheduler keywords, without any sampler's own settings."""
        return {key: self.scheduler[key] for key in SCHEDULE_KEYS if key in self.scheduler}

    @cached_property
    def alphas_cumprod(self) -> Tensor:
        """``alpha_bar`` of every timestep, float32 [T], on the CPU.

        Raises:
            HipaError: a schedule that diffusers does not know.

        """
        from diffusers import DDIMScheduler

        try:
            alphas: Tensor = DDIMScheduler(**self.schedule).alphas_cumprod
        except (NotImplementedError, TypeError, ValueError) as error:
            raise HipaError(
                f"{self.folder}: its noise schedule cannot be made ({first_line(error)}). "
                "Correct scheduler/scheduler_config.json."
            ) from None
        return alphas

    def alpha_bar(self, timestep: int) -> float:
        """Cumulative signal power at ``timestep``: 0.0046601 at 999 of Stable Diffusion's schedule.

        Raises:
            HipaError: a timestep out of range, or one where a model that predicts eps has no signal:
                x0 would be divided by zero.

        """
        alphas = self.alphas_cumprod
        if not 0 <= timestep < len(alphas):
            raise HipaError(
                f"timestep {timestep} is out of range. "
                f"Expected 0 to {len(alphas) - 1} for {self.folder}."
            )
        value = float(alphas[timestep])
        if self.prediction_type == "epsilon" and value < LEAST_SIGNAL:
            raise HipaError(
                f"timestep {timestep} has no signal, so eps says nothing about x0. Choose a smaller "
                f"one, or a model that predicts v: {self.folder} has a schedule that ends in pure "
                "noise, which no model can be trained on to predict eps."
            )
        return value


def _with_defaults(kind: Any, config: Mapping[str, Any]) -> dict[str, Any]:
    """The keywords of a diffusers class: its defaults, and over them what the file says."""
    parameters = inspect.signature(kind.__init__).parameters.values()
    defaults = {
        parameter.name: parameter.default
        for parameter in parameters
        if parameter.default is not inspect.Parameter.empty
    }
    return {**defaults, **config}


def _read_scheduler(folder: Path, index: Mapping[str, Any]) -> dict[str, Any]:
    """The scheduler's keywords, after a check that its class is of DDPM's family.

    The class decides what a configuration means: FlowMatchEulerDiscreteScheduler's has the same
    ``num_train_timesteps``, and read as DDPM's it would give images without sense and no error.
    """
    from diffusers import schedulers

    config = read_config(folder, "scheduler/scheduler_config.json")
    listed = (index.get("scheduler") or [None, None])[-1]
    name = str(config.get("_class_name") or listed)
    kind = getattr(schedulers, name, None)
    if hasattr(kind, "_backends"):
        # diffusers puts an empty stand-in where a scheduler's own dependency is not installed.
        # LMSDiscreteScheduler alone of these is of the family, and has DDPM's defaults.
        kind = schedulers.DDPMScheduler if name == "LMSDiscreteScheduler" else None
    known = inspect.signature(kind.__init__).parameters if kind is not None else {}
    settings = _with_defaults(kind, config) if kind is not None else dict(config)
    leaves = [key for key in LEAVING if key in known and settings.get(key)]
    if not {"beta_start", "beta_schedule", "prediction_type"} <= set(known) or leaves:
        why = f" with {', '.join(leaves)}" if leaves else ""
        raise HipaError(
            f"{folder} has the scheduler {name}{why}, which is not of DDPM's family: its x0 is "
            "neither eps nor v. Expected a model of DDPM's noise schedule, such as SD 1.x or 2.x."
        )
    return settings

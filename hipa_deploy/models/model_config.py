"""What the configuration files of a diffusers folder say: the one reader of every command.

Training and export ask the same questions here, so a model is accepted or refused alike. A key
that a file leaves out has the default of the class of diffusers or transformers that the file is
for: the published SD 1.x folders have no ``scaling_factor`` in ``vae/config.json``, for example.

Reading needs diffusers and transformers, for the defaults of their classes. They are imported when
a configuration is read, not with this module.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hipa_deploy.disk.reading import shown
from hipa_deploy.errors import HipaError, as_line, brief
from hipa_deploy.models.kind import (
    SECOND,
    check_pipeline,
    check_unet,
    has_second_encoder,
    listed_class,
)
from hipa_deploy.models.weights.part_config import (
    AGAIN,
    defaults_of,
    known_values,
    read_config,
)
from hipa_deploy.tasks import Task, is_inpainting_unet

if TYPE_CHECKING:
    from torch import Tensor

SCHEDULER = "scheduler/scheduler_config.json"
VERSION = "_diffusers_version"  # of the release that wrote a file
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
# Settings with which a scheduler of this family leaves it: x0 then depends on more than alpha_bar.
LEAVING = ("use_flow_sigmas", "snr_shift_scale")
LEAST_SIGNAL = 1e-6  # of alpha_bar: below it eps says nothing about x0
# diffusers puts an empty stand-in where a scheduler's own dependency (scipy, torchsde) is not
# installed. These two are of DDPM's family; the classes beside them have the same defaults.
SAME_DEFAULTS = {
    "LMSDiscreteScheduler": "DDPMScheduler",
    "DPMSolverSDEScheduler": "HeunDiscreteScheduler",
}
# Before this release UNets of 64 latents were published with a wrong sample_size of 32.
SIZES_ARE_RIGHT_SINCE = "0.9.0.dev0"
LEAST_SIZE_BEFORE = 64


@dataclass(frozen=True)
class ModelConfig:
    """The configuration of a Stable Diffusion folder, with the defaults of its classes filled in.

    Attributes:
        folder: the diffusers folder.
        unet: keywords of UNet2DConditionModel.
        vae: keywords of AutoencoderKL.
        text_encoder: keywords of CLIPTextConfig.
        scheduler: keywords of the scheduler's class, and its name as ``_class_name``.
        text_encoder_2: keywords of CLIPTextConfig for SDXL's second text encoder; None without.

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
    text_encoder_2: Mapping[str, Any] | None = None

    @classmethod
    def read(cls, folder: Path, task: Task | None = None) -> ModelConfig:
        """Read and check the configuration files of ``folder``.

        Args:
            folder: a diffusers folder.
            task: also check that the UNet is one for this task.

        Raises:
            HipaError: no such files; a pipeline of another kind; a value that is no positive
                number where one is needed; a scheduler that is not of DDPM's family; a prediction
                type other than epsilon, v_prediction or sample.

        """
        from diffusers import AutoencoderKL, UNet2DConditionModel
        from transformers import CLIPTextConfig

        index = read_config(folder, "model_index.json")
        check_pipeline(folder, index)
        unet = _read_part(folder, "unet", UNet2DConditionModel)
        second = None
        if has_second_encoder(index):
            second = _read_part(folder, SECOND, CLIPTextConfig)
        config = cls(
            folder=folder,
            unet=_with_true_size(folder, unet),
            vae=_read_part(folder, "vae", AutoencoderKL),
            text_encoder=_read_part(folder, "text_encoder", CLIPTextConfig),
            scheduler=_read_scheduler(folder, index),
            text_encoder_2=second,
        )
        config._check_numbers()
        if task is not None:
            config.check_unet(task)
        # transformers' own tools never set it, and no stage of a bundle has a mask.
        for part, values in config.text_parts.items():
            if values.get("use_attention_mask"):
                raise HipaError(
                    f"{folder}: {part}/config.json has use_attention_mask, which hides the "
                    "padding of prompts. Expected a text encoder of Stable Diffusion, which sees "
                    "it."
                )
        config._check_prediction()
        return config

    def check_unet(self, task: Task) -> None:
        """Check that the UNet is one for ``task``, and for the model's text encoders.

        Raises:
            HipaError: as ``hipa_deploy.models.kind.check_unet``; or the text contexts are of
                another width than the UNet takes.

        """
        check_unet(self.folder, self.unet, self.latent_channels, task, self.pooled_width)
        taken = self.unet.get("cross_attention_dim")
        # Of one encoder, the UNet's own layers tell when their weights are loaded.
        if self.has_text_pair and taken != self.text_width:
            raise HipaError(
                f"{self.folder}: the UNet takes text contexts {brief(taken)} wide, and its two "
                f"text encoders give {self.text_width} side by side. Use the text encoders that "
                "the UNet was trained with."
            )

    def _check_prediction(self) -> None:
        """Refuse a UNet that predicts something else than the step can combine."""
        if self.prediction_type not in PREDICTION_TYPES:
            raise HipaError(
                f"{self.folder} predicts {brief(self.prediction_type)}. "
                f"Expected one of: {', '.join(PREDICTION_TYPES)}."
            )

    def _check_numbers(self) -> None:
        """Refuse a value that the properties below could not use."""
        wanted: tuple[tuple[str, str, Callable[[Any], bool], str], ...] = (
            ("unet", "sample_size", _is_size, "a latent size, or [height, width]"),
            ("unet", "block_out_channels", _is_widths, "a list of widths"),
            ("vae", "block_out_channels", _is_widths, "a list of widths"),
            ("vae", "latent_channels", _is_count, "a number of channels"),
            ("vae", "scaling_factor", _is_factor, "a number above 0"),
            ("text_encoder", "hidden_size", _is_count, "a width"),
        )
        if self.has_text_pair:
            wanted += (
                (SECOND, "hidden_size", _is_count, "a width"),
                (SECOND, "projection_dim", _is_count, "a width"),
            )
        for part, key, fits, expected in wanted:
            value = getattr(self, part)[key]
            if not fits(value):
                raise HipaError(
                    f"{self.folder}: {part}/config.json has {key}={brief(value)}. "
                    f"Expected {expected}. Copy the model again, or correct the file."
                )

        # diffusers' SDXL pipelines scale each channel of the latents with these, and others do not.
        statistics = (self.vae.get("latents_mean"), self.vae.get("latents_std"))
        if self.has_text_pair and None not in statistics:
            raise HipaError(
                f"{self.folder}: vae/config.json has latents_mean and latents_std, as Playground "
                "v2.5 has. Expected a VAE with a scaling_factor alone, as SDXL's is."
            )

        betas = self.scheduler.get("trained_betas")
        if betas is not None and not _are_betas(betas):
            raise HipaError(
                f"{self.folder}: {SCHEDULER} has trained_betas={brief(betas, 60)}. "
                "Expected null, or a number from 0 to 1 for each timestep."
            )

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
        """Pixels a latent, in each direction: every level but the VAE's last halves the image."""
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
        """Width D of a text context [B, L, D]; of two encoders, side by side, both together."""
        return sum(self.text_widths)

    @property
    def text_widths(self) -> tuple[int, ...]:
        """Width of each text encoder's part of a context, in their order."""
        return tuple(int(values["hidden_size"]) for values in self.text_parts.values())

    @property
    def text_layers(self) -> int:
        """Layers of the text encoder that a context may have.

        Of two encoders the last layer is never a part of the context (``text_pair``).
        """
        layers = [int(values["num_hidden_layers"]) for values in self.text_parts.values()]
        return min(layers) - 1 if self.has_text_pair else layers[0]

    @property
    def has_text_pair(self) -> bool:
        """Whether it has two text encoders and a pooled vector, as SDXL has."""
        return self.text_encoder_2 is not None

    @property
    def text_parts(self) -> dict[str, Mapping[str, Any]]:
        """The configuration of each text encoder, by its folder's name, in their order."""
        parts = {"text_encoder": self.text_encoder}
        if self.text_encoder_2 is not None:
            parts[SECOND] = self.text_encoder_2
        return parts

    @property
    def pooled_width(self) -> int | None:
        """Width P of the pooled vector [B, P] of a second text encoder; None without one."""
        if self.text_encoder_2 is None:
            return None
        return int(self.text_encoder_2["projection_dim"])

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
        if size is None:
            raise HipaError(
                f"{self.folder}: unet/config.json does not say what size the model is for "
                "(sample_size is None). Write the latent size there, such as 64 for 512 pixels; "
                "an export can take --height and --width in its place."
            )
        height, width = size
        return self.latent_channels, int(height), int(width)

    def latents_of(self, size: tuple[int, int] | None) -> tuple[int, int, int]:
        """[C, h, w] of the latents of images of a size.

        Args:
            size: height and width in pixels; None is the size that the model was trained for.

        Raises:
            HipaError: a size that does not fit the model, or None where the configuration does not
                say one.

        """
        if size is None:
            return self.native_latents
        for side in size:
            if side <= 0 or side % self.size_multiple:
                nearest = max(1, round(side / self.size_multiple)) * self.size_multiple
                raise HipaError(
                    f"resolution {side} does not fit {self.folder}. Expected a multiple of "
                    f"{self.size_multiple}: {nearest} is nearest."
                )
        height, width = size
        return self.latent_channels, height // self.vae_factor, width // self.vae_factor

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
        from diffusers.schedulers.scheduling_ddim import DDIMScheduler

        with as_line(
            f"{self.folder}: its noise schedule cannot be made",
            "Correct scheduler/scheduler_config.json.",
        ):
            alphas: Tensor = DDIMScheduler(**self.schedule).alphas_cumprod
        if not len(alphas) or not bool(((alphas >= 0) & (alphas <= 1)).all()):
            raise HipaError(
                f"{self.folder}: its noise schedule has {len(alphas)} timesteps, and alpha_bar is "
                "not between 0 and 1 at each. Correct the betas and num_train_timesteps in "
                "scheduler/scheduler_config.json."
            )
        return alphas

    @property
    def last_timestep(self) -> int:
        """The timestep with the most noise: 999 of Stable Diffusion's schedule."""
        return len(self.alphas_cumprod) - 1

    def alpha_bar(self, timestep: int) -> float:
        """Cumulative signal power at ``timestep``: 0.0046601 at 999 of Stable Diffusion's schedule.

        Raises:
            HipaError: a timestep out of range, or one where a model that predicts eps has no
                signal: x0 would be divided by zero.

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
                f"timestep {timestep} has no signal, so eps says nothing about x0. Choose a "
                f"smaller one, or a model that predicts v: {self.folder} has a schedule that "
                "ends in pure noise, which no model can be trained on to predict eps."
            )
        return value


def _is_count(value: Any) -> bool:
    """Whether a value of a JSON file is a whole number above 0; true and false are none."""
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _is_factor(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value > 0


def _is_widths(value: Any) -> bool:
    return isinstance(value, list | tuple) and len(value) > 0


def _are_betas(value: Any) -> bool:
    """Whether it is a list of numbers from 0 to 1; the last is 1 where no signal is left."""
    if not isinstance(value, list | tuple) or not value:
        return False
    return all(isinstance(beta, int | float) and 0 <= beta <= 1 for beta in value)


def _is_size(value: Any) -> bool:
    """Whether it is one side, or height and width; None where the file does not say the size."""
    if isinstance(value, list | tuple):
        return len(value) == 2 and all(_is_count(side) for side in value)
    return value is None or _is_count(value)


def _read_part(folder: Path, part: str, kind: Any) -> dict[str, Any]:
    """The keywords of a part's class: what its config.json says, within bounds, and its defaults.

    The version that wrote the file is kept beside them.
    """
    name = f"{part}/config.json"
    config = read_config(folder, name)
    known = known_values(kind, config, folder / name)
    kept = {key: config[key] for key in (VERSION, "use_attention_mask") if key in config}
    return {**defaults_of(kind), **known, **kept}


def _with_true_size(folder: Path, unet: dict[str, Any]) -> dict[str, Any]:
    """The UNet's keywords with the size that StableDiffusionPipeline takes for an old folder.

    Folders of SD 1.1 to 1.5 that diffusers before 0.9.0 wrote say 32 for a model of 64 latents. The
    pipeline corrects this when it loads them (diffusers, pipeline_stable_diffusion.py).
    """
    from packaging.version import Version

    written_by = unet.get(VERSION)
    size = unet["sample_size"]
    if not written_by or not _is_count(size) or size >= LEAST_SIZE_BEFORE:
        return unet
    # A development version counts as its release, as the pipeline has it.
    with as_line(f"{folder}: unet/config.json has {VERSION}={brief(written_by)}", AGAIN):
        release = Version(Version(written_by).base_version)
    if release < Version(SIZES_ARE_RIGHT_SINCE):
        return {**unet, "sample_size": LEAST_SIZE_BEFORE}
    return unet


def _read_scheduler(folder: Path, index: Mapping[str, Any]) -> dict[str, Any]:
    """The scheduler's keywords, after a check that its class is of DDPM's family.

    The class decides what a configuration means: FlowMatchEulerDiscreteScheduler's has the same
    ``num_train_timesteps``, and read as DDPM's it would give images without sense and no error.
    """
    from diffusers import DDIMScheduler

    config = read_config(folder, SCHEDULER)
    listed = listed_class(index, "scheduler")
    name = str(config.get("_class_name") or listed)

    # A pipeline is loaded with the class that its index lists, whatever the file beside says, so a
    # listed class of another family is one that the model was made for.
    for candidate in dict.fromkeys((name, str(listed or name))):
        kind = _scheduler_class(candidate)
        defaults = defaults_of(kind) if kind is not None else {}
        leaves = [key for key in LEAVING if key in defaults and config.get(key, defaults[key])]
        if not {"beta_start", "beta_schedule", "prediction_type"} <= set(defaults) or leaves:
            why = f" with {', '.join(leaves)}" if leaves else ""
            raise HipaError(
                f"{folder} has the scheduler {shown(candidate)}{why}, which is not of DDPM's "
                "family: its x0 is neither eps nor v. Expected a model of DDPM's noise schedule, "
                "such as SD 1.x, 2.x or SDXL."
            )
    kind = _scheduler_class(name)
    own = defaults_of(kind)
    values = known_values(kind, config, folder / SCHEDULER)

    # Not every class can end in pure noise, PNDM's for one. The file says all the same what the
    # model was trained with, and diffusers hands it on to a class that can.
    others = {key: config[key] for key in SCHEDULE_KEYS if key in config and key not in own}
    stated = known_values(DDIMScheduler, others, folder / SCHEDULER)
    return {**own, **stated, **values, "_class_name": name}


def scheduler_values(folder: Path, kind: Any) -> dict[str, Any]:
    """What the folder's scheduler_config.json says for the keywords of a class, within bounds.

    Raises:
        HipaError: as ``known_values``.

    """
    return known_values(kind, read_config(folder, SCHEDULER), folder / SCHEDULER)


def _scheduler_class(name: str) -> Any:
    """The class of diffusers, or one with its defaults; None if diffusers has none of this name."""
    from diffusers import schedulers

    kind = getattr(schedulers, name, None)
    if not inspect.isclass(kind):
        return None
    if hasattr(kind, "_backends"):
        return getattr(schedulers, SAME_DEFAULTS.get(name, ""), None)
    return kind

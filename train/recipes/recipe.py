"""What a training run is: a TOML recipe, validated before anything expensive starts."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from hipa_deploy.errors import HipaError
from hipa_deploy.generate.prompt_files import read_prompt_file
from hipa_deploy.tasks import Task

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

SHIPPED = Path(__file__).parent
RADIUS = 0.2  # of the Nyquist frequency: where the high-pass reaches 1 - exp(-1/2) = 0.39
MODEL_PREFIX = "model:"
MixedPrecision = Literal["no", "bf16", "fp16"]


class _Settings(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class AdaptorSettings(_Settings):
    """The low-rank adaptor."""

    preset: Literal["paper", "full"] = "paper"
    """paper: the four attention projections; full: also feed-forward, projections in and out, convolutions."""
    rank: int = Field(16, ge=1, le=1024)
    """Rank of every pair of matrices. Merging makes it free at inference."""
    alpha: float | None = Field(None, gt=0)
    """Scale of the adaptor is alpha / rank; rank itself when left out, which every loader understands."""
    encoder_rank: int = Field(0, ge=0, le=1024)
    """Of super-resolution: rank of an adaptor on the VAE's encoder beside the UNet's; 0 leaves the encoder as it is."""


class TeacherSettings(_Settings):
    """The deterministic multi-step sampler whose images the one-step model learns."""

    sampler: Literal["ddim", "dpmsolver++"] = "ddim"
    """Sampler of the probability-flow ODE."""
    steps: int = Field(25, ge=2, le=1000)
    """UNet steps of a teacher image."""
    guidance: float = Field(5.0, ge=1.0, le=30.0)
    """Classifier-free guidance; 1 turns it off (and halves the cost)."""
    pairs: int = Field(ge=1, le=10_000_000)
    """How many (prompt, noise, teacher latents) to make."""
    batch: int = Field(64, ge=1, le=4096)
    """Pairs made at once; also the size of a cache shard."""
    dtype: Literal["float16", "float32"] = "float16"
    """Storage type of the cached latents."""
    mixed_precision: MixedPrecision = "no"
    """Of the UNet's arithmetic; the sampler's stays in float32."""


class SourceSettings(_Settings):
    """The images that editing, inpainting and super-resolution start from."""

    images: str | None = None
    """Folder of images, with captions in metadata.csv (file_name, text): relative to the recipe; the teacher's own
    images of the prompts when left out."""
    prompts: str | None = None
    """Of editing: file of the prompts that the teacher's source images are made of, when the edits follow others."""
    per_image: int = Field(1, ge=1, le=1000)
    """Examples made of each image, each with noise, mask, strength or blur of its own."""
    without_prompt: float = Field(0.1, ge=0, le=1)
    """Share of the examples of inpainting and super-resolution that have no prompt."""
    strengths: tuple[Annotated[float, Field(gt=0, le=1)], ...] = (0.8, 0.6, 0.4)
    """Of editing: how far from the source; each a whole number of the teacher's steps."""
    same: str | None = None
    """Of editing: regular expression with a group. Prompts in which the group matches the same text are edits of one
    another; when left out, any two prompts are."""
    coverage: tuple[float, float] = (0.1, 0.5)
    """Of inpainting: least and largest share of the image that a mask covers."""
    factor: int = Field(4, ge=2, le=8)
    """Of super-resolution: how many times the image is enlarged."""

    @field_validator("strengths")
    @classmethod
    def _descending(cls, strengths: tuple[float, ...]) -> tuple[float, ...]:
        if not strengths or len(set(strengths)) < len(strengths):
            raise ValueError("expected at least one strength, each once")
        return tuple(sorted(strengths, reverse=True))

    @field_validator("same")
    @classmethod
    def _has_group(cls, same: str | None) -> str | None:
        try:
            groups = re.compile(same or "()").groups
        except re.error as error:
            raise ValueError(f"not a regular expression: {error}") from None
        if groups != 1:
            raise ValueError(f"expected a regular expression with one group, got {groups}")
        return same

    @field_validator("coverage")
    @classmethod
    def _ordered(cls, coverage: tuple[float, float]) -> tuple[float, float]:
        if not 0 < coverage[0] <= coverage[1] < 1:
            raise ValueError("expected 0 < least <= largest < 1")
        return coverage


class _ImageLossSettings(_Settings):
    perceptual: Literal["dists", "lpips", "none"] = "dists"
    """Perceptual distance; none leaves the term out."""
    backbone: str = Field("lite0", pattern=r"^(lite0|vgg16|[\w.]+:\w+)$")
    """Its features: lite0, vgg16 (torchvision; with the published channel weights) or your own module:function."""
    perceptual_weight: float = Field(1.0, ge=0)
    """Weight of the perceptual distance."""
    perceptual_size: int | None = Field(None, ge=32, le=4096)
    """Resize the short side to this before the perceptual distance (DISTS evaluates at 256)."""
    hf_weight: float = Field(1.0, ge=0)
    """Weight of the high-frequency terms together: it multiplies the next two."""
    fourier_weight: float = Field(1.0, ge=0)
    """Weight of the Fourier term among them."""
    edge_weight: float = Field(1.0, ge=0)
    """Weight of the edge term among them."""
    high_frequency: Literal["difference", "similarity"] = "difference"
    """Form of both: the L1 difference, or a similarity, which asks for as much energy whatever agrees (ours)."""
    fourier_focal: float = Field(0.0, ge=0, le=10)
    """Of the difference: exponent of the focal weighting that favours the worst frequencies; 0 weighs all alike."""
    edge: Literal["sobel", "laplacian"] = "sobel"
    """Operator of the edge term."""
    amplitude_weight: float = Field(0.0, ge=0)
    """Weight of the difference of Fourier amplitudes, whatever the phase (ours)."""
    radius: float = Field(RADIUS, gt=0, le=2)
    """Radius of the Gaussian high-pass, in units of the Nyquist frequency."""
    pixel: Literal["l1", "mse"] = "l1"
    """Error of the pixel term."""
    adversarial_weight: float = Field(0.0, ge=0)
    """Weight of a discriminator's judgement of the perceptual distance's features (ours)."""
    balance: Literal["fixed", "gradient"] = "fixed"
    """gradient: scale the image's terms so that each pulls at the image as its weight says, relative to the first."""
    balance_every: int = Field(50, ge=1)
    """Evaluations of the loss between two measurements of the gradients, with balance = gradient."""

    @model_validator(mode="after")
    def _judges_features(self) -> _ImageLossSettings:
        if self.adversarial_weight and (self.perceptual == "none" or not self.perceptual_weight):
            raise ValueError(
                "adversarial_weight needs a perceptual distance with a weight, whose features it judges"
            )
        return self


class LossSettings(_ImageLossSettings):
    """Weights of the terms; see hipa_deploy.train.losses.hipa_loss."""

    pixel_weight: float = Field(0.0, ge=0)
    """Weight of the error of pixels in [0, 1]."""
    latent: Literal["mse", "huber"] = "mse"
    """Error of the latents: their mean square, or pseudo-Huber."""
    latent_weight: float = Field(0.05, ge=0)
    """Weight of the latents' error beside the decoded losses."""
    latent_hf_weight: float = Field(0.0, ge=0)
    """Weight of the Fourier and edge terms of the latents, which need no decoding (ours)."""
    latent_warmup_steps: int = Field(0, ge=0)
    """First steps that use the latents' error alone, without decoding: about three times faster a step."""


class DecoderLossSettings(_ImageLossSettings):
    """Weights of the terms of a decoder's loss; see hipa_deploy.train.losses.hipa_loss."""

    pixel_weight: float = Field(1.0, ge=0)
    """Weight of the error of pixels in [0, 1]."""


class DecoderSettings(_Settings):
    """The AutoencoderTiny (TAESD, github.com/madebyollin/taesd) to train; its own defaults are here."""

    channels: int = Field(64, ge=4, le=512)
    """Channels of every layer: AutoencoderTiny takes the same at all levels."""
    blocks: tuple[Annotated[int, Field(ge=0, le=16)], ...] = Field(
        (3, 3, 3, 1), min_length=2, max_length=6
    )
    """Residual blocks at each level, from the latents' size to the image's: four levels enlarge eight times."""


class LatentSettings(_Settings):
    """The one-step latents to learn; the full decoder's images of them are the targets."""

    count: int = Field(4096, ge=1, le=10_000_000)
    """How many latents to make."""
    perturbed: float = Field(0.25, ge=0, le=1)
    """Share of the latents that get Gaussian noise on top, as latents of other tasks differ from one-step ones."""
    noise: float = Field(0.1, ge=0, le=1)
    """Standard deviation of that noise, in scaled latents."""
    held_out: int = Field(256, ge=1, le=100_000)
    """Further latents, with other prompts and seeds, on which the fidelity is measured."""


class OptimiserSettings(_Settings):
    """AdamW."""

    learning_rate: float = Field(1e-4, gt=0, le=1)
    """Peak learning rate."""
    warmup_steps: int = Field(0, ge=0)
    """Linear warm-up."""
    decay: Literal["constant", "cosine"] = "constant"
    """After the warm-up; cosine falls to a hundredth of the peak at the last step."""
    weight_decay: float = Field(1e-2, ge=0)
    """Decoupled weight decay."""
    clip_norm: float = Field(1.0, gt=0)
    """Gradient norm limit."""


class _TrainingSettings(_Settings):
    prompts: str
    """UTF-8 text file, one prompt a line, or a table of captions (.csv, .tsv, .parquet, a folder of datasets):
    relative to the recipe, of a shipped recipe to the current folder, or to the model's when it begins 'model:'."""
    prompts_column: str | None = None
    """Column of the table; 'caption' or 'text' when left out."""
    steps: int = Field(ge=1, le=10_000_000)
    """Optimiser steps, the latent warm-up included."""
    batch: int = Field(16, ge=1, le=4096)
    """Pairs, or latents, a step, over all processes."""
    micro_batch: int | None = Field(None, ge=1)
    """Rows that a process takes through the models at once, their gradients accumulate; all of its rows if left out."""
    mixed_precision: MixedPrecision = "no"
    """Of the networks' arithmetic in training; weights, x0 and losses stay in float32."""
    ema_decay: float = Field(0.0, ge=0, lt=1)
    """Keep an exponential moving average of the weights and store that; 0 stores the weights themselves."""
    timestep: int = Field(999, ge=0)
    """Where the single step starts; latents made with an adaptor take the adaptor's."""
    seed: int = Field(0, ge=0, lt=2**30)
    """Fixes the pairs or latents, the start and the order of batches."""
    checkpoint_every: int = Field(200, ge=1)
    """Steps between checkpoints."""
    sample_every: int = Field(200, ge=1)
    """Steps between sample grids."""
    samples: int = Field(8, ge=1, le=64)
    """Rows of a sample grid."""
    optimiser: OptimiserSettings = OptimiserSettings()
    """Optimiser."""


class Recipe(_TrainingSettings):
    """One training run of an adaptor."""

    kind: Literal["adaptor"] = "adaptor"
    """What is trained."""
    task: Task = "generate"
    """What the one step is for; see hipa_deploy.tasks."""
    source: SourceSettings = SourceSettings()
    """What tasks other than generate start from."""
    gradient_checkpointing: bool = False
    """Recompute UNet and decoder activations in the backward pass: less memory, more time."""
    adaptor: AdaptorSettings = AdaptorSettings()
    """The low-rank adaptor."""
    teacher: TeacherSettings
    """The teacher and how many of its images to learn."""
    loss: LossSettings = LossSettings()
    """Loss weights."""

    @model_validator(mode="after")
    def _encoder_sees_blur(self) -> Recipe:
        if self.adaptor.encoder_rank and self.task != "upscale":
            raise ValueError(f"adaptor.encoder_rank is for the task upscale, this is {self.task}")
        return self

    @model_validator(mode="after")
    def _strengths_are_steps(self) -> Recipe:
        for strength in self.source.strengths if self.task == "edit" else ():
            steps, timesteps = strength * self.teacher.steps, strength * 1000
            if abs(steps - round(steps)) > 1e-6 or abs(timesteps - round(timesteps)) > 1e-6:
                expected = f"no whole number of teacher.steps = {self.teacher.steps} equal steps, at a whole timestep"
                raise ValueError(f"strength {strength:g} is {expected}")
        return self


class DecoderRecipe(_TrainingSettings):
    """One training run of a tiny decoder."""

    kind: Literal["decoder"]
    """What is trained."""
    decoder: DecoderSettings = DecoderSettings()
    """The tiny decoder."""
    latents: LatentSettings = LatentSettings()
    """What it learns to decode."""
    loss: DecoderLossSettings = DecoderLossSettings()
    """Loss weights."""


KINDS: dict[str, type[Recipe | DecoderRecipe]] = {"adaptor": Recipe, "decoder": DecoderRecipe}


def load_recipe(source: str | Path, overrides: Mapping[str, Any] | None = None) -> Recipe:
    """An adaptor's recipe: ``load_any_recipe`` that refuses the other kind."""
    recipe = load_any_recipe(source, overrides)
    if not isinstance(recipe, Recipe):
        raise HipaError(
            f"recipe {recipe_path(source)} is of kind {recipe.kind}. Expected one of kind adaptor."
        )
    return recipe


def load_any_recipe(
    source: str | Path, overrides: Mapping[str, Any] | None = None
) -> Recipe | DecoderRecipe:
    """Read a TOML file, or a shipped recipe by name ('emoji'), with ``overrides`` such as {'teacher.pairs': 256}.

    Its ``kind`` says what it trains: 'adaptor' when left out, or 'decoder'.

    Raises:
        HipaError: no such recipe, not TOML, or a key or value that does not belong; the message names the key.

    """
    path = recipe_path(source)
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise HipaError(f"recipe {path} cannot be read: {error}") from None
    _override(values, overrides or {})
    base = Path.cwd() if path.parent == SHIPPED else path.parent.absolute()
    for table, key in (
        (values, "prompts"),
        (values.get("source"), "prompts"),
        (values.get("source"), "images"),
    ):
        if (
            isinstance(table, dict)
            and isinstance(name := table.get(key), str)
            and not name.startswith(MODEL_PREFIX)
        ):
            table[key] = str(base / name)
    kind = values.get("kind", "adaptor")
    if not isinstance(kind, str) or kind not in KINDS:
        raise HipaError(f"recipe {path}: kind = {kind!r}: expected one of: {', '.join(KINDS)}.")
    try:
        return KINDS[kind].model_validate(values)
    except ValidationError as error:
        raise HipaError(f"recipe {path}: {_first_problem(error)}") from None


def _override(values: dict[str, Any], overrides: Mapping[str, Any]) -> None:
    for key, value in overrides.items():
        *parents, last = key.split(".")
        table = values
        for parent in parents:
            table = table.setdefault(parent, {})
            if not isinstance(table, dict):
                raise HipaError(f"recipe override {key!r} cannot be set: {parent!r} is not a table")
        table[last] = value


def recipe_path(source: str | Path) -> Path:
    """The file itself, or the shipped recipe of that name."""
    path = Path(source)
    shipped = SHIPPED / f"{source}.toml"
    if path.suffix != ".toml" and shipped.is_file():
        return shipped
    if path.is_file():
        return path
    names = ", ".join(sorted(p.stem for p in SHIPPED.glob("*.toml")))
    raise HipaError(
        f"recipe {str(source)!r} does not exist. Expected a .toml file or one of: {names}."
    )


def read_prompts(recipe: Recipe | DecoderRecipe, model_folder: Path) -> list[str]:
    """The distinct prompts of the recipe's file, in file order; those of an edit's sources come first.

    Raises what ``read_prompt_file`` does.
    """
    prompts = read_prompt_file(_prompts_path(recipe.prompts, model_folder), recipe.prompts_column)
    return list(dict.fromkeys([*source_prompts(recipe, model_folder), *prompts]))


def source_prompts(recipe: Recipe | DecoderRecipe, model_folder: Path) -> list[str]:
    """The prompts of an edit's sources, when they are others than the edits'; else none."""
    name = recipe.source.prompts if isinstance(recipe, Recipe) and recipe.task == "edit" else None
    return read_prompt_file(_prompts_path(name, model_folder), None) if name else []


def _prompts_path(name: str, model_folder: Path) -> Path:
    in_model = name.startswith(MODEL_PREFIX)
    return model_folder / name.removeprefix(MODEL_PREFIX) if in_model else Path(name)


def _first_problem(error: ValidationError) -> str:
    problem = error.errors()[0]
    key, more = ".".join(str(part) for part in problem["loc"]), error.error_count() - 1
    if problem["type"] == "extra_forbidden":
        text = f"unknown key {key!r}"
    elif problem["type"] == "missing":
        text = f"key {key!r} is missing"
    else:
        text = f"{key} = {problem['input']!r}: {problem['msg'][0].lower()}{problem['msg'][1:]}"
    return text + (f" (and {more} more)" if more else "")

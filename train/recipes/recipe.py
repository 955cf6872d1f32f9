"""Training recipes: TOML files, validated before anything expensive starts.

Every key of a recipe is a field below, and the text under a field is its description. The keys are
a file format: recipes outside of this repository use them.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, ValidationError, field_validator, model_validator

from hipa_deploy.bundle.text_settings import TextSettings
from hipa_deploy.disk.reading import read_toml, shown
from hipa_deploy.errors import HipaError, brief
from hipa_deploy.generate.prompt_files import read_prompt_file
from hipa_deploy.tasks import TrainedTask
from hipa_deploy.train.recipes.alignment_settings import AlignmentSettings, is_code
from hipa_deploy.train.recipes.distribution_settings import (
    LatentDiscriminatorSettings,
    ScoreSettings,
)
from hipa_deploy.train.recipes.held_out_settings import HeldOutSettings
from hipa_deploy.train.recipes.loss_settings import DecoderLossSettings, LossSettings
from hipa_deploy.train.recipes.recipe_table import Settings

if TYPE_CHECKING:
    from hipa_deploy.models.model_config import ModelConfig

SHIPPED = Path(__file__).parent  # the folder of the recipes that the package contains
MODEL_PREFIX = "model:"  # of a prompt file that lies in the model's folder
INCLUDED_PREFIX = "included:"  # of a prompt file that the package contains, beside the recipes
HELD_OUT_ROWS = 8  # images that go through the networks at once, beside a training's own memory
MixedPrecision = Literal["no", "bf16", "fp16"]
CROPPED = ("generate", "edit")  # the tasks whose targets are the teacher's latents
PROMPTED = ("generate", "edit")  # the tasks whose prompt says what the whole image shows


class AdaptorSettings(Settings):
    """The low-rank adaptor."""

    preset: Literal["paper", "full"] = "paper"
    """Layers with an adaptor. paper: the four attention projections; full: also feed-forward
    layers, projections in and out, and convolutions."""
    rank: int = Field(16, ge=1, le=1024)
    """Rank of every pair of matrices. A merged adaptor costs nothing at inference, whatever its
    rank."""
    alpha: float | None = Field(None, gt=0, le=1_000_000)
    """The scale of the adaptor is alpha / rank. The default is the rank, so that the scale is 1,
    which every loader understands."""
    encoder_rank: int = Field(0, ge=0, le=1024)
    """Of super-resolution: rank of a second adaptor, on the VAE's encoder; 0 is none."""
    dtype: Literal["float16", "float32"] = "float32"
    """Storage type of the adapter weights in the folder that is written. They are trained in
    float32, which checkpoints keep."""


class TeacherSettings(Settings):
    """The deterministic multi-step sampler whose images the one-step model learns."""

    sampler: Literal["ddim", "dpmsolver++"] = "ddim"
    """Sampler of the probability-flow ODE."""
    steps: int = Field(25, ge=2, le=1000)
    """UNet steps of a teacher image."""
    guidance: float = Field(5.0, ge=1.0, le=30.0)
    """Classifier-free guidance; 1 turns it off (and halves the cost)."""
    pairs: int = Field(ge=1, le=10_000_000)
    """How many pairs (prompt, noise, teacher latents) to make."""
    batch: int = Field(64, ge=1, le=4096)
    """Pairs made at once; also the size of a cache shard."""
    dtype: Literal["float16", "float32"] = "float16"
    """Storage type of the cached latents."""
    mixed_precision: MixedPrecision = "no"
    """Precision of the UNet's arithmetic; the sampler's stays in float32. A CPU as above."""


class SourceSettings(Settings):
    """The images that editing, inpainting and super-resolution start from, and pictures that text
    to image learns from beside the teacher's images."""

    images: str | None = None
    """Folder of images, relative to the recipe, with captions in metadata.jsonl or metadata.csv
    (file_name, text), or in a text beside each image. The default is the teacher's own images of
    the prompts. Of text to image: pictures whose edits by the teacher are learned beside
    teacher.pairs images; the default is none."""
    captions: bool = True
    """Whether the images of the folder have captions. false: all train with the empty prompt."""
    prompts: str | None = None
    """Of editing: file of the prompts of the teacher's source images. The default is the prompts
    that the edits follow."""
    per_image: int = Field(1, ge=1, le=1000)
    """Examples made of each image; each has its own noise, mask, strength or blur."""
    without_prompt: float = Field(0.1, ge=0, le=1)
    """Share of the examples of inpainting and super-resolution that have no prompt."""
    strengths: tuple[Annotated[float, Field(gt=0, le=1)], ...] = (0.8, 0.6, 0.4)
    """Of editing: how far an edit may go from its source, in (0, 1]. Each strength must be a whole
    number of the teacher's steps. Of text to image: how far the teacher goes from a picture."""
    same: str | None = None
    """Of editing: regular expression with one group. Prompts in which the group matches the same
    text are edits of one another. By default any two prompts are."""
    coverage: tuple[float, float] = (0.1, 0.5)
    """Of inpainting: least and largest share of the image that a mask covers."""
    factor: int = Field(4, ge=2, le=8)
    """Of super-resolution: how many times the image is enlarged."""

    @field_validator("strengths")
    @classmethod
    def _descending(cls, strengths: tuple[float, ...]) -> tuple[float, ...]:
        # The first strength is the largest: the adaptor's own timestep is that one's.
        if not strengths or len(set(strengths)) < len(strengths):
            raise ValueError("expected at least one strength, each once")
        return tuple(sorted(strengths, reverse=True))

    @field_validator("same")
    @classmethod
    def _has_group(cls, same: str | None) -> str | None:
        if same is None:
            return None
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


class DecoderSettings(Settings):
    """The AutoencoderTiny (TAESD, github.com/madebyollin/taesd) to train, with TAESD's defaults."""

    channels: int = Field(64, ge=4, le=512)
    """Channels of every layer; AutoencoderTiny has the same number at all levels."""
    blocks: tuple[Annotated[int, Field(ge=0, le=16)], ...] = Field(
        (3, 3, 3, 1), min_length=2, max_length=6
    )
    """Residual blocks at each level, from the size of the latents to that of the image; four levels
    enlarge eight times."""


class LatentSettings(Settings):
    """The one-step latents to learn from; the targets are the full decoder's images of them."""

    count: int = Field(4096, ge=1, le=10_000_000)
    """How many latents to make."""
    perturbed: float = Field(0.25, ge=0, le=1)
    """Share of the latents to which Gaussian noise is added, because the latents of other tasks
    differ from those of text to image."""
    noise: float = Field(0.1, ge=0, le=1)
    """Standard deviation of the added noise, in units of scaled latents."""
    held_out: int = Field(256, ge=1, le=100_000)
    """How many further latents, with other prompts and seeds, to measure the fidelity on."""


class OptimiserSettings(Settings):
    """The AdamW optimiser and its learning-rate schedule."""

    learning_rate: float = Field(1e-4, gt=0, le=1)
    """Peak learning rate."""
    warmup_steps: int = Field(0, ge=0, le=10_000_000)
    """Steps of the linear warm-up of the learning rate."""
    decay: Literal["constant", "cosine"] = "constant"
    """Learning rate after the warm-up; cosine falls, and nears a hundredth of the peak in the last
    steps."""
    weight_decay: float = Field(1e-2, ge=0, le=1000)
    """Decoupled weight decay."""
    clip_norm: float = Field(1.0, gt=0)
    """Largest norm of the gradient; a longer one is scaled down."""


class _TrainingSettings(Settings):
    """The keys that every kind of recipe has."""

    prompts: str
    """UTF-8 text file with one prompt a line, or a table of captions (.csv, .tsv, .parquet, or a
    folder of the datasets package). The path is relative to the recipe; of a shipped recipe, to the
    current folder; and if it begins with 'model:', to the model's folder."""
    prompts_column: str | None = None
    """Column of the table; by default 'caption' or 'text'."""
    steps: int = Field(ge=1, le=10_000_000)
    """Optimiser steps, including the latent warm-up."""
    batch: int = Field(16, ge=1, le=4096)
    """Pairs, or latents, of one step over all processes."""
    micro_batch: int | None = Field(None, ge=1, le=4096)
    """Rows that a process takes through the models at once; the gradients of a step accumulate. By
    default all of its rows."""
    mixed_precision: MixedPrecision = "no"
    """Precision of the networks' arithmetic in training; weights, x0 and losses stay in float32. A
    CPU without instructions for it computes in float32, and the training says so."""
    ema_decay: float = Field(0.0, ge=0, lt=1)
    """Decay of an exponential moving average of the weights; 0 keeps none."""
    written: Literal["average", "last"] = "average"
    """Which weights are written in the end, where ema_decay keeps an average; a checkpoint has
    both."""
    timestep: int = Field(999, ge=0, le=100_000)
    """Timestep at which the frozen model is asked; the input is pure noise at each. 999 has the
    most noise. Models that predict eps gain at an earlier one, such as 600. Latents made with an
    adaptor use the adaptor's."""
    seed: int = Field(0, ge=0, lt=2**30)
    """Seed of the pairs or latents, of the initial weights and of the order of batches."""
    checkpoint_every: int = Field(200, ge=1, le=10_000_000)
    """Steps between checkpoints."""
    sample_every: int = Field(200, ge=1, le=10_000_000)
    """Steps between sample grids."""
    samples: int = Field(8, ge=1, le=64)
    """Rows of a sample grid."""
    optimiser: OptimiserSettings = OptimiserSettings()
    """The optimiser."""
    text: TextSettings = TextSettings()
    """How prompts are encoded."""
    held_out: HeldOutSettings = HeldOutSettings()
    """The held-out measure, and early stop."""

    @property
    def held_out_rows(self) -> int:
        """How many images the held-out measure takes through the networks at once."""
        return min(HELD_OUT_ROWS, self.micro_batch or HELD_OUT_ROWS, self.held_out.count)

    @property
    def measurements(self) -> int:
        """How often the held-out measure is taken: at the start, every so often, at the end."""
        if not self.held_out.prompts:
            return 0
        return 1 + math.ceil(self.steps / self.held_out.every)


class Recipe(_TrainingSettings):
    """The recipe of an adaptor.

    Example:
        >>> recipe = load_recipe("emoji", {"teacher.pairs": 256})
        >>> recipe.task, recipe.teacher.pairs
        ('generate', 256)

    """

    kind: Literal["adaptor"] = "adaptor"
    """What is trained."""
    task: TrainedTask = "generate"
    """The task that the step learns; see hipa_deploy.tasks."""
    source: SourceSettings = SourceSettings()
    """The images that tasks other than generate start from, or pictures to learn from."""
    resolution: int | None = Field(None, ge=8, le=8192)
    """Side in pixels of the square images that are trained on; by default the size that the model
    was made for. Bundles and reports of the adaptor have it too."""
    gradient_checkpointing: bool = False
    """Compute the activations of UNet and decoder again in the backward pass: less memory, more
    time."""
    vae_precision: MixedPrecision | None = None
    """Precision of the VAE's decoder in training; by default mixed_precision. SDXL's published VAE
    overflows fp16."""
    decode_crop: int | None = Field(None, ge=8, le=1024)
    """Of text to image and editing: side, in latents, of the square of each image that is decoded
    for the losses on images, student and teacher alike; chosen anew in each step. By default the
    whole image is decoded."""
    adaptor: AdaptorSettings = AdaptorSettings()
    """The low-rank adaptor."""
    teacher: TeacherSettings
    """The teacher and how many of its images to learn."""
    loss: LossSettings = LossSettings()
    """Loss weights."""
    score: ScoreSettings = ScoreSettings()
    """Score distillation."""
    latent_discriminator: LatentDiscriminatorSettings = LatentDiscriminatorSettings()
    """The discriminator on noised latents."""
    alignment: AlignmentSettings = AlignmentSettings()
    """How well images fit their prompts."""

    @property
    def held_out_rows(self) -> int:
        """As for a decoder. Where steps decode squares, whole images are decoded one by one."""
        return 1 if self.decode_crop is not None else super().held_out_rows

    @property
    def image_folder(self) -> Path | None:
        """The folder of images that are trained on, whatever the task; None without one."""
        return Path(self.source.images) if self.source.images else None

    @property
    def source_folder(self) -> Path | None:
        """That folder where a task starts from its images; text to image starts from noise."""
        return None if self.task == "generate" else self.image_folder

    @property
    def pictures_folder(self) -> Path | None:
        """That folder of text to image, which learns the teacher's edits of its pictures."""
        return self.image_folder if self.task == "generate" else None

    @property
    def makes_edits(self) -> bool:
        """Whether the teacher edits images, ``source.strengths`` far."""
        return self.task == "edit" or self.pictures_folder is not None

    @property
    def size(self) -> tuple[int, int] | None:
        """Height and width of the images in pixels; None is what the model was made for."""
        return None if self.resolution is None else (self.resolution, self.resolution)

    @property
    def compares_distributions(self) -> bool:
        """Whether a term beside the loss compares distributions."""
        return bool(self.score.weight or self.latent_discriminator.weight)

    @property
    def needs_targets(self) -> bool:
        """Whether any term looks at the teacher's images; score distillation alone does not."""
        loss = self.loss
        if loss.latent_weight or loss.latent_hf_weight or loss.latent_warmup_steps:
            return True
        return loss.has_image_terms or bool(self.latent_discriminator.weight)

    @model_validator(mode="after")
    def _pictures_are_learned(self) -> Recipe:
        if self.pictures_folder is None:
            return self
        if not self.source.captions:
            raise ValueError(
                "source.captions = false leaves text to image nothing to learn from source.images: "
                "leave out one of them"
            )
        if not self.needs_targets:
            raise ValueError(
                "source.images of text to image needs a loss that compares with the teacher's "
                "images, and every such weight is 0"
            )
        return self

    @model_validator(mode="after")
    def _encoder_adaptor_is_for_upscaling(self) -> Recipe:
        if self.adaptor.encoder_rank and self.task != "upscale":
            raise ValueError(f"adaptor.encoder_rank is for the task upscale, this is {self.task}")
        return self

    @model_validator(mode="after")
    def _guidance_alone_needs_guidance(self) -> Recipe:
        score = self.score
        if score.learns or not score.weight:
            return self
        guidance = self.teacher.guidance if score.guidance is None else score.guidance
        if guidance == 1:
            raise ValueError(
                "score.steps = 0 leaves guidance alone, and the guidance is 1: expected "
                "score.guidance above 1, or steps of at least 1"
            )
        if score.guidance_below <= score.timesteps[0]:
            raise ValueError(
                f"score.steps = 0 leaves guidance alone, which score.guidance_below = "
                f"{score.guidance_below} switches off: expected more than score.timesteps' first, "
                f"{score.timesteps[0]}"
            )
        return self

    @model_validator(mode="after")
    def _aligned_images_are_whole(self) -> Recipe:
        if not self.alignment.weight:
            return self
        if self.task not in PROMPTED:
            raise ValueError(
                f"alignment is for the tasks {' and '.join(PROMPTED)}, this is {self.task}"
            )
        if self.decode_crop is not None:
            raise ValueError("alignment needs whole images: leave decode_crop out")
        return self

    @model_validator(mode="after")
    def _crops_are_of_the_teachers_images(self) -> Recipe:
        # The other tasks compare with images that the decoder did not make.
        if self.decode_crop is not None and self.task not in CROPPED:
            raise ValueError(
                f"decode_crop is for the tasks {' and '.join(CROPPED)}, this is {self.task}"
            )
        return self

    @model_validator(mode="after")
    def _strengths_are_steps(self) -> Recipe:
        """Each strength must lead to a timestep of the teacher's sampler, where an edit starts."""
        if not self.makes_edits:
            return self

        # A strength is a share of the schedule of 1000 timesteps, and of the sampler's steps.
        for strength in self.source.strengths:
            steps = strength * self.teacher.steps
            timesteps = strength * 1000
            if not _is_whole(steps) or not _is_whole(timesteps):
                raise ValueError(
                    f"strength {strength:g} is no whole number of teacher.steps = "
                    f"{self.teacher.steps} equal steps, at a whole timestep"
                )
        return self


def _is_whole(number: float) -> bool:
    """Whether a number is whole, but for the rounding of decimal fractions."""
    return abs(number - round(number)) <= 1e-6


class DecoderRecipe(_TrainingSettings):
    """The recipe of a tiny decoder."""

    kind: Literal["decoder"]
    """What is trained."""
    decoder: DecoderSettings = DecoderSettings()
    """The tiny decoder."""
    latents: LatentSettings = LatentSettings()
    """The latents that it learns to decode."""
    loss: DecoderLossSettings = DecoderLossSettings()
    """Loss weights."""


KINDS: dict[str, type[Recipe | DecoderRecipe]] = {"adaptor": Recipe, "decoder": DecoderRecipe}


def load_recipe(source: str | Path, overrides: Mapping[str, Any] | None = None) -> Recipe:
    """Read the recipe of an adaptor.

    Args:
        source: As for ``load_any_recipe``.
        overrides: As for ``load_any_recipe``.

    Raises:
        HipaError: As ``load_any_recipe``, or a recipe of another kind.

    """
    recipe = load_any_recipe(source, overrides)
    if not isinstance(recipe, Recipe):
        raise HipaError(
            f"recipe {recipe_path(source)} is of kind {recipe.kind}. Expected one of kind adaptor."
        )
    return recipe


def load_any_recipe(
    source: str | Path, overrides: Mapping[str, Any] | None = None
) -> Recipe | DecoderRecipe:
    """Read a recipe of any kind; its key ``kind`` says what it trains, an adaptor by default.

    Args:
        source: A TOML file, or the name of a shipped recipe such as 'emoji'.
        overrides: Values to replace, with a dot for each table: {'teacher.pairs': 256}. Held-out
            prompts of the model's folder go with the recipe's own prompts: where ``prompts`` is
            replaced and ``held_out.prompts`` is not, nothing is held out.

    Returns:
        The validated recipe, with the paths of its files made absolute.

    Raises:
        HipaError: There is no such recipe, it is not TOML, or a key or value is wrong; the message
            names the key.

    """
    # The file's values first, then the overrides: these must win.
    path = recipe_path(source)
    try:
        values = read_toml(path)
    except HipaError as error:
        raise HipaError(f"recipe {error}") from None
    overrides = overrides or {}
    _drop_held_out(values, overrides)
    _override(values, overrides)

    # A shipped recipe cannot know where the user's files lie: its paths are relative to the current
    # folder.
    base = Path.cwd() if path.parent == SHIPPED else path.parent.absolute()
    _make_absolute(values, "prompts", base)
    _make_absolute(values.get("source"), "prompts", base)
    _make_absolute(values.get("source"), "images", base)
    _make_absolute(values.get("latent_discriminator"), "real_images", base)
    _make_absolute(values.get("held_out"), "prompts", base)
    _make_absolute(values.get("alignment"), "scorer", base)

    # The recipe of an adaptor need not name its kind.
    kind = values.get("kind", "adaptor")
    if not isinstance(kind, str) or kind not in KINDS:
        known = ", ".join(KINDS)
        raise HipaError(f"recipe {path}: kind = {brief(kind)}: expected one of: {known}.")
    try:
        return KINDS[kind].model_validate(values)
    except ValidationError as error:
        raise HipaError(f"recipe {path}: {_first_problem(error)}") from None


def _override(values: dict[str, Any], overrides: Mapping[str, Any]) -> None:
    """Set dotted keys in nested tables, which are made where they are missing."""
    for key, value in overrides.items():
        *parents, last = key.split(".")
        table = values
        for parent in parents:
            table = table.setdefault(parent, {})
            if not isinstance(table, dict):
                raise HipaError(f"recipe override {key!r} cannot be set: {parent!r} is not a table")
        table[last] = value


def _drop_held_out(values: dict[str, Any], overrides: Mapping[str, Any]) -> None:
    """Leave out the model's held-out prompts where others than the recipe's prompts are given.

    They were chosen for the recipe's prompts, and the model that the others are for may lack them.
    """
    table = values.get("held_out")
    if "prompts" not in overrides or not isinstance(table, dict):
        return
    if str(table.get("prompts")).startswith(MODEL_PREFIX):
        del table["prompts"]


def _make_absolute(table: Any, key: str, base: Path) -> None:
    """Make a path of a table absolute, if it is there; its type is validated later."""
    if not isinstance(table, dict):
        return
    name = table.get(key)
    if not isinstance(name, str) or (key == "scorer" and is_code(name)):
        return
    if not name.startswith((MODEL_PREFIX, INCLUDED_PREFIX)):
        table[key] = str(base / name)


def recipe_path(source: str | Path) -> Path:
    """The path of a recipe.

    Args:
        source: A TOML file, or the name of a shipped recipe.

    Raises:
        HipaError: There is neither; the message lists the shipped recipes.

    """
    # A shipped name wins over a file without suffix, so that a folder's content cannot change what
    # a command means.
    path = Path(source)
    shipped = SHIPPED / f"{source}.toml"
    if path.suffix != ".toml" and shipped.is_file():
        return shipped
    if path.is_file():
        return path
    names = ", ".join(sorted(recipe.stem for recipe in SHIPPED.glob("*.toml")))
    raise HipaError(
        f"recipe {str(source)!r} does not exist. Expected a .toml file or one of: {names}."
    )


def read_prompts(recipe: Recipe | DecoderRecipe, model_folder: Path) -> list[str]:
    """The distinct prompts of a recipe.

    Args:
        recipe: Names the prompt files.
        model_folder: Where files lie whose name begins with 'model:'.

    Returns:
        The prompts of an edit's source images, if they have a file of their own, then the other
        prompts, both in the order of their files.

    Raises:
        HipaError: As ``read_prompt_file``.

    """
    # The teacher's source images are made of the first prompts, by their indices: they come first.
    path = _prompts_path(recipe.prompts, model_folder)
    remedy = "Set prompts_column in the recipe."
    prompts = read_prompt_file(path, recipe.prompts_column, remedy)
    return list(dict.fromkeys([*source_prompts(recipe, model_folder), *prompts]))


def held_out_prompts(
    recipe: Recipe | DecoderRecipe, model_folder: Path, trained: list[str]
) -> list[str]:
    """The recipe's held-out prompts, without those that are trained on; none if it has no file.

    Args:
        recipe: Names the file.
        model_folder: Where files lie whose name begins with 'model:'.
        trained: The prompts of the training, as ``read_prompts`` returns them.

    Raises:
        HipaError: As ``read_prompt_file``, or fewer than two prompts are left.

    """
    if not recipe.held_out.prompts:
        return []
    path = _prompts_path(recipe.held_out.prompts, model_folder)
    prompts = read_prompt_file(path, None, "Give a text file with one prompt a line.")
    known = set(trained)
    kept = [prompt for prompt in dict.fromkeys(prompts) if prompt not in known]
    if len(kept) < 2:
        raise HipaError(
            f"held-out prompts {path}: {len(kept)} of {len(set(prompts))} are not trained on as "
            "well. Expected at least 2: give others, or leave held_out.prompts out."
        )
    return kept


def check_factor(recipe: Recipe, size: tuple[int, int]) -> None:
    """Check that super-resolution's small images have whole numbers of pixels.

    Args:
        recipe: Of any task; the others have no small images.
        size: Height and width of the training's images in pixels.

    Raises:
        HipaError: ``source.factor`` does not divide them.

    """
    factor = recipe.source.factor
    height, width = size
    if recipe.task != "upscale" or not (height % factor or width % factor):
        return
    raise HipaError(
        f"source.factor = {factor} does not divide {height}x{width}. "
        "Choose one that divides the model's size."
    )


def check_crop(side: int | None, latent_shape_CHW: tuple[int, int, int]) -> None:
    """Raise HipaError for a square that is larger than the latents."""
    smallest = min(latent_shape_CHW[1:])
    if side is not None and side > smallest:
        raise HipaError(
            f"decode_crop = {side} is larger than the model's latents. "
            f"Expected at most {smallest}, or no decode_crop to decode whole images."
        )


def check_distribution_terms(recipe: Recipe, config: ModelConfig) -> None:
    """Raise HipaError if the recipe has terms that the model cannot have.

    Args:
        recipe: Of a training.
        config: Of its model.

    """
    length = len(config.alphas_cumprod)
    tables = {"score": recipe.score, "latent_discriminator": recipe.latent_discriminator}
    for name, settings in tables.items():
        if not settings.weight:
            continue
        if config.is_inpainting:
            raise HipaError(
                f"{config.folder} fills holes only, and makes no whole images to compare. "
                f"Set {name}.weight = 0."
            )
        if settings.timesteps[1] >= length:
            raise HipaError(
                f"recipe: {name}.timesteps = {list(settings.timesteps)}: expected timesteps below "
                f"{length}, which is all that the model has."
            )


def check_levels(settings: DecoderSettings, config: ModelConfig) -> None:
    """Raise HipaError unless a tiny decoder's levels enlarge as the model's VAE does."""
    # Every level but the last doubles height and width.
    levels = len(settings.blocks)
    enlargement = 2 ** (levels - 1)
    factor = config.vae_factor
    if enlargement != factor:
        raise HipaError(
            f"decoder.blocks has {levels} levels, which enlarge {enlargement} times. "
            f"Expected {factor.bit_length()} for the {factor} times of {config.folder}."
        )


def source_prompts(recipe: Recipe | DecoderRecipe, model_folder: Path) -> list[str]:
    """The prompts of an edit's source images, if they have a file of their own; else none.

    Args:
        recipe: Names the prompt file.
        model_folder: Where files lie whose name begins with 'model:'.

    Raises:
        HipaError: As ``read_prompt_file``.

    """
    if not isinstance(recipe, Recipe) or recipe.task != "edit" or not recipe.source.prompts:
        return []
    return read_prompt_file(_prompts_path(recipe.source.prompts, model_folder), None)


def _prompts_path(name: str, model_folder: Path) -> Path:
    if name.startswith(MODEL_PREFIX):
        return model_folder / name.removeprefix(MODEL_PREFIX)
    if name.startswith(INCLUDED_PREFIX):
        return SHIPPED / Path(name.removeprefix(INCLUDED_PREFIX)).name
    return Path(name)


def _first_problem(error: ValidationError) -> str:
    """The first of pydantic's problems in one line, and how many more there are."""
    # One problem is enough to act on; a list of them would not fit in one line.
    problem = error.errors()[0]
    key = ".".join(shown(str(part)) for part in problem["loc"])
    if problem["type"] == "extra_forbidden":
        text = f"unknown key {brief(key)}"
    elif problem["type"] == "missing":
        text = f"key {key!r} is missing"
    elif not key:
        # A rule that several settings break together names them itself.
        text = str(problem["msg"])[:200].removeprefix("Value error, ")
    else:
        # pydantic begins its messages with a capital letter; here they follow a colon.
        message = str(problem["msg"])[:200]
        text = f"{key} = {brief(problem['input'])}: {message[0].lower()}{message[1:]}"

    more = error.error_count() - 1
    return f"{text} (and {more} more)" if more else text

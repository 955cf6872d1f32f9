"""The training examples of each task: what one step starts from and where it should arrive.

An example is a function of its row and the recipe's seed alone, so that a resumed run sees what an
unbroken one would.

Shapes: N examples, B rows of a batch, C latent channels, H, W image size in pixels, h, w latent
size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from torch import Tensor

from hipa_deploy.errors import HipaError
from hipa_deploy.images.compositing import hide_hole, latent_mask
from hipa_deploy.images.png import enlarge
from hipa_deploy.tasks import strength_timestep
from hipa_deploy.train.data.edit_prompts import count_alone, related_prompts
from hipa_deploy.train.data.masks import random_mask
from hipa_deploy.train.data.source_images import (
    SourceImages,
    folder_source_images,
    teacher_source_images,
)
from hipa_deploy.train.data.teacher_pairs import (
    Edits,
    Pairs,
    RowConditions,
    RowFunction,
    cached_rows,
    joined,
    noise_seeds,
    prompt_conditions,
    prompt_order,
    rows_at_once,
    stream_noise,
    teacher_pairs,
)
from hipa_deploy.train.loop.processes import Processes
from hipa_deploy.train.model.diffusion_model import DiffusionModel, to_float
from hipa_deploy.train.model.mixed_precision import (
    computed_precision,
    decoder_precision,
    in_precision,
)
from hipa_deploy.train.recipes.recipe import (
    Recipe,
    SourceSettings,
    check_factor,
    source_prompts,
)

# The filters with which small images are usually made: the adaptor must not learn one of them only.
REDUCING_FILTERS = (
    Image.Resampling.BICUBIC,
    Image.Resampling.LANCZOS,
    Image.Resampling.BOX,
)

# Random streams of a recipe's seed. The first is for noise (``stream_noise``), the others are part
# of the seeds of numpy's generators: no two choices share their randomness.
NOISE_STREAM = 1
EDIT_CHOICE_STREAM = 2
WITHOUT_PROMPT_STREAM = 3
MASK_STREAM = 4
# Noise that is added to the teacher's own images, which stream 0 has made: with that very noise the
# teacher comes back to the source, and a user's image has none. Decoders have streams 1 to 4.
EDIT_NOISE_STREAM = 6


def _unchanged(image: Tensor, rows: Tensor) -> Tensor:
    return image


@dataclass(frozen=True)
class TaskExamples:
    """``count`` examples of a task, as functions of row indices int64 [B].

    Attributes:
        count: How many examples there are.
        step_inputs: Rows -> the tensors of the task's ``STEP_INPUTS``, by name: noise and source
            float32 [B, C, h, w], mask float32 [B, 1, h, w].
        conditions: Rows -> what the UNet is told of their prompts.
        timestep: Rows -> timestep of the step, int64 [B].
        latents: Rows -> target latents float32 [B, C, h, w].
        images: Rows -> target images float32 [B, 3, H, W] in [0, 1].
        composite: (decoded image [B, 3, H, W], rows) -> the finished image. Inpainting puts the
            repainted hole into its source; the other tasks change nothing.
        source: Rows -> image that the task starts from, uint8 [B, H, W, 3]; None for text to image.
        prompt_N: Index of each example's prompt, int64 [N].
        texts: The prompts by index.

    """

    count: int
    step_inputs: Callable[[Tensor], dict[str, Tensor]]
    conditions: RowConditions
    timestep: RowFunction
    latents: RowFunction
    images: RowFunction
    composite: Callable[[Tensor, Tensor], Tensor] = _unchanged
    source: RowFunction | None = None
    prompt_N: Tensor | None = None
    texts: tuple[str, ...] = ()

    def prompts(self, rows: Tensor) -> list[str]:
        """The prompt of each row, int64 [B]."""
        if self.prompt_N is None or not self.texts:
            return []
        return [self.texts[index] for index in self.prompt_N[rows].tolist()]


def task_examples(
    model: DiffusionModel,
    recipe: Recipe,
    prompts: list[str],
    *,
    cache: Path | None = None,
    console: Console | None = None,
    processes: Processes | None = None,
) -> TaskExamples:
    """The examples of a recipe, on the teacher's images of its prompts or on a folder of images.

    Args:
        model: The base model, without adaptor.
        recipe: The task, its source images, and the teacher.
        prompts: The recipe's prompts, as ``read_prompts`` returns them.
        cache: Folder of the teacher pairs' cache; None is the user's own.
        console: Where progress bars go; stderr if None.
        processes: The processes that share the making of teacher pairs.

    Raises:
        HipaError: The images or their captions cannot be read, ``source.factor`` does not divide
            the model's resolution, or the errors of ``teacher_pairs``.

    Example:
        >>> examples = task_examples(model, recipe, read_prompts(recipe, model.folder))
        >>> rows = torch.arange(4)
        >>> examples.images(rows).shape  # a model of 64x64 pixels
        torch.Size([4, 3, 64, 64])

    """
    examples, texts = _examples_and_texts(model, recipe, prompts, cache, console, processes)
    return replace(examples, texts=tuple(texts))


def _examples_and_texts(
    model: DiffusionModel,
    recipe: Recipe,
    prompts: list[str],
    cache: Path | None,
    console: Console | None,
    processes: Processes | None,
) -> tuple[TaskExamples, list[str]]:
    """The examples, and the prompts by the indices that they use."""
    # Before the teacher's images, which take hours.
    check_factor(recipe, model.resolution)
    task = recipe.task
    folder = recipe.source_folder

    # A folder's captions become prompts. Edits follow the recipe's prompts as well, and text to
    # image learns both.
    asked = prompts
    pictures = None
    if recipe.pictures_folder:
        pictures, prompts = folder_source_images(
            model, recipe.pictures_folder, prompts, console, captions=recipe.source.captions
        )
    if folder:
        own_prompts = prompts if task == "edit" else []
        source_images, prompts = folder_source_images(
            model, folder, own_prompts, console, captions=recipe.source.captions
        )

    # The empty prompt comes last: a share of the inpainting and super-resolution examples has it.
    texts = prompts if task == "generate" else [*prompts, ""]
    used_N = None
    if task == "generate":
        used_N = prompt_order(len(asked), recipe.teacher.pairs, recipe.seed)
        if pictures is not None:
            used_N = torch.cat([used_N, pictures.prompt_N])
    conditions = prompt_conditions(model, texts, console, used_N)

    # A recipe without targets needs the teacher's images for the sample grid alone.
    teacher = recipe.teacher
    if task == "generate" and not recipe.needs_targets:
        of_grid = min(teacher.pairs, recipe.samples)
        teacher = teacher.model_copy(update={"pairs": of_grid})

    def make_pairs(pair_prompts: list[str], edits: Edits | None = None) -> Pairs:
        return teacher_pairs(
            model,
            pair_prompts,
            teacher,
            seed=recipe.seed,
            conditions=conditions,
            cache=cache,
            console=console,
            processes=processes,
            edits=edits,
        )

    # Without a folder the teacher makes the images: of an edit, those that it will edit.
    precision = decoder_precision(recipe, model.config)
    decode = in_precision(model.decode, precision, model.device)
    if not folder:
        if model.concatenates:
            raise HipaError(
                f"{model.folder} fills holes only and makes no images to learn from. "
                "Set source.images."
            )
        shown = source_prompts(recipe, model.folder)
        pairs = make_pairs(shown or asked)
        if pictures is not None:
            edits = picture_edits(model, pictures, recipe, console)
            pairs = joined(pairs, make_pairs(prompts, edits))
        source_images = teacher_source_images(
            model,
            pairs,
            len(prompts),
            decode,
            console,
            kept=keeps_images(recipe),
            shown=shown,
            precision=computed_precision(precision, model.device),
        )

    if task == "generate":
        if not recipe.needs_targets:
            pairs = _starts_of_all(pairs, recipe, len(prompts))
        return generate_examples(model, pairs, source_images, conditions, recipe.timestep), texts
    if task == "edit":
        edits = choose_edits(model, source_images, prompts, recipe, console)
        edit_pairs = make_pairs(prompts, edits)
        edited = teacher_source_images(
            model, edit_pairs, len(prompts), decode, console, kept=keeps_images(recipe)
        )
        return edit_examples(model, edits, edit_pairs, edited, conditions), texts
    if task == "inpaint":
        return inpaint_examples(model, source_images, recipe, conditions, console), texts
    return upscale_examples(model, source_images, recipe, conditions, console), texts


def keeps_images(recipe: Recipe) -> bool:
    """Whether the teacher's whole images are needed in each step, where there is memory for them.

    Where squares are decoded they are needed for the sample grid alone, or to edit.
    """
    return recipe.decode_crop is None


def _starts_of_all(first: Pairs, recipe: Recipe, prompts: int) -> Pairs:
    """Prompts and noise of all the recipe's pairs, and the latents of the first of them alone."""
    count = recipe.teacher.pairs
    return Pairs(
        latents_NCHW=first.latents_NCHW,
        prompt_N=prompt_order(prompts, count, recipe.seed),
        seed_N=noise_seeds(torch.arange(count), recipe.seed),
    )


def generate_examples(
    model: DiffusionModel,
    pairs: Pairs,
    teacher_images: SourceImages,
    conditions: RowConditions,
    timestep: int,
) -> TaskExamples:
    """Text to image: from noise to the image that the teacher makes of the same noise."""

    def step_inputs(rows: Tensor) -> dict[str, Tensor]:
        return {"noise": model.noise(pairs.seed_N[rows].tolist())}

    return TaskExamples(
        count=len(pairs),
        step_inputs=step_inputs,
        conditions=lambda rows: conditions(pairs.prompt_N[rows]),
        timestep=_constant_timestep(model, timestep),
        latents=teacher_images.latents,
        images=lambda rows: to_float(teacher_images.images(rows)).to(model.device),
        prompt_N=pairs.prompt_N,
    )


def edit_examples(
    model: DiffusionModel,
    edits: Edits,
    pairs: Pairs,
    edited: SourceImages,
    conditions: RowConditions,
) -> TaskExamples:
    """Editing: from a noised source image to what the teacher makes of the same start.

    Args:
        model: The base model.
        edits: Sources, prompts and timesteps (one for each strength).
        pairs: The teacher's edits; their noise is added to the sources.
        edited: The images of ``pairs``.
        conditions: By prompt index.

    """

    def step_inputs(rows: Tensor) -> dict[str, Tensor]:
        noise_BCHW = model.noise(pairs.seed_N[rows].tolist())
        return {"noise": noise_BCHW, "source": edits.source(rows)}

    return TaskExamples(
        count=len(pairs),
        step_inputs=step_inputs,
        conditions=lambda rows: conditions(pairs.prompt_N[rows]),
        timestep=lambda rows: edits.timestep_N[rows].to(model.device),
        latents=edited.latents,
        images=lambda rows: to_float(edited.images(rows)).to(model.device),
        source=edits.images,
        prompt_N=pairs.prompt_N,
    )


def choose_edits(
    model: DiffusionModel,
    source_images: SourceImages,
    prompts: list[str],
    recipe: Recipe,
    console: Console | None,
) -> Edits:
    """Choose a prompt and a strength for each source image, ``source.per_image`` times.

    The prompt is another one to which ``source.same`` allows an edit, or the image's own prompt if
    there is none. The strengths take turns.
    """
    settings = recipe.source
    related = related_prompts(prompts, settings.same)
    alone = count_alone(prompts, related) if settings.same else 0
    if alone:
        screen = console or Console(stderr=True)
        screen.print(
            f"source.same relates {alone} of {len(prompts)} prompts to no other: what starts from "
            "their images follows the same prompt again.",
            highlight=False,
            markup=False,
            soft_wrap=True,
        )
    image_N = _edited_images(source_images, settings)

    # Each row has a generator of its own, so that a longer run keeps the choices of a shorter one.
    prompt_N = []
    for row, own in enumerate(source_images.prompt_N[image_N].tolist()):
        rng = np.random.default_rng((recipe.seed, EDIT_CHOICE_STREAM, row))
        prompt_N.append(_another(rng, related(own), own))

    # Of the settings only those that are read here belong in the cache key.
    used_settings = {"strengths", "same", "per_image"}
    key = {**source_images.key, **settings.model_dump(mode="json", include=used_settings)}
    edits = _edits(model, source_images, image_N, torch.tensor(prompt_N), settings, key, console)
    if recipe.source_folder:  # no noise has made its images
        return edits
    key = {**key, "noise_stream": EDIT_NOISE_STREAM}
    return replace(edits, stream=EDIT_NOISE_STREAM, key=key)


def picture_edits(
    model: DiffusionModel, pictures: SourceImages, recipe: Recipe, console: Console | None
) -> Edits:
    """The edits of pictures that text to image learns from, each with its own caption.

    Noised pictures are where the teacher starts; the student starts from the noise alone. So the
    student learns to draw, of that noise and caption, what the teacher makes with the picture's
    help. Ours, from SDEdit (Meng et al. 2022).
    """
    settings = recipe.source
    image_N = _edited_images(pictures, settings)
    key = {
        **pictures.key,
        **settings.model_dump(mode="json", include={"strengths", "per_image"}),
        "prompts": "own",
    }
    prompt_N = pictures.prompt_N[image_N]
    return _edits(model, pictures, image_N, prompt_N, settings, key, console)


def _edited_images(source_images: SourceImages, settings: SourceSettings) -> Tensor:
    """Which image each edit starts from, int64 [N]: each ``source.per_image`` times."""
    return torch.arange(len(source_images) * settings.per_image) // settings.per_image


def _edits(
    model: DiffusionModel,
    source_images: SourceImages,
    image_N: Tensor,
    prompt_N: Tensor,
    settings: SourceSettings,
    key: dict[str, Any],
    console: Console | None,
) -> Edits:
    """Edits of ``image_N`` that follow ``prompt_N``; the strengths take turns."""
    timesteps = torch.tensor([strength_timestep(strength) for strength in settings.strengths])

    def images(rows: Tensor) -> Tensor:
        return source_images.images(image_N[rows])

    return Edits(
        images=images,
        source=_encoded(model, images, len(image_N), console),
        prompt_N=prompt_N,
        timestep_N=timesteps[torch.arange(len(image_N)) % len(timesteps)],
        key=key,
    )


def _another(rng: np.random.Generator, group: list[int], own: int) -> int:
    """One of the indices in ``group``, which ascend, but ``own``; ``own`` where it is the only one.

    It is what ``rng.choice`` takes of a list of the others. To make that list for each of 50,000
    edits among as many prompts would take minutes.
    """
    if len(group) == 1:
        return own
    number = int(rng.integers(len(group) - 1))
    return group[number] if group[number] < own else group[number + 1]


def inpaint_examples(
    model: DiffusionModel,
    source_images: SourceImages,
    recipe: Recipe,
    conditions: RowConditions,
    console: Console | None,
) -> TaskExamples:
    """Inpainting: from noise in the hole and clean latents around it to the image that was there.

    Args:
        model: The base model.
        source_images: The complete images, which are the targets.
        recipe: Seed, timestep, ``source.per_image``, ``source.coverage`` and
            ``source.without_prompt``.
        conditions: By prompt index; the empty prompt is the last.
        console: Where the progress bar goes.

    """
    count, image_of = _repeated(source_images, recipe.source)
    prompt_N = _prompts_used(source_images, image_of, recipe)
    cell_size = model.pipe.vae_scale_factor

    # Masks are drawn again in each step rather than kept: they are cheap, and there may be many.
    def draw_mask(row: int) -> np.ndarray:
        rng = np.random.default_rng((recipe.seed, MASK_STREAM, row))
        return random_mask(rng, *model.resolution, recipe.source.coverage)

    def draw_masks(rows: Tensor) -> list[np.ndarray]:
        return [draw_mask(row) for row in rows.tolist()]

    # The VAE carries what lies in the hole into the latents around it, so the hole is hidden before
    # the image is encoded.
    def hidden(rows: Tensor) -> Tensor:
        images = source_images.images(image_of(rows)).numpy()
        pairs = zip(images, draw_masks(rows), strict=True)
        return torch.from_numpy(np.stack([hide_hole(image, mask) for image, mask in pairs]))

    source = _encoded(model, hidden, count, console)

    def step_inputs(rows: Tensor) -> dict[str, Tensor]:
        cells = [latent_mask(mask, cell_size) for mask in draw_masks(rows)]
        return {
            "noise": stream_noise(model, rows, recipe.seed, NOISE_STREAM),
            "source": source(rows),
            "mask": torch.from_numpy(np.stack(cells)).to(model.device),
        }

    def images(rows: Tensor) -> Tensor:
        return to_float(source_images.images(image_of(rows))).to(model.device)

    # The loss sees what a user will see: the decoded hole inside the original image.
    def composite(image_BCHW: Tensor, rows: Tensor) -> Tensor:
        mask_BHW = torch.from_numpy(np.stack(draw_masks(rows)))
        mask_B1HW = mask_BHW[:, None].to(model.device)
        return mask_B1HW * image_BCHW + (1 - mask_B1HW) * images(rows)

    return TaskExamples(
        count=count,
        step_inputs=step_inputs,
        conditions=lambda rows: conditions(prompt_N[rows]),
        prompt_N=prompt_N,
        timestep=_constant_timestep(model, recipe.timestep),
        latents=lambda rows: source_images.latents(image_of(rows)),
        images=images,
        composite=composite,
        source=hidden,
    )


def upscale_examples(
    model: DiffusionModel,
    source_images: SourceImages,
    recipe: Recipe,
    conditions: RowConditions,
    console: Console | None,
) -> TaskExamples:
    """Super-resolution: from the latents of a reduced and enlarged image to the original image.

    Args:
        model: The base model.
        source_images: The images in full resolution, which are the targets.
        recipe: Seed, timestep, ``source.per_image``, ``source.factor`` and
            ``source.without_prompt``.
        conditions: By prompt index; the empty prompt is the last.
        console: Where the progress bar goes.

    """
    count, image_of = _repeated(source_images, recipe.source)
    prompt_N = _prompts_used(source_images, image_of, recipe)
    factor = recipe.source.factor

    # The filters take turns, so that the examples of one image see several of them.
    def enlarged(rows: Tensor) -> Tensor:
        images = source_images.images(image_of(rows)).numpy()
        results = []
        for image, row in zip(images, rows.tolist(), strict=True):
            resampling = REDUCING_FILTERS[row % len(REDUCING_FILTERS)]
            results.append(enlarge(reduced(image, factor, resampling), factor))
        return torch.from_numpy(np.stack(results))

    # An encoder that learns must see each image again in each step. Its latents go into x0 and so
    # stay in float32.
    def encoded_in_each_step(rows: Tensor) -> Tensor:
        return model.encode(to_float(enlarged(rows)))

    if recipe.adaptor.encoder_rank:
        source: RowFunction = encoded_in_each_step
    else:
        source = _encoded(model, enlarged, count, console)

    return TaskExamples(
        count=count,
        step_inputs=lambda rows: {"source": source(rows)},
        conditions=lambda rows: conditions(prompt_N[rows]),
        prompt_N=prompt_N,
        timestep=_constant_timestep(model, recipe.timestep),
        latents=lambda rows: source_images.latents(image_of(rows)),
        images=lambda rows: to_float(source_images.images(image_of(rows))).to(model.device),
        source=enlarged,
    )


def reduced(
    image_HWC: np.ndarray, factor: int, resampling: Image.Resampling = Image.Resampling.BICUBIC
) -> np.ndarray:
    """Reduce an image ``factor`` times: what super-resolution will start from.

    Args:
        image_HWC: uint8 [H, W, 3].
        factor: How many times smaller each way; sizes are rounded down.
        resampling: Pillow's filter.

    Returns:
        uint8 [H // factor, W // factor, 3].

    """
    height, width = image_HWC.shape[:2]
    image = Image.fromarray(image_HWC)
    return np.asarray(image.resize((width // factor, height // factor), resampling))


def _constant_timestep(model: DiffusionModel, timestep: int) -> RowFunction:
    """Every example's step is at the recipe's timestep."""
    return lambda rows: torch.full((len(rows),), timestep, device=model.device)


def _repeated(source_images: SourceImages, settings: SourceSettings) -> tuple[int, RowFunction]:
    """How many examples all images make, and the function from examples to images."""
    count = len(source_images) * settings.per_image
    return count, lambda rows: rows // settings.per_image


def _prompts_used(source_images: SourceImages, image_of: RowFunction, recipe: Recipe) -> Tensor:
    """Index of each example's prompt: its image's, or the empty one's for a share of them.

    The examples without a prompt teach the step to work where the user types none.
    """
    examples = torch.arange(len(source_images) * recipe.source.per_image)
    prompt_N = source_images.prompt_N[image_of(examples)]
    draws = np.random.default_rng((recipe.seed, WITHOUT_PROMPT_STREAM)).random(len(prompt_N))
    without_prompt = torch.from_numpy(draws < recipe.source.without_prompt)
    empty_prompt = source_images.prompts  # its index: it follows all others
    return torch.where(without_prompt, empty_prompt, prompt_N)


def _encoded(
    model: DiffusionModel, images: RowFunction, count: int, console: Console | None
) -> RowFunction:
    """Scaled latents of uint8 images, as the exported VAE encoder will compute them."""

    def latents(rows: list[int]) -> Tensor:
        return model.encode(to_float(images(torch.tensor(rows))))

    at_once = rows_at_once(model.resolution)
    return cached_rows("source latents", latents, count, console, at_once)

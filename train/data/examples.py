"""What one step learns from, for each task: where it starts and where it should arrive.

An example is a function of its row and the recipe's seed alone, so that a resumed run sees what an unbroken one would.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from torch import Tensor

from hipa_deploy.errors import HipaError
from hipa_deploy.images.compositing import hide_hole, latent_mask
from hipa_deploy.images.png import enlarge
from hipa_deploy.tasks import strength_timestep
from hipa_deploy.train.data.masks import random_mask
from hipa_deploy.train.data.source_images import Originals, folder_originals, teacher_originals
from hipa_deploy.train.data.teacher_pairs import (
    Edits,
    Pairs,
    Rows,
    lookup,
    prompt_contexts,
    stream_noise,
    teacher_pairs,
)
from hipa_deploy.train.loop.processes import Processes
from hipa_deploy.train.model.diffusion_model import DiffusionModel, to_float
from hipa_deploy.train.model.mixed_precision import in_precision
from hipa_deploy.train.recipes.recipe import Recipe, SourceSettings, source_prompts

BLURS = (
    Image.Resampling.BICUBIC,
    Image.Resampling.LANCZOS,
    Image.Resampling.BOX,
)  # how small images come about
NOISE_STREAM, CHOICES, WITHOUT_PROMPT, MASKS = 1, 2, 3, 4


def _same(image: Tensor, rows: Tensor) -> Tensor:
    return image


@dataclass(frozen=True)
class Examples:
    """``count`` examples, by row: int64 [B] -> rows.

    ``given`` are the task's STEP_INPUTS, ``context`` the text's, [B, L, D], ``timestep`` where the step is, int64 [B];
    ``latents`` and ``images`` (float32 [B, 3, H, W] in [0, 1]) are the targets. ``whole(image, rows)`` is what becomes
    of a decoded image: inpainting puts it into its source. ``source`` is the image to start from, uint8 [B, H, W, 3].
    """

    count: int
    given: Callable[[Tensor], dict[str, Tensor]]
    context: Rows
    timestep: Rows
    latents: Rows
    images: Rows
    whole: Callable[[Tensor, Tensor], Tensor] = _same
    source: Rows | None = None


def task_examples(
    model: DiffusionModel,
    recipe: Recipe,
    prompts: list[str],
    *,
    cache: Path | None = None,
    console: Console | None = None,
    processes: Processes | None = None,
) -> Examples:
    """The examples of ``recipe``, on the teacher's images of ``prompts``, or on the images that it names.

    Raises:
        HipaError: images or their captions cannot be read, or what ``teacher_pairs`` raises.

    """
    task, folder = recipe.task, recipe.source.images
    if folder and task != "generate":
        originals, prompts = folder_originals(
            model, Path(folder), prompts if task == "edit" else [], console
        )
    texts = prompts if task == "generate" else [*prompts, ""]
    context = prompt_contexts(model, texts, console)
    make = partial(teacher_pairs, model, teacher=recipe.teacher, seed=recipe.seed, context=context, cache=cache,
                   console=console, processes=processes)  # fmt: skip
    decode = in_precision(model.decode, recipe.mixed_precision, model.device)
    if not folder or task == "generate":
        if model.concatenates:
            raise HipaError(
                f"{model.folder} fills holes only and makes no images to learn from. Set source.images."
            )
        pairs = make(first) if (first := source_prompts(recipe, model.folder)) else make(prompts)
        originals = teacher_originals(model, pairs, len(prompts), decode, console)
    if task == "generate":
        return generate_examples(model, pairs, originals, context, recipe.timestep)
    if task == "edit":
        edits = choose_edits(model, originals, prompts, recipe, console)
        edited = make(prompts, edits=edits)
        images = teacher_originals(model, edited, len(prompts), decode, console)
        return edit_examples(model, edits, edited, images, context)
    build = inpaint_examples if task == "inpaint" else upscale_examples
    return build(model, originals, recipe, context, console)


def generate_examples(
    model: DiffusionModel, pairs: Pairs, originals: Originals, context: Rows, timestep: int
) -> Examples:
    """Text to image: from noise to the image that the teacher makes of the same noise."""
    return Examples(
        count=len(pairs),
        given=lambda rows: {"noise": model.noise(pairs.seed_N[rows].tolist())},
        context=lambda rows: context(pairs.prompt_N[rows]),
        timestep=lambda rows: torch.full((len(rows),), timestep, device=model.device),
        latents=originals.latents,
        images=lambda rows: to_float(originals.images(rows)).to(model.device),
    )


def edit_examples(
    model: DiffusionModel, edits: Edits, pairs: Pairs, edited: Originals, context: Rows
) -> Examples:
    """Editing: from a source image, noised to its strength's timestep, to what the teacher makes of the same.

    ``pairs`` are the teacher's edits, and ``edited`` their images.
    """
    return Examples(
        count=len(pairs),
        given=lambda rows: {
            "noise": model.noise(pairs.seed_N[rows].tolist()),
            "source": edits.source(rows),
        },
        context=lambda rows: context(pairs.prompt_N[rows]),
        timestep=lambda rows: edits.timestep_N[rows].to(model.device),
        latents=edited.latents,
        images=lambda rows: to_float(edited.images(rows)).to(model.device),
        source=edits.images,
    )


def choose_edits(
    model: DiffusionModel,
    originals: Originals,
    prompts: list[str],
    recipe: Recipe,
    console: Console | None,
) -> Edits:
    """A prompt and a strength for each source: another prompt that ``source.same`` allows, or its own if none does."""
    settings, partners = recipe.source, related_prompts(prompts, recipe.source.same)
    image_N = torch.arange(len(originals) * settings.per_image) // settings.per_image
    timesteps = [strength_timestep(strength) for strength in settings.strengths]
    prompt_N, timestep_N = [], []
    for row, own in enumerate(originals.prompt_N[image_N].tolist()):
        rng = np.random.default_rng((recipe.seed, CHOICES, row))
        others = [index for index in partners(own) if index != own] or [own]
        prompt_N.append(int(rng.choice(others)))
        timestep_N.append(timesteps[row % len(timesteps)])
    keep = {"strengths", "same", "per_image"}

    def images(rows: Tensor) -> Tensor:
        return originals.images(image_N[rows])

    return Edits(
        images=images,
        source=_encoded(model, images, len(image_N), console),
        prompt_N=torch.tensor(prompt_N),
        timestep_N=torch.tensor(timestep_N),
        key={**originals.key, **settings.model_dump(mode="json", include=keep)},
    )


def related_prompts(prompts: list[str], same: str | None) -> Callable[[int], list[int]]:
    """From a prompt's index to those of the prompts that are edits of one another, itself included."""
    if same is None:
        return lambda index: list(range(len(prompts)))
    groups, group_of = defaultdict[str, list[int]](list), []
    for index, prompt in enumerate(prompts):
        match = re.search(same, prompt)
        group_of.append(match[1] if match else prompt)
        groups[group_of[-1]].append(index)
    return lambda index: groups[group_of[index]]


def edit_starts(prompts: list[str], training: list[str], same: str | None) -> list[str]:
    """For each prompt the first training prompt that it is an edit of, or itself if there is none."""
    related = related_prompts([*training, *prompts], same)
    firsts = [min(related(len(training) + n)) for n in range(len(prompts))]
    return [
        training[first] if first < len(training) else own
        for first, own in zip(firsts, prompts, strict=True)
    ]


def inpaint_examples(
    model: DiffusionModel,
    originals: Originals,
    recipe: Recipe,
    context: Rows,
    console: Console | None,
) -> Examples:
    """Inpainting: from noise in the hole and clean latents around it to the image that was there."""
    count, image_of = _several(originals, recipe.source)
    factor = model.pipe.vae_scale_factor

    def mask(row: int) -> np.ndarray:
        rng = np.random.default_rng((recipe.seed, MASKS, row))
        return random_mask(rng, *model.resolution, recipe.source.coverage)

    def masks(rows: Tensor) -> Tensor:
        return torch.from_numpy(np.stack([mask(row) for row in rows.tolist()]))[:, None].to(
            model.device
        )

    def hidden(rows: Tensor) -> Tensor:
        images = originals.images(image_of(rows)).numpy()
        pairs = zip(images, rows.tolist(), strict=True)
        return torch.from_numpy(np.stack([hide_hole(image, mask(row)) for image, row in pairs]))

    def images(rows: Tensor) -> Tensor:
        return to_float(originals.images(image_of(rows))).to(model.device)

    source = _encoded(model, hidden, count, console)

    def given(rows: Tensor) -> dict[str, Tensor]:
        cells = torch.from_numpy(
            np.stack([latent_mask(mask(row), factor) for row in rows.tolist()])
        ).to(model.device)
        return {
            "noise": stream_noise(model, rows, recipe.seed, NOISE_STREAM),
            "source": source(rows),
            "mask": cells,
        }

    def whole(image: Tensor, rows: Tensor) -> Tensor:
        mask_B1HW = masks(rows)
        return mask_B1HW * image + (1 - mask_B1HW) * images(rows)

    return Examples(
        count=count,
        given=given,
        context=_context(originals, image_of, recipe, context),
        timestep=lambda rows: torch.full((len(rows),), recipe.timestep, device=model.device),
        latents=lambda rows: originals.latents(image_of(rows)),
        images=images,
        whole=whole,
        source=hidden,
    )


def upscale_examples(
    model: DiffusionModel,
    originals: Originals,
    recipe: Recipe,
    context: Rows,
    console: Console | None,
) -> Examples:
    """Super-resolution: from the latents of the small image, enlarged, to the image that it was reduced from."""
    (count, image_of), factor = _several(originals, recipe.source), recipe.source.factor
    if any(side % factor for side in model.resolution):
        size = "x".join(map(str, model.resolution))
        raise HipaError(
            f"source.factor = {factor} does not divide {size}. Choose one that divides the model's size."
        )

    def enlarged(rows: Tensor) -> Tensor:
        images = originals.images(image_of(rows)).numpy()
        blurs = [BLURS[row % len(BLURS)] for row in rows.tolist()]
        small = [reduced(image, factor, blur) for image, blur in zip(images, blurs, strict=True)]
        return torch.from_numpy(np.stack([enlarge(image, factor) for image in small]))

    def learning(rows: Tensor) -> Tensor:
        return model.encode(to_float(enlarged(rows)))  # in float32, as it goes into x0

    source = learning if recipe.adaptor.encoder_rank else _encoded(model, enlarged, count, console)
    return Examples(
        count=count,
        given=lambda rows: {"source": source(rows)},
        context=_context(originals, image_of, recipe, context),
        timestep=lambda rows: torch.full((len(rows),), recipe.timestep, device=model.device),
        latents=lambda rows: originals.latents(image_of(rows)),
        images=lambda rows: to_float(originals.images(image_of(rows))).to(model.device),
        source=enlarged,
    )


def reduced(
    image_HWC: np.ndarray, factor: int, blur: Image.Resampling = Image.Resampling.BICUBIC
) -> np.ndarray:
    """uint8 [H, W, 3] -> [H / factor, W / factor, 3], rounded down: the image before super-resolution."""
    height, width = image_HWC.shape[:2]
    return np.asarray(Image.fromarray(image_HWC).resize((width // factor, height // factor), blur))


def _several(originals: Originals, settings: SourceSettings) -> tuple[int, Rows]:
    """How many examples there are of all images, and the image of each."""
    return len(originals) * settings.per_image, lambda rows: rows // settings.per_image


def _context(originals: Originals, image_of: Rows, recipe: Recipe, context: Rows) -> Rows:
    """Each example's text context: of its image's prompt, or for a share of them of the empty one, the last."""
    prompt_N = originals.prompt_N[image_of(torch.arange(len(originals) * recipe.source.per_image))]
    draws = np.random.default_rng((recipe.seed, WITHOUT_PROMPT)).random(len(prompt_N))
    chosen = torch.where(
        torch.from_numpy(draws < recipe.source.without_prompt), originals.prompts, prompt_N
    )
    return lambda rows: context(chosen[rows])


def _encoded(model: DiffusionModel, images: Rows, count: int, console: Console | None) -> Rows:
    """Scaled latents of uint8 images, as the runtime's VAE encoder will give them."""
    return lookup(
        "source latents",
        lambda rows: model.encode(to_float(images(torch.tensor(rows)))),
        count,
        console,
    )

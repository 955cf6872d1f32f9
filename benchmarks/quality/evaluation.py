"""Held-out prompts, the teacher's images to compare with, and every number of an image set.

Shapes: N images of a split (repeats times captions), C captions of a split, H, W image size in
pixels, D features, W width of the retrieval's common space.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from retrieval import (
    INSTALL,
    data_set,
    image_vectors,
    real_heads,
    recall,
    sentence_vectors,
    text_vectors,
    train_heads,
)
from rich.console import Console
from torch import Tensor

from hipa_deploy.generate.prompt_files import read_prompt_file
from hipa_deploy.train.data.teacher_pairs import teacher_pairs
from hipa_deploy.train.evaluation.evaluation_request import FIRST_SEED, reference_teacher
from hipa_deploy.train.evaluation.quality import (
    high_frequency_energies,
    kid,
    lite0_features,
    one_step_images,
    paired_distances,
    teacher_images,
)
from hipa_deploy.train.evaluation.quality_report import BASE, FEWER_STEPS, teacher_row
from hipa_deploy.train.evaluation.spectrum import mixed
from hipa_deploy.train.model.conditions import Conditions
from hipa_deploy.train.model.diffusion_model import DiffusionModel, to_uint8
from hipa_deploy.train.recipes.recipe import Recipe, TeacherSettings, read_prompts

SPLITS = {"held-out pairs": "prompts_pair.txt", "held-out concepts": "prompts_concept.txt"}
# Captions that stand for many images each, of a model that was trained on such.
LEVELS = {"kind captions": "prompts_kind.txt", "style captions": "prompts_style.txt"}
LEVEL_CAPTIONS = 48  # of a level, at most
LOW_OF_ONE = "low of one step + high of many"
LOW_OF_MANY = "low of many + high of one step"
FILE = "references.pt"
RECALL_AT = (1, 5)
Measured = dict[str, Any]
"""{'pooled': numbers of all images, 'repeats': [numbers of each noise seed, ...]}"""


@dataclass(frozen=True)
class Split:
    """Prompts that the training never saw, each with ``repeats`` noise seeds.

    Attributes:
        name: Name of the split in the report.
        captions: The prompts, C of them.
        repeats: Noise seeds for each prompt; the repeats follow one another.
        number: Position of the split, which its seeds depend on.

    """

    name: str
    captions: list[str]
    repeats: int
    number: int

    @property
    def prompts(self) -> list[str]:
        """The prompt of each image, [N]."""
        return self.captions * self.repeats

    @property
    def seeds(self) -> list[int]:
        """The noise seed of each image, [N]; nothing else uses these seeds."""
        start = FIRST_SEED + 100_000 * (1 + self.number)
        seeds = []
        for repeat in range(self.repeats):
            first = start + 1000 * repeat
            seeds += range(first, first + len(self.captions))
        return seeds

    @property
    def other_seeds(self) -> list[int]:
        """The noise seeds of the teacher's images that KID-Lite0 is measured to, [N]."""
        return [seed + 50_000 for seed in self.seeds]


def splits(
    model_dir: Path, repeats: int, most: int | None = None, *, levels: bool = False
) -> list[Split]:
    """The splits that the model folder sets aside.

    Args:
        model_dir: Diffusers folder with the files of ``SPLITS``.
        repeats: Noise seeds for each prompt.
        most: The largest number of captions of a split, spread over its file; None is all.
        levels: Also the files of ``LEVELS`` that the folder has. Their captions are few and stand
            for many images, so each has twice the noise seeds.

    """
    found = []
    for name, file in SPLITS.items():
        captions = _spread(read_prompt_file(model_dir / file), most)
        found.append(Split(name, captions, repeats, len(found)))
    if not levels:
        return found
    for name, file in LEVELS.items():
        if (model_dir / file).exists():
            captions = _spread(read_prompt_file(model_dir / file), most or LEVEL_CAPTIONS)
            found.append(Split(name, captions, 2 * repeats, len(found)))
    return found


def _spread(captions: list[str], most: int | None) -> list[str]:
    """At most so many captions; neighbours in a file may be alike, so at equal distances."""
    stride = max(1, len(captions) // (most or len(captions)))
    return captions[::stride][:most]


@dataclass
class Reference:
    """What a split's images are compared with; it is made once.

    Attributes:
        images: Image set of each reference row by its name, uint8 [N, H, W, 3].
        truth: Name of the row of the teacher with all its steps.
        others_ND: Features of the teacher's images from other noise.
        text_CW: Unit vectors of the captions; None without retrieval.
        image_head: The retrieval's image head; None without retrieval.
        variety: Whether to measure how much the images of one prompt differ.
        truth_energy_N: High-frequency energies of the truth's images.

    """

    images: dict[str, np.ndarray]
    truth: str
    others_ND: Tensor
    text_CW: Tensor | None = None
    image_head: torch.nn.Linear | None = None
    variety: bool = False
    truth_energy_N: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.truth_energy_N = high_frequency_energies(self.images[self.truth])

    def measure(self, images_NHWC: np.ndarray, split: Split) -> Measured:
        """All numbers of an image set uint8 [N, H, W, 3], pooled and of each repeat."""
        count = len(split.captions)
        numbers = _ImageNumbers(self, images_NHWC, split.prompts, count)
        repeats = []
        for repeat in range(split.repeats):
            repeats.append(numbers.summary(slice(repeat * count, (repeat + 1) * count)))
        return {"pooled": numbers.summary(slice(None)), "repeats": repeats}


class _ImageNumbers:
    """The numbers of each image, computed once and then summarised over groups of images."""

    def __init__(
        self, reference: Reference, images_NHWC: np.ndarray, prompts: list[str], captions: int
    ) -> None:
        # The networks run once for each image; the groups below share their results.
        self.reference = reference
        self.prompts = prompts
        self.features_ND = lite0_features(images_NHWC)
        self.distance_N = paired_distances(images_NHWC, reference.images[reference.truth])
        self.energy_N = high_frequency_energies(images_NHWC)

        # The repeats follow one another: this pairs each image with the next one of its prompt.
        self.variety_N: Tensor | None = None
        if reference.variety:
            next_NHWC = np.roll(images_NHWC, -captions, axis=0)
            self.variety_N = paired_distances(images_NHWC, next_NHWC)

    def summary(self, group: slice) -> dict[str, float]:
        """KID-Lite0, mean distance, high-frequency ratio, and recall where there are heads."""
        reference = self.reference
        features = self.features_ND[group]
        energy = self.energy_N[group].mean()
        truth_energy = reference.truth_energy_N[group].mean()
        numbers = {
            "kid": kid(features, reference.others_ND[group], self.prompts[group]),
            "distance": float(self.distance_N[group].mean()),
            "hf_ratio": float(energy / truth_energy),
        }
        if self.variety_N is not None:
            numbers["variety"] = float(self.variety_N[group].mean())
        return numbers | _recalls(reference, features)


def _recalls(reference: Reference, features_ND: Tensor) -> dict[str, float]:
    """Recall at 1 and 5 of images by their features; empty without retrieval."""
    if reference.image_head is None or reference.text_CW is None:
        return {}
    with torch.no_grad():
        vectors = image_vectors(reference.image_head, features_ND)
    return {f"recall@{at}": recall(vectors, reference.text_CW, at) for at in RECALL_AT}


def make_references(
    recipe: Recipe,
    model_dir: Path,
    folder: Path,
    held_out: list[Split],
    *,
    cache: Path | None,
    data: Path | None,
    variety: bool = False,
) -> dict[str, Any]:
    """Make and measure the images of teacher and base model for every split.

    Args:
        recipe: The shared recipe, for its teacher and its prompts.
        model_dir: Diffusers folder of the base model.
        folder: Where the images and the retrieval heads are stored.
        held_out: The splits.
        cache: Folder of the teacher pairs' cache.
        data: Folder of real images to train the retrieval heads on; None is the teacher's images.
        variety: Whether to measure how much the images of one prompt differ.

    Returns:
        The numbers of each row, as result.json keeps them.

    """
    console = Console(stderr=True)
    teacher = reference_teacher(recipe.teacher)
    heads, retrieval_note = _heads(recipe, model_dir, cache, data, console)
    stored: dict[str, Any] = {"heads": None, "splits": {}, "variety": variety}
    vectors = None
    if heads is not None:
        stored["heads"] = {"image": heads[0].state_dict(), "text": heads[1].state_dict()}
        vectors = sentence_vectors()

    for split in held_out:
        rows = _reference_rows(model_dir, split, teacher)
        others = teacher_images(model_dir, split.prompts, split.other_seeds, teacher)
        stored["splits"][split.name] = {
            "images": {name: torch.from_numpy(images) for name, images in rows.items()},
            "others": lite0_features(others),
            "texts": None if vectors is None else vectors(split.captions),
        }

    # A stopped run must not leave half a file: the images take long to make.
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(stored, folder / "references.tmp")
    (folder / "references.tmp").replace(folder / FILE)

    # Measured as later items will be: from the stored file.
    references = load_references(folder)
    return {
        "retrieval": retrieval_note,
        "truth": teacher_row(teacher.steps),
        "rows": _measured_rows(references, held_out),
        "ceiling": _real_ceiling(references, held_out, data),
    }


def load_references(folder: Path) -> dict[str, Reference]:
    """What ``make_references`` stored, by the name of the split."""
    stored = torch.load(folder / FILE, weights_only=True)
    heads = {name: _linear(weights) for name, weights in (stored["heads"] or {}).items()}
    references = {}
    for name, split in stored["splits"].items():
        images = {row: array.numpy() for row, array in split["images"].items()}
        texts = text_vectors(heads["text"], split["texts"]).detach() if heads else None

        # The rows are in the order in which they were made: the last teacher has all its steps.
        teachers = [row for row in images if row.startswith("teacher")]
        references[name] = Reference(
            images,
            teachers[-1],
            split["others"],
            texts,
            heads.get("image"),
            variety=stored.get("variety", False),
        )
    return references


def measure_adaptor(
    adaptor: Path,
    model_dir: Path,
    references: dict[str, Reference],
    held_out: list[Split],
    folder: Path,
) -> dict[str, Measured]:
    """Numbers of an adaptor on every split; its images go to images.npz in ``folder``."""
    # The images are kept: the report's pictures need them.
    images = {}
    measured = {}
    for split in held_out:
        images[split.name] = one_step_images(model_dir, adaptor, split.prompts, split.seeds)
        measured[split.name] = references[split.name].measure(images[split.name], split)
    scratch = folder / "images.tmp.npz"
    np.savez_compressed(scratch, **images)
    scratch.replace(folder / "images.npz")
    return measured


def _reference_rows(
    model_dir: Path, split: Split, teacher: TeacherSettings
) -> dict[str, np.ndarray]:
    """The base model in one step, then the teacher; the last row has all of its steps."""
    rows = {BASE: one_step_images(model_dir, None, split.prompts, split.seeds)}
    fewer_steps = [steps for steps in FEWER_STEPS if steps < teacher.steps]
    for steps in (*fewer_steps, teacher.steps):
        fewer = teacher.model_copy(update={"steps": steps})
        rows[teacher_row(steps)] = teacher_images(model_dir, split.prompts, split.seeds, fewer)
    return rows


def _measured_rows(
    references: dict[str, Reference], held_out: list[Split]
) -> dict[str, dict[str, Measured]]:
    """Numbers of each reference row, and of the two rows of the paper's premise, by split."""
    measured: dict[str, dict[str, Measured]] = {}
    for split in held_out:
        reference = references[split.name]
        one = reference.images[BASE]
        many = reference.images[reference.truth]
        premise = {LOW_OF_ONE: mixed(one, many), LOW_OF_MANY: mixed(many, one)}
        for name, images in (reference.images | premise).items():
            measured.setdefault(name, {})[split.name] = reference.measure(images, split)
    return measured


def _heads(
    recipe: Recipe, model_dir: Path, cache: Path | None, data: Path | None, console: Console
) -> Any:
    """The trained retrieval heads and a note about them; (None, the reason) without MiniLM."""
    vectors = sentence_vectors()
    if vectors is None:
        return None, f"not measured: MiniLM is not installed ({INSTALL})"
    if data is not None:
        return real_heads(data, vectors), "heads trained on the real images"

    model = DiffusionModel.load(model_dir, text=recipe.text)
    prompts = read_prompts(recipe, model_dir)

    # The cache usually has all pairs, so prompts are encoded only where one is missing.
    def conditions(rows_B: Tensor) -> Conditions:
        return model.conditions([prompts[row] for row in rows_B.tolist()])

    pairs = teacher_pairs(
        model,
        prompts,
        recipe.teacher,
        seed=recipe.seed,
        conditions=conditions,
        cache=cache,
        console=console,
    )
    decoded = []
    with torch.no_grad():
        for chunk in pairs.latents_NCHW.split(32):
            decoded.append(to_uint8(model.decode(chunk.float().to(model.device))))
    texts = vectors([prompts[index] for index in pairs.prompt_N.tolist()])
    heads = train_heads(lite0_features(torch.cat(decoded).numpy()), texts)
    return heads, "heads trained on the teacher's images"


def _real_ceiling(
    references: dict[str, Reference], held_out: list[Split], data: Path | None
) -> dict[str, Any]:
    """Recall of the real images of each split's captions, where there are real images."""
    if data is None:
        return {}
    rows, images = data_set(data)
    index_of = {row["caption"]: index for index, row in enumerate(rows)}
    ceiling = {}
    for split in held_out:
        # A caption that stands for many images has no real image of its own.
        if not set(split.captions) <= index_of.keys():
            continue
        chosen = [index_of[caption] for caption in split.captions]
        recalls = _recalls(references[split.name], lite0_features(images[chosen]))
        if recalls:
            ceiling[split.name] = recalls
    return ceiling


def _linear(weights: dict[str, Tensor]) -> torch.nn.Linear:
    """A linear layer of stored weights."""
    outputs, inputs = weights["weight"].shape
    layer = torch.nn.Linear(inputs, outputs)
    layer.load_state_dict(weights)
    return layer

"""Held-out prompts, the teacher's images to compare with, and every number of a set of images."""

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
from hipa_deploy.train.evaluation.quality import (
    high_frequency_energies,
    kid,
    lite0_features,
    one_step_images,
    paired_distances,
    teacher_images,
)
from hipa_deploy.train.evaluation.quality_report import (
    BASE,
    FEWER_STEPS,
    FIRST_SEED,
    reference_teacher,
    teacher_row,
)
from hipa_deploy.train.evaluation.spectrum import mixed
from hipa_deploy.train.model.diffusion_model import DiffusionModel, to_uint8
from hipa_deploy.train.recipes.recipe import Recipe, TeacherSettings, read_prompts

SPLITS = {"held-out pairs": "prompts_pair.txt", "held-out concepts": "prompts_concept.txt"}
LOW_OF_ONE, LOW_OF_MANY = "low of one step + high of many", "low of many + high of one step"
FILE = "references.pt"
Measured = dict[str, Any]  # {"pooled": numbers, "repeats": [numbers, …]}


@dataclass(frozen=True)
class Split:
    """Prompts that the training never saw, each with ``repeats`` noise seeds: the repeats follow one another."""

    name: str
    captions: list[str]
    repeats: int
    number: int

    @property
    def prompts(self) -> list[str]:
        return self.captions * self.repeats

    @property
    def seeds(self) -> list[int]:
        """One noise seed for each prompt, used by nothing else."""
        start = FIRST_SEED + 100_000 * (1 + self.number)
        return [
            start + 1000 * r + n for r in range(self.repeats) for n in range(len(self.captions))
        ]

    @property
    def other_seeds(self) -> list[int]:
        return [seed + 50_000 for seed in self.seeds]


def splits(model_dir: Path, repeats: int, most: int | None = None) -> list[Split]:
    """The splits that the model folder sets aside; ``most`` captions of each, spread over the file."""
    found = []
    for number, (name, file) in enumerate(SPLITS.items()):
        captions = read_prompt_file(model_dir / file)
        stride = max(1, len(captions) // (most or len(captions)))
        found.append(Split(name, captions[::stride][:most], repeats, number))
    return found


@dataclass
class Reference:
    """What a split's images are compared with, made once; images are uint8 [repeats * captions, H, W, 3]."""

    images: dict[str, np.ndarray]
    truth: str
    others_ND: Tensor
    text_CD: Tensor | None = None
    image_head: torch.nn.Linear | None = None
    truth_energy_N: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.truth_energy_N = high_frequency_energies(self.images[self.truth])

    def measure(self, images_NHWC: np.ndarray, split: Split) -> Measured:
        """All numbers, of all images of the split and of each repeat's."""
        numbers = _PerImage(self, images_NHWC, split.prompts)
        count = len(split.captions)
        groups = [slice(r * count, (r + 1) * count) for r in range(split.repeats)]
        return {
            "pooled": numbers.of(slice(None)),
            "repeats": [numbers.of(group) for group in groups],
        }


class _PerImage:
    def __init__(self, reference: Reference, images_NHWC: np.ndarray, prompts: list[str]) -> None:
        self.reference, self.prompts = reference, prompts
        self.features_ND = lite0_features(images_NHWC)
        self.distance_N = paired_distances(images_NHWC, reference.images[reference.truth])
        self.energy_N = high_frequency_energies(images_NHWC)

    def of(self, group: slice) -> dict[str, float]:
        reference = self.reference
        numbers = {
            "kid": kid(self.features_ND[group], reference.others_ND[group], self.prompts[group]),
            "distance": float(self.distance_N[group].mean()),
            "hf_ratio": float(self.energy_N[group].mean() / reference.truth_energy_N[group].mean()),
        }
        if reference.image_head is not None and reference.text_CD is not None:
            with torch.no_grad():
                vectors = image_vectors(reference.image_head, self.features_ND[group])
            numbers |= {f"recall@{k}": recall(vectors, reference.text_CD, k) for k in (1, 5)}
        return numbers


def make_references(
    recipe: Recipe,
    model_dir: Path,
    folder: Path,
    held_out: list[Split],
    *,
    cache: Path | None,
    data: Path | None,
) -> dict[str, Any]:
    """Images of teacher and base for every split, stored in ``folder``, and what they measure: the result to keep."""
    console = Console(stderr=True)
    teacher = reference_teacher(recipe.teacher)
    heads, source = _heads(recipe, model_dir, cache, data, console)
    stored: dict[str, Any] = {"heads": None, "splits": {}}
    if heads is not None:
        stored["heads"] = {"image": heads[0].state_dict(), "text": heads[1].state_dict()}
    for split in held_out:
        rows = _rows(model_dir, split, teacher)
        others = teacher_images(model_dir, split.prompts, split.other_seeds, teacher)
        stored["splits"][split.name] = {
            "images": {name: torch.from_numpy(images) for name, images in rows.items()},
            "others": lite0_features(others),
            "texts": sentence_vectors()(split.captions) if heads is not None else None,  # type: ignore[misc]
        }
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(stored, folder / "references.tmp")
    (folder / "references.tmp").replace(folder / FILE)
    references = load_references(folder)
    return {
        "retrieval": source,
        "truth": teacher_row(teacher.steps),
        "rows": _measured_rows(references, held_out),
        "ceiling": _real_ceiling(references, held_out, data),
    }


def load_references(folder: Path) -> dict[str, Reference]:
    """What ``make_references`` stored, by split."""
    stored = torch.load(folder / FILE, weights_only=True)
    heads = {name: _linear(weights) for name, weights in (stored["heads"] or {}).items()}
    references = {}
    for name, split in stored["splits"].items():
        texts = text_vectors(heads["text"], split["texts"]).detach() if heads else None
        images = {row: array.numpy() for row, array in split["images"].items()}
        truth = next(row for row in reversed(images) if row.startswith("teacher"))
        references[name] = Reference(images, truth, split["others"], texts, heads.get("image"))
    return references


def measure_adaptor(
    adaptor: Path,
    model_dir: Path,
    references: dict[str, Reference],
    held_out: list[Split],
    folder: Path,
) -> dict[str, Measured]:
    """Numbers of an adaptor on every split; its images go to ``folder`` as images.npz."""
    images, measured = {}, {}
    for split in held_out:
        images[split.name] = one_step_images(model_dir, adaptor, split.prompts, split.seeds)
        measured[split.name] = references[split.name].measure(images[split.name], split)
    scratch = folder / "images.tmp.npz"
    np.savez_compressed(scratch, **images)
    scratch.replace(folder / "images.npz")
    return measured


def _rows(model_dir: Path, split: Split, teacher: TeacherSettings) -> dict[str, np.ndarray]:
    """Base in one step, then the teacher: the last row is the one with all its steps."""
    rows = {BASE: one_step_images(model_dir, None, split.prompts, split.seeds)}
    for steps in (*(n for n in FEWER_STEPS if n < teacher.steps), teacher.steps):
        fewer = teacher.model_copy(update={"steps": steps})
        rows[teacher_row(steps)] = teacher_images(model_dir, split.prompts, split.seeds, fewer)
    return rows


def _measured_rows(
    references: dict[str, Reference], held_out: list[Split]
) -> dict[str, dict[str, Measured]]:
    measured: dict[str, dict[str, Measured]] = {}
    for split in held_out:
        reference = references[split.name]
        one, many = reference.images[BASE], reference.images[reference.truth]
        premise = {LOW_OF_ONE: mixed(one, many), LOW_OF_MANY: mixed(many, one)}
        for name, images in (reference.images | premise).items():
            measured.setdefault(name, {})[split.name] = reference.measure(images, split)
    return measured


def _heads(
    recipe: Recipe, model_dir: Path, cache: Path | None, data: Path | None, console: Console
) -> Any:
    """Trained heads and a sentence about them; (None, why not) without MiniLM."""
    vectors = sentence_vectors()
    if vectors is None:
        return None, f"not measured: MiniLM is not installed ({INSTALL})"
    if data is not None:
        return real_heads(data, vectors), "heads trained on the real images"
    model = DiffusionModel.load(model_dir)
    prompts = read_prompts(recipe, model_dir)

    def context(rows_B: Tensor) -> Tensor:  # only for pairs that the cache lacks
        return model.context([prompts[i] for i in rows_B.tolist()])

    pairs = teacher_pairs(
        model,
        prompts,
        recipe.teacher,
        seed=recipe.seed,
        context=context,
        cache=cache,
        console=console,
    )
    with torch.no_grad():
        decoded = [to_uint8(model.decode(chunk.float())) for chunk in pairs.latents_NCHW.split(32)]
    texts = vectors([prompts[i] for i in pairs.prompt_N.tolist()])
    return train_heads(
        lite0_features(torch.cat(decoded).numpy()), texts
    ), "heads trained on the teacher's images"


def _real_ceiling(
    references: dict[str, Reference], held_out: list[Split], data: Path | None
) -> dict[str, Any]:
    """Recall of the real images of each split's captions, where the data set is given."""
    if data is None:
        return {}
    rows, images = data_set(data)
    place = {row["caption"]: i for i, row in enumerate(rows)}
    ceiling = {}
    for split in held_out:
        reference = references[split.name]
        if reference.image_head is None or reference.text_CD is None:
            continue
        features = lite0_features(images[[place[caption] for caption in split.captions]])
        with torch.no_grad():
            vectors = image_vectors(reference.image_head, features)
        ceiling[split.name] = {f"recall@{k}": recall(vectors, reference.text_CD, k) for k in (1, 5)}
    return ceiling


def _linear(weights: dict[str, Tensor]) -> torch.nn.Linear:
    layer = torch.nn.Linear(weights["weight"].shape[1], weights["weight"].shape[0])
    layer.load_state_dict(weights)
    return layer

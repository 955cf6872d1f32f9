"""The held-out measure of a training: student against teacher, on prompts that it never sees.

Three numbers, on images that teacher and student make of the same prompt and noise:

- ``held_out/feature_distance`` decides which step is best. It is 1 minus the cosine similarity of
  the pooled features of EfficientNet-Lite0's last layer, mean over the images: 0 for equal images.
  No term of the loss looks at that layer. The default perceptual distance looks at earlier layers
  of the same network, so the measure is not independent of it; with ``backbone = "vgg16"`` it is.
- ``held_out/dists_like`` is the DISTS-like distance of the quality report, which the default loss
  minimises on the trained prompts.
- ``held_out/high_frequency`` is the student's high-frequency energy over the teacher's: 1 at best.

The images are few, so that these numbers rank the steps of one run, and no two models:
``hipa-evaluate`` is for that.

Shapes: N examples, B rows of a chunk, H, W image size, D features.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor

from hipa_deploy.train.data.examples import TaskExamples, task_examples
from hipa_deploy.train.data.teacher_pairs import RowFunction
from hipa_deploy.train.loop.processes import Processes
from hipa_deploy.train.losses.dists import DistsLike
from hipa_deploy.train.losses.frequency import high_frequency_energy
from hipa_deploy.train.losses.lite0 import Lite0
from hipa_deploy.train.model.diffusion_model import DiffusionModel, to_float, to_uint8
from hipa_deploy.train.recipes.loss_settings import RADIUS
from hipa_deploy.train.recipes.recipe import HELD_OUT_ROWS, DecoderRecipe, Recipe

SEED_OFFSET = 1 << 29  # noise that no example of the training has; a recipe's seed is below 2^30


def held_out_examples(
    model: DiffusionModel,
    recipe: Recipe,
    prompts: list[str],
    *,
    cache: Path | None = None,
    console: Console | None = None,
    processes: Processes | None = None,
) -> TaskExamples:
    """Examples of the recipe's task, with other prompts and other noise than the training's.

    Args:
        model: The base model, without adaptor.
        recipe: The training's.
        prompts: As ``held_out_prompts`` returns them. The teacher makes the images of them, even
            where the training has a folder of images.
        cache: As for ``task_examples``.
        console: As there.
        processes: As there.

    """
    teacher = recipe.teacher.model_copy(update={"pairs": recipe.held_out.count})
    # The folder's images and captions are those of the training.
    source = {"prompts": None, "images": None, "per_image": 1}
    own = {
        "seed": recipe.seed ^ SEED_OFFSET,
        "teacher": teacher,
        "source": recipe.source.model_copy(update=source),
        "samples": recipe.held_out.count,  # of a recipe without targets: how many to make
    }
    other = recipe.model_copy(update=own)
    return task_examples(model, other, prompts, cache=cache, console=console, processes=processes)


def held_out_key(recipe: Recipe | DecoderRecipe, prompts: list[str]) -> str:
    """What the values of two measurements must have in common to be compared."""
    parts = [str(recipe.held_out.count), *prompts]
    # What is written may change on the way. The average, the default, is left out as before.
    if recipe.ema_decay and recipe.written != "average":
        parts.append(recipe.written)
    # The teacher's images are edited by other noise than before.
    if isinstance(recipe, Recipe) and recipe.task == "edit":
        parts.append("other noise than the sources'")
    text = "\n".join(parts)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


class HeldOutMeasure:
    """The distances between images to learn, made once, and a student's.

    Args:
        images: Rows int64 [B] -> the images to learn, float32 [B, 3, H, W]: the teacher's, or the
            full decoder's.
        student: Rows -> the student's images of the same.
        count: How many rows there are.
        device: Where the networks run.
        at_once: How many images go through the networks at once.

    """

    def __init__(
        self,
        images: RowFunction,
        student: RowFunction,
        count: int,
        device: torch.device,
        at_once: int = HELD_OUT_ROWS,
    ) -> None:
        self.images = images
        self.student = student
        self.count = count
        self.at_once = at_once
        self.lite0 = Lite0.pretrained().to(device)
        self.dists = DistsLike().to(device)

    @torch.no_grad()
    def __call__(self) -> dict[str, float]:
        """The values by name; what decides comes first."""
        count = self.count
        similarity = 0.0
        dists = 0.0
        energy = 0.0
        teacher_energy = 0.0
        for rows in torch.arange(count).split(self.at_once):
            # What a user gets: 8 bits a channel.
            student = self._shown(self.student(rows))
            teacher = self._shown(self.images(rows))
            features = self.lite0.pooled(student)
            teacher_features = self.lite0.pooled(teacher)
            similarity += float(F.cosine_similarity(features, teacher_features).sum())
            dists += float(self.dists(student, teacher).sum())
            energy += float(high_frequency_energy(student, RADIUS).sum())
            teacher_energy += float(high_frequency_energy(teacher, RADIUS).sum())
        return {
            "held_out/feature_distance": 1 - similarity / count,
            "held_out/dists_like": dists / count,
            "held_out/high_frequency": energy / max(teacher_energy, 1e-12),
        }

    def _shown(self, image_BCHW: Tensor) -> Tensor:
        device = next(self.lite0.parameters()).device
        return to_float(to_uint8(image_BCHW)).to(device)

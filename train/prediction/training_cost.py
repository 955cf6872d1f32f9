"""The predicted cost of a training: operations and memory, from the model's configurations alone.

The real training step runs on fake tensors, which have shapes and no values, in the recipe's
precision. Every floating-point operation is counted as torch.utils.flop_counter counts it, in
convolutions and matrix products. Every storage that lives is added up, in the order in which
PyTorch frees it. Nothing here is measured, except by ``measure_steps``, which runs the step on real
tensors.

Shapes: B rows of a batch, C latent channels, H, W latent size, L tokens of a prompt, D width of the
text encoder.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from hipa_deploy.errors import HipaError
from hipa_deploy.models.model_config import ModelConfig
from hipa_deploy.train.data.captions import image_paths
from hipa_deploy.train.data.teacher_pairs import TABLE_BYTES
from hipa_deploy.train.model.diffusion_model import DiffusionModel
from hipa_deploy.train.model.unet_adaptor import trained_parameters
from hipa_deploy.train.prediction.simulated_training import (
    MicroBatchMemory,
    SimulatedTraining,
    TrainingCost,
    unloaded_model,
)
from hipa_deploy.train.recipes.recipe import Recipe

PAIR_NUMBERS_BYTES = 16  # of a teacher pair: prompt index and noise seed, int64 each


@dataclass(frozen=True)
class TrainingPrediction:
    """What is known and what is predicted of a training.

    Memory is that of one process. Operations are those of all processes together.

    Attributes:
        recipe: The training's recipe.
        processes: How many processes, each with a GPU of its own, share each batch.
        prediction_type: What the UNet predicts: epsilon, v_prediction or sample.
        alpha_bar: Share of the signal's variance that is left at the step's timestep.
        resolution: Height and width of an image, in pixels.
        parameters: Frozen parameters of each text encoder, unet and vae.
        trainable: Trainable parameters of the adaptor.
        pairs_bytes: Bytes of all that the teacher makes, in the cache: images, edits, and those of
            held-out prompts.
        pairs: One batch of teacher pairs, all sampler steps.
        warm_up: One optimiser step without decoding, of ``recipe.batch`` rows.
        step: One optimiser step with decoding, of ``recipe.batch`` rows.
        target: The decoding of the teacher's images in each step; None where all images of a
            training fit in memory and are decoded once.
        fake: The steps of the fake score after one of the student; None without score distillation.
        held_out: One held-out measurement; None without held-out prompts.
        square: Side in pixels of what a step decodes of each image; None is the whole image.
        count_memory: Counts ``memory``, which takes as long as everything else together.

    """

    recipe: Recipe
    processes: int
    prediction_type: str
    alpha_bar: float
    resolution: tuple[int, int]
    parameters: dict[str, int]
    trainable: int
    pairs_bytes: int
    pairs: TrainingCost
    warm_up: TrainingCost
    step: TrainingCost
    count_memory: Callable[[], MicroBatchMemory] = field(compare=False, repr=False)
    target: TrainingCost | None
    fake: TrainingCost | None = None
    held_out: TrainingCost | None = None
    square: int | None = None

    @cached_property
    def memory(self) -> MicroBatchMemory:
        """The memory of ``step`` for other micro-batches; counted when it is first asked for."""
        return self.count_memory()

    @property
    def rows(self) -> int:
        """Rows of a batch in the process that has the most of them."""
        return -(-self.recipe.batch // self.processes)

    @property
    def micro_batch(self) -> int:
        """Rows that a process takes through the models at once."""
        return min(self.recipe.micro_batch or self.rows, self.rows)

    @property
    def peak_bytes(self) -> int:
        """The most bytes that live at once in the whole training."""
        costs = [self.pairs, self.warm_up, self.step]
        if self.target is not None:
            costs.append(self.target)
        if self.fake is not None:
            costs.append(self.fake)
        if self.held_out is not None:
            costs.append(self.held_out)
        return max(cost.peak_bytes for cost in costs)

    @property
    def sampler_batches(self) -> float:
        """How often the teacher's sampler runs through a batch."""
        return sampler_batches(self.recipe)

    @property
    def pairs_flops(self) -> float:
        """Operations of all teacher pairs."""
        return self.pairs.flops * self.sampler_batches

    @property
    def training_flops(self) -> float:
        """Operations of all optimiser steps, and of the held-out measurements among them."""
        warm_up, decoded = step_counts(self.recipe)
        target = self.target.flops if self.target else 0
        fake = self.fake.flops if self.fake else 0
        held_out = self.held_out.flops if self.held_out else 0
        steps = warm_up * self.warm_up.flops + decoded * (self.step.flops + target + fake)
        return steps + self.recipe.measurements * held_out


def predict_training(recipe: Recipe, model_dir: Path, processes: int = 1) -> TrainingPrediction:
    """Predict what ``train_adaptor`` takes for a recipe and a model.

    No weights are read, and the model folder may lack them.

    Args:
        recipe: The training's recipe.
        model_dir: Diffusers folder; its configurations are read.
        processes: How many processes share each batch, at least 1.

    Raises:
        HipaError: A model that cannot be trained, with the reason; a batch with fewer rows than
            there are processes.

    Example:
        >>> prediction = predict_training(load_recipe("emoji"), MODEL)
        >>> prediction.step.flops, prediction.peak_bytes / 2**30

    """
    ModelConfig.read(model_dir, recipe.task)
    if recipe.batch < processes:
        raise HipaError(
            f"batch = {recipe.batch} is less than the {processes} processes. Expected at least "
            "one row for each: raise batch, or take fewer processes."
        )

    # On the meta device neither weights nor adaptor take memory, however large the model is.
    with torch.device("meta"):
        training = SimulatedTraining(unloaded_model(model_dir, recipe.size), recipe)
    model = training.model
    parts = {**model.text_modules, "unet": model.unet, "vae": model.vae}
    parameters = {name: _frozen_parameters(part) for name, part in parts.items()}
    trainable = sum(weight.numel() for weight in training.weights.values())
    pair_bytes = latents_bytes(model, recipe) + PAIR_NUMBERS_BYTES
    crop = recipe.decode_crop if recipe.loss.has_image_terms else None
    decodes_targets = _decodes_targets(recipe, model.resolution)

    # From here on all tensors are fake ones. The adaptor's weights are among those that were
    # replaced, so the training must look them up again.
    mode = FakeTensorMode()

    def count_memory() -> MicroBatchMemory:
        with mode:
            return training.micro_batch_memory()

    with mode:
        _replace_tensors(*parts.values(), *training.own_modules)
        training.weights = trained_parameters(model)
        return TrainingPrediction(
            recipe=recipe,
            processes=processes,
            prediction_type=model.prediction_type,
            alpha_bar=training.alpha_bar,
            resolution=model.resolution,
            parameters=parameters,
            trainable=trainable,
            pairs_bytes=_cached_pairs(recipe) * pair_bytes,
            pairs=training.pairs_cost(),
            warm_up=training.batch_cost(processes, decoded=False),
            step=training.batch_cost(processes, decoded=True),
            count_memory=count_memory,
            target=training.target_cost(processes) if decodes_targets else None,
            fake=training.fake_cost(processes) if recipe.score.learns else None,
            held_out=training.held_out_cost() if recipe.held_out.prompts else None,
            square=crop and crop * model.config.vae_factor,
        )


def latents_bytes(model: DiffusionModel, recipe: Recipe) -> int:
    """Bytes of one teacher pair's latents in the cache."""
    channels, height, width = model.latent_shape_CHW
    storage_type: torch.dtype = getattr(torch, recipe.teacher.dtype)
    return channels * height * width * storage_type.itemsize


def measure_steps(recipe: Recipe, model_dir: Path, repeats: int = 3) -> dict[str, float]:
    """Measure the parts of a training on this machine's CPU, with random weights.

    They run in the precision that a training would have here (``computed_precision``).

    Args:
        recipe: The training's recipe.
        model_dir: Diffusers folder; its configurations are read.
        repeats: Timed calls of each part, after one that is not counted.

    Returns:
        Seconds of the fastest call of 'teacher call' (the UNet for one batch of pairs),
        'warm-up step' (without decoding), 'step' (with decoding); of score distillation, 'fake
        score' (all of its steps after one of the student); and with held-out prompts 'held-out
        rows' (as many as are measured at once).

    """
    training = SimulatedTraining(unloaded_model(model_dir, recipe.size), recipe, timed=True)
    calls = {
        "teacher call": training.teacher_call,
        "warm-up step": lambda: training.step(recipe.batch, decoded=False),
        "step": lambda: training.step(recipe.batch, decoded=True),
    }
    if recipe.score.learns:
        calls["fake score"] = lambda: training.fake_steps(recipe.batch)
    if recipe.held_out.prompts:
        calls["held-out rows"] = lambda: training.measure_rows(recipe.held_out_rows)

    # The first call pays for allocations and thread pools. The fastest of the others is the one
    # that other work on the machine disturbed least.
    fastest = {}
    for name, call in calls.items():
        seconds = [_seconds(call) for _ in range(repeats + 1)]
        fastest[name] = min(seconds[1:])
    return fastest


def call_counts(recipe: Recipe) -> dict[str, float]:
    """How often a training makes each call that ``measure_steps`` times, by the same names."""
    warm_up, decoded = step_counts(recipe)
    counts = {
        "teacher call": recipe.teacher.steps * sampler_batches(recipe),
        "warm-up step": warm_up,
        "step": decoded,
    }
    if recipe.score.learns:
        counts["fake score"] = decoded
    if recipe.held_out.prompts:
        pieces = math.ceil(recipe.held_out.count / recipe.held_out_rows)
        counts["held-out rows"] = recipe.measurements * pieces
    return counts


def step_counts(recipe: Recipe) -> tuple[int, int]:
    """Optimiser steps of the latent warm-up, and those after it, which decode."""
    warm_up = min(recipe.loss.latent_warmup_steps, recipe.steps)
    return warm_up, recipe.steps - warm_up


def sampler_batches(recipe: Recipe) -> float:
    """How often the teacher's sampler runs through a batch, held-out images included.

    An edit takes its strength's share of a run.
    """
    strengths = recipe.source.strengths
    edit = sum(strengths) / len(strengths)
    runs = images_made(recipe) + edits_made(recipe) * edit
    # The teacher makes the images of held-out prompts. Where edits are trained it edits each once.
    if recipe.held_out.prompts:
        runs += recipe.held_out.count * (1 + edit if recipe.task == "edit" else 1)
    return runs / recipe.teacher.batch


def images_made(recipe: Recipe) -> int:
    """Images that the teacher makes of the recipe's prompts: none where a folder has them."""
    return 0 if recipe.source_folder else _pairs(recipe)


def edits_made(recipe: Recipe) -> int:
    """Edits that the teacher makes: of the task edit, and of the pictures of text to image.

    A folder of images that is not there yet is taken to hold ``teacher.pairs`` of them.
    """
    if not recipe.makes_edits:
        return 0
    images = folder_size(recipe.image_folder) if recipe.image_folder else None
    return (images or _pairs(recipe)) * recipe.source.per_image


@cache
def folder_size(folder: Path) -> int | None:
    """How many images a recipe's folder holds; None where it has none yet.

    It is counted once, as a folder of 50,000 files takes a second.
    """
    try:
        return len(image_paths(folder))
    except HipaError:
        return None


def _cached_pairs(recipe: Recipe) -> int:
    """What the cache holds in the end: images, edits, and those of held-out prompts."""
    made = images_made(recipe) + edits_made(recipe)
    if recipe.held_out.prompts:
        made += recipe.held_out.count * (2 if recipe.task == "edit" else 1)
    return made


def _pairs(recipe: Recipe) -> int:
    """Teacher pairs that are made: of a recipe without targets, those that are shown."""
    if recipe.task == "generate" and not recipe.needs_targets:
        return min(recipe.teacher.pairs, recipe.samples)
    return recipe.teacher.pairs


def _decodes_targets(recipe: Recipe, resolution: tuple[int, int]) -> bool:
    """Whether the teacher's images are decoded in each step."""
    if not recipe.loss.has_image_terms:
        return False
    # Squares of the teacher's latents are, however few pairs there are.
    if recipe.decode_crop is not None:
        return True
    # Inpainting and super-resolution of a folder of images compare with its files.
    if recipe.source_folder and recipe.task != "edit":
        return False
    images = edits_made(recipe)
    if recipe.task != "edit":
        images += _pairs(recipe)
    height, width = resolution
    return 3 * height * width * images > TABLE_BYTES


def _seconds(call: Callable[[], None]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _frozen_parameters(module: nn.Module) -> int:
    return sum(weight.numel() for weight in module.parameters() if not weight.requires_grad)


def _replace_tensors(*roots: nn.Module) -> None:
    """Replace parameters and buffers on the meta device by CPU tensors of the active mode.

    As CPU tensors they select the attention kernel that keeps no scores, as GPUs do. On the meta
    device attention would keep all scores, and the predicted memory would be too large.
    """
    for root in roots:
        for module in root.modules():
            for name, weight in module._parameters.items():
                if weight is not None:
                    empty = _empty_like(weight)
                    module._parameters[name] = nn.Parameter(empty, weight.requires_grad)
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    module._buffers[name] = _empty_like(buffer)


def _empty_like(tensor: Tensor) -> Tensor:
    return torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype)

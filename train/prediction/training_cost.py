"""What a training would take, predicted from the model's configurations alone.

The real training step runs on fake tensors, which have shapes and no values: every operation is counted (floating-point
operations as torch.utils.flop_counter does, in convolutions and matrix products) and every storage that lives is
added up in the order PyTorch frees it. Nothing here is measured, except ``measure_step`` where it runs.
"""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count
from transformers import CLIPTextConfig, CLIPTextModel

from hipa_deploy.models.kind import read_config
from hipa_deploy.models.model_config import ModelConfig
from hipa_deploy.tasks import STEP_INPUTS
from hipa_deploy.train.data.teacher_pairs import TABLE_BYTES
from hipa_deploy.train.losses.dists import DistsLike
from hipa_deploy.train.losses.hipa_loss import HipaLoss
from hipa_deploy.train.losses.lite0 import Lite0
from hipa_deploy.train.model.diffusion_model import DiffusionModel
from hipa_deploy.train.model.one_step import task_latents
from hipa_deploy.train.model.unet_adaptor import add_adaptors, trained_parameters, without_adaptor
from hipa_deploy.train.recipes.recipe import Recipe

PAIR_NUMBERS_BYTES = 16  # prompt and seed
ADAMW_BYTES = 8  # two float32 moments a trainable parameter
# flop_counter (torch 2.13) knows the attention kernels of GPUs only.
_ATTENTION = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: (
        sdpa_flop_count(q, k, v)
    ),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: (
        lambda grad, q, k, v, *_, **__: sdpa_backward_flop_count(grad, q, k, v)
    ),
}


@dataclass(frozen=True)
class Cost:
    """Of one call, predicted: floating-point operations, and the most bytes that live at once, weights included."""

    flops: int
    peak_bytes: int


@dataclass(frozen=True)
class TrainingPlan:
    """What is known and what is predicted of a training; sizes in bytes, costs of ``recipe.batch`` rows at once.

    ``pairs`` is one batch of teacher pairs (all sampler steps), ``warm_up`` and ``step`` one optimiser step without
    and with decoding; ``target`` is the decoding of the teacher's images in each step, where all do not fit in memory.
    """

    recipe: Recipe
    prediction_type: str
    resolution: tuple[int, int]
    parameters: dict[str, int]
    trainable: int
    pairs_bytes: int
    pairs: Cost
    warm_up: Cost
    step: Cost
    target: Cost | None

    @property
    def peak_bytes(self) -> int:
        """Of the whole run."""
        return max(
            cost.peak_bytes for cost in (self.pairs, self.warm_up, self.step, self.target) if cost
        )

    @property
    def sampler_batches(self) -> float:
        """How often the teacher's sampler runs through a batch; an edit takes its strength's share of a run.

        Where editing starts from a folder of images it is taken to hold ``teacher.pairs``.
        """
        recipe, source = self.recipe, self.recipe.source
        runs = 0.0 if source.images and recipe.task != "generate" else 1.0
        if recipe.task == "edit":
            runs += source.per_image * sum(source.strengths) / len(source.strengths)
        return runs * recipe.teacher.pairs / recipe.teacher.batch

    @property
    def pairs_flops(self) -> float:
        """Of all teacher pairs."""
        return self.pairs.flops * self.sampler_batches

    @property
    def training_flops(self) -> float:
        """Of all optimiser steps."""
        warm_up = min(self.recipe.loss.latent_warmup_steps, self.recipe.steps)
        decoded = self.recipe.steps - warm_up
        target = self.target.flops if self.target else 0
        return warm_up * self.warm_up.flops + decoded * (self.step.flops + target)


def plan_training(recipe: Recipe, model_dir: Path) -> TrainingPlan:
    """Predict what ``train_adaptor`` takes for these two; no weights are read, and the model folder may lack them.

    Raises:
        HipaError: a model that cannot be trained, with the reason.

    """
    ModelConfig.read(model_dir, recipe.task)
    with torch.device("meta"):
        trainer = Trainer(unloaded_model(model_dir), recipe)
    model = trainer.model
    parts = {"text_encoder": model.pipe.text_encoder, "unet": model.unet, "vae": model.vae}
    counts = {
        name: sum(weight.numel() for weight in part.parameters() if not weight.requires_grad)
        for name, part in parts.items()
    }
    trainable = sum(weight.numel() for weight in trainer.weights.values())
    height, width = model.resolution
    images_bytes = 3 * height * width * recipe.teacher.pairs
    with FakeTensorMode():
        _replace_tensors(*parts.values(), trainer.loss)
        trainer.weights = trained_parameters(model)
        return TrainingPlan(
            recipe=recipe,
            prediction_type=model.prediction_type,
            resolution=model.resolution,
            parameters=counts,
            trainable=trainable,
            pairs_bytes=recipe.teacher.pairs * (pair_bytes(model, recipe) + PAIR_NUMBERS_BYTES),
            pairs=trainer.pairs_cost(),
            warm_up=trainer.step_cost(decoded=False),
            step=trainer.step_cost(decoded=True),
            target=trainer.target_cost() if images_bytes > TABLE_BYTES else None,
        )


def unloaded_model(folder: Path) -> DiffusionModel:
    """The model of a folder's configurations, float32, with whatever values its constructors draw; no tokenizer."""
    # As the pipeline wants a scheduler to be, or it warns; nothing here samples with it.
    exact = {"clip_sample": False, "steps_offset": 1}
    schedule = ModelConfig.read(folder).schedule
    pipe = StableDiffusionPipeline(
        unet=UNet2DConditionModel.from_config(read_config(folder, "unet/config.json")),
        vae=AutoencoderKL.from_config(read_config(folder, "vae/config.json")),
        text_encoder=CLIPTextModel(
            CLIPTextConfig.from_dict(read_config(folder, "text_encoder/config.json"))
        ),
        tokenizer=None,
        scheduler=DDIMScheduler(**schedule, **exact),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    for module in (pipe.text_encoder, pipe.unet, pipe.vae):
        module.eval().requires_grad_(False)
    return DiffusionModel(folder, pipe, torch.device("cpu"))


def pair_bytes(model: DiffusionModel, recipe: Recipe) -> int:
    """Bytes of one pair's latents as they are cached."""
    channels, height, width = model.latent_shape_CHW
    return channels * height * width * getattr(torch, recipe.teacher.dtype).itemsize


class Trainer:
    """The training step of train/train_adaptor.py, on noise and contexts that stand for any."""

    def __init__(self, model: DiffusionModel, recipe: Recipe) -> None:
        self.model, self.recipe = model, recipe
        self.weights = add_adaptors(model, recipe)
        self.loss = _loss(recipe)
        with torch.device("cpu"):
            self.alpha_bar = model.alpha_bar(recipe.timestep)

    def step(self, *, decoded: bool) -> None:
        """Forward and backward of one optimiser step."""
        latents, target = self._student(), self._latents(self.recipe.batch)
        if decoded:
            image = self.model.decode(latents)
            total, _ = self.loss(image, torch.rand_like(image), latents, target)
        else:
            total, _ = self.loss.warmup_loss(latents, target)
        total.backward()
        for weight in (*self.weights.values(), *self.loss.trained_parameters.values()):
            weight.grad = None

    @torch.no_grad()
    def teacher_call(self) -> None:
        """One UNet call of the sampler for one batch of pairs: with guidance, empty and given prompt together.

        None of a UNet that was made for inpainting: it makes no pairs.
        """
        if self.model.concatenates:
            return
        rows = self.recipe.teacher.batch * (2 if self.recipe.teacher.guidance != 1 else 1)
        with without_adaptor(self.model.unet):
            self.model.unet(
                self._latents(rows), self.recipe.timestep, self._context(rows), return_dict=False
            )

    @torch.no_grad()
    def decode_targets(self) -> None:
        """The teacher's images of a batch."""
        self.model.decode(self._latents(self.recipe.batch)).clamp(0, 1)

    def pairs_cost(self) -> Cost:
        """Of one batch of teacher pairs; the sampler's own arithmetic is left out."""
        call = self._cost(self.teacher_call)
        return Cost(call.flops * self.recipe.teacher.steps, call.peak_bytes)

    def step_cost(self, *, decoded: bool) -> Cost:
        """Of ``step``, AdamW's moments resident; its own arithmetic, a few operations a parameter, is left out."""
        cost = self._cost(lambda: self.step(decoded=decoded))
        return Cost(
            cost.flops,
            cost.peak_bytes + ADAMW_BYTES * sum(w.numel() for w in self.weights.values()),
        )

    def target_cost(self) -> Cost:
        """Of ``decode_targets``."""
        return self._cost(self.decode_targets)

    def _cost(self, call: Callable[[], None]) -> Cost:
        pipe = self.model.pipe
        live = _LiveBytes(pipe.text_encoder, pipe.unet, pipe.vae, self.loss)
        flops = FlopCounterMode(display=False, custom_mapping=_ATTENTION)
        with live, flops:
            call()
        return Cost(flops.get_total_flops(), live.peak)

    def _latents(self, rows: int) -> Tensor:
        return torch.randn(rows, *self.model.latent_shape_CHW)

    def _context(self, rows: int) -> Tensor:
        config = self.model.pipe.text_encoder.config
        return torch.randn(rows, config.max_position_embeddings, config.hidden_size)

    def _student(self) -> Tensor:
        rows, task = self.recipe.batch, self.recipe.task
        given = {name: self._latents(rows) for name in STEP_INPUTS[task]}
        if "mask" in given:
            given["mask"] = given["mask"][:, :1]
        if self.recipe.adaptor.encoder_rank:
            given["source"] = self.model.encode(torch.rand(rows, 3, *self.model.resolution))
        return task_latents(
            self.model.unet,
            task,
            given,
            self._context(rows),
            timestep_B=torch.full((rows,), self.recipe.timestep),
            alpha_bar=self.alpha_bar,
            prediction_type=self.model.prediction_type,
            concatenates=self.model.concatenates,
        )


def measure_steps(recipe: Recipe, model_dir: Path, repeats: int = 3) -> dict[str, float]:
    """Seconds of a teacher's UNet call and of a step without and with decoding: measured here, with random weights.

    Each is the best of ``repeats``, after one that is not counted.
    """
    trainer = Trainer(unloaded_model(model_dir), recipe)
    calls = {
        "teacher call": trainer.teacher_call,
        "warm-up step": lambda: trainer.step(decoded=False),
        "step": lambda: trainer.step(decoded=True),
    }
    return {
        name: min([_seconds(call) for _ in range(repeats + 1)][1:]) for name, call in calls.items()
    }


def _seconds(call: Callable[[], None]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _loss(recipe: Recipe) -> HipaLoss:
    """The recipe's loss. Lite0's weights are not read: they cost the same whatever they are."""
    with torch.device("meta"):
        weights = Lite0().state_dict()
    values = {
        name: torch.zeros(weight.shape, dtype=weight.dtype) for name, weight in weights.items()
    }
    lite0 = Lite0.from_weights(values)
    perceptual = DistsLike(lite0.features, size=recipe.loss.perceptual_size)
    perceptual.lite0 = lite0
    return HipaLoss(recipe.loss, perceptual)


def _replace_tensors(*modules: nn.Module) -> None:
    """Put tensors of the mode that is active, on the CPU, in place of those on the meta device.

    As CPU tensors they take the attention kernel that keeps no scores, as GPUs do; on the meta device it would.
    """
    for module in (child for root in modules for child in root.modules()):
        for name, weight in module._parameters.items():
            if weight is not None:
                empty = torch.empty_strided(weight.size(), weight.stride(), dtype=weight.dtype)
                module._parameters[name] = nn.Parameter(empty, weight.requires_grad)
        for name, value in module._buffers.items():
            if value is not None:
                module._buffers[name] = torch.empty_strided(
                    value.size(), value.stride(), dtype=value.dtype
                )


class _LiveBytes(TorchDispatchMode):
    """Bytes of all storages that live, and the most there were: PyTorch frees one when the last tensor on it goes."""

    def __init__(self, *resident: nn.Module) -> None:
        super().__init__()
        self._alive: set[int] = set()
        self.now = self.peak = 0
        for module in resident:
            for tensor in (*module.parameters(), *module.buffers()):
                self._add(tensor)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self._add(leaf)
        return out

    def _add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._alive:
            return
        self._alive.add(key)
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._remove, key, storage.nbytes())

    def _remove(self, key: int, size: int) -> None:
        self._alive.discard(key)
        self.now -= size

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

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from hipa_deploy.errors import HipaError
from hipa_deploy.models.kind import SECOND
from hipa_deploy.models.model_config import ModelConfig
from hipa_deploy.models.weights.part_config import build
from hipa_deploy.models.weights.weight_files import find_weights
from hipa_deploy.tasks import STEP_INPUTS
from hipa_deploy.train.data.crops import check_crop, cropped
from hipa_deploy.train.data.teacher_pairs import TABLE_BYTES
from hipa_deploy.train.distribution.terms import DistributionTerms, check_distribution_terms
from hipa_deploy.train.losses.dists import DistsLike
from hipa_deploy.train.losses.hipa_loss import HipaLoss
from hipa_deploy.train.losses.lite0 import Lite0
from hipa_deploy.train.model.conditions import Conditions, predict
from hipa_deploy.train.model.diffusion_model import DiffusionModel, pipeline, tokenizer_of
from hipa_deploy.train.model.mixed_precision import decoder_precision, in_precision
from hipa_deploy.train.model.one_step import task_latents
from hipa_deploy.train.model.unet_adaptor import add_adaptors, trained_parameters, without_adaptor
from hipa_deploy.train.prediction.count_call import count_call
from hipa_deploy.train.recipes.recipe import Recipe

PAIR_NUMBERS_BYTES = 16  # of a teacher pair: prompt index and noise seed, int64 each
SCHEDULE = 1000  # timesteps of a schedule; which alpha_bar they have costs nothing
LAST_STEP = 100_000_000  # beyond every recipe's delays
CPU = torch.device("cpu")
ADAMW_BYTES = 8  # two float32 moments for each trainable parameter


@dataclass(frozen=True)
class TrainingCost:
    """The predicted cost of one call.

    Attributes:
        flops: Floating-point operations; a multiplication and an addition count as two.
        peak_bytes: The most bytes that live at once, the model's weights included.

    """

    flops: int
    peak_bytes: int


@dataclass(frozen=True)
class MicroBatchMemory:
    """The memory of a decoded step by its micro-batch, the rows that go through it at once.

    Weights and gradients are there once, and activations once a row.

    Attributes:
        one_row: The most bytes that live at once, with a micro-batch of one row.
        further_row: What every further row adds.

    """

    one_row: int
    further_row: int

    def largest(self, usable_bytes: float, rows: int) -> int:
        """The largest micro-batch of at most ``rows`` that fits; 0 if not even one row does."""
        if self.one_row > usable_bytes:
            return 0
        more = (usable_bytes - self.one_row) / max(1, self.further_row)
        return min(rows, 1 + int(more))


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
        pairs_bytes: Bytes of all teacher pairs in the cache.
        pairs: One batch of teacher pairs, all sampler steps.
        warm_up: One optimiser step without decoding, of ``recipe.batch`` rows.
        step: One optimiser step with decoding, of ``recipe.batch`` rows.
        memory: The memory of ``step`` for other micro-batches.
        target: The decoding of the teacher's images in each step; None where all images of a
            training fit in memory and are decoded once.
        fake: The steps of the fake score after one of the student; None without score distillation.
        square: Side in pixels of what a step decodes of each image; None is the whole image.

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
    memory: MicroBatchMemory
    target: TrainingCost | None
    fake: TrainingCost | None = None
    square: int | None = None

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
        return max(cost.peak_bytes for cost in costs)

    @property
    def sampler_batches(self) -> float:
        """How often the teacher's sampler runs through a batch.

        An edit takes its strength's share of a run. A folder of images, whose size is not known
        here, is taken to hold ``teacher.pairs`` of them.
        """
        source = self.recipe.source
        runs = 1.0
        if source.images and self.recipe.task != "generate":
            runs = 0.0
        if self.recipe.task == "edit":
            runs += source.per_image * sum(source.strengths) / len(source.strengths)
        return runs * _pairs(self.recipe) / self.recipe.teacher.batch

    @property
    def pairs_flops(self) -> float:
        """Operations of all teacher pairs."""
        return self.pairs.flops * self.sampler_batches

    @property
    def training_flops(self) -> float:
        """Operations of all optimiser steps."""
        warm_up = min(self.recipe.loss.latent_warmup_steps, self.recipe.steps)
        decoded = self.recipe.steps - warm_up
        target = self.target.flops if self.target else 0
        fake = self.fake.flops if self.fake else 0
        return warm_up * self.warm_up.flops + decoded * (self.step.flops + target + fake)


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
        training = SimulatedTraining(unloaded_model(model_dir), recipe)
    model = training.model
    parts = {**model.text_modules, "unet": model.unet, "vae": model.vae}
    parameters = {name: _frozen_parameters(part) for name, part in parts.items()}
    trainable = sum(weight.numel() for weight in training.weights.values())
    pair_bytes = latents_bytes(model, recipe) + PAIR_NUMBERS_BYTES
    height, width = model.resolution
    images_bytes = 3 * height * width * _pairs(recipe)
    # Squares of the teacher's latents are decoded in each step, however few pairs there are.
    crop = recipe.decode_crop if recipe.loss.has_image_terms else None
    decodes_targets = crop is not None or images_bytes > TABLE_BYTES

    # From here on all tensors are fake ones. The adaptor's weights are among those that were
    # replaced, so the training must look them up again.
    with FakeTensorMode():
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
            pairs_bytes=_pairs(recipe) * pair_bytes,
            pairs=training.pairs_cost(),
            warm_up=training.batch_cost(processes, decoded=False),
            step=training.batch_cost(processes, decoded=True),
            memory=training.micro_batch_memory(),
            target=training.target_cost(processes) if decodes_targets else None,
            fake=training.fake_cost(processes) if recipe.score.weight else None,
            square=crop and crop * model.config.vae_factor,
        )


def unloaded_model(folder: Path) -> DiffusionModel:
    """The model of a folder's configurations, float32 on the CPU, without the stored weights.

    The weights are whatever values the constructors draw, and there is no tokenizer: time and
    memory depend on neither.
    """
    config = ModelConfig.read(folder)
    kinds: dict[str, Any] = {
        "unet": UNet2DConditionModel,
        "vae": AutoencoderKL,
        "text_encoder": CLIPTextModel,
    }
    if config.has_text_pair:
        kinds[SECOND] = CLIPTextModelWithProjection
    parts: dict[str, Any] = {}
    for part, kind in kinds.items():
        parts[part] = _unloaded(kind, getattr(config, part), folder / part)
    tokenizers = dict.fromkeys(tokenizer_of(part) for part in config.text_parts)
    pipe = pipeline(config, parts, tokenizers)
    for module in parts.values():
        module.eval().requires_grad_(False)
    return DiffusionModel(folder, pipe, torch.device("cpu"))


def _unloaded(kind: Any, config: Mapping[str, Any], where: Path) -> nn.Module:
    """A part with drawn weights, on torch's default device.

    Raises:
        HipaError: the configuration asks for more weights than the files hold.

    """
    path = where / "config.json"
    device = str(torch.get_default_device())
    if device != "meta":
        # There is memory for what the files hold; a configuration alone could ask for any amount.
        wanted = sum(weight.numel() for weight in build(kind, config, path).parameters())
        stored = sum(file.stat().st_size for file in find_weights(where))
        if wanted > stored:  # a weight has two bytes or more
            raise HipaError(
                f"{path} asks for {wanted:,} weights, and the files beside it have {stored:,} "
                "bytes. Expected both of one model. Copy the model again."
            )
    return build(kind, config, path, device)


def latents_bytes(model: DiffusionModel, recipe: Recipe) -> int:
    """Bytes of one teacher pair's latents in the cache."""
    channels, height, width = model.latent_shape_CHW
    storage_type: torch.dtype = getattr(torch, recipe.teacher.dtype)
    return channels * height * width * storage_type.itemsize


class SimulatedTraining:
    """The training step of train/train_adaptor.py on random inputs, to be counted or timed.

    Attributes:
        model: The base model, with the recipe's adaptor.
        recipe: The training's recipe.
        weights: The trainable parameters by name.
        loss: The recipe's loss.
        distribution: The recipe's terms that compare distributions, if any.

    """

    def __init__(self, model: DiffusionModel, recipe: Recipe) -> None:
        self.model = model
        self.recipe = recipe
        self.weights = add_adaptors(model, recipe)
        self._step_costs: dict[tuple[int, bool], TrainingCost] = {}
        self.loss = _loss(recipe)
        self.unet = in_precision(model.unet, recipe.mixed_precision, CPU)
        self.decode = in_precision(model.decode, decoder_precision(recipe, model.config), CPU)
        check_crop(recipe.decode_crop, model.latent_shape_CHW)
        self.teacher_unet = in_precision(model.unet, recipe.teacher.mixed_precision, CPU)
        self.distribution: DistributionTerms | None = None
        if recipe.compares_distributions:
            with CPU:
                self.distribution = _distribution(model, recipe)
        # A number rather than a tensor comes out of it, so it needs a device with values.
        with CPU:
            self.alpha_bar = model.alpha_bar(recipe.timestep)

    def step(self, rows: int, *, decoded: bool) -> None:
        """Forward and backward pass of ``rows`` rows.

        Args:
            rows: How many.
            decoded: A step after the latent warm-up, with every term; it decodes if an image term
                needs it.

        """
        latents = self._student_latents(rows)
        target = self._latents(rows)
        if not decoded:
            total, _ = self.loss.warmup_loss(latents, target)
        elif self.loss.needs_images:
            image = self.decode(self._decoded_part(latents))
            total, _ = self.loss(image, torch.rand_like(image), latents, target)
        elif self.recipe.needs_targets:
            total, _ = self.loss.latent_loss(latents, target)
        else:
            total = latents.new_zeros(())
        if decoded and self.distribution is not None:
            total = total + self._beside(self.distribution, latents, target)
        total.backward()
        self._forget_gradients()

    def fake_steps(self, rows: int) -> None:
        """The steps of the fake score after one of the student, of ``rows`` rows."""
        distribution = self.distribution
        assert distribution is not None
        examples = _examples(rows)
        self._prepare(distribution)
        distribution.remember(self._latents(rows), self._conditions(rows), examples)
        with distribution.following():
            for number in range(self.recipe.score.steps):
                loss, _ = distribution.fake_loss(examples, LAST_STEP, number)
                loss.backward()
        self._forget_gradients()

    @property
    def own_modules(self) -> list[nn.Module]:
        """The modules beside the model's parts."""
        modules: list[nn.Module] = [self.loss]
        if self.distribution is not None and self.distribution.discriminator is not None:
            modules.append(self.distribution.discriminator)
        return modules

    def _beside(self, distribution: DistributionTerms, latents: Tensor, target: Tensor) -> Tensor:
        """The terms that compare distributions, at a step where all of them are on."""
        self._prepare(distribution)
        rows = len(latents)
        conditions = self._conditions(rows)
        total, _ = distribution(latents, target, conditions, _examples(rows), LAST_STEP)
        distribution.forget()  # what the fake score learns from counts in fake_steps
        return total

    def _prepare(self, distribution: DistributionTerms) -> None:
        """Give it a schedule and an conditions of the kind of tensor that the step has."""
        distribution.alpha_bar_T = torch.rand(SCHEDULE)
        if distribution.score is not None:
            distribution.score.alpha_bar_T = distribution.alpha_bar_T
            distribution.score.unguided = self._conditions(1)

    def _forget_gradients(self) -> None:
        # Gradients left behind would count as memory of the next step.
        trained = [*self.weights.values(), *self.loss.trained_parameters.values()]
        if self.distribution is not None:
            trained += self.distribution.fake_weights.values()
            trained += self.distribution.head_weights.values()
        for weight in trained:
            weight.grad = None

    @torch.no_grad()
    def teacher_call(self) -> None:
        """One UNet call of the sampler for one batch of pairs.

        With guidance, the empty prompt and the real one go through together. A UNet that was made
        for inpainting makes no pairs, so there is nothing to run.
        """
        if self.model.concatenates:
            return
        guided = self.recipe.teacher.guidance != 1
        rows = self.recipe.teacher.batch * (2 if guided else 1)
        with without_adaptor(self.model.unet):
            timestep = self.recipe.timestep
            predict(self.teacher_unet, self._latents(rows), timestep, self._conditions(rows))

    @torch.no_grad()
    def decode_targets(self, rows: int) -> None:
        """Decode the teacher's images of ``rows`` rows."""
        self.decode(self._decoded_part(self._latents(rows))).clamp(0, 1)

    def pairs_cost(self) -> TrainingCost:
        """Cost of one batch of teacher pairs, without the sampler's own small arithmetic."""
        call = self._cost(self.teacher_call)
        return TrainingCost(call.flops * self.recipe.teacher.steps, call.peak_bytes)

    def step_cost(self, rows: int, *, decoded: bool) -> TrainingCost:
        """Cost of ``step``, with AdamW's moments in memory.

        AdamW's own arithmetic, a few operations for each parameter, is not counted.
        """
        # A step of SDXL takes tens of seconds to count, and is asked for more than once.
        key = (rows, decoded)
        if key not in self._step_costs:
            cost = self._cost(lambda: self.step(rows, decoded=decoded))
            peak_bytes = cost.peak_bytes + self._moments_bytes()
            self._step_costs[key] = TrainingCost(cost.flops, peak_bytes)
        return self._step_costs[key]

    def fake_cost(self, processes: int = 1) -> TrainingCost:
        """Cost of ``fake_steps`` for a whole batch, with AdamW's moments in memory."""
        micro_batch = self._micro_batch(processes)
        cost = self._cost(lambda: self.fake_steps(micro_batch))
        flops = round(cost.flops * self.recipe.batch / micro_batch)
        return TrainingCost(flops, cost.peak_bytes + self._moments_bytes())

    def _micro_batch(self, processes: int) -> int:
        """Rows that a process takes through the models at once."""
        rows = -(-self.recipe.batch // processes)
        return min(self.recipe.micro_batch or rows, rows)

    def _moments_bytes(self) -> int:
        trainable = sum(weight.numel() for weight in self.weights.values())
        if self.distribution is not None:
            for weights in (self.distribution.fake_weights, self.distribution.head_weights):
                trainable += sum(weight.numel() for weight in weights.values())
        return ADAMW_BYTES * trainable

    def batch_cost(self, processes: int, *, decoded: bool) -> TrainingCost:
        """Operations of a whole batch in all processes, and the memory of one of them."""
        micro_batch = self._micro_batch(processes)
        cost = self.step_cost(micro_batch, decoded=decoded)
        flops = round(cost.flops * self.recipe.batch / micro_batch)
        return TrainingCost(flops, cost.peak_bytes)

    def micro_batch_memory(self) -> MicroBatchMemory:
        """Memory of a decoded step with one row, and what another adds."""
        one_row = self.step_cost(1, decoded=True).peak_bytes
        two_rows = self.step_cost(2, decoded=True).peak_bytes
        return MicroBatchMemory(one_row, two_rows - one_row)

    def target_cost(self, processes: int = 1) -> TrainingCost:
        """Cost of ``decode_targets`` for a whole batch, and the memory of a micro-batch."""
        micro_batch = self._micro_batch(processes)
        cost = self._cost(lambda: self.decode_targets(micro_batch))
        flops = round(cost.flops * self.recipe.batch / micro_batch)
        return TrainingCost(flops, cost.peak_bytes)

    def _cost(self, call: Callable[[], None]) -> TrainingCost:
        pipe = self.model.pipe
        encoders = self.model.text_modules.values()
        resident = (*encoders, pipe.unet, pipe.vae, *self.own_modules)
        return TrainingCost(*count_call(call, resident))

    def _latents(self, rows: int) -> Tensor:
        """Random latents [B, C, H, W]."""
        return torch.randn(rows, *self.model.latent_shape_CHW)

    def _decoded_part(self, latents_BCHW: Tensor) -> Tensor:
        """What a step decodes: a square of the latents, or all; where it lies costs nothing."""
        side = self.recipe.decode_crop
        if side is None:
            return latents_BCHW
        return cropped(latents_BCHW, [(0, 0)] * len(latents_BCHW), side)

    def _conditions(self, rows: int) -> Conditions:
        """Random text contexts [B, L, D], and SDXL's added conditions."""
        encoder = self.model.pipe.text_encoder.config
        length = self.recipe.text.context_tokens or encoder.max_position_embeddings
        config = self.model.config
        context_BLD = torch.randn(rows, length, config.text_width)
        if config.pooled_width is None:
            return Conditions(context_BLD)
        return Conditions(context_BLD, torch.randn(rows, config.pooled_width), torch.rand(rows, 6))

    def _student_latents(self, rows: int) -> Tensor:
        """The step's x0 [B, C, H, W], from random inputs of the recipe's task."""
        task = self.recipe.task
        step_inputs = {name: self._latents(rows) for name in STEP_INPUTS[task]}
        if "mask" in step_inputs:
            step_inputs["mask"] = step_inputs["mask"][:, :1]  # a mask has one channel
        if self.recipe.adaptor.encoder_rank:
            # An encoder that learns runs in each step; without one the latents are made once.
            images = torch.rand(rows, 3, *self.model.resolution)
            step_inputs["source"] = self.model.encode(images)
        return task_latents(
            self.unet,
            task,
            step_inputs,
            self._conditions(rows),
            timestep_B=torch.full((rows,), self.recipe.timestep),
            alpha_bar=self.alpha_bar,
            prediction_type=self.model.prediction_type,
            concatenates=self.model.concatenates,
        )


def measure_steps(recipe: Recipe, model_dir: Path, repeats: int = 3) -> dict[str, float]:
    """Measure the parts of a training on this machine's CPU, with random weights.

    Args:
        recipe: The training's recipe.
        model_dir: Diffusers folder; its configurations are read.
        repeats: Timed calls of each part, after one that is not counted.

    Returns:
        Seconds of the fastest call of 'teacher call' (the UNet for one batch of pairs),
        'warm-up step' (without decoding), 'step' (with decoding) and, of score distillation, 'fake
        score' (all of its steps after one of the student).

    """
    training = SimulatedTraining(unloaded_model(model_dir), recipe)
    calls = {
        "teacher call": training.teacher_call,
        "warm-up step": lambda: training.step(recipe.batch, decoded=False),
        "step": lambda: training.step(recipe.batch, decoded=True),
    }
    if recipe.score.weight:
        calls["fake score"] = lambda: training.fake_steps(recipe.batch)

    # The first call pays for allocations and thread pools. The fastest of the others is the one
    # that other work on the machine disturbed least.
    fastest = {}
    for name, call in calls.items():
        seconds = [_seconds(call) for _ in range(repeats + 1)]
        fastest[name] = min(seconds[1:])
    return fastest


def _pairs(recipe: Recipe) -> int:
    """Teacher pairs that are made: of a recipe without targets, those that are shown."""
    if recipe.task == "generate" and not recipe.needs_targets:
        return min(recipe.teacher.pairs, recipe.samples)
    return recipe.teacher.pairs


def _distribution(model: DiffusionModel, recipe: Recipe) -> DistributionTerms:
    """The terms that compare distributions, whose schedule and empty prompt come later."""
    check_distribution_terms(recipe, model)
    return DistributionTerms(
        model.unet,
        recipe,
        alpha_bar_T=torch.ones(1),
        prediction_type=model.prediction_type,
        unguided=Conditions(torch.ones(1)),
        draw=_drawn,
    )


def _examples(count: int) -> Tensor:
    """Row numbers with values, which the terms look at, even among fake tensors."""
    with unset_fake_temporarily():
        return torch.arange(count)


def _drawn(
    seed: int,
    stream: int,
    step: int,
    rows: Tensor,
    timesteps: tuple[int, int],
    shape_CHW: tuple[int, int, int],
) -> tuple[Tensor, Tensor]:
    """As ``row_draws``, of tensors without values."""
    return torch.zeros(len(rows), dtype=torch.int64), torch.randn(len(rows), *shape_CHW)


def _seconds(call: Callable[[], None]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _frozen_parameters(module: nn.Module) -> int:
    return sum(weight.numel() for weight in module.parameters() if not weight.requires_grad)


def _loss(recipe: Recipe) -> HipaLoss:
    """The recipe's loss, with zeros for Lite0's weights, whose values change neither cost."""
    with torch.device("meta"):
        state = Lite0().state_dict()
    zeros = {}
    for name, weight in state.items():
        zeros[name] = torch.zeros(weight.shape, dtype=weight.dtype)
    lite0 = Lite0.from_weights(zeros)
    perceptual = DistsLike(lite0.features, size=recipe.loss.perceptual_size)
    perceptual.lite0 = lite0  # registered as a sub-module, so that its weights count as memory
    return HipaLoss(recipe.loss, perceptual)


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

"""A training step on random inputs, to be counted or timed: no data, no weights that were stored.

Shapes: B rows of a batch, C latent channels, H, W latent size, L tokens of a prompt, D width of the
text encoder.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor, nn
from torch._subclasses.fake_tensor import unset_fake_temporarily
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from hipa_deploy.errors import HipaError
from hipa_deploy.models.kind import SECOND
from hipa_deploy.models.model_config import ModelConfig
from hipa_deploy.models.weights.part_config import build
from hipa_deploy.models.weights.weight_files import find_weights
from hipa_deploy.tasks import STEP_INPUTS
from hipa_deploy.train.data.crops import cropped
from hipa_deploy.train.distribution.terms import DistributionTerms
from hipa_deploy.train.losses.alignment import ClipScorer, unloaded_scorer
from hipa_deploy.train.losses.dists import DistsLike
from hipa_deploy.train.losses.hipa_loss import HipaLoss
from hipa_deploy.train.losses.lite0 import Lite0
from hipa_deploy.train.model.conditions import Conditions, predict
from hipa_deploy.train.model.diffusion_model import DiffusionModel, pipeline, tokenizer_of
from hipa_deploy.train.model.mixed_precision import decoder_precision, in_precision
from hipa_deploy.train.model.one_step import task_latents
from hipa_deploy.train.model.unet_adaptor import add_adaptors, without_adaptor
from hipa_deploy.train.prediction.count_call import count_call
from hipa_deploy.train.recipes.recipe import Recipe, check_crop, check_distribution_terms

SCHEDULE = 1000  # timesteps of a schedule; which alpha_bar they have costs nothing
LAST_STEP = 100_000_000  # beyond every recipe's delays
CPU = torch.device("cpu")
ADAMW_BYTES = 8  # two float32 moments for each trainable parameter
AVERAGE_BYTES = 4  # its average in float32


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


def unloaded_model(folder: Path, size: tuple[int, int] | None = None) -> DiffusionModel:
    """The model of a folder's configurations, float32 on the CPU, without the stored weights.

    The weights are whatever values the constructors draw, and there is no tokenizer: time and
    memory depend on neither.

    Args:
        folder: of the model.
        size: Height and width of its images in pixels; None is what it was made for.

    Raises:
        HipaError: The configurations are of no model that is known, or the size does not fit it.

    """
    config = ModelConfig.read(folder)
    if size is not None:
        config.latents_of(size)
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
    return DiffusionModel(folder, pipe, torch.device("cpu"), size=size)


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


class SimulatedTraining:
    """The training step of train/train_adaptor.py on random inputs, to be counted or timed.

    Args:
        model: The base model; it gets the recipe's adaptor.
        recipe: The training's recipe.
        timed: In the precision in which this machine's CPU computes, else in the recipe's.

    Attributes:
        model: The base model, with the recipe's adaptor.
        recipe: The training's recipe.
        weights: The trainable parameters by name.
        loss: The recipe's loss.
        scorer: The CLIP of the recipe's alignment; None without one, and for a user's own.
        distribution: The recipe's terms that compare distributions, if any.

    """

    def __init__(self, model: DiffusionModel, recipe: Recipe, *, timed: bool = False) -> None:
        self.model = model
        self.recipe = recipe
        emulated = not timed
        self.weights = add_adaptors(model, recipe)
        self._step_costs: dict[tuple[int, bool, bool], TrainingCost] = {}
        self.loss = _loss(recipe)
        self.scorer = _scorer(recipe)
        self.held_out = _DistanceNetworks() if recipe.held_out.prompts else None
        self.unet = in_precision(model.unet, recipe.mixed_precision, CPU, emulated=emulated)
        vae_precision = decoder_precision(recipe, model.config)
        self.decode = in_precision(model.decode, vae_precision, CPU, emulated=emulated)
        check_crop(recipe.decode_crop, model.latent_shape_CHW)
        teacher_precision = recipe.teacher.mixed_precision
        self.teacher_unet = in_precision(model.unet, teacher_precision, CPU, emulated=emulated)
        self.distribution: DistributionTerms | None = None
        if recipe.compares_distributions:
            with CPU:
                self.distribution = _distribution(model, recipe, emulated=emulated)
        # A number rather than a tensor comes out of it, so it needs a device with values.
        with CPU:
            self.alpha_bar = model.alpha_bar(recipe.timestep)

    def step(self, rows: int, *, decoded: bool, accumulates: bool = False) -> None:
        """Forward and backward pass of ``rows`` rows.

        Args:
            rows: How many.
            decoded: A step after the latent warm-up, with every term; it decodes if an image term
                needs it.
            accumulates: Whether there are gradients of the batch's earlier rows already.

        """
        if accumulates:
            for weight in self._trained():
                weight.grad = torch.zeros_like(weight)
        latents = self._student_latents(rows)
        target = self._latents(rows)
        if not decoded:
            total, _ = self.loss.warmup_loss(latents, target)
        else:
            total = self._image_terms(latents, target)
        if decoded and self.distribution is not None:
            total = total + self._beside(self.distribution, latents, target)
        total.backward()
        self._forget_gradients()

    def _image_terms(self, latents: Tensor, target: Tensor) -> Tensor:
        """The terms of a step after the warm-up, without those that compare distributions."""
        total = latents.new_zeros(())
        if self.loss.needs_images or self.recipe.alignment.weight:
            image = self.decode(self._decoded_part(latents))
        if self.loss.needs_images:
            total, _ = self.loss(image, torch.rand_like(image), latents, target)
        elif self.recipe.needs_targets:
            total, _ = self.loss.latent_loss(latents, target)
        if self.scorer is not None:
            total = total + self.scorer.embedded(image).mean()
        elif self.recipe.alignment.weight:
            total = total + image.mean()  # a user's own: decoded for it, and what it costs unknown
        return total

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
        if self.scorer is not None:
            modules.append(self.scorer)
        if self.held_out is not None:
            modules.append(self.held_out)
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
        fake = self.distribution.fake_weights.values() if self.distribution else ()
        for weight in (*self._trained(), *fake):
            weight.grad = None

    def _trained(self) -> list[nn.Parameter]:
        """The weights that have a gradient in a step of the student."""
        trained = [*self.weights.values(), *self.loss.trained_parameters.values()]
        if self.distribution is not None:
            trained += self.distribution.head_weights.values()
        return trained

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

    @torch.no_grad()
    def measure_rows(self, rows: int) -> None:
        """The held-out measure of ``rows`` images: the student's step, and both networks."""
        assert self.held_out is not None
        student = self.decode(self._student_latents(rows))
        self.held_out(student, torch.rand_like(student))

    def held_out_cost(self) -> TrainingCost:
        """Cost of one held-out measurement."""
        rows = self.recipe.held_out_rows
        cost = self._cost(lambda: self.measure_rows(rows))
        flops = round(cost.flops * self.recipe.held_out.count / rows)
        # The weights make room for their average, and are kept beside it.
        kept = self._average_bytes() if self.recipe.written == "average" else 0
        return TrainingCost(flops, cost.peak_bytes + self._kept_bytes() + kept)

    def pairs_cost(self) -> TrainingCost:
        """Cost of one batch of teacher pairs, without the sampler's own small arithmetic."""
        call = self._cost(self.teacher_call)
        return TrainingCost(call.flops * self.recipe.teacher.steps, call.peak_bytes)

    def step_cost(self, rows: int, *, decoded: bool, accumulates: bool = False) -> TrainingCost:
        """Cost of ``step``, with AdamW's moments and the average in memory.

        AdamW's own arithmetic, a few operations for each parameter, is not counted.
        """
        # A step of SDXL takes tens of seconds to count, and is asked for more than once.
        key = (rows, decoded, accumulates)
        if key not in self._step_costs:
            cost = self._cost(lambda: self.step(rows, decoded=decoded, accumulates=accumulates))
            peak_bytes = cost.peak_bytes + self._kept_bytes()
            self._step_costs[key] = TrainingCost(cost.flops, peak_bytes)
        return self._step_costs[key]

    def fake_cost(self, processes: int = 1) -> TrainingCost:
        """Cost of ``fake_steps`` for a whole batch, with what ``step_cost`` has in memory."""
        micro_batch = self._micro_batch(processes)
        cost = self._cost(lambda: self.fake_steps(micro_batch))
        flops = round(cost.flops * self.recipe.batch / micro_batch)
        return TrainingCost(flops, cost.peak_bytes + self._kept_bytes())

    def _rows(self, processes: int) -> int:
        """Rows of a batch in the process that has the most of them."""
        return -(-self.recipe.batch // processes)

    def _micro_batch(self, processes: int) -> int:
        """Rows that a process takes through the models at once."""
        rows = self._rows(processes)
        return min(self.recipe.micro_batch or rows, rows)

    def _kept_bytes(self) -> int:
        """Bytes of AdamW's moments and of the average."""
        return self._moments_bytes() + self._average_bytes()

    def _average_bytes(self) -> int:
        if not self.recipe.ema_decay:
            return 0
        return AVERAGE_BYTES * sum(weight.numel() for weight in self.weights.values())

    def _moments_bytes(self) -> int:
        trainable = sum(weight.numel() for weight in self.weights.values())
        if self.distribution is not None:
            for weights in (self.distribution.fake_weights, self.distribution.head_weights):
                trainable += sum(weight.numel() for weight in weights.values())
        return ADAMW_BYTES * trainable

    def batch_cost(self, processes: int, *, decoded: bool) -> TrainingCost:
        """Operations of a whole batch in all processes, and the memory of one of them."""
        micro_batch = self._micro_batch(processes)
        accumulates = micro_batch < self._rows(processes)
        cost = self.step_cost(micro_batch, decoded=decoded, accumulates=accumulates)
        flops = round(cost.flops * self.recipe.batch / micro_batch)
        return TrainingCost(flops, cost.peak_bytes)

    def micro_batch_memory(self) -> MicroBatchMemory:
        """Memory of a decoded step with one row, and what another adds."""
        one_row = self.step_cost(1, decoded=True, accumulates=True).peak_bytes
        two_rows = self.step_cost(2, decoded=True, accumulates=True).peak_bytes
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


def _distribution(model: DiffusionModel, recipe: Recipe, *, emulated: bool) -> DistributionTerms:
    """The terms that compare distributions, whose schedule and empty prompt come later."""
    check_distribution_terms(recipe, model.config)
    return DistributionTerms(
        model.unet,
        recipe,
        alpha_bar_T=torch.ones(1),
        prediction_type=model.prediction_type,
        unguided=Conditions(torch.ones(1)),
        draw=_drawn,
        emulated=emulated,
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


class _DistanceNetworks(nn.Module):
    """The networks of the held-out measure (train/held_out.py), with zeros for weights."""

    def __init__(self) -> None:
        super().__init__()
        self.lite0 = _zero_lite0()
        self.dists_lite0 = _zero_lite0()  # the DISTS-like distance loads its own
        self.dists = DistsLike(self.dists_lite0.features)

    def forward(self, student_BCHW: Tensor, teacher_BCHW: Tensor) -> Tensor:
        self.lite0.pooled(student_BCHW)
        self.lite0.pooled(teacher_BCHW)
        return self.dists(student_BCHW, teacher_BCHW)


def _scorer(recipe: Recipe) -> ClipScorer | None:
    """The CLIP of ``alignment`` with drawn weights; None without one, and for a user's own scorer.

    Its text part is not counted: it has no backward pass, and is small beside the UNet.
    """
    settings = recipe.alignment
    if not settings.weight or settings.is_code:
        return None
    return unloaded_scorer(Path(settings.scorer or ""))


def _zero_lite0() -> Lite0:
    """Lite0 with zeros for weights, whose values change neither operations nor memory."""
    with torch.device("meta"):
        state = Lite0().state_dict()
    zeros = {}
    for name, weight in state.items():
        zeros[name] = torch.zeros(weight.shape, dtype=weight.dtype)
    return Lite0.from_weights(zeros)


def _loss(recipe: Recipe) -> HipaLoss:
    """The recipe's loss, with zeros for Lite0's weights."""
    lite0 = _zero_lite0()
    perceptual = DistsLike(lite0.features, size=recipe.loss.perceptual_size)
    perceptual.lite0 = lite0  # registered as a sub-module, so that its weights count as memory

    # A user's own loss may need values, which fake tensors have not. Its images are decoded as for
    # the pixel term; what it costs itself is not known.
    # Fake tensors have no values to measure gradients by either. The measurement is not counted.
    settings = recipe.loss.model_copy(update={"balance": "fixed"})
    if settings.custom:
        pixel = settings.pixel_weight or settings.custom_weight
        settings = settings.model_copy(update={"custom": None, "pixel_weight": pixel})
    return HipaLoss(settings, perceptual)

"""Two baselines that learn one step from the same pairs, with the same adaptor and optimiser.

- Latent consistency distillation as LCM-LoRA does it (Luo et al. 2023, 'Latent Consistency Models',
  arXiv 2310.04378; 'LCM-LoRA', arXiv 2311.05556; diffusers' train_lcm_distill_lora_sd_wds.py): a
  skipping-step DDIM solver with guidance, boundary scaling, pseudo-Huber loss, and the student
  itself without gradient as target. One part is missing: the random guidance scale. Here guidance
  is the teacher's and fixed.
- Progressive distillation (Salimans & Ho 2022, arXiv 2202.00512): a student makes two DDIM steps of
  its teacher in one, then becomes the teacher, down to one step; with truncated SNR weighting, and
  a learning-rate decay of its own in each phase. The first teacher is guided, so that its phase
  distils guidance as well (Meng et al. 2023, arXiv 2210.03142). All phases have the same number of
  steps, and one adaptor goes through all of them.

Both add noise to the teacher's latents, as these methods add noise to data. HiPA alone makes use of
which noise led to which latents.

Shapes: B rows of a batch, C latent channels, H, W latent size, L tokens of a prompt, D width of the
text encoder, T timesteps of the schedule.
"""

from __future__ import annotations

import copy
import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DDIMScheduler
from rich.console import Console
from timing import TimedRun
from torch import Tensor

from hipa_deploy.disk.files import refuse_to_overwrite
from hipa_deploy.generate.x0 import predict_x0
from hipa_deploy.models.adaptor_folder import AdaptorMetadata, unet_sha256
from hipa_deploy.train.data.teacher_pairs import (
    Pairs,
    RowConditions,
    prompt_conditions,
    teacher_pairs,
)
from hipa_deploy.train.evaluation.sample_grid import headed_grid
from hipa_deploy.train.loop.training_steps import Watch, run_steps
from hipa_deploy.train.losses.hipa_loss import Terms
from hipa_deploy.train.model.conditions import Conditions, predict
from hipa_deploy.train.model.diffusion_model import DiffusionModel, to_uint8
from hipa_deploy.train.model.one_step import one_step_latents
from hipa_deploy.train.model.unet_adaptor import (
    PRESETS,
    adaptor_parameters,
    add_adaptor,
    save_adaptor,
    without_adaptor,
)
from hipa_deploy.train.recipes.recipe import Recipe, read_prompts

SOLVER_STEPS = 50  # of the consistency distillation's DDIM solver, as in LCM
SIGMA_DATA = 0.5  # of its boundary scaling, as in LCM
TIMESTEP_SCALING = 10.0  # of its boundary scaling, as in LCM
HUBER = 0.001  # of its pseudo-Huber loss
LossAt = Callable[[Tensor, int], tuple[Tensor, Terms]]
"""(rows int64 [B], step) -> the loss, and its terms by name."""


@dataclass
class Student:
    """A base model with an adaptor to train, and the pairs that it learns from.

    Attributes:
        recipe: The training's recipe.
        model: The base model, with the adaptor in its UNet.
        pairs: The teacher pairs.
        conditions: Prompt indices int64 [B] -> what the UNet is told of the prompts.
        metadata: What the finished adaptor says of itself.
        alpha_bar_T: alpha_bar of every timestep.
        unguided: What guidance leads away from, one row.

    """

    recipe: Recipe
    model: DiffusionModel
    pairs: Pairs
    conditions: RowConditions
    metadata: AdaptorMetadata
    alpha_bar_T: Tensor
    unguided: Conditions

    @classmethod
    def prepare(
        cls, recipe: Recipe, model_dir: Path, cache: Path | None, console: Console, method: str
    ) -> Student:
        """Load the model, make or read the teacher pairs, and add a new adaptor."""
        model = DiffusionModel.load(model_dir, text=recipe.text)
        prompts = read_prompts(recipe, model_dir)
        metadata = adaptor_metadata(recipe, model, prompts, method)
        conditions = prompt_conditions(model, prompts, console)
        pairs = teacher_pairs(
            model,
            prompts,
            recipe.teacher,
            seed=recipe.seed,
            conditions=conditions,
            cache=cache,
            console=console,
        )

        # After the pairs: the teacher that makes them has no adaptor.
        add_adaptor(
            model.unet,
            targets=metadata.targets,
            rank=metadata.rank,
            alpha=metadata.alpha,
            seed=recipe.seed,
        )
        alphas = DDIMScheduler(**model.schedule).alphas_cumprod.to(model.device)
        return cls(recipe, model, pairs, conditions, metadata, alphas, model.unguided())

    def batch(self, rows: Tensor, step: int) -> tuple[Tensor, Conditions, torch.Generator]:
        """The batch of one step.

        Args:
            rows: The pairs, int64 [B].
            step: Number of the step.

        Returns:
            The teacher's latents float32 [B, C, H, W], the conditions, and a generator of the CPU
            that depends on the recipe's seed and the step alone, so that a resumed run is exact.

        """
        generator = torch.Generator().manual_seed((self.recipe.seed << 32) + step)
        latents_BCHW = self.pairs.latents_NCHW[rows].float().to(self.model.device)
        return latents_BCHW, self.conditions(self.pairs.prompt_N[rows]), generator

    def alpha_bar(self, timestep_B: Tensor) -> Tensor:
        """alpha_bar of each row, [B, 1, 1, 1]; it is 1 at timestep -1, where there is no noise."""
        values = self.alpha_bar_T[timestep_B.clamp_min(0)]
        return torch.where(timestep_B < 0, 1.0, values).view(-1, 1, 1, 1)

    def noised(self, x0_BCHW: Tensor, timestep_B: Tensor, generator: torch.Generator) -> Tensor:
        """z = sqrt(alpha_bar) x0 + sqrt(1 - alpha_bar) eps, [B, C, H, W]."""
        # Fresh noise, not that of the pair: these methods do not know which noise led to x0.
        noise = torch.randn(x0_BCHW.shape, generator=generator).to(x0_BCHW.device)
        alpha_bar = self.alpha_bar(timestep_B)
        return alpha_bar.sqrt() * x0_BCHW + (1 - alpha_bar).sqrt() * noise

    def predict(
        self,
        z_BCHW: Tensor,
        timestep_B: Tensor,
        conditions: Conditions,
        *,
        unet: Any = None,
        guidance: float = 1.0,
    ) -> Tensor:
        """The x0 that a UNet predicts from z, [B, C, H, W].

        Args:
            z_BCHW: Noised latents.
            timestep_B: Timestep of each row.
            conditions: Of the rows.
            unet: None is the student's own.
            guidance: Classifier-free guidance, as in the teacher's sampler; 1 turns it off.

        """
        unet = unet or self.model.unet
        output = predict(unet, z_BCHW, timestep_B, conditions)
        if guidance != 1:
            unguided = self.unguided.repeated(len(conditions))
            unconditional = predict(unet, z_BCHW, timestep_B, unguided)
            output = unconditional + guidance * (output - unconditional)
        return predict_x0(z_BCHW, output, self.alpha_bar(timestep_B), self.model.prediction_type)

    def ddim(self, z_BCHW: Tensor, x0_BCHW: Tensor, timestep_B: Tensor, to_B: Tensor) -> Tensor:
        """One deterministic step from ``timestep_B`` to ``to_B``, [B, C, H, W].

        Song et al. 2020, 'Denoising Diffusion Implicit Models', equation 12 with eta = 0.
        """
        now = self.alpha_bar(timestep_B)
        then = self.alpha_bar(to_B)
        eps = (z_BCHW - now.sqrt() * x0_BCHW) / (1 - now).sqrt()
        return then.sqrt() * x0_BCHW + (1 - then).sqrt() * eps

    def train(self, run: TimedRun, loss_at: LossAt, console: Console) -> None:
        """Make the optimiser steps of the run's recipe; the same call resumes a stopped run."""
        run.resume()
        watch = Watch(self.samples, every=run.recipe.steps)
        run_steps(run, len(self.pairs), loss_at, watch, console)

    @torch.no_grad()
    def samples(self, step: int) -> np.ndarray:
        """A sample grid of one column: one-step images of the first pairs' noise."""
        rows = torch.arange(min(self.recipe.samples, len(self.pairs)))
        latents = one_step_latents(
            self.model.unet,
            self.model.noise(self.pairs.seed_N[rows].tolist()),
            self.conditions(self.pairs.prompt_N[rows]),
            timestep=self.metadata.timestep,
            alpha_bar=self.metadata.alpha_bar,
            prediction_type=self.model.prediction_type,
        )
        return headed_grid({"one step": to_uint8(self.model.decode(latents))}, (), step)

    def new_run(self, folder: Path, steps: int, phase: int = 0) -> TimedRun:
        """A run of the adaptor's weights with a fresh optimiser.

        Args:
            folder: The run's folder.
            steps: Optimiser steps.
            phase: Number of the phase; each phase draws other batches.

        """
        # The run's identity names what it depends on: a changed recipe must not resume it.
        changes = {"steps": steps, "sample_every": steps, "seed": self.recipe.seed + phase}
        weights = adaptor_parameters(self.model.unet)
        optimizer = torch.optim.AdamW(
            weights.values(), weight_decay=self.recipe.optimiser.weight_decay
        )
        identity = self.metadata.model_dump(mode="json")
        identity["recipe"] = identity["recipe"] | changes
        recipe = self.recipe.model_copy(update=changes)
        return TimedRun(folder, weights, optimizer, identity, recipe)


def train_consistency(
    recipe: Recipe, model_dir: Path, out: Path, *, cache: Path | None, console: Console
) -> Path:
    """Latent consistency distillation into the adaptor folder ``out``; the same call resumes."""
    refuse_to_overwrite(out)
    student = Student.prepare(recipe, model_dir, cache, console, "latent consistency distillation")
    skip = len(student.alpha_bar_T) // SOLVER_STEPS

    def loss_at(rows: Tensor, step: int) -> tuple[Tensor, Terms]:
        # A random timestep of the solver, and the one that its step leads to.
        x0, conditions, generator = student.batch(rows, step)
        drawn = torch.randint(1, SOLVER_STEPS + 1, (len(x0),), generator=generator)
        now = drawn.to(x0.device) * skip - 1
        then = (now - skip).clamp_min(0)
        z = student.noised(x0, now, generator)

        # The target: the student itself, at the end of one guided solver step of the base model.
        with torch.no_grad():
            with without_adaptor(student.model.unet):
                guided = student.predict(z, now, conditions, guidance=recipe.teacher.guidance)
            nearer = student.ddim(z, guided, now, then)
            target = consistent(student.predict(nearer, then, conditions), nearer, then)

        error = consistent(student.predict(z, now, conditions), z, now) - target
        loss = ((error.square() + HUBER**2).sqrt() - HUBER).mean()
        return loss, {"consistency": loss}

    run = student.new_run(out.with_name(out.name + ".run"), recipe.steps)
    student.train(run, loss_at, console)
    return save_adaptor(student.model.unet, student.metadata, student.model.schedule, out)


def consistent(x0_BCHW: Tensor, z_BCHW: Tensor, timestep_B: Tensor) -> Tensor:
    """The consistency function c_skip z + c_out x0, which is z itself at timestep 0.

    Song et al. 2023, 'Consistency Models', equation 5, with LCM's constants.
    """
    t = TIMESTEP_SCALING * timestep_B.float().view(-1, 1, 1, 1)
    norm = t.square() + SIGMA_DATA**2
    return SIGMA_DATA**2 / norm * z_BCHW + t / norm.sqrt() * x0_BCHW


def train_progressive(
    recipe: Recipe, model_dir: Path, out: Path, *, cache: Path | None, console: Console
) -> Path:
    """Progressive distillation into the adaptor folder ``out``.

    The same call resumes a stopped training in the phase in which it was.
    """
    refuse_to_overwrite(out)
    student = Student.prepare(recipe, model_dir, cache, console, "progressive distillation")
    for phase, (halved, steps) in enumerate(phases(recipe.teacher.steps, recipe.steps)):
        # The student of the phase before is the teacher of this one. Only the first is guided.
        teacher = copy.deepcopy(student.model.unet).requires_grad_(False)
        guidance = recipe.teacher.guidance if phase == 0 else 1.0
        loss_at = progressive_loss(student, teacher, halved, guidance, offset=phase * recipe.steps)
        run = student.new_run(out.with_name(out.name + ".run") / f"phase-{phase}", steps, phase)
        student.train(run, loss_at, console)
    return save_adaptor(student.model.unet, student.metadata, student.model.schedule, out)


def phases(teacher_steps: int, steps: int) -> list[tuple[int, int]]:
    """The phases of a progressive distillation.

    Args:
        teacher_steps: Sampling steps of the first teacher, rounded up to a power of two: 25 count
            as 32, so that the students have 16, 8, 4, 2 and 1.
        steps: Optimiser steps of all phases together.

    Returns:
        (the student's sampling steps, optimiser steps) of each phase.

    """
    count = math.ceil(math.log2(teacher_steps))
    result = []
    for phase in range(count):
        # Rounding the ends rather than the lengths keeps the sum exact.
        share = steps * (phase + 1) // count - steps * phase // count
        result.append((2 ** (count - 1 - phase), share))
    return result


def progressive_loss(
    student: Student, teacher: Any, halved: int, guidance: float, offset: int
) -> LossAt:
    """The loss of one phase: one step of the student does two of the teacher's.

    Salimans & Ho 2022, algorithm 2.

    Args:
        student: The student.
        teacher: The UNet of the phase before.
        halved: Sampling steps of the student.
        guidance: The teacher's guidance.
        offset: Added to the number of a step, so that phases draw different noise.

    """
    length = len(student.alpha_bar_T)

    def timestep(i_B: Tensor) -> Tensor:
        return (i_B * length / halved).round().long() - 1

    def loss_at(rows: Tensor, step: int) -> tuple[Tensor, Terms]:
        # A random step of the student, with the teacher's timestep in its middle.
        x0, conditions, generator = student.batch(rows, offset + step)
        i = torch.randint(1, halved + 1, (len(x0),), generator=generator).to(x0.device)
        now = timestep(i)
        middle = timestep(i - 0.5)
        then = timestep(i - 1)
        z = student.noised(x0, now, generator)

        # The target: where two steps of the teacher lead.
        with torch.no_grad():
            x0_first = student.predict(z, now, conditions, unet=teacher, guidance=guidance)
            first = student.ddim(z, x0_first, now, middle)
            x0_second = student.predict(first, middle, conditions, unet=teacher, guidance=guidance)
            second = student.ddim(first, x0_second, middle, then)
            target = two_steps_in_one(z, second, student.alpha_bar(now), student.alpha_bar(then))

        # Truncated SNR weighting (section 4): without it the steps near noise weigh nothing.
        alpha_bar = student.alpha_bar(now)
        weight = (alpha_bar / (1 - alpha_bar)).clamp_min(1)
        loss = (weight * (student.predict(z, now, conditions) - target).square()).mean()
        return loss, {"progressive": loss}

    return loss_at


def two_steps_in_one(
    z_BCHW: Tensor, second_BCHW: Tensor, now_B111: Tensor, then_B111: Tensor
) -> Tensor:
    """The x0 from which one DDIM step from z ends at ``second_BCHW``.

    Salimans & Ho 2022, equation 8.

    Args:
        z_BCHW: Latents before the step.
        second_BCHW: Latents after the teacher's two steps.
        now_B111: alpha_bar before the step.
        then_B111: alpha_bar after it.

    """
    ratio = ((1 - then_B111) / (1 - now_B111)).sqrt()
    return (second_BCHW - ratio * z_BCHW) / (then_B111.sqrt() - ratio * now_B111.sqrt())


def adaptor_metadata(
    recipe: Recipe, model: DiffusionModel, prompts: list[str], method: str
) -> AdaptorMetadata:
    """The adaptor's metadata as hipa-train writes them, with the method's name in the recipe."""
    # The file's name rather than its path: an adaptor must not tell where its author keeps files.
    settings = recipe.adaptor
    prompts_name = Path(recipe.prompts).name
    return AdaptorMetadata(
        base_unet_sha256=unet_sha256(model.folder),
        prompts_sha256=hashlib.sha256("\n".join(prompts).encode()).hexdigest(),
        rank=settings.rank,
        alpha=settings.alpha or settings.rank,
        targets=PRESETS[settings.preset],
        timestep=recipe.timestep,
        prediction_type=model.prediction_type,
        alpha_bar=model.alpha_bar(recipe.timestep),
        resolution=model.resolution,
        steps_trained=recipe.steps,
        recipe=recipe.model_dump() | {"prompts": prompts_name, "method": method},
    )

"""Two baselines that learn one step from the same pairs, with the same adaptor and optimiser. Small, and honest.

- Latent consistency distillation as LCM-LoRA does it (Luo et al. 2023, 'Latent Consistency Models', arXiv 2310.04378;
  'LCM-LoRA', arXiv 2311.05556; diffusers' train_lcm_distill_lora_sd_wds.py): skipping-step DDIM solver with guidance,
  boundary scaling, pseudo-Huber loss, the student itself without gradient as target. Left out: a random guidance scale
  (ours is the teacher's, fixed).
- Progressive distillation (Salimans & Ho 2022, arXiv 2202.00512): a student makes two DDIM steps of its teacher in one,
  then becomes the teacher, down to one step; truncated SNR weighting, its own learning-rate decay each time. The first
  teacher is guided, so that phase distils guidance as well (Meng et al. 2023, arXiv 2210.03142). The steps are shared
  out equally; one adaptor is carried through all phases.

Both noise the teacher's latents, as the methods noise data; HiPA alone uses which noise led to which of them.
"""

from __future__ import annotations

import copy
import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler
from rich.console import Console
from timing import TimedRun
from torch import Tensor

from hipa_deploy.files import refuse_to_overwrite
from hipa_deploy.generate.x0 import predict_x0
from hipa_deploy.models.adaptor_folder import AdaptorMetadata, unet_sha256
from hipa_deploy.train.data.teacher_pairs import Pairs, RowFunction, prompt_contexts, teacher_pairs
from hipa_deploy.train.loop.run import run_steps
from hipa_deploy.train.losses.hipa_loss import Terms
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

SOLVER_STEPS = 50  # of the consistency distillation's DDIM solver
SIGMA_DATA, TIMESTEP_SCALING = 0.5, 10.0  # of its boundary scaling
HUBER = 0.001
LossAt = Callable[[Tensor, int], tuple[Tensor, Terms]]


@dataclass
class Student:
    """A base model with an adaptor to train, and the pairs that it learns from."""

    recipe: Recipe
    model: DiffusionModel
    pairs: Pairs
    context: RowFunction
    metadata: AdaptorMetadata
    alpha_bar_T: Tensor
    empty_1LD: Tensor

    @classmethod
    def prepare(
        cls, recipe: Recipe, model_dir: Path, cache: Path | None, console: Console, method: str
    ) -> Student:
        model = DiffusionModel.load(model_dir)
        prompts = read_prompts(recipe, model_dir)
        metadata = adaptor_metadata(recipe, model, prompts, method)
        context = prompt_contexts(model, prompts, console)
        pairs = teacher_pairs(
            model,
            prompts,
            recipe.teacher,
            seed=recipe.seed,
            context=context,
            cache=cache,
            console=console,
        )
        add_adaptor(
            model.unet,
            targets=metadata.targets,
            rank=metadata.rank,
            alpha=metadata.alpha,
            seed=recipe.seed,
        )
        alphas = DDIMScheduler(**model.schedule).alphas_cumprod
        return cls(recipe, model, pairs, context, metadata, alphas, model.context([""]))

    def batch(self, rows: Tensor, step: int) -> tuple[Tensor, Tensor, torch.Generator]:
        """Teacher latents [B, C, h, w] and contexts [B, L, D] of these rows, a generator from (seed, step)."""
        generator = torch.Generator().manual_seed((self.recipe.seed << 32) + step)
        return (
            self.pairs.latents_NCHW[rows].float(),
            self.context(self.pairs.prompt_N[rows]),
            generator,
        )

    def alpha_bar(self, timestep_B: Tensor) -> Tensor:
        """[B, 1, 1, 1]; at timestep -1 there is no noise: 1."""
        values = self.alpha_bar_T[timestep_B.clamp_min(0)]
        return torch.where(timestep_B < 0, torch.ones(()), values).view(-1, 1, 1, 1)

    def noised(self, x0_BCHW: Tensor, timestep_B: Tensor, generator: torch.Generator) -> Tensor:
        """z = a x0 + s eps."""
        noise = torch.randn(x0_BCHW.shape, generator=generator)
        alpha_bar = self.alpha_bar(timestep_B)
        return alpha_bar.sqrt() * x0_BCHW + (1 - alpha_bar).sqrt() * noise

    def predict(
        self,
        z_BCHW: Tensor,
        timestep_B: Tensor,
        context_BLD: Tensor,
        *,
        unet: Any = None,
        guidance: float = 1.0,
    ) -> Tensor:
        """x0 as the UNet sees it, [B, C, h, w]; with guidance as the teacher's sampler has it."""
        unet = unet or self.model.unet
        output = unet(z_BCHW, timestep_B, context_BLD, return_dict=False)[0]
        if guidance != 1:
            empty = unet(
                z_BCHW, timestep_B, self.empty_1LD.expand_as(context_BLD), return_dict=False
            )[0]
            output = empty + guidance * (output - empty)
        return predict_x0(z_BCHW, output, self.alpha_bar(timestep_B), self.model.prediction_type)

    def ddim(self, z_BCHW: Tensor, x0_BCHW: Tensor, timestep_B: Tensor, to_B: Tensor) -> Tensor:
        """One deterministic step (Song et al. 2020, equation 12 with eta = 0)."""
        now, then = self.alpha_bar(timestep_B), self.alpha_bar(to_B)
        eps = (z_BCHW - now.sqrt() * x0_BCHW) / (1 - now).sqrt()
        return then.sqrt() * x0_BCHW + (1 - then).sqrt() * eps

    def train(self, run: TimedRun, loss_at: LossAt, console: Console) -> None:
        """The optimiser steps of the run's recipe, resumable."""
        run.resume()
        run_steps(run, len(self.pairs), loss_at, self.samples, console)

    @torch.no_grad()
    def samples(self) -> list[Tensor]:
        """One-step images of the first pairs' noise, as the columns of a sample grid."""
        rows = torch.arange(min(self.recipe.samples, len(self.pairs)))
        latents = one_step_latents(
            self.model.unet,
            self.model.noise(self.pairs.seed_N[rows].tolist()),
            self.context(self.pairs.prompt_N[rows]),
            timestep=self.metadata.timestep,
            alpha_bar=self.metadata.alpha_bar,
            prediction_type=self.model.prediction_type,
        )
        return [to_uint8(self.model.decode(latents))]

    def new_run(self, folder: Path, steps: int, phase: int = 0) -> TimedRun:
        """A run of ``steps`` of the adaptor's weights with a fresh optimiser; another phase draws other batches."""
        changes = {"steps": steps, "sample_every": steps, "seed": self.recipe.seed + phase}
        weights = adaptor_parameters(self.model.unet)
        optimizer = torch.optim.AdamW(
            weights.values(), weight_decay=self.recipe.optimiser.weight_decay
        )
        values = self.metadata.model_dump(mode="json")
        identity = values | {"recipe": values["recipe"] | changes}
        return TimedRun(
            folder, weights, optimizer, identity, self.recipe.model_copy(update=changes)
        )


def train_consistency(
    recipe: Recipe, model_dir: Path, out: Path, *, cache: Path | None, console: Console
) -> Path:
    """Latent consistency distillation into the adaptor folder ``out``; the same call resumes."""
    refuse_to_overwrite(out)
    student = Student.prepare(recipe, model_dir, cache, console, "latent consistency distillation")
    skip = len(student.alpha_bar_T) // SOLVER_STEPS

    def loss_at(rows: Tensor, step: int) -> tuple[Tensor, Terms]:
        x0, context, generator = student.batch(rows, step)
        now = torch.randint(1, SOLVER_STEPS + 1, (len(x0),), generator=generator) * skip - 1
        then = (now - skip).clamp_min(0)
        z = student.noised(x0, now, generator)
        with torch.no_grad():
            with without_adaptor(student.model.unet):
                guided = student.predict(z, now, context, guidance=recipe.teacher.guidance)
            nearer = student.ddim(z, guided, now, then)
            target = consistent(student.predict(nearer, then, context), nearer, then)
        error = consistent(student.predict(z, now, context), z, now) - target
        loss = ((error.square() + HUBER**2).sqrt() - HUBER).mean()
        return loss, {"consistency": loss}

    student.train(student.new_run(out.with_name(out.name + ".run"), recipe.steps), loss_at, console)
    return save_adaptor(student.model.unet, student.metadata, student.model.schedule, out)


def consistent(x0_BCHW: Tensor, z_BCHW: Tensor, timestep_B: Tensor) -> Tensor:
    """c_skip z + c_out x0: z itself at timestep 0 (Song et al. 2023, equation 5, with LCM's constants)."""
    t = TIMESTEP_SCALING * timestep_B.float().view(-1, 1, 1, 1)
    norm = t.square() + SIGMA_DATA**2
    return SIGMA_DATA**2 / norm * z_BCHW + t / norm.sqrt() * x0_BCHW


def train_progressive(
    recipe: Recipe, model_dir: Path, out: Path, *, cache: Path | None, console: Console
) -> Path:
    """Progressive distillation into the adaptor folder ``out``; the same call resumes, in the phase it was in."""
    refuse_to_overwrite(out)
    student = Student.prepare(recipe, model_dir, cache, console, "progressive distillation")
    for phase, (halved, steps) in enumerate(phases(recipe.teacher.steps, recipe.steps)):
        teacher = copy.deepcopy(student.model.unet).requires_grad_(False)
        guidance = recipe.teacher.guidance if phase == 0 else 1.0
        loss_at = progressive_loss(student, teacher, halved, guidance, offset=phase * recipe.steps)
        run = student.new_run(out.with_name(out.name + ".run") / f"phase-{phase}", steps, phase)
        student.train(run, loss_at, console)
    return save_adaptor(student.model.unet, student.metadata, student.model.schedule, out)


def phases(teacher_steps: int, steps: int) -> list[tuple[int, int]]:
    """(the student's sampling steps, optimiser steps) a phase: 25 teacher steps count as 32, so 16, 8, 4, 2, 1."""
    count = math.ceil(math.log2(teacher_steps))
    share = [steps * (p + 1) // count - steps * p // count for p in range(count)]
    return [(2 ** (count - 1 - p), share[p]) for p in range(count)]


def progressive_loss(
    student: Student, teacher: Any, halved: int, guidance: float, offset: int
) -> LossAt:
    """The loss of one phase: one step of ``halved`` does two of the teacher's (Salimans & Ho 2022, algorithm 2)."""
    length = len(student.alpha_bar_T)

    def timestep(i_B: Tensor) -> Tensor:
        return (i_B * length / halved).round().long() - 1

    def loss_at(rows: Tensor, step: int) -> tuple[Tensor, Terms]:
        x0, context, generator = student.batch(rows, offset + step)
        i = torch.randint(1, halved + 1, (len(x0),), generator=generator)
        now, middle, then = timestep(i), timestep(i - 0.5), timestep(i - 1)
        z = student.noised(x0, now, generator)
        with torch.no_grad():
            first = student.ddim(
                z, student.predict(z, now, context, unet=teacher, guidance=guidance), now, middle
            )
            x0_second = student.predict(first, middle, context, unet=teacher, guidance=guidance)
            second = student.ddim(first, x0_second, middle, then)
            target = two_steps_in_one(z, second, student.alpha_bar(now), student.alpha_bar(then))
        alpha_bar = student.alpha_bar(now)
        weight = (alpha_bar / (1 - alpha_bar)).clamp_min(1)
        loss = (weight * (student.predict(z, now, context) - target).square()).mean()
        return loss, {"progressive": loss}

    return loss_at


def two_steps_in_one(
    z_BCHW: Tensor, second_BCHW: Tensor, now_B111: Tensor, then_B111: Tensor
) -> Tensor:
    """The x0 from which one DDIM step from z ends at ``second`` (Salimans & Ho 2022, equation 8)."""
    ratio = ((1 - then_B111) / (1 - now_B111)).sqrt()
    return (second_BCHW - ratio * z_BCHW) / (then_B111.sqrt() - ratio * now_B111.sqrt())


def adaptor_metadata(
    recipe: Recipe, model: DiffusionModel, prompts: list[str], method: str
) -> AdaptorMetadata:
    """As hipa-train writes it, with the method's name in the recipe."""
    settings = recipe.adaptor
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
        recipe=recipe.model_dump() | {"prompts": Path(recipe.prompts).name, "method": method},
    )

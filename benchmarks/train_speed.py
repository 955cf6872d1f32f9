"""Seconds a training step: this toolkit's whole loop beside a plain diffusers + peft loop with the same losses.

    python benchmarks/train_speed.py --steps 30 --out train_speed.json
    python benchmarks/train_speed.py --warm-up --steps 30      # the latent warm-up's steps, without decoding

Ours is `train_adaptor` as it is, with progress bar, scalars, gradient clipping and the batch drawn and its noise made
in each step. The plain loop is what a script would be: one forward, the losses, backward, clip, step; noise, text
contexts and target images are tensors that it has already. Both take the same rows of the same pairs on the same
model in one process, one step of each in turn, so that what disturbs the machine disturbs both.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import torch
import typer
from diffusers import StableDiffusionPipeline
from peft import LoraConfig
from rich.console import Console
from torch import Tensor

from hipa_deploy.embedded import MODEL
from hipa_deploy.train.data.teacher_pairs import prompt_contexts, teacher_pairs
from hipa_deploy.train.loop import run
from hipa_deploy.train.losses.hipa_loss import hipa_loss
from hipa_deploy.train.model.diffusion_model import DiffusionModel
from hipa_deploy.train.model.unet_adaptor import PRESETS
from hipa_deploy.train.recipes.recipe import Recipe, load_recipe, read_prompts
from hipa_deploy.train.train_adaptor import train_adaptor

DISCARDED = 3  # first steps of each, while allocators and the processor's caches settle


def plain_loop(model_dir: Path, recipe: Recipe, cache: Path) -> Callable[[Tensor], float]:
    """A step of the plain loop, for the rows given: its loss."""
    model = DiffusionModel.load(model_dir, "cpu")
    prompts = read_prompts(recipe, model_dir)
    context = prompt_contexts(model, prompts)
    pairs = teacher_pairs(
        model, prompts, recipe.teacher, seed=recipe.seed, context=context, cache=cache
    )
    noise, contexts, latents = (
        model.noise(pairs.seed_N.tolist()),
        context(pairs.prompt_N),
        pairs.latents_NCHW.float(),
    )
    with torch.no_grad():
        images = torch.cat([model.decode(part).clamp(0, 1) for part in latents.split(16)])

    pipe = StableDiffusionPipeline.from_pretrained(model_dir, safety_checker=None)
    unet, vae = pipe.unet.requires_grad_(False), pipe.vae.requires_grad_(False)
    rank, targets = recipe.adaptor.rank, list(PRESETS[recipe.adaptor.preset])
    unet.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=targets))
    weights = [weight for weight in unet.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=recipe.optimiser.learning_rate, weight_decay=1e-2)
    loss_function = hipa_loss(recipe.loss)
    alpha_bar = pipe.scheduler.alphas_cumprod[recipe.timestep]

    def step(rows: Tensor) -> float:
        z = noise[rows]
        eps = unet(z, torch.full((len(rows),), recipe.timestep), contexts[rows]).sample
        x0 = (z - (1 - alpha_bar).sqrt() * eps) / alpha_bar.sqrt()
        if recipe.loss.latent_warmup_steps:
            loss, _ = loss_function.warmup_loss(x0, latents[rows])
        else:
            image = vae.decode(x0 / vae.config.scaling_factor).sample / 2 + 0.5
            loss, _ = loss_function(image, images[rows], x0, latents[rows])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, recipe.optimiser.clip_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    return step


class Clock:
    """Wall and processor seconds since the last call: the second does not see what else the machine is doing."""

    def __init__(self) -> None:
        self.last = (time.perf_counter(), time.process_time())

    def lap(self) -> tuple[float, float]:
        before, self.last = self.last, (time.perf_counter(), time.process_time())
        return self.last[0] - before[0], self.last[1] - before[1]


def measure(recipe: Recipe, model_dir: Path, work: Path) -> dict[str, list[tuple[float, float]]]:
    """Seconds of every step of both, in turn: the plain step runs where ours is about to draw its batch."""
    step, seconds = plain_loop(model_dir, recipe, work), {"plain": [], "ours": []}
    original, clock = run.batch_rows, Clock()

    def between(*arguments: int) -> Tensor:
        seconds["ours"].append(clock.lap())
        step(original(*arguments))
        seconds["plain"].append(clock.lap())
        return original(*arguments)

    run.batch_rows = between
    try:
        train_adaptor(recipe, model_dir, work / "adaptor", cache=work, device="cpu")
    finally:
        run.batch_rows = original
    # Our first lap is all that comes before the first step; its own time ends with the next lap.
    pairs = {"plain": seconds["plain"][:-1], "ours": seconds["ours"][1:]}
    return {name: laps[DISCARDED:] for name, laps in pairs.items()}


def main(
    steps: Annotated[int, typer.Option(help="Steps of each that count.")] = 30,
    model: Annotated[Path, typer.Option(help="Diffusers folder with a prompts.txt.")] = MODEL,
    warm_up: Annotated[
        bool, typer.Option("--warm-up", help="Time the latent warm-up's steps.")
    ] = False,
    out: Annotated[Path | None, typer.Option(help="Write the results as JSON.")] = None,
) -> None:
    """Time both loops, the emoji recipe's adaptor and batch."""
    total = steps + DISCARDED + 1  # our last step ends with a checkpoint and samples: not counted
    overrides = {
        "steps": total,
        "checkpoint_every": total,
        "sample_every": total,
        "loss.latent_warmup_steps": total if warm_up else 0,
        "teacher.pairs": 64,
        "teacher.steps": 2,
    }
    with tempfile.TemporaryDirectory() as work:
        seconds = measure(load_recipe("emoji", overrides), model, Path(work))
    machine = f"{os.cpu_count()} cores, {platform.machine()}, torch {torch.__version__}"
    results: dict[str, object] = {"seconds": seconds, "machine": machine}
    for index, kind in enumerate(("wall", "processor")):
        ours, plain = ([lap[index] for lap in seconds[name]] for name in ("ours", "plain"))
        ratio = results[f"{kind}_ratio"] = statistics.median(
            p / o for p, o in zip(plain, ours, strict=True)
        )
        medians = (
            f"ours {statistics.median(ours):.3f} s, plain {statistics.median(plain):.3f} s a step"
        )
        Console().print(
            f"{kind}: {medians}; ours is {ratio:.3f} times as fast (median of {len(ours)} paired ratios)"
        )
    Console().print(machine)
    if out:
        out.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    typer.run(main)

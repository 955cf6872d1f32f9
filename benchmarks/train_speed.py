"""Seconds of a training step: this toolkit compared with a plain diffusers + peft loop.

Purpose: what the training loop costs beyond the arithmetic that any loop with these losses needs.

Commands, from the repository's root::

    python benchmarks/train_speed.py --steps 30 --out train_speed.json
    python benchmarks/train_speed.py --warm-up --steps 30   # steps of the latent warm-up

Expected time: about three minutes for 30 steps, as one thread of a CPU that had other work as well.

Ours is `train_adaptor` as it is, with progress bar, scalars and gradient clipping; in each step it
draws the batch and makes its noise. The plain loop is what a script would be: one forward pass, the
losses, backward, clip, step. Noise, text contexts and target images are tensors that it has
already. Both take the same rows of the same pairs on the same model in one process, one step of
each in turn, so that other work on the machine disturbs both alike.

Shapes: N teacher pairs, B rows of a batch.
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
from hipa_deploy.train.data.teacher_pairs import prompt_conditions, teacher_pairs
from hipa_deploy.train.loop import training_steps
from hipa_deploy.train.losses.hipa_loss import hipa_loss
from hipa_deploy.train.model.diffusion_model import DiffusionModel
from hipa_deploy.train.model.mixed_precision import DTYPES, computed_precision
from hipa_deploy.train.model.unet_adaptor import PRESETS
from hipa_deploy.train.recipes.recipe import Recipe, load_recipe, read_prompts
from hipa_deploy.train.train_adaptor import train_adaptor

DISCARDED = 3  # first steps of each, while allocators and the processor's caches settle


def plain_loop(
    model_dir: Path, recipe: Recipe, cache: Path, device: str = "cpu"
) -> Callable[[Tensor], float]:
    """Prepare the plain loop, in the recipe's precision and with its gradient checkpointing.

    Args:
        model_dir: Diffusers folder.
        recipe: The training's recipe.
        cache: Folder of the teacher pairs' cache.
        device: Torch device.

    Returns:
        A function that makes one step with the rows int64 [B] and returns its loss.

    """
    model = DiffusionModel.load(model_dir, device, text=recipe.text)
    prompts = read_prompts(recipe, model_dir)
    conditions = prompt_conditions(model, prompts)
    pairs = teacher_pairs(
        model, prompts, recipe.teacher, seed=recipe.seed, conditions=conditions, cache=cache
    )

    # Everything that a step reads, made once for all pairs.
    noise = model.noise(pairs.seed_N.tolist()).to(device)
    contexts = conditions(pairs.prompt_N).context_BLD.to(device)
    latents = pairs.latents_NCHW.float().to(device)
    with torch.no_grad():
        images = torch.cat([model.decode(part).clamp(0, 1) for part in latents.split(16)])

    # The student, with peft's adaptor of the same shape.
    pipe = StableDiffusionPipeline.from_pretrained(
        model_dir, safety_checker=None, torch_dtype=torch.float32
    ).to(device)
    unet = pipe.unet.requires_grad_(False)
    vae = pipe.vae.requires_grad_(False)
    rank = recipe.adaptor.rank
    targets = list(PRESETS[recipe.adaptor.preset])
    unet.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=targets))
    weights = [weight for weight in unet.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=recipe.optimiser.learning_rate, weight_decay=1e-2)
    loss_function = hipa_loss(recipe.loss).to(device)
    alpha_bar = pipe.scheduler.alphas_cumprod[recipe.timestep].to(device)
    if recipe.gradient_checkpointing:
        # diffusers recomputes activations only in a part that is training.
        unet.train().enable_gradient_checkpointing()
        vae.train().enable_gradient_checkpointing()
    precision = computed_precision(recipe.mixed_precision, torch.device(device))
    dtype = DTYPES.get(precision, torch.float32)
    mixed = precision != "no"
    kind = torch.device(device).type
    scaler = torch.amp.GradScaler(kind, enabled=recipe.mixed_precision == "fp16")
    v_prediction = pipe.scheduler.config.prediction_type == "v_prediction"

    def step(rows: Tensor) -> float:
        rows = rows.to(device)
        # x0 of one step at the recipe's timestep, from the predicted noise or velocity.
        z = noise[rows]
        timestep = torch.full((len(rows),), recipe.timestep, device=device)
        with torch.autocast(kind, dtype, enabled=mixed):
            predicted = unet(z, timestep, contexts[rows]).sample
        if v_prediction:
            x0 = alpha_bar.sqrt() * z - (1 - alpha_bar).sqrt() * predicted
        else:
            x0 = (z - (1 - alpha_bar).sqrt() * predicted) / alpha_bar.sqrt()
        if recipe.loss.latent_warmup_steps:
            loss, _ = loss_function.warmup_loss(x0, latents[rows])
        else:
            with torch.autocast(kind, dtype, enabled=mixed):
                decoded = vae.decode(x0 / vae.config.scaling_factor).sample
            image = decoded.float() / 2 + 0.5
            loss, _ = loss_function(image, images[rows], x0, latents[rows])

        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(weights, recipe.optimiser.clip_norm)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    return step


class Clock:
    """Wall and processor seconds since the last call.

    Processor seconds do not include what other processes do.
    """

    def __init__(self) -> None:
        self.last_wall = time.perf_counter()
        self.last_processor = time.process_time()

    def lap(self) -> tuple[float, float]:
        """(wall, processor) seconds since the last lap."""
        wall = time.perf_counter()
        processor = time.process_time()
        lap = (wall - self.last_wall, processor - self.last_processor)
        self.last_wall = wall
        self.last_processor = processor
        return lap


def measure(recipe: Recipe, model_dir: Path, work: Path) -> dict[str, list[tuple[float, float]]]:
    """Time every step of both loops, in turn.

    Args:
        recipe: The training's recipe.
        model_dir: Diffusers folder.
        work: Folder for the cache and the adaptor.

    Returns:
        (wall, processor) seconds of each step of 'plain' and 'ours', without the first ones.

    """
    plain_step = plain_loop(model_dir, recipe, work)
    plain_laps: list[tuple[float, float]] = []
    our_laps: list[tuple[float, float]] = []
    original = training_steps.batch_rows
    clock = Clock()

    # Our loop calls batch_rows at the beginning of each step: there the plain loop makes its own.
    def make_plain_step(*arguments: int) -> Tensor:
        our_laps.append(clock.lap())
        plain_step(original(*arguments))
        plain_laps.append(clock.lap())
        return original(*arguments)

    training_steps.batch_rows = make_plain_step
    try:
        train_adaptor(recipe, model_dir, work / "adaptor", cache=work, device="cpu")
    finally:
        training_steps.batch_rows = original

    # Our first lap is all that comes before the first step, so a step of ours ends with the lap
    # after it, and the last plain step has no partner.
    plain = plain_laps[:-1]
    ours = our_laps[1:]
    return {"plain": plain[DISCARDED:], "ours": ours[DISCARDED:]}


def main(
    steps: Annotated[int, typer.Option(help="Steps of each that count.")] = 30,
    model: Annotated[Path, typer.Option(help="Diffusers folder with a prompts.txt.")] = MODEL,
    warm_up: Annotated[
        bool, typer.Option("--warm-up", help="Time the latent warm-up's steps.")
    ] = False,
    out: Annotated[Path | None, typer.Option(help="Write the results as JSON.")] = None,
) -> None:
    """Time both loops, the emoji recipe's adaptor and batch."""
    # Our last step ends with a checkpoint and samples, which are not counted: one step more.
    total = steps + DISCARDED + 1
    overrides = {
        "steps": total,
        "checkpoint_every": total,
        "sample_every": total,
        "loss.latent_warmup_steps": total if warm_up else 0,
        "teacher.pairs": 64,
        "teacher.steps": 2,
        "held_out.prompts": None,
    }
    with tempfile.TemporaryDirectory() as work:
        seconds = measure(load_recipe("emoji", overrides), model, Path(work))
    machine = f"{os.cpu_count()} cores, {platform.machine()}, torch {torch.__version__}"
    results: dict[str, object] = {"seconds": seconds, "machine": machine}
    for index, kind in enumerate(("wall", "processor")):
        ours = [lap[index] for lap in seconds["ours"]]
        plain = [lap[index] for lap in seconds["plain"]]
        ratios = [plain_lap / own_lap for plain_lap, own_lap in zip(plain, ours, strict=True)]
        ratio = statistics.median(ratios)
        results[f"{kind}_ratio"] = ratio
        our_median = statistics.median(ours)
        plain_median = statistics.median(plain)
        Console().print(
            f"{kind}: ours {our_median:.3f} s, plain {plain_median:.3f} s a step; ours is "
            f"{ratio:.3f} times as fast (median of {len(ours)} paired ratios)"
        )
    Console().print(machine)
    if out:
        out.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)

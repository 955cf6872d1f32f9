"""Teacher pairs: (prompt, noise, latents) of a deterministic multi-step sampler, cached by what they depend on.

A shard holds latents, prompt indices and noise seeds of consecutive pairs; noise itself comes back from its seed.
The cache folder's name hashes model weights, prompts, sampler settings and seed, so no stale pair is ever found,
and a run that was stopped, or asks for more pairs, makes only what is missing. Several processes divide the shards.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler
from rich.console import Console
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from hipa_deploy.errors import HipaError
from hipa_deploy.files import user_cache, write_file
from hipa_deploy.hashing import folder_sha256
from hipa_deploy.tasks import start_latents
from hipa_deploy.train.loop.processes import Processes
from hipa_deploy.train.loop.progress_bar import ProgressBar
from hipa_deploy.train.model.diffusion_model import DiffusionModel
from hipa_deploy.train.model.mixed_precision import in_precision
from hipa_deploy.train.recipes.recipe import TeacherSettings

TABLE_BYTES = 2 << 30
CHUNK = 16
Rows = Callable[[Tensor], Tensor]  # row indices int64 [B] -> rows [B, ...]


@dataclass(frozen=True)
class Edits:
    """What a teacher's edits start from: images and their latents, timestep and prompt to follow of each, int64 [N].

    ``key`` says what they depend on, how many there are left out, and so what the cache of the edits depends on.
    """

    images: Rows
    source: Rows
    prompt_N: Tensor
    timestep_N: Tensor
    key: dict[str, Any]


@dataclass(frozen=True)
class Pairs:
    """N teacher pairs: latents [N, C, H, W] as stored, index into the prompts and noise seed, int64 [N]."""

    latents_NCHW: Tensor
    prompt_N: Tensor
    seed_N: Tensor

    def __len__(self) -> int:
        return len(self.seed_N)


@torch.no_grad()
def teacher_latents(
    model: DiffusionModel,
    noise_BCHW: Tensor,
    context_BLD: Tensor,
    empty_1LD: Tensor,
    teacher: TeacherSettings,
    first: int | None = None,
) -> Tensor:
    """Integrate the probability-flow ODE from the noise at the last timestep: float32 latents [B, C, H, W].

    From noised latents at timestep ``first``, which must be one of the sampler's, it is what an edit is.
    Classifier-free guidance (Ho & Salimans 2022): empty and given prompt go through the UNet as one batch.
    """
    unet = in_precision(model.unet, teacher.mixed_precision, model.device)
    scheduler = teacher_scheduler(model.schedule, teacher.sampler)
    scheduler.set_timesteps(teacher.steps, device=model.device)
    guided = teacher.guidance != 1
    if guided:
        context_BLD = torch.cat([empty_1LD.expand_as(context_BLD), context_BLD])
    x_BCHW = noise_BCHW
    for timestep in scheduler.timesteps[
        scheduler.timesteps <= (first if first is not None else np.inf)
    ]:
        inputs = torch.cat([x_BCHW, x_BCHW]) if guided else x_BCHW
        output = unet(inputs, timestep, context_BLD, return_dict=False)[0].float()
        if guided:
            empty, given = output.chunk(2)
            output = empty + teacher.guidance * (given - empty)
        x_BCHW = scheduler.step(output, timestep, x_BCHW).prev_sample
    return x_BCHW


def edited_latents(
    model: DiffusionModel,
    edits: Edits,
    rows: Tensor,
    noise_BCHW: Tensor,
    context_BLD: Tensor,
    empty_1LD: Tensor,
    teacher: TeacherSettings,
) -> Tensor:
    """The teacher's own edits of pairs ``rows``, int64 [B]: it finishes what is noised to each one's timestep."""
    source_BCHW, timestep_B = edits.source(rows), edits.timestep_N[rows]
    latents_BCHW = torch.empty_like(noise_BCHW)
    for timestep in timestep_B.unique().tolist():
        chosen = timestep_B == timestep
        given = {"noise": noise_BCHW[chosen], "source": source_BCHW[chosen]}
        start = start_latents("edit", given, model.alpha_bar(timestep))
        latents_BCHW[chosen] = teacher_latents(
            model, start, context_BLD[chosen], empty_1LD, teacher, timestep
        )
    return latents_BCHW


def teacher_scheduler(
    schedule: dict[str, Any], sampler: str
) -> DDIMScheduler | DPMSolverMultistepScheduler:
    """Deterministic, and 'trailing': the first step is the last timestep, where the student's only step is."""
    if sampler == "ddim":
        return DDIMScheduler(
            **schedule, clip_sample=False, set_alpha_to_one=True, timestep_spacing="trailing"
        )
    return DPMSolverMultistepScheduler(
        **schedule, timestep_spacing="trailing", final_sigmas_type="zero"
    )


def teacher_pairs(
    model: DiffusionModel,
    prompts: list[str],
    teacher: TeacherSettings,
    *,
    seed: int,
    context: Rows | None = None,
    cache: Path | None = None,
    console: Console | None = None,
    processes: Processes | None = None,
    edits: Edits | None = None,
) -> Pairs:
    """``teacher.pairs`` pairs, every prompt equally often; shards already in ``cache`` are read, others made.

    With ``edits`` they are edits of those sources, and as many.

    ``context`` is what ``prompt_contexts`` returned, if the caller has it already. Each of ``processes`` makes its
    share of the shards, then all read all of them: on several machines the cache must be on a disk that they share.

    Raises:
        HipaError: a shard cannot be written, or holds the pairs of something else.

    """
    processes = processes or Processes()
    folder = cache_folder(model, prompts, teacher, seed, cache or user_cache(), edits)
    prompt_N = prompt_order(len(prompts), teacher.pairs, seed) if edits is None else edits.prompt_N
    context = context or prompt_contexts(model, prompts, console)
    empty_1LD, count = model.context([""]), len(prompt_N)
    ranges = [(n, min(n + teacher.batch, count)) for n in range(0, count, teacher.batch)]

    def make(start: int, stop: int) -> dict[str, Tensor]:
        rows, index_B = torch.arange(start, stop), prompt_N[start:stop]
        seed_B = rows + ((seed + 1) << 32)
        inputs = model.noise(seed_B.tolist()), context(index_B), empty_1LD, teacher
        latents = (
            teacher_latents(model, *inputs)
            if edits is None
            else edited_latents(model, edits, rows, *inputs)
        )
        return {
            "latents": latents.to(getattr(torch, teacher.dtype)).cpu(),
            "prompt": index_B,
            "seed": seed_B,
        }

    shards = {}
    with processes.fail_together(), ProgressBar(console) as progress:
        task = progress.add_task(
            "teacher pairs" if edits is None else "teacher's edits", total=count
        )
        for start, stop in ranges[processes.index :: processes.count]:
            path = _shard_path(folder, start, stop)
            shards[start] = _read_shard(path) or _write_shard(path, make(start, stop))
            progress.update(task, completed=stop)
    with processes.fail_together():
        for start, stop in ranges:
            path = _shard_path(folder, start, stop)
            shards[start] = shards.get(start) or _read_shard(path) or _not_shared(path)
    return Pairs(
        *(
            torch.cat([shards[start][key] for start, _ in ranges])
            for key in ("latents", "prompt", "seed")
        )
    )


def cache_folder(
    model: DiffusionModel,
    prompts: list[str],
    teacher: TeacherSettings,
    seed: int,
    cache: Path,
    edits: Edits | None = None,
) -> Path:
    """Where these pairs belong; how many there are does not matter, since a pair depends on its number alone."""
    # mixed_precision came later: a cache made before it was in float32 and is still found
    outside = {"pairs"} if teacher.mixed_precision != "no" else {"pairs", "mixed_precision"}
    key = {
        "format": 1,
        "unet": folder_sha256(model.folder / "unet"),
        "text_encoder": folder_sha256(model.folder / "text_encoder"),
        "tokenizer": folder_sha256(model.folder / "tokenizer", "*.*"),
        "schedule": model.schedule,
        "latent_shape": model.latent_shape_CHW,
        "teacher": teacher.model_dump(exclude=outside),
        "prompts": prompts,
        "seed": seed,
    }
    if edits is not None:
        key |= {"edits": edits.key, "vae": folder_sha256(model.folder / "vae")}
    return (
        cache / "pairs" / hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:24]
    )


def stream_noise(model: DiffusionModel, rows: Tensor, seed: int, stream: int) -> Tensor:
    """Standard normal float32 [B, C, h, w], one draw for each (seed, stream, row)."""
    return model.noise((rows + ((seed + 1) << 32) + (stream << 28)).tolist())


def prompt_order(prompts: int, pairs: int, seed: int) -> Tensor:
    """Prompt of each pair, int64 [pairs]: one shuffled pass over the prompts after another."""
    passes = [
        np.random.default_rng((seed, n)).permutation(prompts) for n in range(-(-pairs // prompts))
    ]
    return torch.from_numpy(np.concatenate(passes)[:pairs])


def prompt_contexts(
    model: DiffusionModel, prompts: list[str], console: Console | None = None
) -> Rows:
    """Text contexts float32 [B, L, D] by prompt index, each prompt encoded once if all of them fit in memory."""
    return lookup(
        "text contexts",
        lambda rows: model.context([prompts[row] for row in rows]),
        len(prompts),
        console,
    )


def lookup(
    name: str, compute: Callable[[list[int]], Tensor], count: int, console: Console | None = None
) -> Rows:
    """A function from row indices [B] to rows [B, ...]: a table when all rows fit in memory, else ``compute``.

    The table is filled in fixed chunks, so that a row does not depend on what was asked for first: a resumed run
    must see bit-equal rows. Nothing in it is learned from: no row has a gradient.
    """
    compute = torch.no_grad()(compute)
    row = compute([0])[0]
    if row.numel() * row.element_size() * count > TABLE_BYTES:
        return lambda index_B: compute(index_B.tolist())
    chunks = [list(range(start, min(start + CHUNK, count))) for start in range(0, count, CHUNK)]
    with ProgressBar(console) as progress:
        table = torch.cat([compute(chunk) for chunk in progress.track(chunks, description=name)])
    return lambda index_B: table[index_B.to(table.device)]


def _shard_path(folder: Path, start: int, stop: int) -> Path:
    return folder / f"{start:08d}-{stop:08d}.safetensors"


def _read_shard(path: Path) -> dict[str, Tensor] | None:
    """None when it is missing or damaged: then it is made again."""
    try:
        with safe_open(path, "pt") as file:
            owner = (file.metadata() or {}).get("cache")
            shard = {key: file.get_tensor(key) for key in ("latents", "prompt", "seed")}
    except (OSError, SafetensorError):
        return None
    if owner not in (path.parent.name, None):  # None: made before shards said where they belong
        raise HipaError(
            f"teacher pairs {path} are another teacher's (cache {owner}). Remove the file."
        )
    return shard


def _write_shard(path: Path, shard: dict[str, Tensor]) -> dict[str, Tensor]:
    try:
        write_file(path, save(shard, {"cache": path.parent.name}))
    except OSError as error:
        kept = "The shards before it are kept"
        raise HipaError(
            f"teacher pairs {path} cannot be written: {error.strerror}. {kept}; see HIPA_CACHE."
        ) from None
    return shard


def _not_shared(path: Path) -> dict[str, Tensor]:
    remedy = "Point HIPA_CACHE at a folder that all machines share"
    raise HipaError(f"teacher pairs {path}, made by another process, are not seen here. {remedy}.")

"""Teacher pairs: (prompt, noise, latents) of a deterministic multi-step sampler, cached on disk.

A shard of the cache holds the latents, prompt indices and noise seeds of consecutive pairs. The
noise itself is not stored: its seed makes it again. The name of a cache folder is a hash of
everything that the pairs depend on (model weights, prompts, sampler settings, seed), so a stale
pair is never found. A run that was stopped, or that wants more pairs than before, makes only the
missing shards. Several processes divide the shards among them.

Shapes: N pairs, B rows of a batch, C latent channels, H, W latent height and width.
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
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from hipa_deploy.disk.files import user_cache, write_file
from hipa_deploy.disk.hashing import folder_sha256
from hipa_deploy.disk.reading import check_regular, shown
from hipa_deploy.errors import HipaError, as_line
from hipa_deploy.models.model_config import LEAST_SIGNAL, ModelConfig
from hipa_deploy.models.weights.weight_identity import loaded_files_sha256, weights_identity
from hipa_deploy.tasks import start_latents
from hipa_deploy.train.loop.processes import Processes
from hipa_deploy.train.loop.progress_bar import ProgressBar
from hipa_deploy.train.model.conditions import Conditions, joined_rows, predict
from hipa_deploy.train.model.diffusion_model import DiffusionModel
from hipa_deploy.train.model.mixed_precision import computed_precision, in_precision
from hipa_deploy.train.recipes.recipe import TeacherSettings

TABLE_BYTES = 2 << 30  # rows that take more than 2 GiB together are not kept in memory
CHUNK = 16  # rows computed at once to fill a table
# Of the images that go through a VAE at once: those of one image of SDXL's, which is enough to keep
# a GPU busy. They take 3 GiB beside the weights, less than a training step does.
VAE_PIXELS = 1024 * 1024
SHARD_TENSORS = ("latents", "prompt", "seed")
RowFunction = Callable[[Tensor], Tensor]
"""A function from row indices int64 [B] to the rows' values [B, ...]."""
RowConditions = Callable[[Tensor], Conditions]
"""The same for the conditions of rows."""


@dataclass(frozen=True)
class Edits:
    """What the teacher's N edits start from.

    Attributes:
        images: Rows int64 [B] -> source images uint8 [B, H, W, 3].
        source: Rows int64 [B] -> scaled latents of the source images, float32 [B, C, h, w].
        prompt_N: Index of the prompt that each edit follows, int64 [N].
        timestep_N: Timestep to which each source is noised, int64 [N].
        key: What the edits depend on, as JSON values, except how many there are: part of the
            cache key.
        stream: Of the noise that is added to the sources, as ``noise_seeds`` takes it.

    """

    images: RowFunction
    source: RowFunction
    prompt_N: Tensor
    timestep_N: Tensor
    key: dict[str, Any]
    stream: int = 0


@dataclass(frozen=True)
class Pairs:
    """N teacher pairs.

    Attributes:
        latents_NCHW: The teacher's scaled latents in their storage type, float16 or float32.
        prompt_N: Index of each pair's prompt, int64 [N].
        seed_N: Seed of each pair's noise, int64 [N].

    """

    latents_NCHW: Tensor
    prompt_N: Tensor
    seed_N: Tensor

    def __len__(self) -> int:
        return len(self.seed_N)


def joined(first: Pairs, second: Pairs) -> Pairs:
    """The pairs of ``first``, then those of ``second``; both count the same prompts."""
    return Pairs(
        latents_NCHW=torch.cat([first.latents_NCHW, second.latents_NCHW]),
        prompt_N=torch.cat([first.prompt_N, second.prompt_N]),
        seed_N=torch.cat([first.seed_N, second.seed_N]),
    )


@torch.no_grad()
def teacher_latents(
    model: DiffusionModel,
    noise_BCHW: Tensor,
    conditions: Conditions,
    unguided: Conditions,
    teacher: TeacherSettings,
    first: int | None = None,
) -> Tensor:
    """Integrate the probability-flow ODE from noise to an image with the multi-step sampler.

    Classifier-free guidance (Ho & Salimans 2022): the empty prompt and the real one go through the
    UNet as one batch.

    Args:
        model: The base model.
        noise_BCHW: Standard normal noise float32; with ``first``, noised latents of a source image.
        conditions: Of the prompts.
        unguided: One row, which guidance leads away from: ``DiffusionModel.unguided``.
        teacher: Sampler, number of steps, guidance and precision.
        first: Timestep to start from, which must be one of the sampler's; None is the last
            timestep (999), where there is nothing but noise. An edit starts later in the schedule.

    Returns:
        Scaled latents, float32 [B, C, H, W].

    Raises:
        HipaError: the model predicts eps, and its schedule ends in pure noise.

    """
    if first is None:
        check_teacher_start(model.config)
    unet = in_precision(model.unet, teacher.mixed_precision, model.device)
    # Any: the types of diffusers' top-level names are placeholders without methods.
    scheduler: Any = teacher_scheduler(model.schedule, teacher.sampler)
    scheduler.set_timesteps(teacher.steps, device=model.device)
    timesteps = scheduler.timesteps
    if first is not None:
        timesteps = timesteps[timesteps <= first]

    # Guidance 1 is the conditional prediction alone: then half the batch is not needed.
    guided = teacher.guidance != 1
    if guided:
        conditions = joined_rows([unguided.repeated(len(conditions)), conditions])

    x_BCHW = noise_BCHW
    for timestep in timesteps:
        inputs = torch.cat([x_BCHW, x_BCHW]) if guided else x_BCHW
        # The sampler's arithmetic stays in float32, whatever the UNet computes in.
        output = predict(unet, inputs, timestep, conditions).float()
        if guided:
            unconditional, conditional = output.chunk(2)
            output = unconditional + teacher.guidance * (conditional - unconditional)
        x_BCHW = scheduler.step(output, timestep, x_BCHW).prev_sample
    return x_BCHW


def check_teacher_start(config: ModelConfig) -> None:
    """Check that a sampler can take its first step, at the last timestep.

    Raises:
        HipaError: there is no signal there, and the model predicts eps: x0 would be divided by
            zero. The latents would be NaN.

    """
    signal = float(config.alphas_cumprod[-1])
    if config.prediction_type == "epsilon" and signal < LEAST_SIGNAL:
        raise HipaError(
            f"{config.folder} predicts epsilon, and its noise schedule ends in pure noise, from "
            "which eps says nothing about x0: the teacher has no first step. Correct "
            "prediction_type or rescale_betas_zero_snr in scheduler/scheduler_config.json."
        )


def edited_latents(
    model: DiffusionModel,
    edits: Edits,
    rows: Tensor,
    noise_BCHW: Tensor,
    conditions: Conditions,
    unguided: Conditions,
    teacher: TeacherSettings,
) -> Tensor:
    """The teacher's edits of ``rows``: it denoises each source from the source's own timestep.

    This is SDEdit (Meng et al. 2022) with the teacher's sampler.

    Args:
        model: The base model.
        edits: Sources, prompts and timesteps.
        rows: Which edits to make, int64 [B].
        noise_BCHW: Standard normal noise float32 that is added to the sources.
        conditions: Of the edits' prompts.
        unguided: As for ``teacher_latents``.
        teacher: Sampler, number of steps, guidance and precision.

    Returns:
        Scaled latents, float32 [B, C, H, W].

    """
    source_BCHW = edits.source(rows)
    timestep_B = edits.timestep_N[rows]
    latents_BCHW = torch.empty_like(noise_BCHW)

    # A sampler runs through one sequence of timesteps, so rows of one strength go together.
    for timestep in timestep_B.unique().tolist():
        chosen = timestep_B == timestep
        step_inputs = {"noise": noise_BCHW[chosen], "source": source_BCHW[chosen]}
        start = start_latents("edit", step_inputs, model.alpha_bar(timestep))
        latents_BCHW[chosen] = teacher_latents(
            model, start, conditions[chosen], unguided, teacher, timestep
        )
    return latents_BCHW


def teacher_scheduler(
    schedule: dict[str, Any], sampler: str
) -> DDIMScheduler | DPMSolverMultistepScheduler:
    """The teacher's deterministic sampler, as one of diffusers' schedulers.

    'trailing' spacing puts the first step at the last timestep, where the student takes its only
    step: teacher and student then start from the same noise.

    Args:
        schedule: The model's noise schedule, as ``DiffusionModel.schedule`` returns it.
        sampler: 'ddim', or 'dpmsolver++' (second order, multi-step).

    Raises:
        HipaError: Another sampler.

    """
    if sampler == "ddim":
        return DDIMScheduler(
            **schedule, clip_sample=False, set_alpha_to_one=True, timestep_spacing="trailing"
        )
    if sampler == "dpmsolver++":
        return DPMSolverMultistepScheduler(
            **schedule, timestep_spacing="trailing", final_sigmas_type="zero"
        )
    raise HipaError(f"teacher.sampler {sampler!r} is unknown. Expected ddim or dpmsolver++.")


def teacher_pairs(
    model: DiffusionModel,
    prompts: list[str],
    teacher: TeacherSettings,
    *,
    seed: int,
    conditions: RowConditions | None = None,
    cache: Path | None = None,
    console: Console | None = None,
    processes: Processes | None = None,
    edits: Edits | None = None,
) -> Pairs:
    """Make ``teacher.pairs`` pairs, every prompt equally often, or read them from the cache.

    Each process makes its share of the missing shards, then all processes read all shards: on
    several machines the cache must be on a disk that they share.

    Args:
        model: The base model.
        prompts: The prompts, each used equally often.
        teacher: Sampler settings, number of pairs, shard size and storage type.
        seed: Fixes the order of the prompts and the noise.
        conditions: Of prompts by their index, as ``prompt_conditions`` returns them; computed here
            if None.
        cache: Folder of the cache; None is the user's own (HIPA_CACHE).
        console: Where the progress bar goes; stderr if None.
        processes: The processes that share the work; None is this one alone.
        edits: Make edits of these sources, as many as there are, in place of images from noise.

    Raises:
        HipaError: A shard cannot be written, or holds the pairs of another teacher; or the
            teacher's latents are not finite.

    Example:
        >>> teacher = TeacherSettings(steps=25, guidance=5.0, pairs=64)
        >>> pairs = teacher_pairs(model, ["a red apple", "a boat"], teacher, seed=0)
        >>> pairs.latents_NCHW.shape  # a model of 64x64 pixels
        torch.Size([64, 4, 8, 8])

    """
    processes = processes or Processes()
    folder = cache_folder(model, prompts, teacher, seed, cache or user_cache(), edits)
    prompt_N = prompt_order(len(prompts), teacher.pairs, seed) if edits is None else edits.prompt_N
    conditions = conditions or prompt_conditions(model, prompts, console)
    unguided = model.unguided()
    stream = 0 if edits is None else edits.stream
    count = len(prompt_N)
    starts = range(0, count, teacher.batch)
    ranges = [(start, min(start + teacher.batch, count)) for start in starts]

    def make_shard(start: int, stop: int) -> dict[str, Tensor]:
        rows = torch.arange(start, stop)
        prompt_B = prompt_N[start:stop]
        seed_B = noise_seeds(rows, seed, stream)
        noise_BCHW = model.noise(seed_B.tolist())
        arguments = (noise_BCHW, conditions(prompt_B), unguided, teacher)
        if edits is None:
            latents = teacher_latents(model, *arguments)
        else:
            latents = edited_latents(model, edits, rows, *arguments)
        stored = latents.to(getattr(torch, teacher.dtype)).cpu()
        _check_finite(stored, teacher, start, stop)
        return {"latents": stored, "prompt": prompt_B, "seed": seed_B}

    def fits(shard: dict[str, Tensor], start: int, stop: int) -> bool:
        """Whether a shard can be the one of these rows; one that was tampered with is not."""
        latents = shard["latents"]
        return (
            latents.shape == (stop - start, *model.latent_shape_CHW)
            and latents.dtype == getattr(torch, teacher.dtype)
            and bool(torch.isfinite(latents).all())
            and torch.equal(shard["prompt"], prompt_N[start:stop])
            and torch.equal(shard["seed"], noise_seeds(torch.arange(start, stop), seed, stream))
        )

    # Each process makes every count-th shard. Taking turns spreads shards that are missing at the
    # end of an extended cache over all processes.
    shards = {}
    with ProgressBar(console) as progress:
        title = "teacher pairs" if edits is None else "teacher's edits"
        task = progress.add_task(title, total=count)
        with processes.fail_together():
            for start, stop in ranges[processes.index :: processes.count]:
                path = _shard_path(folder, start, stop)
                found = _read_shard(path)
                if found is None or not fits(found, start, stop):
                    found = _write_shard(path, make_shard(start, stop))
                shards[start] = found
                progress.update(task, completed=stop)

        # The last shard may have been another process's.
        progress.update(task, completed=count)

    # All shards exist when every process has left the block above: now read those of the others.
    with processes.fail_together():
        for start, stop in ranges:
            if start not in shards:
                shards[start] = _read_shared_shard(_shard_path(folder, start, stop))

    joined = []
    for name in SHARD_TENSORS:
        joined.append(torch.cat([shards[start][name] for start, _ in ranges]))
    return Pairs(*joined)


def _check_finite(latents: Tensor, teacher: TeacherSettings, start: int, stop: int) -> None:
    """Raise HipaError for latents that nothing can learn, before hours of further ones are made."""
    if torch.isfinite(latents).all():
        return
    precision = teacher.mixed_precision
    remedy = "Check that diffusers makes images with the model."
    if precision != "no":
        remedy = f'Set teacher.mixed_precision = "no" in the recipe, in place of "{precision}".'
    raise HipaError(
        f"teacher pairs {start} to {stop - 1}: the teacher's latents are not finite as "
        f"{teacher.dtype}. Expected numbers to learn from. {remedy}"
    )


def cache_folder(
    model: DiffusionModel,
    prompts: list[str],
    teacher: TeacherSettings,
    seed: int,
    cache: Path,
    edits: Edits | None = None,
) -> Path:
    """Folder of the shards: a hash of everything that the pairs depend on.

    The number of pairs is not part of the hash, since a pair depends on its own number alone: a
    longer run finds the pairs of a shorter one.

    Args:
        model: The base model; weights and tokenizer are hashed.
        prompts: The prompts, in order.
        teacher: The sampler settings.
        seed: The recipe's seed.
        cache: Folder of all caches.
        edits: The sources of edits; they add their own key and the VAE that encodes them.

    """
    # A float32 teacher leaves mixed_precision out of the key: the setting is younger than the
    # cache, and pairs from before it, all of them float32, are still found.
    excluded = {"pairs"}
    if computed_precision(teacher.mixed_precision, model.device) == "no":
        excluded.add("mixed_precision")

    key = {
        "format": 1,
        "tokenizer": folder_sha256(model.folder / "tokenizer", "*.*"),
        "schedule": model.schedule,
        "latent_shape": model.latent_shape_CHW,
        "teacher": teacher.model_dump(exclude=excluded),
        "prompts": prompts,
        "seed": seed,
    }
    # Before, training read prompts with another tokenizer, which gave other ids for some texts
    # beyond ASCII and for control characters. Pairs of plain prompts are still found.
    if not all(prompt.isascii() and prompt.isprintable() for prompt in prompts):
        key["tokenizer_kind"] = "fast"
    # Settings that have their defaults are left out: pairs from before they existed are found.
    settings = model.text.model_dump(exclude_defaults=True)
    if settings:
        key["text"] = settings
    if model.style:
        key["style"] = model.style.model_dump(mode="json")
    # A model with two text encoders is bound to both, and to what guidance leads away from.
    parts = ["unet", *model.config.text_parts]
    if model.config.has_text_pair:
        key["tokenizer_2"] = folder_sha256(model.folder / "tokenizer_2", "*.*")
        key["zeros_unguided"] = bool(model.pipe.config.force_zeros_for_empty_prompt)
    if edits is not None:
        key["edits"] = edits.key
        parts.append("vae")

    folders = []
    for hash_of in (weights_identity, loaded_files_sha256):
        hashes = {part: hash_of(model.folder / part) for part in parts}
        text = json.dumps(key | hashes, sort_keys=True)
        folders.append(cache / "pairs" / hashlib.sha256(text.encode()).hexdigest()[:24])

    # Version 0.1.0 hashed the files in place of the weights. Its pairs took hours: they are kept.
    folder, folder_of_0_1_0 = folders
    if folder_of_0_1_0.is_dir() and not folder.is_dir():
        return folder_of_0_1_0
    return folder


def noise_seeds(rows: Tensor, seed: int, stream: int = 0) -> Tensor:
    """Noise seed of each row, int64 [B]; no two (seed, stream, row) have the same one.

    Bits 32 and above hold the recipe's seed plus 1, so that they are above every seed that a user
    types; bits 28 to 31 hold the stream; the bits below hold the row.
    """
    return rows + ((seed + 1) << 32) + (stream << 28)


def stream_noise(model: DiffusionModel, rows: Tensor, seed: int, stream: int) -> Tensor:
    """Standard normal float32 [B, C, H, W], a draw of its own for each (seed, stream, row).

    Teacher pairs use stream 0; examples, edits of the teacher's images and decoders use others.
    """
    return model.noise(noise_seeds(rows, seed, stream).tolist())


def prompt_order(prompts: int, pairs: int, seed: int) -> Tensor:
    """Prompt index of each pair, int64 [pairs]: one shuffled pass over the prompts after another.

    The first pairs do not depend on how many follow, as the cache requires.
    """
    passes = -(-pairs // prompts)  # rounded up
    shuffled = [np.random.default_rng((seed, n)).permutation(prompts) for n in range(passes)]
    return torch.from_numpy(np.concatenate(shuffled)[:pairs])


def prompt_conditions(
    model: DiffusionModel,
    prompts: list[str],
    console: Console | None = None,
    used_N: Tensor | None = None,
) -> RowConditions:
    """Conditions by prompt index: int64 [B] -> those of B prompts.

    Each prompt is encoded once if all contexts fit in memory, else whenever a batch needs it.

    Args:
        model: The base model, which encodes them.
        prompts: The prompts.
        console: Where the progress bar goes; stderr if None.
        used_N: Indices of the prompts that will be asked for, if not all are: a long file of
            prompts has many that no pair is made of.

    """
    used = torch.arange(len(prompts)) if used_N is None else used_N.unique()
    first = model.conditions(prompts[:1])
    tokens_and_width = first.context_BLD.shape[1:]
    numbers = first.context_BLD[0].numel()

    # A row of the table is a context, and behind it SDXL's pooled vector. The sizes are those of
    # the model and the same for all.
    def rows_of_table(rows: list[int]) -> Tensor:
        made = model.conditions([prompts[index] for index in used[rows].tolist()])
        if made.pooled_BP is None:
            return made.context_BLD
        return torch.cat([made.context_BLD.flatten(1), made.pooled_BP], dim=1)

    table = cached_rows("text contexts", rows_of_table, len(used), console)

    def conditions(index_B: Tensor) -> Conditions:
        wanted_B = index_B.cpu()
        row_B = torch.searchsorted(used, wanted_B).clamp(max=len(used) - 1)
        # The conditions of another prompt would train without a word.
        assert torch.equal(used[row_B], wanted_B), "a prompt that was not said to be used"
        values = table(row_B)
        if first.sizes_B6 is None:
            return Conditions(values)
        context_BLD = values[:, :numbers].reshape(-1, *tokens_and_width)
        pooled_BP = values[:, numbers:].contiguous()
        return Conditions(context_BLD, pooled_BP, first.sizes_B6.expand(len(values), -1))

    return conditions


def rows_at_once(resolution: tuple[int, int], most: int = CHUNK) -> int:
    """Images that go through a VAE at once where nothing learns.

    At most ``most``, and at most as many as have ``VAE_PIXELS`` together.

    Example:
        >>> rows_at_once((128, 128)), rows_at_once((512, 512)), rows_at_once((1024, 1024))
        (16, 4, 1)

    """
    height, width = resolution
    return max(1, min(most, VAE_PIXELS // (height * width)))


def cached_rows(
    name: str,
    compute: Callable[[list[int]], Tensor],
    count: int,
    console: Console | None = None,
    at_once: int = CHUNK,
) -> RowFunction:
    """A function of row indices that reads a table in memory, or computes rows that do not fit.

    The table is filled in fixed chunks, so that a row does not depend on which rows a batch reads
    first: a resumed run must see bit-equal rows. No row has a gradient. The table is in the
    processor's memory, since a GPU's is what a training lacks and ``--dry-run`` counts; rows are
    where they were computed.

    Args:
        name: Title of the progress bar.
        compute: Row indices -> values [len(indices), ...].
        count: How many rows there are.
        console: Where the progress bar goes; stderr if None.
        at_once: Rows that are computed at once.

    Returns:
        A function from int64 [B] to the rows' values [B, ...].

    Example:
        >>> doubles = cached_rows("doubles", lambda rows: torch.tensor(rows) * 2, count=40)
        >>> doubles(torch.tensor([39, 0]))
        tensor([78,  0])

    """
    compute = torch.no_grad()(compute)

    # The first row says how large all of them are.
    row = compute([0])[0]
    if not fits_table(row.numel() * row.element_size(), count):
        return lambda index_B: compute(index_B.tolist())

    starts = range(0, count, at_once)
    chunks = [list(range(start, min(start + at_once, count))) for start in starts]
    with ProgressBar(console) as progress:
        tracked = progress.track(chunks, description=name)
        table = torch.cat([compute(chunk).cpu() for chunk in tracked])
    return lambda index_B: table[index_B.cpu()].to(row.device)


def fits_table(row_bytes: int, count: int) -> bool:
    """Whether ``cached_rows`` keeps so many rows of so many bytes in memory."""
    return row_bytes * count <= TABLE_BYTES


def _shard_path(folder: Path, start: int, stop: int) -> Path:
    return folder / f"{start:08d}-{stop:08d}.safetensors"


def _read_shard(path: Path) -> dict[str, Tensor] | None:
    """The tensors of a shard; None when the file is missing or damaged and must be made again."""
    if not path.exists():
        return None
    check_regular(path, f"Remove {path.parent}.")
    try:
        with as_line(f"{path} is damaged", ""), safe_open(path, "pt") as file:
            owner = (file.metadata() or {}).get("cache")
            shard = {name: file.get_tensor(name) for name in SHARD_TENSORS}
    except HipaError:
        return None

    # A shard says which cache folder it belongs to: copied by hand into another one, it would be
    # taken for another teacher's. The oldest shards say nothing (None) and are believed.
    if owner not in (path.parent.name, None):
        raise HipaError(
            f"teacher pairs {path} are another teacher's (cache {shown(owner)}). Remove the file."
        )
    return shard


def _write_shard(path: Path, shard: dict[str, Tensor]) -> dict[str, Tensor]:
    try:
        write_file(path, save(shard, {"cache": path.parent.name}))
    except OSError as error:
        raise HipaError(
            f"teacher pairs {path} cannot be written: {error.strerror}. The shards before it are "
            "kept. Free some disk space, or set HIPA_CACHE to a folder on another disk."
        ) from None
    return shard


def _read_shared_shard(path: Path) -> dict[str, Tensor]:
    """A shard that another process has just written."""
    shard = _read_shard(path)
    if shard is None:
        raise HipaError(
            f"teacher pairs {path}, made by another process, are not seen here. Point HIPA_CACHE "
            "at a folder that all machines share."
        )
    return shard

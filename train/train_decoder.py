"""Distil a tiny decoder from a model's own: one readable function.

Architecture and folder are those of AutoencoderTiny (TAESD, https://github.com/madebyollin/taesd).
No images are needed: it learns to decode the latents that the one-step model makes, and its targets
are the full decoder's images of them.

Shape suffixes: B rows of a batch, N all rows, C channels, H W height and width (of latents, or of
images where the name says image).
"""

from __future__ import annotations

import copy
import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderTiny
from rich.console import Console
from torch import Tensor

from hipa_deploy.disk.files import new_folder
from hipa_deploy.disk.hashing import file_sha256
from hipa_deploy.models.adaptor_folder import WEIGHTS, read_metadata, unet_sha256
from hipa_deploy.models.decoder_folder import (
    DECODER_METADATA,
    DecoderFidelity,
    DecoderMetadata,
    vae_sha256,
)
from hipa_deploy.models.style import Style
from hipa_deploy.train.data.teacher_pairs import (
    RowFunction,
    cached_rows,
    prompt_order,
    rows_at_once,
    stream_noise,
)
from hipa_deploy.train.evaluation.quality import CHUNK, paired_distance
from hipa_deploy.train.evaluation.sample_grid import headed_grid
from hipa_deploy.train.held_out import HeldOutMeasure, held_out_key
from hipa_deploy.train.loop.identity import stored_recipe
from hipa_deploy.train.loop.optimizer import new_optimizer
from hipa_deploy.train.loop.output import check_output, replacing, run_folder
from hipa_deploy.train.loop.plateau import Plateau
from hipa_deploy.train.loop.processes import Processes
from hipa_deploy.train.loop.run import Run, loss_state
from hipa_deploy.train.loop.run_lock import one_run_at_a_time
from hipa_deploy.train.loop.scalars import log_in
from hipa_deploy.train.loop.training_steps import Watch, result_lines, run_steps
from hipa_deploy.train.losses.hipa_loss import Terms, hipa_loss
from hipa_deploy.train.model.conditions import Conditions
from hipa_deploy.train.model.diffusion_model import DiffusionModel, to_float, to_uint8
from hipa_deploy.train.model.mixed_precision import in_precision, precision_note, use_tensor_cores
from hipa_deploy.train.model.unet_adaptor import one_step_model
from hipa_deploy.train.recipes.recipe import (
    DecoderRecipe,
    DecoderSettings,
    check_levels,
    held_out_prompts,
    read_prompts,
)

# Noise streams of a recipe's seed. No two uses share one, and the teacher pairs have stream 0.
TRAINING = 1
PERTURBATION = 2
HELD_OUT = 3
WATCHED = 4
# Every AutoencoderTiny has an encoder. This one is never trained, so it is as small as it can be.
ENCODER_CHANNELS = 4


@one_run_at_a_time
def train_decoder(
    recipe: DecoderRecipe,
    model_dir: Path,
    out: Path,
    *,
    adaptor: Path | None = None,
    style: Style | None = None,
    device: str | None = None,
    log_with: Sequence[str] = ("tensorboard",),
    console: Console | None = None,
) -> Path:
    """Distil a tiny decoder for a Stable Diffusion model and write it to a new folder.

    The same call resumes a stopped run, and with more steps it extends a finished one: the folder
    ``out``.run holds its checkpoint, TensorBoard scalars and sample grids, whose columns are the
    full and the tiny decoder's images. With held-out prompts it also holds the best step's decoder.

    Paths may be text.

    Args:
        recipe: The decoder's size, latents, loss and optimiser (docs/reference/training-inputs.md).
        model_dir: Stable Diffusion folder, in the format of diffusers. It is not changed.
        out: The decoder folder to write. It must not exist, be empty, or be this run's own result
            of fewer steps, which then moves to ``out``.run/finished.
        adaptor: Adaptor folder; the decoder then learns the latents of the adapted model. Default:
            those of the base model in one step.
        style: LoRAs and embeddings of that model.
        device: Torch device such as 'cpu' or 'cuda:1'. Default: the GPU, or the CPU without one.
        log_with: Where numbers and samples go: 'tensorboard', and names of accelerate's trackers,
            such as 'wandb'.
        console: Where to print progress. Default: stderr.

    Returns:
        ``out``, which ``AutoencoderTiny.from_pretrained`` reads. Its hipa_decoder.json says how
        faithful it is. Its encoder is not trained.

    Raises:
        HipaError: bad input, a loss that is not finite, or Ctrl-C; the last checkpoint is kept.

    Example:
        >>> recipe = load_any_recipe("emoji-decoder", {"steps": 1000})
        >>> train_decoder(recipe, Path("model"), Path("decoder"), adaptor=Path("adaptor"))
        PosixPath('decoder')

    """
    # Before anything expensive: an output folder that cannot be written must fail now, and every
    # process of a launch must know which of them prints and writes.
    processes = Processes.join(recipe, device)
    console = processes.console(console)
    finished_steps = check_output(out, recipe)
    if processes.is_main:
        log_in(log_with)

    # The loss comes before the model: code of a user's own that cannot be used fails now.
    loss = hipa_loss(recipe.loss)

    # The frozen one-step model whose latents are to be decoded.
    # Its prompts are encoded as those that the adaptor was trained with, at the adaptor's size.
    text = recipe.text
    size = None
    if adaptor is not None:
        trained = read_metadata(adaptor)
        text = trained.text
        size = trained.resolution
    model = DiffusionModel.load(model_dir, processes.device, style=style, text=text, size=size)
    slow = precision_note([recipe.mixed_precision], model.device)
    if slow:
        console.print(slow)
    all_prompts = read_prompts(recipe, model_dir)
    prompts, fidelity_prompts = split_prompts(all_prompts, recipe.seed)
    unseen_prompts = held_out_prompts(recipe, model_dir, all_prompts)
    generate = one_step_model(model, recipe.timestep, adaptor)

    # Tiny decoder, loss, optimiser and the run folder, which restores those of a stopped run. They
    # come before the latents, so that a checkpoint of another recipe is refused at once.
    tiny = tiny_autoencoder(recipe.decoder, model, recipe.seed)
    weights = dict(tiny.decoder.named_parameters())
    loss = loss.to(model.device)
    optimizer = new_optimizer(weights, loss, recipe.optimiser)
    identity = _identity(recipe, model_dir, adaptor, [*prompts, *fidelity_prompts])
    identity |= model.style.model_dump(mode="json") | model.identity()
    run = Run(
        folder=run_folder(out),
        weights=weights,
        optimizer=optimizer,
        identity=identity,
        recipe=recipe,
        processes=processes,
        extra_state=loss_state(loss),
        plateau=Plateau(
            recipe.held_out.patience,
            recipe.held_out.min_delta,
            held_out_key(recipe, unseen_prompts),
        ),
    )
    run.resume()

    # The examples: one-step latents and the full decoder's images of them. A share of the latents
    # gets noise on top, because the latents of other tasks differ from one-step latents.
    count = recipe.latents.count
    latents = draw_latents(model, generate, prompts, count, recipe.seed, TRAINING)
    examples = decoder_examples(model, perturbed(model, latents, recipe), count, console)
    sample_rows = torch.arange(min(recipe.samples, count))
    use_tensor_cores(model.device)
    decode = in_precision(partial(decode_tiny, tiny), recipe.mixed_precision, model.device)

    def loss_at(rows: Tensor, step: int) -> tuple[Tensor, Terms]:
        """Mean loss over examples ``rows`` (int64 [B]), and its terms."""
        return loss.image_loss(decode(examples.latents(rows)), examples.images(rows))

    @torch.no_grad()
    def sample_grid(step: int) -> np.ndarray:
        """The sample grid, uint8 [height, width, 3]."""
        full_images = examples.images(sample_rows)
        tiny_images = decode(examples.latents(sample_rows))
        columns = {"full decoder": to_uint8(full_images), "tiny decoder": to_uint8(tiny_images)}
        return headed_grid(columns, (), step)

    # The folder says how faithful the decoder is. What is measured is what was stored, in float16,
    # on prompts and noise that the training has not seen. They are made once.
    @cache
    def fidelity_examples() -> DecoderExamples:
        held_out = recipe.latents.held_out
        latents = draw_latents(model, generate, fidelity_prompts, held_out, recipe.seed, HELD_OUT)
        return decoder_examples(model, latents, held_out, console)

    def save(folder: Path) -> None:
        """Write the decoder as it is now, with its fidelity and the time that it took."""
        with new_folder(folder) as scratch:
            # A copy, since the stored one is in float16 and the training goes on in float32.
            stored = save_and_reload(copy.deepcopy(tiny), scratch).to(model.device)
            metadata = DecoderMetadata(
                base_vae_sha256=identity["base_vae_sha256"],
                latent_channels=tiny.config.latent_channels,
                factor=model.pipe.vae_scale_factor,
                steps_trained=run.step,
                fidelity=measure_fidelity(stored, fidelity_examples()),
                recipe=identity["recipe"],
                training=run.spent.until(run.step),
            )
            (scratch / DECODER_METADATA).write_text(
                metadata.model_dump_json(indent=2) + "\n", encoding="utf-8"
            )

    watch = Watch(
        sample_grid,
        log_with=log_with,
        measure=_held_out_measure(recipe, model, generate, decode, unseen_prompts, console),
        every=recipe.held_out.every,
        save_best=save,
    )
    run_steps(run, count, loss_at, watch, console)

    with processes.fail_together(), run.written_weights():
        if processes.is_main:
            with replacing(out, finished_steps):
                save(out)
            console.print(*result_lines(out, run, finished_steps), sep="\n", highlight=False)
    return out


def _held_out_measure(
    recipe: DecoderRecipe,
    model: DiffusionModel,
    generate: Callable[[Tensor, Conditions], Tensor],
    decode: Callable[[Tensor], Tensor],
    prompts: list[str],
    console: Console,
) -> HeldOutMeasure | None:
    """The tiny decoder's images against the full one's, of held-out prompts; None without them."""
    if not prompts:
        return None
    count = recipe.held_out.count
    latents = draw_latents(model, generate, prompts, count, recipe.seed, WATCHED)
    examples = decoder_examples(model, latents, count, console)
    return HeldOutMeasure(
        examples.images,
        lambda rows: decode(examples.latents(rows)),
        count,
        model.device,
        recipe.held_out_rows,
    )


@dataclass(frozen=True)
class DecoderExamples:
    """``count`` latents and the full decoder's images of them, by row.

    Args:
        latents: RowFunction, int64 [B] -> scaled latents, float32 [B, C, H, W].
        images: Rows -> images, float32 [B, 3, H, W] in [0, 1], multiples of 1 / 255.
        count: How many there are.

    """

    latents: RowFunction
    images: RowFunction
    count: int


def split_prompts(prompts: list[str], seed: int) -> tuple[list[str], list[str]]:
    """The prompts to train on, and a tenth of all, at least one, that is held out.

    A single prompt is used for both.

    Example:
        >>> trained, held_out = split_prompts([f"prompt {i}" for i in range(25)], seed=0)
        >>> len(trained), len(held_out)
        (23, 2)

    """
    order = np.random.default_rng(seed).permutation(len(prompts))
    shuffled = [prompts[i] for i in order]
    count = max(1, len(prompts) // 10)
    held_out = shuffled[:count]
    trained = shuffled[count:] or shuffled
    return trained, held_out


def draw_latents(
    model: DiffusionModel,
    generate: Callable[[Tensor, Conditions], Tensor],
    prompts: list[str],
    count: int,
    seed: int,
    stream: int,
) -> RowFunction:
    """One-step latents by row, each a function of its row, ``seed`` and ``stream`` alone.

    Args:
        model: The base model, for noise and conditions.
        generate: (noise [B, C, H, W], conditions) -> latents [B, C, H, W].
        prompts: Each is used equally often, but for a last incomplete pass.
        count: How many rows there are.
        seed: Of the order of prompts and of the noise.
        stream: TRAINING, HELD_OUT or WATCHED: other noise for the same seed.

    Returns:
        A function from rows, int64 [B], to latents, float32 [B, C, H, W].

    """
    prompt_N = prompt_order(len(prompts), count, seed)

    @torch.no_grad()
    def latents(rows: Tensor) -> Tensor:
        conditions = model.conditions([prompts[i] for i in prompt_N[rows].tolist()])
        return generate(stream_noise(model, rows, seed, stream), conditions)

    return latents


def perturbed(model: DiffusionModel, latents: RowFunction, recipe: DecoderRecipe) -> RowFunction:
    """The same latents, with Gaussian noise on a share of the rows.

    Which rows, and what noise, is the same at every call.
    """
    settings = recipe.latents
    draws = np.random.default_rng((recipe.seed, PERTURBATION)).random(settings.count)
    deviation_N = torch.from_numpy(draws < settings.perturbed).float() * settings.noise

    def rows_with_noise(rows: Tensor) -> Tensor:
        noise_BCHW = stream_noise(model, rows, recipe.seed, PERTURBATION)
        deviation_B111 = deviation_N[rows].view(-1, 1, 1, 1).to(model.device)
        return latents(rows) + deviation_B111 * noise_BCHW

    return rows_with_noise


def decoder_examples(
    model: DiffusionModel, latents: RowFunction, count: int, console: Console
) -> DecoderExamples:
    """The examples of ``latents``: all are made now if they fit in memory, else at each use.

    The full decoder takes few large images at once, however many rows are asked for.
    """
    latents_table = cached_rows("latents", lambda rows: latents(torch.tensor(rows)), count, console)

    # Images are kept as uint8: a quarter of the memory, and what the decoder will be measured by.
    at_once = rows_at_once(model.resolution)

    @torch.no_grad()
    def decoded(rows: list[int]) -> Tensor:
        pieces = latents_table(torch.tensor(rows)).split(at_once)
        return torch.cat([to_uint8(model.decode(piece)) for piece in pieces])

    images_table = cached_rows("full decoder", decoded, count, console)

    def images(rows: Tensor) -> Tensor:
        return to_float(images_table(rows)).to(model.device)

    return DecoderExamples(latents_table, images, count)


def tiny_autoencoder(settings: DecoderSettings, model: DiffusionModel, seed: int) -> Any:
    """A new AutoencoderTiny for the model's scaled latents, on its device; only its decoder trains.

    ``seed`` alone decides its weights.

    Raises:
        HipaError: its levels do not enlarge as the model's VAE does.

    """
    check_levels(settings, model.config)
    levels = len(settings.blocks)

    # Any: type checkers see diffusers' placeholder for an environment without torch.
    tiny: Any
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        tiny = AutoencoderTiny(
            encoder_block_out_channels=(ENCODER_CHANNELS,) * levels,
            num_encoder_blocks=(0,) * levels,
            decoder_block_out_channels=(settings.channels,) * levels,
            num_decoder_blocks=settings.blocks,
            latent_channels=model.vae.config.latent_channels,
        )
    tiny.encoder.requires_grad_(False)
    return tiny.to(model.device)


def decode_tiny(tiny: Any, latents_BCHW: Tensor) -> Tensor:
    """Scaled latents [B, C, h, w] -> image, float32 [B, 3, H, W], in [0, 1] but for overshoot."""
    return tiny.decode(latents_BCHW, return_dict=False)[0].float() / 2 + 0.5


def save_and_reload(tiny: Any, folder: Path) -> Any:
    """Save in float16, which changes ``tiny``, and load again in float32, as a user would."""
    tiny.half().save_pretrained(folder)
    for path in folder.glob("*.safetensors"):
        path.chmod(0o644)  # safetensors makes it readable for its owner alone
    return AutoencoderTiny.from_pretrained(folder, torch_dtype=torch.float32).eval()


@torch.no_grad()
def measure_fidelity(tiny: Any, examples: DecoderExamples) -> DecoderFidelity:
    """PSNR over all pixels of all images and the mean DISTS-like distance, of uint8 images."""
    height, width = examples.images(torch.arange(1)).shape[2:]
    chunks = torch.arange(examples.count).split(rows_at_once((height, width), CHUNK))
    full_images = torch.cat([to_uint8(examples.images(rows)) for rows in chunks])
    tiny_images = torch.cat(
        [to_uint8(decode_tiny(tiny, examples.latents(rows))) for rows in chunks]
    )
    squared_error = float((to_float(tiny_images) - to_float(full_images)).square().mean())
    psnr_db = -10 * math.log10(max(squared_error, 1e-10))  # at most 100 dB, never infinite
    return DecoderFidelity(
        images=examples.count,
        psnr_db=psnr_db,
        perceptual_distance=paired_distance(tiny_images.numpy(), full_images.numpy()),
    )


def _identity(
    recipe: DecoderRecipe, model_dir: Path, adaptor: Path | None, prompts: list[str]
) -> dict[str, Any]:
    """What the run depends on: a checkpoint of another identity is refused."""
    return {
        "base_unet_sha256": unet_sha256(model_dir),
        "base_vae_sha256": vae_sha256(model_dir),
        "adaptor_sha256": file_sha256(adaptor / WEIGHTS) if adaptor else None,
        "prompts_sha256": hashlib.sha256("\n".join(prompts).encode()).hexdigest(),
        "recipe": stored_recipe(recipe),
    }

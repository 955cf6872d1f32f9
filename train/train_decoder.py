"""Distil a tiny decoder from a model's own: one readable function.

Architecture and folder are AutoencoderTiny's (TAESD, https://github.com/madebyollin/taesd). No images are needed:
the latents to learn are those that the one-step model makes, their targets the full decoder's images.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderTiny
from rich.console import Console
from torch import Tensor

from hipa_deploy.errors import HipaError
from hipa_deploy.files import new_folder, refuse_to_overwrite
from hipa_deploy.hashing import file_sha256
from hipa_deploy.models.adaptor_folder import WEIGHTS, unet_sha256
from hipa_deploy.models.decoder_folder import (
    DECODER_METADATA,
    DecoderFidelity,
    DecoderMetadata,
    vae_sha256,
)
from hipa_deploy.train.data.teacher_pairs import (
    RowFunction,
    cached_rows,
    prompt_order,
    stream_noise,
)
from hipa_deploy.train.evaluation.quality import CHUNK, paired_distance
from hipa_deploy.train.loop.processes import Processes
from hipa_deploy.train.loop.run import Run, loss_state, new_optimizer, run_steps
from hipa_deploy.train.losses.hipa_loss import Terms, hipa_loss
from hipa_deploy.train.model.diffusion_model import DiffusionModel, to_float, to_uint8
from hipa_deploy.train.model.mixed_precision import in_precision
from hipa_deploy.train.model.unet_adaptor import one_step_model
from hipa_deploy.train.recipes.recipe import DecoderRecipe, DecoderSettings, read_prompts

# Noise streams of one recipe's seed: none is used twice, nor by the teacher pairs, whose stream is 0.
TRAINING, PERTURBATION, HELD_OUT = 1, 2, 3
ENCODER_CHANNELS = (
    4  # of the encoder that every AutoencoderTiny has: never trained here, so as small as it can be
)


def train_decoder(
    recipe: DecoderRecipe,
    model_dir: Path,
    out: Path,
    *,
    adaptor: Path | None = None,
    device: str | None = None,
    console: Console | None = None,
) -> Path:
    """Distil a tiny decoder for ``model_dir`` into the new folder ``out``; the same call resumes a stopped run.

    It learns the latents of the base model in one step, or of the base model with ``adaptor``, an adaptor folder.
    ``out`` loads with ``AutoencoderTiny.from_pretrained`` and says in hipa_decoder.json how faithful it is; its
    encoder is not trained. ``out``.run holds the checkpoint, TensorBoard scalars and sample grids (full | tiny).

    Raises:
        HipaError: bad input, a loss that is not finite, or Ctrl-C; the last checkpoint stays.

    """
    processes = Processes.join(recipe, device)
    console = processes.console(console)
    refuse_to_overwrite(out)

    # The frozen one-step model whose latents are to be decoded.
    model = DiffusionModel.load(model_dir, processes.device)
    prompts, other_prompts = split_prompts(read_prompts(recipe, model_dir), recipe.seed)
    generate = one_step_model(model, recipe.timestep, adaptor)

    # Tiny decoder, loss, optimiser; the run folder puts them back to where a stopped run was.
    tiny = tiny_autoencoder(recipe.decoder, model, recipe.seed)
    weights = dict(tiny.decoder.named_parameters())
    loss = hipa_loss(recipe.loss).to(model.device)
    optimizer = new_optimizer(weights, loss, recipe.optimiser)
    identity = _identity(recipe, model_dir, adaptor, [*prompts, *other_prompts])
    kept = loss_state(loss, recipe, processes)
    run = Run(
        out.with_name(out.name + ".run"), weights, optimizer, identity, recipe, processes, kept=kept
    )
    run.resume()

    # Latents, a share of them perturbed, and the full decoder's images of them.
    count = recipe.latents.count
    drawn = draw_latents(model, generate, prompts, count, recipe.seed, TRAINING)
    examples = decode_once(model, perturbed(model, drawn, recipe), count, console)
    shown = torch.arange(min(recipe.samples, count))
    decode = in_precision(partial(decode_tiny, tiny), recipe.mixed_precision, model.device)

    def loss_at(rows: Tensor, step: int) -> tuple[Tensor, Terms]:
        return loss.of_images(decode(examples.latents(rows)), examples.images(rows))

    @torch.no_grad()
    def samples() -> list[Tensor]:
        return [to_uint8(examples.images(shown)), to_uint8(decode(examples.latents(shown)))]

    run_steps(run, count, loss_at, samples, console)

    # What is measured is what was stored, on prompts and noise that the training has not seen.
    with processes.together(), run.average.applied():
        if processes.is_main:
            held_out = draw_latents(
                model, generate, other_prompts, recipe.latents.held_out, recipe.seed, HELD_OUT
            )
            with new_folder(out) as scratch:
                stored = store(tiny, scratch).to(model.device)
                metadata = DecoderMetadata(
                    base_vae_sha256=identity["base_vae_sha256"],
                    latent_channels=tiny.config.latent_channels,
                    factor=model.pipe.vae_scale_factor,
                    steps_trained=recipe.steps,
                    fidelity=fidelity(
                        stored, decode_once(model, held_out, recipe.latents.held_out, console)
                    ),
                    recipe=identity["recipe"],
                )
                (scratch / DECODER_METADATA).write_text(metadata.model_dump_json(indent=2) + "\n")
    return out


@dataclass(frozen=True)
class Examples:
    """N latents and the full decoder's images of them.

    ``latents``: int64 rows [B] -> scaled latents float32 [B, C, h, w]; ``images``: rows -> float32 [B, 3, H, W] in
    [0, 1], multiples of 1 / 255.
    """

    latents: RowFunction
    images: RowFunction
    count: int


def split_prompts(prompts: list[str], seed: int) -> tuple[list[str], list[str]]:
    """The prompts to train on, and a tenth of them, at least one, that are set aside; a single prompt serves both."""
    order = np.random.default_rng(seed).permutation(len(prompts))
    aside = max(1, len(prompts) // 10)
    chosen = [prompts[i] for i in order]
    return chosen[aside:] or chosen, chosen[:aside]


def draw_latents(
    model: DiffusionModel,
    generate: Callable[[Tensor, Tensor], Tensor],
    prompts: list[str],
    count: int,
    seed: int,
    stream: int,
) -> RowFunction:
    """Rows int64 [B] -> one-step latents float32 [B, C, h, w]: every prompt equally often, noise from the stream."""
    prompt_N = prompt_order(len(prompts), count, seed)

    @torch.no_grad()
    def latents(rows: Tensor) -> Tensor:
        context_BLD = model.context([prompts[i] for i in prompt_N[rows].tolist()])
        return generate(stream_noise(model, rows, seed, stream), context_BLD)

    return latents


def perturbed(model: DiffusionModel, latents: RowFunction, recipe: DecoderRecipe) -> RowFunction:
    """The same latents; a share of the rows, the same at every call, with Gaussian noise on top."""
    settings = recipe.latents
    draws = np.random.default_rng((recipe.seed, PERTURBATION)).random(settings.count)
    deviation_N = torch.from_numpy(draws < settings.perturbed).float() * settings.noise

    def rows_with_noise(rows: Tensor) -> Tensor:
        noise_BCHW = stream_noise(model, rows, recipe.seed, PERTURBATION)
        return latents(rows) + deviation_N[rows].view(-1, 1, 1, 1).to(model.device) * noise_BCHW

    return rows_with_noise


def decode_once(
    model: DiffusionModel, latents: RowFunction, count: int, console: Console
) -> Examples:
    """Make all latents and images now if they fit in memory; otherwise each time they are asked for."""
    table = cached_rows("latents", lambda rows: latents(torch.tensor(rows)), count, console)

    def images(rows: list[int]) -> Tensor:
        return to_uint8(model.decode(table(torch.tensor(rows))))

    targets = cached_rows("full decoder", images, count, console)
    return Examples(table, lambda rows: to_float(targets(rows)).to(model.device), count)


def tiny_autoencoder(settings: DecoderSettings, model: DiffusionModel, seed: int) -> Any:
    """A seeded AutoencoderTiny on the model's device that decodes its scaled latents: only its decoder trains.

    Raises:
        HipaError: the levels do not enlarge as the model's VAE does.

    """
    levels, factor = len(settings.blocks), model.pipe.vae_scale_factor
    if 2 ** (levels - 1) != factor:
        got = f"decoder.blocks has {levels} levels, which enlarge {2 ** (levels - 1)} times"
        raise HipaError(
            f"{got}. Expected {factor.bit_length()} for the {factor} times of {model.folder}."
        )
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
    """Scaled latents [B, C, h, w] -> float32 image [B, 3, H, W], [0, 1] where valid, not clamped."""
    return tiny.decode(latents_BCHW, return_dict=False)[0].float() / 2 + 0.5


def store(tiny: Any, folder: Path) -> Any:
    """Save in float16 (which changes ``tiny``), and load again as float32, as a user would."""
    tiny.half().save_pretrained(folder)
    for path in folder.glob("*.safetensors"):
        path.chmod(0o644)  # safetensors writes for the owner alone
    return AutoencoderTiny.from_pretrained(folder, torch_dtype=torch.float32).eval()


@torch.no_grad()
def fidelity(tiny: Any, examples: Examples) -> DecoderFidelity:
    """PSNR over all pixels of all images, and the mean DISTS-like distance, both of uint8 images."""
    chunks = torch.arange(examples.count).split(CHUNK)
    full = torch.cat([to_uint8(examples.images(rows)) for rows in chunks])
    ours = torch.cat([to_uint8(decode_tiny(tiny, examples.latents(rows))) for rows in chunks])
    error = max(
        float((to_float(ours) - to_float(full)).square().mean()), 1e-10
    )  # at most 100 dB, never infinite
    distance = paired_distance(ours.numpy(), full.numpy())
    return DecoderFidelity(
        images=examples.count, psnr_db=-10 * math.log10(error), perceptual_distance=distance
    )


def _identity(
    recipe: DecoderRecipe, model_dir: Path, adaptor: Path | None, prompts: list[str]
) -> dict[str, Any]:
    return {
        "base_unet_sha256": unet_sha256(model_dir),
        "base_vae_sha256": vae_sha256(model_dir),
        "adaptor_sha256": file_sha256(adaptor / WEIGHTS) if adaptor else None,
        "prompts_sha256": hashlib.sha256("\n".join(prompts).encode()).hexdigest(),
        "recipe": recipe.model_dump(mode="json") | {"prompts": Path(recipe.prompts).name},
    }

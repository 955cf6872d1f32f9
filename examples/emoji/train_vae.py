"""Pre-train the AutoencoderKL of the embedded model: 64x64x3 or 128x128x3 pixels <-> 16x16x4.

    python examples/emoji/train_vae.py --run runs/emoji

The set in the run's folder decides the size. At 128 pixels the network learns from square parts of
64 pixels: more emoji a step, at the same cost.

To resume, run the same command again. With ``--decoder-only`` a finished encoder stays as it is,
and so do the latents that a UNet was trained on, while the decoder continues to learn.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import torch.nn.functional as F
import typer
from augment import SIZE as LARGE
from augment import Pictures
from common import (
    EmojiSet,
    Run,
    set_learning_rate,
    to_pixels,
    use_float32_norms,
    warmup_stable_decay,
)
from diffusers import AutoencoderKL

from hipa_deploy.train.model.mixed_precision import computed_precision

KL_WEIGHT = 1e-3  # of the divergence a latent number


PART = 64  # pixels of the parts that a VAE for 128 pixels learns from


def new_vae(size: int) -> AutoencoderKL:
    """A small AutoencoderKL with random weights: 64x64x3 or 128x128x3 <-> 16x16x4."""
    widths = (16, 32, 64) if size == PART else (16, 32, 64, 64)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * len(widths),
        up_block_types=("UpDecoderBlock2D",) * len(widths),
        block_out_channels=widths,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=size,
        mid_block_add_attention=False,
        act_fn="silu",
    )


def start_from(vae: AutoencoderKL, smaller: AutoencoderKL) -> None:
    """Copy the weights of a VAE with one level less: its outer levels see the same edges.

    The encoder's levels are counted from the outside, and the decoder's from the inside. So the
    smaller one's decoder levels move up by one.
    """
    weights = vae.state_dict()
    for name, value in smaller.state_dict().items():
        parts = name.split(".")
        if name.startswith("decoder.up_blocks."):
            parts[2] = str(int(parts[2]) + 1)
        name = ".".join(parts)
        if name in weights and weights[name].shape == value.shape:
            weights[name] = value
    vae.load_state_dict(weights)


def differences(image_BCHW: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Differences of vertical and of horizontal neighbours."""
    return image_BCHW.diff(dim=2), image_BCHW.diff(dim=3)


def reconstruction_loss(image_BCHW: torch.Tensor, target_BCHW: torch.Tensor) -> torch.Tensor:
    """L1 and squared error of pixels, for colours, and L1 of their differences, for edges."""
    loss = F.l1_loss(image_BCHW, target_BCHW) + F.mse_loss(image_BCHW, target_BCHW)
    for got, expected in zip(differences(image_BCHW), differences(target_BCHW), strict=True):
        loss = loss + 0.5 * F.l1_loss(got, expected)
    return loss


def latent_scale(vae: AutoencoderKL, pixels_BCHW: torch.Tensor) -> float:
    """1 / standard deviation of the latents: what diffusers calls ``scaling_factor``."""
    with torch.no_grad():
        latents = torch.cat([vae.encode(chunk).latent_dist.mean for chunk in pixels_BCHW.split(64)])
    return 1.0 / float(latents.std())


Batch = Callable[[torch.Tensor, torch.Generator], torch.Tensor]


def small_pixels(run: Path) -> tuple[torch.Tensor, int, Batch]:
    """The set at 64 pixels: some pixels to scale the latents by, its size, and a batch of it."""
    pixels = EmojiSet.load(run).only("train").pixels_BCHW()
    return pixels[::4], len(pixels), lambda index, _: pixels[index]


def large_pixels(run: Path) -> tuple[torch.Tensor, int, Batch]:
    """The same at 128 pixels: pictures drawn at random, and in a batch a random part of each."""
    pictures = Pictures(run, "train")
    rng = np.random.default_rng(0)
    some = rng.choice(len(pictures), 512, replace=False)
    pixels = to_pixels(pictures.draw_batch(some, rng)[0])

    def parts(index: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        rng = np.random.default_rng(generator.initial_seed())
        images_BHWC, _ = pictures.draw_batch(index.tolist(), rng)
        cut = []
        for image_HWC in images_BHWC:
            top, left = rng.integers(LARGE - PART + 1, size=2)
            cut.append(image_HWC[top : top + PART, left : left + PART])
        return to_pixels(np.stack(cut))

    return pixels, len(pictures), parts


def main(
    run: Annotated[
        Path, typer.Option(help="Folder with emoji.npz; the VAE goes to its vae/ folder.")
    ],
    steps: int = 4000,
    batch: int = 8,
    rate: float = 2e-3,
    decoder_only: bool = False,
    start: Annotated[
        Path | None, typer.Option(help="A model at 64 pixels, whose VAE one at 128 starts from.")
    ] = None,
) -> None:
    """Train, then save with the latents' scale in the configuration."""
    torch.manual_seed(0)
    large = (run / "sprites.npy").exists()
    some_pixels, count, pixels_of = large_pixels(run) if large else small_pixels(run)

    vae = (
        AutoencoderKL.from_pretrained(run / "vae")
        if decoder_only
        else new_vae(LARGE if large else PART)
    )
    if start:
        start_from(vae, AutoencoderKL.from_pretrained(start, subfolder="vae"))
    vae.to(memory_format=torch.channels_last)
    if large:
        use_float32_norms(vae)
    if decoder_only:
        vae.encoder.requires_grad_(False)
        vae.quant_conv.requires_grad_(False)
    trained = [parameter for parameter in vae.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=rate, weight_decay=1e-4)
    folder = run / ("vae_decoder" if decoder_only else "vae")
    state = Run(folder, {"vae": vae}, optimizer, steps, ema_decay=0.995)
    state.resume()
    half = large and computed_precision("bf16", torch.device("cpu")) == "bf16"
    for index, generator in state.batches(batch, count):
        set_learning_rate(
            optimizer, rate * warmup_stable_decay(state.step, steps, warmup=50, decay=0.7)
        )

        # The decoder sees a sample of the encoder's posterior, as in every variational autoencoder.
        target = pixels_of(index, generator).contiguous(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            posterior = vae.encode(target).latent_dist
            noise = torch.randn(posterior.mean.shape, generator=generator)
            image = vae.decode(posterior.mean + posterior.std * noise).sample.float()
        loss = reconstruction_loss(image, target)

        # The divergence is a sum over the latent; divided by its size it does not depend on it.
        (loss + KL_WEIGHT * posterior.kl().mean() / posterior.mean[0].numel()).backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

        # Pixels are in [-1, 1]: the peak is 2, its square 4.
        state.show(loss=loss, psnr=-10 * torch.log10(F.mse_loss(image.detach(), target) / 4))
    vae.load_state_dict(state.ema["vae"])
    if not decoder_only:
        vae.register_to_config(scaling_factor=latent_scale(vae, some_pixels))
    vae.save_pretrained(folder)


if __name__ == "__main__":
    typer.run(main)

"""Pre-train the AutoencoderKL of the embedded model: 64x64x3 pixels <-> 16x16x4 latents.

    python examples/emoji/train_vae.py --run runs/emoji

To resume, run the same command again. With ``--decoder-only`` a finished encoder stays as it is,
and so do the latents that a UNet was trained on, while the decoder continues to learn.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import torch.nn.functional as F
import typer
from common import EmojiSet, Run, set_learning_rate, warmup_stable_decay
from diffusers import AutoencoderKL

KL_WEIGHT = 1e-3  # of the divergence a latent number


def new_vae() -> AutoencoderKL:
    """A small AutoencoderKL with random weights: 64x64x3 <-> 16x16x4."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(16, 32, 64),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=64,
        mid_block_add_attention=False,
        act_fn="silu",
    )


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


def main(
    run: Annotated[
        Path, typer.Option(help="Folder with emoji.npz; the VAE goes to its vae/ folder.")
    ],
    steps: int = 4000,
    batch: int = 8,
    rate: float = 2e-3,
    decoder_only: bool = False,
) -> None:
    """Train, then save with the latents' scale in the configuration."""
    torch.manual_seed(0)
    pixels = EmojiSet.load(run).only("train").pixels_BCHW()

    vae = AutoencoderKL.from_pretrained(run / "vae") if decoder_only else new_vae()
    vae.to(memory_format=torch.channels_last)
    if decoder_only:
        vae.encoder.requires_grad_(False)
        vae.quant_conv.requires_grad_(False)
    trained = [parameter for parameter in vae.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=rate, weight_decay=1e-4)
    folder = run / ("vae_decoder" if decoder_only else "vae")
    state = Run(folder, {"vae": vae}, optimizer, steps, ema_decay=0.995)
    state.resume()
    for index, generator in state.batches(batch, len(pixels)):
        set_learning_rate(
            optimizer, rate * warmup_stable_decay(state.step, steps, warmup=50, decay=0.7)
        )

        # The decoder sees a sample of the encoder's posterior, as in every variational autoencoder.
        target = pixels[index].contiguous(memory_format=torch.channels_last)
        posterior = vae.encode(target).latent_dist
        noise = torch.randn(posterior.mean.shape, generator=generator)
        image = vae.decode(posterior.mean + posterior.std * noise).sample
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
        vae.register_to_config(scaling_factor=latent_scale(vae, pixels[::4]))
    vae.save_pretrained(folder)


if __name__ == "__main__":
    typer.run(main)

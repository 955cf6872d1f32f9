"""Train the miniature SDXL's UNet on emoji of several original sizes and crops.

    PYTHONPATH=examples/emoji python examples/emoji_sdxl/pretrain_unet.py --run runs/emoji \\
        --start runs/emoji/start --out runs/emoji/sdxl

To resume, run the same command again. The loop, the loss and the noise schedule are those of the
embedded model (examples/emoji/train_unet.py); all weights of the UNet are trained.

Shape suffixes: N pictures, P captions, L tokens, D width of the context.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from common import (
    EmojiSet,
    Run,
    set_learning_rate,
    to_pixels,
    use_float32_norms,
    warmup_stable_decay,
)
from convert_unet import save_model
from diffusers import DDPMScheduler, StableDiffusionXLPipeline
from diffusers.models.attention_processor import AttnProcessor
from sized_pictures import variants
from torch import Tensor
from train_unet import CAPTION_DROPOUT, SCHEDULE, loss_weight

from hipa_deploy.train.model.mixed_precision import in_precision

# How often a picture is drawn of the image as it is, of a small original, and of a crop.
SHARES = (0.6, 0.2, 0.2)
EACH = 3  # small originals of an image, and crops


@dataclass(frozen=True)
class Pictures:
    """All pictures as latents, with their conditions.

    Attributes:
        latents_NCHW: scaled latents, float32; 1 + 2 x EACH of each image, one after another.
        sizes_N6: their six numbers.
        context_PLD: both encoders' contexts of the caption of each image, then zeros.
        pooled_PD: the second encoder's pooled vectors, then zeros.

    """

    latents_NCHW: Tensor
    sizes_N6: Tensor
    context_PLD: Tensor
    pooled_PD: Tensor

    def draw(self, image: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Draw a picture of each image, and its caption or now and then the empty one.

        Args:
            image: int64 [B], numbers of images.
            generator: draws everything.

        Returns:
            Rows of the latents and of the contexts, int64 [B].

        """
        shares = torch.tensor(SHARES)
        kind = torch.multinomial(shares, len(image), True, generator=generator)
        of_kind = torch.randint(EACH, (len(image),), generator=generator)
        variant = torch.where(kind == 0, 0, 1 + (kind - 1) * EACH + of_kind)
        dropped = torch.rand(len(image), generator=generator) < CAPTION_DROPOUT
        empty = len(self.context_PLD) - 1
        return image * (1 + 2 * EACH) + variant, torch.where(dropped, empty, image)


@torch.no_grad()
def encode(pipe: StableDiffusionXLPipeline, emoji: EmojiSet) -> Pictures:
    """Make and encode every picture once: VAE and text encoders are frozen."""
    rng = np.random.default_rng(0)
    made = []
    for image_HWC in emoji.images_BHWC:
        made.extend(variants(image_HWC, rng, EACH))
    latents = []
    for start in range(0, len(made), 64):
        images = np.stack([one.image_HWC for one in made[start : start + 64]])
        latents.append(pipe.vae.encode(to_pixels(images)).latent_dist.mean)
    contexts = []
    pooled = []
    for start in range(0, len(emoji.captions), 128):
        captions = emoji.captions[start : start + 128]
        context, _, vector, _ = pipe.encode_prompt(captions, do_classifier_free_guidance=False)
        contexts.append(context)
        pooled.append(vector)
    # Guidance of SDXL leads away from zeros, not from an encoded empty prompt.
    contexts.append(torch.zeros_like(contexts[0][:1]))
    pooled.append(torch.zeros_like(pooled[0][:1]))
    return Pictures(
        torch.cat(latents) * pipe.vae.config.scaling_factor,
        torch.tensor([one.sizes for one in made], dtype=torch.float32),
        torch.cat(contexts),
        torch.cat(pooled),
    )


def main(
    run: Annotated[Path, typer.Option(help="Folder with emoji.npz; keeps checkpoints.")],
    start: Annotated[Path, typer.Option(help="The model folder that convert_unet.py wrote.")],
    out: Annotated[Path, typer.Option(help="Model folder to write; must not exist.")],
    steps: int = 800,
    batch: int = 32,
    rate: float = 5e-4,
    average: Annotated[float, typer.Option(help="Decay of the averaged weights.")] = 0.995,
) -> None:
    """Train the UNet with frozen text encoders and VAE, and write the whole model."""
    torch.manual_seed(0)
    pipe = StableDiffusionXLPipeline.from_pretrained(start, add_watermarker=False)
    pipe.set_progress_bar_config(disable=True)
    pictures = encode(pipe, EmojiSet.load(run).only("train"))
    schedule = DDPMScheduler(**SCHEDULE)
    signal = schedule.alphas_cumprod
    snr = signal / (1 - signal)

    # In bfloat16, with attention written out: the fastest on a CPU (train_unet.py).
    unet = pipe.unet.train().to(memory_format=torch.channels_last)
    unet.set_attn_processor(AttnProcessor())
    use_float32_norms(unet)
    in_half = in_precision(unet, "bf16", torch.device("cpu"))
    optimizer = torch.optim.AdamW(
        unet.parameters(), lr=rate, betas=(0.9, 0.99), weight_decay=1e-2, fused=True
    )
    state = Run(run / "unet_sdxl", {"unet": unet}, optimizer, steps, ema_decay=average)
    state.resume()
    count = len(pictures.context_PLD) - 1
    for image, generator in state.batches(batch, count, save_every=50):
        factor = warmup_stable_decay(state.step, steps, warmup=50, decay=0.3)
        set_learning_rate(optimizer, rate * factor)
        picture, caption = pictures.draw(image, generator)
        latents = pictures.latents_NCHW[picture]
        added = {
            "text_embeds": pictures.pooled_PD[caption],
            "time_ids": pictures.sizes_N6[picture],
        }
        noise = torch.randn(latents.shape, generator=generator)
        timestep = torch.randint(1000, (batch,), generator=generator)
        noisy = schedule.add_noise(latents, noise, timestep)

        # An error for each picture, weighted by its timestep.
        predicted = in_half(
            noisy.to(memory_format=torch.channels_last),
            timestep,
            pictures.context_PLD[caption],
            added_cond_kwargs=added,
            return_dict=False,
        )[0].float()
        error = (predicted - noise).square().mean(dim=(1, 2, 3))
        loss = (error * loss_weight(snr[timestep])).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        state.show(loss=loss.detach(), eps=error.detach().mean())
    unet.load_state_dict(state.ema["unet"])
    save_model(pipe, out)


if __name__ == "__main__":
    typer.run(main)

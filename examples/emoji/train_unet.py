"""Pre-train the embedded model's UNet: eps-prediction on 16x16x4 latents, SD's noise schedule.

    python examples/emoji/train_unet.py --run runs/emoji --steps 4000

To resume, or to continue with more ``--steps``, run the same command again. The averaged weights
are saved every 1000 steps, so that ``write_model.py`` can take them during the training.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from common import EmojiSet, Run, set_learning_rate, warmup_stable_decay
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from transformers import CLIPTextModel, CLIPTokenizer

CAPTION_DROPOUT = 0.1  # the empty caption of classifier-free guidance
# After Hang et al. 2023, 'Efficient Diffusion Training via Min-SNR Weighting Strategy'.
BOUNDS = (0.25, 4.0)
SCHEDULE = dict(
    num_train_timesteps=1000, beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"
)


def new_unet() -> UNet2DConditionModel:
    """The embedded model's UNet, 9.6 million parameters, with random weights."""
    return UNet2DConditionModel(
        sample_size=16,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(48, 96, 192),
        layers_per_block=1,
        cross_attention_dim=192,
        attention_head_dim=4,
        norm_num_groups=16,
    )


@torch.no_grad()
def encode_set(run: Path, emoji: EmojiSet) -> tuple[torch.Tensor, torch.Tensor]:
    """Scaled latents [N, 4, 16, 16] and text contexts [N + 1, 77, D], the empty caption last."""
    vae = AutoencoderKL.from_pretrained(run / "vae").eval()
    latents = [vae.encode(x).latent_dist.mean for x in emoji.pixels_BCHW().split(64)]
    tokenizer = CLIPTokenizer.from_pretrained(run / "tokenizer")
    encoder = CLIPTextModel.from_pretrained(run / "text_encoder").eval()
    captions = [*emoji.captions, ""]
    tokens = tokenizer(
        captions, padding="max_length", max_length=77, truncation=True, return_tensors="pt"
    ).input_ids
    contexts = [encoder(chunk).last_hidden_state for chunk in tokens.split(256)]
    return torch.cat(latents) * vae.config.scaling_factor, torch.cat(contexts)


def loss_weight(snr: torch.Tensor) -> torch.Tensor:
    """Weight of the eps error with which the error of x0 is weighed by snr, kept within BOUNDS.

    The upper bound is min-SNR's, the lower is ours. At high noise the caption alone decides what
    appears; there the plain eps error would weigh an error of x0 by snr, which is 0.005 at t = 999,
    and the text would begin to steer late in the training.
    """
    return snr.clamp(*BOUNDS) / snr


def main(
    run: Annotated[
        Path,
        typer.Option(help="Folder with emoji.npz, vae/, tokenizer/, text_encoder/; writes unet/."),
    ],
    steps: int = 4_000,
    batch: int = 64,
    rate: float = 1e-3,
    start: Annotated[
        Path | None, typer.Option(help="A model folder whose UNet to start from, not from noise.")
    ] = None,
) -> None:
    """Train the UNet with frozen text encoder and VAE."""
    torch.manual_seed(0)

    # Text encoder and VAE are frozen: every caption and image is encoded once.
    emoji = EmojiSet.load(run).only("train")
    latents, contexts = encode_set(run, emoji)
    latents = latents.contiguous(memory_format=torch.channels_last)
    schedule = DDPMScheduler(**SCHEDULE)
    signal = schedule.alphas_cumprod
    snr = signal / (1 - signal)

    if start:
        unet = UNet2DConditionModel.from_pretrained(start, subfolder="unet").float()
    else:
        unet = new_unet()
    unet.to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(
        unet.parameters(), lr=rate, betas=(0.9, 0.99), weight_decay=1e-2, fused=True
    )
    state = Run(run / "unet", {"unet": unet}, optimizer, steps, ema_decay=0.999)
    state.resume()
    predict = predictor(unet)
    for index, generator in state.batches(batch, len(latents)):
        set_learning_rate(optimizer, rate * warmup_stable_decay(state.step, steps))

        # Some captions are replaced by the empty one, which is the last context.
        dropped = torch.rand(batch, generator=generator) < CAPTION_DROPOUT
        context = contexts[torch.where(dropped, len(latents), index)]
        noise = torch.randn(latents[index].shape, generator=generator)
        timestep = torch.randint(1000, (batch,), generator=generator)
        noisy = schedule.add_noise(latents[index], noise, timestep).contiguous(
            memory_format=torch.channels_last
        )

        # An error for each image, weighted by its timestep.
        error = (predict(noisy, timestep, context) - noise).square().mean(dim=(1, 2, 3))
        loss = (error * loss_weight(snr[timestep])).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        state.show(loss=loss.detach(), eps=error.detach().mean())
        if (state.step + 1) % 1000 == 0:
            save_average(state, run / "unet")
    save_average(state, run / "unet")


def predictor(unet: UNet2DConditionModel) -> Any:
    """The UNet's forward pass in bfloat16; weights, gradients and optimiser stay in float32.

    On two AVX-512 cores it makes about 105 images a second, against 58 in float32. Attention is
    written out, because the fused kernel's backward pass is slow on heads this small. The UNet is
    not compiled: with torch.compile of torch 2.13 on a CPU, 280 of the 326 parameters got a
    gradient of exactly zero.
    """
    unet.set_attn_processor(AttnProcessor())

    def predict(noisy: torch.Tensor, timestep: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return unet(noisy, timestep, context, return_dict=False)[0].float()

    return predict


def save_average(state: Run, folder: Path) -> None:
    """Save the averaged weights as a diffusers folder."""
    average = new_unet()
    average.load_state_dict(state.ema["unet"])
    average.save_pretrained(folder)


if __name__ == "__main__":
    typer.run(main)

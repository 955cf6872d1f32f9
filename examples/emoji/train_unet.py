"""Pre-train the embedded model's UNet: eps-prediction on 16x16x4 latents, SD's noise schedule.

    python examples/emoji/train_unet.py --run runs/emoji --steps 4000

To resume, or to continue with more ``--steps``, run the same command again. The averaged weights
are saved every 1000 steps, so that ``write_model.py`` can take them during the training.

The set in the run's folder decides the model. One at 128 pixels learns from random pictures of each
emoji, under captions of three levels; see latent_rounds.py.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from common import EmojiSet, Run, set_learning_rate, use_float32_norms, warmup_stable_decay
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from latent_rounds import CaptionContexts, LatentRounds, choose_captions, rounds_at
from transformers import CLIPTextModel, CLIPTokenizer

from hipa_deploy.train.model.mixed_precision import in_precision

CAPTION_DROPOUT = 0.1  # the empty caption of classifier-free guidance
# After Hang et al. 2023, 'Efficient Diffusion Training via Min-SNR Weighting Strategy'.
BOUNDS = (0.25, 4.0)
SCHEDULE = dict(
    num_train_timesteps=1000, beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"
)


SMALL = dict(block_out_channels=(48, 96, 192))
# Fewer parameters (8.1 million) and more work a parameter: model and bundle stay under 45 MB.
LARGE = dict(block_out_channels=(64, 112, 160))


def new_unet(large: bool = False) -> UNet2DConditionModel:
    """The embedded model's UNet with random weights: 9.6 million, or 8.1 million if ``large``."""
    return UNet2DConditionModel(
        sample_size=16,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=192,
        attention_head_dim=4,
        norm_num_groups=16,
        **(LARGE if large else SMALL),
    )


# Latents and contexts of a batch. It is given the rows, the step, and a generator.
Batch = Callable[[torch.Tensor, int, torch.Generator], tuple[torch.Tensor, torch.Tensor]]


def small_batches(run: Path) -> tuple[torch.Tensor, Batch]:
    """Of the set at 64 pixels: how often each row is drawn, and how a batch is made."""
    # Text encoder and VAE are frozen: every caption and image is encoded once.
    emoji = EmojiSet.load(run).only("train")
    latents, contexts = encode_set(run, emoji)

    def batch(
        index: torch.Tensor, _: int, generator: torch.Generator
    ) -> tuple[torch.Tensor, torch.Tensor]:
        # Some captions are replaced by the empty one, which is the last context.
        dropped = torch.rand(len(index), generator=generator) < CAPTION_DROPOUT
        return latents[index], contexts[torch.where(dropped, len(latents), index)]

    return torch.ones(len(latents)), batch


def large_batches(run: Path) -> tuple[torch.Tensor, Batch]:
    """The same at 128 pixels."""
    rounds = LatentRounds(run)
    contexts = CaptionContexts(run, rounds.pictures.rows)

    def batch(
        index: torch.Tensor, step: int, generator: torch.Generator
    ) -> tuple[torch.Tensor, torch.Tensor]:
        rounds.extend(rounds_at(step))
        latents, captions = rounds.batch(index, rounds_at(step), generator)
        return latents, contexts.of(choose_captions(captions, CAPTION_DROPOUT, generator))

    return rounds.weights(), batch


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
    average: Annotated[float, typer.Option(help="Decay of the averaged weights.")] = 0.999,
    start: Annotated[
        Path | None, typer.Option(help="A model folder whose UNet to start from, not from noise.")
    ] = None,
) -> None:
    """Train the UNet with frozen text encoder and VAE."""
    torch.manual_seed(0)

    large = (run / "sprites.npy").exists()
    weights, batch_of = large_batches(run) if large else small_batches(run)
    schedule = DDPMScheduler(**SCHEDULE)
    signal = schedule.alphas_cumprod
    snr = signal / (1 - signal)

    if start:
        unet = UNet2DConditionModel.from_pretrained(start, subfolder="unet").float()
    else:
        unet = new_unet(large)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    unet.to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(
        unet.parameters(), lr=rate, betas=(0.9, 0.99), weight_decay=1e-2, fused=True
    )
    state = Run(run / "unet", {"unet": unet}, optimizer, steps, ema_decay=average, device=device)
    state.resume()
    predict = predictor(unet, device)
    for index, generator in state.batches(batch, len(weights)):
        set_learning_rate(optimizer, rate * warmup_stable_decay(state.step, steps))
        if large:
            index = torch.multinomial(weights, batch, True, generator=generator)
        latents, context = batch_of(index, state.step, generator)
        noise = torch.randn(latents.shape, generator=generator)
        timestep = torch.randint(1000, (batch,), generator=generator)
        noisy = schedule.add_noise(latents, noise, timestep).to(
            device, memory_format=torch.channels_last
        )

        # An error for each image, weighted by its timestep.
        predicted = predict(noisy, timestep.to(device), context.to(device))
        error = (predicted - noise.to(device)).square().mean(dim=(1, 2, 3))
        loss = (error * loss_weight(snr[timestep]).to(device)).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        state.show(loss=loss.detach(), eps=error.detach().mean())
        if (state.step + 1) % 1000 == 0:
            save_average(state, run / "unet", large)
    save_average(state, run / "unet", large)


def predictor(unet: UNet2DConditionModel, device: str) -> Any:
    """The UNet's forward pass in bfloat16; weights, gradients and optimiser stay in float32.

    A CPU without instructions for bfloat16 computes it in float32. One AVX-512 core makes about
    109 images a second. Attention is written out, because the fused kernel's backward pass is slow
    on heads this small. The UNet is not compiled: with torch.compile of torch 2.13 on a CPU, 280 of
    the 326 parameters got a gradient of exactly zero.
    """
    unet.set_attn_processor(AttnProcessor())
    use_float32_norms(unet)
    in_half = in_precision(unet, "bf16", torch.device(device))

    def predict(noisy: torch.Tensor, timestep: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        return in_half(noisy, timestep, context, return_dict=False)[0].float()

    return predict


def save_average(state: Run, folder: Path, large: bool) -> None:
    """Save the averaged weights as a diffusers folder."""
    average = new_unet(large)
    average.load_state_dict(state.ema["unet"])
    average.save_pretrained(folder)


if __name__ == "__main__":
    typer.run(main)

"""Train a style LoRA on a few captioned images, in plain diffusers and peft.

    python examples/style_lora/train_lora.py --images runs/style/images --out runs/style/lora

Nothing of hipa-deploy is needed. The folder of images has a ``metadata.jsonl``, a line for each
image: ``{"file_name": "01.png", "text": "flat emoji of a fox"}``. The LoRA is written as
diffusers writes it, so that ``pipe.load_lora_weights`` reads it.

Shape suffixes: N images, B rows of a batch, T timesteps, L tokens, D width of the text context,
C channels, H W height and width, h w of latents.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from diffusers import DDPMScheduler, StableDiffusionPipeline
from diffusers.utils import convert_state_dict_to_diffusers
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from PIL import Image
from rich.progress import track
from torch import Tensor

MODEL = Path(__file__).resolve().parents[2] / "hipa_deploy/embedded/model"
# The layers that diffusers' own example trains: the projections of every attention layer.
ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
# As the embedded model itself was trained (examples/emoji/train_unet.py): the error of x0 is
# weighed by the signal-to-noise ratio within these bounds. The upper one is that of Hang et al.
# 2023, 'Efficient Diffusion Training via Min-SNR Weighting Strategy'. The lower one matters here:
# one step starts at timestep 999, which the plain loss hardly sees.
BOUNDS = (0.25, 4.0)


def read_images(folder: Path, side: int) -> tuple[Tensor, list[str]]:
    """The images float32 [N, 3, side, side] in [-1, 1], and the caption of each."""
    lines = (folder / "metadata.jsonl").read_text(encoding="utf-8").splitlines()
    pixels = []
    captions = []
    for line in lines:
        row = json.loads(line)
        with Image.open(folder / row["file_name"]) as image:
            resized = image.convert("RGB").resize((side, side), Image.Resampling.LANCZOS)
        pixels.append(np.asarray(resized))
        captions.append(row["text"])
    images_NHWC = torch.from_numpy(np.stack(pixels))
    return images_NHWC.permute(0, 3, 1, 2).float().div(127.5).sub(1), captions


@torch.no_grad()
def encode(
    pipe: StableDiffusionPipeline, images_NCHW: Tensor, captions: list[str]
) -> tuple[Tensor, Tensor]:
    """Scaled latents [N, C, h, w] and text contexts [N, L, D]."""
    latents_NCHW = pipe.vae.encode(images_NCHW).latent_dist.mean * pipe.vae.config.scaling_factor
    tokens_NL = pipe.tokenizer(
        captions, padding="max_length", truncation=True, return_tensors="pt"
    ).input_ids
    return latents_NCHW, pipe.text_encoder(tokens_NL)[0]


def main(
    images: Annotated[Path, typer.Option(help="Folder of images with metadata.jsonl.")],
    out: Annotated[Path, typer.Option(help="Folder to write the LoRA to.")],
    model: Annotated[Path, typer.Option(help="Stable Diffusion folder.")] = MODEL,
    steps: Annotated[int, typer.Option(min=1, help="Training steps.")] = 300,
    batch: Annotated[int, typer.Option(min=1, help="Images a step.")] = 16,
    rate: Annotated[float, typer.Option(help="Learning rate, which falls to 0.")] = 1e-3,
    rank: Annotated[int, typer.Option(min=1, help="Rank of each layer.")] = 16,
    seed: Annotated[int, typer.Option(help="Of weights, noise and batches.")] = 0,
) -> None:
    """Train low-rank layers of the UNet's attention with the DDPM loss."""
    torch.manual_seed(seed)
    pipe = StableDiffusionPipeline.from_pretrained(
        model, safety_checker=None, feature_extractor=None, requires_safety_checker=False
    )
    schedule = DDPMScheduler.from_config(pipe.scheduler.config)
    snr_T = schedule.alphas_cumprod / (1 - schedule.alphas_cumprod)
    weight_T = snr_T.clamp(*BOUNDS) / snr_T

    # Text encoder and VAE do not change, so every image and caption is encoded once.
    side = pipe.unet.config.sample_size * pipe.vae_scale_factor
    latents_NCHW, contexts_NLD = encode(pipe, *read_images(images, side))

    unet = pipe.unet
    unet.requires_grad_(False)
    unet.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=ATTENTION))
    weights = [weight for weight in unet.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=rate, weight_decay=1e-2)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)

    unet.train()
    losses = []
    for _ in track(range(steps), "training"):
        rows_B = torch.randint(len(latents_NCHW), (batch,))
        timestep_B = torch.randint(schedule.config.num_train_timesteps, (batch,))
        noise_BCHW = torch.randn_like(latents_NCHW[rows_B])
        noisy_BCHW = schedule.add_noise(latents_NCHW[rows_B], noise_BCHW, timestep_B)

        predicted_BCHW = unet(noisy_BCHW, timestep_B, contexts_NLD[rows_B]).sample
        error_B = (predicted_BCHW - noise_BCHW).square().mean(dim=(1, 2, 3))
        loss = (error_B * weight_T[timestep_B]).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        decay.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())

    # In diffusers' names, with rank and alpha in the file's header. peft keeps the targets as a
    # set, whose order differs from run to run.
    layers = convert_state_dict_to_diffusers(get_peft_model_state_dict(unet))
    config = unet.peft_config["default"].to_dict()
    config["target_modules"] = sorted(config["target_modules"])
    StableDiffusionPipeline.save_lora_weights(
        out, unet_lora_layers=layers, unet_lora_adapter_metadata=config
    )
    last = losses[-100:]
    print(f"{steps} steps, loss {sum(last) / len(last):.4f} -> {out}")


if __name__ == "__main__":
    typer.run(main)

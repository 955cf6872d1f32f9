"""Train a ControlNet for the embedded model: it draws along the lines of a control image.

    python examples/emoji/train_controlnet.py --run runs/emoji128 --out runs/controlnet

To resume, or to continue with more ``--steps``, run the same command again. The averaged weights
are saved every 500 steps, as the folder ``controlnet`` that ``hipa-export --controlnet`` takes.

After Zhang, Rao and Agrawala 2023 (arXiv 2302.05543) and diffusers' train_controlnet.py: a copy of
the UNet's first half is trained, on the plain error of the predicted noise. The rest of the model
stays as it is. The control image of a picture has its edges, see edges.py. The run's folder needs
only what ``build_dataset.py --size 128`` writes.

Shapes: B pictures of a batch, N emoji, 128 pixels, 16 latents.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import torch.nn.functional as F
import typer
from augment import SIZE, Pictures
from captions import levels
from common import Run, set_learning_rate, use_float32_norms, warmup_stable_decay
from diffusers import ControlNetModel, DDPMScheduler, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from edges import find_edges
from latent_rounds import choose_captions, kind_weights
from train_unet import CAPTION_DROPOUT

from hipa_deploy.models.locate import model_folder
from hipa_deploy.train.model.diffusion_model import DiffusionModel, to_float
from hipa_deploy.train.model.mixed_precision import in_precision

# Of the small network that reads the control image. It works on all 128x128 pixels: with the
# (16, 32, 96, 256) of Stable Diffusion it would take longer than the model's whole UNet.
READER = (8, 16, 32, 64)
SEED = 129  # of the pictures: others than the UNet learned from
STEPS_A_ROUND = 2_000
MOST_ROUNDS = 8


def rounds_at(step: int) -> int:
    """How many rounds the training draws from at this step; see latent_rounds.py."""
    return min(MOST_ROUNDS, 1 + step // STEPS_A_ROUND)


class ControlRounds:
    """Random pictures of every emoji as scaled latents, and their control images.

    As in latent_rounds.py, a round has one picture of every emoji, is encoded once, and stays in a
    file. Control images are stored as bits.
    """

    def __init__(self, run: Path, model: DiffusionModel, folder: Path) -> None:
        """Open the run; nothing is encoded yet."""
        self.pictures = Pictures(run, "train")
        self._model = model
        self._folder = folder
        self._rounds: list[dict[str, Any]] = []

    def extend(self, rounds: int) -> None:
        """Load rounds, and encode those that no earlier run has encoded."""
        while len(self._rounds) < rounds:
            path = self._folder / f"control-{len(self._rounds):02}.pt"
            if not path.exists():
                torch.save(self._encode(len(self._rounds)), path.with_suffix(".tmp"))
                path.with_suffix(".tmp").replace(path)
            self._rounds.append(torch.load(path, weights_only=True))

    @torch.no_grad()
    def _encode(self, number: int) -> dict[str, Any]:
        """float16 latents [N, 4, 16, 16], N colours, and packed edges uint8 [N, 2048]."""
        rng = np.random.default_rng((number, SEED))
        latents = []
        colours = []
        edges = []
        for indices in torch.arange(len(self.pictures)).split(32):
            images_BHWC, names = self.pictures.draw_batch(indices.tolist(), rng)
            encoded = self._model.encode(to_float(torch.from_numpy(images_BHWC)))
            latents.append(encoded.half().cpu())
            colours += names
            for image_HWC in images_BHWC:
                edges.append(np.packbits(find_edges(image_HWC)))
        packed = torch.from_numpy(np.stack(edges))
        return {"latents": torch.cat(latents), "colours": colours, "edges": packed}

    def batch(
        self, index: torch.Tensor, rounds: int, generator: torch.Generator
    ) -> tuple[torch.Tensor, torch.Tensor, list[tuple[str, str, str]]]:
        """A picture of each emoji, of a random round.

        Returns:
            Latents float32 [B, 4, 16, 16]; control images float32 [B, 3, 128, 128], 0 or 1; the
            captions of the three levels of each.

        """
        which = torch.randint(rounds, (len(index),), generator=generator)
        latents = []
        edges = []
        captions = []
        for number, emoji in zip(which.tolist(), index.tolist(), strict=True):
            row = self.pictures.rows[emoji]
            one = self._rounds[number]
            latents.append(one["latents"][emoji])
            edges.append(np.unpackbits(one["edges"][emoji].numpy()).reshape(1, SIZE, SIZE))
            colour = one["colours"][emoji]
            captions.append(levels(row["style"], row["concept"], row["kind"], colour))
        control = torch.from_numpy(np.stack(edges)).float().expand(-1, 3, -1, -1)
        return torch.stack(latents).float(), control, captions


class Contexts:
    """The text encoder's output of every caption, kept from the first time on."""

    def __init__(self, model: DiffusionModel) -> None:
        """Nothing is encoded yet."""
        self._model = model
        self._of_caption: dict[str, torch.Tensor] = {}

    def of(self, captions: list[str]) -> torch.Tensor:
        """float32 [B, 77, width]."""
        new = [one for one in dict.fromkeys(captions) if one not in self._of_caption]
        if new:
            # float16: a few ten thousand captions stay below a gigabyte.
            for caption, context in zip(new, self._model.context(new).half().cpu(), strict=True):
                self._of_caption[caption] = context
        return torch.stack([self._of_caption[caption] for caption in captions]).float()


def new_controlnet(unet: UNet2DConditionModel) -> ControlNetModel:
    """A ControlNet that begins as a copy of the UNet's first half, and changes nothing yet.

    What reads the control image begins with He's weights. With PyTorch's own, which diffusers
    takes, each layer makes the lines about four times fainter, and a 7000th of them arrives.
    """
    controlnet = ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=READER)
    reader = controlnet.controlnet_cond_embedding
    # The last layer stays zero, as in every ControlNet.
    for layer in (reader.conv_in, *reader.blocks):
        torch.nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
        torch.nn.init.zeros_(layer.bias)
    return controlnet


def controlled(unet: UNet2DConditionModel, controlnet: ControlNetModel, device: str) -> Any:
    """The noise that both predict together, in bfloat16 where that is faster; see train_unet.py."""
    for part in (unet, controlnet):
        part.set_attn_processor(AttnProcessor())
        use_float32_norms(part)

    def together(
        noisy: torch.Tensor, timestep: torch.Tensor, context: torch.Tensor, control: torch.Tensor
    ) -> torch.Tensor:
        down, mid = controlnet(noisy, timestep, context, controlnet_cond=control, return_dict=False)
        return unet(
            noisy,
            timestep,
            context,
            down_block_additional_residuals=down,
            mid_block_additional_residual=mid,
            return_dict=False,
        )[0]

    return in_precision(together, "bf16", torch.device(device))


def main(
    run: Annotated[Path, typer.Option(help="Folder of build_dataset.py --size 128.")],
    out: Annotated[Path, typer.Option(help="Folder for checkpoints, latents and controlnet/.")],
    model: Annotated[str, typer.Option(help="Base model.")] = "emoji",
    steps: int = 4_000,
    batch: int = 32,
    rate: float = 1e-3,
    average: Annotated[float, typer.Option(help="Decay of the averaged weights.")] = 0.998,
) -> None:
    """Train a ControlNet with everything else frozen."""
    torch.manual_seed(0)
    base = DiffusionModel.load(model_folder(model))
    device = str(base.device)
    unet = base.unet
    schedule = DDPMScheduler(**base.schedule)
    out.mkdir(parents=True, exist_ok=True)
    rounds = ControlRounds(run, base, out)
    contexts = Contexts(base)
    weights = kind_weights(rounds.pictures.rows)

    controlnet = new_controlnet(unet).requires_grad_(True).train()
    for part in (unet, controlnet):
        part.to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(
        controlnet.parameters(), lr=rate, betas=(0.9, 0.99), weight_decay=1e-2, fused=True
    )
    state = Run(out, {"controlnet": controlnet}, optimizer, steps, ema_decay=average, device=device)
    state.resume()
    predict = controlled(unet, controlnet, device)

    for _, generator in state.batches(batch, len(weights)):
        set_learning_rate(optimizer, rate * warmup_stable_decay(state.step, steps))
        rounds.extend(rounds_at(state.step))
        index = torch.multinomial(weights, batch, True, generator=generator)
        latents, control, captions = rounds.batch(index, rounds_at(state.step), generator)
        context = contexts.of(choose_captions(captions, CAPTION_DROPOUT, generator))
        noise = torch.randn(latents.shape, generator=generator)
        timestep = torch.randint(len(schedule), (batch,), generator=generator)
        noisy = schedule.add_noise(latents, noise, timestep).to(
            device, memory_format=torch.channels_last
        )

        control = control.to(device, memory_format=torch.channels_last)
        predicted = predict(noisy, timestep.to(device), context.to(device), control).float()
        loss = F.mse_loss(predicted, noise.to(device))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(controlnet.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        state.show(eps=loss.detach())
        if (state.step + 1) % 500 == 0:
            save_average(state, unet, out / "controlnet")
    save_average(state, unet, out / "controlnet")


def save_average(state: Run, unet: UNet2DConditionModel, folder: Path) -> None:
    """Save the averaged weights as a diffusers folder."""
    averaged = new_controlnet(unet)
    averaged.load_state_dict(state.ema["controlnet"])
    averaged.save_pretrained(folder)


if __name__ == "__main__":
    typer.run(main)

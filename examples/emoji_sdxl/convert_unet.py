"""Make an SDXL out of the embedded Stable Diffusion: its weights, with SDXL's conditions.

    PYTHONPATH=examples/emoji python examples/emoji_sdxl/convert_unet.py --run runs/emoji \\
        --out runs/emoji/start

The UNet has SDXL's configuration: two text encoders' contexts side by side, a pooled vector, six
numbers of size and crop, linear projections, and more transformer layers at the lowest resolution.
Every weight that has a place in it is copied. What is new is set so that the UNet predicts nearly
what the embedded one does: pretrain_unet.py then trains all of it.

Shape suffixes: N prompts, L tokens, E width of the embedded model's context, D width of SDXL's.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer
from diffusers import (
    AutoencoderKL,
    EulerDiscreteScheduler,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from torch import Tensor
from train_second_encoder import EMBEDDED
from train_unet import SCHEDULE
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from hipa_deploy.disk.files import new_folder

TIME_WIDTH = 32  # sines and cosines of each of the six numbers; 256 in SDXL
LAYERS = (1, 1, 2)  # transformer layers of each level; (1, 2, 10) in SDXL
# Of least squares. Contexts repeat each other, so that without it the solution is not unique.
RIDGE = 1e-3


def load_pipeline(run: Path, prompts: list[str]) -> StableDiffusionXLPipeline:
    """The embedded model's parts and the second encoder, as one SDXL that is not trained yet.

    Args:
        run: Folder with tokenizer_2/ and text_encoder_2/.
        prompts: On which contexts are compared: the captions of the training images.

    """
    first = CLIPTextModel.from_pretrained(EMBEDDED, subfolder="text_encoder").float()
    second = CLIPTextModelWithProjection.from_pretrained(run / "text_encoder_2").float()
    old = UNet2DConditionModel.from_pretrained(EMBEDDED, subfolder="unet").float()
    width = first.config.hidden_size + second.config.hidden_size
    pipe = StableDiffusionXLPipeline(
        vae=AutoencoderKL.from_pretrained(EMBEDDED, subfolder="vae").float(),
        text_encoder=first,
        text_encoder_2=second,
        tokenizer=CLIPTokenizer.from_pretrained(EMBEDDED, subfolder="tokenizer"),
        tokenizer_2=CLIPTokenizer.from_pretrained(run / "tokenizer_2"),
        unet=new_unet(old, width, second.config.projection_dim),
        # The sampler that the published stable-diffusion-xl-base-1.0 names.
        scheduler=EulerDiscreteScheduler(**SCHEDULE, steps_offset=1, timestep_spacing="leading"),
        add_watermarker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    fit_DE, explained = fit_contexts(pipe, prompts)
    print(f"the new contexts explain {explained:.1%} of the old ones' variance")
    copy_unet(old, pipe.unet, fit_DE)
    return pipe


def new_unet(old: UNet2DConditionModel, width: int, pooled: int) -> UNet2DConditionModel:
    """A UNet of SDXL's configuration, with random weights.

    Args:
        old: The embedded model's, whose channels, blocks and heads it takes.
        width: Of both encoders' contexts together.
        pooled: Width of the second encoder's pooled vector.

    """
    heads = old.config.attention_head_dim
    return UNet2DConditionModel(
        sample_size=old.config.sample_size,
        block_out_channels=old.config.block_out_channels,
        down_block_types=old.config.down_block_types,
        up_block_types=old.config.up_block_types,
        layers_per_block=old.config.layers_per_block,
        norm_num_groups=old.config.norm_num_groups,
        cross_attention_dim=width,
        # diffusers calls the number of heads so; SDXL names one for each level.
        attention_head_dim=(heads, heads, heads),
        transformer_layers_per_block=LAYERS,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=TIME_WIDTH,
        projection_class_embeddings_input_dim=pooled + 6 * TIME_WIDTH,
    )


@torch.no_grad()
def fit_contexts(pipe: StableDiffusionXLPipeline, prompts: list[str]) -> tuple[Tensor, float]:
    """The linear map [D, E] that best makes the embedded model's context of SDXL's.

    The embedded UNet was trained on its encoder's last state. SDXL takes the state before the last
    layer, of both encoders. Keys and values are linear in the context, so that a map of contexts
    becomes a change of their weights.

    Args:
        pipe: With both encoders.
        prompts: The captions of the training images.

    Returns:
        The map, and the share of the variance of the old contexts that it explains.

    """
    new_NLD = pipe.encode_prompt(prompts, do_classifier_free_guidance=False)[0]
    tokens = pipe.tokenizer(
        prompts, padding="max_length", max_length=new_NLD.shape[1], return_tensors="pt"
    ).input_ids
    old_NLE = torch.cat([pipe.text_encoder(some).last_hidden_state for some in tokens.split(256)])
    inputs = new_NLD.flatten(0, 1).double()
    targets = old_NLE.flatten(0, 1).double()

    gram = inputs.T @ inputs
    gram += RIDGE * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)
    fit_DE = torch.linalg.solve(gram, inputs.T @ targets)
    left = (inputs @ fit_DE - targets).square().sum()
    explained = 1 - left / (targets - targets.mean(0)).square().sum()
    return fit_DE.float(), float(explained)


@torch.no_grad()
def copy_unet(old: UNet2DConditionModel, new: UNet2DConditionModel, fit_DE: Tensor) -> None:
    """Copy the old UNet's weights, and let new parts begin with no effect.

    Args:
        old: The embedded model's.
        new: Changed in place.
        fit_DE: What makes an old context of a new one.

    Raises:
        ValueError: A weight of the old UNet has no place in the new one.

    """
    weights = new.state_dict()
    for name, value in old.state_dict().items():
        if name not in weights:
            raise ValueError(f"{name} of the embedded UNet has no place in SDXL's")
        if name.endswith(("attn2.to_k.weight", "attn2.to_v.weight")):
            weights[name].copy_(value @ fit_DE.T)
        else:
            # A projection is a convolution of one pixel there, and a linear layer here.
            weights[name].copy_(value.reshape(weights[name].shape))

    # A further transformer layer adds what these three projections make to its input: nothing.
    for name, weight in weights.items():
        further = ".transformer_blocks." in name and ".transformer_blocks.0." not in name
        silent = any(part in name for part in ("to_out.0.", "ff.net.2."))
        if (further and silent) or name.startswith("add_embedding.linear_2."):
            weight.zero_()


def save_model(pipe: StableDiffusionXLPipeline, out: Path) -> None:
    """Write the pipeline and the embedded model's lists of prompts, whole or not at all."""
    with new_folder(out) as scratch:
        pipe.save_pretrained(scratch)
        for prompts in EMBEDDED.glob("prompts*.txt"):
            (scratch / prompts.name).write_bytes(prompts.read_bytes())


def main(
    run: Annotated[Path, typer.Option(help="Folder with tokenizer_2/ and text_encoder_2/.")],
    out: Annotated[Path, typer.Option(help="Model folder to write; must not exist.")],
) -> None:
    """Write an SDXL folder that pretrain_unet.py starts from."""
    torch.manual_seed(0)
    prompts = (EMBEDDED / "prompts.txt").read_text(encoding="utf-8").splitlines()
    save_model(load_pipeline(run, prompts), out)


if __name__ == "__main__":
    typer.run(main)

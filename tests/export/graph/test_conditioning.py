"""The UNet without its embedding path against diffusers' own, in float32."""

from __future__ import annotations

import pytest
import torch
from diffusers import UNet2DConditionModel

from hipa_deploy.errors import HipaError
from hipa_deploy.export.graph.conditioning import (
    Conditioning,
    Recorder,
    conditioning_channels,
    cut_conditioning,
)
from hipa_deploy.tasks import size_numbers

POOLED = 20
CONTEXT = 40


def small_unet(**changes: object) -> UNet2DConditionModel:
    torch.manual_seed(3)
    values = {
        "sample_size": 8, "block_out_channels": (8, 16, 16), "layers_per_block": 1,
        "norm_num_groups": 4, "cross_attention_dim": CONTEXT, "attention_head_dim": (2, 4, 4),
        "transformer_layers_per_block": (1, 1, 2), "use_linear_projection": True,
        "addition_embed_type": "text_time", "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": POOLED + 6 * 8,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    }  # fmt: skip
    return UNet2DConditionModel(**{**values, **changes}).eval()


# SSD-1B's and Vega's own keys: a middle block of one ResNet block, and other depths on the way up.
DISTILLED = {
    "mid_block_type": "UNetMidBlock2D",
    "transformer_layers_per_block": [1, [1], [2]],
    "reverse_transformer_layers_per_block": [[2, 3], [1, 1], 1],
}


@torch.no_grad()
@pytest.mark.parametrize("changes", [{}, DISTILLED, {"time_embedding_act_fn": "mish"}])
def test_the_cut_unet_gives_what_diffusers_gives(changes: dict) -> None:
    unet = small_unet(**changes)
    noise_BCHW = torch.randn(2, 4, 8, 8)
    context_BLD = torch.randn(2, 7, CONTEXT)
    pooled_BP = torch.randn(2, POOLED)
    sizes = size_numbers(64, 96)
    time_ids = torch.tensor([sizes] * 2, dtype=torch.float32)
    added = {"text_embeds": pooled_BP, "time_ids": time_ids}
    expected = []
    recorded = []
    for timestep in (999, 499):
        with Recorder(unet) as recorder:
            output = unet(noise_BCHW, timestep, context_BLD, added_cond_kwargs=added).sample
        expected.append(output)
        recorded.append(recorder.conditioning_BK)

    conditioning_BSK = Conditioning(unet, [999, 499], sizes)(pooled_BP)
    assert conditioning_BSK.shape == (2, 2, conditioning_channels(unet))
    assert (conditioning_BSK - torch.stack(recorded, dim=1)).abs().max() < 1e-6
    told_BSK = Conditioning(unet, [999, 499], None)(pooled_BP, torch.tensor([sizes] * 2))
    torch.testing.assert_close(told_BSK, conditioning_BSK, rtol=0, atol=0)
    # Another prompt and another timestep must show in it, or the comparison would say nothing.
    assert (conditioning_BSK[0] - conditioning_BSK[1]).abs().max() > 1e-2
    assert (conditioning_BSK[:, 0] - conditioning_BSK[:, 1]).abs().max() > 1e-3
    assert cut_conditioning(unet) == conditioning_BSK.shape[-1]
    for start, output in enumerate(expected):
        got = unet(noise_BCHW, conditioning_BSK[:, start], context_BLD).sample
        assert (got - output).abs().max() < 1e-5
    names = [name for name, _ in unet.named_parameters()]
    assert not any("embedding" in name or "time_emb_proj" in name for name in names)


@pytest.mark.parametrize("changes", [{"resnet_time_scale_shift": "scale_shift"}])
def test_another_use_of_the_embedding_is_refused(changes: dict) -> None:
    with pytest.raises(HipaError, match="uses its time embedding as 'scale_shift'"):
        cut_conditioning(small_unet(**changes))

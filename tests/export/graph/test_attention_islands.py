"""Islands of float32 keep each attention in one precision, in a UNet of SD 1.5's blocks.

A softmax in float32 between products in float16 would keep TensorRT from fusing an attention
(https://github.com/Stability-AI/stable-audio-3/issues/79).
"""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

from hipa_deploy.bundle.manifest import OneStep, StageSpec, TensorSpec
from hipa_deploy.engines.faults.attention import find_attentions
from hipa_deploy.engines.faults.blocks import block_at, find_blocks
from hipa_deploy.engines.faults.onnx_graph import FLOAT, FLOAT16, Graph, read_graph
from hipa_deploy.export.graph.fold import fold_timestep
from hipa_deploy.export.graph.half_precision import to_half, whole_attentions
from hipa_deploy.export.graph.modules import OneStepUNet
from hipa_deploy.export.graph.to_onnx import export_stage

# SD 1.5's configuration with narrow layers: 16 transformer blocks, an attention to the image and
# one to the text in each.
ATTENTIONS = 32
STEP = OneStep(
    prediction_type="epsilon",
    timestep=999,
    alpha_bar=0.0047,
    scaling_factor=0.18215,
    latent_shape=(4, 16, 16),
    height=128,
    width=128,
)
BLOCK = "down_blocks.1.attentions.0"
IN_IT = f"{BLOCK}.transformer_blocks.0"


def export(folder: Path, islands: tuple[str, ...]) -> Graph:
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(32, 64, 128, 128),
        attention_head_dim=2,
        cross_attention_dim=16,
        norm_num_groups=8,
    ).eval()
    unet.requires_grad_(False)
    fold_timestep(unet, STEP.timestep)
    module = to_half(OneStepUNet(unet, STEP), islands)
    noise = TensorSpec(name="noise", dtype="float32", shape=(1, 4, 16, 16))
    context = TensorSpec(name="context", dtype="float16", shape=(1, 77, 16))
    latents = TensorSpec(name="latents", dtype="float32", shape=(1, 4, 16, 16))
    spec = StageSpec(name="unet", inputs=(noise, context), outputs=(latents,))
    export_stage(module, spec, folder)
    return read_graph(folder / "model.onnx")


def test_no_island_cuts_through_an_attention(tmp_path: Path) -> None:
    around = [f"unet.{IN_IT}.norm1", f"unet.{IN_IT}.attn1.to_out.0", f"unet.{BLOCK}.proj_in"]
    # A projection brings its whole attention with it, and no other.
    inside = [f"unet.{IN_IT}.attn2.to_v"]
    graph = export(tmp_path / "unet", whole_attentions(around + inside))
    found = find_attentions(graph)
    assert len(found) == ATTENTIONS
    assert all(attention.in_one_precision for attention in found)
    (wide,) = [attention for attention in found if attention.elements[0] == FLOAT]
    assert block_at(find_blocks(graph), wide.nodes[0]).name == f"unet.{BLOCK}"
    assert {attention.elements[0] for attention in found} == {FLOAT, FLOAT16}
    assert sum(attention.can_be_fused(87) for attention in found) == ATTENTIONS - 1

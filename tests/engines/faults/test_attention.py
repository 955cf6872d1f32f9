"""Counting attentions: in the embedded graphs, in one of SD 1.5's node types, in engines."""

from __future__ import annotations

import json

import numpy as np
import pytest

from hipa_deploy import embedded
from hipa_deploy.bundle.folder import Bundle
from hipa_deploy.engines.build.ladder import StageGraph
from hipa_deploy.engines.faults.attention import count_fused, find_attentions
from hipa_deploy.engines.faults.island import tensors_of_nodes, widen
from hipa_deploy.engines.faults.onnx_graph import FLOAT, FLOAT16, parse_graph

BUNDLE = Bundle.open(embedded.BUNDLE)
RTX_30 = 86


@pytest.mark.parametrize(
    ("stage", "sizes"),
    [
        ("text_encoder", [32] * 3),
        ("unet", [28] * 2 + [40] * 8 + [28] * 4),  # of 112 and 160 channels, with 4 heads each
        ("vae_decoder", []),
    ],
)
def test_attentions_of_the_embedded_stages_whose_heads_fit_can_be_fused(stage, sizes):
    found = find_attentions(StageGraph.read(BUNDLE, stage).graph)
    assert [attention.head_size for attention in found] == sizes
    assert all(attention.in_one_precision for attention in found)
    assert all(attention.can_be_fused(RTX_30) is (attention.head_size != 28) for attention in found)
    assert not any(attention.can_be_fused(70) for attention in found)


def test_a_softmax_in_float32_cannot_be_fused():
    graph = StageGraph.read(BUNDLE, "text_encoder").graph
    softmax = [number for number, node in enumerate(graph.nodes) if node.operator == "Softmax"]
    content = widen(
        BUNDLE.stage_path("text_encoder").read_bytes(), tensors_of_nodes(graph, softmax[:1])
    )
    broken, *others = find_attentions(parse_graph(content))
    assert set(broken.elements) == {FLOAT, FLOAT16}
    assert not broken.in_one_precision
    assert not broken.can_be_fused(RTX_30)
    assert all(attention.can_be_fused(RTX_30) for attention in others)


def layer(name: str, tactic: str = "") -> dict[str, object]:
    return {"Name": name, "TacticName": tactic, "LayerType": "kgen", "Outputs": []}


@pytest.mark.parametrize(
    ("layers", "count"),
    [
        ([layer("_gemm_mha_v2_myl0_12", "_gemm_mha_v2_0x1234"), layer("Conv_3")], 1),
        (["_gemm_mha_v2_myl0_12", "__myl_Fc_myl0_3"], 1),
        ([layer("{ForeignNode[node_a...node_b]}", "fmha_v2_flash_attention_fp16_S_64")], 1),
        # Not fused: its parts carry the name of the ONNX node that they are from.
        ([layer("__myl_MaxSubExpSumDivMul_myl0_5"), layer("node_scaled_dot_product_attention")], 0),
        ([layer("softmax_of_attention")], 0),
        ([], None),
    ],
)
def test_fused_attentions_are_counted_by_layer(layers, count):
    assert count_fused(json.dumps({"Layers": layers})) == count


def test_an_inspector_without_json_says_nothing():
    assert count_fused("") is None


def test_a_heads_size_that_does_not_fit_keeps_from_fusing():
    (attention, *_) = find_attentions(StageGraph.read(BUNDLE, "unet").graph)
    assert attention.head_size == 28
    for size, fits in ((40, True), (44, False), (8, False), (264, False), (None, True)):
        assert attention._replace(head_size=size).can_be_fused(RTX_30) is fits
    assert np.dtype(np.float16).itemsize == 2

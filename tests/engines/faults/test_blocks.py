"""Blocks of the embedded stages, and of graphs without names."""

from __future__ import annotations

import pytest

from hipa_deploy import embedded
from hipa_deploy.bundle.folder import Bundle
from hipa_deploy.engines.faults.blocks import block_at, block_name, find_blocks, weight_names
from hipa_deploy.engines.faults.onnx_graph import Graph, Node, read_graph

BUNDLE = Bundle.open(embedded.BUNDLE)


@pytest.mark.parametrize("stage", sorted(BUNDLE.stages))
def test_every_node_is_in_one_block_and_each_hands_on_its_last_tensor(stage):
    graph = read_graph(BUNDLE.stage_path(stage))
    blocks = find_blocks(graph, weight_names(BUNDLE, stage))
    numbers = [number for block in blocks for number in range(block.first, block.last + 1)]
    assert numbers == list(range(len(graph.nodes)))
    for block in blocks:
        assert block.first <= graph.makers()[block.tensor] <= block.last
        assert block_at(blocks, block.last) == block


def test_the_unets_blocks_are_those_of_the_model():
    graph = read_graph(BUNDLE.stage_path("unet"))
    blocks = find_blocks(graph, weight_names(BUNDLE, "unet"))
    names = [block.name for block in blocks]
    assert len(set(names)) == len(names) == 25
    assert names[:5] == [
        "unet.conv_in",
        "unet.down_blocks.0.resnets.0",
        "unet.down_blocks.0.downsamplers.0",
        "unet.down_blocks.1.resnets.0",
        "unet.down_blocks.1.attentions.0",
    ]
    # A residual block ends with the addition of what went into it.
    ends = [graph.nodes[block.last].operator for block in blocks if "resnets" in block.name]
    assert set(ends) == {"Add", "Concat"}


def test_without_a_weight_map_the_names_in_the_file_do():
    graph = read_graph(BUNDLE.stage_path("unet"))
    names = {block.name for block in find_blocks(graph)}
    assert "unet.up_blocks.1.attentions.1" in names


def test_a_graph_without_names_is_one_block():
    nodes = (Node("Relu", "", ("x",), ("h",)), Node("Relu", "", ("h",), ("y",)))
    (block,) = find_blocks(Graph(nodes, {}, frozenset(), ("y",)))
    assert block == ("graph", 0, 1, "y")


@pytest.mark.parametrize(
    ("weight", "block"),
    [
        (
            "unet.mid_block.attentions.0.transformer_blocks.0.norm1.weight",
            "unet.mid_block.attentions.0",
        ),
        (
            "encoder.text_model.encoder.layers.11.mlp.fc1.bias",
            "encoder.text_model.encoder.layers.11",
        ),
        ("decoder.up_blocks.2.upsamplers.0.conv.weight", "decoder.up_blocks.2.upsamplers.0"),
        ("unet.conv_out.weight", "unet.conv_out"),
        ("weight", "weight"),
    ],
)
def test_a_weight_belongs_to_a_block(weight, block):
    assert block_name(weight) == block

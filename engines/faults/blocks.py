"""A graph in blocks, as people who know the model call them: unet.down_blocks.0.resnets.1.

A node belongs to the block of the weights that it takes. Those without weights, such as the
addition at the end of a residual block, are shared out where the fewest tensors cross.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping
from typing import NamedTuple

from hipa_deploy.bundle.adaptor_swap import read_weight_map
from hipa_deploy.bundle.folder import Bundle
from hipa_deploy.engines.faults.onnx_graph import Graph

# The parts of diffusers' and transformers' models that a person would look at as a whole.
_BLOCK = re.compile(r"^(.*?\.(?:resnets|attentions|downsamplers|upsamplers|layers)\.\d+)\.")


class Block(NamedTuple):
    """Nodes that follow each other in the file.

    Attributes:
        name: of the module, such as 'unet.down_blocks.0.resnets.1'.
        first: the number of its first node.
        last: the number of its last node.
        tensor: what the block hands on: the floating-point tensor that is made last in it.

    """

    name: str
    first: int
    last: int
    tensor: str


def block_name(weight: str) -> str:
    """The block that a weight belongs to.

    Example:
        >>> block_name("unet.down_blocks.0.resnets.1.conv1.weight")
        'unet.down_blocks.0.resnets.1'
        >>> block_name("unet.conv_in.bias")
        'unet.conv_in'

    """
    found = _BLOCK.match(weight)
    if found:
        return found.group(1)
    return weight.rpartition(".")[0] or weight


def weight_names(bundle: Bundle, stage: str) -> dict[str, str]:
    """The parameter of the model behind each weight of a stage that has one, by its ONNX name.

    It is empty for a bundle without weight maps; the weights' own names must do then.

    Raises:
        HipaError: the weight map is damaged.

    """
    found = read_weight_map(bundle, stage)
    if found is None:
        return {}
    return {name: weight.places[0] for name, weight in found.weights.items() if weight.places}


def find_blocks(graph: Graph, names: Mapping[str, str] | None = None) -> tuple[Block, ...]:
    """The blocks of ``graph``, in its order; every node is in one.

    Args:
        graph: a stage's graph.
        names: what ``weight_names`` gives.

    """
    labels = _labels(graph, names or {})
    crossing = _crossing(graph)

    # A block ends where the fewest tensors cross to the next, between the last node that is its own
    # and the first that is the next block's; at the first of several such places.
    ends = []
    known = [number for number, label in enumerate(labels) if label is not None]
    for here, there in itertools.pairwise(known):
        if labels[here] != labels[there]:
            cut = min(range(here, there), key=crossing.__getitem__)
            cut = _with_residual(graph, crossing, cut, there)
            ends.append((labels[here] or "", cut))
    whole = labels[known[-1]] if known else "graph"
    ends.append((whole or "graph", len(graph.nodes) - 1))

    blocks = []
    first = 0
    for name, last in ends:
        tensor = _last_tensor(graph, first, last)
        if tensor is not None:
            blocks.append(Block(name, first, last, tensor))
            first = last + 1
    return tuple(blocks)


def _with_residual(graph: Graph, crossing: list[int], cut: int, there: int) -> int:
    """The end of a block, with the addition of its input where this costs nothing."""
    end = cut + 1
    is_addition = graph.nodes[end].operator == "Add"
    return end if end < there and is_addition and crossing[end] <= crossing[cut] else cut


def _labels(graph: Graph, names: Mapping[str, str]) -> list[str | None]:
    """The block of each node that takes a weight with a name of the model; None for the others."""
    labels: list[str | None] = []
    for node in graph.nodes:
        label = None
        for name in node.inputs:
            place = names.get(name, name if name in graph.weights and "." in name else None)
            if place is not None and label is None:
                label = block_name(place)
        labels.append(label)
    return labels


def _crossing(graph: Graph) -> list[int]:
    """Behind each node, how many tensors were made that a later node takes."""
    last_use = {name: numbers[-1] for name, numbers in graph.users().items()}
    change = [0] * (len(graph.nodes) + 1)
    for name, maker in graph.makers().items():
        if name in last_use:
            change[maker] += 1
            change[last_use[name]] -= 1
    found = []
    alive = 0
    for step in change[:-1]:
        alive += step
        found.append(alive)
    return found


def _last_tensor(graph: Graph, first: int, last: int) -> str | None:
    """The floating-point tensor that is made last among some nodes; None if there is none."""
    for number in range(last, first - 1, -1):
        for name in graph.nodes[number].outputs:
            if graph.is_floating(name):
                return name
    return None


def block_at(blocks: tuple[Block, ...], number: int) -> Block:
    """The block of the node with this number."""
    for block in blocks:
        if number <= block.last:
            return block
    return blocks[-1]

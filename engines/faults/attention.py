"""The attentions of a graph: where they are, and whether TensorRT can compute each in one kernel.

An attention is softmax(q k^T) v. TensorRT fuses it into one kernel where both products are in
float16 (TensorRT's guide, 'Multi-Head Attention Fusion': compute capability 7.5 or more, heads of
16 to 256 numbers, a multiple of 8). A softmax that is cast to float32 on its way keeps it from
that, and the engine becomes several times slower without a word.
"""

from __future__ import annotations

import json
import re
from typing import Any, NamedTuple

from hipa_deploy.engines.faults.onnx_graph import FLOAT16, Graph, Node

# What may lie between the parts of an attention: scaling, mask, casts, shapes.
_BETWEEN = ("Add", "Mul", "Div", "Cast", "Where", "Reshape", "Transpose", "Sub", "Identity")
_FARTHEST = 6  # nodes
_HEAD_SIZES = range(16, 257, 8)
_LEAST_SM = 75
# How fused attentions are called in an engine's layers and tactics: _gemm_mha_v2, fmha, ...
_FUSED = re.compile(r"mha|flash|attention", re.IGNORECASE)
_SOFTMAX_TOO = re.compile(r"softmax", re.IGNORECASE)


class Attention(NamedTuple):
    """One attention of a graph.

    Attributes:
        nodes: the numbers of its nodes from q k^T to the product with v.
        scores: the output of q k^T.
        output: the output of the product with v.
        elements: the types of q, k, scores, softmax, v and output, as TensorProto.DataType.
        head_size: how many numbers a head's vectors have; None where the file does not say.

    """

    nodes: tuple[int, ...]
    scores: str
    output: str
    elements: tuple[int, ...]
    head_size: int | None

    @property
    def in_one_precision(self) -> bool:
        """Whether everything from q and k to the output has one type."""
        return len(set(self.elements)) == 1

    def can_be_fused(self, sm: int) -> bool:
        """Whether TensorRT's conditions for one kernel are met on compute capability ``sm``."""
        fits = self.head_size is None or self.head_size in _HEAD_SIZES
        return fits and sm >= _LEAST_SM and set(self.elements) == {FLOAT16}


def find_attentions(graph: Graph) -> tuple[Attention, ...]:
    """Every attention of ``graph``, in its order."""
    makers = graph.makers()
    users = graph.users()
    found = []
    for number, node in enumerate(graph.nodes):
        if node.operator == "Softmax":
            before = _back_to_product(graph, makers, number)
            after = _on_to_product(graph, users, number)
            if before and after:
                found.append(_attention(graph, (*reversed(before), number, *after)))
    return tuple(found)


def _back_to_product(
    graph: Graph, makers: dict[str, int], number: int, depth: int = _FARTHEST
) -> list[int]:
    """The nodes before a softmax, back to the product of query and key; empty if there is none.

    A mask is added or multiplied on the way, so that both sides of a node are looked at.
    """
    for name in graph.nodes[number].inputs:
        if name not in makers or depth == 0:
            continue
        before = makers[name]
        node = graph.nodes[before]
        if node.operator == "MatMul" and _is_of_two_tensors(graph, node):
            return [before]
        if node.operator in _BETWEEN:
            rest = _back_to_product(graph, makers, before, depth - 1)
            if rest:
                return [before, *rest]
    return []


def _on_to_product(graph: Graph, users: dict[str, list[int]], number: int) -> list[int]:
    """The nodes behind a softmax, on to the product with the values; empty if there is none."""
    path = []
    for _ in range(_FARTHEST):
        following = users.get(graph.nodes[number].outputs[0], [])
        if len(following) != 1:
            return []
        number = following[0]
        path.append(number)
        node = graph.nodes[number]
        if node.operator == "MatMul":
            return path
        if node.operator not in _BETWEEN:
            return []
    return []


def _is_of_two_tensors(graph: Graph, node: Node) -> bool:
    return not any(name in graph.weights for name in node.inputs)


def _attention(graph: Graph, numbers: tuple[int, ...]) -> Attention:
    scores = graph.nodes[numbers[0]]
    product = graph.nodes[numbers[-1]]
    names = [*scores.inputs, *product.inputs]
    for number in numbers:
        names += graph.nodes[number].outputs
    elements = []
    for name in names:
        kind = graph.types.get(name)
        if kind is not None and graph.is_floating(name):
            elements.append(kind.element)
    query = graph.types.get(scores.inputs[0])
    size = query.shape[-1] if query is not None and query.shape else None
    return Attention(
        nodes=numbers,
        scores=scores.outputs[0],
        output=product.outputs[0],
        elements=tuple(elements),
        head_size=size,
    )


def count_fused(text: str) -> int | None:
    """How many attentions an engine computes in one kernel each, by the JSON of its inspector.

    Returns:
        None if the inspector names no layers.

    Example:
        >>> count_fused('{"Layers": [{"Name": "_gemm_mha_v2_myl0_7"}, {"Name": "conv"}]}')
        1

    """
    try:
        report: dict[str, Any] = json.loads(text)
    except ValueError:
        return None
    layers: list[Any] = report.get("Layers", [])
    if not layers:
        return None
    return sum(_is_fused(layer) for layer in layers)


def _is_fused(layer: Any) -> bool:
    """Whether a layer is a whole attention. Without details a layer is only its name."""
    words = [layer]
    if isinstance(layer, dict):
        words = [layer.get(key) for key in ("Name", "TacticName", "LayerType")]
    # The name of an ONNX node may have 'attention' in it, so that a softmax of its own may too.
    texts = [word for word in words if isinstance(word, str)]
    kernels = [re.sub(r"\[ONNX Layer:[^\]]*\]|node_\w+", "", word) for word in texts]
    is_softmax = any(_SOFTMAX_TOO.search(word) for word in kernels)
    return not is_softmax and any(_FUSED.search(word) for word in kernels)

"""The matrix products of a graph: how large each is, and how many independent ones it has.

A convolution is a product too: NVIDIA's guide maps it onto one ('implicit GEMM',
https://docs.nvidia.com/deeplearning/performance/dl-performance-convolutional/index.html).
"""

from __future__ import annotations

from math import prod
from typing import NamedTuple

from hipa_deploy.engines.faults.onnx_graph import FLOAT, FLOAT16, Graph, Node

_ITEM_BYTES = {FLOAT: 4, FLOAT16: 2, 16: 2}  # 16 is bfloat16


class Product(NamedTuple):
    """``copies`` products of an ``m`` x ``k`` and a ``k`` x ``n`` matrix.

    Attributes:
        copies: independent products: heads of an attention, groups of a convolution.
        m: rows of the output: pixels, or tokens.
        n: columns of the output: channels.
        k: what is summed over.
        weight_bytes: bytes of the weights that it reads; 0 where both are activations.

    """

    copies: int
    m: int
    n: int
    k: int
    weight_bytes: int = 0

    @property
    def flops(self) -> int:
        """Operations, a multiplication and an addition counted as two."""
        return 2 * self.copies * self.m * self.n * self.k


def find_products(graph: Graph) -> tuple[Product, ...] | None:
    """Every product of ``graph`` in its order; None where a shape or an operator is not known.

    Example:
        >>> find_products(read_graph(bundle.stage_path("unet")))[0]
        Product(copies=1, m=4096, n=320, k=36, weight_bytes=23040)

    """
    found = []
    for node in graph.nodes:
        if node.operator == "Einsum":
            return None
        if node.operator in _READERS:
            product = _product(graph, node)
            if product is None:
                return None
            found.append(product)
    return tuple(found)


def _product(graph: Graph, node: Node) -> Product | None:
    shapes = []
    for name in (*node.inputs[:2], node.outputs[0]):
        kind = graph.types.get(name)
        if kind is None or not kind.shape:
            return None
        sizes = tuple(size for size in kind.shape if size)
        if len(sizes) < max(len(kind.shape), 2):
            return None
        shapes.append(sizes)
    copies, m, n, k = _READERS[node.operator](*shapes)
    weight_bytes = 0
    for name in node.inputs[:2]:
        if name in graph.weights:
            kind = graph.types[name]
            weight_bytes += prod(size or 0 for size in kind.shape) * _ITEM_BYTES.get(
                kind.element, 0
            )
    return Product(copies, m, n, k, weight_bytes)


Shape = tuple[int, ...]
Sizes = tuple[int, int, int, int]


def _conv(data: Shape, weight: Shape, output: Shape) -> Sizes:
    # Weight [N, C / groups, *kernel].
    groups = data[1] // weight[1]
    return groups, output[0] * prod(output[2:]), output[1] // groups, prod(weight[1:])


def _conv_transpose(data: Shape, weight: Shape, output: Shape) -> Sizes:
    # Weight [C, N / groups, *kernel]: each input pixel gives a patch of the output.
    groups = output[1] // weight[1]
    return groups, data[0] * prod(data[2:]), prod(weight[1:]), data[1] // groups


def _matmul(first: Shape, second: Shape, output: Shape) -> Sizes:
    # One matrix for the whole batch makes one product of it.
    if len(second) == 2:
        return 1, prod(output[:-1]), output[-1], first[-1]
    return prod(output[:-2]), output[-2], output[-1], first[-1]


def _gemm(first: Shape, second: Shape, output: Shape) -> Sizes:
    return 1, output[0], output[1], prod(first) // output[0]


_READERS = {
    "Conv": _conv,
    "ConvTranspose": _conv_transpose,
    "Gemm": _gemm,
    "MatMul": _matmul,
}

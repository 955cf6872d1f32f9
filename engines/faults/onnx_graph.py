"""The nodes and tensors of an ONNX graph, read without the onnx package; and more outputs.

To find out where a stage goes wrong, one looks at tensors between its layers. They are made outputs
by protobuf's rule for a message that comes twice: the second is merged into the first, and repeated
fields are joined (protobuf.dev/programming-guides/encoding, 'Last One Wins').
"""

from __future__ import annotations

import mmap
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from hipa_deploy.bundle.protobuf import (
    Span,
    as_span,
    delimited,
    fields,
    integer,
    integers,
    spans,
    text,
)
from hipa_deploy.errors import HipaError

# Field numbers of onnx.proto.
MODEL_GRAPH = 7
GRAPH_NODE = 1
_GRAPH_INITIALIZER = 5
_GRAPH_INPUT = 11
GRAPH_OUTPUT = 12
GRAPH_VALUE_INFO = 13
NODE_INPUT = 1
NODE_OUTPUT = 2
NODE_NAME = 3
NODE_OPERATOR = 4
NODE_ATTRIBUTE = 5
VALUE_NAME = 1
_VALUE_TYPE = 2
_TYPE_TENSOR = 1
_TENSOR_ELEMENT = 1
_TENSOR_SHAPE = 2
_SHAPE_DIMENSION = 1
_DIMENSION_VALUE = 1
_INITIALIZER_DIMS = 1
_INITIALIZER_TYPE = 2
_INITIALIZER_NAME = 8

# TensorProto.DataType.
FLOAT = 1
FLOAT16 = 10
_FLOATING = (FLOAT, FLOAT16, 11, 16)  # and double, bfloat16


class Node(NamedTuple):
    """A node of a graph.

    Attributes:
        operator: its ONNX operator, such as 'Conv'.
        name: its own name, which may be empty.
        inputs: names of the tensors and weights that it takes; an empty one was left out.
        outputs: names of the tensors that it gives.

    """

    operator: str
    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


class TensorType(NamedTuple):
    """What the file says of a tensor.

    Attributes:
        element: a number of TensorProto.DataType; 0 where the file does not say.
        shape: None for each dimension that is not a number.

    """

    element: int
    shape: tuple[int | None, ...]


@dataclass(frozen=True)
class Graph:
    """A stage's graph.

    Attributes:
        nodes: in the file's order, in which each comes after what it takes.
        types: of inputs, outputs, weights and, where the exporter wrote them, all other tensors.
        weights: names of the initializers.
        outputs: names of the graph's outputs.

    """

    nodes: tuple[Node, ...]
    types: dict[str, TensorType]
    weights: frozenset[str]
    outputs: tuple[str, ...]

    def is_floating(self, name: str) -> bool:
        """Whether a tensor holds floating-point numbers, or may do: the file does not say."""
        found = self.types.get(name)
        return found is None or found.element in (0, *_FLOATING)

    def makers(self) -> dict[str, int]:
        """The number of the node that gives each tensor."""
        found = {}
        for number, node in enumerate(self.nodes):
            for name in node.outputs:
                found[name] = number
        return found

    def users(self) -> dict[str, list[int]]:
        """The numbers of the nodes that take each tensor or weight."""
        found: dict[str, list[int]] = {}
        for number, node in enumerate(self.nodes):
            for name in node.inputs:
                found.setdefault(name, []).append(number)
        return found


def read_graph(path: Path) -> Graph:
    """The graph of the ONNX file at ``path``. Weights in other files are not looked at.

    Raises:
        HipaError: not an ONNX file, or a truncated one.

    Example:
        >>> read_graph(bundle.stage_path("unet")).nodes[1].operator
        'Conv'

    """
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return parse_graph(data)
    except (IndexError, ValueError, TypeError) as error:
        raise HipaError(
            f"{path} is not an ONNX file that can be read ({error!r}). Export the bundle again."
        ) from None


def parse_graph(data: Any) -> Graph:
    """The graph in the bytes of an ONNX file.

    Raises:
        ValueError: no ONNX file, or a truncated one.

    """
    nodes = []
    types: dict[str, TensorType] = {}
    weights = []
    outputs = []
    for graph in spans(data, (0, len(data)), MODEL_GRAPH):
        for field, value in fields(data, graph):
            if field == GRAPH_NODE:
                nodes.append(read_node(data, as_span(value)))
            elif field == _GRAPH_INITIALIZER:
                name, kind = _initializer(data, as_span(value))
                types[name] = kind
                weights.append(name)
            elif field in (_GRAPH_INPUT, GRAPH_OUTPUT, GRAPH_VALUE_INFO):
                name, kind = _value_info(data, as_span(value))
                types[name] = kind
                if field == GRAPH_OUTPUT:
                    outputs.append(name)
    if not nodes:
        raise ValueError("no nodes")
    return Graph(tuple(nodes), types, frozenset(weights), tuple(outputs))


def read_node(data: Any, span: Span) -> Node:
    """The NodeProto at ``span``."""
    texts: dict[int, list[str]] = {}
    for field, value in fields(data, span):
        if field in (NODE_INPUT, NODE_OUTPUT, NODE_NAME, NODE_OPERATOR):
            texts.setdefault(field, []).append(text(data, value))
    return Node(
        operator="".join(texts.get(NODE_OPERATOR, [])),
        name="".join(texts.get(NODE_NAME, [])),
        inputs=tuple(texts.get(NODE_INPUT, [])),
        outputs=tuple(texts.get(NODE_OUTPUT, [])),
    )


def _initializer(data: Any, span: Span) -> tuple[str, TensorType]:
    """Name and type of the TensorProto at ``span``."""
    name = ""
    element = 0
    dims: list[int] = []
    for field, value in fields(data, span):
        if field == _INITIALIZER_DIMS:
            dims += integers(data, value)
        elif field == _INITIALIZER_TYPE:
            (element,) = integers(data, value)
        elif field == _INITIALIZER_NAME:
            name = text(data, value)
    return name, TensorType(element, tuple(dims))


def _value_info(data: Any, span: Span) -> tuple[str, TensorType]:
    """Name and type of the ValueInfoProto at ``span``."""
    name = ""
    kind = TensorType(0, ())
    for field, value in fields(data, span):
        if field == VALUE_NAME:
            name = text(data, value)
        elif field == _VALUE_TYPE:
            for tensor in spans(data, as_span(value), _TYPE_TENSOR):
                kind = _tensor_type(data, tensor)
    return name, kind


def _tensor_type(data: Any, span: Span) -> TensorType:
    element = 0
    sizes: list[int | None] = []
    for field, value in fields(data, span):
        if field == _TENSOR_ELEMENT:
            (element,) = integers(data, value)
        elif field == _TENSOR_SHAPE:
            for dimension in spans(data, as_span(value), _SHAPE_DIMENSION):
                sizes.append(_size(data, dimension))
    return TensorType(element, tuple(sizes))


def _size(data: Any, span: Span) -> int | None:
    """A dimension's size; None for a named one."""
    for field, value in fields(data, span):
        if field == _DIMENSION_VALUE:
            return integers(data, value)[0]
    return None


def more_outputs(names: Iterable[str]) -> bytes:
    """Bytes that, put behind those of an ONNX file, make tensors of the graph outputs of it.

    Args:
        names: names of tensors that nodes of the graph give, and that are no outputs yet. ONNX
            Runtime finds out their types and shapes.

    """
    outputs = b""
    for name in names:
        outputs += delimited(GRAPH_OUTPUT, delimited(VALUE_NAME, name.encode()))
    return delimited(MODEL_GRAPH, outputs)


def value_info(name: str, kind: TensorType) -> bytes:
    """A ValueInfoProto: what a graph says of a tensor."""
    shape = b""
    for size in kind.shape:
        dimension = b"" if size is None else integer(_DIMENSION_VALUE, size)
        shape += delimited(_SHAPE_DIMENSION, dimension)
    tensor = integer(_TENSOR_ELEMENT, kind.element) + delimited(_TENSOR_SHAPE, shape)
    return delimited(VALUE_NAME, name.encode()) + delimited(
        _VALUE_TYPE, delimited(_TYPE_TENSOR, tensor)
    )

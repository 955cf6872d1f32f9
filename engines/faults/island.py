"""A graph with some of its nodes in float32: cast before them, cast after them.

An engine's network is strongly typed, so the types in the graph decide. The graph is rewritten
where the engine is built, without torch and the onnx package: what the nodes take in float16 is
cast to float32 first, weights too, and what leaves them is cast back.
"""

from __future__ import annotations

import shutil
from collections.abc import Collection
from pathlib import Path
from typing import Any

from hipa_deploy.bundle.onnx_weights import read_initializers
from hipa_deploy.bundle.protobuf import Span, as_span, delimited, fields, integer
from hipa_deploy.engines.faults.onnx_graph import (
    FLOAT,
    FLOAT16,
    GRAPH_NODE,
    GRAPH_VALUE_INFO,
    MODEL_GRAPH,
    NODE_ATTRIBUTE,
    NODE_INPUT,
    NODE_NAME,
    NODE_OPERATOR,
    NODE_OUTPUT,
    Graph,
    Node,
    parse_graph,
    read_node,
    value_info,
)
from hipa_deploy.errors import HipaError

# AttributeProto: its name, an integer, and its type, of which 2 is an integer.
_ATTRIBUTE_NAME = 1
_ATTRIBUTE_INT = 3
_ATTRIBUTE_TYPE = 20
_TYPE_INT = 2
WIDE = ".fp32"  # behind a tensor's name, in an island


def widen(data: bytes, tensors: Collection[str]) -> bytes:
    """The ONNX file ``data`` with the nodes that give ``tensors`` in float32.

    Args:
        data: the file's content. Every float16 tensor has its type in it, as torch's exporter
            writes it.
        tensors: outputs of the nodes, whose names and types stay as they are.

    Raises:
        HipaError: a name that no node gives, or a tensor without a type.
        ValueError: no ONNX file.

    Example:
        >>> wide = widen(path.read_bytes(), ["conv2d_3"])

    """
    graph = parse_graph(data)
    unknown = sorted(set(tensors) - graph.makers().keys())
    if unknown:
        raise HipaError(
            f"no node of the graph gives {unknown[0]!r} ({len(unknown)} such names). "
            "Build the engine again."
        )
    rewriting = _Rewriting(graph, frozenset(tensors))
    content = b""
    for field, value in fields(data, (0, len(data))):
        if field == MODEL_GRAPH:
            content += delimited(field, rewriting.graph_content(data, as_span(value)))
        elif isinstance(value, int):
            content += integer(field, value)
        else:
            content += delimited(field, data[value[0] : value[1]])
    return content


def write_widened(path: Path, tensors: Collection[str], folder: Path) -> Path:
    """Write the widened graph of the file at ``path`` into ``folder``; its path.

    Weights in other files are not copied: links to them lie beside it.

    Raises:
        HipaError: as ``widen``; or a file that is no ONNX.

    """
    for weight in read_initializers(path).values():
        link = folder / weight.path.name
        if weight.path != path and not link.exists():
            _link(weight.path, link)
    try:
        content = widen(path.read_bytes(), tensors)
    except (IndexError, ValueError) as error:
        raise HipaError(
            f"{path} is not an ONNX file that can be read ({error!r}). Export the bundle again."
        ) from None
    out = folder / path.name
    out.write_bytes(content)
    return out


def _link(source: Path, link: Path) -> None:
    """A link, or a copy where the file system has no links."""
    try:
        link.symlink_to(source.absolute())
    except OSError:
        shutil.copyfile(source, link)


class _Rewriting:
    """The graph's nodes, one after the other, with casts between them."""

    def __init__(self, graph: Graph, tensors: frozenset[str]) -> None:
        self._graph = graph
        self._users = graph.users()
        self._inside = set()
        for number, node in enumerate(graph.nodes):
            if tensors.intersection(node.outputs):
                self._inside.add(number)
        # float16 tensors that exist in float32 too, by their name there.
        self._wide: dict[str, str] = {}

    def graph_content(self, data: bytes, span: Span) -> bytes:
        """The GraphProto at ``span``, rewritten."""
        parts = []
        number = 0
        for field, value in fields(data, span):
            start, end = as_span(value)
            if field != GRAPH_NODE:
                parts.append(delimited(field, data[start:end]))
                continue
            if number in self._inside:
                parts += self._in_float32(data, (start, end), number)
            else:
                parts.append(delimited(field, data[start:end]))
            number += 1
        for name, wide in self._wide.items():
            kind = self._graph.types[name]._replace(element=FLOAT)
            parts.append(delimited(GRAPH_VALUE_INFO, value_info(wide, kind)))
        return b"".join(parts)

    def _in_float32(self, data: bytes, span: Span, number: int) -> list[bytes]:
        node = read_node(data, span)
        casts = []
        inputs = []
        for name in node.inputs:
            # A cast chooses the type of its output itself; it only takes what is there already.
            if node.operator != "Cast" and self._is_half(name) and name not in self._wide:
                self._wide[name] = f"{name}{WIDE}"
                casts.append(_cast(name, self._wide[name], FLOAT))
            inputs.append(self._wide.get(name, name))
        if node.operator == "Cast":
            return [*casts, _renamed(data, span, node, tuple(inputs), node.outputs)]

        outputs = []
        narrow = []
        for name in node.outputs:
            if not self._is_half(name):
                outputs.append(name)
                continue
            self._wide[name] = f"{name}{WIDE}"
            outputs.append(self._wide[name])
            if self._is_used_outside(name):
                narrow.append(_cast(self._wide[name], name, FLOAT16))
        return [*casts, _renamed(data, span, node, tuple(inputs), tuple(outputs)), *narrow]

    def _is_half(self, name: str) -> bool:
        if not name:
            return False
        found = self._graph.types.get(name)
        if found is None or found.element == 0:
            raise HipaError(
                f"the graph does not say of which type {name!r} is. Export the bundle again."
            )
        return found.element == FLOAT16

    def _is_used_outside(self, name: str) -> bool:
        users = self._users.get(name, [])
        return name in self._graph.outputs or any(user not in self._inside for user in users)


def _renamed(
    data: bytes, span: Span, node: Node, inputs: tuple[str, ...], outputs: tuple[str, ...]
) -> bytes:
    """A node of the graph with other names for what it takes and gives."""
    content = b""
    for name in inputs:
        content += delimited(NODE_INPUT, name.encode())
    for name in outputs:
        content += delimited(NODE_OUTPUT, name.encode())
    for field, value in fields(data, span):
        if field not in (NODE_INPUT, NODE_OUTPUT):
            start, end = as_span(value)
            content += delimited(field, data[start:end])
    return delimited(GRAPH_NODE, content)


def _cast(source: str, result: str, element: int) -> bytes:
    """A Cast node, as a field of the graph."""
    attribute = delimited(_ATTRIBUTE_NAME, b"to")
    attribute += integer(_ATTRIBUTE_INT, element)
    attribute += integer(_ATTRIBUTE_TYPE, _TYPE_INT)
    content = delimited(NODE_INPUT, source.encode())
    content += delimited(NODE_OUTPUT, result.encode())
    content += delimited(NODE_NAME, f"cast_{result}".encode())
    content += delimited(NODE_OPERATOR, b"Cast")
    content += delimited(NODE_ATTRIBUTE, attribute)
    return delimited(GRAPH_NODE, content)


def tensors_of_nodes(graph: Graph, numbers: Collection[int]) -> tuple[str, ...]:
    """The first output of each node, which names it for ``widen``."""
    found: list[Any] = [graph.nodes[number].outputs[0] for number in sorted(numbers)]
    return tuple(found)

"""The cost of one run of an ONNX graph: FLOPs, bytes across the memory bus, bytes held at once."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping
from math import prod
from pathlib import Path
from types import MappingProxyType

import onnx
from onnx import GraphProto, ModelProto, NodeProto, ValueInfoProto, helper, shape_inference
from onnxruntime.tools.symbolic_shape_infer import SymbolicShapeInference

from hipa_deploy.bundle.manifest import Cost, StageSpec
from hipa_deploy.errors import HipaError, first_line

Shape = tuple[int, ...]

# Products that no formula below covers: to count them as nothing would undercount.
_UNCOUNTED = {
    "Attention", "ConvInteger", "DeformConv", "GRU", "LSTM", "MatMulInteger", "QLinearConv",
    "QLinearMatMul", "RNN",
}  # fmt: skip
# Another view of their input's memory.
_VIEWS = {"Flatten", "Identity", "Reshape", "Squeeze", "Unsqueeze"}


def stage_cost(path: Path, spec: StageSpec) -> Cost:
    """The cost of a stage at its usual shapes; the bytes of its activations at the largest shapes.

    Raises:
        HipaError: as ``graph_cost`` does.

    """
    usual = graph_cost(path, spec.sizes("opt"))
    if not spec.axes:
        return usual
    largest = graph_cost(path, spec.sizes("max"))
    return usual.model_copy(
        update={
            "activation_bytes": largest.activation_bytes,
            "fused_activation_bytes": largest.fused_activation_bytes,
        }
    )


def graph_cost(path: Path, sizes: Mapping[str, int] = MappingProxyType({})) -> Cost:
    """The cost of one call of an ONNX file.

    A multiplication and an addition count as two FLOPs, in Conv, ConvTranspose, MatMul, Gemm and
    Einsum, without biases and as the direct algorithm does them (a Winograd convolution multiplies
    less). Weights are the initializers; of a table that only Gather reads, such as an embedding,
    only the rows that are read count.

    Args:
        path: the ONNX file; its external data is not loaded.
        sizes: of the named dimensions.

    Raises:
        HipaError: the file is no ONNX, a shape is dynamic or cannot be inferred, or an operator
            multiplies and is not counted.

    Example:
        >>> graph_cost(Path("bundle/unet/model.onnx")).flops
        803274485760

    """
    model = _load(path, sizes)
    try:
        _refuse_unknown(model)
        shapes = _Shapes(model.graph)
        # Operators without a formula multiply nothing: _refuse_unknown has stopped those that do.
        flops = 0
        for node in model.graph.node:
            if node.op_type in _FLOPS:
                flops += _FLOPS[node.op_type](node, shapes)
        io_bytes = 0
        for value in (*_inputs(model.graph), *model.graph.output):
            io_bytes += shapes.bytes(value.name)
        return Cost(
            flops=flops,
            weight_bytes=_weight_bytes(model.graph, shapes),
            io_bytes=io_bytes,
            activation_bytes=_activation_bytes(model.graph, shapes),
            fused_activation_bytes=_activation_bytes(
                model.graph, shapes, _fusable_scores(model.graph, shapes)
            ),
        )
    except HipaError as error:
        raise HipaError(f"{path}: {error}") from None


def _load(path: Path, sizes: Mapping[str, int]) -> ModelProto:
    """The model with every shape that onnx can infer, without external data."""
    try:
        model = onnx.load(path, load_external_data=False)
        if sizes:
            _set_sizes(model.graph, sizes)
            # Unlike onnx's own inference, this one follows sizes through Shape and Concat.
            return SymbolicShapeInference.infer_shapes(model, auto_merge=True)
        return shape_inference.infer_shapes(model, data_prop=True)
    # Classes of protobuf and of onnx, which differ between versions.
    except Exception as error:
        raise HipaError(
            f"{path} cannot be read as ONNX ({first_line(error)}). Export the bundle again."
        ) from None


def _set_sizes(graph: GraphProto, sizes: Mapping[str, int]) -> None:
    """Give the named dimensions of inputs and outputs their sizes; all others are inferred anew."""
    del graph.value_info[:]
    for value in (*graph.input, *graph.output):
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param in sizes:
                dim.dim_value = sizes[dim.dim_param]


def _refuse_unknown(model: ModelProto) -> None:
    """Raise for a node whose operations cannot be known from its operator."""
    for node in model.graph.node:
        is_custom = node.domain not in ("", "ai.onnx")
        control_flow = any(attribute.HasField("g") for attribute in node.attribute)
        if is_custom or control_flow or node.op_type in _UNCOUNTED:
            operator = f"{node.domain}.{node.op_type}" if is_custom else node.op_type
            raise HipaError(
                f"the FLOPs of {operator} (node {node.name!r}) are unknown. "
                "Expected plain ONNX operators."
            )


class _Shapes:
    """Static shapes and sizes in bytes of the graph's tensors, by name."""

    def __init__(self, graph: GraphProto) -> None:
        values = (*graph.value_info, *graph.input, *graph.output)
        self._values = {value.name: value for value in values}
        self._weights = {weight.name: weight for weight in graph.initializer}

    def __getitem__(self, name: str) -> Shape:
        """The shape of ``name``.

        Raises:
            HipaError: it is unknown, or a dimension is not a number.

        """
        if name in self._weights:
            return tuple(self._weights[name].dims)
        if name not in self._values or not self._values[name].type.tensor_type.HasField("shape"):
            raise HipaError(
                f"the shape of tensor {name!r} cannot be inferred. Expected static shapes."
            )
        # All dimensions before the check, so that the message can show the whole shape.
        shape: list[int | str] = []
        for dim in self._values[name].type.tensor_type.shape.dim:
            shape.append(dim.dim_value if dim.HasField("dim_value") else dim.dim_param or "?")
        static = tuple(size for size in shape if isinstance(size, int))
        if len(static) < len(shape):
            raise HipaError(
                f"tensor {name!r} has the dynamic shape {shape}. Expected static shapes."
            )
        return static

    def bytes(self, name: str) -> int:
        """Elements times the size of one."""
        weight = self._weights.get(name)
        kind = weight.data_type if weight else self._values[name].type.tensor_type.elem_type
        return prod(self[name]) * helper.tensor_dtype_to_np_dtype(kind).itemsize


def _inputs(graph: GraphProto) -> Iterable[ValueInfoProto]:
    """The graph's inputs. Before IR version 4 the initializers were listed among them."""
    weights = {weight.name for weight in graph.initializer}
    return (value for value in graph.input if value.name not in weights)


def _weight_bytes(graph: GraphProto, shapes: _Shapes) -> int:
    """Bytes of all weights that one run reads."""
    readers: dict[str, list[NodeProto]] = defaultdict(list)
    for node in graph.node:
        for name in set(node.input):
            readers[name].append(node)
    total = 0
    for weight in graph.initializer:
        total += _bytes_read(weight.name, readers[weight.name], shapes)
    return total


def _fusable_scores(graph: GraphProto, shapes: _Shapes) -> set[str]:
    """The scores of every attention that TensorRT can compute in one kernel, which stores none.

    Its conditions: both products in FP16, and heads of 16 to 256 numbers, a multiple of 8
    (docs/reference/engines.md). The scores are the first product and its softmax.
    """
    writers = {name: node for node in graph.node for name in node.output}
    readers: dict[str, list[NodeProto]] = defaultdict(list)
    for node in graph.node:
        for name in node.input:
            readers[name].append(node)

    scores = set()
    for node in graph.node:
        if node.op_type != "Softmax":
            continue
        first = writers.get(node.input[0])
        after = [reader.op_type for reader in readers[node.output[0]]]
        if first is None or first.op_type != "MatMul" or after != ["MatMul"]:
            continue
        try:
            head = shapes[first.input[0]][-1]
            is_half = shapes.bytes(node.input[0]) == 2 * prod(shapes[node.input[0]])
        except (HipaError, KeyError):
            continue
        if is_half and 16 <= head <= 256 and head % 8 == 0:
            scores |= {node.input[0], node.output[0]}
    return scores


def _activation_bytes(
    graph: GraphProto, shapes: _Shapes, not_stored: Collection[str] = ()
) -> int | None:
    """The largest sum, over the nodes in order, of the tensors that are alive.

    A tensor is alive from the node that writes it to the last node that reads it. Inputs, outputs
    and weights lie in memory of their own, and ``not_stored`` in none. None: a shape is not known.
    """
    # Which tensor's memory a name lies in: its own, or of a view that of its source. "" stands for
    # memory that is no activation.
    holder: dict[str, str] = {}
    for value in (*graph.input, *graph.output, *graph.initializer):
        holder[value.name] = ""
    for name in not_stored:
        holder[name] = ""
    last_read: dict[str, int] = {}
    for index, node in enumerate(graph.node):
        for name in node.output:
            is_view = node.op_type in _VIEWS and node.input[0] in holder
            holder.setdefault(name, holder[node.input[0]] if is_view else name)
        for name in (*node.input, *node.output):
            if holder.get(name):
                last_read[holder[name]] = index

    try:
        sizes = {name: shapes.bytes(name) for name in last_read}
    except (HipaError, KeyError):
        return None

    # What every node is the last to read is freed after it.
    freed: dict[int, int] = defaultdict(int)
    for name, index in last_read.items():
        freed[index] += sizes[name]
    alive = 0
    peak = 0
    for index, node in enumerate(graph.node):
        for name in node.output:
            if holder[name] == name:
                alive += sizes[name]
        peak = max(peak, alive)
        alive -= freed[index]
    return peak


def _bytes_read(name: str, readers: list[NodeProto], shapes: _Shapes) -> int:
    """Bytes that one run reads of a weight: of a table, no more than the rows that it looks up."""
    whole = shapes.bytes(name)
    is_table = all(node.op_type == "Gather" and node.input[0] == name for node in readers)
    if not is_table:
        return whole
    item_bytes = whole // max(prod(shapes[name]), 1)
    rows = sum(prod(shapes[node.output[0]]) for node in readers)
    return min(whole, rows * item_bytes)


def _conv(node: NodeProto, shapes: _Shapes) -> int:
    # Weight [M, C / groups, *kernel]: each output value sums over all but M.
    return 2 * prod(shapes[node.output[0]]) * prod(shapes[node.input[1]][1:])


def _conv_transpose(node: NodeProto, shapes: _Shapes) -> int:
    # Weight [C, M / groups, *kernel]: each input value is spread over all but C.
    return 2 * prod(shapes[node.input[0]]) * prod(shapes[node.input[1]][1:])


def _matmul(node: NodeProto, shapes: _Shapes) -> int:
    # [..., M, K] x [..., K, N]: batch dimensions are broadcast into the output.
    return 2 * prod(shapes[node.output[0]]) * shapes[node.input[0]][-1]


def _gemm(node: NodeProto, shapes: _Shapes) -> int:
    # A [M, K], or [K, M] if transposed: each output value sums over K.
    is_transposed = any(attribute.name == "transA" and attribute.i for attribute in node.attribute)
    return 2 * prod(shapes[node.output[0]]) * shapes[node.input[0]][0 if is_transposed else 1]


def _einsum(node: NodeProto, shapes: _Shapes) -> int:
    """2 x the product of every index's size.

    Only for two operands: in which order more of them are multiplied is the runtime's choice.
    """
    equation = next(a.s.decode() for a in node.attribute if a.name == "equation").replace(" ", "")
    terms = equation.split("->")[0].split(",")
    if len(terms) != 2 or "..." in equation:
        raise HipaError(
            f"the FLOPs of Einsum {equation!r} are unknown. Expected two operands and no ellipsis."
        )
    sizes: dict[str, int] = {}
    for term, name in zip(terms, node.input, strict=True):
        for index, size in zip(term, shapes[name], strict=True):
            sizes[index] = max(size, sizes.get(index, 1))
    return 2 * prod(sizes.values())


_FLOPS: dict[str, Callable[[NodeProto, _Shapes], int]] = {
    "Conv": _conv,
    "ConvTranspose": _conv_transpose,
    "Einsum": _einsum,
    "Gemm": _gemm,
    "MatMul": _matmul,
}

from __future__ import annotations

import math
from pathlib import Path
from typing import ClassVar

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from onnx import NodeProto, TensorProto, helper, numpy_helper
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from hipa_deploy.bundle.manifest import Cost, StageSpec, TensorSpec
from hipa_deploy.errors import HipaError
from hipa_deploy.export.graph.graph_cost import graph_cost
from hipa_deploy.export.graph.to_onnx import export_stage

Dims = tuple[int | str, ...]


def save(
    path: Path,
    made: NodeProto | list[NodeProto],
    x: Dims | None,
    weights: dict[str, Dims],
    y: Dims | None = None,
) -> Path:
    """x float16 -> nodes -> y; weights are float16, those whose name begins with i int64 zeros."""
    tensors = [
        numpy_helper.from_array(
            np.zeros(dims, np.int64 if name.startswith("i") else np.float16), name
        )
        for name, dims in weights.items()
    ]
    values = [
        helper.make_tensor_value_info(n, TensorProto.FLOAT16, d) for n, d in (("x", x), ("y", y))
    ]
    nodes = made if isinstance(made, list) else [made]
    graph = helper.make_graph(nodes, "graph", values[:1], values[1:], tensors)
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("com.example", 1)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=10), path)
    return path


def node(op: str, *inputs: str, **attributes: object) -> NodeProto:
    return helper.make_node(op, list(inputs), ["y"], name="n", **attributes)


@pytest.mark.parametrize(
    ("made", "x", "weight", "y", "flops"),
    [
        # [2, 8, 5, 5] out of 4 / 2 channels and a 3 x 3 kernel
        (
            node("Conv", "x", "w", strides=[2, 2], pads=[1, 1, 1, 1], group=2),
            (2, 4, 9, 9), (8, 2, 3, 3), (2, 8, 5, 5), 2 * (2 * 8 * 5 * 5) * (2 * 3 * 3),
        ),
        (node("Conv", "x", "w"), (1, 4, 10), (6, 4, 3), (1, 6, 8), 2 * (6 * 8) * (4 * 3)),
        # each of [1, 4, 5, 5] spread over 6 / 2 channels and a 2 x 2 kernel
        (
            node("ConvTranspose", "x", "w", strides=[2, 2], group=2),
            (1, 4, 5, 5), (4, 3, 2, 2), (1, 6, 10, 10), 2 * (4 * 5 * 5) * (3 * 2 * 2),
        ),
        (node("MatMul", "x", "w"), (2, 3, 5, 7), (7, 11), (2, 3, 5, 11), 2 * (2 * 3) * 5 * 7 * 11),
        (
            node("MatMul", "x", "w"),
            (1, 3, 5, 7), (2, 1, 7, 11), (2, 3, 5, 11), 2 * (2 * 3) * 5 * 7 * 11,
        ),
        (node("MatMul", "x", "w"), (7,), (4, 7, 11), (4, 11), 2 * 4 * 7 * 11),
        (node("Gemm", "x", "w"), (3, 5), (5, 7), (3, 7), 2 * 3 * 5 * 7),
        (node("Gemm", "x", "w", transA=1, transB=1), (5, 3), (7, 5), (3, 7), 2 * 3 * 5 * 7),
        (
            node("Einsum", "x", "w", equation="bhqd, bhkd -> bhqk"),
            (2, 3, 5, 7), (2, 3, 4, 7), (2, 3, 5, 4), 2 * 840,
        ),
        (node("Add", "x", "w"), (3, 5), (5,), (3, 5), 0),
    ],
)  # fmt: skip
def test_closed_form(
    tmp_path: Path, made: NodeProto, x: Dims, weight: Dims, y: Dims, flops: int
) -> None:
    cost = graph_cost(save(tmp_path / "model.onnx", made, x, {"w": weight}, y))
    io_bytes = 2 * (math.prod(x) + math.prod(y))
    assert cost == Cost(
        flops=flops,
        weight_bytes=2 * math.prod(weight),
        io_bytes=io_bytes,
        activation_bytes=0,
        fused_activation_bytes=0,
    )


@given(st.tuples(*[st.integers(1, 9)] * 4), st.booleans())
def test_a_product_costs_the_same_however_it_is_written(
    tmp_path_factory, sizes, transposed
) -> None:
    """A 1 x 1 convolution is a matrix product, and so is Gemm: 2 M K N a batch."""
    batch, m, k, n = sizes
    path = tmp_path_factory.getbasetemp() / "product.onnx"
    matmul = graph_cost(save(path, node("MatMul", "x", "w"), (batch, m, k), {"w": (k, n)}))
    conv = graph_cost(save(path, node("Conv", "x", "w"), (batch, k, m), {"w": (n, k, 1)}))
    gemm_weight = (n, k) if transposed else (k, n)
    gemm = graph_cost(
        save(
            path, node("Gemm", "x", "w", transB=int(transposed)), (batch * m, k), {"w": gemm_weight}
        )
    )
    assert matmul == conv == gemm
    assert matmul.flops == 2 * batch * m * k * n


def test_of_an_embedding_the_rows_read_count(tmp_path: Path) -> None:
    rows = graph_cost(
        save(tmp_path / "rows.onnx", node("Gather", "w", "i"), (1,), {"w": (1000, 8), "i": (5,)})
    )
    assert rows.weight_bytes == 5 * 8 * 2 + 5 * 8  # five float16 rows, five int64 indices
    tied = [node("Gather", "w", "i"), helper.make_node("Transpose", ["w"], ["z"])]
    whole = graph_cost(save(tmp_path / "tied.onnx", tied, (1,), {"w": (1000, 8), "i": (5,)}))
    assert whole.weight_bytes == 1000 * 8 * 2 + 5 * 8


def chain(*steps: tuple[str, str, str]) -> list[NodeProto]:
    """Nodes of (operator, inputs, output), inputs a letter each."""
    return [helper.make_node(op, list(inputs), [output]) for op, inputs, output in steps]


@pytest.mark.parametrize(
    ("steps", "alive"),
    [
        ([("Relu", "x", "a"), ("Relu", "a", "y")], 1),
        (
            [("Relu", "x", "a"), ("Relu", "a", "b"), ("Relu", "b", "c"), ("Relu", "c", "y")],
            2,
        ),  # what is read, written
        (
            [("Relu", "x", "a"), ("Relu", "a", "b"), ("Relu", "b", "c"), ("Add", "ac", "y")],
            3,
        ),  # a skip connection
        (
            [("Relu", "x", "a"), ("Reshape", "ai", "b"), ("Relu", "b", "c"), ("Relu", "c", "y")],
            2,
        ),  # b is a
        ([("Relu", "x", "a"), ("Relu", "x", "b"), ("Relu", "x", "y")], 1),  # nobody reads them
    ],
)
def test_activations_live_from_writer_to_last_reader(
    tmp_path: Path, steps: list, alive: int
) -> None:
    path = save(tmp_path / "model.onnx", chain(*steps), (3, 5), {"i": (2,)}, (3, 5))
    model = onnx.load(path)
    model.graph.initializer[0].CopyFrom(numpy_helper.from_array(np.array([3, 5]), "i"))
    onnx.save(model, path)
    assert graph_cost(path).activation_bytes == alive * 3 * 5 * 2


def test_activations_of_an_unknown_shape_are_unknown(tmp_path: Path) -> None:
    steps = chain(("NonZero", "x", "a"), ("Cast", "a", "b"), ("Relu", "x", "y"))
    steps[1].attribute.append(helper.make_attribute("to", TensorProto.FLOAT16))
    assert graph_cost(save(tmp_path / "model.onnx", steps, (3, 5), {})).activation_bytes is None


@pytest.mark.parametrize(
    ("head", "kind", "fused"),
    [
        (64, TensorProto.FLOAT16, True),
        (8, TensorProto.FLOAT16, False),
        (60, TensorProto.FLOAT16, False),
        (512, TensorProto.FLOAT16, False),
        (64, TensorProto.FLOAT, False),
    ],
)
def test_scores_of_an_attention_that_is_fused_take_nothing(
    tmp_path: Path, head: int, kind: int, fused: bool
) -> None:
    """Queries, keys and values are x; scores of 128 x 128 are larger than all of them."""
    q = helper.make_tensor_value_info("x", kind, (1, 128, head))
    k = helper.make_tensor_value_info("k", kind, (1, head, 128))
    y = helper.make_tensor_value_info("y", kind, (1, 128, head))
    nodes = chain(
        ("Relu", "x", "q"), ("MatMul", "qk", "s"), ("Softmax", "s", "p"), ("MatMul", "px", "z"),
        ("Relu", "z", "y"),
    )  # fmt: skip
    graph = helper.make_graph(nodes, "attention", [q, k], [y])
    path = tmp_path / "model.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)]), path)
    item = 2 if kind == TensorProto.FLOAT16 else 4
    rows = 128 * head * item
    scores = 128 * 128 * item
    cost = graph_cost(path)
    # Both scores at once, or one beside the queries or the result.
    assert cost.activation_bytes == scores + max(scores, rows)
    assert cost.fused_activation_bytes == (rows if fused else cost.activation_bytes)


def test_external_data_is_not_needed(tmp_path: Path) -> None:
    path = save(tmp_path / "model.onnx", node("MatMul", "x", "w"), (2, 64), {"w": (64, 64)})
    inside = graph_cost(path)
    onnx.save(
        onnx.load(path),
        path,
        save_as_external_data=True,
        location="model.onnx.data",
        size_threshold=0,
    )
    (tmp_path / "model.onnx.data").unlink()
    assert graph_cost(path) == inside


@pytest.mark.parametrize(
    ("made", "x", "message"),
    [
        (node("MatMul", "x", "w"), ("batch", 4),
         r"tensor '[xy]' has the dynamic shape \['batch', 4\]. Expected"),
        ([helper.make_node("NonZero", ["x"], ["h"]), helper.make_node("Cast", ["h"], ["c"], to=10),
          node("MatMul", "c", "w")], (4, 4), r"tensor 'c' has the dynamic shape \[2, '\w+'\]"),
        (node("MatMul", "x", "w"), None, "shape of tensor '[xy]' cannot be inferred"),
        ([helper.make_node("Mystery", ["x"], ["h"], domain="com.example"),
          node("MatMul", "h", "w")], (4, 4),
         "FLOPs of com.example.Mystery"),
        (node("QLinearMatMul", *"xxxwxxxx"), (4, 4), "FLOPs of QLinearMatMul"),
        (node("Einsum", "x", "w", equation="...i,ij->...j"), (4, 4), "FLOPs of Einsum"),
    ],
)  # fmt: skip
def test_what_cannot_be_counted_is_refused(
    tmp_path: Path, made, x: Dims | None, message: str
) -> None:
    with pytest.raises(HipaError, match=message) as refused:
        graph_cost(save(tmp_path / "model.onnx", made, x, {"w": (4, 4)}))
    assert "\n" not in str(refused.value)


def test_a_branch_is_refused(tmp_path: Path) -> None:
    out = helper.make_tensor_value_info("b", TensorProto.FLOAT16, (4, 4))
    branch = helper.make_graph([helper.make_node("MatMul", ["x", "x"], ["b"])], "branch", [], [out])
    with pytest.raises(HipaError, match="FLOPs of If"):
        graph_cost(
            save(
                tmp_path / "m.onnx",
                node("If", "i", then_branch=branch, else_branch=branch),
                (4, 4),
                {"i": ()},
            )
        )


@pytest.mark.parametrize("content", [None, b"not a model"])
def test_not_a_model(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "model.onnx"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(HipaError, match=r"cannot be read as ONNX|shape"):
        graph_cost(path)


@pytest.mark.slow
def test_an_exported_module_costs_what_torch_counts(tmp_path: Path) -> None:
    class Block(torch.nn.Module):
        places: ClassVar = {
            "conv": "conv",
            "attention": "attention",
            "out": "out",
        }  # as every stage says

        def __init__(self) -> None:
            super().__init__()
            self.conv = torch.nn.Conv2d(4, 16, 3, padding=1)
            self.attention = torch.nn.MultiheadAttention(16, 2, batch_first=True)
            self.out = torch.nn.Linear(16, 5)

        def forward(self, x_BCHW: torch.Tensor) -> torch.Tensor:
            h_BLC = self.conv(x_BCHW).flatten(2).transpose(1, 2)
            return self.out(self.attention(h_BLC, h_BLC, h_BLC, need_weights=False)[0])

    block = Block()
    x = torch.zeros(1, 4, 6, 6)
    # as plain products: the counter does not know the CPU's fused attention
    with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        block.train()(x)
    spec = StageSpec(
        name="block",
        inputs=(TensorSpec(name="x", dtype="float32", shape=(1, 4, 6, 6)),),
        outputs=(TensorSpec(name="y", dtype="float32", shape=(1, 36, 5)),),
    )
    export_stage(block, spec, tmp_path)
    cost = graph_cost(tmp_path / "model.onnx")
    assert cost.flops == counter.get_total_flops()
    assert cost.io_bytes == 4 * (4 * 6 * 6 + 36 * 5)
    weights = 4 * sum(parameter.numel() for parameter in block.parameters())
    assert weights <= cost.weight_bytes <= weights + 1024  # and a few constants

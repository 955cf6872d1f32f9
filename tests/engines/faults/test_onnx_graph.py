"""Reading a graph's nodes and types, and adding outputs, against the onnx package."""

from __future__ import annotations

import onnx
import onnxruntime
import pytest

from hipa_deploy import embedded
from hipa_deploy.bundle.folder import Bundle
from hipa_deploy.engines.faults.onnx_graph import (
    FLOAT16,
    TensorType,
    more_outputs,
    parse_graph,
    read_graph,
    value_info,
)
from hipa_deploy.errors import HipaError

BUNDLE = Bundle.open(embedded.BUNDLE)


@pytest.mark.parametrize("stage", sorted(BUNDLE.stages))
def test_nodes_types_and_weights_are_those_of_the_onnx_package(stage):
    path = BUNDLE.stage_path(stage)
    model = onnx.load(path).graph
    graph = read_graph(path)
    assert [tuple(node) for node in graph.nodes] == [
        (node.op_type, node.name, tuple(node.input), tuple(node.output)) for node in model.node
    ]
    assert graph.weights == {weight.name for weight in model.initializer}
    assert graph.outputs == tuple(output.name for output in model.output)
    for value in (*model.input, *model.output, *model.value_info):
        kind = value.type.tensor_type
        shape = tuple(dimension.dim_value for dimension in kind.shape.dim)
        assert graph.types[value.name] == (kind.elem_type, shape)


def test_a_tensor_becomes_an_output():
    content = BUNDLE.stage_path("vae_decoder").read_bytes() + more_outputs(["conv2d", "add_1"])
    assert parse_graph(content).outputs == ("images", "conv2d", "add_1")
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    assert [output.name for output in session.get_outputs()] == ["images", "conv2d", "add_1"]


def test_what_is_said_of_a_tensor_is_read_by_the_onnx_package():
    written = onnx.ValueInfoProto.FromString(value_info("h", TensorType(FLOAT16, (1, None, 300))))
    assert written.name == "h"
    assert written.type.tensor_type.elem_type == onnx.TensorProto.FLOAT16
    assert [size.dim_value for size in written.type.tensor_type.shape.dim] == [1, 0, 300]


@pytest.mark.parametrize("content", [b"somebody's photograph", b"", b"\x3a\x05\x0a"])
def test_another_file_is_an_error_in_one_line(content, tmp_path):
    path = tmp_path / "model.onnx"
    path.write_bytes(content)
    with pytest.raises(HipaError, match="is not an ONNX file that can be read"):
        read_graph(path)

"""Every place of a graph that can name another file is found; loops, broken files are refused."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from hipa_deploy.bundle.onnx_check import beside, external_files
from hipa_deploy.embedded import BUNDLE
from hipa_deploy.errors import HipaError
from tests.engines.engine_samples import save_conv


def external(name: str, location: str) -> onnx.TensorProto:
    """A tensor of two numbers whose values lie in another file."""
    tensor = numpy_helper.from_array(np.zeros(2, np.float32), name)
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    entry = tensor.external_data.add()
    entry.key = "location"
    entry.value = location
    return tensor


def graph_of(nodes: list, initializers: list = (), sparse: list = ()) -> onnx.GraphProto:
    return helper.make_graph(
        nodes, "g", [], [], initializer=initializers, sparse_initializer=sparse
    )


def in_an_initializer() -> onnx.ModelProto:
    return helper.make_model(graph_of([], [external("w", "hidden")]))


def in_a_constant() -> onnx.ModelProto:
    node = helper.make_node("Constant", [], ["c"], value=external("v", "hidden"))
    return helper.make_model(graph_of([node]))


def in_a_list_of_an_attribute() -> onnx.ModelProto:
    node = helper.make_node("Some", [], ["c"], values=[external("v", "hidden")])
    return helper.make_model(graph_of([node]))


def in_a_branch() -> onnx.ModelProto:
    branch = graph_of([], [external("w", "hidden")])
    node = helper.make_node("If", ["c"], ["y"], then_branch=branch, else_branch=graph_of([]))
    return helper.make_model(graph_of([node]))


def in_a_sparse_initializer() -> onnx.ModelProto:
    sparse = helper.make_sparse_tensor(
        external("s", "hidden"), numpy_helper.from_array(np.zeros(2, np.int64)), [9]
    )
    return helper.make_model(graph_of([], sparse=[sparse]))


def in_a_function() -> onnx.ModelProto:
    node = helper.make_node("Constant", [], ["c"], value=external("v", "hidden"))
    function = helper.make_function("d", "f", [], ["c"], [node], [helper.make_opsetid("", 20)])
    return helper.make_model(graph_of([]), functions=[function])


PLACES = [
    in_an_initializer,
    in_a_constant,
    in_a_list_of_an_attribute,
    in_a_branch,
    in_a_sparse_initializer,
    in_a_function,
]


@pytest.mark.parametrize("make", PLACES)
def test_another_file_is_found_wherever_it_is_named(tmp_path: Path, make) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(make().SerializeToString())
    assert external_files(path) == {"hidden"}


def test_what_onnx_writes_is_found(tmp_path: Path) -> None:
    save_conv(tmp_path / "model.onnx", np.float16, external=True)
    assert external_files(tmp_path / "model.onnx") == {"model.onnx.data"}
    save_conv(tmp_path / "whole.onnx", np.float16)
    assert external_files(tmp_path / "whole.onnx") == set()


@pytest.mark.parametrize("stage", ["text_encoder", "unet", "vae_decoder"])
def test_the_embedded_stages_name_no_other_file(stage: str) -> None:
    assert external_files(BUNDLE / stage / "model.onnx") == set()


@pytest.mark.parametrize("operator", ["Loop", "Scan"])
def test_a_loop_is_refused(tmp_path: Path, operator: str) -> None:
    node = helper.make_node(operator, ["n"], ["y"], body=graph_of([]))
    path = tmp_path / "model.onnx"
    path.write_bytes(helper.make_model(graph_of([node])).SerializeToString())
    with pytest.raises(HipaError, match=f"has the operator {operator}"):
        external_files(path)


def nested(depth: int) -> bytes:
    """An If in a branch of an If in a branch …"""
    graph = graph_of([])
    for _ in range(depth):
        graph = graph_of([helper.make_node("If", ["c"], ["y"], then_branch=graph)])
    return helper.make_model(graph).SerializeToString()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"not a model",
        b"\x3a\xff\xff\xff\xff\x7f",  # a graph of more bytes than there are
        b"\xff" * 1_000_000,  # a number that never ends
        b"\x38\x01",  # the graph is a number
        b"\x3b",  # a group, which protobuf no longer has
        nested(30),
    ],
    ids=["empty", "text", "length", "number", "kind", "group", "depth"],
)
def test_a_broken_file_is_one_line_and_quick(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(content)
    started = time.perf_counter()
    with pytest.raises(HipaError, match="is not an ONNX file that can be used"):
        external_files(path)
    assert time.perf_counter() - started < 1


def test_a_name_beside_a_graph() -> None:
    assert beside("unet/model.onnx", "model.onnx.data") == "unet/model.onnx.data"
    assert beside("unet/model.onnx", "../x") == "unet/../x", "no such name is ever listed"

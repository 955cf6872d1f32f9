from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from hipa_deploy.bundle.manifest import StageSpec, TensorSpec
from hipa_deploy.errors import HipaError
from hipa_deploy.export.graph.run_apart import run_apart


def save_round_trip(path: Path) -> StageSpec:
    """x float32 -> float16 -> y float32: what graph optimisations would remove."""
    nodes = [
        helper.make_node("Cast", ["x"], ["half"], to=TensorProto.FLOAT16),
        helper.make_node("Cast", ["half"], ["y"], to=TensorProto.FLOAT),
    ]
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, (3,))
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, (3,))
    graph = helper.make_graph(nodes, "graph", [x], [y])
    opsets = [helper.make_opsetid("", 20)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=10), path)
    return StageSpec(
        name="round_trip",
        inputs=(TensorSpec(name="x", dtype="float32", shape=(3,)),),
        outputs=(TensorSpec(name="y", dtype="float32", shape=(3,)),),
    )


def test_roundings_to_float16_are_not_optimised_away(tmp_path: Path) -> None:
    spec = save_round_trip(tmp_path / "model.onnx")
    x = np.float32([1.0, 1.0001, 1e6])
    y = run_apart(tmp_path / "model.onnx", spec, {"x": x})
    np.testing.assert_array_equal(y, np.float32([1.0, 1.0, np.inf]))


def test_a_graph_that_cannot_be_loaded(tmp_path: Path) -> None:
    spec = save_round_trip(tmp_path / "model.onnx")
    (tmp_path / "model.onnx").write_bytes(b"not a model")
    with pytest.raises(HipaError, match=r"model\.onnx"):
        run_apart(tmp_path / "model.onnx", spec, {"x": np.zeros(3, np.float32)})


def test_a_process_that_was_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As by a system that is out of memory: no message, a status alone."""
    spec = save_round_trip(tmp_path / "model.onnx")
    killed = tmp_path / "python"
    killed.write_text("#!/bin/sh\nkill -9 $$\n")
    killed.chmod(0o755)
    monkeypatch.setattr("sys.executable", str(killed))
    with pytest.raises(HipaError, match="round_trip: its run ended with status -9"):
        run_apart(tmp_path / "model.onnx", spec, {"x": np.zeros(3, np.float32)})

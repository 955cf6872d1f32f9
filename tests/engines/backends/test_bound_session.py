"""I/O binding of the real ONNX Runtime, with the CPU as the device."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper

from hipa_deploy.bundle.manifest import Axis, StageSpec, TensorSpec
from hipa_deploy.engines.backends.bound_session import BoundSession
from hipa_deploy.engines.backends.onnxruntime_runner import OnnxRuntimeRunner
from hipa_deploy.errors import HipaError
from tests.engines.engine_samples import SHAPE, conv_spec, save_conv
from tests.threads import in_threads


@pytest.fixture
def path(tmp_path):
    save_conv(tmp_path / "model.onnx", np.float32)
    return tmp_path / "model.onnx"


def open_session(path):
    return onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])


def test_bound_memory_gives_what_a_plain_run_gives_and_stays(path):
    spec = conv_spec("unet")
    bound = BoundSession(onnxruntime, open_session(path), spec, "cpu")
    x = np.random.default_rng(0).standard_normal(SHAPE).astype(np.float32)
    with OnnxRuntimeRunner(path, spec, "onnxruntime") as plain:
        first = bound({"x": x})["y"]
        address = bound._inputs["x"].data_ptr()
        second = bound({"x": np.asfortranarray(-x)})["y"]
        np.testing.assert_array_equal(first, plain(x=x)["y"])
        np.testing.assert_array_equal(second, plain(x=-x)["y"])
    assert bound._inputs["x"].data_ptr() == address
    assert not np.array_equal(first, second), "the caller's array is not the bound memory"


def negative_session(folder) -> BoundSession:
    """x [batch, 3] -> y = -x, for 1 to 4 rows."""
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 3])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 3])
    graph = helper.make_graph([helper.make_node("Neg", ["x"], ["y"])], "negative", [x], [y])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    path = folder / "negative.onnx"
    onnx.save(model, path)
    spec = StageSpec(
        name="unet",
        inputs=(TensorSpec(name="x", dtype="float32", shape=("batch", 3)),),
        outputs=(TensorSpec(name="y", dtype="float32", shape=("batch", 3)),),
        axes={"batch": Axis(min=1, opt=2, max=4)},
    )
    return BoundSession(onnxruntime, open_session(path), spec, "cpu")


def test_bound_memory_of_a_dynamic_stage_follows_its_shapes(tmp_path):
    bound = negative_session(tmp_path)
    for rows in (1, 2, 1):
        x_BC = np.arange(3 * rows, dtype=np.float32).reshape(rows, 3)
        np.testing.assert_array_equal(bound({"x": x_BC})["y"], -x_BC)


def test_a_run_that_onnxruntime_refuses_is_one_line(path):
    bound = BoundSession(onnxruntime, open_session(path), conv_spec("unet"), "cpu")
    with pytest.raises(HipaError, match="unet: ONNX Runtime cannot run it: ") as caught:
        bound({"x": np.zeros((1, 5, 8, 8), np.float32)})
    assert "\n" not in str(caught.value)


def test_eight_threads_do_not_write_into_each_others_memory(tmp_path):
    bound = negative_session(tmp_path)

    def run(number: int) -> None:
        x_BC = np.full((1 + number % 4, 3), number, np.float32)
        for _ in range(100):
            np.testing.assert_array_equal(bound({"x": x_BC})["y"], -x_BC)

    in_threads(run)

"""The reader of ONNX weights against the onnx package itself."""

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from hipa_deploy.bundle.onnx_weights import read_initializers, skeleton_sha256, with_values
from hipa_deploy.embedded import BUNDLE
from hipa_deploy.errors import HipaError

VALUES = {
    "kernel": np.arange(24, dtype=np.float16).reshape(2, 3, 2, 2),
    "scalar": np.asarray(2.5, np.float32),
    "shape": np.asarray([-1, 300], np.int64),
    "empty": np.zeros((0, 3), np.float32),
}


def save(path: Path, values: dict[str, np.ndarray], external: bool = False) -> Path:
    nodes = [helper.make_node("Identity", [name], [f"{name}_out"]) for name in values]
    kinds = {name: helper.np_dtype_to_tensor_dtype(value.dtype) for name, value in values.items()}
    outputs = [
        helper.make_tensor_value_info(f"{name}_out", kind, None) for name, kind in kinds.items()
    ]
    tensors = [numpy_helper.from_array(value, name) for name, value in values.items()]
    model = helper.make_model(helper.make_graph(nodes, "g", [], outputs, tensors))
    onnx.save(
        model, path, save_as_external_data=external, location="model.onnx.data", size_threshold=0
    )
    return path


def open_files() -> int:
    """Of this process."""
    return len(list(Path("/proc/self/fd").iterdir()))


def assert_equal(found: dict, expected: dict[str, np.ndarray]) -> None:
    assert list(found) == list(expected)
    for name, weight in found.items():
        value = weight.read()
        assert (value.dtype, value.shape) == (expected[name].dtype, expected[name].shape)
        np.testing.assert_array_equal(value, expected[name])


@pytest.mark.parametrize("external", [False, True])
def test_every_weight_is_found(tmp_path: Path, external: bool) -> None:
    path = save(tmp_path / "model.onnx", VALUES, external)
    found = read_initializers(path)
    assert_equal(found, VALUES)
    assert {weight.path.name for name, weight in found.items() if name != "empty"} == {
        "model.onnx.data" if external else "model.onnx"
    }


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs Linux")
def test_many_weights_take_one_number_of_an_open_file(tmp_path: Path) -> None:
    """SDXL's UNet has 1,680, and a process may have 1,024 files open as systems come."""
    values = {str(number): np.full(3, number, np.float16) for number in range(300)}
    path = save(tmp_path / "model.onnx", values, external=True)
    found = read_initializers(path)
    before = open_files()
    held = {name: weight.read() for name, weight in found.items()}
    assert open_files() <= before + 1
    for name, value in held.items():
        np.testing.assert_array_equal(value, values[name])
        assert not value.flags.writeable

    # The mapping goes with the last array, and a later one maps the file again.
    del held, value
    assert open_files() == before
    assert_equal(found, values)


@pytest.mark.parametrize("stage", ["text_encoder", "unet", "vae_decoder"])
def test_the_embedded_bundle(stage: str) -> None:
    path = BUNDLE / stage / "model.onnx"
    tensors = onnx.load(path).graph.initializer
    assert_equal(
        read_initializers(path), {tensor.name: numpy_helper.to_array(tensor) for tensor in tensors}
    )


def test_packed_dimensions(tmp_path: Path) -> None:
    """proto3 writers pack repeated integers, the onnx package does not: both are valid."""
    tensor = (
        b"\x0a\x02\x02\x03"
        + b"\x10\x01"
        + b"\x42\x01w"
        + b"\x4a\x18"
        + np.arange(6, dtype="<f4").tobytes()
    )
    graph = b"\x2a" + bytes([len(tensor)]) + tensor
    (tmp_path / "model.onnx").write_bytes(b"\x3a" + bytes([len(graph)]) + graph)
    assert_equal(
        read_initializers(tmp_path / "model.onnx"),
        {"w": np.arange(6, dtype=np.float32).reshape(2, 3)},
    )


@pytest.mark.parametrize("content", [b"", b"not ONNX at all", b"\x3a\x7f\x01"])
def test_what_is_no_graph(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "model.onnx").write_bytes(content)
    with pytest.raises(HipaError, match="not an ONNX file"):
        read_initializers(tmp_path / "model.onnx")


def test_a_truncated_graph(tmp_path: Path) -> None:
    path = save(tmp_path / "model.onnx", VALUES)
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(HipaError, match="not an ONNX file"):
        read_initializers(path)


def test_a_weight_kept_as_typed_numbers_is_refused(tmp_path: Path) -> None:
    tensor = helper.make_tensor("w", TensorProto.FLOAT, [2], [1.0, 2.0])
    onnx.save(
        helper.make_model(helper.make_graph([], "g", [], [], [tensor])), tmp_path / "model.onnx"
    )
    with pytest.raises(HipaError, match="can be read"):
        read_initializers(tmp_path / "model.onnx")


def test_new_values_give_the_file_that_onnx_would_write(tmp_path: Path) -> None:
    path = save(tmp_path / "model.onnx", VALUES)
    changed = {
        "kernel": VALUES["kernel"].T.copy().T + np.float16(1),
        "scalar": np.asarray(7, np.float32),
    }
    content, external = with_values(path, changed)
    assert content == save(tmp_path / "other.onnx", VALUES | changed).read_bytes()
    assert external == {}


def test_values_in_external_data_are_handed_back(tmp_path: Path) -> None:
    path = save(tmp_path / "model.onnx", VALUES, external=True)
    content, external = with_values(path, {"kernel": VALUES["kernel"] * 2})
    assert content == path.read_bytes()
    np.testing.assert_array_equal(external["kernel"], VALUES["kernel"] * 2)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"stranger": np.zeros(1)}, "no weight stranger"),
        ({"kernel": np.zeros((2, 3, 2, 2), np.float32)}, r"float16 \[2, 3, 2, 2\], got float32"),
        ({"kernel": np.zeros((3, 2, 2, 2), np.float16)}, r"got float16 \[3, 2, 2, 2\]"),
    ],
)
def test_values_that_do_not_fit(tmp_path: Path, values: dict, message: str) -> None:
    with pytest.raises(HipaError, match=message):
        with_values(save(tmp_path / "model.onnx", VALUES), values)


def test_the_skeleton_is_all_but_the_values(tmp_path: Path) -> None:
    a = save(tmp_path / "a.onnx", VALUES)
    b = save(tmp_path / "b.onnx", VALUES | {"kernel": VALUES["kernel"] + np.float16(1)})
    renamed = save(tmp_path / "c.onnx", {"colonel": VALUES["kernel"]} | VALUES)
    skeletons = [skeleton_sha256(path, read_initializers(path)) for path in (a, b, renamed)]
    assert skeletons[0] == skeletons[1] != skeletons[2]

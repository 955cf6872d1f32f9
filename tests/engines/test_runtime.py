"""The order of the runtime's calls, against a recording fake of TensorRT and cuda-python, and for real on a GPU.

The fake is a fake: it has no kernels, and its 'device' is host memory. It refuses what it knows the real ones refuse:
a copy from memory that is not allocated, a run without every address, freeing twice.
"""

from __future__ import annotations

import ctypes
import io
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
from rich.console import Console

from hipa_deploy.bundle import Axis, StageSpec, TensorSpec
from hipa_deploy.engines import runtime
from hipa_deploy.engines.cuda import load_cudart
from hipa_deploy.engines.device import find_gpu
from hipa_deploy.engines.runtime import TensorRTRunner
from hipa_deploy.errors import HipaError

SPEC = StageSpec(
    name="unet",
    inputs=(TensorSpec(name="x", dtype="float32", shape=(2, 3)), TensorSpec(name="t", dtype="int64", shape=(1,))),
    outputs=(TensorSpec(name="y", dtype="float16", shape=(2, 3)),),
)


class FakeCudart:
    """Host memory behind the CUDA runtime's names; errors are returned, as cuda-python does."""

    cudaStreamNonBlocking = 1
    cudaMemcpyKind = SimpleNamespace(cudaMemcpyHostToDevice=1, cudaMemcpyDeviceToHost=2)

    def __init__(self, fail: str = "") -> None:
        self.fail, self.log, self.live, self.streams = fail, [], {}, set()

    def __getattr__(self, name):
        def call(*arguments):
            self.log.append(name)
            if name == self.fail:
                return (2,)
            return getattr(self, f"do_{name}")(*arguments)

        return call

    def cudaGetErrorString(self, error):
        return 0, b"out of memory" if error == 2 else b"invalid argument"

    def do_cudaMalloc(self, size):
        memory = (ctypes.c_uint8 * size)()
        self.live[ctypes.addressof(memory)] = memory
        return 0, ctypes.addressof(memory)

    do_cudaMallocHost = do_cudaMalloc

    def do_cudaFree(self, pointer):
        return (0,) if self.live.pop(pointer, None) is not None else (1,)

    do_cudaFreeHost = do_cudaFree

    def do_cudaMemcpyAsync(self, to, source, size, kind, stream):
        if to not in self.live or source not in self.live or stream not in self.streams:
            return (1,)
        ctypes.memmove(to, source, size)
        return (0,)

    def do_cudaStreamCreateWithFlags(self, flags):
        self.streams.add(7)
        return 0, 7

    def do_cudaStreamDestroy(self, stream):
        self.streams.remove(stream)
        return (0,)

    def do_cudaStreamSynchronize(self, stream):
        return (0,) if stream in self.streams else (1,)


class FakeContext:
    """y = x + t in float16."""

    def __init__(self, runs: bool) -> None:
        self.runs, self.addresses, self.shape = runs, {}, (2, 3)

    def set_input_shape(self, name, shape):
        self.shape = shape
        return shape[0] != 2  # as if the profile ended at 1

    def get_tensor_shape(self, name):
        return self.shape

    def set_tensor_address(self, name, address):
        self.addresses[name] = address
        return True

    def execute_async_v3(self, stream):
        assert stream == 7
        assert self.addresses.keys() == {"x", "t", "y"}
        size = self.shape[0] * 3
        x = np.frombuffer((ctypes.c_uint8 * (4 * size)).from_address(self.addresses["x"]), np.float32)
        t = np.frombuffer((ctypes.c_uint8 * 8).from_address(self.addresses["t"]), np.int64)
        y = np.frombuffer((ctypes.c_uint8 * (2 * size)).from_address(self.addresses["y"]), np.float16)
        y[:] = x + t
        return self.runs


class FakeEngine:
    num_io_tensors = 3

    def __init__(self, runs=True, context=True, **changes) -> None:
        self.tensors = {"x": ("float32", (2, 3)), "t": ("int64", (1,)), "y": ("float16", (2, 3)), **changes}
        self.context = FakeContext(runs) if context else None

    def get_tensor_name(self, index):
        return list(self.tensors)[index]

    def get_tensor_mode(self, name):
        return "out" if name == "y" else "in"

    def get_tensor_dtype(self, name):
        return self.tensors[name][0]

    def get_tensor_shape(self, name):
        return self.tensors[name][1]

    def create_execution_context(self):
        return self.context


class FakeLogger:
    ERROR, INTERNAL_ERROR = 1, 0


class FakeILogger:
    """Nothing of TensorRT's logger but its place in the class tree."""


class FakeRuntime:
    def __init__(self, logger, engine) -> None:
        self.log, self.engine = logger.log, engine

    def deserialize_cuda_engine(self, data):
        self.log(1, "bad magic number.\n")
        return self.engine


def fake_trt(engine):
    trt = ModuleType("fake_tensorrt")
    trt.Logger, trt.ILogger, trt.nptype = FakeLogger, FakeILogger, np.dtype
    trt.Runtime = lambda logger: FakeRuntime(logger, engine)
    trt.TensorIOMode = SimpleNamespace(INPUT="in")
    return trt


@pytest.fixture
def fake(monkeypatch, tmp_path):
    """Opens a runner on fakes; returns it with the fake CUDA runtime."""

    def make(engine, fail="", spec=SPEC):
        cudart = FakeCudart(fail)
        monkeypatch.setattr(runtime, "load_tensorrt", lambda flavour: fake_trt(engine))
        monkeypatch.setattr(runtime, "load_cudart", lambda flavour: cudart)
        (tmp_path / "x.engine").write_bytes(b"engine")
        make.cudart = cudart
        return TensorRTRunner(tmp_path / "x.engine", spec, "tensorrt")

    return make


INPUTS = {"x": np.arange(6, dtype=np.float32).reshape(2, 3), "t": np.asarray([10], np.int64)}


def test_it_computes_and_gives_everything_back(fake):
    with fake(FakeEngine()) as runner:
        first = runner(**INPUTS)["y"]
        assert first.dtype == np.float16
        assert first.tolist() == [[10, 11, 12], [13, 14, 15]]
        second = runner(**{**INPUTS, "t": np.asarray([0], np.int64)})["y"]
        assert first[0, 0] == 10, "the caller's array is not the runner's buffer"
        assert second[0, 0] == 0
        copies = ["cudaMemcpyAsync"] * 3  # two inputs, one output
        assert fake.cudart.log[-4:] == [*copies, "cudaStreamSynchronize"]
    assert (fake.cudart.live, fake.cudart.streams) == ({}, set())
    runner.close()
    with pytest.raises(HipaError, match="closed"):
        runner(**INPUTS)


def open_rows(tensor: TensorSpec) -> TensorSpec:
    return tensor.model_copy(update={"shape": ("batch", 3)}) if tensor.shape == (2, 3) else tensor


def test_a_dynamic_engine_is_told_its_shape_and_gives_as_many_rows(fake):
    spec = StageSpec(
        name="unet",
        inputs=tuple(map(open_rows, SPEC.inputs)),
        outputs=tuple(map(open_rows, SPEC.outputs)),
        axes={"batch": Axis(min=1, opt=1, max=2)},
    )
    with fake(FakeEngine(x=("float32", (-1, 3)), y=("float16", (-1, 3))), spec=spec) as runner:
        one_row = {**INPUTS, "x": INPUTS["x"][1:]}
        assert runner(**one_row)["y"].tolist() == [[13, 14, 15]]
        with pytest.raises(HipaError, match=r"refuses x of shape \[2, 3\]"):
            runner(**INPUTS)
        with pytest.raises(HipaError, match="batch is 3, expected 1 to 2"):
            runner(**{**INPUTS, "x": np.zeros((3, 3), np.float32)})


def test_non_contiguous_inputs_are_copied_right(fake):
    with fake(FakeEngine()) as runner:
        transposed = np.ascontiguousarray(INPUTS["x"].T).T
        assert runner(**{**INPUTS, "x": transposed})["y"][1, 0] == 13


def test_wrong_inputs_are_refused_before_any_copy(fake):
    with fake(FakeEngine()) as runner:
        before = list(fake.cudart.log)
        with pytest.raises(HipaError, match="input x is float64"):
            runner(**{**INPUTS, "x": np.zeros((2, 3))})
        assert fake.cudart.log == before


@pytest.mark.parametrize(
    ("engine", "fail", "message"),
    [
        (None, "", r"x\.engine does not deserialise: bad magic number\. Run"),
        (FakeEngine(context=False), "", "not enough GPU memory"),
        (FakeEngine(x=("float16", (2, 3))), "", r"x is float16 \[2, 3\] in the engine, expected float32 \[2, 3\]"),
        (FakeEngine(y=("float16", (2, 4))), "", r"y is float16 \[2, 4\]"),
        (FakeEngine(), "cudaMallocHost", r"cudaMallocHost failed: out of memory \(error 2\)"),
        (FakeEngine(), "cudaMalloc", "cudaMalloc failed"),
        (FakeEngine(), "cudaStreamCreateWithFlags", "cudaStreamCreateWithFlags failed"),
    ],
)
def test_a_failed_start_frees_what_it_took(fake, engine, fail, message):
    with pytest.raises(HipaError, match=message):
        fake(engine, fail)
    assert (fake.cudart.live, fake.cudart.streams) == ({}, set())


def test_other_tensor_names_are_said(fake):
    engine = FakeEngine()
    engine.tensors = {"z" if name == "x" else name: value for name, value in engine.tensors.items()}
    with pytest.raises(HipaError, match=r"the engine has inputs \['t', 'z'\], expected \['t', 'x'\]"):
        fake(engine)


def test_a_run_that_tensorrt_refuses_is_an_error(fake):
    with (
        fake(FakeEngine(runs=False)) as runner,
        pytest.raises(HipaError, match="could not run the engine: bad magic number"),
    ):
        runner(**INPUTS)


@pytest.mark.skipif(find_gpu() is not None, reason="a GPU is here")
def test_without_a_driver_the_real_libraries_say_so(tmp_path):
    trt = pytest.importorskip("tensorrt_rtx")
    path = tmp_path / "x.engine"
    path.write_bytes(b"not an engine")
    with pytest.raises(HipaError, match=r"cudaStreamCreateWithFlags failed: CUDA driver version is insufficient.*35"):
        TensorRTRunner(path, SPEC, "rtx")
    with pytest.raises(HipaError, match=r"does not deserialise: .*cudaError 35.*Run hipa-doctor"):
        runtime._deserialise(trt, path)


def test_every_name_the_runtime_uses_exists():
    trt, cudart = pytest.importorskip("tensorrt_rtx"), load_cudart("rtx")
    names = {
        trt.Runtime: ["deserialize_cuda_engine"],
        trt.ICudaEngine: [
            "num_io_tensors", "get_tensor_name", "get_tensor_mode", "get_tensor_dtype", "get_tensor_shape",
            "create_execution_context", "create_engine_inspector",
        ],
        trt.IExecutionContext: ["set_tensor_address", "set_input_shape", "get_tensor_shape", "execute_async_v3"],
        trt.EngineInspector: ["get_engine_information"],
        trt: ["nptype"],
        cudart: [
            "cudaMalloc", "cudaMallocHost", "cudaFree", "cudaFreeHost", "cudaMemcpyAsync", "cudaStreamCreateWithFlags",
            "cudaStreamDestroy", "cudaStreamSynchronize", "cudaStreamNonBlocking", "cudaMemcpyKind",
            "cudaGetErrorString", "cudaGetDeviceCount", "cudaGetDeviceProperties", "cudaDriverGetVersion",
        ],
    }  # fmt: skip
    assert [name for owner, wanted in names.items() for name in wanted if not hasattr(owner, name)] == []
    assert np.dtype(trt.nptype(trt.uint8)) == "uint8"
    assert np.dtype(trt.nptype(trt.float16)) == "float16"
    assert np.dtype(trt.nptype(trt.int64)) == "int64"


@pytest.mark.gpu
@pytest.mark.skipif(find_gpu() is None, reason="no NVIDIA GPU with a driver")
@pytest.mark.parametrize("flavour", ["tensorrt", "rtx"])
def test_an_engine_agrees_with_onnxruntime(make_bundle, flavour):
    from hipa_deploy.engines.build import build_bundle
    from hipa_deploy.runners import open_runner

    pytest.importorskip({"tensorrt": "tensorrt", "rtx": "tensorrt_rtx"}[flavour])
    bundle = make_bundle(stages=("unet",))
    build_bundle(bundle, backend=flavour, console=Console(file=io.StringIO()))
    x = np.random.default_rng(1).standard_normal((1, 4, 8, 8)).astype(np.float32)
    with open_runner(bundle, "unet", flavour) as engine, open_runner(bundle, "unet", "onnxruntime") as reference:
        np.testing.assert_allclose(engine(x=x)["y"], reference(x=x)["y"], rtol=1e-2, atol=2e-2)

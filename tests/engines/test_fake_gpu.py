"""What the fake of a GPU refuses, and that the real libraries have what it imitates.

The runner does none of what is refused here: a change that does it fails in the runner's tests.
"""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from hipa_deploy.bundle.manifest import StageSpec, TensorSpec
from hipa_deploy.engines.tensorrt.cuda import load_cudart
from hipa_deploy.engines.tensorrt.gpu import find_gpu
from tests.engines.fake_gpu import FakeCudart, FakeEngine


def test_a_run_on_memory_that_is_freed():
    tensors = [TensorSpec(name=name, dtype="float32", shape=(1, 3)) for name in ("x", "y")]
    spec = StageSpec(name="unet", inputs=tensors[:1], outputs=tensors[1:])
    cuda = FakeCudart()
    engine = FakeEngine(spec, lambda x: {"y": x})
    engine.cudart = cuda
    _, stream = cuda.cudaStreamCreateWithFlags(1)
    context = engine.create_execution_context()
    for name in ("x", "y"):
        _, pointer = cuda.cudaMalloc(12)
        context.set_tensor_address(name, pointer)
    assert context.execute_async_v3(stream)
    assert cuda.cudaStreamSynchronize(stream) == (0,)
    cuda.cudaFree(context.addresses["x"])
    assert context.execute_async_v3(stream)
    assert cuda.cudaStreamSynchronize(stream) == (700,)


@pytest.mark.parametrize(
    ("size", "offset", "words"),
    [
        (None, 0, "device memory was not provided"),
        (4095, 0, "device memory is too small or not aligned; device memory was not provided"),
        (8192, 8, "device memory is too small or not aligned; device memory was not provided"),
        (4096, 0, ""),
    ],
)
def test_a_context_without_enough_memory_does_not_run(size, offset, words):
    cuda, stream, context = context_without_memory()
    if size is not None:
        context.set_device_memory(cuda.cudaMalloc(8192)[1] + offset, size)
    assert context.execute_async_v3(stream) is (words == "")
    assert "; ".join(context.engine.logger.words) == words


def test_a_block_that_is_freed_or_used_from_two_streams():
    for spoil in ("free", "other stream"):
        cuda, stream, context = context_without_memory()
        _, block = cuda.cudaMalloc(4096)
        context.set_device_memory(block, 4096)
        assert context.execute_async_v3(stream)
        assert cuda.cudaStreamSynchronize(stream) == (0,)
        if spoil == "free":
            cuda.cudaFree(block)
        else:
            _, stream = cuda.cudaStreamCreateWithFlags(1)
        assert context.execute_async_v3(stream)
        assert cuda.cudaStreamSynchronize(stream) == (700,), spoil


def context_without_memory():
    """A fake, a stream, and a context on it whose tensors are bound, but not its activations."""
    tensors = [TensorSpec(name=name, dtype="float32", shape=(1, 3)) for name in ("x", "y")]
    spec = StageSpec(name="unet", inputs=tensors[:1], outputs=tensors[1:])
    cuda = FakeCudart()
    engine = FakeEngine(spec, lambda x: {"y": x})
    engine.device_memory_size_v2 = 4096
    engine.cudart = cuda
    engine.logger = SimpleNamespace(words=[])
    engine.logger.log = lambda severity, text: engine.logger.words.append(text.rstrip(".\n"))
    _, stream = cuda.cudaStreamCreateWithFlags(1)
    context = engine.create_execution_context("user managed")
    for name in ("x", "y"):
        context.set_tensor_address(name, cuda.cudaMalloc(12)[1])
    return cuda, stream, context


def test_waiting_and_allocating_in_a_capture():
    cuda = FakeCudart()
    _, stream = cuda.cudaStreamCreateWithFlags(1)
    for spoil in (lambda: cuda.cudaStreamSynchronize(stream), lambda: cuda.cudaMalloc(8)):
        assert cuda.cudaStreamBeginCapture(stream, 1) == (0,)
        assert spoil()[0] == 900
        assert cuda.cudaStreamEndCapture(stream) == (901, None)


def test_the_wrong_pointer_or_function():
    cuda = FakeCudart()
    _, stream = cuda.cudaStreamCreateWithFlags(1)
    _, device = cuda.cudaMalloc(8)
    _, pinned = cuda.cudaMallocHost(8)
    assert cuda.cudaMemcpyAsync(device, pinned, 8, 1, stream) == (0,)
    for arguments in ((pinned, device, 8, 1), (device, pinned, 9, 1), (device, 1234, 8, 1)):
        assert cuda.cudaMemcpyAsync(*arguments, stream) == (1,)
    assert cuda.cudaFree(pinned) == (1,)
    assert cuda.cudaFree(device) == (0,)
    assert cuda.cudaFree(device) == (1,)


def test_events_that_a_capture_swallowed():
    cuda = FakeCudart()
    _, stream = cuda.cudaStreamCreateWithFlags(1)
    _, event = cuda.cudaEventCreate()
    assert cuda.cudaEventRecordWithFlags(event, stream, cuda.cudaEventRecordExternal) == (1,)
    assert cuda.cudaEventElapsedTime(event, event) == (600, None)
    cuda.cudaStreamBeginCapture(stream, 1)
    cuda.cudaEventRecordWithFlags(event, stream, cuda.cudaEventRecordDefault)
    assert cuda.cudaEventElapsedTime(event, event) == (400, None)


def test_every_name_the_runtime_uses_exists():
    trt = pytest.importorskip("tensorrt_rtx")
    cudart = load_cudart("rtx")
    names = {
        trt.Runtime: ["deserialize_cuda_engine"],
        trt.ICudaEngine: [
            "num_io_tensors", "get_tensor_name", "get_tensor_mode", "get_tensor_dtype",
            "get_tensor_shape", "create_execution_context", "create_engine_inspector",
            "create_runtime_config",
        ],
        trt.IRuntimeConfig: ["dynamic_shapes_kernel_specialization_strategy"],
        trt.DynamicShapesKernelSpecializationStrategy: ["EAGER"],
        trt.IExecutionContext: [
            "set_tensor_address", "set_input_shape", "get_tensor_shape", "execute_async_v3",
            "profiler", "is_stream_capturable",
        ],
        trt.EngineInspector: ["get_engine_information"],
        trt: ["nptype", "IProfiler"],
        cudart: [
            "cudaMalloc", "cudaMallocHost", "cudaFree", "cudaFreeHost", "cudaMemcpyAsync",
            "cudaStreamCreateWithFlags", "cudaStreamDestroy", "cudaStreamSynchronize",
            "cudaStreamNonBlocking", "cudaMemcpyKind", "cudaGetErrorString", "cudaGetDeviceCount",
            "cudaGetDeviceProperties", "cudaDriverGetVersion", "cudaHostAlloc",
            "cudaHostAllocMapped", "cudaHostGetDevicePointer", "cudaMemGetInfo",
            "cudaGetLastError", "cudaDeviceGetAttribute", "cudaEventCreate", "cudaEventDestroy",
            "cudaEventRecordWithFlags", "cudaEventRecordDefault", "cudaEventRecordExternal",
            "cudaEventSynchronize", "cudaEventElapsedTime", "cudaStreamBeginCapture",
            "cudaStreamEndCapture", "cudaGraphInstantiate", "cudaGraphLaunch", "cudaGraphDestroy",
            "cudaGraphExecDestroy",
        ],
        cudart.cudaStreamCaptureMode: ["cudaStreamCaptureModeThreadLocal"],
        cudart.cudaDeviceAttr: ["cudaDevAttrIntegrated"],
        cudart.cudaMemcpyKind: ["cudaMemcpyHostToDevice", "cudaMemcpyDeviceToHost"],
    }  # fmt: skip
    for owner, used in names.items():
        assert [name for name in used if not hasattr(owner, name)] == []
    assert np.dtype(trt.nptype(trt.uint8)) == "uint8"
    assert np.dtype(trt.nptype(trt.float16)) == "float16"
    assert np.dtype(trt.nptype(trt.int64)) == "int64"


def test_the_real_cuda_python_refuses_as_the_fake_does():
    """The fake's calls have the real signatures: without a driver error 35, and no TypeError."""
    cudart = load_cudart("rtx")
    if find_gpu() is not None:
        pytest.skip("a GPU is here")
    integrated = cudart.cudaDeviceAttr.cudaDevAttrIntegrated
    calls = {
        "cudaMalloc": (8,),
        "cudaMallocHost": (8,),
        "cudaHostAlloc": (8, cudart.cudaHostAllocMapped),
        "cudaMemGetInfo": (),
        "cudaEventCreate": (),
        "cudaStreamSynchronize": (0,),
        "cudaDeviceGetAttribute": (integrated, 0),
    }
    for name, arguments in calls.items():
        assert int(getattr(cudart, name)(*arguments)[0]) == 35, name

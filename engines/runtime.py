"""Running an engine: TensorRT and cuda-python, nothing else."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Any

import numpy as np

from hipa_deploy.bundle import StageSpec, TensorSpec
from hipa_deploy.engines.cuda import call, load_cudart
from hipa_deploy.engines.flavour import Flavour, load_tensorrt, recording_logger
from hipa_deploy.errors import HipaError
from hipa_deploy.runners import check_inputs


@dataclass(frozen=True)
class _Buffer:
    """A tensor in device memory and in pinned host memory, at its largest. ``host`` is a flat view of the latter."""

    device: int
    pinned: int
    host: np.ndarray

    def view(self, shape: tuple[int, ...]) -> np.ndarray:
        """The beginning of the host memory as an array of ``shape``."""
        return self.host[: math.prod(shape)].reshape(shape)


class TensorRTRunner:
    """One stage's engine on the first GPU, with one stream and buffers for the largest shapes.

    A call copies inputs in, computes, copies outputs out and waits, so its duration is the stage's latency. Not
    for use from two threads at once. The caller has compared the engine's key (``engine.open_engine`` does).

    Raises:
        MissingDependencyError: TensorRT or cuda-python is not installed.
        HipaError: no driver, an engine that does not deserialise, or one whose tensors are not those of ``spec``.

    """

    def __init__(self, engine_path: Path, spec: StageSpec, flavour: Flavour) -> None:
        self.spec = spec
        self._trt = load_tensorrt(flavour)
        self._cudart = load_cudart(flavour)
        with ExitStack() as stack:
            self._stream = call(self._cudart, "cudaStreamCreateWithFlags", self._cudart.cudaStreamNonBlocking)
            stack.callback(call, self._cudart, "cudaStreamDestroy", self._stream)
            self._runtime, self._engine = _deserialise(self._trt, engine_path)
            check_engine_tensors(self._trt, self._engine, spec)
            self._context = self._engine.create_execution_context()
            if self._context is None:
                raise HipaError(
                    f"{spec.name}: not enough GPU memory for the engine's activations. Close other programs."
                )
            stack.callback(self._drop)
            self._buffers = {tensor.name: self._allocate(tensor, stack) for tensor in spec.inputs + spec.outputs}
            self._closing = stack.pop_all()

    def _allocate(self, tensor: TensorSpec, stack: ExitStack) -> _Buffer:
        dtype = np.dtype(tensor.dtype)
        size = math.prod(tensor.at(self.spec.sizes("max"))) * dtype.itemsize
        device = call(self._cudart, "cudaMalloc", size)
        stack.callback(call, self._cudart, "cudaFree", device)
        pinned = call(self._cudart, "cudaMallocHost", size)
        stack.callback(call, self._cudart, "cudaFreeHost", pinned)
        if not self._context.set_tensor_address(tensor.name, device):
            raise HipaError(f"{self.spec.name}: the engine refuses a buffer for {tensor.name}.")
        raw = (ctypes.c_uint8 * size).from_address(pinned)
        return _Buffer(device, pinned, np.ctypeslib.as_array(raw).view(dtype))

    def __call__(self, **inputs: np.ndarray) -> dict[str, np.ndarray]:
        """Compute the outputs by name; the arrays belong to the caller.

        Raises:
            HipaError: inputs that are not those of ``spec``, a closed runner, or a CUDA error.

        """
        sizes = check_inputs(self.spec, inputs)
        if self._context is None:
            raise HipaError(f"{self.spec.name}: the runner is closed.")
        for tensor in self.spec.inputs:
            self._set_shape(tensor, tensor.at(sizes))
            self._buffers[tensor.name].view(tensor.at(sizes))[...] = inputs[tensor.name]
            self._copy(tensor.name, tensor.at(sizes), "cudaMemcpyHostToDevice")
        shapes = {tensor.name: self._shape(tensor) for tensor in self.spec.outputs}
        if not self._context.execute_async_v3(int(self._stream)):
            raise HipaError(f"{self.spec.name}: TensorRT could not run the engine: {recording_logger(self._trt).last}.")
        for name, shape in shapes.items():
            self._copy(name, shape, "cudaMemcpyDeviceToHost")
        call(self._cudart, "cudaStreamSynchronize", self._stream)
        return {name: self._buffers[name].view(shape).copy() for name, shape in shapes.items()}

    def _set_shape(self, tensor: TensorSpec, shape: tuple[int, ...]) -> None:
        """Tell the context the shape of an input whose engine has a profile for it."""
        if shape != tensor.shape and not self._context.set_input_shape(tensor.name, shape):
            raise HipaError(f"{self.spec.name}: the engine refuses {tensor.name} of shape {list(shape)}.")

    def _shape(self, tensor: TensorSpec) -> tuple[int, ...]:
        """An output's shape: the context knows it once the inputs have theirs."""
        static = tuple(size for size in tensor.shape if isinstance(size, int))
        return static if static == tensor.shape else tuple(self._context.get_tensor_shape(tensor.name))

    def _copy(self, name: str, shape: tuple[int, ...], kind: str) -> None:
        buffer = self._buffers[name]
        ends = (buffer.device, buffer.pinned) if kind == "cudaMemcpyHostToDevice" else (buffer.pinned, buffer.device)
        kind_value, size = getattr(self._cudart.cudaMemcpyKind, kind), buffer.view(shape).nbytes
        call(self._cudart, "cudaMemcpyAsync", *ends, size, kind_value, self._stream)

    def change_engine(self, change: Callable[[ModuleType, Any], None]) -> None:
        """Let ``change`` alter the loaded engine, given TensorRT and the engine, while nothing runs on it.

        Raises:
            HipaError: a closed runner, or what ``change`` raises.

        """
        if self._engine is None:
            raise HipaError(f"{self.spec.name}: the runner is closed.")
        change(self._trt, self._engine)

    def _drop(self) -> None:
        """Release TensorRT's objects, context first: each must outlive those made from it."""
        self._context = None
        self._engine = None
        self._runtime = None

    def close(self) -> None:
        """Release device memory and the stream. Calling it twice is harmless."""
        self._buffers = {}
        self._closing.close()

    def __enter__(self) -> TensorRTRunner:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _deserialise(trt: ModuleType, path: Path) -> tuple[Any, Any]:
    """The runtime and its engine."""
    logger = recording_logger(trt)
    runtime = trt.Runtime(logger)
    engine = runtime.deserialize_cuda_engine(path.read_bytes())
    if engine is None:
        raise HipaError(f"{path} does not deserialise: {logger.last}. Run hipa-doctor, then hipa-build again.")
    return runtime, engine


def check_engine_tensors(trt: ModuleType, engine: Any, spec: StageSpec) -> None:
    """Raise HipaError unless an engine's inputs and outputs are those of ``spec``: names, dtypes and shapes.

    An engine reports -1 for a dimension that its profile leaves open.
    """
    names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
    inputs = {name for name in names if engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT}
    for kind, expected, got in (
        ("inputs", spec.inputs, inputs),
        ("outputs", spec.outputs, set(names) - inputs),
    ):
        if got != {tensor.name for tensor in expected}:
            wanted = sorted(tensor.name for tensor in expected)
            raise HipaError(f"{spec.name}: the engine has {kind} {sorted(got)}, expected {wanted}. Build it again.")
        for tensor in expected:
            dtype, shape = (
                np.dtype(trt.nptype(engine.get_tensor_dtype(tensor.name))),
                engine.get_tensor_shape(tensor.name),
            )
            if dtype != tensor.dtype or tuple(shape) != tuple(-1 if isinstance(n, str) else n for n in tensor.shape):
                found, wanted_text = f"{dtype} {list(shape)}", f"{tensor.dtype} {list(tensor.shape)}"
                raise HipaError(
                    f"{spec.name}: {tensor.name} is {found} in the engine, expected {wanted_text}. Build it again."
                )

"""One stage's engine, loaded: checked against the manifest, bound to named buffers, put on a stream."""

from __future__ import annotations

import mmap
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from hipa_deploy.bundle.manifest import StageSpec
from hipa_deploy.engines.tensorrt.buffers import Buffer
from hipa_deploy.engines.tensorrt.library import recording_logger
from hipa_deploy.errors import HipaError

Shape = tuple[int, ...]


class EngineStage:
    """An engine and its execution context.

    Raises:
        HipaError: an engine that does not deserialise, one whose tensors are not those of ``spec``, or no memory left.

    """

    def __init__(self, trt: ModuleType, spec: StageSpec, path: Path) -> None:
        self.spec = spec
        self._trt = trt
        self._runtime, self._engine = deserialise(trt, path)
        check_engine_tensors(trt, self._engine, spec)
        self._context = self.new_context()

    def new_context(self) -> Any:
        """Another execution context, with activations of its own."""
        context = self._engine.create_execution_context(*self._runtime_config())
        if context is None:
            raise HipaError(
                f"{self.spec.name}: not enough GPU memory for the engine's activations. Close other programs."
            )
        return context

    def _runtime_config(self) -> tuple[Any, ...]:
        """TensorRT-RTX, dynamic shapes: compile kernels for new shapes at once.

        By default it does so in the background, and a graph would keep the general ones that it starts with.
        """
        strategies = getattr(self._trt, "DynamicShapesKernelSpecializationStrategy", None)
        if not self.spec.axes or strategies is None:
            return ()
        config = self._engine.create_runtime_config()
        config.dynamic_shapes_kernel_specialization_strategy = strategies.EAGER
        return (config,)

    def bind(self, buffers: Mapping[str, Buffer], context: Any = None) -> None:
        """Give every tensor its address, once for all."""
        context = self._context if context is None else context
        for tensor in self.spec.inputs + self.spec.outputs:
            if not context.set_tensor_address(tensor.name, buffers[tensor.name].device):
                raise HipaError(f"{self.spec.name}: the engine refuses a buffer for {tensor.name}.")

    def set_shapes(self, shapes: dict[str, Shape], context: Any = None) -> None:
        """Tell the context its inputs' shapes, and add the outputs' to ``shapes``."""
        context = self._context if context is None else context
        for tensor in self.spec.inputs:
            shape = shapes[tensor.name]
            if shape != tensor.shape and not context.set_input_shape(tensor.name, shape):
                raise HipaError(
                    f"{self.spec.name}: the engine refuses {tensor.name} of shape {list(shape)}."
                )
        for tensor in self.spec.outputs:
            static = tuple(size for size in tensor.shape if isinstance(size, int))
            shapes[tensor.name] = (
                static if static == tensor.shape else tuple(context.get_tensor_shape(tensor.name))
            )

    def enqueue(self, stream: Any, context: Any = None) -> None:
        """Put one run on ``stream``."""
        context = self._context if context is None else context
        if not context.execute_async_v3(int(stream)):
            words = recording_logger(self._trt).last
            raise HipaError(f"{self.spec.name}: TensorRT could not run the engine: {words}.")

    def check_capturable(self, stream: Any) -> None:
        """Raise HipaError where TensorRT-RTX knows that it cannot be captured; TensorRT has no such question."""
        ask = getattr(self._context, "is_stream_capturable", None)
        if ask is not None and not ask(int(stream)):
            raise HipaError(
                f"{self.spec.name}: TensorRT-RTX cannot capture this engine. It must be built with "
                "BuilderFlag.REQUIRE_USER_ALLOCATION"
            )

    def profile(
        self, stream: Any, buffers: Mapping[str, Buffer], shapes: dict[str, Shape]
    ) -> list[tuple[str, float]]:
        """Milliseconds of every layer on what the input buffers hold, from the second of two runs.

        In a context of its own: a profiler cannot be taken off again, and it slows what it watches.
        """
        context, profiler = self.new_context(), layer_profiler(self._trt)
        self.bind(buffers, context)
        self.set_shapes(shapes, context)
        context.profiler = profiler
        for _ in range(2):
            profiler.layers.clear()
            self.enqueue(stream, context)  # with a profiler it waits, and reports before it returns
        return list(profiler.layers)

    def change(self, change: Callable[[ModuleType, Any], None]) -> None:
        """Let ``change`` alter the engine, given TensorRT and the engine; the context remains."""
        change(self._trt, self._engine)

    def drop(self) -> None:
        """Release TensorRT's objects, context first: each must outlive those made from it."""
        self._context = None
        self._engine = None
        self._runtime = None


def layer_profiler(trt: ModuleType) -> Any:
    """A TensorRT profiler that keeps (layer, milliseconds) in ``layers``."""
    base: Any = trt.IProfiler

    class Profiler(base):
        def __init__(self) -> None:
            base.__init__(self)  # pybind11 wants it called by name
            self.layers: list[tuple[str, float]] = []

        def report_layer_time(self, layer_name: str, ms: float) -> None:
            self.layers.append((layer_name, ms))

    return Profiler()


def deserialise(trt: ModuleType, path: Path) -> tuple[Any, Any]:
    """The runtime and its engine. The file is mapped, not read: on Jetson a copy would take the GPU's memory."""
    logger = recording_logger(trt)
    runtime = trt.Runtime(logger)
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        engine = runtime.deserialize_cuda_engine(data)
    if engine is None:
        raise HipaError(
            f"{path} does not deserialise: {logger.last}. Run hipa-doctor, then hipa-build again."
        )
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
            raise HipaError(
                f"{spec.name}: the engine has {kind} {sorted(got)}, expected {wanted}. Build it again."
            )
        for tensor in expected:
            dtype, shape = (
                np.dtype(trt.nptype(engine.get_tensor_dtype(tensor.name))),
                engine.get_tensor_shape(tensor.name),
            )
            if dtype != tensor.dtype or tuple(shape) != tuple(
                -1 if isinstance(n, str) else n for n in tensor.shape
            ):
                found, wanted_text = (
                    f"{dtype} {list(shape)}",
                    f"{tensor.dtype} {list(tensor.shape)}",
                )
                raise HipaError(
                    f"{spec.name}: {tensor.name} is {found} in the engine, expected {wanted_text}. Build it again."
                )

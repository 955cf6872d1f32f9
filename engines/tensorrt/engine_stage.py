"""One stage's engine, loaded: checked against the manifest, bound to buffers, run on a stream."""

from __future__ import annotations

import math
import mmap
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from hipa_deploy.bundle.manifest import StageSpec, TensorSpec
from hipa_deploy.engines.tensorrt.buffers import Buffer
from hipa_deploy.engines.tensorrt.library import recording_logger
from hipa_deploy.errors import HipaError

Shape = tuple[int, ...]


class EngineStage:
    """An engine and its execution context.

    All memory belongs to the runner: it binds the buffers of inputs and outputs, and places the
    activations. A context has none of its own, and runs only when both are there.

    Args:
        trt: the module of TensorRT or TensorRT-RTX.
        spec: the stage's inputs and outputs, as the manifest has them.
        path: the engine file.
        barriers: further outputs of the engine, which only keep TensorRT from fusing layers across
            them.

    Raises:
        HipaError: an engine that does not deserialise, whose tensors are not those of ``spec``, or
            that gives no execution context.

    """

    def __init__(
        self, trt: ModuleType, spec: StageSpec, path: Path, barriers: tuple[str, ...] = ()
    ) -> None:
        self.spec = spec
        self._trt = trt
        self._barriers = barriers
        self._barrier_addresses: dict[str, int] = {}
        self._activations: tuple[int, int] | None = None  # address and size
        self._runtime, self._engine = deserialise(trt, path)
        check_engine_tensors(trt, self._engine, spec, barriers)
        self._context = self.new_context()

    def new_context(self) -> Any:
        """Another execution context, for the activations of the first: only one may run at a time.

        Raises:
            HipaError: the engine gives none; the message has TensorRT's last error.

        """
        context = self._engine.create_execution_context(self._context_choice())
        if context is None:
            words = recording_logger(self._trt).last
            raise HipaError(
                f"{self.spec.name}: the engine gives no execution context: {words}. "
                "Close other programs; hipa-generate --low-memory takes less."
            )
        if self._activations is not None:
            context.set_device_memory(*self._activations)
        return context

    def _context_choice(self) -> Any:
        """What a new context is made with: no activations of its own.

        On TensorRT-RTX with dynamic shapes it is a runtime configuration, which compiles the
        kernels for new shapes at once. By default TensorRT-RTX compiles them in the background, and
        a CUDA graph would keep the general kernels that it starts with.
        """
        user_managed = self._trt.ExecutionContextAllocationStrategy.USER_MANAGED
        strategies = getattr(self._trt, "DynamicShapesKernelSpecializationStrategy", None)
        if not self.spec.axes or strategies is None:
            return user_managed
        config = self._engine.create_runtime_config()
        config.set_execution_context_allocation_strategy(user_managed)
        config.dynamic_shapes_kernel_specialization_strategy = strategies.EAGER
        return config

    @property
    def activation_bytes(self) -> int:
        """Bytes that the activations take at the largest shapes.

        This and ``set_device_memory`` with a size are in every supported version. TensorRT 11 has
        no other: it dropped the 32-bit names of 10.0.
        """
        return int(self._engine.device_memory_size_v2)

    def place_activations(self, address: int, size: int) -> None:
        """Where the activations are held from now on, in every context of this engine.

        Args:
            address: of device memory, a multiple of 256.
            size: its bytes, at least ``activation_bytes``.

        """
        self._activations = (address, size)
        self._context.set_device_memory(address, size)

    def barrier_sizes(self) -> dict[str, int]:
        """Bytes that each barrier needs at the largest shapes.

        Raises:
            HipaError: a shape outside the engine's profile.

        """
        if not self._barriers:
            return {}
        largest = self.spec.sizes("max")
        self.set_shapes({tensor.name: tensor.at(largest) for tensor in self.spec.inputs})
        sizes = {}
        for name in self._barriers:
            item = np.dtype(self._trt.nptype(self._engine.get_tensor_dtype(name))).itemsize
            sizes[name] = math.prod(self._context.get_tensor_shape(name)) * item
        return sizes

    def place_barriers(self, addresses: Mapping[str, int]) -> None:
        """Where the barriers are written, in every context that is bound from now on."""
        self._barrier_addresses = dict(addresses)

    def bind(self, buffers: Mapping[str, Buffer], context: Any = None) -> None:
        """Set the address of every tensor, once and for all.

        Raises:
            HipaError: the engine refuses a buffer.

        """
        context = self._context if context is None else context
        addresses = dict(self._barrier_addresses)
        for tensor in self.spec.inputs + self.spec.outputs:
            addresses[tensor.name] = buffers[tensor.name].device
        for name, address in addresses.items():
            if not context.set_tensor_address(name, address):
                raise HipaError(f"{self.spec.name}: the engine refuses a buffer for {name}.")

    def set_shapes(self, shapes: dict[str, Shape], context: Any = None) -> None:
        """Set the context's input shapes, and add the output shapes to ``shapes``.

        Raises:
            HipaError: a shape outside the engine's profile.

        """
        context = self._context if context is None else context
        for tensor in self.spec.inputs:
            shape = shapes[tensor.name]
            # TensorRT knows a static shape already.
            if shape != tensor.shape and not context.set_input_shape(tensor.name, shape):
                raise HipaError(
                    f"{self.spec.name}: the engine refuses {tensor.name} of shape {list(shape)}."
                )
        for tensor in self.spec.outputs:
            static = _static_shape(tensor)
            if static is None:
                shapes[tensor.name] = tuple(context.get_tensor_shape(tensor.name))
            else:
                shapes[tensor.name] = static

    def enqueue(self, stream: Any, context: Any = None) -> None:
        """Put one run on ``stream``.

        Raises:
            HipaError: TensorRT could not run the engine; the message has its last error.

        """
        context = self._context if context is None else context
        if not context.execute_async_v3(int(stream)):
            words = recording_logger(self._trt).last
            raise HipaError(f"{self.spec.name}: TensorRT could not run the engine: {words}.")

    def check_capturable(self, stream: Any) -> None:
        """Raise HipaError where TensorRT-RTX knows that the engine cannot be captured.

        TensorRT cannot say so beforehand: there the capture itself fails.
        """
        ask = getattr(self._context, "is_stream_capturable", None)
        if ask is not None and not ask(int(stream)):
            raise HipaError(
                f"{self.spec.name}: TensorRT-RTX cannot capture this engine. It must be built with "
                "BuilderFlag.REQUIRE_USER_ALLOCATION"
            )

    def profile(
        self, stream: Any, buffers: Mapping[str, Buffer], shapes: dict[str, Shape]
    ) -> list[tuple[str, float]]:
        """Time every layer on the present content of the input buffers.

        It uses a context of its own: a profiler cannot be removed from a context, and it slows
        what it watches.

        Returns:
            (layer, milliseconds) of the second of two runs, in the order in which the layers ran.

        Raises:
            HipaError: no further context, or as ``enqueue`` does.

        """
        context = self.new_context()
        profiler = layer_profiler(self._trt)
        self.bind(buffers, context)
        self.set_shapes(shapes, context)
        context.profiler = profiler
        # The first run does TensorRT's deferred set-up. A run with a profiler waits for the device,
        # and reports its layers before it returns.
        for _ in range(2):
            profiler.layers.clear()
            self.enqueue(stream, context)
        return list(profiler.layers)

    def change(self, change: Callable[[ModuleType, Any], None]) -> None:
        """Call ``change(trt, engine)``, which may alter the engine; the context remains."""
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
            base.__init__(self)  # pybind11 requires the base's constructor by name
            self.layers: list[tuple[str, float]] = []

        def report_layer_time(self, layer_name: str, ms: float) -> None:
            self.layers.append((layer_name, ms))

    return Profiler()


def deserialise(trt: ModuleType, path: Path) -> tuple[Any, Any]:
    """Load an engine file.

    The file is mapped into memory, not read: on Jetson a copy would take the GPU's memory.

    Returns:
        The runtime and the engine. The runtime must outlive the engine.

    Raises:
        HipaError: the file is not an engine of this TensorRT.

    """
    logger = recording_logger(trt)
    runtime = trt.Runtime(logger)
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        engine = runtime.deserialize_cuda_engine(data)
    # TensorRT raises nothing: the reason is in its log alone.
    if engine is None:
        raise HipaError(
            f"{path} does not deserialise: {logger.last}. Run hipa-doctor, then hipa-build again."
        )
    return runtime, engine


def check_engine_tensors(
    trt: ModuleType, engine: Any, spec: StageSpec, barriers: tuple[str, ...] = ()
) -> None:
    """Check that an engine's inputs and outputs are those of ``spec``: names, dtypes and shapes.

    ``barriers`` are outputs besides, of any type and shape.

    Raises:
        HipaError: they are not; the message has what the engine has and what the manifest has.

    """
    names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
    inputs = {name for name in names if engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT}
    outputs = set(names) - inputs

    _check_names(spec, "inputs", spec.inputs, inputs)
    for tensor in spec.inputs:
        _check_tensor(trt, engine, spec, tensor)
    absent = sorted(set(barriers) - outputs)
    if absent:
        raise HipaError(
            f"{spec.name}: the engine has no output {absent[0]!r}, which its key says it has. "
            "Build it again."
        )
    _check_names(spec, "outputs", spec.outputs, outputs - set(barriers))
    for tensor in spec.outputs:
        _check_tensor(trt, engine, spec, tensor)


def _check_names(
    spec: StageSpec, kind: str, tensors: tuple[TensorSpec, ...], got: set[str]
) -> None:
    expected = {tensor.name for tensor in tensors}
    if got != expected:
        raise HipaError(
            f"{spec.name}: the engine has {kind} {sorted(got)}, expected {sorted(expected)}. "
            "Build it again."
        )


def _check_tensor(trt: ModuleType, engine: Any, spec: StageSpec, tensor: TensorSpec) -> None:
    """Compare one tensor's dtype and shape."""
    dtype = np.dtype(trt.nptype(engine.get_tensor_dtype(tensor.name)))
    shape = tuple(engine.get_tensor_shape(tensor.name))
    # An engine reports -1 for a dimension that its profile leaves open.
    expected = tuple(-1 if isinstance(size, str) else size for size in tensor.shape)
    if dtype != tensor.dtype or shape != expected:
        raise HipaError(
            f"{spec.name}: {tensor.name} is {dtype} {list(shape)} in the engine, "
            f"expected {tensor.dtype} {list(tensor.shape)}. Build it again."
        )


def _static_shape(tensor: TensorSpec) -> Shape | None:
    """The shape of a tensor without named axes; None where a call decides a dimension."""
    sizes = tuple(size for size in tensor.shape if isinstance(size, int))
    return sizes if len(sizes) == len(tensor.shape) else None

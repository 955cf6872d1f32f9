"""A recording fake of cuda-python and TensorRT. It has no kernels, and its 'device' is host memory.

It works late, as a GPU does: what is put on a stream runs when somebody waits for it, so a missing
wait shows. And it refuses what the real ones refuse:

- freeing twice, or with the other kind's function; copies from, to or past memory that is not
  allocated, or whose kinds are not those that the copy names;
- waiting or allocating while a stream is captured, which spoils the capture; capturing twice or on
  the default stream; a first run inside a capture; launching or destroying a graph that is gone;
- an external event outside a capture, and the time of an event that a capture swallowed or that
  nobody recorded;
- a run after an error that nobody read, without every address, on memory that is gone or too
  small, or with a shape outside the profile;
- activations that are missing, too small, not aligned, gone when the run comes, or used from two
  streams. Every run writes over all of its activations.

``leaks`` names what was not released.
"""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from types import ModuleType, SimpleNamespace

import numpy as np

from hipa_deploy.bundle.manifest import StageSpec, TensorSpec

# CUDA's error codes, and its words for some of them.
INVALID_VALUE = 1
OUT_OF_MEMORY = 2
INVALID_HANDLE = 400
NOT_READY = 600
ILLEGAL_ADDRESS = 700
CAPTURE_UNSUPPORTED = 900
CAPTURE_INVALIDATED = 901
WORDS = {
    OUT_OF_MEMORY: b"out of memory",
    CAPTURE_UNSUPPORTED: b"operation not permitted when stream is capturing",
    CAPTURE_INVALIDATED: b"operation failed due to a previous error during capture",
    ILLEGAL_ADDRESS: b"an illegal memory access was encountered",
}
FIRST_STREAM = 7
ALIGNMENT = 256  # of all memory

Operation = Callable[[], None]


@dataclass
class Memory:
    raw: ctypes.Array
    kind: str  # device, pinned or mapped
    owner: ctypes.Array  # ``raw`` is the aligned part of it
    stream: int | None = None  # that has used it for activations

    @property
    def size(self) -> int:
        return len(self.raw)


@dataclass
class Event:
    stamp: float | None = None
    swallowed: bool = False


class IllegalAddress(Exception):
    """What a kernel does with memory that is gone."""


class FakeCudart:
    """The CUDA runtime's names. Errors are returned, as cuda-python returns them.

    ``fail`` names a function that fails whenever it is called.
    """

    cudaStreamNonBlocking = 1
    cudaHostAllocMapped = 2
    cudaEventRecordDefault = 0
    cudaEventRecordExternal = 1
    cudaMemcpyKind = SimpleNamespace(cudaMemcpyHostToDevice=1, cudaMemcpyDeviceToHost=2)
    cudaStreamCaptureMode = SimpleNamespace(cudaStreamCaptureModeThreadLocal=1)
    cudaDeviceAttr = SimpleNamespace(cudaDevAttrIntegrated=18)

    def __init__(self, fail: str = "", integrated: bool = False) -> None:
        self.fail = fail
        self.integrated = integrated
        self.log: list[str] = []  # the names of all calls, in order
        self.memory: dict[int, Memory] = {}
        self.streams: set[int] = set()
        self.made_streams = 0
        self.queue: list[Operation] = []
        self.events: dict[int, Event] = {}
        self.graphs: dict[int, list[Operation]] = {}
        self.executables: dict[int, list[Operation]] = {}
        self.capture: list[Operation] | None = None
        self.spoiled = False
        self.clock_ms = 0.0
        self.handles = 100
        self.last_error = 0

    @property
    def leaks(self) -> list[str]:
        leaks = []
        for held in (self.memory, self.streams, self.events, self.graphs, self.executables):
            leaks += [str(item) for item in held]
        if self.capture is not None:
            leaks.append("capture")
        return leaks

    def __getattr__(self, name: str):
        do = object.__getattribute__(self, f"do_{name}")

        def call(*arguments):
            self.log.append(name)
            result = (OUT_OF_MEMORY, None) if name == self.fail else do(*arguments)
            if name == self.fail == "cudaStreamEndCapture":
                self.capture = None
            if name != "cudaGetLastError":
                self.last_error = result[0] or self.last_error
            return result

        return call

    def cudaGetErrorString(self, error):
        return 0, WORDS.get(error, b"invalid argument")

    def do_cudaGetLastError(self):
        error = self.last_error
        self.last_error = 0
        return (error,)

    def do_cudaGetDeviceCount(self):
        return 0, 1

    def do_cudaDeviceGetAttribute(self, attribute, device):
        return 0, int(self.integrated and attribute == 18)

    def do_cudaMemGetInfo(self):
        used = sum(memory.size for memory in self.memory.values())
        # As if a byte were a MiB, so that a test sees it.
        return 0, (1 << 40) - (used << 20), 1 << 40

    # memory

    def _forbidden_in_capture(self) -> bool:
        self.spoiled |= self.capture is not None
        return self.capture is not None

    def _allocate(self, size: int, kind: str):
        if self._forbidden_in_capture():
            return CAPTURE_UNSUPPORTED, None
        owner = (ctypes.c_uint8 * (size + ALIGNMENT))(*b"\xaa" * (size + ALIGNMENT))  # never zeros
        address = -(-ctypes.addressof(owner) // ALIGNMENT) * ALIGNMENT
        raw = (ctypes.c_uint8 * size).from_address(address)
        self.memory[address] = Memory(raw, kind, owner)
        return 0, address

    def do_cudaMalloc(self, size):
        return self._allocate(size, "device")

    def do_cudaMallocHost(self, size):
        return self._allocate(size, "pinned")

    def do_cudaHostAlloc(self, size, flags):
        if flags != self.cudaHostAllocMapped:
            return INVALID_VALUE, None
        return self._allocate(size, "mapped")

    def do_cudaHostGetDevicePointer(self, pointer, flags):
        mapped = pointer in self.memory and self.memory[pointer].kind == "mapped" and flags == 0
        return (0, pointer) if mapped else (INVALID_VALUE, None)

    def _free(self, pointer: int, kinds: tuple[str, ...]):
        if self._forbidden_in_capture():
            return (CAPTURE_UNSUPPORTED,)
        if pointer not in self.memory or self.memory[pointer].kind not in kinds:
            return (INVALID_VALUE,)
        self._run_queue()
        del self.memory[pointer]
        return (0,)

    def do_cudaFree(self, pointer):
        return self._free(pointer, ("device",))

    def do_cudaFreeHost(self, pointer):
        return self._free(pointer, ("pinned", "mapped"))

    def do_cudaMemcpyAsync(self, to, source, size, kind, stream):
        kinds = {1: ("device", "pinned"), 2: ("pinned", "device")}[kind]
        for pointer, wanted in zip((to, source), kinds, strict=True):
            memory = self.memory.get(pointer)
            if memory is None or memory.kind != wanted or size > memory.size:
                return (INVALID_VALUE,)
        return self.put(stream, lambda: ctypes.memmove(to, source, size) and None)

    # streams, events, graphs

    def put(self, stream: int, operation: Operation):
        if stream not in self.streams:
            return (INVALID_HANDLE,)
        (self.queue if self.capture is None else self.capture).append(operation)
        return (0,)

    def _run_queue(self) -> None:
        while self.queue:
            try:
                self.queue.pop(0)()
            except IllegalAddress:
                self.queue.clear()  # what comes after it does not run either
                raise

    def do_cudaStreamCreateWithFlags(self, flags):
        self.made_streams += 1
        stream = FIRST_STREAM + self.made_streams - 1
        self.streams.add(stream)
        return 0, stream

    def do_cudaStreamDestroy(self, stream):
        if stream not in self.streams:
            return (INVALID_HANDLE,)
        self.streams.remove(stream)
        return (0,)

    def do_cudaStreamSynchronize(self, stream):
        if self._forbidden_in_capture():
            return (CAPTURE_UNSUPPORTED,)
        if stream not in self.streams:
            return (INVALID_HANDLE,)
        try:
            self._run_queue()
        except IllegalAddress:
            return (ILLEGAL_ADDRESS,)
        return (0,)

    def _handle(self) -> int:
        self.handles += 1
        return self.handles

    def do_cudaEventCreate(self):
        handle = self._handle()
        self.events[handle] = Event()
        return 0, handle

    def do_cudaEventDestroy(self, event):
        return (0,) if self.events.pop(event, None) is not None else (INVALID_HANDLE,)

    def do_cudaEventRecordWithFlags(self, event, stream, flags):
        if event not in self.events:
            return (INVALID_HANDLE,)
        if flags == self.cudaEventRecordExternal and self.capture is None:
            return (INVALID_VALUE,)
        found = self.events[event]
        found.stamp = None
        found.swallowed = self.capture is not None and flags == self.cudaEventRecordDefault
        return self.put(stream, lambda: setattr(found, "stamp", self.clock_ms))

    def do_cudaEventSynchronize(self, event):
        if self._forbidden_in_capture():
            return (CAPTURE_UNSUPPORTED,)
        self._run_queue()
        return (0,)

    def do_cudaEventElapsedTime(self, start, end):
        first = self.events.get(start)
        last = self.events.get(end)
        if first is None or last is None or first.swallowed or last.swallowed:
            return INVALID_HANDLE, None
        if first.stamp is None or last.stamp is None:
            return NOT_READY, None
        return 0, last.stamp - first.stamp

    def do_cudaStreamBeginCapture(self, stream, mode):
        if stream not in self.streams or self.capture is not None:
            return (INVALID_VALUE,)
        self.capture = []
        self.spoiled = False
        return (0,)

    def do_cudaStreamEndCapture(self, stream):
        operations = self.capture
        self.capture = None
        if operations is None:
            return INVALID_VALUE, None
        if self.spoiled:
            return CAPTURE_INVALIDATED, None
        handle = self._handle()
        self.graphs[handle] = operations
        return 0, handle

    def do_cudaGraphInstantiate(self, graph, flags):
        if graph not in self.graphs or flags != 0:
            return INVALID_VALUE, None
        handle = self._handle()
        self.executables[handle] = list(self.graphs[graph])
        return 0, handle

    def do_cudaGraphDestroy(self, graph):
        return (0,) if self.graphs.pop(graph, None) is not None else (INVALID_VALUE,)

    def do_cudaGraphExecDestroy(self, executable):
        return (0,) if self.executables.pop(executable, None) is not None else (INVALID_VALUE,)

    def do_cudaGraphLaunch(self, executable, stream):
        if executable not in self.executables:
            return (INVALID_VALUE,)
        for operation in self.executables[executable]:
            error, *_ = self.put(stream, operation)
            if error:
                return (error,)
        return (0,)


class FakeContext:
    """Computes with ``engine.compute`` from and to its addresses, and takes 1 ms."""

    def __init__(self, engine: FakeEngine, cudart: FakeCudart) -> None:
        self.engine = engine
        self.cudart = cudart
        self.addresses: dict[str, int] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.warm: set[tuple] = set()
        self.activations: int | None = None
        self.profiler = None
        if engine.capturable is not None:
            self.is_stream_capturable = lambda stream: engine.capturable

    def set_device_memory(self, memory, size):
        # As TensorRT, which returns nothing: what is wrong is in the log, and the run fails.
        if size < self.engine.device_memory_size_v2 or memory % ALIGNMENT:
            self.engine.logger.log(1, "device memory is too small or not aligned.\n")
            return
        self.activations = memory

    def set_tensor_address(self, name, address):
        known = name in self.engine.tensors and isinstance(address, int)
        if known and name != self.engine.refuses_address:
            self.addresses[name] = address
            return True
        return False

    def set_input_shape(self, name, shape):
        if name not in self.engine.tensors or shape[0] > self.engine.max_rows:
            return False
        self.shapes[name] = tuple(shape)
        return True

    def get_tensor_shape(self, name):
        rows = next((shape[0] for shape in self.shapes.values()), -1)
        return tuple(rows if size == -1 else size for size in self.engine.tensors[name][1])

    def execute_async_v3(self, stream):
        now = {name: self.get_tensor_shape(name) for name in self.engine.tensors}
        if not self.engine.runs or self.addresses.keys() != self.engine.tensors.keys():
            self.engine.logger.log(1, "address not set.\n")
            return False
        if self.activations is None:
            self.engine.logger.log(1, "device memory was not provided.\n")
            return False
        if self.cudart.last_error:
            self.engine.logger.log(1, "Cuda failure of an earlier call.\n")
            return False
        if any(-1 in shape for shape in now.values()):
            self.engine.logger.log(1, "input shape not specified.\n")
            return False
        capturing = self.cudart.capture is not None
        if capturing and (tuple(now.items()) not in self.warm or self.engine.spoils_capture):
            self.cudart.spoiled = True
            self.engine.logger.log(1, "set-up is not permitted when stream is capturing.\n")
            return False
        self.warm.add(tuple(now.items()))
        addresses = dict(self.addresses)  # a graph keeps those it was captured with
        held = self.activations

        def run() -> None:
            self._use(held, stream)
            self._compute(addresses, now)

        if self.cudart.put(stream, run)[0]:
            return False
        if self.profiler is not None:
            self.cudart._run_queue()
            self.profiler.report_layer_time("conv", 0.75)
            self.profiler.report_layer_time("relu", 0.25)
        return True

    def _use(self, address: int, stream: int) -> None:
        """Write over the activations, which nothing else may be in."""
        memory = self.cudart.memory.get(address)
        needed = self.engine.device_memory_size_v2
        if memory is None or memory.kind != "device" or memory.size < needed:
            raise IllegalAddress
        if memory.stream not in (None, stream):
            raise IllegalAddress
        memory.stream = stream
        memory.raw[:needed] = b"\x55" * needed

    def _compute(self, addresses, shapes) -> None:
        views = {name: self._view(addresses[name], name, shapes[name]) for name in addresses}
        outputs = self.engine.compute(**{name: views[name] for name in self.engine.input_names})
        for name, value in outputs.items():
            views[name][...] = value
        self.cudart.clock_ms += 1

    def _view(self, address: int, name: str, shape: tuple[int, ...]) -> np.ndarray:
        dtype = np.dtype(self.engine.tensors[name][0])
        size = int(np.prod(shape)) * dtype.itemsize
        memory = self.cudart.memory.get(address)
        if memory is None or memory.kind == "pinned" or memory.size < size:
            raise IllegalAddress
        return np.frombuffer(memory.raw, dtype, int(np.prod(shape))).reshape(shape)


class FakeEngine:
    """An engine with the tensors of ``spec`` (or ``changes``) that computes ``compute``.

    ``capturable``: None as TensorRT, which cannot be asked; True or False as TensorRT-RTX.
    ``activations``: the bytes that a context needs.
    """

    def __init__(
        self,
        spec: StageSpec,
        compute,
        *,
        runs=True,
        context=True,
        capturable=None,
        spoils_capture=False,
        refuses_address="",
        max_rows=99,
        activations=1024,
        **changes,
    ) -> None:
        self.tensors = {tensor.name: _open(tensor) for tensor in spec.inputs + spec.outputs}
        self.tensors |= changes
        self.input_names = [tensor.name for tensor in spec.inputs]
        self.compute = compute
        self.runs = runs
        self.has_context = context
        self.capturable = capturable
        self.spoils_capture = spoils_capture
        self.refuses_address = refuses_address
        self.max_rows = max_rows
        self.device_memory_size_v2 = activations
        self.logger = None
        self.cudart = None
        self.strategy = None
        self.contexts: list[FakeContext] = []

    @property
    def num_io_tensors(self):
        return len(self.tensors)

    def get_tensor_name(self, index):
        return list(self.tensors)[index]

    def get_tensor_mode(self, name):
        return "in" if name in self.input_names else "out"

    def get_tensor_dtype(self, name):
        return self.tensors[name][0]

    def get_tensor_shape(self, name):
        return self.tensors[name][1]

    def create_runtime_config(self):
        return FakeRuntimeConfig()

    def create_execution_context(self, choice="static"):
        memory = choice
        if isinstance(choice, FakeRuntimeConfig):
            memory = choice.allocation
            self.strategy = choice.dynamic_shapes_kernel_specialization_strategy
        if not self.has_context:
            return None
        context = FakeContext(self, self.cudart)
        if memory != "user managed":
            _, context.activations = self.cudart._allocate(self.device_memory_size_v2, "device")
            weakref.finalize(context, self.cudart.memory.pop, context.activations)
        self.contexts.append(context)
        return context


class FakeRuntimeConfig:
    """TensorRT-RTX's choices for a context, as they are by default."""

    allocation = "static"
    dynamic_shapes_kernel_specialization_strategy = "lazy"

    def set_execution_context_allocation_strategy(self, strategy):
        self.allocation = strategy


def _open(tensor: TensorSpec) -> tuple[str, tuple[int, ...]]:
    return tensor.dtype, tuple(-1 if isinstance(size, str) else size for size in tensor.shape)


class FakeLogger:
    ERROR = 1
    INTERNAL_ERROR = 0


class FakeILogger:
    """Nothing of TensorRT's logger but its place in the class tree."""


class FakeIProfiler:
    """Nothing of TensorRT's profiler but its place in the class tree."""


@dataclass
class FakeGpu:
    """Both fakes. An engine file holds the name of its entry in ``engines``.

    An entry of None does not deserialise. ``rtx``: with what only TensorRT-RTX has.
    """

    engines: dict[str, FakeEngine | None]
    cudart: FakeCudart = field(default_factory=FakeCudart)
    rtx: bool = False

    @property
    def trt(self) -> ModuleType:
        trt = ModuleType("fake_tensorrt")
        trt.Logger = FakeLogger
        trt.ILogger = FakeILogger
        trt.IProfiler = FakeIProfiler
        trt.ExecutionContextAllocationStrategy = SimpleNamespace(
            STATIC="static", USER_MANAGED="user managed"
        )
        trt.nptype = np.dtype
        trt.Runtime = lambda logger: SimpleNamespace(
            deserialize_cuda_engine=lambda data: self._deserialise(logger, bytes(data))
        )
        trt.TensorIOMode = SimpleNamespace(INPUT="in")
        if self.rtx:
            trt.DynamicShapesKernelSpecializationStrategy = SimpleNamespace(EAGER="eager")
        return trt

    def _deserialise(self, logger, data: bytes):
        engine = self.engines[data.decode()]
        if engine is None:
            logger.log(1, "bad magic number.\n")
            return None
        engine.logger = logger
        engine.cudart = self.cudart
        return engine

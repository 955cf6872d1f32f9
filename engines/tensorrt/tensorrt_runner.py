"""The runner of engines: TensorRT and cuda-python, nothing else.

A ``TensorRTRunner`` holds one stage or several in sequence. Several share one stream and one buffer
for each tensor name, so that an output of a stage is the input of the next one, on the device; and
all of them together are one CUDA graph. They share one block for their activations too.
"""

from __future__ import annotations

import math
import threading
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from hipa_deploy.bundle.manifest import StageSpec
from hipa_deploy.engines.tensorrt.buffers import ActivationBlock, Buffer, allocate, shares_memory
from hipa_deploy.engines.tensorrt.cuda import call, load_cudart
from hipa_deploy.engines.tensorrt.cuda_graph import CapturedGraph
from hipa_deploy.engines.tensorrt.device_array import DeviceArray
from hipa_deploy.engines.tensorrt.engine_stage import EngineStage, Shape
from hipa_deploy.engines.tensorrt.library import TensorRTLibrary, load_tensorrt
from hipa_deploy.engines.tensorrt.sequence_spec import sequence_spec
from hipa_deploy.errors import HipaError
from hipa_deploy.generate.runner import ClosesAtExit, Runner, check_inputs
from hipa_deploy.generate.stages import Timer


@dataclass
class _PreparedRun:
    """A choice of stages, made ready to run at the shapes of one feed.

    Args:
        stages: the stages, in the order in which they run.
        feed_shapes: the shapes of the feed that it was prepared for.
        shapes: the shape of every tensor, of the feed and computed.
        graph: the stages as one CUDA graph; None where they are put on the stream one by one.

    """

    stages: tuple[EngineStage, ...]
    feed_shapes: dict[str, Shape]
    shapes: dict[str, Shape]
    graph: CapturedGraph | None = None


class TensorRTRunner(ClosesAtExit):
    """Stages on the first GPU, with one stream, and one buffer a tensor for its largest shape.

    It is a ``Runner`` of its stages in sequence, and the ``Stages`` of a bundle
    (``hipa_deploy.generate``): ``run``, ``run_on_device``, ``runners`` and ``close``.

    The first call with new shapes runs the stages and then captures them as a CUDA graph, which
    this and every later call launches. Where the capture fails, a RuntimeWarning says why, the
    reason stands in ``graph_problem``, and calls put the stages on the stream one by one.

    The runner owns all device memory until ``close``. It copies what it is fed, and the arrays that
    it returns belong to the caller. Any thread may call it; calls at the same time wait for each
    other, as there is one set of buffers. Whoever opens it has compared the engines' keys
    (``engines.store.select.open_engines`` does).

    Args:
        stages: each stage's inputs and outputs, and its engine file, in the order they run in.
        library: the TensorRT library that built the engines.
        graph: False never captures a CUDA graph.
        barriers: by stage, outputs of its engine that nobody reads (``EngineStage``).

    Attributes:
        spec: the inputs and outputs of the stages together.
        runners: each stage by itself; it shares stream and buffers with the others.
        graph_problem: why there is no CUDA graph; None while nothing is wrong.
        device_memory_mib: device memory that loading and running took so far.
        activation_bytes: the size of the block that the stages' activations share: the most that
            one stage needs.

    Raises:
        MissingDependencyError: TensorRT or cuda-python is not installed.
        HipaError: no driver, no memory left, an engine that does not deserialise or whose tensors
            are not its spec's, or two stages that do not agree on a tensor they share.

    Example:
        >>> with TensorRTRunner([(spec, Path("unet.engine"))], "tensorrt") as unet:
        ...     latents_BCHW = unet(noise=noise_BCHW, context=context_BLD)["latents"]

    """

    def __init__(
        self,
        stages: Sequence[tuple[StageSpec, Path]],
        library: TensorRTLibrary,
        *,
        graph: bool = True,
        barriers: Mapping[str, tuple[str, ...]] | None = None,
    ) -> None:
        specs = [spec for spec, _ in stages]
        self.spec = sequence_spec(specs)
        self.graph_problem: str | None = None
        self._graph = graph
        self._trt = load_tensorrt(library)
        self._cudart = load_cudart(library)
        self._prepared: dict[tuple[str, ...], _PreparedRun] = {}  # by the names of its stages
        self._shapes: dict[str, Shape] = {}  # of every tensor, as the contexts have it
        self._ran: tuple[str, ...] = ()
        self._calls = 0
        # Buffers, contexts and graphs serve one call at a time. It is entered again within a call.
        self._one_call = threading.RLock()

        # ``stack`` releases everything in reverse order, also when a later step here fails.
        with ExitStack() as stack:
            self._stream = self._new_stream(stack)
            self._shared = shares_memory(self._cudart)
            self._free_bytes = call(self._cudart, "cudaMemGetInfo")  # before anything is allocated
            self._buffers = self._allocate(specs, stack)
            # Before the stages: the block goes when no context is left that has its address.
            self._activations = ActivationBlock(self._cudart)
            stack.callback(self._activations.free)
            self._stages = {}
            for spec, path in stages:
                unread = (barriers or {}).get(spec.name, ())
                self._stages[spec.name] = self._load(spec, path, unread, stack)
            self._place_activations()
            # One event before the first stage and one after each.
            self._events = [self._new_event(stack) for _ in range(len(stages) + 1)]
            self.device_memory_mib: int | None = self._used_mib()
            # ``Runner`` and not ``StageRunner``: the protocol ``Stages`` has it so.
            self.runners: dict[str, Runner] = {}
            for spec in specs:
                self.runners[spec.name] = StageRunner(self, spec)

            # Graphs go before the engines they hold, and only when nothing is under way.
            stack.callback(self._drop_graphs)
            stack.callback(self._wait)
            self._closing: ExitStack | None = stack.pop_all()

    def _new_stream(self, stack: ExitStack) -> Any:
        # Non-blocking: work on CUDA's default stream, another library's say, does not wait for it.
        flags = self._cudart.cudaStreamNonBlocking
        stream = call(self._cudart, "cudaStreamCreateWithFlags", flags)
        stack.callback(call, self._cudart, "cudaStreamDestroy", stream)
        return stream

    def _allocate(self, specs: Iterable[StageSpec], stack: ExitStack) -> dict[str, Buffer]:
        """A buffer for every tensor name, for the tensor's largest shape."""
        largest: dict[str, tuple[np.dtype, int]] = {}
        for spec in specs:
            for tensor in spec.inputs + spec.outputs:
                count = math.prod(tensor.at(spec.sizes("max")))
                largest[tensor.name] = np.dtype(tensor.dtype), count

        buffers = {}
        for name, (dtype, count) in largest.items():
            buffers[name] = allocate(self._cudart, dtype, count, self._shared, stack)
        return buffers

    def _load(
        self, spec: StageSpec, path: Path, barriers: tuple[str, ...], stack: ExitStack
    ) -> EngineStage:
        stage = EngineStage(self._trt, spec, path, barriers)
        stack.callback(stage.drop)
        # Nobody reads them, so they need no memory on the host.
        addresses = {}
        for name, size in stage.barrier_sizes().items():
            addresses[name] = call(self._cudart, "cudaMalloc", size)
            stack.callback(call, self._cudart, "cudaFree", addresses[name])
        stage.place_barriers(addresses)
        stage.bind(self._buffers)
        return stage

    def _place_activations(self) -> None:
        """Give every stage the same block for its activations.

        Nothing may run and no graph may exist meanwhile: both hold the block's address.
        """
        # Sharing is right because no two stages run at once. All are put on one stream, directly or
        # as one graph that was captured from it; the auxiliary streams that an engine may use join
        # that stream before the engine ends; and ``_one_call`` lets one call in at a time. What a
        # stage hands to the next lies in a buffer of its own, never in the block. Another runner
        # has another stream, and so another block.
        needed = max(stage.activation_bytes for stage in self._stages.values())
        self._activations.reserve(needed)
        for stage in self._stages.values():
            stage.place_activations(self._activations.address, self._activations.size)

    def _new_event(self, stack: ExitStack) -> object:
        event = call(self._cudart, "cudaEventCreate")
        stack.callback(call, self._cudart, "cudaEventDestroy", event)
        return event

    def __call__(self, **inputs: np.ndarray) -> dict[str, np.ndarray]:
        """Compute the outputs by name; the arrays belong to the caller.

        A stage whose outputs are all among ``inputs`` does not run.

        Raises:
            HipaError: inputs that are not those of the stages to run, a closed runner, or a CUDA
                error.

        """
        return self.run(inputs)

    def run(
        self,
        feed: Mapping[str, np.ndarray],
        outputs: Sequence[str] | None = None,
        timer: Timer = nullcontext,
        stages: Sequence[str] | None = None,
    ) -> dict[str, np.ndarray]:
        """Like a call, with a choice of outputs and stages; see ``Stages.run``.

        Args:
            feed: the inputs by name, with the dtypes and shapes of the stages to run.
            outputs: names of tensors that these stages compute; None: those that none of them uses.
            timer: is entered once, as 'pipeline': the host cannot see what happens between the
                stages on the device.
            stages: names of the stages to run; None: all but those whose outputs are in ``feed``.

        Raises:
            HipaError: as a call does.

        """
        with self._one_call, timer("pipeline"):
            prepared = self._submit(feed, stages)
            names = self._outputs(prepared) if outputs is None else outputs
            for name in names:
                self._copy_to_host(name, prepared.shapes[name])
            self._wait()

            # The next call overwrites the buffers, so the caller gets copies.
            results = {}
            for name in names:
                results[name] = self._buffers[name].view(prepared.shapes[name]).copy()
            return results

    def run_on_device(self, feed: Mapping[str, np.ndarray]) -> dict[str, DeviceArray]:
        """Like a call, but the outputs stay on the device and may still be under way.

        They are valid until the next call or ``close``; see ``DeviceArray``.

        Raises:
            HipaError: as a call does.

        """
        with self._one_call:
            prepared = self._submit(feed, None)
            this_call = self._calls

            def current() -> bool:
                return self._closing is not None and self._calls == this_call

            arrays = {}
            for name in self._outputs(prepared):
                buffer = self._buffers[name]
                arrays[name] = DeviceArray(
                    pointer=int(buffer.device),
                    shape=prepared.shapes[name],
                    dtype=buffer.host.dtype,
                    stream=int(self._stream),
                    wait=self._wait,
                    current=current,
                )
            return arrays

    def change_engine(
        self, change: Callable[[ModuleType, Any], None], stage: str | None = None
    ) -> None:
        """Call ``change(trt, engine)``, which may alter the engine, while nothing runs on it.

        Graphs are captured anew at the next call: they may hold what the engine was.

        Args:
            change: receives the module of TensorRT and the engine.
            stage: whose engine; None: the first stage's.

        Raises:
            HipaError: a closed runner, what ``change`` raises, or no memory for what the changed
                engine needs: then the runner is closed.

        """
        with self._one_call:
            if self._closing is None:
                raise HipaError(f"{self.spec.name}: the runner is closed.")
            # TensorRT allows no change while a context of the engine runs.
            self._wait()
            self._drop_graphs()
            self._stages[stage or next(iter(self._stages))].change(change)
            # A changed engine may need more than the one that was loaded.
            try:
                self._place_activations()
            except BaseException:
                self.close()  # the contexts have the address of a block that is gone
                raise

    def look_at_engine(
        self, look: Callable[[ModuleType, Any], None], stage: str | None = None
    ) -> None:
        """Call ``look(trt, engine)``, which reads properties of the engine and alters nothing.

        Unlike with ``change_engine``, graphs and the activations' block stay as they are.

        Args:
            look: receives the module of TensorRT and the engine.
            stage: whose engine; None: the first stage's.

        Raises:
            HipaError: a closed runner, or what ``look`` raises.

        """
        with self._one_call:
            if self._closing is None:
                raise HipaError(f"{self.spec.name}: the runner is closed.")
            self._stages[stage or next(iter(self._stages))].change(look)

    @property
    def activation_bytes(self) -> int:
        """Bytes of the block in which all stages hold their activations, one after the other."""
        return self._activations.size

    @property
    def device_ms(self) -> float | None:
        """Milliseconds that the latest call took on the device, without the copies to and from it.

        None before the first call.
        """
        with self._one_call:
            return self._elapsed(0, len(self._ran)) if self._ran else None

    def stage_ms(self, name: str) -> float | None:
        """The milliseconds of one stage; None if the latest call did not run it."""
        with self._one_call:
            if name not in self._ran:
                return None
            number = self._ran.index(name)
            return self._elapsed(number, number + 1)

    def profile_layers(self, **inputs: np.ndarray) -> list[tuple[str, float]]:
        """Milliseconds of every layer, ('stage/layer', ms), in a pass without a CUDA graph.

        Raises:
            HipaError: as a call does, or no second execution context.

        """
        times = self.profile(inputs)
        return [(f"{stage}/{layer_name}", ms) for stage, layer_name, ms in times]

    def profile(
        self, feed: Mapping[str, np.ndarray], stages: Sequence[str] | None = None
    ) -> list[tuple[str, str, float]]:
        """Like ``profile_layers``, as (stage, layer, ms), with a choice of the stages to run."""
        with self._one_call:
            # A whole run first: then every stage's inputs are in its buffers.
            prepared = self._submit(feed, stages)
            self._wait()
            times = []
            for stage in prepared.stages:
                shapes = dict(prepared.shapes)
                for layer_name, ms in stage.profile(self._stream, self._buffers, shapes):
                    times.append((stage.spec.name, layer_name, ms))
            self._wait()
            return times

    def _submit(self, feed: Mapping[str, np.ndarray], names: Sequence[str] | None) -> _PreparedRun:
        """Check the feed, copy it in and launch the stages. Returns while the device works."""
        if self._closing is None:
            raise HipaError(f"{self.spec.name}: the runner is closed.")
        # Checked before anything reaches CUDA: a wrong feed leaves the runner as it was.
        chosen = self._choose(feed) if names is None else tuple(names)
        spec = sequence_spec([self._stages[name].spec for name in chosen])
        if names is None:
            feed = self._needed(feed, chosen, spec)
        check_inputs(spec, feed)

        # An earlier call whose outputs stay on the device may still read the buffers written here.
        self._wait()
        self._calls += 1
        for name, value in feed.items():
            self._buffers[name].view(value.shape)[...] = value
            self._copy_to_device(name, value.shape)

        prepared = self._prepare(chosen, {name: value.shape for name, value in feed.items()})
        if prepared.graph is not None:
            prepared.graph.launch(self._stream)
        else:
            self._enqueue(prepared.stages, self._cudart.cudaEventRecordDefault)
        self._ran = chosen
        return prepared

    def _choose(self, feed: Mapping[str, np.ndarray]) -> tuple[str, ...]:
        """The stages to run: all but those whose outputs are all in the feed."""
        chosen = []
        for name, stage in self._stages.items():
            if not all(tensor.name in feed for tensor in stage.spec.outputs):
                chosen.append(name)
        return tuple(chosen)

    def _needed(
        self, feed: Mapping[str, np.ndarray], chosen: Sequence[str], spec: StageSpec
    ) -> dict[str, np.ndarray]:
        """``feed`` without what only kept a stage from running, and no other stage takes."""
        taken = {tensor.name for tensor in spec.inputs}
        kept = dict(feed)
        for name, stage in self._stages.items():
            if name in chosen:
                continue
            for tensor in stage.spec.outputs:
                if tensor.name not in taken:
                    kept.pop(tensor.name, None)
        return kept

    def _prepare(self, names: tuple[str, ...], feed_shapes: dict[str, Shape]) -> _PreparedRun:
        """Make these stages ready for these shapes: set the shapes, warm up, capture.

        What an earlier call prepared serves again while the shapes stay the same.
        """
        known = self._prepared.get(names)
        if known is not None and known.feed_shapes == feed_shapes:
            return known

        stages = tuple(self._stages[name] for name in names)
        prepared = _PreparedRun(stages, feed_shapes, shapes=dict(feed_shapes))
        before = dict(self._shapes)
        try:
            for stage in stages:
                stage.set_shapes(prepared.shapes)
        except BaseException:
            self._drop_graphs()
            raise
        # A context has one set of shapes, and every graph was captured with it. What one stage
        # hands to the next counts too: a stage that ran alone was fed with it.
        if any(before.get(name, shape) != shape for name, shape in prepared.shapes.items()):
            self._drop_graphs()
        self._shapes.update(prepared.shapes)
        if self._graph and self.graph_problem is None:
            self._capture(prepared)
        self._prepared[names] = prepared
        # TensorRT's deferred set-up and the graph take memory too.
        self.device_memory_mib = max(self.device_memory_mib or 0, self._used_mib())
        return prepared

    def _capture(self, prepared: _PreparedRun) -> None:
        """Run the stages once, then capture them; a RuntimeWarning where that fails."""
        # TensorRT defers set-up to the first run with new shapes, and set-up cannot be captured.
        self._enqueue(prepared.stages, self._cudart.cudaEventRecordDefault)
        self._wait()

        # An external event is a node of the graph that stamps the time at every launch.
        external = self._cudart.cudaEventRecordExternal
        try:
            for stage in prepared.stages:
                stage.check_capturable(self._stream)
            prepared.graph = CapturedGraph(
                self._cudart, self._stream, lambda: self._enqueue(prepared.stages, external)
            )
        except HipaError as error:
            # CUDA keeps its last error until it is read: TensorRT's next launch would find it.
            self._cudart.cudaGetLastError()
            self.graph_problem = str(error).rstrip(".")
            warnings.warn(
                f"{self.spec.name}: no CUDA graph ({self.graph_problem}); "
                "the stages run one by one, which costs some launch time.",
                RuntimeWarning,
                stacklevel=2,
            )

    def _enqueue(self, stages: Sequence[EngineStage], record: int) -> None:
        """Put every stage on the stream, with an event before the first and after each."""
        call(self._cudart, "cudaEventRecordWithFlags", self._events[0], self._stream, record)
        # There may be fewer stages than events: those that a call leaves out.
        for event, stage in zip(self._events[1:], stages, strict=False):
            stage.enqueue(self._stream)
            call(self._cudart, "cudaEventRecordWithFlags", event, self._stream, record)

    def _elapsed(self, first: int, last: int) -> float:
        """Milliseconds between two events."""
        start = self._events[first]
        end = self._events[last]
        call(self._cudart, "cudaEventSynchronize", end)
        return float(call(self._cudart, "cudaEventElapsedTime", start, end))

    def _outputs(self, prepared: _PreparedRun) -> list[str]:
        """The tensors that these stages compute and none of them uses."""
        spec = sequence_spec([stage.spec for stage in prepared.stages])
        return [tensor.name for tensor in spec.outputs]

    def _copy_to_device(self, name: str, shape: Shape) -> None:
        buffer = self._buffers[name]
        if not buffer.shared:
            kind = self._cudart.cudaMemcpyKind.cudaMemcpyHostToDevice
            self._copy(buffer.device, buffer.host.ctypes.data, buffer.view(shape).nbytes, kind)

    def _copy_to_host(self, name: str, shape: Shape) -> None:
        buffer = self._buffers[name]
        if not buffer.shared:
            kind = self._cudart.cudaMemcpyKind.cudaMemcpyDeviceToHost
            self._copy(buffer.host.ctypes.data, buffer.device, buffer.view(shape).nbytes, kind)

    def _copy(self, destination: int, source: int, size: int, kind: Any) -> None:
        """Put a copy of ``size`` bytes on the stream. From page-locked memory it does not block."""
        call(self._cudart, "cudaMemcpyAsync", destination, source, size, kind, self._stream)

    def _wait(self) -> None:
        call(self._cudart, "cudaStreamSynchronize", self._stream)

    def _used_mib(self) -> int:
        """MiB of device memory taken since before loading.

        CUDA counts the whole device: what other processes take meanwhile is included.
        """
        return max(0, self._free_bytes - call(self._cudart, "cudaMemGetInfo")) >> 20

    def _drop_graphs(self) -> None:
        self._shapes = {}
        # One by one: if CUDA fails at one, the next attempt does not release it twice.
        while self._prepared:
            _, prepared = self._prepared.popitem()
            if prepared.graph is not None:
                prepared.graph.close()

    def close(self) -> None:
        """Release graphs, engines, memory and the stream, in that order.

        Calling it twice is harmless.
        """
        with self._one_call:
            closing = self._closing
            self._closing = None
            if closing is not None:
                self._ran = ()
                closing.close()


class StageRunner(ClosesAtExit):
    """One stage of a ``TensorRTRunner``, called by itself: host arrays in and out.

    It owns nothing: ``close`` closes the whole runner.
    """

    def __init__(self, owner: TensorRTRunner, spec: StageSpec) -> None:
        self.spec = spec
        self._owner = owner

    def __call__(self, **inputs: np.ndarray) -> dict[str, np.ndarray]:
        """Compute the stage's outputs by name; the arrays belong to the caller.

        Raises:
            HipaError: as a call of the whole does.

        """
        return self._owner.run(inputs, stages=(self.spec.name,))

    def change_engine(self, change: Callable[[ModuleType, Any], None]) -> None:
        """Alter this stage's engine; see ``TensorRTRunner.change_engine``."""
        self._owner.change_engine(change, self.spec.name)

    def look_at_engine(self, look: Callable[[ModuleType, Any], None]) -> None:
        """Look at this stage's engine; see ``TensorRTRunner.look_at_engine``."""
        self._owner.look_at_engine(look, self.spec.name)

    @property
    def device_ms(self) -> float | None:
        """Milliseconds of this stage on the device in the runner's latest call.

        None if that call did not run this stage.
        """
        return self._owner.stage_ms(self.spec.name)

    @property
    def device_memory_mib(self) -> int | None:
        """Device memory of all stages together: they share buffers."""
        return self._owner.device_memory_mib

    def profile_layers(self, **inputs: np.ndarray) -> list[tuple[str, float]]:
        """Milliseconds of every layer, (layer, ms), in a separate pass without a CUDA graph."""
        times = self._owner.profile(inputs, (self.spec.name,))
        return [(layer_name, ms) for _, layer_name, ms in times]

    def close(self) -> None:
        """Close the runner that this stage belongs to."""
        self._owner.close()

"""Running engines: TensorRT and cuda-python, nothing else.

``TensorRTRunner`` is one stage or several in sequence. Several share one stream and one buffer a tensor name, so what
a stage gives is what the next one takes, on the device; and the whole is one CUDA graph.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Any

import numpy as np

from hipa_deploy.bundle.manifest import StageSpec, TensorSpec
from hipa_deploy.engines.tensorrt.buffers import Buffer, allocate, shares_memory
from hipa_deploy.engines.tensorrt.cuda import call, load_cudart
from hipa_deploy.engines.tensorrt.cuda_graph import CapturedGraph
from hipa_deploy.engines.tensorrt.device_array import DeviceArray
from hipa_deploy.engines.tensorrt.engine_stage import EngineStage, Shape
from hipa_deploy.engines.tensorrt.library import TensorRTLibrary, load_tensorrt
from hipa_deploy.errors import HipaError
from hipa_deploy.generate.runner import Runner, check_inputs
from hipa_deploy.generate.stages import Timer


@dataclass
class _Plan:
    """Stages to run, the inputs' shapes it was made for, every tensor's shape, and the graph (None: not captured)."""

    stages: tuple[EngineStage, ...]
    asked: dict[str, Shape]
    shapes: dict[str, Shape]
    graph: CapturedGraph | None = None


class TensorRTRunner:
    """Stages on the first GPU, in their order, with one stream and buffers for the largest shapes.

    The first call with new shapes runs the stages, then captures them as a CUDA graph that this and every later call
    launches. A capture that fails is a RuntimeWarning and stands in ``graph_problem``; calls then enqueue the stages
    one by one. Not for use from two threads at once. The caller has compared the engines' keys
    (``engine.open_engines`` does).

    Raises:
        MissingDependencyError: TensorRT or cuda-python is not installed.
        HipaError: no driver, no memory left, an engine that does not deserialise or whose tensors are not its
            spec's, or two stages that do not agree on a tensor they share.

    """

    def __init__(
        self,
        stages: Sequence[tuple[StageSpec, Path]],
        library: TensorRTLibrary,
        *,
        graph: bool = True,
    ) -> None:
        self.spec = sequence_spec([spec for spec, _ in stages])
        self.graph_problem: str | None = None
        self._graph = graph
        self._trt, self._cudart = load_tensorrt(library), load_cudart(library)
        self._plans: dict[tuple[str, ...], _Plan] = {}
        self._shapes: dict[str, Shape] = {}  # of every tensor, as the contexts have it
        self._ran: tuple[str, ...] = ()
        self._calls = 0
        with ExitStack() as stack:
            self._stream = call(
                self._cudart, "cudaStreamCreateWithFlags", self._cudart.cudaStreamNonBlocking
            )
            stack.callback(call, self._cudart, "cudaStreamDestroy", self._stream)
            self._shared = shares_memory(self._cudart)
            self._free_bytes = call(self._cudart, "cudaMemGetInfo")
            self._buffers = self._allocate([spec for spec, _ in stages], stack)
            self._stages = {spec.name: self._load(spec, path, stack) for spec, path in stages}
            self._events = [self._event(stack) for _ in range(len(stages) + 1)]
            self.device_memory_mib: int | None = self._used_mib()
            self.runners: dict[str, Runner] = {
                name: StageRunner(self, stage.spec) for name, stage in self._stages.items()
            }
            stack.callback(self._drop_graphs)
            stack.callback(self._wait)
            self._closing: ExitStack | None = stack.pop_all()

    def _allocate(self, specs: Iterable[StageSpec], stack: ExitStack) -> dict[str, Buffer]:
        """A buffer for every tensor name."""
        largest: dict[str, tuple[np.dtype, int]] = {}
        for spec in specs:
            for tensor in spec.inputs + spec.outputs:
                count = math.prod(tensor.at(spec.sizes("max")))
                largest[tensor.name] = np.dtype(tensor.dtype), count
        return {
            name: allocate(self._cudart, dtype, count, self._shared, stack)
            for name, (dtype, count) in largest.items()
        }

    def _load(self, spec: StageSpec, path: Path, stack: ExitStack) -> EngineStage:
        stage = EngineStage(self._trt, spec, path)
        stack.callback(stage.drop)
        stage.bind(self._buffers)
        return stage

    def _event(self, stack: ExitStack) -> object:
        event = call(self._cudart, "cudaEventCreate")
        stack.callback(call, self._cudart, "cudaEventDestroy", event)
        return event

    def __call__(self, **inputs: np.ndarray) -> dict[str, np.ndarray]:
        """Compute the outputs by name; the arrays belong to the caller. A stage whose output is given is left out.

        Raises:
            HipaError: inputs that are not those of the stages to run, a closed runner, or a CUDA error.

        """
        return self.run(inputs)

    def run(
        self,
        feed: Mapping[str, np.ndarray],
        outputs: Sequence[str] | None = None,
        timer: Timer = nullcontext,
        stages: Sequence[str] | None = None,
    ) -> dict[str, np.ndarray]:
        """The same, with the choice of ``outputs`` (any that is computed) and of the ``stages`` to run.

        It is timed as one, 'pipeline': the host sees nothing of what lies between the stages.
        """
        with timer("pipeline"):
            plan = self._submit(feed, stages)
            wanted = self._outputs(plan) if outputs is None else outputs
            for name in wanted:
                self._copy(name, plan.shapes[name], "cudaMemcpyDeviceToHost")
            self._wait()
            return {name: self._buffers[name].view(plan.shapes[name]).copy() for name in wanted}

    def run_on_device(self, feed: Mapping[str, np.ndarray]) -> dict[str, DeviceArray]:
        """Like a call, but the outputs stay on the device and may still be under way. See ``DeviceArray``."""
        plan = self._submit(feed, None)
        made = self._calls
        return {
            name: DeviceArray(
                pointer=int(self._buffers[name].device),
                shape=plan.shapes[name],
                dtype=self._buffers[name].host.dtype,
                stream=int(self._stream),
                wait=self._wait,
                current=lambda: self._closing is not None and self._calls == made,
            )
            for name in self._outputs(plan)
        }

    def stage(self, name: str) -> StageRunner:
        """One stage alone, as a runner; it shares stream and buffers with the others."""
        return StageRunner(self, self._stages[name].spec)

    def change_engine(
        self, change: Callable[[ModuleType, Any], None], stage: str | None = None
    ) -> None:
        """Let ``change`` alter the engine of ``stage`` (or the first), given TensorRT and it, while nothing runs on it.

        Graphs are captured anew at the next call: they may hold what the engine was.

        Raises:
            HipaError: a closed runner, or what ``change`` raises.

        """
        if self._closing is None:
            raise HipaError(f"{self.spec.name}: the runner is closed.")
        self._wait()
        self._drop_graphs()
        self._stages[stage or next(iter(self._stages))].change(change)

    @property
    def device_ms(self) -> float | None:
        """Milliseconds that the latest call took on the device, copies not included; None before the first."""
        return self._elapsed(0, len(self._ran)) if self._ran else None

    def stage_ms(self, name: str) -> float | None:
        """The same of one stage; None if the latest call did not run it."""
        if name not in self._ran:
            return None
        number = self._ran.index(name)
        return self._elapsed(number, number + 1)

    def profile_layers(self, **inputs: np.ndarray) -> list[tuple[str, float]]:
        """Milliseconds of every layer, ('stage/layer', ms), in a separate pass without a CUDA graph.

        Raises:
            HipaError: as a call does, or no memory for a second execution context.

        """
        return [(f"{stage}/{layer}", ms) for stage, layer, ms in self.profile(inputs)]

    def profile(
        self, inputs: dict[str, np.ndarray], stages: Sequence[str] | None = None
    ) -> list[tuple[str, str, float]]:
        """The same as (stage, layer, ms), with the choice of the ``stages`` to run."""
        plan = self._submit(inputs, stages)
        self._wait()
        found = [
            (stage.spec.name, layer, ms)
            for stage in plan.stages
            for layer, ms in stage.profile(self._stream, self._buffers, dict(plan.shapes))
        ]
        self._wait()
        return found

    def _submit(self, inputs: Mapping[str, np.ndarray], names: Sequence[str] | None) -> _Plan:
        """Check, copy in, launch. Returns while the device works."""
        if self._closing is None:
            raise HipaError(f"{self.spec.name}: the runner is closed.")
        chosen = self._choose(inputs) if names is None else tuple(names)
        check_inputs(sequence_spec([self._stages[name].spec for name in chosen]), inputs)
        self._wait()  # an earlier call whose outputs stay on the device may still read what we write now
        self._calls += 1
        for name, value in inputs.items():
            self._buffers[name].view(value.shape)[...] = value
            self._copy(name, value.shape, "cudaMemcpyHostToDevice")
        plan = self._plan(chosen, {name: value.shape for name, value in inputs.items()})
        if plan.graph is not None:
            plan.graph.launch(self._stream)
        else:
            self._enqueue(plan.stages, self._cudart.cudaEventRecordDefault)
        self._ran = chosen
        return plan

    def _choose(self, inputs: Mapping[str, np.ndarray]) -> tuple[str, ...]:
        """The stages to run: all but those whose outputs are given."""
        return tuple(
            name
            for name, stage in self._stages.items()
            if not all(tensor.name in inputs for tensor in stage.spec.outputs)
        )

    def _plan(self, names: tuple[str, ...], asked: dict[str, Shape]) -> _Plan:
        """The plan for these stages and shapes; made, warmed up and captured if it is new."""
        known = self._plans.get(names)
        if known is not None and known.asked == asked:
            return known
        if any(self._shapes.get(name, shape) != shape for name, shape in asked.items()):
            self._drop_graphs()  # a context has one set of shapes, and its graphs stand on it
        plan = _Plan(tuple(self._stages[name] for name in names), asked, dict(asked))
        for stage in plan.stages:
            stage.set_shapes(plan.shapes)
        self._shapes.update(plan.shapes)
        if self._graph and self.graph_problem is None:
            self._capture(plan)
        self._plans[names] = plan
        self.device_memory_mib = max(self.device_memory_mib or 0, self._used_mib())
        return plan

    def _capture(self, plan: _Plan) -> None:
        """Run once, as TensorRT defers set-up to the first run with new shapes, then capture; or say why not."""
        self._enqueue(plan.stages, self._cudart.cudaEventRecordDefault)
        self._wait()
        external = (
            self._cudart.cudaEventRecordExternal
        )  # in a graph: a node that stamps the time at every launch
        try:
            for stage in plan.stages:
                stage.check_capturable(self._stream)
            plan.graph = CapturedGraph(
                self._cudart, self._stream, lambda: self._enqueue(plan.stages, external)
            )
        except HipaError as error:
            self._cudart.cudaGetLastError()  # takes the error off: or TensorRT's next launch finds it there
            self.graph_problem = str(error).rstrip(".")
            told = f"no CUDA graph ({self.graph_problem}); the stages run one by one, which costs some launch time."
            warnings.warn(f"{self.spec.name}: {told}", RuntimeWarning, stacklevel=2)

    def _enqueue(self, stages: Sequence[EngineStage], record: int) -> None:
        """Put every stage on the stream, with an event before the first and after each."""
        call(self._cudart, "cudaEventRecordWithFlags", self._events[0], self._stream, record)
        for event, stage in zip(self._events[1:], stages, strict=False):
            stage.enqueue(self._stream)
            call(self._cudart, "cudaEventRecordWithFlags", event, self._stream, record)

    def _elapsed(self, first: int, last: int) -> float:
        call(self._cudart, "cudaEventSynchronize", self._events[last])
        return float(
            call(self._cudart, "cudaEventElapsedTime", self._events[first], self._events[last])
        )

    def _outputs(self, plan: _Plan) -> list[str]:
        return [
            tensor.name for tensor in sequence_spec([stage.spec for stage in plan.stages]).outputs
        ]

    def _copy(self, name: str, shape: Shape, kind: str) -> None:
        buffer = self._buffers[name]
        if buffer.shared:
            return
        pinned, size = buffer.host.ctypes.data, buffer.view(shape).nbytes
        ends = (
            (buffer.device, pinned) if kind == "cudaMemcpyHostToDevice" else (pinned, buffer.device)
        )
        call(
            self._cudart,
            "cudaMemcpyAsync",
            *ends,
            size,
            getattr(self._cudart.cudaMemcpyKind, kind),
            self._stream,
        )

    def _wait(self) -> None:
        call(self._cudart, "cudaStreamSynchronize", self._stream)

    def _used_mib(self) -> int:
        """MiB of device memory taken since before loading. Of the whole device: what others take meanwhile counts."""
        return max(0, self._free_bytes - call(self._cudart, "cudaMemGetInfo")) >> 20

    def _drop_graphs(self) -> None:
        self._shapes = {}
        while self._plans:
            _, plan = self._plans.popitem()
            if plan.graph is not None:
                plan.graph.close()

    def close(self) -> None:
        """Release graphs, engines, memory and the stream, in that order. Calling it twice is harmless."""
        closing, self._closing = self._closing, None
        if closing is not None:
            self._ran = ()
            closing.close()

    def __enter__(self) -> TensorRTRunner:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


class StageRunner:
    """One stage of a ``TensorRTRunner``, called by itself: host arrays in and out. ``close`` closes the whole."""

    def __init__(self, owner: TensorRTRunner, spec: StageSpec) -> None:
        self.spec = spec
        self._owner = owner

    def __call__(self, **inputs: np.ndarray) -> dict[str, np.ndarray]:
        """Compute the stage's outputs by name.

        Raises:
            HipaError: as the whole does.

        """
        return self._owner.run(inputs, stages=(self.spec.name,))

    def change_engine(self, change: Callable[[ModuleType, Any], None]) -> None:
        """Let ``change`` alter this stage's engine, as ``TensorRTRunner.change_engine`` does."""
        self._owner.change_engine(change, self.spec.name)

    @property
    def device_ms(self) -> float | None:
        """Milliseconds on the device in the latest call of the whole or of this stage; None if it did not run."""
        return self._owner.stage_ms(self.spec.name)

    @property
    def device_memory_mib(self) -> int | None:
        """Device memory of all stages together: they share buffers."""
        return self._owner.device_memory_mib

    def profile_layers(self, **inputs: np.ndarray) -> list[tuple[str, float]]:
        """Milliseconds of every layer, (layer, ms), in a separate pass without a CUDA graph."""
        return [(layer, ms) for _, layer, ms in self._owner.profile(inputs, (self.spec.name,))]

    def close(self) -> None:
        """Close the runner that this stage belongs to."""
        self._owner.close()

    def __enter__(self) -> StageRunner:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def sequence_spec(specs: Sequence[StageSpec]) -> StageSpec:
    """What goes into stages that run in this order, and what comes out of them at the end.

    Raises:
        HipaError: two stages give the tensor they share another dtype or shape.

    """
    made: dict[str, TensorSpec] = {}
    inputs: dict[str, TensorSpec] = {}
    used: set[str] = set()
    for spec in specs:
        for tensor in spec.inputs:
            known = made.get(tensor.name) or inputs.setdefault(tensor.name, tensor)
            if known != tensor:
                got, want = (f"{t.dtype} {list(t.shape)}" for t in (tensor, known))
                raise HipaError(
                    f"{spec.name}: {tensor.name} is {got}, before it {want}. Export the bundle again."
                )
            used.add(tensor.name)
        made.update({tensor.name: tensor for tensor in spec.outputs})
    return StageSpec(
        name="+".join(spec.name for spec in specs),
        inputs=tuple(inputs.values()),
        outputs=tuple(tensor for name, tensor in made.items() if name not in used),
        axes={name: axis for spec in specs for name, axis in spec.axes.items()},
    )

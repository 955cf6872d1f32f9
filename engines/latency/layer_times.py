"""The time of each layer of a stage, measured by the profiler of the backend.

Layers are profiled in runs of their own, apart from the measured latency, because profiling slows a
stage.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.table import Table

from hipa_deploy.bundle.folder import Bundle
from hipa_deploy.disk.files import temporary_folder
from hipa_deploy.errors import HipaError
from hipa_deploy.generate.pipeline import OneStepPipeline
from hipa_deploy.generate.stages import stage_feed
from hipa_deploy.images.example_source import example_source
from hipa_deploy.record import Record

RUNS = 10
ROWS = 15  # how many layers a table shows

Inputs = dict[str, np.ndarray]


class _Layer(NamedTuple):
    """A layer as a profiler reports it."""

    name: str
    op: str | None
    ms: float


class LayerTime(Record):
    """The time of a layer: the mean of ``RUNS`` runs, after one that does not count.

    Attributes:
        name: the name that the backend gives it.
        op: its operator, such as 'Conv'; None if the profiler names none.
        ms: milliseconds.
        percent: its share of the time of all layers of the stage.

    """

    name: str
    op: str | None
    ms: float
    percent: float


def profile_layers(pipeline: OneStepPipeline, prompt: str) -> dict[str, tuple[LayerTime, ...]]:
    """Profile every stage of ``pipeline`` layer by layer.

    A TensorRT runner profiles itself: its ``profile_layers(**inputs)`` returns pairs of name and
    milliseconds. For ONNX Runtime on the CPU a second session, with its profiler on, is opened
    beside the runner.

    Returns:
        By stage, its layers, the slowest first.

    Raises:
        HipaError: the profiler of the backend does not time the device.

    """
    # ONNX Runtime's profiler times the host, which is right on the CPU alone: on a GPU it would
    # show when kernels are launched, and not how long they take.
    profilers = {}
    for name, runner in pipeline.runners.items():
        profilers[name] = getattr(runner, "profile_layers", None)
    if None in profilers.values() and pipeline.backend != "onnxruntime":
        raise HipaError(
            f"backend {pipeline.backend} has no profiler of layers that times the device. "
            "Expected tensorrt, rtx or onnxruntime."
        )

    found = {}
    for stage, inputs in stage_inputs(pipeline, prompt).items():
        profile = profilers[stage]
        if profile is None:
            layers = _onnxruntime_layers(pipeline.bundle, stage, inputs)
        else:
            # The first run pays for allocations, so it does not count.
            runs = [profile(**inputs) for _ in range(1 + RUNS)]
            layers = _mean_layers(runs[1:])
        found[stage] = _ranked(layers)
    return found


def stage_inputs(pipeline: OneStepPipeline, prompt: str) -> dict[str, Inputs]:
    """The feed of every stage for one batch of ``prompt``, in the order in which the stages run.

    A prompt that is too long is cut.

    Returns:
        By stage, arrays by the name of the input, with the shapes and dtypes of the bundle.

    """
    manifest = pipeline.bundle.manifest
    source = example_source(pipeline.bundle)
    tensors = pipeline.tensors(prompt, source=source, seed=0, count=manifest.batch, truncate=True)

    feeds = {}
    for name, runner in pipeline.runners.items():
        feeds[name] = stage_feed(runner.spec, tensors, manifest.layout)
    return feeds


def _mean_layers(runs: Sequence[Sequence[tuple[str, float]]]) -> list[_Layer]:
    """The mean time of each layer over ``runs``, each a list of pairs of name and milliseconds.

    Layers are matched by their position, because TensorRT may give two of them the same name.
    """
    ms_by_run = []
    for run in runs:
        ms_by_run.append([ms for _, ms in run])
    mean_ms = np.mean(ms_by_run, axis=0)
    return [_Layer(name, None, float(ms)) for (name, _), ms in zip(runs[0], mean_ms, strict=True)]


def _onnxruntime_layers(bundle: Bundle, stage: str, inputs: Inputs) -> list[_Layer]:
    """The nodes of the optimised graph, from the trace that ONNX Runtime writes.

    On the CPU the time of a node in the trace is its own.
    https://onnxruntime.ai/docs/performance/tune-performance/profiling-tools.html
    """
    onnxruntime = importlib.import_module("onnxruntime")
    with temporary_folder("hipa-profile") as folder:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        # As in the runner, so that the same kernels are timed.
        options.use_deterministic_compute = True
        options.enable_profiling = True
        options.profile_file_prefix = str(folder / stage)
        session = onnxruntime.InferenceSession(
            str(bundle.stage_path(stage)), options, providers=["CPUExecutionProvider"]
        )
        for _ in range(1 + RUNS):
            session.run(None, inputs)
        events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
    return node_times(events)


def node_times(events: list[dict[str, Any]]) -> list[_Layer]:
    """The mean time of each node from the kernel events of a trace, without its first run."""
    times: dict[str, list[float]] = {}
    ops: dict[str, str | None] = {}
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            name = event["name"].removesuffix("_kernel_time")
            # The trace has microseconds.
            times.setdefault(name, []).append(event["dur"] / 1e3)
            ops[name] = event["args"].get("op_name")

    layers = []
    for name, ms in times.items():
        # The first run does not count, so a node that ran once has no time.
        if len(ms) > 1:
            layers.append(_Layer(name, ops[name], float(np.mean(ms[1:]))))
    return layers


def _ranked(layers: Sequence[tuple[str, str | None, float]]) -> tuple[LayerTime, ...]:
    """The layers with their shares, the slowest first."""
    # 1 if no layer took any time: the shares are then 0, not undefined.
    total_ms = sum(ms for _, _, ms in layers) or 1.0
    ranked = []
    for name, op, ms in sorted(layers, key=lambda layer: -layer[2]):
        ranked.append(LayerTime(name=name, op=op, ms=ms, percent=100 * ms / total_ms))
    return tuple(ranked)


def by_op(layers: Sequence[LayerTime]) -> dict[str, float]:
    """The percentage of the time by operator, largest first; empty if no operator is named."""
    found: dict[str, float] = {}
    for layer in layers:
        if layer.op is not None:
            found[layer.op] = found.get(layer.op, 0.0) + layer.percent
    return dict(sorted(found.items(), key=lambda pair: -pair[1]))


def op_text(layers: Sequence[LayerTime], most: int = 6) -> str:
    """The ``most`` largest operators as text, such as 'Conv 40 %, Gemm 12 %'."""
    largest = list(by_op(layers).items())[:most]
    return ", ".join(f"{op} {percent:.0f} %" for op, percent in largest)


def layer_cells(layer: LayerTime) -> tuple[str, str, str, str]:
    """A layer as a row of a table: its name, operator, milliseconds and percentage."""
    return (layer.name, layer.op or "-", f"{layer.ms:.3f}", f"{layer.percent:.1f}")


def render_layers(stage: str, layers: Sequence[LayerTime], rows: int = ROWS) -> Table:
    """Make a table for a terminal: the ``rows`` slowest layers, and one row for all others."""
    title = f"Layers of {stage}: their own profiler, {RUNS} runs apart from the latency above"
    caption = "Profiling slows a stage: read the shares, not the sums."
    operators = op_text(layers)
    if operators:
        caption += f"\n{operators}"
    table = Table(title=title, caption=caption, caption_justify="left")
    for heading in ("layer", "op"):
        table.add_column(heading, justify="left")
    for heading in ("ms", "%"):
        table.add_column(heading, justify="right")

    for layer in layers[:rows]:
        table.add_row(*layer_cells(layer))
    others = layers[rows:]
    if others:
        ms = sum(layer.ms for layer in others)
        percent = sum(layer.percent for layer in others)
        table.add_row(f"{len(others)} more", "", f"{ms:.3f}", f"{percent:.1f}", style="dim")
    return table

"""Where a stage's time goes, layer by layer, from the backend's own profiler.

This is a pass of its own, since profiling slows a stage.
"""

from __future__ import annotations

import importlib
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from hipa_deploy.bundle.folder import Bundle
from hipa_deploy.errors import HipaError
from hipa_deploy.generate.pipeline import OneStepPipeline
from hipa_deploy.generate.stages import stage_feed
from hipa_deploy.images.example_source import example_source
from hipa_deploy.record import Record

RUNS = 10
ROWS = 15

Inputs = dict[str, np.ndarray]


class LayerTime(Record):
    """The time of a layer: the mean of ``RUNS`` runs, after one that does not count.

    ``op`` is None where the profiler names no operator.
    """

    name: str
    op: str | None
    ms: float
    percent: float


def profile_layers(pipeline: OneStepPipeline, prompt: str) -> dict[str, tuple[LayerTime, ...]]:
    """Layers of every stage, slowest first.

    A TensorRT runner profiles itself: ``profile_layers(**inputs)`` gives [(name, ms)]. For ONNX
    Runtime on the CPU a session with its profiler on is opened beside the runner.

    Raises:
        HipaError: a backend whose profiler would not time the device.

    """
    own = {
        name: getattr(runner, "profile_layers", None) for name, runner in pipeline.runners.items()
    }
    if not all(own.values()) and pipeline.backend != "onnxruntime":
        known = "Expected tensorrt, rtx or onnxruntime"
        raise HipaError(
            f"backend {pipeline.backend} has no profiler of layers that times the device. {known}."
        )
    found = {}
    for stage, inputs in stage_inputs(pipeline, prompt).items():
        ask = own[stage]
        if ask is None:
            found[stage] = _ranked(_onnxruntime_layers(pipeline.bundle, stage, inputs))
        else:
            found[stage] = _ranked(_mean_layers([ask(**inputs) for _ in range(1 + RUNS)][1:]))
    return found


def stage_inputs(pipeline: OneStepPipeline, prompt: str) -> dict[str, Inputs]:
    """What every stage is fed for one batch of ``prompt``, in the order in which the stages run."""
    manifest = pipeline.bundle.manifest
    source = example_source(pipeline.bundle)
    tensors = pipeline.tensors(prompt, source=source, seed=0, count=manifest.batch)
    tensors["timestep"] = np.asarray([manifest.one_step.timestep], np.int64)  # a generic UNet's
    return {
        name: stage_feed(runner.spec, tensors, manifest.layout)
        for name, runner in pipeline.runners.items()
    }


def _mean_layers(
    runs: Sequence[Sequence[tuple[str, float]]],
) -> list[tuple[str, str | None, float]]:
    """Layers by their place: TensorRT may give two the same name."""
    names = [name for name, _ in runs[0]]
    ms = np.mean([[time for _, time in run] for run in runs], axis=0)
    return [(name, None, float(time)) for name, time in zip(names, ms, strict=True)]


def _onnxruntime_layers(
    bundle: Bundle, stage: str, inputs: Inputs
) -> list[tuple[str, str | None, float]]:
    """Nodes of the optimised graph, from the trace that ONNX Runtime writes.

    On the CPU a node's time in it is its own.
    https://onnxruntime.ai/docs/performance/tune-performance/profiling-tools.html
    """
    onnxruntime = importlib.import_module("onnxruntime")
    with tempfile.TemporaryDirectory() as folder:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.use_deterministic_compute = True  # as the runner's
        options.enable_profiling = True
        options.profile_file_prefix = str(Path(folder) / stage)
        session = onnxruntime.InferenceSession(
            str(bundle.stage_path(stage)), options, providers=["CPUExecutionProvider"]
        )
        for _ in range(1 + RUNS):
            session.run(None, inputs)
        events = json.loads(Path(session.end_profiling()).read_text())
    return node_times(events)


def node_times(events: list[dict[str, Any]]) -> list[tuple[str, str | None, float]]:
    """(node, operator, mean ms) from the trace's kernel events, first runs left out.

    The trace has microseconds.
    """
    times: dict[str, list[float]] = {}
    ops: dict[str, str | None] = {}
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            name = event["name"].removesuffix("_kernel_time")
            times.setdefault(name, []).append(event["dur"] / 1e3)
            ops[name] = event["args"].get("op_name")
    return [(name, ops[name], float(np.mean(ms[1:]))) for name, ms in times.items() if len(ms) > 1]


def _ranked(layers: list[tuple[str, str | None, float]]) -> tuple[LayerTime, ...]:
    total = sum(ms for _, _, ms in layers) or 1.0
    slowest = sorted(layers, key=lambda layer: -layer[2])
    return tuple(
        LayerTime(name=name, op=op, ms=ms, percent=100 * ms / total) for name, op, ms in slowest
    )


def by_op(layers: Sequence[LayerTime]) -> dict[str, float]:
    """Per cent of the time by operator, largest first; empty where no operators are named."""
    found: dict[str, float] = {}
    for layer in layers:
        if layer.op is not None:
            found[layer.op] = found.get(layer.op, 0.0) + layer.percent
    return dict(sorted(found.items(), key=lambda pair: -pair[1]))


def op_text(layers: Sequence[LayerTime], most: int = 6) -> str:
    """'Conv 40 %, Gemm 12 %', the ``most`` largest operators."""
    return ", ".join(f"{op} {percent:.0f} %" for op, percent in list(by_op(layers).items())[:most])


def render_layers(stage: str, layers: Sequence[LayerTime], rows: int = ROWS) -> Table:
    """The slowest layers for a terminal, the rest in one row."""
    title = f"Layers of {stage}: their own profiler, {RUNS} runs apart from the latency above"
    caption = "Profiling slows a stage: read the shares, not the sums."
    operators = op_text(layers)
    if operators:
        caption += f"\n{operators}"
    table = Table(title=title, caption=caption, caption_justify="left")
    for heading, justify in (("layer", "left"), ("op", "left"), ("ms", "right"), ("%", "right")):
        table.add_column(heading, justify=justify)  # type: ignore[arg-type]
    for layer in layers[:rows]:
        table.add_row(layer.name, layer.op or "-", f"{layer.ms:.3f}", f"{layer.percent:.1f}")
    others = layers[rows:]
    if others:
        ms = sum(layer.ms for layer in others)
        percent = sum(layer.percent for layer in others)
        table.add_row(f"{len(others)} more", "", f"{ms:.3f}", f"{percent:.1f}", style="dim")
    return table

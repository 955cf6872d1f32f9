"""The activations of engines that TensorRT-RTX builds, beside those that the memory plan predicts.

Purpose: whether the sum over a graph (``fused_activation_bytes`` in a bundle's manifest) says what
an engine takes. The plan's ENGINE_ACTIVATIONS and LEAST_ACTIVATIONS_MIB are from here. An engine
does not load without a driver, but its builder logs the sizes: 'Total Activation Memory' and 'Total
Weights Memory'. On a GPU the sidecar has what the engine itself says.

Command, from the repository's root::

    python benchmarks/engine_memory.py /tmp/stages/sd15/*/model.onnx

where benchmarks/stage_memory.py --keep /tmp/stages has left the graphs; a bundle's do as well.

Expected time: that of the builds, two minutes for the stages of SD 1.5's shapes on two cores, with
6 GB of memory.
"""

from __future__ import annotations

import re
import time
from pathlib import Path
from typing import Annotated, Any

import tensorrt_rtx as trt
import typer

from hipa_deploy.engines.tensorrt.library import set_compute_capabilities
from hipa_deploy.export.graph.graph_cost import graph_cost

PATTERN = re.compile(r"(Total \w+ Memory|Max Scratch Memory): (\d+)")
ADA = (89,)


class Recorder(trt.ILogger):  # type: ignore[misc]  # TensorRT has no types
    """A logger that keeps the sizes of an engine."""

    def __init__(self) -> None:
        trt.ILogger.__init__(self)
        self.sizes: dict[str, int] = {}
        self.errors: list[str] = []

    def log(self, severity: Any, text: str) -> None:
        """Keep a line with a size, and errors."""
        found = PATTERN.search(text)
        if found:
            self.sizes[found[1]] = int(found[2])
        if severity <= trt.ILogger.ERROR:
            self.errors.append(text)


def build(path: Path, logger: Recorder) -> float:
    """Build an engine as hipa-build does, and forget it; returns the seconds."""
    logger.sizes.clear()
    started = time.perf_counter()
    builder = trt.Builder(logger)
    network = builder.create_network()
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(str(path)):
        raise SystemExit(f"{path}: {logger.errors}")
    config = builder.create_builder_config()
    config.set_flag(trt.BuilderFlag.REQUIRE_USER_ALLOCATION)
    set_compute_capabilities(trt, config, ADA)
    if builder.build_serialized_network(network, config) is None:
        raise SystemExit(f"{path}: {logger.errors}")
    return time.perf_counter() - started


def main(graphs: Annotated[list[Path], typer.Argument(help="ONNX files.")]) -> None:
    """Print a row for each graph, in MiB."""
    # One logger for all: TensorRT keeps the first.
    logger = Recorder()
    print(f"TensorRT-RTX {trt.__version__}, SM{ADA[0]}, MiB")
    print("graph | weights | activations: of the graph | built | largest scratch | seconds")
    for path in graphs:
        predicted = graph_cost(path).fused_activation_bytes
        seconds = build(path, logger)
        sizes = [
            logger.sizes.get("Total Weights Memory"),
            predicted,
            logger.sizes.get("Total Activation Memory"),
            logger.sizes.get("Max Scratch Memory"),
        ]
        shown = ["-" if size is None else f"{size / 2**20:,.1f}" for size in sizes]
        name = "/".join(path.parts[-3:-1])
        print(f"{name} | {' | '.join(shown)} | {seconds:.0f}", flush=True)


if __name__ == "__main__":
    typer.run(main)

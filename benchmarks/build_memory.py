"""The memory plan compared with what builds really take.

Purpose: the predicted and the measured peak of host memory of every stage, for TensorRT-RTX engines
that are built without a GPU, one stage after the other.

Command, from the repository's root::

    python benchmarks/build_memory.py /tmp/sd15-fp16 /tmp/sd21-fp16 \\
        hipa_deploy/embedded/bundle --out build_memory.json

Expected time: the time of the builds; 42 s for a bundle of SD 1.5's shapes in FP16 on two AVX-512
cores (README.md).

Each bundle is copied by hard links, so that its own engines stay as they are. The constants of the
memory plan's host prediction (HOST_BASE_MIB, HOST_PER_WEIGHT) are fitted to these peaks; the last
line of the table is the fit that these bundles alone would give.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.console import Console
from rich.table import Table

from hipa_deploy.bundle.folder import Bundle
from hipa_deploy.engines.build.build_bundle import build_bundle, dry_run


def measure(root: Path, scratch: Path, target: str) -> list[dict[str, Any]]:
    """Build a copy of a bundle and compare.

    Args:
        root: Folder of the bundle.
        scratch: Folder for the copy.
        target: An RTX target.

    Returns:
        A row for each stage; memory in MiB.

    """
    copied = shutil.copytree(
        root, scratch / root.name, copy_function=os.link, ignore=lambda *_: ["engines"]
    )
    bundle = Bundle.open(Path(copied))
    plan = dry_run(bundle, backend="rtx", target=target)
    planned = {stage.stage: stage for stage in plan.stages}
    rows: list[dict[str, Any]] = []
    for engine in build_bundle(bundle, backend="rtx", target=target):
        rows.append(
            {
                "stage": f"{root.name}, {engine.stage}",
                "weights": planned[engine.stage].weights,
                "predicted": planned[engine.stage].build_host,
                "measured": engine.sidecar.build_peak_mib,
                "engine": engine.sidecar.engine_bytes >> 20,
                "seconds": engine.sidecar.build_seconds,
            }
        )
    return rows


def render(rows: list[dict[str, Any]], target: str) -> Table:
    """The rows as a table, with the error of each prediction and the least-squares line."""
    headings = ("", "weights", "predicted", "measured", "error", "engine", "seconds")
    table = Table(*headings, title=f"MiB, rtx, {target}")
    for row in rows:
        error = f"{row['predicted'] / row['measured'] - 1:+.0%}"
        numbers = [f"{row[key]:,}" for key in ("weights", "predicted", "measured")]
        table.add_row(row["stage"], *numbers, error, f"{row['engine']:,}", f"{row['seconds']:.0f}")

    weights = [row["weights"] for row in rows]
    peaks = [row["measured"] for row in rows]
    slope, base = np.polyfit(weights, peaks, 1)
    table.caption = f"least squares: {base:.0f} MiB + {slope:.2f} x weights"
    return table


def main(
    bundles: Annotated[list[Path], typer.Argument(help="Bundle folders.")],
    target: Annotated[str, typer.Option(help="An RTX target.")] = "rtx40",
    out: Annotated[Path | None, typer.Option(help="Write the results as JSON.")] = None,
) -> None:
    """Build every stage of every bundle and compare."""
    # Hard links need the bundles' own file system.
    rows = []
    with tempfile.TemporaryDirectory(dir=bundles[0].parent) as scratch:
        for root in bundles:
            rows += measure(root, Path(scratch), target)
    Console().print(render(rows, target))
    if out:
        out.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)

"""The memory plan beside what builds really take: TensorRT-RTX, without a GPU, one stage after the other.

    python benchmarks/build_memory.py /tmp/sd15-fp16 /tmp/sd21-fp16 hipa_deploy/embedded/bundle --out build_memory.json

Each bundle is copied by hard links, so that its own engines stay as they are. The plan's host line (HOST_BASE_MIB,
HOST_PER_WEIGHT) is fitted to these peaks; the last row prints the fit that these bundles alone would give.
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
    """Predicted and measured peak of every stage of a bundle, in MiB."""
    copy = Path(
        shutil.copytree(
            root, scratch / root.name, copy_function=os.link, ignore=lambda *_: ["engines"]
        )
    )
    bundle = Bundle.open(copy)
    planned = {stage.stage: stage for stage in dry_run(bundle, backend="rtx", target=target).stages}
    return [
        {
            "stage": f"{root.name}, {engine.stage}",
            "weights": planned[engine.stage].weights,
            "predicted": planned[engine.stage].build_host,
            "measured": engine.sidecar.build_peak_mib,
            "engine": engine.sidecar.engine_bytes >> 20,
            "seconds": engine.sidecar.build_seconds,
        }
        for engine in build_bundle(bundle, backend="rtx", target=target)
    ]


def render(rows: list[dict[str, Any]], target: str) -> Table:
    """The rows as a table, with the error of the prediction, and the least-squares line."""
    table = Table(
        "",
        "weights",
        "predicted",
        "measured",
        "error",
        "engine",
        "seconds",
        title=f"MiB, rtx, {target}",
    )
    for row in rows:
        error = f"{row['predicted'] / row['measured'] - 1:+.0%}"
        numbers = (f"{row[key]:,}" for key in ("weights", "predicted", "measured"))
        table.add_row(row["stage"], *numbers, error, f"{row['engine']:,}", f"{row['seconds']:.0f}")
    slope, base = np.polyfit([row["weights"] for row in rows], [row["measured"] for row in rows], 1)
    table.caption = f"least squares: {base:.0f} MiB + {slope:.2f} x weights"
    return table


def main(
    bundles: Annotated[list[Path], typer.Argument(help="Bundle folders.")],
    target: Annotated[str, typer.Option(help="An RTX target.")] = "rtx40",
    out: Annotated[Path | None, typer.Option(help="Write the results as JSON.")] = None,
) -> None:
    """Build every stage of every bundle and compare."""
    with tempfile.TemporaryDirectory(dir=bundles[0].parent) as scratch:
        rows = [row for root in bundles for row in measure(root, Path(scratch), target)]
    Console().print(render(rows, target))
    if out:
        out.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    typer.run(main)

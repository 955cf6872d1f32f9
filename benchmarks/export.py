"""Time and peak memory of an export to ONNX: this toolkit compared with optimum-onnx.

Purpose: seconds, peak memory and bytes written of each contender, on the same model, one after the
other.

Commands, from the repository's root::

    python benchmarks/make_model.py --size sd15 --out /tmp/sd15
    python benchmarks/export.py --model /tmp/sd15 --work /tmp/export --out export.json

Expected time: about 11 minutes for the four contenders at SD 1.5's size on two AVX-512 cores, of
which optimum-onnx takes 6.

Each export is a process of its own and includes its tool's own check of what it wrote: optimum's
validation; our parity gates, which run every stage in PyTorch and in ONNX Runtime. Peak memory is
the largest resident size of any one process of the export's process tree, as the kernel counts it.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

BASELINE = "optimum-onnx, FP32"
BIN = Path(sys.executable).parent


def command(name: str, model: Path, out: Path) -> list[str]:
    """The command line of a contender: 'optimum-onnx, FP32' or 'hipa-export, DTYPE[, LAYOUT]'."""
    if name == BASELINE:
        program = [str(BIN / "optimum-cli"), "export", "onnx"]
        return [*program, "--model", str(model), "--task", "text-to-image", str(out)]

    _, dtype, *layout = name.lower().split(", ")
    program = [str(BIN / "hipa-export"), "--model", str(model), "--out", str(out)]
    options = ["--layout", layout[0]] if layout else []
    return [*program, "--dtype", dtype, *options]


CONTENDERS = (BASELINE, "hipa-export, FP32, generic", "hipa-export, FP32", "hipa-export, FP16")


def measure(name: str, model: Path, work: Path) -> dict[str, float]:
    """Run one export into a fresh folder and remove what it wrote.

    Args:
        name: The contender.
        model: Diffusers folder.
        work: Folder for the export and its log.

    Returns:
        'seconds', 'peak_gb' and 'written_gb'.

    """
    out = work / "bundle"
    shutil.rmtree(out, ignore_errors=True)

    # wait4 returns the usage of the process and of all processes that it waited for.
    started = time.perf_counter()
    with (work / "log.txt").open("w", encoding="utf-8") as log:
        process = subprocess.Popen(command(name, model, out), stdout=log, stderr=subprocess.STDOUT)
        _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - started
    if status:
        end_of_log = (work / "log.txt").read_text(encoding="utf-8")[-2000:]
        raise SystemExit(f"{name} failed:\n{end_of_log}")

    written = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    shutil.rmtree(out)
    return {
        "seconds": seconds,
        "peak_gb": usage.ru_maxrss * 1024 / 1e9,
        "written_gb": written / 1e9,
    }


def render(results: dict[str, dict[str, float]], title: str) -> Table:
    """The results as a table, with ratios to optimum's export."""
    headings = ("", "time", "peak memory", "written", "times faster", "times less memory")
    table = Table(*headings, title=title)
    base = results[BASELINE]
    for name, row in results.items():
        faster = base["seconds"] / row["seconds"]
        less_memory = base["peak_gb"] / row["peak_gb"]
        seconds = f"{row['seconds']:.0f} s"
        peak = f"{row['peak_gb']:.1f} GB"
        written = f"{row['written_gb']:.1f} GB"
        table.add_row(name, seconds, peak, written, f"{faster:.2f}", f"{less_memory:.2f}")
    return table


def main(
    model: Annotated[Path, typer.Option(help="Diffusers folder.")],
    work: Annotated[Path, typer.Option(help="Folder for what is written, 4 GB at SD 1.5 size.")],
    out: Annotated[Path | None, typer.Option(help="Write the results as JSON.")] = None,
) -> None:
    """Export once with every contender."""
    work.mkdir(parents=True, exist_ok=True)
    results = {}
    for name in CONTENDERS:
        results[name] = measure(name, model, work)
        print(name, json.dumps(results[name]), flush=True)
    Console().print(render(results, f"{model.name}, {os.cpu_count()} cores, {platform.machine()}"))
    if out:
        out.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)

"""Time and peak memory of an export to ONNX: this toolkit compared with optimum-onnx.

Purpose: seconds, peak memory and bytes written of each contender, on the same model, one after the
other.

Commands, from the repository's root::

    python benchmarks/make_model.py --size sd15 --out /tmp/sd15
    python benchmarks/export.py --model /tmp/sd15 --work /tmp/export --out export.json

One contender alone, at a size of its own, as for SDXL (docs/explanation/sdxl.md)::

    python benchmarks/make_model.py --size sdxl --out /tmp/sdxl
    python benchmarks/export.py --model /tmp/sdxl --work /tmp/export \\
        --only "hipa-export, FP16" --pixels 512

Expected time: about 11 minutes for the four contenders at SD 1.5's size on two AVX-512 cores, of
which optimum-onnx takes 6.

Each export is a process of its own and includes its tool's own check of what it wrote: optimum's
validation; our parity gates, which run every stage in PyTorch and in ONNX Runtime. Peak memory is
the largest resident size of any one process of the export's process tree, as the kernel counts it.
Disk traffic is what the kernel counts for the tree: files that are in its cache are not read.
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


def command(name: str, model: Path, out: Path, pixels: int | None) -> list[str]:
    """The command line of a contender: 'optimum-onnx, FP32' or 'hipa-export, DTYPE[, LAYOUT]'.

    ``pixels`` is height and width of the images; None is the model's own size.
    """
    if name == BASELINE:
        program = [str(BIN / "optimum-cli"), "export", "onnx"]
        return [*program, "--model", str(model), "--task", "text-to-image", str(out)]

    _, dtype, *layout = name.lower().split(", ")
    program = [str(BIN / "hipa-export"), "--model", str(model), "--out", str(out)]
    options = ["--layout", layout[0]] if layout else []
    if pixels is not None:
        options += ["--height", str(pixels), "--width", str(pixels)]
    return [*program, "--dtype", dtype, *options]


CONTENDERS = (BASELINE, "hipa-export, FP32, generic", "hipa-export, FP32", "hipa-export, FP16")


def measure(name: str, model: Path, work: Path, pixels: int | None = None) -> dict[str, float]:
    """Run one export into the folder ``work``/bundle, of which nothing is left from before.

    Args:
        name: The contender.
        model: Diffusers folder.
        work: Folder for the export and its log.
        pixels: Height and width of the images; None is the model's own size.

    Returns:
        'seconds', 'peak_gb', 'written_gb' (the size of the result), and the disk's traffic:
        'disk_read_gb' and 'disk_written_gb'.

    """
    out = work / "bundle"
    shutil.rmtree(out, ignore_errors=True)

    # wait4 returns the usage of the process and of all processes that it waited for.
    started = time.perf_counter()
    with (work / "log.txt").open("w", encoding="utf-8") as log:
        line = command(name, model, out, pixels)
        process = subprocess.Popen(line, stdout=log, stderr=subprocess.STDOUT)
        _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - started
    if status:
        end_of_log = (work / "log.txt").read_text(encoding="utf-8")[-2000:]
        raise SystemExit(f"{name} failed:\n{end_of_log}")

    written = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    return {
        "seconds": seconds,
        "peak_gb": usage.ru_maxrss * 1024 / 1e9,
        "written_gb": written / 1e9,
        # The kernel counts blocks of 512 bytes.
        "disk_read_gb": usage.ru_inblock * 512 / 1e9,
        "disk_written_gb": usage.ru_oublock * 512 / 1e9,
    }


def render(results: dict[str, dict[str, float]], title: str) -> Table:
    """The results as a table, with ratios to optimum's export where that was measured."""
    headings = ("", "time", "peak memory", "written", "times faster", "times less memory")
    table = Table(*headings, title=title)
    base = results.get(BASELINE)
    for name, row in results.items():
        seconds = f"{row['seconds']:.0f} s"
        peak = f"{row['peak_gb']:.1f} GB"
        written = f"{row['written_gb']:.1f} GB"
        ratios = []
        if base is not None:
            ratios.append(f"{base['seconds'] / row['seconds']:.2f}")
            ratios.append(f"{base['peak_gb'] / row['peak_gb']:.2f}")
        table.add_row(name, seconds, peak, written, *ratios)
    return table


def main(
    model: Annotated[Path, typer.Option(help="Diffusers folder.")],
    work: Annotated[Path, typer.Option(help="Folder for what is written, 4 GB at SD 1.5 size.")],
    out: Annotated[Path | None, typer.Option(help="Write the results as JSON.")] = None,
    only: Annotated[str | None, typer.Option(help="One contender.")] = None,
    pixels: Annotated[int | None, typer.Option(help="Height and width; hipa-export's.")] = None,
    keep: Annotated[Path | None, typer.Option(help="Move the last export here.")] = None,
) -> None:
    """Export once with every contender."""
    work.mkdir(parents=True, exist_ok=True)
    if keep is not None and keep.exists():
        raise SystemExit(f"{keep} exists")
    results = {}
    for name in (only,) if only else CONTENDERS:
        results[name] = measure(name, model, work, pixels)
        print(name, json.dumps(results[name]), flush=True)
    if keep is not None:
        (work / "bundle").rename(keep)
    shutil.rmtree(work / "bundle", ignore_errors=True)
    Console().print(render(results, f"{model.name}, {os.cpu_count()} cores, {platform.machine()}"))
    if out:
        out.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)

"""Time to the first image and peak memory of a fresh process, on the CPU backends.

Purpose: what the cache of compiled stages and remembered hashes changes, in one run, alternated.

Commands, from the repository's root::

    python benchmarks/make_model.py --size sd15 --out /tmp/sd15
    hipa-export --model /tmp/sd15 --out /tmp/sd15-bundle --dtype fp16
    python benchmarks/startup.py /tmp/sd15-bundle --out startup.json

Expected time: about 3 minutes a backend and round on two idle cores.

The contenders: 'anew' hashes every file and keeps nothing; 'first' starts with an empty cache;
'second' finds what 'first' left. With ``--before PYTHON``, the interpreter of another checkout,
'before' is what that code does. Seconds run from the start of the process to its first image.
Processor seconds are those of all threads, and say more where other programs run. 'resident' is the
kernel's VmHWM, mapped files included, and 'own' the memory that is no file's, at the first image.
Every image is compared with the first contender's, bit for bit.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

# A fresh process runs this. Its arguments: bundle, backend, options of ``load`` as JSON, images.
CHILD = """
import hashlib, json, re, resource, sys, time
from hipa_deploy import OneStepPipeline
bundle, backend, options, images = sys.argv[1:]
pipe = OneStepPipeline.load(bundle, backend, **json.loads(options))
report = {}
for count in range(int(images)):
    result = pipe("a red apple", seed=0)
    usage = resource.getrusage(resource.RUSAGE_SELF)
    status = open("/proc/self/status").read()
    mib = lambda field: int(re.search(field + r":\\s+(\\d+)", status)[1]) // 1024
    report["resident_mib"] = mib("VmHWM")
    if count == 0:
        report["ended"] = time.time()
        report["cpu_s"] = usage.ru_utime + usage.ru_stime
        report["first_resident_mib"] = mib("VmHWM")
        report["own_mib"] = mib("RssAnon")
report["sha256"] = hashlib.sha256(result.images_BHWC.tobytes()).hexdigest()
print(json.dumps(report))
"""


def start(python: str, bundle: Path, backend: str, options: dict[str, bool], images: int) -> Any:
    """One process: its report, with 'seconds' to its first image."""
    arguments = [str(bundle), backend, json.dumps(options), str(images)]
    began = time.time()
    done = subprocess.run(
        [python, "-c", CHILD, *arguments], capture_output=True, encoding="utf-8", check=False
    )
    if done.returncode:
        raise SystemExit(f"{python} {backend}: {done.stderr[-2000:]}")
    report = json.loads(done.stdout.splitlines()[-1])
    report["seconds"] = report.pop("ended") - began
    return report


def contenders(before: str | None) -> dict[str, tuple[str, dict[str, bool]]]:
    """Interpreter and options of each, in the order of a round."""
    mine = sys.executable
    found = {"first": (mine, {}), "second": (mine, {})}
    if before:
        return {"before": (before, {}), **found}
    return {"anew": (mine, {"verify": True, "cache": False}), **found}


def summary(runs: list[dict[str, Any]], field: str) -> str:
    """Median, and the range where there are several."""
    values = [run[field] for run in runs]
    middle = statistics.median(values)
    if len(values) == 1:
        return f"{middle:.1f}"
    return f"{middle:.1f} ({min(values):.1f} to {max(values):.1f})"


def main(
    bundle: Annotated[Path, typer.Argument(help="A bundle.")],
    backend: Annotated[list[str] | None, typer.Option(help="May be repeated.")] = None,
    rounds: Annotated[int, typer.Option(help="Processes of each contender.")] = 3,
    images: Annotated[int, typer.Option(help="Images in each process; memory counts all.")] = 2,
    before: Annotated[str | None, typer.Option(help="Interpreter of another checkout.")] = None,
    out: Annotated[Path | None, typer.Option(help="JSON file to write.")] = None,
) -> None:
    """Measure every backend."""
    results: dict[str, dict[str, list[dict[str, Any]]]] = {}
    with tempfile.TemporaryDirectory(dir=out.resolve().parent if out else None) as cache:
        os.environ["HIPA_CACHE"] = cache
        for name in backend or ["onnxruntime", "openvino"]:
            runs: dict[str, list[dict[str, Any]]] = {}
            for _ in range(rounds):
                for contender, (python, options) in contenders(before).items():
                    if contender == "first":
                        shutil.rmtree(Path(cache) / "compiled", ignore_errors=True)
                    report = start(python, bundle, name, options, images)
                    print(name, contender, json.dumps(report), flush=True)
                    runs.setdefault(contender, []).append(report)
            results[name] = runs

    table = Table("backend", "start", "seconds", "processor s", "resident MiB", "own MiB", "equal")
    for name, runs in results.items():
        expected = next(iter(runs.values()))[0]["sha256"]
        for contender, reports in runs.items():
            equal = all(report["sha256"] == expected for report in reports)
            row = [summary(reports, "seconds"), summary(reports, "cpu_s")]
            row += [summary(reports, "resident_mib"), summary(reports, "own_mib")]
            table.add_row(name, contender, *row, "yes" if equal else "NO")
    Console().print(table)
    if out:
        conditions = {"machine": platform.processor(), "load": os.getloadavg(), "images": images}
        out.write_text(
            json.dumps({"conditions": conditions, "runs": results}, indent=2), encoding="utf-8"
        )


if __name__ == "__main__":
    typer.run(main)

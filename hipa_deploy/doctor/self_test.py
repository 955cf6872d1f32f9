"""``hipa-doctor --self-test``: build, run, check and time the embedded bundle on all that this machine has.

The report is meant to be attached to an issue: facts of the device, versions, and the outcome of every step, with the
reason where one was skipped.
"""

from __future__ import annotations

import importlib.metadata
import json
import shutil
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict
from rich.console import Console

from hipa_deploy import __version__, embedded
from hipa_deploy.bundle.folder import Bundle
from hipa_deploy.doctor.self_check import END_TO_END, check_pipeline
from hipa_deploy.errors import HipaError, first_line
from hipa_deploy.generate.pipeline import OneStepPipeline

RUNS, WARMUP = 10, 2
PACKAGES = (
    "numpy", "onnxruntime", "onnxruntime-gpu", "tensorrt", "tensorrt-rtx", "cuda-python",
    "cuda-bindings", "polygraphy", "torch",
)  # fmt: skip

Outcome = Literal["passed", "failed", "skipped"]


class Step(BaseModel):
    """What was tried and what came of it. ``detail`` is one line; ``figures`` has the numbers, by name."""

    model_config = ConfigDict(frozen=True)

    name: str
    outcome: Outcome
    detail: str
    seconds: float = 0.0
    figures: dict[str, Any] = {}
    notes: tuple[str, ...] = ()


class SelfTest(BaseModel):
    """The report."""

    model_config = ConfigDict(frozen=True)

    schema_version: Literal[1] = 1
    created: str
    producer: str
    device: dict[str, Any]
    versions: dict[str, str]
    steps: tuple[Step, ...]

    @property
    def failed(self) -> bool:
        """Whether a step failed; a skipped one did not."""
        return any(step.outcome == "failed" for step in self.steps)


def self_test(console: Console | None = None) -> SelfTest:
    """Run every step that this machine can; a step that fails does not stop the others, and nothing raises."""
    from hipa_deploy.engines.backends.available import describe_device

    device = describe_device()
    with tempfile.TemporaryDirectory(prefix="hipa-self-test-") as scratch:
        ours = shutil.copytree(
            embedded.BUNDLE, Path(scratch, "bundle"), ignore=shutil.ignore_patterns("engines")
        )
        bundle = Bundle.open(Path(ours))
        steps = tuple(
            _steps(bundle, device.model_dump(mode="json"), console or Console(stderr=True))
        )
    return SelfTest(
        created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        producer=f"hipa-deploy {__version__}",
        device=device.model_dump(mode="json"),
        versions=_versions(),
        steps=steps,
    )


def _steps(bundle: Bundle, device: dict[str, Any], console: Console) -> Iterator[Step]:
    from hipa_deploy.engines.tensorrt.library import TENSORRT_LIBRARIES

    backends = {backend["name"]: backend for backend in device["backends"]}
    for library in TENSORRT_LIBRARIES:
        name, found = f"build {library}", backends[library]
        if found["version"] is None or (library == "tensorrt" and not found["usable"]):
            yield Step(name=name, outcome="skipped", detail=found["remedy"])
        else:
            yield _attempt(
                name, partial(_build, bundle, library, device["gpu"] is not None, console)
            )
    for backend in backends.values():
        name = f"run {backend['name']}"
        if backend["usable"]:
            yield _attempt(name, partial(_run, bundle, backend["name"], console))
        else:
            yield Step(name=name, outcome="skipped", detail=backend["remedy"])


class _GateError(Exception):
    """A check failed that still has figures to report."""

    def __init__(self, problems: tuple[str, ...], figures: dict[str, Any]) -> None:
        super().__init__(" ".join(problems))
        self.figures = figures


def _attempt(name: str, work: Callable[[], tuple[str, dict[str, Any]]]) -> Step:
    """Do ``work``; whatever it raises is the step's outcome, with the traceback's last line."""
    started = time.perf_counter()
    figures: dict[str, Any] = {}
    outcome: Outcome = "passed"
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        try:
            detail, figures = work()
        except _GateError as error:
            outcome, detail, figures = "failed", str(error), error.figures
        except Exception as error:  # the report is for what nobody foresaw
            outcome, detail = "failed", describe(error)
    notes = tuple(
        str(warning.message) for warning in told if issubclass(warning.category, RuntimeWarning)
    )
    seconds = round(time.perf_counter() - started, 3)
    return Step(
        name=name, outcome=outcome, detail=detail, seconds=seconds, figures=figures, notes=notes
    )


def describe(error: BaseException) -> str:
    """An error in one line: ours as it stands, another with its class and the place it came from."""
    if isinstance(error, HipaError):
        return str(error)
    frames = traceback.extract_tb(error.__traceback__)
    place = f" ({Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {first_line(error)}{place}"


def _build(bundle: Bundle, library: str, gpu: bool, console: Console) -> tuple[str, dict[str, Any]]:
    """Engines of every stage where they can run, of the smallest where building is all that can be done."""
    from hipa_deploy.engines.build.build_bundle import build_bundle

    stages = bundle.manifest.stages
    smallest = min(stages, key=lambda stage: bundle.stage_path(stage.spec.name).stat().st_size)
    chosen = stages if gpu else (smallest,)
    part = Bundle(bundle.root, bundle.manifest.model_copy(update={"stages": chosen}))
    built = build_bundle(part, backend=library, console=console)
    figures = {
        engine.stage: {
            "bytes": engine.sidecar.engine_bytes,
            "seconds": engine.sidecar.build_seconds,
        }
        for engine in built
    }
    return f"{len(built)} of {len(stages)} engines: {', '.join(figures)}", figures


def _run(bundle: Bundle, backend: str, console: Console) -> tuple[str, dict[str, Any]]:
    """The self-check, then a short latency measurement."""
    from hipa_deploy.engines.latency.measure import profile_pipeline

    with OneStepPipeline.load(bundle.root, backend) as pipe:
        found = check_pipeline(pipe)
        latency = profile_pipeline(pipe, runs=RUNS, warmup=WARMUP, console=console)
        figures = {
            "self_check": {
                name: str(check)
                for name, check in {**found.stages, END_TO_END: found.end_to_end}.items()
            },
            "p50_ms": round(latency.end_to_end.p50_ms, 3),
            "first_ms": latency.end_to_end.first_ms,
            "load_seconds": latency.load_seconds,
            "device_ms": getattr(pipe.stages, "device_ms", None),
            "device_memory_mib": getattr(pipe.stages, "device_memory_mib", None),
            "graph_problems": _graph_problems(pipe),
        }
    if found.problems:
        raise _GateError(found.problems, figures)
    parity = found.end_to_end.parity
    psnr = f"{parity.psnr_db:.1f} dB from PyTorch FP32" if parity else ""
    return f"{psnr}, p50 {latency.end_to_end.p50_ms:.2f} ms over {RUNS} runs", figures


def _graph_problems(pipe: OneStepPipeline) -> list[str]:
    """Why there is no CUDA graph: said by all the stages as one, or by each of them."""
    owners = [pipe.stages, *pipe.runners.values()]
    found = [getattr(owner, "graph_problem", None) for owner in owners]
    return [problem for problem in dict.fromkeys(found) if problem]


def _versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def render_text(report: SelfTest) -> str:
    """The report as one Markdown text, its JSON at the end: readable in an issue, and by a program."""
    device = report.device
    gpu = device["gpu"]
    about = [
        f"{report.producer}, {report.created}",
        f"machine: {device['jetson'] or device['cpu']}, {device['cores']} cores, {device['memory_mib']} MiB, "
        f"{device['os']}, {device['arch']}, Python {device['python']}, L4T {device['l4t'] or '-'}",
        f"GPU: {gpu['name']}, SM {gpu['sm']}, {gpu['memory_mib']} MiB, driver {gpu['driver']}, CUDA {gpu['cuda']}"
        if gpu
        else "GPU: none answers",
        f"versions: {', '.join(f'{name} {version}' for name, version in report.versions.items())}",
    ]
    rows = [
        (
            step.name,
            step.outcome,
            f"{step.seconds:.1f} s",
            "; ".join((step.detail, *step.notes)).replace("|", "/"),
        )
        for step in report.steps
    ]
    table = [
        f"| {' | '.join(cells)} |"
        for cells in (("step", "outcome", "time", "what"), ("---",) * 4, *rows)
    ]
    body = json.dumps(report.model_dump(mode="json"), indent=2)
    lines = [
        "# hipa-deploy self-test",
        "",
        *(f"- {line}" for line in about),
        "",
        *table,
        "",
        "```json",
        body,
        "```",
    ]
    return "\n".join(lines) + "\n"

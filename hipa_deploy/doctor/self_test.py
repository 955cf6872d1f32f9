"""``hipa-doctor --self-test``: build, run, check and time the embedded bundle on every backend.

The report is meant to be attached to an issue: facts of the device, versions, and the outcome of
every step, with the reason where one was skipped.
"""

from __future__ import annotations

import importlib.metadata
import json
import shutil
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
from hipa_deploy.disk.files import temporary_folder
from hipa_deploy.doctor.self_check import END_TO_END, check_pipeline
from hipa_deploy.errors import HipaError, first_line
from hipa_deploy.generate.pipeline import OneStepPipeline

# Enough for a median to see that something is wrong, few enough for a slow device.
RUNS = 10
WARMUP = 2

# What the report gives the version of, where it is installed.
PACKAGES = (
    "numpy", "onnxruntime", "onnxruntime-gpu", "onnxruntime-ep-nv-tensorrt-rtx-cu13",
    "onnxruntime-ep-nv-tensorrt-rtx-cu12", "tensorrt", "tensorrt-rtx", "cuda-python",
    "cuda-bindings", "polygraphy", "torch",
)  # fmt: skip

Outcome = Literal["passed", "failed", "skipped"]


class Step(BaseModel):
    """One thing that was tried.

    Attributes:
        name: 'build BACKEND' or 'run BACKEND'.
        outcome: 'passed', 'failed' or 'skipped'.
        detail: the result in one line, the error, or why it was skipped.
        seconds: how long it took.
        figures: numbers and checks by name.
        notes: warnings that came up meanwhile.

    """

    model_config = ConfigDict(frozen=True)

    name: str
    outcome: Outcome
    detail: str
    seconds: float = 0.0
    figures: dict[str, Any] = {}
    notes: tuple[str, ...] = ()


class SelfTest(BaseModel):
    """The report of a self-test: device and versions, as JSON types, and a result for each step."""

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
    """Run every step that this machine can.

    A step that fails does not stop the others, and no step's error is raised.

    Args:
        console: where progress is shown; stderr by default.

    """
    from hipa_deploy.engines.backends.available import describe_device

    device = describe_device().model_dump(mode="json")
    screen = console or Console(stderr=True)

    # A copy: engines are built into the bundle, and the installed package stays as it is.
    with temporary_folder("hipa-self-test") as scratch:
        root = scratch / "bundle"
        shutil.copytree(embedded.BUNDLE, root, ignore=shutil.ignore_patterns("engines"))
        steps = tuple(_steps(Bundle.open(root), device, screen))

    return SelfTest(
        created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        producer=f"hipa-deploy {__version__}",
        device=device,
        versions=_versions(),
        steps=steps,
    )


def _steps(bundle: Bundle, device: dict[str, Any], console: Console) -> Iterator[Step]:
    """Builds first, because the backends that run engines need them; then a run on each backend."""
    from hipa_deploy.engines.tensorrt.library import TENSORRT_LIBRARIES

    backends = {backend["name"]: backend for backend in device["backends"]}
    for library in TENSORRT_LIBRARIES:
        name = f"build {library}"
        found = backends[library]
        # TensorRT-RTX builds without a GPU, TensorRT only on the device itself.
        if found["version"] is None or (library == "tensorrt" and not found["usable"]):
            yield Step(name=name, outcome="skipped", detail=found["remedy"])
        else:
            has_gpu = device["gpu"] is not None
            yield _attempt(name, partial(_build, bundle, library, has_gpu, console))

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
    """Do ``work``, which gives a line and figures; whatever it raises is the step's outcome."""
    started = time.perf_counter()
    figures: dict[str, Any] = {}
    outcome: Outcome = "passed"
    with warnings.catch_warnings(record=True) as caught:
        # Every warning is recorded, also one that this process has seen before.
        warnings.simplefilter("always")
        try:
            detail, figures = work()
        except _GateError as error:
            outcome = "failed"
            detail = str(error)
            figures = error.figures
        except Exception as error:  # the report is for errors that nobody foresaw
            outcome = "failed"
            detail = describe(error)
    seconds = round(time.perf_counter() - started, 3)

    # RuntimeWarning is what this project warns with; other libraries' deprecations are no news.
    notes = []
    for warning in caught:
        if issubclass(warning.category, RuntimeWarning):
            notes.append(str(warning.message))
    return Step(
        name=name,
        outcome=outcome,
        detail=detail,
        seconds=seconds,
        figures=figures,
        notes=tuple(notes),
    )


def describe(error: BaseException) -> str:
    """An error in one line: a HipaError's message, or class, message and place of another.

    Example:
        >>> describe(ValueError("two\\nlines"))
        'ValueError: two'

    """
    if isinstance(error, HipaError):
        return str(error)
    frames = traceback.extract_tb(error.__traceback__)
    place = f" ({Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {first_line(error)}{place}"


def _build(
    bundle: Bundle, library: str, has_gpu: bool, console: Console
) -> tuple[str, dict[str, Any]]:
    """Build engines of every stage; without a GPU, where none could run, of the smallest alone."""
    from hipa_deploy.engines.build.build_bundle import build_bundle

    stages = bundle.manifest.stages
    chosen = stages
    if not has_gpu:
        chosen = (min(stages, key=lambda stage: bundle.stage_path(stage.spec.name).stat().st_size),)
    part = Bundle(bundle.root, bundle.manifest.model_copy(update={"stages": chosen}))

    figures = {}
    for engine in build_bundle(part, backend=library, console=console):
        figures[engine.stage] = {
            "bytes": engine.sidecar.engine_bytes,
            "seconds": engine.sidecar.build_seconds,
        }
    return f"{len(figures)} of {len(stages)} engines: {', '.join(figures)}", figures


def _run(bundle: Bundle, backend: str, console: Console) -> tuple[str, dict[str, Any]]:
    """The self-check, then a short latency measurement.

    Raises:
        _GateError: a stage's output is not close enough to PyTorch's.

    """
    from hipa_deploy.engines.latency.measure import profile_pipeline

    with OneStepPipeline.load(bundle.root, backend) as pipe:
        check = check_pipeline(pipe)
        latency = profile_pipeline(pipe, runs=RUNS, warmup=WARMUP, console=console)
        checks = {**check.stages, END_TO_END: check.end_to_end}
        figures = {
            "self_check": {name: str(stage_check) for name, stage_check in checks.items()},
            "p50_ms": round(latency.end_to_end.p50_ms, 3),
            "first_ms": latency.end_to_end.first_ms,
            "load_seconds": latency.load_seconds,
            # Only stages that run on engines know these.
            "device_ms": getattr(pipe.stages, "device_ms", None),
            "device_memory_mib": getattr(pipe.stages, "device_memory_mib", None),
            "graph_problems": _graph_problems(pipe),
        }

    if check.problems:
        raise _GateError(check.problems, figures)
    parity = check.end_to_end.parity
    psnr = f"{parity.psnr_db:.1f} dB from PyTorch FP32" if parity else ""
    return f"{psnr}, p50 {latency.end_to_end.p50_ms:.2f} ms over {RUNS} runs", figures


def _graph_problems(pipe: OneStepPipeline) -> list[str]:
    """Why there is no CUDA graph, as the stages together or each runner say; each reason once."""
    problems = []
    for owner in (pipe.stages, *pipe.runners.values()):
        problem = getattr(owner, "graph_problem", None)
        if problem and problem not in problems:
            problems.append(problem)
    return problems


def _versions() -> dict[str, str]:
    """Versions of the installed packages among ``PACKAGES``."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def render_text(report: SelfTest) -> str:
    """The report as Markdown, its JSON at the end: readable in an issue, and by a program."""
    body = json.dumps(report.model_dump(mode="json"), indent=2)
    lines = [
        "# hipa-deploy self-test",
        "",
        *(f"- {fact}" for fact in _fact_lines(report)),
        "",
        _row("step", "outcome", "time", "what"),
        _row("---", "---", "---", "---"),
        *(_step_row(step) for step in report.steps),
        "",
        "```json",
        body,
        "```",
    ]
    return "\n".join(lines) + "\n"


def _fact_lines(report: SelfTest) -> list[str]:
    """Producer, machine, GPU and versions, a line each."""
    device = report.device
    machine = (
        f"machine: {device['jetson'] or device['cpu']}, {device['cores']} cores, "
        f"{device['memory_mib']} MiB, {device['os']}, {device['arch']}, "
        f"Python {device['python']}, L4T {device['l4t'] or '-'}"
    )
    gpu = "GPU: none answers"
    if device["gpu"]:
        facts = device["gpu"]
        gpu = (
            f"GPU: {facts['name']}, SM {facts['sm']}, {facts['memory_mib']} MiB, "
            f"driver {facts['driver']}, CUDA {facts['cuda']}"
        )
    versions = ", ".join(f"{name} {version}" for name, version in report.versions.items())
    return [f"{report.producer}, {report.created}", machine, gpu, f"versions: {versions}"]


def _step_row(step: Step) -> str:
    # A bar in a message would begin another cell of the table.
    text = "; ".join((step.detail, *step.notes)).replace("|", "/")
    return _row(step.name, step.outcome, f"{step.seconds:.1f} s", text)


def _row(*cells: str) -> str:
    """A row of a Markdown table."""
    return f"| {' | '.join(cells)} |"

"""``hipa-doctor --self-test``: build, run, check and time the embedded bundle on every backend.

The report is a referee's: what was checked, with which numbers and by which bound, on which device
and versions, and whether each figure counts. ``self_test_report`` shows it.
"""

from __future__ import annotations

import importlib.metadata
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
from hipa_deploy.doctor.self_check import END_TO_END, StageCheck, check_pipeline
from hipa_deploy.engines.latency.validity import LEAST_QUERIES, LEAST_SECONDS, Validity
from hipa_deploy.errors import HipaError, first_line
from hipa_deploy.generate.pipeline import OneStepPipeline

# As long as a valid figure takes (engines/latency/validity.py), and a little more: the time of the
# runs is compared with the bound, not the wall clock.
RUNS = LEAST_QUERIES
SECONDS = 1.02 * LEAST_SECONDS
WARMUP = 5

# What the report gives the version of, where it is installed.
PACKAGES = (
    "numpy", "onnxruntime", "onnxruntime-gpu", "onnxruntime-ep-nv-tensorrt-rtx-cu13",
    "onnxruntime-ep-nv-tensorrt-rtx-cu12", "tensorrt", "tensorrt-cu12", "tensorrt-rtx",
    "tensorrt-rtx-cu12", "cuda-python",
    "cuda-bindings", "openvino", "polygraphy", "torch",
)  # fmt: skip

Outcome = Literal["passed", "failed", "skipped"]


class Check(BaseModel):
    """One line of the report.

    Attributes:
        name: what was checked.
        measured: the number, with its unit.
        bound: what it was judged by; empty where it is only noted.
        outcome: 'invalid' is a time that does not count, which is no fault of the machine; 'noted'
            is judged by nothing.

    """

    model_config = ConfigDict(frozen=True)

    name: str
    measured: str
    bound: str
    outcome: Literal["passed", "failed", "invalid", "noted"]


class Step(BaseModel):
    """One thing that was tried.

    Attributes:
        name: 'build BACKEND' or 'run BACKEND'.
        outcome: 'passed', 'failed' or 'skipped'.
        detail: the result in one line, the error, or why it was skipped.
        seconds: how long it took.
        figures: numbers and checks by name.
        notes: warnings that came up meanwhile.
        checks: what was checked, a line each.
        validity: whether its time counts; None where nothing was timed.

    """

    model_config = ConfigDict(frozen=True)

    name: str
    outcome: Outcome
    detail: str
    seconds: float = 0.0
    figures: dict[str, Any] = {}
    notes: tuple[str, ...] = ()
    checks: tuple[Check, ...] = ()
    validity: Validity | None = None


class SelfTest(BaseModel):
    """The report of a self-test: device and versions, as JSON types, and a result for each step.

    Attributes:
        schema_version: 2; reports of version 1 have neither checks nor validity.
        gpu: what the report says of a GPU: that it was tested, or why none was.

    """

    model_config = ConfigDict(frozen=True)

    schema_version: Literal[1, 2] = 2
    created: str
    producer: str
    device: dict[str, Any]
    versions: dict[str, str]
    steps: tuple[Step, ...]
    gpu: str = ""

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
        gpu=_gpu_verdict(device, steps),
    )


def _gpu_verdict(device: dict[str, Any], steps: tuple[Step, ...]) -> str:
    """What the report says of a GPU. A backend of a GPU that was skipped tested nothing."""
    from hipa_deploy.generate.runner import CPU_BACKENDS

    if device["gpu"] is None:
        return "no GPU was tested: no NVIDIA GPU answers here"
    name = device["gpu"]["name"]
    ran = []
    for step in steps:
        backend = step.name.removeprefix("run ")
        on_gpu = step.name != backend and backend not in CPU_BACKENDS
        if on_gpu and step.outcome != "skipped":
            ran.append(f"{backend} {step.outcome}")
    if not ran:
        return f"no GPU was tested: no backend runs on the {name} here"
    return f"{name} was tested: {', '.join(ran)}"


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


class _Findings(BaseModel):
    """What a step found: a line, and what ``Step`` has of it."""

    detail: str
    figures: dict[str, Any] = {}
    checks: tuple[Check, ...] = ()
    validity: Validity | None = None
    problems: tuple[str, ...] = ()


def _attempt(name: str, work: Callable[[], _Findings]) -> Step:
    """Do ``work``; its problems, or whatever it raises, are the step's outcome."""
    started = time.perf_counter()
    with warnings.catch_warnings(record=True) as caught:
        # Every warning is recorded, also one that this process has seen before.
        warnings.simplefilter("always")
        try:
            found = work()
        except Exception as error:  # the report is for errors that nobody foresaw
            found = _Findings(detail="", problems=(describe(error),))
    seconds = round(time.perf_counter() - started, 3)

    # RuntimeWarning is what this project warns with; other libraries' deprecations are no news.
    notes = []
    for warning in caught:
        if issubclass(warning.category, RuntimeWarning):
            notes.append(str(warning.message))
    return Step(
        name=name,
        outcome="failed" if found.problems else "passed",
        detail=" ".join(found.problems) or found.detail,
        seconds=seconds,
        figures=found.figures,
        notes=tuple(notes),
        checks=found.checks,
        validity=found.validity,
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


def _build(bundle: Bundle, library: str, has_gpu: bool, console: Console) -> _Findings:
    """Build engines of every stage; without a GPU, where none could run, of the smallest alone."""
    from hipa_deploy.engines.build.build_bundle import build_bundle

    stages = bundle.manifest.stages
    chosen = stages
    if not has_gpu:
        chosen = (min(stages, key=lambda stage: bundle.stage_path(stage.spec.name).stat().st_size),)
    part = Bundle(bundle.root, bundle.manifest.model_copy(update={"stages": chosen}))

    figures = {}
    checks = []
    for engine in build_bundle(part, backend=library, console=console):
        sidecar = engine.sidecar
        figures[engine.stage] = {
            "bytes": sidecar.engine_bytes,
            "seconds": sidecar.build_seconds,
        }
        # An engine that fails its gate is an error of build_bundle: it does not come here.
        built = Check(
            name=f"engine of {engine.stage}",
            measured=f"{sidecar.engine_bytes / 1e6:.1f} MB in {sidecar.build_seconds:.1f} s",
            bound="builds; passes its gate" if has_gpu else "builds; no GPU to run it on",
            outcome="passed",
        )
        checks.append(built)
    return _Findings(
        detail=f"{len(figures)} of {len(stages)} engines: {', '.join(figures)}",
        figures=figures,
        checks=tuple(checks),
    )


def _run(bundle: Bundle, backend: str, console: Console) -> _Findings:
    """The self-check, then a latency measurement; a gate that fails is a problem."""
    from hipa_deploy.engines.latency.measure import profile_pipeline

    with OneStepPipeline.load(bundle.root, backend) as pipe:
        check = check_pipeline(pipe)
        latency = profile_pipeline(pipe, runs=RUNS, seconds=SECONDS, warmup=WARMUP, console=console)
        stage_checks = {**check.stages, END_TO_END: check.end_to_end}
        graph_problems = _graph_problems(pipe)
        figures = {
            "self_check": {name: str(stage_check) for name, stage_check in stage_checks.items()},
            "p50_ms": round(latency.end_to_end.p50_ms, 3),
            "first_ms": latency.end_to_end.first_ms,
            "load_seconds": latency.load_seconds,
            # Only stages that run on engines know these.
            "device_ms": getattr(pipe.stages, "device_ms", None),
            "device_memory_mib": getattr(pipe.stages, "device_memory_mib", None),
            "graph_problems": graph_problems,
        }

    checks = [_parity_check(name, stage_check) for name, stage_check in stage_checks.items()]
    if latency.validity is not None:
        checks.append(_time_check(latency.end_to_end.p50_ms, latency.validity))
    for problem in graph_problems:
        checks.append(Check(name="CUDA graph", measured=problem, bound="", outcome="noted"))

    parity = check.end_to_end.parity
    psnr = f"{parity.psnr_db:.1f} dB from PyTorch FP32" if parity else ""
    runs = latency.end_to_end.runs
    return _Findings(
        detail=f"{psnr}, p50 {latency.end_to_end.p50_ms:.2f} ms over {runs} runs",
        figures=figures,
        checks=tuple(checks),
        validity=latency.validity,
        problems=check.problems,
    )


def _parity_check(name: str, check: StageCheck) -> Check:
    """How close a stage, or the whole, is to PyTorch."""
    measured = check.problem or "nothing to measure"
    if check.parity:
        measured = f"{check.parity.psnr_db:.1f} dB from PyTorch FP32"
    return Check(
        name=name,
        measured=measured,
        bound=f"at least {check.least_psnr_db:.0f} dB",
        outcome="failed" if check.problem else "passed",
    )


def _time_check(p50_ms: float, validity: Validity) -> Check:
    """The time of an image, and whether it counts."""
    measured = f"p50 {p50_ms:.2f} ms, {validity.queries} queries in {validity.seconds:.1f} s"
    if validity.p99_estimate_ms is not None:
        measured += f", p99 below {validity.p99_estimate_ms:.2f} ms"
    if not validity.valid:
        measured += f": {'; '.join(validity.reasons)}"
    return Check(
        name="time of a batch",
        measured=measured,
        bound=f"{validity.least_queries} queries, {validity.least_seconds:g} s, steady",
        outcome="passed" if validity.valid else "invalid",
    )


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

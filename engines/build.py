"""From a bundle's ONNX to engines, one stage at a time, each in a process of its own."""

from __future__ import annotations

import contextlib
import fcntl
import importlib.util
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import IO

from pydantic import ValidationError
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TaskProgressColumn, TextColumn, TimeElapsedColumn

import hipa_deploy
from hipa_deploy.bundle import Bundle, StageSpec
from hipa_deploy.engines.build_worker import Event, Job, Outcome, environment
from hipa_deploy.engines.device import find_gpu
from hipa_deploy.engines.engine import (
    FOLDER,
    BuildOptions,
    EngineKey,
    Sidecar,
    check_engine_file,
    engine_path,
    key_for,
    read_sidecar,
)
from hipa_deploy.engines.flavour import Flavour, as_flavour, load_tensorrt
from hipa_deploy.engines.target import resolve_target
from hipa_deploy.errors import HipaError, MissingDependencyError
from hipa_deploy.files import write_file
from hipa_deploy.hashing import file_sha256

WORKER = (sys.executable, "-m", "hipa_deploy.engines.build_worker")

Report = Callable[[Event], None]


@dataclass(frozen=True)
class BuiltEngine:
    """An engine on disk. ``up_to_date``: it was there with an equal key, and nothing was built."""

    stage: str
    path: Path
    sidecar: Sidecar
    up_to_date: bool


def build_bundle(
    bundle: Bundle,
    *,
    backend: str,
    target: str = "auto",
    options: BuildOptions = BuildOptions(),
    console: Console | None = None,
) -> list[BuiltEngine]:
    """Build an engine for every stage into ``bundle.root/engines/<backend>-<target>``.

    ``backend`` is 'rtx' (ahead of time for the GPUs that ``target`` names; no GPU needed) or 'tensorrt' (for this
    machine's GPU). Progress goes to ``console``, by default the terminal's standard error.

    Raises:
        MissingDependencyError: TensorRT of that flavour, or polygraphy, is not installed.
        HipaError: a corrupt bundle, an unknown or impossible target, a build already running, a graph of another
            precision than the manifest says, or TensorRT's own refusal. Stages built before it remain.

    """
    flavour, trt = check_tools(backend)
    if flavour == "rtx" and options.timing_cache is not None:
        raise HipaError("TensorRT-RTX has no timing cache (it times nothing while building). Leave the option out.")
    bundle.verify()
    goal = resolve_target(target, flavour, find_gpu(), trt)
    folder = bundle.root / FOLDER / f"{flavour}-{goal.name}"
    keys = {stage: key_for(bundle, stage, flavour, trt.__version__, goal, options) for stage in bundle.stages}
    with locked(folder), _progress_bar(console) as bar:
        return [_build_stage(bundle, stage, key, folder, options, bar) for stage, key in keys.items()]


def check_tools(backend: str) -> tuple[Flavour, ModuleType]:
    """The flavour and its TensorRT module.

    Raises:
        MissingDependencyError: TensorRT of that flavour, or polygraphy, is not installed.
        HipaError: an unknown backend.

    """
    flavour = as_flavour(backend)
    trt = load_tensorrt(flavour)
    if importlib.util.find_spec("polygraphy") is None:
        raise MissingDependencyError("polygraphy", flavour)
    return flavour, trt


def _build_stage(
    bundle: Bundle, stage: str, key: EngineKey, folder: Path, options: BuildOptions, bar: Progress
) -> BuiltEngine:
    path = folder / f"{stage}-{key.short}.json"
    task = bar.add_task(stage, total=1.0, phase="")
    if (found := up_to_date(path, key)) is not None:
        bar.update(task, completed=1.0, phase="up to date")
        return BuiltEngine(stage, engine_path(path), found, up_to_date=True)
    scratch = folder / f".{path.stem}-{os.getpid()}.tmp"
    try:
        job = _job(bundle.stage_path(stage), bundle.stages[stage].spec, key, scratch, options)
        outcome = run_worker(job, _reporter(bar, task))
        sidecar = _keep(scratch, path, stage, key, outcome)
    except HipaError as error:
        raise HipaError(f"{stage}: {error}") from None
    finally:
        scratch.unlink(missing_ok=True)
    bar.update(task, completed=1.0, phase="built")
    return BuiltEngine(stage, engine_path(path), sidecar, up_to_date=False)


def _job(onnx: Path, spec: StageSpec, key: EngineKey, out: Path, options: BuildOptions) -> Job:
    return Job(
        flavour=key.flavour,
        onnx=onnx.resolve(),
        spec=spec,
        out=out.resolve(),
        precision=key.precision,
        compute_capabilities=key.compute_capabilities,
        options=options,
        timing_cache=options.timing_cache and options.timing_cache.resolve(),
    )


def up_to_date(path: Path, key: EngineKey) -> Sidecar | None:
    """The sidecar at ``path`` if its key is ``key`` and its engine is whole; else None."""
    try:
        sidecar = read_sidecar(path)
        check_engine_file(engine_path(path), sidecar, "")
    except (HipaError, OSError):
        return None
    return sidecar if sidecar.key == key else None


def _keep(scratch: Path, path: Path, stage: str, key: EngineKey, outcome: Outcome) -> Sidecar:
    """Give the engine its name, then write its sidecar: an engine without one is never used."""
    sidecar = Sidecar(
        producer=f"hipa-deploy {hipa_deploy.__version__}",
        stage=stage,
        key=key,
        precision_check=outcome.precision_check,
        engine_sha256=file_sha256(scratch),
        engine_bytes=scratch.stat().st_size,
        build_seconds=outcome.seconds,
        build_peak_mib=outcome.peak_mib,
    )
    scratch.replace(engine_path(path))
    write_file(path, sidecar.model_dump_json(indent=2).encode() + b"\n")
    return sidecar


def run_worker(job: Job, report: Report) -> Outcome:
    """Build in a subprocess; stops it when anything interrupts.

    Raises:
        HipaError: the build failed or the worker was killed; the message has TensorRT's last words.

    """
    outcome, error = None, None
    with tempfile.TemporaryFile("w+", errors="replace") as log, _worker(job, log) as process:
        for event in _events(process):
            report(event)
            outcome, error = event.outcome or outcome, event.error or error
        status = process.wait()
        if outcome is None:
            log.seek(0)
            raise HipaError(error or explain_failure(status, log.read()))
    return outcome


@contextmanager
def _worker(job: Job, log: IO[str]) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        WORKER,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=log,
        env=environment(job.flavour),
        text=True,
        start_new_session=True,  # a terminal's Ctrl-C reaches us alone, and we stop the worker
    )
    try:
        with contextlib.suppress(BrokenPipeError):  # it died at once: its status and log say why
            if process.stdin is not None:
                process.stdin.write(job.model_dump_json())
                process.stdin.close()
        yield process
    finally:
        _stop(process)


def _stop(process: subprocess.Popen[str]) -> None:
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(timeout=5)
        except subprocess.TimeoutExpired:  # inside a long native call
            process.kill()
            process.wait()


def _events(process: subprocess.Popen[str]) -> Iterator[Event]:
    for line in process.stdout or ():
        try:
            yield Event.model_validate_json(line)
        except ValidationError:
            raise HipaError(f"the build worker said {line.strip()!r}, not an event.") from None


def explain_failure(status: int, log: str) -> str:
    """One line on why a worker failed: the signal that killed it, TensorRT's last error, or the log's last line."""
    if status < 0:
        name = signal.Signals(-status).name
        hint = " (out of memory?)" if name == "SIGKILL" else ""
        return f"the build was killed by {name}{hint}."
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("[E]")] or lines[-1:]
    return re.sub(r"^\[E\]\s*", "", errors[-1]) if errors else f"the build ended with status {status}."


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold ``folder/.lock``; the system releases it when the process ends, however it ends.

    Raises:
        HipaError: another build holds it, or the folder cannot be written.

    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = (folder / ".lock").open("a+")
    except OSError as error:
        raise HipaError(
            f"{folder} cannot be written ({error.strerror}). Copy the bundle to a folder of your own."
        ) from None
    with handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            handle.seek(0)
            raise HipaError(f"{folder}: another build (process {handle.read().strip()}) is writing here.") from None
        handle.truncate(0)
        handle.write(str(os.getpid()))
        handle.flush()
        for leftover in folder.glob(".*.tmp"):  # of a build that was killed outright
            leftover.unlink()
        yield


def _progress_bar(console: Console | None) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[phase]}"),
        console=console or Console(stderr=True),
    )


def _reporter(bar: Progress, task: TaskID) -> Report:
    def report(event: Event) -> None:
        bar.update(task, completed=event.fraction, phase=event.phase)

    return report

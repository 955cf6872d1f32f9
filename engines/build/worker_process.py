"""The process of the build worker: start it, read its events, stop it, explain its failure."""

from __future__ import annotations

import contextlib
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import IO

from pydantic import ValidationError

from hipa_deploy.engines.build.worker import Event, Job, Outcome, environment
from hipa_deploy.errors import HipaError

WORKER = (sys.executable, "-m", "hipa_deploy.engines.build.worker")

# TensorRT reports a tactic that does not fit as an error, and goes on with another.
_SKIPPED = r"[Ss]kipping tactic|insufficient to use tactic"
_HARMLESS = re.compile(_SKIPPED + "|do not have sufficient memory|Tactic Device request")

Report = Callable[[Event], None]


def run_worker(job: Job, report: Report) -> Outcome:
    """Run a build in a subprocess, and stop the subprocess if anything interrupts.

    Args:
        job: what to build.
        report: is called with every event. An exception from it, such as KeyboardInterrupt, ends
            the build.

    Raises:
        HipaError: the build failed or the worker was killed; the message has the last error that
            TensorRT printed.

    """
    outcome = None
    error = None
    # The log is a file and not a pipe: nobody reads it during the build, and a full pipe would
    # block the worker.
    with (
        tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as log,
        _worker(job, log) as process,
    ):
        for event in _events(process):
            report(event)
            outcome = event.outcome or outcome
            error = event.error or error
        status = process.wait()
        log.seek(0)
        printed = log.read()
        if outcome is None:
            raise HipaError(error or explain_failure(status, printed))
    return outcome.model_copy(update={"skipped_tactics": count_skipped_tactics(printed)})


@contextmanager
def _worker(job: Job, log: IO[str]) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        WORKER,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=log,
        env=environment(job.library, job.myelin),
        encoding="utf-8",
        # Ctrl-C in a terminal then reaches this process alone, which stops the worker in order.
        start_new_session=True,
    )
    try:
        # A worker that died at once leaves a broken pipe; its status and log say why it died.
        with contextlib.suppress(BrokenPipeError):
            if process.stdin is not None:
                # It stays open: its end tells the worker that this process is gone.
                process.stdin.write(job.model_dump_json() + "\n")
                process.stdin.flush()
        yield process
    finally:
        _stop(process)
        with contextlib.suppress(BrokenPipeError):
            if process.stdin is not None:
                process.stdin.close()


def _stop(process: subprocess.Popen[str]) -> None:
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(timeout=5)
        except subprocess.TimeoutExpired:  # it is inside a long native call
            process.kill()
            process.wait()


def _events(process: subprocess.Popen[str]) -> Iterator[Event]:
    for line in process.stdout or ():
        try:
            yield Event.model_validate_json(line)
        except ValidationError:
            raise HipaError(
                f"the build worker printed {line.strip()!r}. Expected an event as JSON. "
                "Report it with hipa-doctor --self-test."
            ) from None


def explain_failure(status: int, log: str) -> str:
    """Explain in one line why a worker failed.

    The line is the signal that killed the worker, or the last error of TensorRT in the log, or the
    last line of the log.

    Args:
        status: the exit status; negative for a signal, as in ``subprocess``.
        log: what the worker printed on stderr.

    Example:
        >>> explain_failure(1, "[W] slow\\n[E] In node 3: Det\\nTraceback")
        'In node 3: Det'

    """
    if status < 0:
        name = signal.Signals(-status).name
        hint = " (out of memory?)" if name == "SIGKILL" else ""
        return f"the build was killed by {name}{hint}."

    # Errors about tactics that did not fit are no reason: TensorRT goes on with other tactics.
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    errors = [line for line in lines if _is_error(line)]
    if errors:
        return re.sub(r"^\[E\]\s*", "", errors[-1])
    if lines:
        return re.sub(r"^\[E\]\s*", "", lines[-1])
    return f"the build ended with status {status}."


def _is_error(line: str) -> bool:
    return line.startswith("[E]") and not _HARMLESS.search(line)


def count_skipped_tactics(log: str) -> int:
    """Count the tactics that TensorRT skipped because they need more memory.

    That is harmless, though TensorRT prints some of them as errors.
    """
    return sum(re.search(_SKIPPED, line) is not None for line in log.splitlines())

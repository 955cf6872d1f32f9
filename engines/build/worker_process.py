"""The build worker's process: started, heard, stopped, and its failure explained in one line."""

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
        log.seek(0)
        said = log.read()
        if outcome is None:
            raise HipaError(error or explain_failure(status, said))
    return outcome.model_copy(update={"skipped_tactics": count_skipped_tactics(said)})


@contextmanager
def _worker(job: Job, log: IO[str]) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        WORKER,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=log,
        env=environment(job.library),
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
    """One line on why a worker failed.

    It is the signal that killed it, TensorRT's last error, or the log's last line.
    """
    if status < 0:
        name = signal.Signals(-status).name
        hint = " (out of memory?)" if name == "SIGKILL" else ""
        return f"the build was killed by {name}{hint}."
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    errors = [
        line for line in lines if line.startswith("[E]") and not _HARMLESS.search(line)
    ] or lines[-1:]
    return (
        re.sub(r"^\[E\]\s*", "", errors[-1]) if errors else f"the build ended with status {status}."
    )


def count_skipped_tactics(log: str) -> int:
    """How many tactics TensorRT skipped because they need more memory.

    That is harmless, though it prints them as errors.
    """
    return sum(re.search(_SKIPPED, line) is not None for line in log.splitlines())

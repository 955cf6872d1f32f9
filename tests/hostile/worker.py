"""Runs commands one by one, each in a child with limits: ``python -m tests.hostile.worker``.

The parent imports what the commands need once, and a child of it starts in milliseconds. The parent
itself opens no session and starts no thread, so that a child is as good as a new process.

Reads a case a line as JSON: {"argv": [...], "folder": ..., "seconds": ..., "mib": ..., "forbidden":
[modules]}. Writes an outcome a line: {"code": exit status or minus the signal, "printed": stderr,
"seconds": ..., "cpu_seconds": of the child}.
"""

from __future__ import annotations

import importlib
import json
import os
import resource
import signal
import sys
import tempfile
import time
from importlib.abc import MetaPathFinder
from pathlib import Path

MIB = 1 << 20
# What the children would each import anew.
IMPORTED = (
    "numpy",
    "onnxruntime",
    "PIL.Image",
    "tokenizers",
    "hipa_deploy.doctor.examine",
    "hipa_deploy.generate.pipeline",
    "hipa_deploy.generate.swap_stage",
    "tests.hostile.readers",
)


# The same of what reads models and trains.
HEAVY = (
    "diffusers",
    "peft",
    "transformers",
    "hipa_deploy.export.export_bundle",
    "hipa_deploy.train.train_adaptor",
    "hipa_deploy.train.prediction.training_cost",
)


def main() -> None:
    from hipa_deploy.commands.app import main as hipa

    # As ``main`` sets them, before anything imports these libraries.
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    for module in (*IMPORTED, *(HEAVY if "heavy" in sys.argv else ())):
        importlib.import_module(module)
    for line in sys.stdin:
        case = json.loads(line)
        outcome = _run(hipa, case)
        sys.stdout.write(json.dumps(outcome) + "\n")
        sys.stdout.flush()


def _run(hipa, case: dict) -> dict:
    started = time.perf_counter()
    with tempfile.TemporaryFile() as printed:
        child = os.fork()
        if child == 0:
            _child(hipa, case, printed.fileno())
        status, cpu = _wait(child, started + case["seconds"])
        printed.seek(0)
        text = printed.read(MIB).decode("utf-8", "replace")
    return {
        "code": status,
        "printed": text,
        "seconds": time.perf_counter() - started,
        "cpu_seconds": cpu,
    }


def _child(hipa, case: dict, printed: int) -> None:
    """Run the command and end the process; nothing of it returns."""
    code = 97
    try:
        os.dup2(os.open(os.devnull, os.O_RDWR), 0)
        os.dup2(os.open(os.devnull, os.O_RDWR), 1)
        os.dup2(printed, 2)
        os.chdir(case["folder"])
        sys.meta_path.insert(0, _Forbidden(case.get("forbidden", [])))
        now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        limit = now + case["mib"] * MIB
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_FSIZE, (256 * MIB, 256 * MIB))
        sys.stderr = os.fdopen(2, "w", buffering=1, errors="backslashreplace", closefd=False)
        if case["argv"][0] == "read":
            _read_in_place_of_commands(case["argv"][1], Path(*case["argv"][2:]))
        hipa(case["argv"])
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 98
    except BaseException:
        import traceback

        os.write(2, traceback.format_exc()[-4000:].encode("utf-8", "replace"))
    finally:
        os._exit(code)


def _read_in_place_of_commands(name: str, folder: Path) -> None:
    """Let ``hipa`` call a function of tests.hostile.readers, with all that it does around it."""
    from hipa_deploy.commands import app

    module, _, function = name.partition(":")
    reader = getattr(importlib.import_module(module), function)
    app.app = lambda **_: reader(folder)


class _Forbidden(MetaPathFinder):
    """Ends the process, with exit status 96, when it imports one of some packages.

    That a package is installed may still be asked, as ``hipa_deploy.extras`` does.
    """

    def __init__(self, packages: list[str]) -> None:
        self._packages = packages

    def find_spec(self, fullname, path=None, target=None):
        caller = sys._getframe(2)  # of the import system
        if fullname in self._packages and caller.f_globals["__name__"] != "importlib.util":
            os.write(2, f"{fullname} was imported\n".encode())
            os._exit(96)


def _wait(child: int, until: float) -> tuple[int, float]:
    """The exit status, or minus the signal, and the CPU seconds of the child.

    A child that takes too long is killed, with -9.
    """
    while time.perf_counter() < until:
        ended, status, usage = os.wait4(child, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status), usage.ru_utime + usage.ru_stime
        time.sleep(0.005)
    os.kill(child, signal.SIGKILL)
    usage = os.wait4(child, 0)[2]
    return -signal.SIGKILL, usage.ru_utime + usage.ru_stime


if __name__ == "__main__":
    main()

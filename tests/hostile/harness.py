"""Valid file -> mutation -> command: either the command works, or it is one line and exit code 1.

A ``Format`` says how to write a valid sample, which of its files is changed, how an attacker would
correct the hashes afterwards, and which command reads it. To add a format, add it to ``FORMATS`` in
tests/hostile/formats.py.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from tests.hostile.mutations import Edit, apply, mutations

ROOT = Path(__file__).parents[2]
FUZZING = "HIPA_FUZZ_CASES" in os.environ  # make fuzz
SECONDS = 30.0  # a case that takes longer hangs
MEMORY_MIB = 1536  # of address space, beyond what the imports take


def no_hashes(folder: Path) -> None:
    """For a format that holds no hashes."""


@dataclass(frozen=True)
class Format:
    """A file that the product reads.

    Attributes:
        name: of the test.
        write: makes a valid sample in an empty folder, which is done once.
        file: the file that is changed, relative to that folder; it may be a pattern of one file.
        kind: json, toml, npz, npy, onnx, safetensors, pickle, image, table, bytes or
            text: which mutations there are.
        command: the words after ``hipa``; the command runs in the folder. ('read', 'module:name',
            'sub-folder') calls a function in its place, with that folder or, without one, with '.'.
        fix: corrects the hashes that a change made wrong, as an attacker would.
        heavy: it needs torch, which the worker then imports once.

    """

    name: str
    write: Callable[[Path], object]
    file: str
    kind: str
    command: tuple[str, ...]
    fix: Callable[[Path], object] = no_hashes
    heavy: bool = False

    def path(self, folder: Path) -> Path:
        """The file in a sample."""
        return next(folder.glob(self.file)) if "*" in self.file else folder / self.file


@dataclass(frozen=True)
class Outcome:
    """How a command ended: its exit status, or minus the signal, what it printed, its times."""

    code: int
    printed: str
    seconds: float
    cpu_seconds: float

    @property
    def fault(self) -> str | None:
        """What is wrong with it; None for success, and for one line and exit code 1."""
        if self.code == 0:
            return None
        # A diagnosis of something that does not fit is printed on stdout, and ends with 1.
        if self.code == 1 and not self.printed.strip():
            return None
        lines = [line for line in self.printed.splitlines() if line.strip()]
        if self.code == 1 and len(lines) == 1 and lines[0].startswith("hipa: "):
            return None if len(lines[0]) < 3000 else "a line of thousands of characters"
        return f"exit {self.code} after {self.seconds:.1f} s, printed: {self.printed[-2000:]}"


class Worker:
    """The process that runs the commands (tests/hostile/worker.py)."""

    def __init__(self, *, heavy: bool = False) -> None:
        words = ["heavy"] if heavy else []
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.hostile.worker", *words],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=ROOT,
            text=True,
        )

    def run(
        self, folder: Path, command: tuple[str, ...], forbidden: tuple[str, ...] = ()
    ) -> Outcome:
        """Run ``hipa`` with these words in ``folder``; it may import no ``forbidden`` package."""
        case = {
            "argv": command,
            "folder": str(folder),
            "seconds": SECONDS,
            "mib": MEMORY_MIB,
            "forbidden": forbidden,
        }
        assert self._process.stdin
        assert self._process.stdout
        self._process.stdin.write(json.dumps(case) + "\n")
        self._process.stdin.flush()
        return Outcome(**json.loads(self._process.stdout.readline()))

    def close(self) -> None:
        assert self._process.stdin
        self._process.stdin.close()
        self._process.wait()


class Samples:
    """A valid sample of each format, and copies of it that are changed."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._changed = folder / "changed"

    def valid(self, what: Format) -> Path:
        folder = self._folder / what.write.__name__
        if not folder.exists():
            folder.mkdir(parents=True)
            what.write(folder)
        return folder

    def changed(self, what: Format, edits: list[Edit]) -> Path:
        """A copy of the sample with ``edits`` in its file; the copy before it is removed."""
        shutil.rmtree(self._changed, ignore_errors=True)
        shutil.copytree(self.valid(what), self._changed)
        apply(what.kind, what.path(self._changed), edits)
        what.fix(self._changed)
        return self._changed

    def edits(self, what: Format) -> st.SearchStrategy[list[Edit]]:
        """Changes of this format's file."""
        return mutations(what.kind, what.path(self.valid(what)))


def as_json(value: Any) -> str:
    return json.dumps(value)


def check_refused(what: Format, edits: list, worker: Worker, samples: Samples) -> None:
    """Check that a file with ``edits`` is refused in one line."""
    outcome = worker.run(samples.changed(what, edits), what.command)
    assert outcome.fault is None
    assert outcome.code == 1, "it was accepted"


def check_mutations(what: Format, worker: Worker, samples: Samples, cases: int) -> None:
    """Check that each of ``cases`` mutations succeeds, or is refused in one line."""

    @settings(
        max_examples=cases,
        deadline=None,
        derandomize=not FUZZING,
        # Each case is a process: shrinking takes minutes, so it is left to fuzzing.
        phases=[Phase.explicit, Phase.reuse, Phase.generate, *[Phase.shrink] * FUZZING],
        suppress_health_check=list(HealthCheck),
    )
    @given(data=st.data())
    def check(data: st.DataObject) -> None:
        edits = data.draw(samples.edits(what))
        outcome = worker.run(samples.changed(what, edits), what.command)
        assert outcome.fault is None

    check()

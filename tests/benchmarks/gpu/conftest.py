from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks.gpu.figures import PartFile
from benchmarks.gpu.job import Job


@pytest.fixture
def new_job(tmp_path: Path) -> Callable[..., Job]:
    """A tiny job of a part on the CPU, with more time than it needs."""

    def make(part: str, seconds: float = 300.0) -> Job:
        out = tmp_path / "out"
        work = tmp_path / "work"
        work.mkdir(exist_ok=True)
        file = PartFile(out, part, time.time() + seconds)
        return Job(out=out, work=work, device="cpu", tiny=True, file=file)

    return make

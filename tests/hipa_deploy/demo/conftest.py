"""A console that keeps what the demos print."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from rich.console import Console


@pytest.fixture
def console(tmp_path: Path) -> Iterator[Console]:
    with (tmp_path / "console.txt").open("w") as file:
        yield Console(record=True, width=160, file=file)

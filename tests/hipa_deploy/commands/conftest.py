"""How the commands' tests run a command."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from hipa_deploy.commands.app import main

Refused = Callable[..., str]


@pytest.fixture
def refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Refused:
    """Run a command that must fail as a user's mistake does; give what it wrote to stderr.

    A mistake is one line and exit code 1, and nothing is written to the current folder.
    """
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> str:
        before = sorted(tmp_path.rglob("*"))
        with pytest.raises(SystemExit) as stopped:
            main(list(arguments))
        error = capsys.readouterr().err
        assert stopped.value.code == 1
        assert error.count("\n") == 1
        assert sorted(tmp_path.rglob("*")) == before
        return error

    return run

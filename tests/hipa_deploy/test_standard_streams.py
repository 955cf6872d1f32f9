"""Standard streams that the shell closed, and readers that go away, as in ``| head -1``."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from hipa_deploy.commands.app import main
from tests.test_cli_surface import SURFACE

VERBS = sorted({name.split()[0] for name in SURFACE})
PLAN = ("build", "emoji", "--for", "orin-nano", "--dry-run")
INIT = (
    *("init", "--device", "cpu", "--model", "emoji", "--adaptor", "emoji"),
    *("--task", "generate", "--prefer", "speed"),
)
SAID = "hipa: nothing reads the output any more, so the command stopped."


def run_unread(arguments: tuple[str, ...], folder: Path) -> tuple[int, str]:
    """Run a command whose standard output is a pipe that nobody reads; its code and errors."""
    reading, writing = os.pipe()
    os.close(reading)
    try:
        result = subprocess.run(
            [sys.executable, "-m", "hipa_deploy", *arguments],
            cwd=folder,
            stdout=writing,
            stderr=subprocess.PIPE,
            text=True,
        )
    finally:
        os.close(writing)
    return result.returncode, result.stderr


def run_closed(arguments: tuple[str, ...], folder: Path, redirection: str) -> tuple[int, str]:
    """Run a command with a stream closed by the shell; its code and what it still writes."""
    result = subprocess.run(
        ["sh", "-c", f'"$0" -m hipa_deploy "$@" {redirection}', sys.executable, *arguments],
        cwd=folder,
        capture_output=True,
        text=True,
    )
    return result.returncode, result.stdout + result.stderr


@pytest.mark.parametrize("verb", VERBS)
def test_a_help_that_nobody_reads_ends_in_silence(verb: str) -> None:
    """In this process, with a child's descriptors: seventeen starts would take long."""
    child = os.fork()
    if child == 0:
        _help_to_nobody(verb)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 141


def _help_to_nobody(verb: str) -> None:
    """End this process with the exit code of a help whose reader has gone, or 99 if it spoke."""
    code = 98
    try:
        reading, writing = os.pipe()
        os.close(reading)
        os.dup2(writing, 1)
        errors, speaking = os.pipe()
        os.dup2(speaking, 2)
        os.close(speaking)
        sys.stdout = sys.__stdout__ = os.fdopen(1, "w", closefd=False)
        sys.stderr = sys.__stderr__ = os.fdopen(2, "w", closefd=False)
        try:
            main([verb, "--help"])
        except SystemExit as end:
            code = end.code
        sys.stderr.flush()
        os.set_blocking(errors, False)
        os.close(2)
        if os.read(errors, 1000):
            code = 99
    finally:
        os._exit(code)


@pytest.mark.parametrize("arguments", [("--help",), ("--version",), ()])
def test_hipa_alone_ends_in_silence(arguments: tuple[str, ...], tmp_path: Path) -> None:
    assert run_unread(arguments, tmp_path) == (141, "")


@pytest.mark.parametrize("arguments", [PLAN, INIT])
def test_work_that_nobody_reads_is_said(arguments: tuple[str, ...], tmp_path: Path) -> None:
    code, errors = run_unread(arguments, tmp_path)
    assert code == 141
    assert errors.splitlines()[-1].startswith(SAID)
    assert "Traceback" not in errors


def test_images_that_nobody_waits_for_are_said(tmp_path: Path) -> None:
    prompts = ("3d emoji of a red apple", "3d emoji of a lemon")
    code, errors = run_unread(("generate", "emoji", *prompts, "--out", "images"), tmp_path)
    assert code == 141
    assert errors.splitlines()[-1].startswith(SAID)


@pytest.mark.parametrize("redirection", [">&-", "2>&-", ">&- 2>&-", "<&-"])
def test_a_closed_stream_stops_nothing(redirection: str, tmp_path: Path) -> None:
    """The image is whole: nothing that a library prints is written into it."""
    arguments = ("generate", "emoji", "3d emoji of a red apple", "--out", "apple.png")
    code, _ = run_closed(arguments, tmp_path, redirection)
    assert code == 0
    assert (tmp_path / "apple.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "apple.png").read_bytes().endswith(b"IEND\xaeB`\x82")


def test_a_mistake_with_closed_errors_still_has_its_code(tmp_path: Path) -> None:
    assert run_closed(("build", "nope", "--backend", "rtx"), tmp_path, "2>&-") == (1, "")


def test_a_closed_connection_is_no_closed_output(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def failing(*_: object, **__: object) -> None:
        raise BrokenPipeError(32, "Broken pipe")

    monkeypatch.setattr("hipa_deploy.embedded.resolve_bundle", failing)
    with pytest.raises(SystemExit) as stopped:
        main(["build", "emoji", "--backend", "rtx"])
    assert stopped.value.code == 1
    assert "a connection was closed by the other side" in capsys.readouterr().err

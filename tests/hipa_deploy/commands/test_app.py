"""The command line as a whole: exit codes, one line for a mistake, a help that answers at once."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from typer.main import get_command

from hipa_deploy.commands import app as command_line
from hipa_deploy.commands.app import app, main

NUMERICS = {"numpy", "onnxruntime", "PIL", "torch", "diffusers", "transformers", "onnx"}


def test_an_unknown_command_is_a_mistake(refused: Callable[..., str]) -> None:
    assert "No such command" in refused("frobnicate")


def test_a_wrong_choice_is_told_in_our_words(refused: Callable[..., str]) -> None:
    line = refused("export", "--model", "emoji", "--out", "new", "--dtype", "fp8")
    assert line == "hipa: Invalid value for '--dtype': 'fp8' is not one of 'fp16', 'fp32'.\n"


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (FileNotFoundError(2, "No such file or directory", "a/b.png"), "a/b.png: No such file"),
        (OSError(28, "No space left on device"), "a file: No space left on device"),
    ],
)
def test_an_error_of_the_disk_is_one_line_with_a_remedy(
    error: OSError,
    message: str,
    refused: Callable[..., str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def failing(**options: object) -> None:
        raise error

    monkeypatch.setattr(command_line, "app", failing)
    text = refused("generate", "emoji", "apple")
    assert message in text
    assert "Check the path, its permissions and the free disk space." in text


def test_too_little_memory_is_one_line(
    refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(**options: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(command_line, "app", failing)
    message = "not enough memory (CUDA out of memory. Tried to allocate 2.00 GiB). Ask for less"
    assert message in refused("evaluate")


def test_a_bug_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(**options: object) -> None:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(command_line, "app", failing)
    with pytest.raises(ZeroDivisionError):
        main(["generate"])


def test_ctrl_c_is_exit_code_130(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(**options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(command_line, "app", interrupted)
    with pytest.raises(SystemExit) as stopped:
        main(["generate"])
    assert stopped.value.code == 130
    assert capsys.readouterr().err == "hipa: stopped\n"


def test_every_command_is_in_a_panel_of_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    text = capsys.readouterr().out
    panels = [command_line.START, command_line.CHAIN, command_line.IMAGES, command_line.MEASURE]
    places = [text.index(f" {panel} ") for panel in panels]
    assert places == sorted(places)
    assert {command.rich_help_panel for command in get_command(app).commands.values()} == {*panels}


def test_no_help_imports_numerics() -> None:
    names = ["", *get_command(app).commands]
    script = (
        "import sys\n"
        "from hipa_deploy.commands.app import main\n"
        f"for name in {names!r}:\n"
        "    try:\n"
        "        main([*name.split(), '--help'])\n"
        "    except SystemExit as stopped:\n"
        "        assert stopped.code == 0, name\n"
        "print(' '.join({module.split('.')[0] for module in sys.modules}))\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    loaded = set(result.stdout.splitlines()[-1].split())
    assert loaded.isdisjoint(NUMERICS)

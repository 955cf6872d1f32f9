"""The help of every command, and ``hipa init``."""

from __future__ import annotations

import shlex
from importlib.metadata import version
from itertools import product

import pytest
from typer.main import get_command
from typer.testing import CliRunner

from hipa_deploy.commands.app import app, main
from hipa_deploy.errors import HipaError
from hipa_deploy.guide.foreign_options import IMAGE_COMMANDS
from hipa_deploy.guide.init import init
from hipa_deploy.guide.option_groups import GROUP_OF
from hipa_deploy.guide.questions import QUESTIONS
from hipa_deploy.guide.route import Answers, route
from hipa_deploy.guide.usage_examples import EXAMPLES

COMMANDS = get_command(app).commands


def parse(line: str | list[str]) -> None:
    """Parse a command line of the project, without running it."""
    words = shlex.split(line) if isinstance(line, str) else line
    name = words[0].removeprefix("hipa-")
    words = words[1:]
    if name == "hipa":
        name = words[0]
        words = words[1:]
    if words and f"{name} {words[0]}" in COMMANDS:
        name = f"{name} {words[0]}"
        words = words[1:]
    COMMANDS[name].make_context(name, list(words))


def test_every_command_has_two_examples_that_parse() -> None:
    assert EXAMPLES.keys() == COMMANDS.keys()
    for lines in EXAMPLES.values():
        assert len(lines) == 2
        for line in lines:
            parse(line)


def test_every_option_is_in_a_group() -> None:
    for name, command in COMMANDS.items():
        for parameter in command.params:
            if parameter.param_type_name == "option":
                assert parameter.opts[0] in GROUP_OF or name == "init", f"{name} {parameter.opts}"


def test_a_help_shows_groups_examples_and_brackets() -> None:
    text = CliRunner().invoke(app, ["generate", "--help"], terminal_width=100).stdout
    for expected in ("Image", "Output", "Help", "Examples:", *EXAMPLES["generate"][0].split()[:1]):
        assert expected in text
    assert text.index(" Image ") < text.index(" Help ")
    for command in COMMANDS.values():
        for parameter in command.params:
            # Rich takes a word in square brackets for a style, and shows nothing of it.
            assert "[" not in (parameter.help or "")


@pytest.mark.parametrize(
    "arguments", [["--version"], ["generate", "--version"], ["build", "--version"]]
)
def test_the_version_is_printed_by_every_command(
    arguments: list[str], capsys: pytest.CaptureFixture
) -> None:
    with pytest.raises(SystemExit) as end:
        main(arguments)
    assert end.value.code == 0
    assert capsys.readouterr().out == f"hipa-deploy {version('hipa-deploy')}\n"


@pytest.mark.parametrize(
    ("option", "reason"),
    [
        ("--steps", "One step, always"),
        ("--guidance-scale", "no guidance at run time"),
        ("--negative-prompt", "no negative prompt"),
        ("--sampler", "no scheduler"),
        ("--device", "--backend"),
    ],
)
@pytest.mark.parametrize("command", IMAGE_COMMANDS)
def test_options_of_other_tools_are_explained(
    command: str, option: str, reason: str, capsys: pytest.CaptureFixture
) -> None:
    with pytest.raises(SystemExit) as end:
        main([command, "emoji", "a", option, "4"])
    assert end.value.code == 1
    line = capsys.readouterr().err
    assert reason in line
    assert line.count("\n") == 1


def test_an_option_that_no_tool_has_is_only_unknown(capsys: pytest.CaptureFixture) -> None:
    for arguments in (["generate", "emoji", "a", "--bananas"], ["doctor", "--steps", "4"]):
        with pytest.raises(SystemExit):
            main(arguments)
        assert "No such option" in capsys.readouterr().err


MODELS = ("emoji", "runwayml/stable-diffusion-v1-5")
ADAPTORS = ("none", "emoji", "hyper.safetensors")
CHOICES = {question.name: tuple(question.choices) for question in QUESTIONS}


@pytest.mark.parametrize("device", CHOICES["device"])
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("adaptor", ADAPTORS)
def test_every_route_has_commands_that_parse(device: str, model: str, adaptor: str) -> None:
    for task, prefer in product(CHOICES["task"], CHOICES["prefer"]):
        steps = route(Answers(device, model, adaptor, task, prefer))
        verbs = []
        for step in steps:
            for command in step.commands:
                if isinstance(command, list):
                    parse(command)
                    verbs.append(command[0])
        assert verbs[0] == ("hipa-train" if adaptor == "none" else "hipa-export")
        assert ("hipa-build" in verbs) == (device != "cpu")
        assert f"hipa-{task}" in verbs


def test_init_asks_only_what_was_not_given(monkeypatch: pytest.MonkeyPatch) -> None:
    runner = CliRunner()
    monkeypatch.setattr("hipa_deploy.guide.init._has_terminal", lambda: True)
    result = runner.invoke(
        app, ["init", "--model", "emoji", "--adaptor", "emoji"], input="moon\northo\ncpu\n\n\n"
    )
    assert result.exit_code == 0
    assert "Expected one of: cpu, geforce" in result.stderr
    assert "Which model?" not in result.stderr
    assert "hipa-export --model emoji --adaptor emoji --task generate" in result.stdout


def test_init_without_a_terminal_names_the_option() -> None:
    with pytest.raises(HipaError, match="--adaptor is missing"):
        init(device="cpu", model="emoji", adaptor=None, task="edit", prefer="speed")
    with pytest.raises(HipaError, match=r"--task 'paint'\. Expected one of: generate"):
        init(device="cpu", model="emoji", adaptor="emoji", task="paint", prefer="speed")

"""Every command and Python block of the README works as it is written."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from typer.main import get_command

from hipa_deploy.commands.app import app

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
SCRIPTS = Path(sys.executable).parent


def blocks(language: str, text: str = README) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, flags=re.DOTALL)


def hipa_commands() -> list[str]:
    texts = [*blocks("bash"), *blocks("bash", (ROOT / "docs/profile.md").read_text())]
    lines = [line for block in texts for line in block.replace("\\\n", " ").splitlines()]
    return [line.split("#")[0].strip() for line in lines if line.startswith("hipa-")]


def parse(verb: str, arguments: list[str]) -> None:
    group = get_command(app)
    name, command, rest = group.resolve_command(
        group.make_context("hipa", [verb, *arguments]), [verb, *arguments]
    )
    command.make_context(name, rest)


def test_the_two_commands_are_in_the_makefile() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for target in ("demo", "test"):
        assert f"make {target}" in README
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE)


@pytest.mark.parametrize("line", hipa_commands())
def test_command_line_parses(line: str) -> None:
    name, *arguments = shlex.split(line)
    parse(name.removeprefix("hipa-"), arguments)


@pytest.mark.parametrize(
    "line",
    [line for line in hipa_commands() if line.startswith(("hipa-generate emoji", "hipa-doctor"))],
)
def test_quick_command_runs(line: str, tmp_path: Path) -> None:
    name, *arguments = shlex.split(line)
    subprocess.run([SCRIPTS / name, *arguments], cwd=tmp_path, check=True, capture_output=True)


@pytest.mark.parametrize("block", blocks("python"))
def test_python_block_runs(block: str, tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-c", block], cwd=tmp_path, check=True, capture_output=True)


def test_relative_links_exist() -> None:
    for link in re.findall(r"\]\((?!http)([^)#]+)", README):
        assert (ROOT / link).exists(), link

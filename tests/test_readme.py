"""Every command and Python block of the README works as it is written."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from typer.main import get_command

from hipa_deploy.cli import app

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
SCRIPTS = Path(sys.executable).parent


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def hipa_commands() -> list[str]:
    lines = [line for block in blocks("bash") for line in block.replace("\\\n", " ").splitlines()]
    return [line.split("#")[0].strip() for line in lines if line.startswith("hipa-")]


def test_the_two_commands_are_in_the_makefile() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for target in ("demo", "test"):
        assert f"make {target}" in README
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE)


@pytest.mark.parametrize("line", hipa_commands())
def test_command_line_parses(line: str) -> None:
    name, *arguments = shlex.split(line)
    command = get_command(app).commands[name.removeprefix("hipa-")]
    command.make_context(name, arguments)


@pytest.mark.parametrize(
    "line", [line for line in hipa_commands() if line.startswith(("hipa-generate emoji", "hipa-doctor"))]
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

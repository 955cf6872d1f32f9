"""Every command and Python block of the README works as it is written."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from typer.main import get_command

from hipa_deploy.commands.app import app

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
SCRIPTS = Path(sys.executable).parent


def blocks(language: str, text: str = README) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, flags=re.DOTALL)


def hipa_commands() -> list[str]:
    """hipa-… lines of the README and of the page on latency, without comments."""
    latency = (ROOT / "docs/how-to/measure-latency.md").read_text()
    found = []
    for block in [*blocks("bash"), *blocks("bash", latency)]:
        for line in block.replace("\\\n", " ").splitlines():
            if line.startswith("hipa-"):
                found.append(line.split("#")[0].strip())
    return found


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


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md"])
def test_relative_links_exist(page: str) -> None:
    text = (ROOT / page).read_text()
    for link in re.findall(r"\]\((?!http)([^)#]+)", text):
        assert (ROOT / link).exists(), link


def test_every_room_has_a_row_in_contributing() -> None:
    table = (ROOT / "CONTRIBUTING.md").read_text()
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    # What holds no code of its own, or is the ground that all rooms stand on.
    without = {"hipa_deploy", "hipa_deploy/embedded", "hipa_deploy/demo", "engines", "train"}
    for folder in set(settings["package-dir"].values()) - without:
        assert f"`{folder}`" in table, folder

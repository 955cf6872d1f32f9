"""Pages of docs/: their commands parse, their links lead somewhere, their tables are what the code has."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from typer.main import get_command

from hipa_deploy.commands.app import app
from hipa_deploy.engines.store.engine_key import EngineKey
from hipa_deploy.engines.store.sidecar import Sidecar

ROOT = Path(__file__).parents[1]
PAGES = sorted((ROOT / "docs").glob("*.md"))


def commands(page: Path) -> list[str]:
    """hipa-… lines of a page's bash blocks, without comments."""
    blocks = re.findall(r"```bash\n(.*?)```", page.read_text(), flags=re.DOTALL)
    lines = [
        line.split(" #")[0].strip()
        for block in blocks
        for line in block.replace("\\\n", " ").splitlines()
    ]
    return [line for line in lines if line.startswith("hipa-")]


@pytest.mark.parametrize(
    ("page", "line"), [(page.name, line) for page in PAGES for line in commands(page)]
)
def test_command_line_parses(page: str, line: str) -> None:
    name, *arguments = shlex.split(line.removeprefix("hipa-"))
    known = get_command(app).commands
    if arguments and f"{name} {arguments[0]}" in known:  # a name of two words: hipa-profile compare
        name = f"{name} {arguments.pop(0)}"
    known[name].make_context(name, arguments)


def anchors(page: Path) -> set[str]:
    titles = re.findall(r"^#+ (.+)$", page.read_text(), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_links_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\((?!http)([^)\s]+)\)", page.read_text()):
        path, _, anchor = link.partition("#")
        target = (page.parent / path) if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def first_cells(page: str, heading: str) -> set[str]:
    """Names in the first column of the tables under a heading."""
    section = (ROOT / "docs" / page).read_text().split(f"\n## {heading}\n")[1].split("\n## ")[0]
    return {
        name
        for row in re.findall(r"^\| (.+?) \|", section, flags=re.MULTILINE)
        for name in row.split(", ")
    }


def test_the_options_are_those_of_hipa_build() -> None:
    told = {
        re.match(r"`(--[\w-]+)", cell)[1]
        for cell in first_cells("engines.md", "Options")
        if cell[0] == "`"
    }
    build = get_command(app).commands["build"]
    real = {
        option for parameter in build.params for option in parameter.opts if option.startswith("--")
    }
    assert told == real - {"--backend", "--target", "--help"}


def test_the_sidecar_is_the_codes() -> None:
    told = first_cells("engines.md", "The sidecar")
    assert {*Sidecar.model_fields, *EngineKey.model_fields} == told - {"of key"}

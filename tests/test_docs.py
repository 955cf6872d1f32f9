"""Pages of docs/: commands parse, links lead somewhere, Python runs, tables are the code's."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from typer.main import get_command

from hipa_deploy.commands.app import app
from hipa_deploy.engines.store.engine_key import EngineKey
from hipa_deploy.engines.store.sidecar import Sidecar

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md"))
# Files of the project that name a page of docs/.
NAMING = [
    path
    for pattern in ("*.md", "*.yml", "*.toml", "docker/*", "*/**/*.py", "*/**/*.toml")
    for path in ROOT.glob(pattern)
    if not path.relative_to(ROOT).parts[0].startswith((".venv", "build", "site"))
]


def blocks(page: str, language: str) -> list[str]:
    """The fenced blocks of a language."""
    text = (DOCS / page).read_text(encoding="utf-8")
    return re.findall(rf"```{language}\n(.*?)```", text, flags=re.DOTALL)


def commands(page: str) -> list[str]:
    """hipa-… lines of a page's bash blocks, without comments."""
    found = []
    for block in blocks(page, "bash"):
        for line in block.replace("\\\n", " ").splitlines():
            command = line.split(" #")[0].strip()
            if command.startswith("hipa-"):
                found.append(command)
    return found


@pytest.mark.parametrize(
    ("page", "line"), [(page, line) for page in PAGES for line in commands(page)]
)
def test_command_line_parses(page: str, line: str) -> None:
    name, *arguments = shlex.split(line.removeprefix("hipa-"))
    known = get_command(app).commands
    if arguments and f"{name} {arguments[0]}" in known:  # a name of two words: hipa-profile compare
        name = f"{name} {arguments.pop(0)}"
    known[name].make_context(name, arguments)


# A block of another language than `python`, such as `py`, needs files that the test has not.
PYTHON = [(page, block) for page in PAGES for block in blocks(page, "python")]


@pytest.mark.parametrize(
    ("page", "block"), PYTHON, ids=[f"{page}-{number}" for number, (page, _) in enumerate(PYTHON)]
)
def test_python_block_runs(page: str, block: str, tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-c", block], cwd=tmp_path, check=True, capture_output=True)


def anchors(page: Path) -> set[str]:
    """What a link to a heading of this page may end with."""
    titles = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def is_made_from_code(page: Path) -> bool:
    """Such a page has headings that only the built site has; tests/test_site.py checks those."""
    return "render_macros: true" in page.read_text(encoding="utf-8")


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    file = DOCS / page
    for link in re.findall(r"\]\((?!http)([^)\s]+)\)", file.read_text(encoding="utf-8")):
        path, _, anchor = link.partition("#")
        target = (file.parent / path) if path else file
        assert target.exists(), link
        assert target.resolve().is_relative_to(DOCS), f"{link} is not part of the site"
        if anchor and not is_made_from_code(target):
            assert anchor in anchors(target), link


def test_pages_that_the_code_names_exist() -> None:
    for path in NAMING:
        text = path.read_text(encoding="utf-8", errors="ignore")
        for named in re.findall(r"\bdocs/[\w/-]+\.(?:md|py|png|svg|json)\b", text):
            assert (ROOT / named).exists(), f"{path.relative_to(ROOT)} names {named}"


def first_cells(page: str, heading: str) -> set[str]:
    """Names in the first column of the tables under a heading."""
    text = (DOCS / page).read_text(encoding="utf-8")
    section = text.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    names = set()
    for row in re.findall(r"^\| (.+?) \|", section, flags=re.MULTILINE):
        names |= set(row.split(", "))
    return names


def test_the_options_are_those_of_hipa_build() -> None:
    documented = set()
    for cell in first_cells("reference/engines.md", "Options"):
        if cell[0] == "`":
            documented.add(re.match(r"`(--[\w-]+)", cell)[1])
    real = set()
    for parameter in get_command(app).commands["build"].params:
        real |= {option for option in parameter.opts if option.startswith("--")}
    assert documented == real - {"--backend", "--target", "--help", "--version"}


def test_the_sidecar_is_the_codes() -> None:
    documented = first_cells("reference/engines.md", "The sidecar")
    assert {*Sidecar.model_fields, *EngineKey.model_fields} == documented - {"of key"}


def test_the_teachers_picture_is_the_models() -> None:
    """The site cannot show a file from outside docs/, so that it has a copy."""
    copy = DOCS / "images/teacher-samples.png"
    assert copy.read_bytes() == (ROOT / "hipa_deploy/embedded/model/samples.png").read_bytes()

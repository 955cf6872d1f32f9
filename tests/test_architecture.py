"""The architecture page names functions that exist, and its picture shows every package."""

from __future__ import annotations

import ast
import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs/explanation/architecture.md"
# `path/to/module.py:Name` or `path/to/module.py:Class.method`, in backticks.
REFERENCE = re.compile(r"`([\w/]+\.py):([\w.]+)`")


def references() -> list[tuple[str, str]]:
    """Every (path, name) on the page, once each and in order."""
    return list(dict.fromkeys(REFERENCE.findall(PAGE.read_text(encoding="utf-8"))))


def defined_names(source: str) -> set[str]:
    """Functions, classes and constants of a module; members of its classes as Class.member."""
    names = set()
    for node in ast.parse(source).body:
        for name in _names_of(node):
            names.add(name)
        if isinstance(node, ast.ClassDef):
            for member in node.body:
                names |= {f"{node.name}.{name}" for name in _names_of(member)}
    return names


def _names_of(node: ast.stmt) -> list[str]:
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return [node.name]
    if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
        return [node.target.id]
    if isinstance(node, ast.Assign):
        return [target.id for target in node.targets if isinstance(target, ast.Name)]
    return []


def test_the_page_has_journeys() -> None:
    journeys = re.findall(r"^## (A .+)$", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert len(journeys) == 5
    assert len(references()) > 40


@pytest.mark.parametrize(("path", "name"), references())
def test_what_the_page_names_exists(path: str, name: str) -> None:
    file = ROOT / path
    assert file.is_file(), f"{path} does not exist: move the step on the page with the module"
    names = defined_names(file.read_text(encoding="utf-8"))
    assert name in names, f"{path} has no {name}: rename it on the page as well"


def test_names_are_found_in_a_module() -> None:
    source = "X = 1\nY: int = 2\ndef f(): ...\nclass C:\n    a: int\n    def m(self): ...\n"
    assert defined_names(source) == {"X", "Y", "f", "C", "C.a", "C.m"}


def draw_rooms() -> ModuleType:
    path = ROOT / "docs/draw_rooms.py"
    spec = importlib.util.spec_from_file_location("draw_rooms", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up there
    spec.loader.exec_module(module)
    return module


def test_the_picture_is_up_to_date() -> None:
    module = draw_rooms()
    drawn = module.OUT.read_text(encoding="utf-8")
    assert drawn == module.draw(), "run: python docs/draw_rooms.py"


def test_the_picture_shows_every_package() -> None:
    module = draw_rooms()
    shown = set()
    for house in (module.COMMANDS, module.CORE):
        shown |= {name for name, _ in house.rooms}
    for stage, house in (
        ("train", module.TRAIN),
        ("export", module.EXPORT),
        ("engines", module.ENGINES),
    ):
        shown.add(f"hipa_deploy.{stage}")
        shown |= {f"hipa_deploy.{stage}.{name}" for name, _ in house.rooms if name != "(top)"}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert shown == set(project["tool"]["setuptools"]["packages"])

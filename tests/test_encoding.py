"""Text files are UTF-8 whatever the locale: each place that opens one says so."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("hipa_deploy", "train", "export", "engines", "examples", "benchmarks", "docs")
FILES = sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))
MODES = set("rwxabt+")
# Functions that start a process or open a file, and the position of the mode.
MODE_AT = {"fdopen": 1, "TemporaryFile": 0, "NamedTemporaryFile": 0}


def name_of(call: ast.Call) -> str:
    if isinstance(call.func, ast.Attribute):
        return call.func.attr
    return call.func.id if isinstance(call.func, ast.Name) else ""


def mode_of(call: ast.Call, position: int) -> str | None:
    """The mode that a call names; '' if it names none, None if its argument is no mode."""
    given = [keyword.value for keyword in call.keywords if keyword.arg == "mode"]
    given += call.args[position : position + 1]
    if not given:
        return ""
    value = given[0].value if isinstance(given[0], ast.Constant) else None
    return value if isinstance(value, str) and set(value) <= MODES else None


def opens_text_by_locale(call: ast.Call) -> bool:
    """Whether a call opens text without saying in which encoding."""
    keywords = {keyword.arg for keyword in call.keywords}
    if "encoding" in keywords:
        return False
    name = name_of(call)
    is_method = isinstance(call.func, ast.Attribute)
    if is_method and name == "read_text":
        return not call.args
    if is_method and name == "write_text":
        return len(call.args) < 2
    if name in ("run", "Popen", "check_output"):
        return "text" in keywords or "universal_newlines" in keywords
    if name == "open":
        mode = mode_of(call, 0 if is_method else 1)
        # Bundle.open(root) and Image.open(path) have an argument that is no mode.
        return mode is not None and "b" not in mode
    if name in MODE_AT:
        mode = mode_of(call, MODE_AT[name])
        default = "r" if name == "fdopen" else "w+b"
        return "b" not in (mode or default)
    return False


def found(tree: ast.AST) -> Iterator[int]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and opens_text_by_locale(node):
            yield node.lineno


def test_every_text_file_is_opened_as_utf_8() -> None:
    places = []
    for path in FILES:
        for line in found(ast.parse(path.read_text(encoding="utf-8"))):
            places.append(f"{path.relative_to(ROOT)}:{line}")
    assert places == []


@pytest.mark.parametrize(
    ("code", "is_found"),
    [
        ("path.read_text()", True),
        ("path.read_text(encoding='utf-8')", False),
        ("path.write_text(text)", True),
        ("path.open()", True),
        ("path.open('a+')", True),
        ("path.open('rb')", False),
        ("open(path, 'w')", True),
        ("open(path, mode='wb')", False),
        ("Bundle.open(root)", False),
        ("subprocess.run(command, text=True)", True),
        ("subprocess.run(command, stdout=pipe)", False),
        ("os.fdopen(descriptor, 'w')", True),
        ("tempfile.TemporaryFile()", False),
    ],
)
def test_what_is_found(code: str, is_found: bool) -> None:
    assert bool(list(found(ast.parse(code)))) == is_found

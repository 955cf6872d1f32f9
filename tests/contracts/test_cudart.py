"""Every name of the CUDA runtime that the engines use exists in each pinned cuda-python, with as many parameters."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from make_surfaces import SURFACES

ROOT = Path(__file__).parents[2]
ENGINES = sorted((ROOT / "engines").rglob("*.py"))
PINNED = [*SURFACES.glob("cuda_*.pyi")]


def known(surface: Path) -> dict[str, int | None]:
    """Functions with their number of parameters; constants, classes and their members with None."""
    found: dict[str, int | None] = {}
    for node in ast.parse(surface.read_text()).body:
        if isinstance(node, ast.FunctionDef):
            found[node.name] = len(node.args.args)
        elif isinstance(node, ast.AnnAssign):
            found[ast.unparse(node.target)] = None
        elif isinstance(node, ast.ClassDef):
            parts = [
                ast.unparse(part.target) for part in node.body if isinstance(part, ast.AnnAssign)
            ]
            found |= dict.fromkeys([node.name, *parts, *(f"{node.name}.{part}" for part in parts)])
    return found


def used(tree: ast.AST) -> set[str]:
    """Names of CUDA's in a module, as attributes or as texts (``call(cudart, "cudaMalloc", size)``)."""
    texts = {
        node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    }
    attributes = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    return {name for name in texts | attributes if re.fullmatch(r"cuda[A-Z]\w+", name)}


def calls(tree: ast.AST) -> Iterator[tuple[str, int, bool]]:
    """Name, number of arguments, and whether there may be more, of ``call(cudart, name, …)`` and its callbacks."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            plain = [ast.unparse(argument) for argument in node.args]
            texts = [
                i
                for i, argument in enumerate(node.args)
                if re.fullmatch(r"'cuda[A-Z]\w+'", ast.unparse(argument))
            ]
            if texts and (ast.unparse(node.func) == "call" or plain[:1] == ["call"]):
                rest = node.args[texts[0] + 1 :]
                starred = sum(isinstance(argument, ast.Starred) for argument in rest)
                yield ast.literal_eval(plain[texts[0]]), len(rest) - starred, starred > 0


def misfits(source: str, surface: Path) -> list[str]:
    """What a module uses that the surface lacks, or calls with another number of arguments."""
    there, tree = known(surface), ast.parse(source)
    absent = sorted(used(tree) - set(there))
    wrong = [
        f"{name} takes {there[name]}, not {number}"
        for name, number, more in calls(tree)
        if (expected := there.get(name)) is not None
        and (number > expected if more else number != expected)
    ]
    return absent + wrong


@pytest.mark.parametrize("surface", PINNED, ids=lambda path: path.stem)
def test_the_engines_fit(surface: Path) -> None:
    assert {
        path.name: told for path in ENGINES if (told := misfits(path.read_text(), surface))
    } == {}


@pytest.mark.parametrize("surface", PINNED, ids=lambda path: path.stem)
@pytest.mark.parametrize("field", ["name", "major", "minor", "totalGlobalMem", "integrated"])
def test_device_properties_exist(surface: Path, field: str) -> None:
    assert f"cudaDeviceProp.{field}" in known(surface)


def test_the_versions_that_jetpack_and_desktops_take() -> None:
    assert {path.stem.split("-")[1].rpartition(".")[0][:4] for path in PINNED} >= {
        "12.6",
        "12.9",
        "13.4",
    }


@pytest.mark.parametrize(
    ("source", "told"),
    [
        ('call(cudart, "cudaMallocFast", 1)', "cudaMallocFast"),
        ("cudart.cudaMemcpyKind.cudaMemcpyDiskToDevice", "cudaMemcpyDiskToDevice"),
        ('call(cudart, "cudaMalloc", 1, 2)', "cudaMalloc takes 1, not 2"),
        ('stack.callback(call, cudart, "cudaFree")', "cudaFree takes 1, not 0"),
        ('call(cudart, "cudaMalloc", *ends, 1, 2)', "cudaMalloc takes 1, not 2"),
    ],
)
def test_mistakes_are_found(source: str, told: str) -> None:
    assert misfits(source, PINNED[0]) == [told]

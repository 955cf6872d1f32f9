"""What the engines use of the CUDA runtime exists in each pinned cuda-python.

That is every name, and for functions the number of parameters.
"""

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
            found[node.name] = None
            for part in node.body:
                if isinstance(part, ast.AnnAssign):
                    member = ast.unparse(part.target)
                    found[member] = None
                    found[f"{node.name}.{member}"] = None
    return found


def used(tree: ast.AST) -> set[str]:
    """CUDA's names in a module: attributes, and texts (``call(cudart, "cudaMalloc", size)``)."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            names.add(node.value)
        elif isinstance(node, ast.Attribute):
            names.add(node.attr)
    return {name for name in names if re.fullmatch(r"cuda[A-Z]\w+", name)}


def calls(tree: ast.AST) -> Iterator[tuple[str, int, bool]]:
    """Calls of CUDA functions: ``call(cudart, name, …)`` or ``callback(call, cudart, name, …)``.

    Yields the name, the number of arguments, and whether a starred one may bring more.
    """
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        plain = [ast.unparse(argument) for argument in node.args]
        names = [text for text in plain if re.fullmatch(r"'cuda[A-Z]\w+'", text)]
        if names and (ast.unparse(node.func) == "call" or plain[:1] == ["call"]):
            arguments = node.args[plain.index(names[0]) + 1 :]
            starred = sum(isinstance(argument, ast.Starred) for argument in arguments)
            yield ast.literal_eval(names[0]), len(arguments) - starred, starred > 0


def misfits(source: str, surface: Path) -> list[str]:
    """What a module uses that the surface lacks, or calls with another number of arguments."""
    there = known(surface)
    tree = ast.parse(source)
    found = sorted(used(tree) - set(there))
    for name, number, more in calls(tree):
        expected = there.get(name)
        if expected is None:
            continue
        fits = number <= expected if more else number == expected
        if not fits:
            found.append(f"{name} takes {expected}, not {number}")
    return found


@pytest.mark.parametrize("surface", PINNED, ids=lambda path: path.stem)
def test_the_engines_fit(surface: Path) -> None:
    for path in ENGINES:
        assert misfits(path.read_text(), surface) == [], path.name


@pytest.mark.parametrize("surface", PINNED, ids=lambda path: path.stem)
@pytest.mark.parametrize(
    "field",
    [
        "name", "major", "minor", "totalGlobalMem", "integrated",
        "pciDomainID", "pciBusID", "pciDeviceID",
    ],
)  # fmt: skip
def test_device_properties_exist(surface: Path, field: str) -> None:
    assert f"cudaDeviceProp.{field}" in known(surface)


def test_the_versions_that_jetpack_and_desktops_take() -> None:
    versions = {path.stem.split("-")[1].rpartition(".")[0][:4] for path in PINNED}
    assert versions >= {"12.6", "12.9", "13.4"}


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ('call(cudart, "cudaMallocFast", 1)', "cudaMallocFast"),
        ("cudart.cudaMemcpyKind.cudaMemcpyDiskToDevice", "cudaMemcpyDiskToDevice"),
        ('call(cudart, "cudaMalloc", 1, 2)', "cudaMalloc takes 1, not 2"),
        ('stack.callback(call, cudart, "cudaFree")', "cudaFree takes 1, not 0"),
        ('call(cudart, "cudaMalloc", *ends, 1, 2)', "cudaMalloc takes 1, not 2"),
    ],
)
def test_mistakes_are_found(source: str, expected: str) -> None:
    assert misfits(source, PINNED[0]) == [expected]

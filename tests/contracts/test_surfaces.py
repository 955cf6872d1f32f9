"""The pinned surfaces: what they are, and that they match what is installed.

Also the names that the engines look for by text, which no type checker sees.
"""

from __future__ import annotations

import ast
import importlib.metadata
import re
import shutil
import subprocess
from pathlib import Path

import make_surfaces
import pytest
from make_surfaces import SURFACES, read_surface
from strict_fake import fake_module
from typed_copy import touches_tensorrt

from hipa_deploy.engines.build import precision_check as precision
from hipa_deploy.engines.targets import target
from hipa_deploy.engines.tensorrt import library as tensorrt_library

ROOT = Path(__file__).parents[2]
CONSTRAINTS = dict(
    re.findall(r"^([\w-]+)==([^;\s]+)", (ROOT / "constraints.txt").read_text(), flags=re.M)
)
TENSORRT = sorted(SURFACES.glob("tensorrt*.pyi"))
INSTALLED = [
    ("tensorrt_rtx", "tensorrt_rtx", "tensorrt_rtx"),
    ("cuda-bindings", "cuda_bindings", "cuda.bindings.runtime"),
]

# Names that the engines compute: the code (module, expression), and every name it can come to.
COMPUTED = {
    ("precision_check", "getattr(trt.LayerType, name)"): [
        f"LayerType.{name}" for name in precision._HEAVY
    ],
    ("library", "getattr(trt.ComputeCapability, f'SM{capability}')"): [
        f"ComputeCapability.SM{sm}" for sm in target.PORTABLE
    ],
}


def test_each_pin_says_where_it_is_from() -> None:
    for path in SURFACES.iterdir():
        first, second, *_ = path.read_text().splitlines()
        assert re.fullmatch(
            rf"# Names, parameters and types alone, from {path.stem.split('-')[0]}\S*\.whl", first
        )
        assert re.match(r"# SHA-256 [0-9a-f]{64}, ", second)
        assert path.stat().st_size < 40_000


@pytest.mark.parametrize(("package", "family", "module"), INSTALLED)
def test_the_pin_is_what_is_installed(package: str, family: str, module: str) -> None:
    version = CONSTRAINTS[package]
    pin = SURFACES / f"{family}-{version}.pyi"
    assert pin.is_file(), (
        f"constraints.txt has {package} {version}: make its surface (make_surfaces.py)"
    )
    pytest.importorskip(module)
    if importlib.metadata.version(package) != version:
        pytest.skip(f"{package} {version} is pinned, another is installed")
    assert make_surfaces.describe(module) == read_surface(pin)


def names(path: Path) -> set[str]:
    """'Class', 'Class.member' and module constants of a surface."""
    found = set()
    for node in ast.parse(path.read_text()).body:
        found.add(_name(node))
        if isinstance(node, ast.ClassDef):
            found.update(f"{_name(node)}.{_name(part)}" for part in node.body)
    return found


def _name(node: ast.stmt) -> str:
    if isinstance(node, ast.AnnAssign):
        return ast.unparse(node.target)
    return getattr(node, "name", "")


def test_two_independent_readings_agree() -> None:
    """Two sources: tensorrt-stubs 10.13.0, and the bindings of 10.13.3 on empty libraries.

    Others made the stubs, from a TensorRT at work.
    """
    ours = names(SURFACES / "tensorrt-10.13.3.9.pyi")
    theirs = names(SURFACES / "tensorrt_stubs-10.13.0.35.1.pyi")
    assert {name for name in theirs - ours if "__" not in name} == set()


def test_a_name_that_is_looked_for_exists() -> None:
    """Names in hasattr and getattr: a checker accepts any, and one spelt wrong is never found."""
    everywhere = {"__members__"}
    for path in TENSORRT:
        for name in names(path):
            everywhere.update(name.split("."))
    looked_for = set()
    for path in filter(touches_tensorrt, (ROOT / "engines").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call):
                continue
            asks = ast.unparse(node.func) in ("getattr", "hasattr")
            if asks and isinstance(node.args[1], ast.Constant):
                looked_for.add((path.stem, node.args[1].value))
    assert {("library", "STRONGLY_TYPED"), ("library", "ComputeCapability")} <= looked_for
    assert {(module, name) for module, name in looked_for if name not in everywhere} == set()


@pytest.mark.parametrize("path", TENSORRT, ids=lambda path: path.stem)
def test_computed_names_exist(path: Path) -> None:
    there = names(path)
    for (module, _), wanted in COMPUTED.items():
        if module != "library" or path.name.startswith("tensorrt_rtx"):
            assert set(wanted) <= there


def test_every_computed_name_is_declared() -> None:
    found = set()
    for path in (ROOT / "engines").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            text = ast.unparse(node) if isinstance(node, ast.Call) else ""
            if text.startswith("getattr(trt") and not isinstance(node.args[1], ast.Constant):
                found.add((path.stem, text))
    assert found == set(COMPUTED)


@pytest.mark.parametrize("path", TENSORRT, ids=lambda path: path.stem)
def test_load_tensorrt_takes_every_version(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = fake_module(path, "tensorrt")
    monkeypatch.setattr(tensorrt_library.importlib, "import_module", lambda name: fake)
    assert tensorrt_library.load_tensorrt("tensorrt") is fake


@pytest.mark.skipif(
    not all(map(shutil.which, ("cc", "nm", "readelf"))), reason="needs a C compiler and binutils"
)
def test_empty_libraries_hold_what_a_binding_needs(tmp_path: Path) -> None:
    """On a binding made here, which calls createInferBuilder_INTERNAL from libnvinfer.so.10."""
    source = tmp_path / "binding.c"
    source.write_text(
        "int createInferBuilder_INTERNAL(void);\n"
        "int made(void) { return createInferBuilder_INTERNAL(); }\n"
    )
    stub = tmp_path / "libnvinfer.so.10"
    subprocess.run(
        ["cc", "-shared", "-fPIC", "-x", "c", "/dev/null", "-o", stub, f"-Wl,-soname,{stub.name}"],
        check=True,
    )
    binding = tmp_path / "tensorrt.so"
    command = ["cc", "-shared", "-fPIC", source, "-o", binding, "-Wl,--no-as-needed", stub]
    subprocess.run(command, check=True)
    make_surfaces.empty_libraries(binding, tmp_path / "libraries")
    symbols = subprocess.run(
        ["nm", "-D", tmp_path / "libraries/libnvinfer.so.10"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert " T createInferBuilder_INTERNAL" in symbols

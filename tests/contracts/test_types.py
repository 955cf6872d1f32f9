"""The engine modules, type-checked against every pinned surface of TensorRT and TensorRT-RTX."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
from make_surfaces import SURFACES
from typed_copy import touches_tensorrt, typed_copy

ROOT = Path(__file__).parents[2]
PINNED = sorted(path for path in SURFACES.glob("tensorrt*.pyi"))
ENGINES = [path for path in sorted((ROOT / "engines").glob("*.py")) if touches_tensorrt(path)]

# Objects of other libraries, which TensorRT's surfaces say nothing of: polygraphy (test_polygraphy.py), cuda-python
# (test_cudart.py), ONNX Runtime, the modules read by name in target.py, and logger classes of our own.
OTHERS = re.compile(
    r"poly|\w+\.poly|profile|(self\._|\w*\.)?cudart\b.*|properties|onnxruntime|_toml\(\)|recording_logger\(.*\)|logger"
)


class Complaint(NamedTuple):
    """A line of mypy's."""

    surface: str
    module: str
    line: int
    column: int
    text: str

    def __str__(self) -> str:
        return f"{self.surface}: {self.module}: {self.text}"


def check(folder: Path, sources: list[Path]) -> list[Complaint]:
    """What mypy says of typed copies of ``sources`` against each surface, in one run."""
    package = folder / "hipa_deploy"
    package.mkdir()
    for path in [*(ROOT / "hipa_deploy").iterdir(), ROOT / "engines"]:
        (package / path.name).symlink_to(path)
    copies = []
    for surface in PINNED:
        name = re.sub(r"\W", "_", surface.stem)
        (folder / f"{name}.pyi").symlink_to(surface)
        (folder / f"on_{name}").mkdir()
        for path in sources:
            copies.append(folder / f"on_{name}" / path.name)
            copies[-1].write_text(typed_copy(path, name))
        (folder / f"on_{name}" / "__init__.py").touch()
    flags = ["--ignore-missing-imports", "--follow-imports=silent", "--no-strict-optional", "--disallow-any-expr"]
    shown = ["--show-column-numbers", "--no-error-summary", "--hide-error-context", "--no-pretty", "--cache-dir=cache"]
    command = [sys.executable, "-m", "mypy", "--config-file=", *flags, *shown, *map(str, copies)]
    told = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert told.returncode in (0, 1), told.stderr
    return [_parse(line) for line in told.stdout.splitlines() if ": error: " in line]


def _parse(line: str) -> Complaint:
    place, text = line.split(": error: ", 1)
    name, row, column = place.rsplit(":", 2)
    return Complaint(Path(name).parent.name.removeprefix("on_"), Path(name).stem, int(row), int(column), text)


def is_any(complaint: Complaint) -> bool:
    return bool(
        re.match(
            r'Expression (has type|type contains) "(Any|.*\bAny\b.*)"|Expression type contains "Any"', complaint.text
        )
    )


@pytest.fixture(scope="module")
def complaints(tmp_path_factory: pytest.TempPathFactory) -> list[Complaint]:
    return check(tmp_path_factory.mktemp("types"), ENGINES)


def test_every_module_that_touches_tensorrt_is_looked_at() -> None:
    assert {"build_worker", "flavour", "precision", "runtime"} <= {path.stem for path in ENGINES}
    assert {path.stem.split("-")[0] for path in PINNED} == {"tensorrt", "tensorrt_rtx", "tensorrt_stubs"}


def test_the_engines_fit_every_surface(complaints: list[Complaint]) -> None:
    assert [str(complaint) for complaint in complaints if not is_any(complaint) and not rtx_alone(complaint)] == []


def rtx_alone(complaint: Complaint) -> bool:
    """Whether TensorRT lacks what set_compute_capabilities, never called for it, uses of TensorRT-RTX."""
    lacking = re.search(
        r'has no attribute "(?:num_compute_capabilities|set_compute_capability|ComputeCapability)"', complaint.text
    )
    return lacking is not None and complaint.module == "flavour" and not complaint.surface.startswith("tensorrt_rtx")


def test_nothing_of_tensorrt_goes_unchecked(complaints: list[Complaint], tmp_path: Path) -> None:
    """An attribute read off an ``Any`` is checked by nobody: its owner needs a line in typed_copy.CLASSES."""
    surface = re.sub(r"\W", "_", PINNED[0].stem)
    untyped = {(c.module, c.line, c.column) for c in complaints if is_any(c) and c.surface == surface}
    unchecked = [
        f"{path.name}: {ast.unparse(node)}"
        for path in ENGINES
        for node in ast.walk(ast.parse(typed_copy(path, surface)))
        if isinstance(node, ast.Attribute)
        and (path.stem, node.value.lineno, node.value.col_offset + 1) in untyped
        and not OTHERS.fullmatch(ast.unparse(node.value))
    ]
    assert unchecked == []


MISTAKES = {
    "an invented method": ("config.get_flags_of(1)", 'IBuilderConfig" has no attribute "get_flags_of'),
    "an invented flag": ("config.set_flag(trt.BuilderFlag.FASTER)", 'BuilderFlag]" has no attribute "FASTER'),
    "an invented class": ("trt.Compiler(config)", 'Module has no attribute "Compiler'),
    "another keyword": ("config.set_timing_cache(cache, ignore=True)", 'Unexpected keyword argument "ignore"'),
    "too many arguments": ("config.clear_flag(trt.BuilderFlag.REFIT, 1)", "Too many arguments"),
    "another type": ("config.set_memory_pool_limit('workspace', 1)", "incompatible type"),
    "setting what is read-only": ("config.num_optimization_profiles = 2", "read-only"),
    "a chained invented name": ("trt.Runtime(logger).deserialize_cuda_engine(b'').get_name(0)", "get_name"),
}


def test_mistakes_are_found(tmp_path: Path) -> None:
    source = tmp_path / "mistakes.py"
    head = "from __future__ import annotations\nfrom typing import Any\n"
    body = "".join(f"    {code}\n" for code, _ in MISTAKES.values())
    source.write_text(f"{head}def f(trt: Any, config: Any, cache: Any, logger: Any) -> None:\n{body}")
    told = [complaint for complaint in check(tmp_path, [source]) if not is_any(complaint)]
    for name, (_, words) in MISTAKES.items():
        assert {c.surface for c in told if words in c.text} == {re.sub(r"\W", "_", path.stem) for path in PINNED}, name


def test_what_one_version_lacks_is_found_there(tmp_path: Path) -> None:
    source = tmp_path / "version.py"
    source.write_text(
        "from __future__ import annotations\ndef f(trt: object) -> None:\n    print(trt.BuilderFlag.FP16)\n"
    )
    told = {complaint.surface for complaint in check(tmp_path, [source]) if "FP16" in complaint.text}
    assert told == {"tensorrt_11_4_0_106", "tensorrt_rtx_1_7_1_116"}

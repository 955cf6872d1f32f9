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
ENGINES = [path for path in sorted((ROOT / "engines").rglob("*.py")) if touches_tensorrt(path)]

# Objects that TensorRT's surfaces say nothing of: those of polygraphy (test_polygraphy.py), of
# cuda-python (test_cudart.py), of ONNX Runtime and tomllib, and our own loggers and profilers.
OTHERS = re.compile(
    r"poly|\w+\.poly|profile|(self\._|\w*\.)?cudart\b.*|properties|onnxruntime|_toml\(\)|"
    r"recording_logger\(.*\)|logger|profiler|strategies"
)

# Reached on TensorRT-RTX alone: behind a check of the library, or of whether the name is there.
RTX_ALONE = {
    "worker": "REQUIRE_USER_ALLOCATION",
    "library": "num_compute_capabilities|set_compute_capability|ComputeCapability",
    "engine_stage": (
        "IRuntimeConfig|create_runtime_config|dynamic_shapes_kernel_specialization_strategy"
    ),
}


class Complaint(NamedTuple):
    """A line of mypy's.

    ``place``: first line and column, last line and column, from 1, both ends included.
    """

    surface: str
    module: str
    place: tuple[int, ...]
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
        name = module_of(surface)
        (folder / f"{name}.pyi").symlink_to(surface)
        (folder / f"on_{name}").mkdir()
        for path in sources:
            copies.append(folder / f"on_{name}" / path.name)
            copies[-1].write_text(typed_copy(path, name))
        (folder / f"on_{name}" / "__init__.py").touch()
    flags = [
        "--ignore-missing-imports",
        "--follow-imports=silent",
        "--no-strict-optional",
        "--disallow-any-expr",
    ]
    shown = [
        "--show-error-end",
        "--no-error-summary",
        "--hide-error-context",
        "--no-pretty",
        "--cache-dir=cache",
    ]
    command = [sys.executable, "-m", "mypy", "--config-file=", *flags, *shown, *map(str, copies)]
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert result.returncode in (0, 1), result.stderr
    return [_parse(line) for line in result.stdout.splitlines() if ": error: " in line]


def _parse(line: str) -> Complaint:
    where, text = line.split(": error: ", 1)
    name, *place = where.rsplit(":", 4)
    surface = Path(name).parent.name.removeprefix("on_")
    return Complaint(surface, Path(name).stem, tuple(map(int, place)), text)


def of_any(complaint: Complaint) -> bool:
    """Whether the checker says that it does not know a type, which is no mistake."""
    return re.match(r"Expression (has type|type contains) ", complaint.text) is not None


def module_of(surface: Path) -> str:
    """The stub module's name."""
    return re.sub(r"\W", "_", surface.stem)


@pytest.fixture(scope="module")
def complaints(tmp_path_factory: pytest.TempPathFactory) -> list[Complaint]:
    return check(tmp_path_factory.mktemp("types"), ENGINES)


def test_every_module_that_touches_tensorrt_is_looked_at() -> None:
    modules = {path.stem for path in ENGINES}
    assert {"worker", "library", "precision_check", "tensorrt_runner"} <= modules
    families = {path.stem.split("-")[0] for path in PINNED}
    assert families == {"tensorrt", "tensorrt_rtx", "tensorrt_stubs"}


def test_the_engines_fit_every_surface(complaints: list[Complaint]) -> None:
    mistakes = [complaint for complaint in complaints if not of_any(complaint)]
    assert [str(mistake) for mistake in mistakes if not rtx_alone(mistake)] == []


def rtx_alone(complaint: Complaint) -> bool:
    """Whether TensorRT lacks a name in code that is for TensorRT-RTX alone."""
    names = RTX_ALONE.get(complaint.module, "(?!)")
    return (
        re.search(rf'"(?:trt\.)?(?:{names})"', complaint.text) is not None
        and "_rtx_" not in complaint.surface
    )


def test_nothing_of_tensorrt_goes_unchecked(complaints: list[Complaint]) -> None:
    """An attribute of an ``Any`` is checked by nobody.

    Its owner needs a line in typed_copy.CLASSES.
    """
    surface = module_of(PINNED[-2])  # TensorRT-RTX's newest has every name
    untyped = set()
    for complaint in complaints:
        of_type_any = complaint.text.startswith('Expression has type "Any"')
        if complaint.surface == surface and of_type_any:
            untyped.add((complaint.module, *complaint.place))

    unchecked = []
    for path in ENGINES:
        for node in ast.walk(ast.parse(typed_copy(path, surface))):
            if not isinstance(node, ast.Attribute) or OTHERS.fullmatch(ast.unparse(node.value)):
                continue
            if (path.stem, *_place(node.value)) in untyped:
                unchecked.append(f"{path.name}: {ast.unparse(node)}")
    assert unchecked == []


def _place(node: ast.expr) -> tuple[int, int, int | None, int | None]:
    return node.lineno, node.col_offset + 1, node.end_lineno, node.end_col_offset


def test_an_object_without_a_class_is_noticed(tmp_path: Path) -> None:
    source = tmp_path / "untyped.py"
    source.write_text(
        "from __future__ import annotations\nfrom typing import Any\n"
        "def f(trt: Any, thing: Any) -> None:\n    thing.set_flag(trt.BuilderFlag.REFIT)\n"
    )
    places = {complaint.place for complaint in check(tmp_path, [source]) if of_any(complaint)}
    tree = ast.parse(typed_copy(source, "x"))
    (owner,) = [node for node in ast.walk(tree) if _is_name(node, "thing")]
    assert _place(owner) in places


def _is_name(node: ast.AST, name: str) -> bool:
    return isinstance(node, ast.Name) and node.id == name


MISTAKES = {
    "an invented method": (
        "config.get_flags_of(1)",
        'IBuilderConfig" has no attribute "get_flags_of',
    ),
    "an invented flag": (
        "config.set_flag(trt.BuilderFlag.FASTER)",
        'BuilderFlag]" has no attribute "FASTER',
    ),
    "an invented class": ("trt.Compiler(config)", 'Module has no attribute "Compiler'),
    "another keyword": (
        "config.set_timing_cache(cache, ignore=True)",
        'Unexpected keyword argument "ignore"',
    ),
    "too many arguments": ("config.clear_flag(trt.BuilderFlag.REFIT, 1)", "Too many arguments"),
    "another type": ("config.set_memory_pool_limit('workspace', 1)", "incompatible type"),
    "setting what is read-only": ("config.num_optimization_profiles = 2", "read-only"),
    "a chained invented name": (
        "trt.Runtime(logger).deserialize_cuda_engine(b'').get_name(0)",
        "get_name",
    ),
}


def test_mistakes_are_found(tmp_path: Path) -> None:
    source = tmp_path / "mistakes.py"
    head = "from __future__ import annotations\nfrom typing import Any\n"
    body = "".join(f"    {code}\n" for code, _ in MISTAKES.values())
    source.write_text(
        f"{head}def f(trt: Any, config: Any, cache: Any, logger: Any) -> None:\n{body}"
    )
    found = [complaint for complaint in check(tmp_path, [source]) if not of_any(complaint)]
    for name, (_, words) in MISTAKES.items():
        surfaces = {complaint.surface for complaint in found if words in complaint.text}
        assert surfaces == set(map(module_of, PINNED)), name


def test_what_one_version_lacks_is_found_there(tmp_path: Path) -> None:
    source = tmp_path / "version.py"
    source.write_text(
        "from __future__ import annotations\n"
        "def f(trt: object) -> None:\n    print(trt.BuilderFlag.FP16)\n"
    )
    found = check(tmp_path, [source])
    surfaces = {complaint.surface for complaint in found if "FP16" in complaint.text}
    assert surfaces == {"tensorrt_11_4_0_106", "tensorrt_rtx_1_7_1_116"}

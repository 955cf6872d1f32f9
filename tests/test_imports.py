"""What a device imports, and which part may import which."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
HEAVY = ("torch", "diffusers", "transformers", "onnx", "peft", "polygraphy")
STAGES = ("train", "export", "engines")
RUNTIME = [
    "hipa_deploy",
    "hipa_deploy.bundle.manifest",
    "hipa_deploy.doctor.examine",
    "hipa_deploy.images.read",
    "hipa_deploy.generate.pipeline",
    "hipa_deploy.bundle.adaptor_swap",
    "hipa_deploy.doctor.self_check",
    "hipa_deploy.doctor.self_test",
    "hipa_deploy.engines.device.describe",
    "hipa_deploy.engines.latency.compare",
    "hipa_deploy.engines.store.select",
    "hipa_deploy.engines.latency.html_page",
    "hipa_deploy.engines.backends.onnxruntime_runner",
    "hipa_deploy.engines.latency.measure",
    "hipa_deploy.engines.tensorrt.refit",
    "hipa_deploy.engines.tensorrt.tensorrt_runner",
]


def loaded_by(code: str) -> set[str]:
    """Top-level packages in sys.modules after ``code`` ran in a fresh interpreter."""
    script = f"import sys\n{code}\nprint(' '.join({{name.split('.')[0] for name in sys.modules}}))"
    result = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    return set(result.stdout.splitlines()[-1].split())


def test_runtime_imports_nothing_heavy() -> None:
    loaded = loaded_by(
        "import importlib\n" + "\n".join(f"importlib.import_module('{name}')" for name in RUNTIME)
    )
    assert loaded.isdisjoint(HEAVY)


def test_help_imports_no_numerics() -> None:
    code = "from hipa_deploy.commands.app import main\ntry:\n    main(['generate', '--help'])\nexcept SystemExit:\n    pass"
    assert loaded_by(code).isdisjoint({*HEAVY, "numpy", "onnxruntime", "PIL"})


def imports_at_top(path: Path) -> set[str]:
    """Modules that a file imports outside functions."""
    names: set[str] = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
    return names


@pytest.mark.parametrize("path", sorted((ROOT / "hipa_deploy").rglob("*.py")), ids=lambda p: p.name)
def test_core_imports_no_stage_at_top(path: Path) -> None:
    assert not any(
        name.startswith(tuple(f"hipa_deploy.{stage}" for stage in STAGES))
        for name in imports_at_top(path)
    )


@pytest.mark.parametrize(
    ("stage", "forbidden"),
    [
        ("train", ("hipa_deploy.export", "hipa_deploy.engines")),
        ("export", ("hipa_deploy.train", "hipa_deploy.engines")),
        ("engines", ("hipa_deploy.train", "hipa_deploy.export")),
    ],
)
def test_stages_do_not_import_each_other(stage: str, forbidden: tuple[str, ...]) -> None:
    for path in (ROOT / stage).rglob("*.py"):
        assert not any(name.startswith(forbidden) for name in imports_at_top(path)), path


@pytest.mark.parametrize("stage", STAGES)
def test_stages_use_absolute_imports(stage: str) -> None:
    for path in (ROOT / stage).rglob("*.py"):
        relative = [
            n
            for n in ast.walk(ast.parse(path.read_text()))
            if isinstance(n, ast.ImportFrom) and n.level
        ]
        assert not relative, path


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_folder_refuses_its_bare_name(stage: str) -> None:
    result = subprocess.run(
        [sys.executable, "-c", f"import {stage}"], cwd=ROOT, capture_output=True, text=True
    )
    assert result.returncode == 1
    assert f"import hipa_deploy.{stage}, not {stage}" in result.stderr

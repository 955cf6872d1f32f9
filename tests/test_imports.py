"""What a device imports, and which part may import which."""

import ast
import importlib
import subprocess
import sys
from collections import Counter
from functools import cache
from graphlib import TopologicalSorter
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
HEAVY = ("torch", "diffusers", "transformers", "onnx", "peft", "polygraphy")
# What answers over HTTP, and what it takes.
SERVERS = ("fastapi", "uvicorn", "starlette", "httptools", "prometheus_client", "ray")
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
    "hipa_deploy.engines.backends.available",
    "hipa_deploy.engines.latency.compare",
    "hipa_deploy.engines.store.select",
    "hipa_deploy.engines.latency.html_page",
    "hipa_deploy.engines.backends.onnxruntime_runner",
    "hipa_deploy.engines.latency.measure",
    "hipa_deploy.engines.tensorrt.refit",
    "hipa_deploy.engines.tensorrt.tensorrt_runner",
    "hipa_deploy.serve.process.server",
]


def modules_loaded_by(code: str) -> set[str]:
    """The names in sys.modules after ``code`` ran in a fresh interpreter."""
    script = f"import sys\n{code}\nprint(' '.join(sys.modules))"
    result = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    return set(result.stdout.splitlines()[-1].split())


def loaded_by(code: str) -> set[str]:
    """The top-level packages of these."""
    return {name.split(".")[0] for name in modules_loaded_by(code)}


def test_runtime_imports_nothing_heavy() -> None:
    loaded = loaded_by(
        "import importlib\n" + "\n".join(f"importlib.import_module('{name}')" for name in RUNTIME)
    )
    assert loaded.isdisjoint(HEAVY)


def test_help_imports_no_numerics() -> None:
    code = (
        "from hipa_deploy.commands.app import main\n"
        "try:\n    main(['generate', '--help'])\nexcept SystemExit:\n    pass"
    )
    assert loaded_by(code).isdisjoint({*HEAVY, "numpy", "onnxruntime", "PIL"})


def test_generating_loads_no_server(tmp_path: Path) -> None:
    """All that ``hipa-generate`` loads to make an image and write its file."""
    out = tmp_path / "apple.png"
    code = (
        "from hipa_deploy.commands.app import main\n"
        f"arguments = ['generate', 'emoji', '3d emoji of a red apple', '--out', {str(out)!r}]\n"
        "try:\n    main([*arguments, '--backend', 'onnxruntime'])\n"
        "except SystemExit as end:\n    assert not end.code, end.code"
    )
    names = modules_loaded_by(code)
    assert out.is_file()
    assert {"numpy", "onnxruntime", "hipa_deploy.generate.pipeline"} <= names
    # The options of hipa-serve are there, as those of every command: their rooms say nothing else.
    served = {name for name in names if name.startswith("hipa_deploy.serve")}
    options = "hipa_deploy.serve.process.command"
    assert served == {"hipa_deploy.serve", "hipa_deploy.serve.process", options}
    assert names.isdisjoint({*HEAVY, *SERVERS})


# The rooms, from the ground up: a module imports from its own room and from those before it.
ROOMS = (
    "hipa_deploy",
    "hipa_deploy.disk",
    "hipa_deploy.embedded",
    "hipa_deploy.marks",
    "hipa_deploy.bundle",
    "hipa_deploy.images",
    "hipa_deploy.generate.jobs",
    "hipa_deploy.generate",
    "hipa_deploy.generate.refine",
    "hipa_deploy.generate.parts",
    "hipa_deploy.models.weights",
    "hipa_deploy.models",
    "hipa_deploy.models.lora",
    "hipa_deploy.models.one_step",
    "hipa_deploy.engines",
    "hipa_deploy.engines.device",
    "hipa_deploy.engines.tensorrt",
    "hipa_deploy.engines.backends",
    "hipa_deploy.engines.targets",
    "hipa_deploy.engines.faults",
    "hipa_deploy.engines.store",
    "hipa_deploy.engines.build",
    "hipa_deploy.engines.latency",
    "hipa_deploy.export.generic",
    "hipa_deploy.export.graph",
    "hipa_deploy.export",
    "hipa_deploy.export.teacher",
    "hipa_deploy.train.recipes",
    "hipa_deploy.train.losses",
    "hipa_deploy.train.model",
    "hipa_deploy.train.distribution",
    "hipa_deploy.train.loop",
    "hipa_deploy.train.data",
    "hipa_deploy.train.evaluation",
    "hipa_deploy.train.coco",
    "hipa_deploy.train.prediction",
    "hipa_deploy.train",
    "hipa_deploy.publish",
    "hipa_deploy.serve",
    "hipa_deploy.serve.web",
    "hipa_deploy.serve.cluster",
    "hipa_deploy.serve.process",
    "hipa_deploy.triton",
    "hipa_deploy.bulk",
    "hipa_deploy.doctor",
    "hipa_deploy.demo",
    "hipa_deploy.fit",
    "hipa_deploy.commands.files",
    "hipa_deploy.guide",
    "hipa_deploy.commands",
)
MOST_MODULES = 12  # in one room
# Imports that go up all the same: from this module, into that room or any within it, for this
# reason.
UPWARD = {
    (
        "hipa_deploy",
        "hipa_deploy.bundle",
    ): "the package's own names, imported when they are asked for",
    (
        "hipa_deploy",
        "hipa_deploy.generate",
    ): "the package's own names, imported when they are asked for",
    ("hipa_deploy.__main__", "hipa_deploy.commands"): "python -m hipa_deploy is the command",
    (
        "hipa_deploy.generate.open_stages",
        "hipa_deploy.engines",
    ): "the one place that knows the backends",
    (
        "hipa_deploy.generate.swap_stage",
        "hipa_deploy.engines",
    ): "the same, for the weights of an adaptor",
    (
        "hipa_deploy.generate.pipeline",
        "hipa_deploy.generate.refine",
    ): "a pipeline makes drafts and refines them",
    (
        "hipa_deploy.generate.pipeline",
        "hipa_deploy.generate.parts",
    ): "the public class puts its parts together",
    (
        "hipa_deploy.generate.parts.batch_maker",
        "hipa_deploy.engines.tensorrt",
    ): "a type of a signature",
    (
        "hipa_deploy.generate.parts.batch_pipeline",
        "hipa_deploy.engines.tensorrt",
    ): "a type of a signature",
    (
        "hipa_deploy.export.export_bundle",
        "hipa_deploy.export.teacher",
    ): "the teacher is the last of a bundle's stages, and made of the parts that the others are",
}
# Imports from one stage to another.
ACROSS = {
    (
        "hipa_deploy.export.graph.run_apart",
        "hipa_deploy.engines.backends",
    ): "an exported stage is run to be checked",
}


def modules() -> dict[str, Path]:
    """Every module by its name."""
    found = {}
    for folder in ("hipa_deploy", *STAGES):
        package = folder if folder == "hipa_deploy" else f"hipa_deploy.{folder}"
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            found[".".join([package, *(part for part in parts if part != "__init__")])] = path
    return found


MODULES = modules()


@cache
def imported(path: Path) -> set[str]:
    """Modules of this package that a file imports, anywhere in it."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                names.add(whole if whole in MODULES else node.module)
    return names & MODULES.keys()


def room(module: str) -> str:
    return module if MODULES[module].name == "__init__.py" else module.rpartition(".")[0]


def stage(module: str) -> str | None:
    part = [*module.split("."), ""][1]
    return part if part in STAGES else None


@cache
def edges() -> list[tuple[str, str]]:
    return [
        (name, other) for name, path in MODULES.items() for other in sorted(imported(path) - {name})
    ]


def is_listed(edge: tuple[str, str], listed: dict[tuple[str, str], str]) -> bool:
    source, target = edge
    return any(source == name and room(target).startswith(into) for name, into in listed)


def test_every_room_is_listed() -> None:
    assert {room(name) for name in MODULES} == set(ROOMS) | {"hipa_deploy.train.recipes"}


# One test for all imports, and not one for each of thousands: a failure lists those that are wrong.
def test_imports_go_down() -> None:
    places = {name: place for place, name in enumerate(ROOMS)}
    upward = []
    for edge in edges():
        source, target = edge
        down = places[room(source)] >= places[room(target)]
        if not down and not is_listed(edge, UPWARD):
            upward.append(edge)
    assert len(edges()) > 1000
    assert upward == []


def test_stages_do_not_import_each_other() -> None:
    across = []
    for edge in edges():
        source, target = map(stage, edge)
        if source is not None and target not in (None, source) and not is_listed(edge, ACROSS):
            across.append(edge)
    assert across == []


@pytest.mark.parametrize("listed", [*UPWARD, *ACROSS], ids=" -> ".join)
def test_what_is_listed_is_there(listed: tuple[str, str]) -> None:
    source, into = listed
    assert any(name == source and room(other).startswith(into) for name, other in edges())


def test_no_circle_of_modules() -> None:
    """Imports of types count too: a circle of these ties two modules together as well."""
    order = TopologicalSorter({name: imported(path) - {name} for name, path in MODULES.items()})
    order.prepare()  # raises CycleError


def test_no_room_is_crowded() -> None:
    rooms = Counter(room(name) for name, path in MODULES.items() if path.name != "__init__.py")
    assert {name: count for name, count in rooms.items() if count > MOST_MODULES} == {}


def test_no_two_modules_share_a_name() -> None:
    """But a command and the room that it opens."""
    names = Counter(path.stem for path in MODULES.values() if path.stem != "__init__")
    commands = {path.stem for path in (ROOT / "hipa_deploy/commands").glob("*.py")}
    assert {name for name, count in names.items() if count > 1} - commands == set()


@pytest.mark.parametrize("name", sorted(set(ROOMS) - {"hipa_deploy"}))
def test_a_room_says_what_it_is_for(name: str) -> None:
    text = ast.get_docstring(ast.parse(MODULES[name].read_text())) or ""
    assert len(text) > 40


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


def test_what_lies_beside_the_package_imports_names_that_exist() -> None:
    """Benchmarks and examples, of which tests run a part only."""
    missing = []
    for folder in ("benchmarks", "examples", "docs"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(
                    "hipa_deploy"
                ):
                    module = importlib.import_module(node.module)
                    for alias in node.names:
                        name = f"{node.module}.{alias.name}"
                        if not hasattr(module, alias.name) and find_spec(name) is None:
                            missing.append(f"{path.name}: {name}")
    assert missing == []

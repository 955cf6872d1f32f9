"""The wheel: everything under hipa_deploy, nothing beside it, nothing forgotten."""

import subprocess
import sys
import zipfile
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
# Of code, of tables, and of the page that the image service answers with.
SUFFIXES = (".py", ".toml", ".html", ".css", ".js", ".svg")
# A folder of the repository, and the package that it becomes.
PACKAGES = {
    "train": "hipa_deploy.train",
    "export": "hipa_deploy.export",
    "engines": "hipa_deploy.engines",
    "hipa_deploy": "hipa_deploy",
}


@pytest.fixture(scope="module")
def wheel_names(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    out = tmp_path_factory.mktemp("wheel")
    source = out / "source"
    tracked = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    # A copy: building in the tree itself would leave build/ behind.
    for name in tracked.stdout.splitlines():
        target = source / name
        if (ROOT / name).is_file() and not name.startswith(("tests/", "docs/")):
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes((ROOT / name).read_bytes())
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation"]
    command += ["--outdir", str(out), str(source)]
    subprocess.run(command, check=True, capture_output=True)
    return zipfile.ZipFile(next(out.glob("*.whl"))).namelist()


def test_wheel_exposes_only_hipa_deploy(wheel_names: list[str]) -> None:
    content = [name for name in wheel_names if ".dist-info/" not in name]
    assert {name.split("/")[0] for name in content} == {"hipa_deploy"}


def test_wheel_holds_every_module_and_recipe(wheel_names: list[str]) -> None:
    for folder, package in PACKAGES.items():
        for path in (ROOT / folder).rglob("*"):
            if path.suffix in SUFFIXES and "__pycache__" not in path.parts:
                inside = f"{package.replace('.', '/')}/{path.relative_to(ROOT / folder).as_posix()}"
                assert inside in wheel_names


def test_wheel_holds_the_embedded_folders(wheel_names: list[str]) -> None:
    for name in (
        "model/model_index.json",
        "adaptor/pytorch_lora_weights.safetensors",
        "bundle/hipa.json",
    ):
        assert f"hipa_deploy/embedded/{name}" in wheel_names


def test_packages_on_disk_are_listed() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    found = set()
    for folder, package in PACKAGES.items():
        for init in (ROOT / folder).rglob("__init__.py"):
            inside = init.parent.relative_to(ROOT / folder).parts
            found.add(".".join([package, *inside]))
    assert found == set(settings["packages"]) == set(settings["package-dir"])


@pytest.mark.parametrize(
    ("requirement", "least"),
    [
        ("onnxruntime", (1, 23)),  # OrtValue.ortvalue_from_shape_and_type with a vendor
        ("pillow", (11, 1)),  # a camera's Adobe RGB; before 10.4 grey profiles too
        ("tokenizers", (0, 20)),  # the merges of tokenizer.json as pairs
        ("typer", (0, 15, 4)),  # 'Path | None', and click 8.2
        ("openvino", (2025, 4)),  # import_model of a tensor
    ],
)
def test_no_version_is_allowed_that_lacks_what_is_used(
    requirement: str, least: tuple[int, ...]
) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    listed = [*project["dependencies"], *project["optional-dependencies"]["openvino"]]
    (found,) = (line for line in listed if line.startswith(f"{requirement}>="))
    lowest = found.removeprefix(f"{requirement}>=")
    assert tuple(int(number) for number in lowest.split(".")) >= least


def test_no_pin_is_for_a_python_that_its_release_does_not_support() -> None:
    """Pip finds no such version there, and installs nothing."""
    wrong = []
    for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines():
        if not line or line.startswith("#"):
            continue
        pin = Requirement(line)
        try:
            found = distribution(pin.name)
        except PackageNotFoundError:
            continue
        # Another version is installed, so this one's metadata are not known here.
        if f"=={found.version}" != str(pin.specifier):
            continue
        supported = SpecifierSet(found.metadata["Requires-Python"] or "")
        for python in ("3.10", "3.11", "3.12", "3.13"):
            is_pinned = pin.marker is None or pin.marker.evaluate({"python_version": python})
            if is_pinned and not supported.contains(f"{python}.99"):
                wrong.append(f"{line} on Python {python}")
    assert wrong == []


def test_the_embedded_folders_stay_small() -> None:
    def size(folder: str) -> int:
        paths = (ROOT / "hipa_deploy/embedded" / folder).rglob("*")
        return sum(path.stat().st_size for path in paths if path.is_file())

    assert size("model") <= 25e6
    assert size("model") + size("bundle") <= 50e6

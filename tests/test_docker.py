"""The Dockerfiles of docker/: what they copy and install exists. No test builds an image."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from typer.main import get_command

from hipa_deploy.commands.app import app

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
DOCKERFILES = sorted((ROOT / "docker").glob("*.Dockerfile"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
EXTRAS = PROJECT["project"]["optional-dependencies"]


def instructions(dockerfile: Path) -> list[tuple[str, str]]:
    """Return (instruction, arguments) for each, without comments, continued lines joined."""
    lines = [line for line in dockerfile.read_text().splitlines() if not line.startswith("#")]
    joined = "\n".join(lines).replace("\\\n", " ").splitlines()
    return [(line.split()[0], line.split(maxsplit=1)[1]) for line in joined if line.strip()]


def sources(dockerfile: Path) -> list[str]:
    """Return the paths that the COPY instructions copy; the last of each is the target."""
    found = []
    for name, arguments in instructions(dockerfile):
        if name == "COPY":
            found += shlex.split(arguments)[:-1]
    return found


def needed_paths() -> set[str]:
    """Return the top-level paths without which pip cannot install the project."""
    folders = PROJECT["tool"]["setuptools"]["package-dir"].values()
    project = PROJECT["project"]
    needed = {folder.split("/")[0] for folder in folders}
    return needed | {"pyproject.toml", project["readme"], *project["license-files"]}


def problems(dockerfile: Path) -> list[str]:
    """Return what a Dockerfile copies, installs or uses that does not exist."""
    found = []
    copied = sources(dockerfile)
    for source in copied:
        if not (ROOT / source).exists():
            found.append(f"{source} does not exist")
        if f"!{source}" not in ignored():
            found.append(f"{source} is ignored")
    for path in sorted(needed_paths() - set(copied)):
        found.append(f"{path} is not copied")

    # Variables: PATH is the shell's own, every other one has to be an ARG.
    steps = instructions(dockerfile)
    declared = {}
    for name, arguments in steps:
        if name == "ARG":
            variable, _, default = arguments.partition("=")
            declared[variable] = default
    used = set(re.findall(r"\$\{(\w+)\}", " ".join(arguments for _, arguments in steps)))
    for variable in sorted(used - {"PATH"} - set(declared)):
        found.append(f"{variable} is not declared")

    # Extras: the default, and those that a comment tells the reader to pass.
    extras = {declared.get("EXTRA", ""), *re.findall(r"EXTRA=(\w+)", dockerfile.read_text())}
    for extra in sorted(extras - set(EXTRAS)):
        found.append(f"{extra} is no extra")
    return found


def ignored() -> list[str]:
    return (ROOT / ".dockerignore").read_text().splitlines()


@pytest.mark.parametrize("dockerfile", DOCKERFILES, ids=lambda path: path.name)
def test_what_it_needs_exists(dockerfile: Path) -> None:
    assert problems(dockerfile) == []


@pytest.mark.parametrize("dockerfile", DOCKERFILES, ids=lambda path: path.name)
def test_it_says_that_it_was_not_built(dockerfile: Path) -> None:
    assert "been built or run by us" in dockerfile.read_text()


def test_the_last_instruction_runs_a_command_of_the_project() -> None:
    for dockerfile in DOCKERFILES:
        name, arguments = instructions(dockerfile)[-1]
        assert (name, arguments.strip('[]"')) == ("CMD", "hipa-doctor")
    assert "hipa-doctor" in PROJECT["project"]["scripts"]


def test_jetson_extras_never_install_tensorrt_from_pypi() -> None:
    for extra in ("jetson6", "jetson7"):
        packages = {re.split(r"[^\w-]", requirement)[0] for requirement in EXTRAS[extra]}
        assert packages <= {"cuda-python", "polygraphy"}


@pytest.mark.parametrize(
    ("before", "after", "problem"),
    [
        ("COPY engines engines", "COPY engins engins", "engins does not exist"),
        ("COPY engines engines", "COPY tests tests", "tests is ignored"),
        ("COPY train train", "", "train is not copied"),
        ("EXTRA=rtx", "EXTRA=cuda", "cuda is no extra"),
        ("ARG EXTRA", "ARG OTHER", "EXTRA is not declared"),
    ],
)
def test_mistakes_are_found(tmp_path: Path, before: str, after: str, problem: str) -> None:
    dockerfile = tmp_path / "x.Dockerfile"
    dockerfile.write_text((ROOT / "docker/gpu.Dockerfile").read_text().replace(before, after))
    assert problem in problems(dockerfile)


def test_the_composed_service_takes_its_options() -> None:
    text = (ROOT / "docker/compose.yml").read_text()
    (command,) = re.findall(r"^    command: hipa-serve (.+)$", text, re.MULTILINE)
    serve = get_command(app).commands["serve"]  # type: ignore[attr-defined]
    serve.make_context("serve", shlex.split(command))
    files = r"^ +(?:dockerfile: |- \./)([\w./]+\.(?:Dockerfile|yml))"
    for name in re.findall(files, text, re.MULTILINE):
        assert (ROOT / name).is_file() or (ROOT / "docker" / name).is_file()
    assert "been run by us" in text


def test_the_image_of_prometheus_has_a_version() -> None:
    text = (ROOT / "docker/compose.yml").read_text()
    assert re.search(r"^    image: prom/prometheus:v\d+\.\d+\.\d+$", text, re.MULTILINE)


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed")
def test_prometheus_takes_its_configuration(tmp_path: Path) -> None:
    key = tmp_path / "key.txt"
    key.write_text("0" * 32)
    shipped = (ROOT / "docker/prometheus.yml").read_text()
    assert "/etc/prometheus/key.txt" in shipped
    config = tmp_path / "prometheus.yml"
    config.write_text(shipped.replace("/etc/prometheus/key.txt", str(key)))
    command = ["promtool", "check", "config", str(config)]
    checked = subprocess.run(command, capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout + checked.stderr


@pytest.mark.parametrize("page", ["README.md", "docs/tutorials/jetson.md"])
def test_pages_name_dockerfiles_that_exist(page: str) -> None:
    named = re.findall(r"docker/[\w.]+Dockerfile", (ROOT / page).read_text())
    assert named
    assert all((ROOT / name).is_file() for name in named)


@pytest.mark.parametrize("page", ["docker/jetson.Dockerfile", "docs/tutorials/jetson.md"])
def test_a_container_on_jetson_is_told_where_it_runs(page: str) -> None:
    text = (ROOT / page).read_text()
    assert "cat /proc/device-tree/model > /tmp/nv_jetson_model" in text
    for path in ("/tmp/nv_jetson_model", "/etc/nv_tegra_release"):
        assert f"-v {path}:{path}:ro" in text

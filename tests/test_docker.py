"""The recipes of docker/, which nothing here can build: what they copy and install exists."""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
RECIPES = sorted((ROOT / "docker").glob("*.Dockerfile"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
EXTRAS = PROJECT["project"]["optional-dependencies"]


def instructions(recipe: Path) -> list[tuple[str, str]]:
    """Instruction and arguments, comments left out and continued lines joined."""
    lines = [line for line in recipe.read_text().splitlines() if not line.startswith("#")]
    joined = "\n".join(lines).replace("\\\n", " ").splitlines()
    return [(line.split()[0], line.split(maxsplit=1)[1]) for line in joined if line.strip()]


def sources(recipe: Path) -> list[str]:
    copies = [shlex.split(arguments) for name, arguments in instructions(recipe) if name == "COPY"]
    return [source for *found, _ in copies for source in found]


def problems(recipe: Path) -> list[str]:
    """What a recipe copies, installs or uses that does not exist."""
    copied, steps = sources(recipe), instructions(recipe)
    settings, project = PROJECT["tool"]["setuptools"], PROJECT["project"]
    needed = {folder.split("/")[0] for folder in settings["package-dir"].values()}
    needed |= {"pyproject.toml", project["readme"], *project["license-files"]}
    declared = dict(arguments.partition("=")[::2] for name, arguments in steps if name == "ARG")
    used = set(re.findall(r"\$\{(\w+)\}", " ".join(arguments for _, arguments in steps))) - {"PATH"}
    asked = {declared.get("EXTRA", ""), *re.findall(r"EXTRA=(\w+)", recipe.read_text())}
    return [
        *(f"{source} does not exist" for source in copied if not (ROOT / source).exists()),
        *(f"{source} is ignored" for source in copied if f"!{source}" not in ignored()),
        *(f"{name} is not copied" for name in sorted(needed - set(copied))),
        *(f"{name} is not declared" for name in sorted(used - set(declared))),
        *(f"{extra} is no extra" for extra in sorted(asked - set(EXTRAS))),
    ]


def ignored() -> list[str]:
    return (ROOT / ".dockerignore").read_text().splitlines()


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.name)
def test_what_it_needs_exists(recipe: Path) -> None:
    assert problems(recipe) == []


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.name)
def test_it_says_that_it_was_not_built(recipe: Path) -> None:
    assert "been built or run by us" in recipe.read_text()


def test_its_last_word_is_a_command_of_ours() -> None:
    for recipe in RECIPES:
        name, arguments = instructions(recipe)[-1]
        assert (name, arguments.strip('[]"')) == ("CMD", "hipa-doctor")
    assert "hipa-doctor" in PROJECT["project"]["scripts"]


def test_jetson_never_takes_tensorrt_from_pypi() -> None:
    for extra in ("jetson6", "jetson7"):
        assert {re.split(r"[^\w-]", need)[0] for need in EXTRAS[extra]} <= {
            "cuda-python",
            "polygraphy",
        }


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
    recipe = tmp_path / "x.Dockerfile"
    recipe.write_text((ROOT / "docker/gpu.Dockerfile").read_text().replace(before, after))
    assert problem in problems(recipe)


@pytest.mark.parametrize("page", ["README.md", "docs/tutorials/jetson.md"])
def test_pages_name_recipes_that_exist(page: str) -> None:
    named = re.findall(r"docker/[\w.]+Dockerfile", (ROOT / page).read_text())
    assert named
    assert all((ROOT / name).is_file() for name in named)

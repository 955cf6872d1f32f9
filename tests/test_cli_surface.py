"""The commands and their options, pinned: a change here is a change for every user's script."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from typer.main import get_command

from hipa_deploy.commands.app import app
from hipa_deploy.models.configurations import MODELS
from hipa_deploy.models.one_step.one_step_method import preset_names

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
SURFACE = {
    "train": {
        "--out", "--recipe", "--model", "--config", "--vae", "--prompts", "--from", "--adaptor",
        "--steps",
        "--lora", "--embedding", "--average", "--rank", "--dry-run", "--gpus", "--allow-code",
        "--held-out", "--patience", "--log-with",
    },
    "export": {
        "--out", "--model", "--config", "--vae", "--adaptor", "--adaptor-scale", "--dtype",
        "--layout",
        "--height", "--width", "--batch", "--decoder", "--fuse", "--prompts", "--dynamic", "--task",
        "--strengths", "--encoder", "--context-tokens", "--clip-skip", "--prompt-weights", "--lora",
        "--embedding", "--one-step", "--build", "--swap-for", "--sign", "--mark",
        "--with-teacher",
        "--reference-prompts", "--for", "--controlnet",
    },
    "build": {
        "--for", "--backend", "--target", "--workspace", "--tactic-dram", "--optimization-level",
        "--timing-cache", "--refit", "--best-of", "--swap", "--dry-run", "--no-repair",
        "--without-remedy", "--force",
    },
    "generate": {
        "--out", "--seed", "--count", "--height", "--width", "--adaptor", "--backend", "--truncate",
        "--prompt-weights", "--low-memory", "--verify", "--cache", "--force",
        "--again", "--refine", "--guidance", "--format", "--quality", "--watermark", "--c2pa",
        "--checker", "--allow-code",
    },
    "edit": {
        "--strength", "--out", "--seed", "--count", "--height", "--width", "--adaptor", "--backend",
        "--truncate", "--prompt-weights", "--low-memory", "--verify", "--cache", "--force",
        "--format", "--quality", "--watermark", "--c2pa", "--checker", "--allow-code",
    },
    "inpaint": {
        "--feather", "--match", "--out", "--seed", "--count", "--height", "--width", "--adaptor",
        "--backend",
        "--truncate", "--prompt-weights", "--low-memory", "--verify", "--cache", "--force",
        "--format", "--quality", "--watermark", "--c2pa", "--checker", "--allow-code",
    },
    "upscale": {
        "--overlap", "--out", "--adaptor", "--backend", "--truncate", "--prompt-weights",
        "--low-memory", "--verify", "--cache", "--force",
        "--format", "--quality", "--watermark", "--c2pa", "--checker", "--allow-code",
    },
    "control": {
        "--scale", "--out", "--seed", "--count", "--height", "--width", "--adaptor", "--backend",
        "--truncate", "--prompt-weights", "--low-memory", "--verify", "--cache", "--force",
        "--format", "--quality", "--watermark", "--c2pa", "--checker", "--allow-code",
    },
    "serve": {
        "--host", "--port", "--backend", "--api-keys", "--allow-host", "--allow-origin", "--batch",
        "--wait", "--queue", "--images", "--time-limit", "--prompt-limit", "--body-limit",
        "--pixel-limit", "--steps-limit", "--c2pa", "--log-prompts", "--ray", "--replicas",
        "--replica-cpus", "--replica-gpus", "--scale-at", "--checker", "--allow-code",
    },
    "bulk": {
        "--out", "--column", "--seed", "--shard-size", "--backend", "--truncate", "--c2pa", "--ray",
        "--replicas", "--replica-cpus", "--replica-gpus", "--checker", "--allow-code",
    },
    "triton": {"--out", "--name", "--backend", "--instances", "--join"},
    "profile": {
        "--runs", "--seconds", "--warmup", "--backend", "--json", "--html", "--markdown",
        "--layers", "--roofline", "--low-memory", "--verify", "--cache", "--force",
    },
    "profile compare": {"--metric", "--threshold", "--json", "--force"},
    "profile table": set(),
    "evaluate": {
        "--adaptor", "--model", "--config", "--vae", "--recipe", "--prompts", "--images", "--json",
        "--out",
        "--lora", "--embedding", "--one-step", "--rival", "--context-tokens", "--clip-skip",
        "--coco", "--year", "--inception", "--clip", "--shard", "--captions", "--reference",
        "--resolution", "--clip-prefix", "--batch", "--with-teacher", "--force",
    },
    "doctor": {"--backend", "--json", "--self-test", "--bisect", "--out", "--force"},
    "demo": {"--out", "--quick", "--task"},
    "publish": {
        "--repo", "--model", "--config", "--base-model", "--license", "--report", "--dry-run",
        "--private", "--force",
    },
    "init": {"--device", "--model", "--adaptor", "--task", "--prefer"},
}  # fmt: skip


def commands() -> dict:
    return get_command(app).commands


def options_of(command) -> set[str]:
    found = set()
    for parameter in command.params:
        if parameter.param_type_name == "option":
            found.update(parameter.opts)
    return found - {"--help", "--version"}


def test_commands_and_options() -> None:
    assert {name: options_of(command) for name, command in commands().items()} == SURFACE


def test_every_command_and_option_has_a_help_text() -> None:
    for name, command in commands().items():
        assert command.help, name
        for parameter in command.params:
            assert parameter.help, f"{name} {parameter.name}"


@pytest.mark.parametrize(
    ("option", "names"), [("--config", tuple(MODELS)), ("--one-step", tuple(preset_names()))]
)
def test_a_help_text_names_every_choice(option: str, names: tuple[str, ...]) -> None:
    """The lists are written out, so that --help loads nothing: a new name must be added there."""
    for command in commands().values():
        for param in command.params:
            if option in param.opts:
                assert set(names) <= set(re.split(r"[\s|;.:]+", param.help or "")), command.name


def test_every_verb_has_an_entry_point() -> None:
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    expected = {"hipa": "hipa_deploy.__main__:main"}
    for verb in SURFACE:
        expected[f"hipa-{verb.split()[0]}"] = "hipa_deploy.__main__:verb_main"
    assert scripts == expected


@pytest.mark.parametrize("verb", SURFACE)
def test_installed_script_answers(verb: str) -> None:
    name, *rest = verb.split()
    script = Path(sys.executable).with_name(f"hipa-{name}")
    result = subprocess.run([script, *rest, "--help"], capture_output=True, text=True, check=True)
    assert f"hipa {verb}" in result.stdout

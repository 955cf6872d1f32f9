"""The commands and their options, pinned: a change here is a change for every user's script."""

import subprocess
import sys
from pathlib import Path

import pytest
from typer.main import get_command

from hipa_deploy.commands.app import app, main
from hipa_deploy.errors import HipaError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
SURFACE = {
    "train": {
        "--out", "--recipe", "--model", "--config", "--prompts", "--from", "--adaptor", "--steps", "--dry-run",
    },
    "export": {
        "--out", "--model", "--config", "--adaptor", "--adaptor-scale", "--dtype", "--layout", "--height", "--width",
        "--batch", "--decoder", "--fuse", "--prompts", "--dynamic", "--task", "--strengths", "--encoder", "--build",
        "--swap-for",
    },
    "build": {
        "--backend", "--target", "--workspace", "--tactic-dram", "--optimization-level", "--timing-cache", "--refit",
        "--best-of", "--dry-run", "--force",
    },
    "generate": {"--out", "--seed", "--count", "--height", "--width", "--adaptor", "--backend", "--truncate"},
    "edit": {
        "--strength", "--out", "--seed", "--count", "--height", "--width", "--adaptor", "--backend", "--truncate",
    },
    "inpaint": {
        "--feather", "--out", "--seed", "--count", "--height", "--width", "--adaptor", "--backend", "--truncate",
    },
    "upscale": {"--overlap", "--out", "--adaptor", "--backend", "--truncate"},
    "profile": {"--runs", "--warmup", "--backend", "--json", "--html", "--markdown", "--layers", "--roofline"},
    "profile compare": {"--metric", "--threshold", "--json"},
    "profile table": set(),
    "evaluate": {"--adaptor", "--model", "--config", "--recipe", "--prompts", "--images", "--json", "--out"},
    "doctor": {"--backend", "--json", "--self-test", "--out"},
    "demo": {"--out", "--quick", "--task"},
}  # fmt: skip


def commands() -> dict:
    return get_command(app).commands


def test_commands_and_options() -> None:
    found = {
        name: {o for p in command.params if p.param_type_name == "option" for o in p.opts}
        - {"--help"}
        for name, command in commands().items()
    }
    assert found == SURFACE


def test_every_command_and_option_has_a_help_text() -> None:
    for name, command in commands().items():
        assert command.help, name
        for parameter in command.params:
            assert parameter.help, f"{name} {parameter.name}"


def test_every_verb_has_an_entry_point() -> None:
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    assert scripts == {"hipa": "hipa_deploy.commands.app:main"} | {
        f"hipa-{verb.split()[0]}": "hipa_deploy.commands.app:verb_main" for verb in SURFACE
    }


@pytest.mark.parametrize("verb", SURFACE)
def test_installed_script_answers(verb: str) -> None:
    name, *rest = verb.split()
    script = Path(sys.executable).with_name(f"hipa-{name}")
    result = subprocess.run([script, *rest, "--help"], capture_output=True, text=True, check=True)
    assert f"hipa {verb}" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["frobnicate"], "No such command"),
        (["generate", "emoji"], "Missing argument"),
        (["generate", "emoji", "apple", "--count", "many"], "--count"),
        (["generate", "emoji", "apple", "--nope"], "--nope"),
        (["generate", "/no/such", "apple"], "does not exist"),
        (["generate", "emoji", "apple", "--backend", "vulkan"], "vulkan"),
        (["generate", "emoji", "apple", "--out", "x.jpg"], ".png"),
        (
            ["edit", "emoji", "a.png", "apple"],
            "to generate, not to edit. Use hipa-generate, or pipe(prompt)",
        ),
        (
            ["inpaint", "emoji", "a.png", "b.png", "apple"],
            "is a bundle to generate, not to inpaint",
        ),
        (["upscale", "emoji", "a.png"], "is a bundle to generate, not to upscale"),
        (["upscale", "emoji", "a.png", "--out", "x.jpg"], ".png"),
        (["inpaint", "emoji", "a.png", "apple"], "Missing argument"),
        (["profile", "emoji", "--roofline", "rtx60"], "'rtx60' is unknown"),
        (["profile", "emoji", "--runs", "0"], "got 0 runs"),
        (["profile", "compare", "a.json"], "Missing argument"),
        (["profile", "compare", "a.json", "b.json"], "a.json: No such file"),
        (
            ["profile", "compare", "a.json", "b.json", "--threshold", "much"],
            "'much' is not a percentage",
        ),
        (["profile", "table"], "Missing argument"),
        (["generate", "emoji", "apple", "--out", "x.png", "--count", "2"], "one file"),
        (["doctor", "emoji", "--self-test"], "Leave SUBJECT out"),
        (["doctor", "--out", "x"], "--out is for --self-test"),
        (["train", "--out", "x", "--adaptor", "emoji"], "--adaptor is for a decoder"),
        (
            ["train", "--out", "x", "--recipe", "emoji-decoder", "--from", "emoji"],
            "--from is for an adaptor",
        ),
        (
            ["train", "--out", "x", "--recipe", "emoji-decoder", "--dry-run"],
            "--dry-run is for an adaptor",
        ),
        (["train", "--out", "x", "--config", "sd15"], "--config is for a checkpoint in one file"),
        (["train", "--out", "x", "--prompts", "none.csv"], "none.csv cannot be read"),
        (["export", "--model", "/no/such", "--out", "x", "--dtype", "int3"], "--dtype"),
        (
            ["export", "--model", "emoji", "--out", "x", "--swap-for", "emoji"],
            "--swap-for needs --adaptor",
        ),
        (
            ["export", "--model", "emoji", "--out", "x", "--swap-for", "emoji", "--fuse"],
            "the bundle has the rest",
        ),
        (["export", "--model", "emoji", "--out", "x", "--task", "paint"], "--task"),
        (
            ["export", "--model", "emoji", "--out", "x", "--swap-for", "emoji", "--task", "edit"],
            "the bundle has the rest",
        ),
        (
            ["export", "--model", "emoji", "--out", "x", "--strengths", "a,b"],
            "--strengths 'a,b': expected numbers",
        ),
        (
            ["export", "--model", "emoji", "--out", "x", "--strengths", "0.5"],
            "--strengths is for the task edit",
        ),
        (["generate", "emoji", "apple", "--adaptor", "night"], "no adaptor 'night' to swap in"),
        (
            ["export", "--model", "emoji", "--out", "x", "--config", "sd15"],
            "--config is for a checkpoint in one file",
        ),
        (["demo", "--task", "edit", "--quick", "--out", "x"], "edit trains nothing"),
        (["evaluate", "--config", "sd15"], "--config is for a checkpoint in one file"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_1(
    arguments: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    error = capsys.readouterr().err
    assert stopped.value.code == 1
    assert message in error
    assert error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("problem", "code"), [(None, 0), (HipaError("prompts none.txt cannot be read"), 1)]
)
def test_a_dry_run_prints_writes_nothing_and_fails_with_its_prompts(
    problem: HipaError | None,
    code: int,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch,
) -> None:
    from hipa_deploy.train.prediction import dry_run

    def stand_in(recipe: object, model_dir: Path, gpus: list) -> tuple[list[str], HipaError | None]:
        return [
            f"{recipe.steps} steps of {model_dir.name}, {'A100 80 GB SXM' in [g.title for g in gpus]}"
        ], problem

    monkeypatch.setattr(dry_run, "dry_run", stand_in)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        main(["train", "--out", "x", "--steps", "7", "--dry-run"])
    captured = capsys.readouterr()
    assert stopped.value.code == code
    assert "7 steps of model, True" in captured.out
    assert ("none.txt" in captured.err) == bool(problem)
    assert list(tmp_path.iterdir()) == []

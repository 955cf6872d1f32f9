"""``hipa-build``: mistakes are refused before anything is built."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from hipa_deploy.bundle.folder import Bundle
from hipa_deploy.commands import build as build_module
from hipa_deploy.commands.app import main
from hipa_deploy.doctor import self_check
from hipa_deploy.embedded import BUNDLE
from hipa_deploy.engines.build.build_stage import BuiltEngine
from hipa_deploy.engines.store import select
from hipa_deploy.engines.store.sidecar import engine_path, read_sidecar
from hipa_deploy.errors import HipaError
from tests.engines.engine_samples import RTX_4090, put_engine


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["emoji"], "--backend"),
        (["nope", "--backend", "rtx"], "bundle nope does not exist"),
        (["emoji", "--backend", "rtx", "--target", "rtx99"], "target 'rtx99' is unknown"),
        (["emoji", "--backend", "rtx", "--workspace", "-1"], "workspace_mib is -1"),
        (["emoji", "--backend", "rtx", "--swap", "-1"], "--swap"),
        (["emoji", "--for", "orin"], "--for 'orin' is no target"),
        (["emoji", "--for", "orin-nano", "--target", "thor"], "--target thor is another device"),
        (["emoji", "--for", "orin-nano", "--backend", "rtx"], "does not support Jetson Orin Nano"),
    ],
)
def test_a_mistake(arguments: list[str], message: str, refused: Callable[..., str]) -> None:
    assert message in refused("build", *arguments)


@pytest.mark.parametrize("included", [True, False])
def test_a_device_that_builds_for_itself(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], included: bool
) -> None:
    """A PC answers with the plan and the command, whether TensorRT is installed or not."""
    bundle = "emoji" if included else str(shutil.copytree(BUNDLE, tmp_path / "my bundle"))
    with pytest.raises(SystemExit) as stopped:
        main(["build", bundle, "--backend", "tensorrt", "--target", "orin-nano", "--refit"])
    assert stopped.value.code == 1
    captured = capsys.readouterr()
    assert "Orin Nano" in captured.out
    assert "--low-memory" in captured.out
    name = "emoji" if included else "'my bundle'"
    command = f"hipa-build {name} --backend tensorrt --target orin-nano --refit"
    there = "Run there" if included else f"Copy {bundle} there and run"
    assert captured.err == (
        "hipa: engines for Jetson Orin Nano 8 GB are built on the device itself, and this is the "
        f"plan. {there}: {command}.\n"
    )


def test_the_plan_for_a_device_counts_the_swap_that_it_will_have(
    capsys: pytest.CaptureFixture[str],
) -> None:
    plan = ["build", "emoji", "--backend", "tensorrt", "--target", "orin-nano", "--dry-run"]
    with pytest.raises(SystemExit) as stopped:
        main([*plan, "--swap", "16"])
    assert stopped.value.code == 0
    assert "16,384" in capsys.readouterr().out


def test_one_option_for_a_device(capsys: pytest.CaptureFixture[str]) -> None:
    """It sets what the device needs, says so, and the command to run there has it too."""
    with pytest.raises(SystemExit) as stopped:
        main(["build", "emoji", "--for", "orin-nano", "--dry-run"])
    assert stopped.value.code == 0
    captured = capsys.readouterr()
    assert captured.err == (
        "for Jetson Orin Nano 8 GB: --backend tensorrt --target orin-nano --workspace 1024 "
        "--tactic-dram 4096 --swap 4\n"
    )
    assert "4,096" in captured.out

    with pytest.raises(SystemExit) as stopped:
        main(["build", "emoji", "--for", "orin-nano", "--workspace", "512", "--swap", "8"])
    assert stopped.value.code == 1
    captured = capsys.readouterr()
    assert "yours: --workspace 512, where orin-nano has 1024\n" in captured.err
    assert "yours: --swap 8, where orin-nano has 4\n" in captured.err
    assert captured.err.endswith("hipa-build emoji --for orin-nano --workspace 512.\n")
    assert "8,192" in captured.out


def put_engines(bundle: Bundle, library: str, **changes: object) -> list[BuiltEngine]:
    built = []
    for stage in bundle.stages:
        path = put_engine(bundle, stage, library, RTX_4090, **changes)
        built.append(BuiltEngine(stage, engine_path(path), read_sidecar(path), up_to_date=False))
    return built


def no_memory(bundle: Bundle, backend: str) -> None:
    raise HipaError("cudaMalloc failed: out of memory (error 2).")


def test_new_engines_are_checked_and_no_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whatever else lies in the bundle: engines of the other library, or for this machine's GPU."""
    shutil.copytree(BUNDLE, tmp_path, dirs_exist_ok=True)
    bundle = Bundle.open(tmp_path)
    checked = []

    def check(bundle: Bundle, backend: str) -> SimpleNamespace:
        checked.append(backend)
        return SimpleNamespace(stages={}, problems=())

    monkeypatch.setattr(self_check, "check_bundle", check)
    monkeypatch.setattr(select, "find_gpu", lambda: RTX_4090)
    trt = SimpleNamespace(__version__="10.13.3")
    monkeypatch.setattr(select, "load_tensorrt", lambda library: trt)

    put_engines(bundle, "tensorrt")
    with monkeypatch.context() as patch:
        patch.setattr(self_check, "check_bundle", no_memory)
        with pytest.raises(HipaError, match=r"built and kept, .*: cudaMalloc failed"):
            build_module._check_engines(bundle, "rtx", put_engines(bundle, "rtx"))
    build_module._check_engines(bundle, "rtx", put_engines(bundle, "rtx"))
    assert checked == ["rtx"]
    assert capsys.readouterr().err == ""
    elsewhere = put_engines(bundle, "rtx", compute_capabilities=(86,))
    build_module._check_engines(bundle, "rtx", elsewhere)
    assert checked == ["rtx"]
    assert "These engines are for another machine" in capsys.readouterr().err

"""What --for takes of each target, and what of the user's wins."""

from __future__ import annotations

import pytest

from hipa_deploy.engines.targets.target import target_names
from hipa_deploy.errors import HipaError
from hipa_deploy.fit.target_choice import build_choice, export_choice


def test_the_orin_nanos_export() -> None:
    choice = export_choice("orin-nano", {})
    assert choice.values == {"--dtype": "fp16", "--decoder": "tiny", "--batch": 1}
    assert choice.lines() == ["for Jetson Orin Nano 8 GB: --dtype fp16 --decoder tiny --batch 1"]


def test_the_orin_nanos_build() -> None:
    there = build_choice("orin-nano", {}, here=False)
    assert there.values == {
        "--backend": "tensorrt",
        "--target": "orin-nano",
        "--workspace": 1024,
        "--tactic-dram": 4096,
        "--swap": 4,
    }
    # On the device itself the swap that is free counts, whatever a page recommends.
    here = build_choice("orin-nano", {}, here=True)
    assert "--swap" not in here.values


def test_an_option_of_the_user_wins_and_is_said() -> None:
    choice = export_choice("orin-nano", {"--decoder": "full", "--batch": 1})
    assert choice.values["--decoder"] == "full"
    assert choice.lines() == [
        "for Jetson Orin Nano 8 GB: --dtype fp16 --batch 1",
        "yours: --decoder full, where orin-nano has tiny",
    ]


@pytest.mark.parametrize("target", target_names())
def test_every_target_has_a_choice(target: str) -> None:
    assert export_choice(target, {}).values["--dtype"] == "fp16"
    backend = "rtx" if target.startswith("rtx") else "tensorrt"
    assert build_choice(target, {}, here=False).values["--backend"] == backend


@pytest.mark.parametrize(
    ("target", "given", "message"),
    [
        ("orin", {}, "no target"),
        ("orin-nano", {"--target": "thor"}, "another device"),
        ("orin-nano", {"--backend": "rtx"}, "does not support"),
    ],
)
def test_a_contradiction_is_refused(target: str, given: dict[str, str], message: str) -> None:
    with pytest.raises(HipaError, match=message):
        build_choice(target, given, here=False)

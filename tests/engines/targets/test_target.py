"""Targets: their files, what each stands for on a machine, and those that are impossible."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from hipa_deploy.engines.targets import target
from hipa_deploy.engines.targets.target import load_target_profile, resolve_target, target_names
from hipa_deploy.errors import HipaError
from tests.engines.engine_samples import ORIN, RTX_4090

RTX = SimpleNamespace(
    __version__="1.7",
    ComputeCapability=SimpleNamespace(
        __members__=["NONE", "CURRENT", "SM75", "SM86", "SM89", "SM120"]
    ),
)
TRT = SimpleNamespace(__version__="10.3")


def test_every_target_file_is_valid_and_has_a_source():
    known = [
        "a100",
        "agx-orin",
        "h100",
        "orin-nano",
        "orin-nx",
        "rtx30",
        "rtx40",
        "rtx4090",
        "rtx50",
        "thor",
    ]
    assert target_names() == known
    for name in target_names():
        assert load_target_profile(name).memory_shared == (
            name.split("-")[0] in ("agx", "orin", "thor")
        )


@pytest.mark.parametrize(
    ("name", "gpu", "folder", "capabilities"),
    [
        ("auto", None, "portable", (86, 89, 120)),
        ("auto", RTX_4090, "sm89", (89,)),
        ("rtx30", None, "rtx30", (86,)),
        ("rtx50", RTX_4090, "rtx50", (120,)),
        ("rtx4090", None, "rtx4090", (89,)),
    ],
)
def test_rtx_targets(name, gpu, folder, capabilities):
    goal = resolve_target(name, "rtx", gpu, RTX)
    assert (goal.name, goal.compute_capabilities) == (folder, capabilities)
    assert goal.device is goal.driver is goal.cuda is goal.l4t is None


def test_tensorrt_binds_to_this_gpu():
    goal = resolve_target("auto", "tensorrt", ORIN, TRT)
    assert (goal.name, goal.device, goal.driver, goal.cuda) == (
        "orin-sm87",
        "Orin",
        "540.4",
        "12.6",
    )
    assert resolve_target("orin-nano", "tensorrt", ORIN, TRT) == goal


NANO = "NVIDIA Jetson Orin Nano Developer Kit"
AGX = "NVIDIA Jetson AGX Orin Developer Kit"
LAPTOP = RTX_4090.model_copy(update={"name": "NVIDIA GeForce RTX 4090 Laptop GPU"})


@pytest.mark.parametrize(
    ("name", "gpu", "jetson", "expected"),
    [
        ("orin-nano", ORIN, NANO, True),
        ("orin-nano", ORIN.model_copy(update={"memory_mib": 3810}), NANO, True),
        ("orin-nano", ORIN, AGX, False),
        ("agx-orin", ORIN, AGX, True),
        # A container, and another maker's board.
        ("orin-nano", ORIN, None, True),
        ("orin-nano", ORIN, "A board (Jetson inside)", True),
        ("rtx4090", RTX_4090, None, True),
        ("rtx4090", LAPTOP, None, False),
        ("rtx40", LAPTOP, None, True),
        ("rtx50", RTX_4090, None, False),
    ],
)
def test_a_machine_is_a_target_by_its_name(name, gpu, jetson, expected, monkeypatch):
    profile = load_target_profile(name)
    assert profile.is_built_on(gpu, jetson) == expected
    monkeypatch.setattr(target, "jetson_model", lambda: jetson)
    if expected:
        resolve_target(name, "tensorrt", gpu, TRT)
        return
    with pytest.raises(HipaError, match=rf"^target {name} is .*TensorRT builds on the device"):
        resolve_target(name, "tensorrt", gpu, TRT)


def test_another_module_is_named_with_the_remedy(monkeypatch):
    monkeypatch.setattr(target, "jetson_model", lambda: AGX)
    message = rf"is Jetson Orin Nano 8 GB, this machine is {AGX}\. .*Build there, or omit --target"
    with pytest.raises(HipaError, match=message):
        resolve_target("orin-nano", "tensorrt", ORIN, TRT)


@pytest.mark.parametrize(
    ("name", "library", "gpu", "message"),
    [
        (
            "rtx60",
            "rtx",
            None,
            r"'rtx60' is unknown. Expected auto or one of: a100, agx-orin, .*thor",
        ),
        ("../x", "rtx", None, "is unknown"),
        ("orin-nx", "rtx", None, r"cannot compile for SM87. Expected SM75, SM86, SM89, SM120"),
        ("auto", "rtx", ORIN, "cannot compile for SM87"),
        ("auto", "tensorrt", None, "builds on the device itself"),
        ("thor", "tensorrt", ORIN, r"thor is SM110, this GPU \(Orin\) is SM87"),
    ],
)
def test_impossible_targets_are_one_line(name, library, gpu, message):
    with pytest.raises(HipaError, match=message):
        resolve_target(name, library, gpu, RTX if library == "rtx" else TRT)

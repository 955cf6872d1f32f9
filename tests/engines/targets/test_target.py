"""Targets: their files, what each stands for on a machine, and those that are impossible."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

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
    target = resolve_target(name, "rtx", gpu, RTX)
    assert (target.name, target.compute_capabilities) == (folder, capabilities)
    assert target.device is target.driver is target.cuda is target.l4t is None


def test_tensorrt_binds_to_this_gpu():
    target = resolve_target("auto", "tensorrt", ORIN, TRT)
    assert (target.name, target.device, target.driver, target.cuda) == (
        "orin-sm87",
        "Orin",
        "540.4",
        "12.6",
    )
    assert resolve_target("orin-nano", "tensorrt", ORIN, TRT) == target


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

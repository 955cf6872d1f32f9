"""The benchmark's modules together, on a tiny model."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path
from string import ascii_lowercase
from typing import Any

import evaluation
import numpy as np
import pytest
import torch
from evaluation import LOW_OF_ONE, SPLITS, splits
from items import FIRST, MAIN, all_items, find_item
from PIL import Image
from rich.console import Console
from run import items_table, keep_to_one_setting, main
from run_item import Setting, matched_steps, run_item
from summary import render, write_report

from hipa_deploy.errors import HipaError
from hipa_deploy.train.evaluation.quality_report import BASE
from hipa_deploy.train.recipes.recipe import Recipe

QUIET = Console(file=io.StringIO())


@pytest.fixture
def setting(recipe: Recipe, model_dir: Path, cache: Path, tmp_path: Path) -> Setting:
    return Setting(
        out=tmp_path / "report",
        model=model_dir,
        adaptor=tmp_path / "no-adaptor",
        recipe=recipe,
        repeats=2,
        quick=True,
        cache=cache,
    )


def letters(captions: list[str]) -> torch.Tensor:
    """In place of MiniLM: how often each letter occurs."""
    counts = [[caption.count(letter) for letter in ascii_lowercase] for caption in captions]
    return torch.tensor(counts).float()


def test_seeds_are_used_once(model_dir: Path) -> None:
    held_out = splits(model_dir, repeats=3)
    seeds = []
    for split in held_out:
        seeds += [*split.seeds, *split.other_seeds]
    assert len(set(seeds)) == len(seeds) == 2 * 3 * 5
    assert held_out[0].prompts[:3] == held_out[0].prompts[3:6] == held_out[0].captions
    assert [len(split.captions) for split in splits(model_dir, 2, most=2)] == [2, 2]


def test_from_nothing_to_a_report(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluation, "sentence_vectors", lambda: letters)
    chosen = (FIRST, MAIN, "latent-mse", "latent-mse-time")
    items = [item for item in all_items(setting.recipe) if item.name in chosen]
    with pytest.raises(
        HipaError, match=r"needs item references, which is not done. Run: --only references"
    ):
        run_item(items[1], setting, QUIET)
    for item in items:
        run_item(item, setting, QUIET)

    references = setting.result(FIRST)
    assert references is not None
    for split in SPLITS:
        base = references["rows"][BASE][split]
        truth = references["rows"][references["truth"]][split]
        mixed = references["rows"][LOW_OF_ONE][split]
        assert truth["pooled"]["distance"] == pytest.approx(0, abs=1e-5)
        assert truth["pooled"]["hf_ratio"] == 1
        assert base["pooled"]["distance"] > 0.01
        assert len(base["repeats"]) == 2
        assert mixed["pooled"]["distance"] < base["pooled"]["distance"]
        assert 0 <= base["pooled"]["recall@1"] <= base["pooled"]["recall@5"] <= 1
    main = setting.result(MAIN)
    matched = setting.result("latent-mse-time")
    assert main is not None
    assert matched is not None
    assert main["cost"]["images_seen"] == 12
    assert matched["cost"]["steps"] == matched_steps(items[-1], setting)

    text = write_report(setting, items).read_text()
    assert "Its numbers mean nothing" in text
    assert "Not done yet" not in text
    assert all(f"| {item.title} |" in text for item in items[1:])
    assert "HiPA against latent MSE, as much time: KID-Lite0" in text
    for name in re.findall(r"!\[.*\]\((.*)\)", text):
        assert Image.open(setting.out / name).width > 100
    with np.load(setting.folder(MAIN) / "images.npz") as images:
        assert images["held-out pairs"].shape == (6, 32, 32, 3)


def numbers(kid: float, ratio: float) -> dict[str, Any]:
    one = {"kid": kid, "distance": kid / 10, "hf_ratio": ratio}
    return {"pooled": one, "repeats": [one, {**one, "kid": kid + 0.1}]}


def result(name: str, title: str, group: str, kid: float, ratio: float) -> dict[str, Any]:
    measured = dict.fromkeys(SPLITS, numbers(kid, ratio))
    cost = {"trainable_parameters": 1000, "steps": 5, "images_seen": 80}
    return {"name": name, "title": title, "group": group, "splits": measured, "cost": cost}


def test_verdicts_follow_the_numbers(setting: Setting) -> None:
    reference_rows = {
        BASE: dict.fromkeys(SPLITS, numbers(2.0, 0.6)),
        "teacher, 25 steps": dict.fromkeys(SPLITS, numbers(0.0, 1.0)),
    }
    results = {
        FIRST: {
            "truth": "teacher, 25 steps",
            "retrieval": "not measured",
            "rows": reference_rows,
        },
        MAIN: result(MAIN, "HiPA", "main", 0.1, 0.9),
        "latent-mse": result("latent-mse", "latent MSE, as many steps", "baselines", 0.5, 0.7),
        "consistency": result("consistency", "consistency, as many steps", "baselines", 0.05, 0.7),
        "no-hf": result("no-hf", "no high-frequency term", "ablations", 0.1, 0.8),
    }
    text = render(setting, all_items(setting.recipe), results)
    assert "HiPA: KID gap closed 95%, at least 90% asked: met" in text
    assert "high-frequency ratio 0.90, 0.85 to 1.15 asked: met" in text
    assert re.search(r"latent MSE, as many steps: KID-Lite0 0.100 against 0.500, better", text)
    assert re.search(r"consistency, as many steps: KID-Lite0 0.100 against 0.050, worse", text)
    assert re.search(
        r"no high-frequency term: .*high-frequency ratio 0.900 against 0.800, better", text
    )
    assert (
        "| latent MSE, as many steps | 0.500 ± 0.071 | 0.050 ± 0.000 | 0.700 ± 0.000 | 75% |"
        in text
    )
    assert "Not done yet: shipped, progressive" in text
    assert "not timed" in text


def test_a_folder_keeps_to_one_setting(setting: Setting) -> None:
    keep_to_one_setting(setting)
    keep_to_one_setting(setting)
    other = Setting(**{**vars(setting), "repeats": 3})
    with pytest.raises(HipaError, match="was started with other settings"):
        keep_to_one_setting(other)


def test_a_result_of_another_adaptor_is_not_done(setting: Setting) -> None:
    setting.adaptor.mkdir()
    (setting.adaptor / "pytorch_lora_weights.safetensors").write_bytes(b"new")
    folder = setting.folder("shipped")
    folder.mkdir(parents=True)
    (folder / "result.json").write_text(json.dumps({"adaptor_sha256": "of the old one"}))
    assert setting.result("shipped") is None


def test_the_table_says_what_is_left(setting: Setting) -> None:
    items = all_items(setting.recipe)
    console = Console(file=io.StringIO(), width=160, record=True)
    console.print(items_table(items, setting))
    text = console.export_text()
    assert "what is left takes about" in text
    assert "latent consistency distillation, as much time" in text
    assert find_item(items, MAIN).title in text


def test_an_unknown_item_is_refused_before_its_plan(tmp_path: Path) -> None:
    with pytest.raises(HipaError, match="item 'hippa' is unknown"):
        main(tmp_path / "report", quick=True, only="hippa", plan_only=True)
    assert not (tmp_path / "report").exists()

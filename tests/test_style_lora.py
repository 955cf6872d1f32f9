"""examples/style_lora: the LoRA trains, diffusers and --lora read it alike, and it is measured."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image, ImageDraw
from safetensors.torch import load_file

from hipa_deploy import embedded
from hipa_deploy.models.style import LoraChoice, Style
from hipa_deploy.train.evaluation.quality import one_step_images
from hipa_deploy.train.model.diffusion_model import DiffusionModel

EXAMPLE = Path(__file__).parents[1] / "examples" / "style_lora"
WORDS = ("fox", "lemon", "key", "rocket", "house", "star", "bell", "crab")


def script(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A script of the example, imported as Python imports it when it is run."""
    monkeypatch.setattr(sys, "path", [str(EXAMPLE), *sys.path])
    return importlib.import_module(name)


def write_images(folder: Path, count: int) -> None:
    """Black shapes on white, each another one, with captions."""
    folder.mkdir(parents=True)
    lines = []
    for number in range(count):
        image = Image.new("RGB", (64, 64), "white")
        ImageDraw.Draw(image).ellipse((8 + 3 * number, 8, 56, 56 - 4 * number), "black")
        image.save(folder / f"{number}.png")
        text = f"flat emoji of a {WORDS[number]}"
        lines.append(json.dumps({"file_name": f"{number}.png", "text": text}))
    (folder / "metadata.jsonl").write_text("\n".join(lines))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as the scripts leave it: images, and a LoRA of two steps."""
    run = tmp_path_factory.mktemp("style")
    write_images(run / "images", 3)
    write_images(run / "held_out", 8)
    write_images(run / "rest", 4)
    with pytest.MonkeyPatch.context() as patch:
        train_lora = script("train_lora", patch)
        train_lora.main(run / "images", run / "lora", steps=2, batch=2, rank=4)
    return run


def test_the_lora_changes_the_attention_alone_and_is_the_same_for_diffusers(trained: Path) -> None:
    plain = DiffusionModel.load(embedded.MODEL, "cpu").unet.state_dict()
    style = Style(loras=(LoraChoice(trained / "lora"),))
    ours = DiffusionModel.load(embedded.MODEL, "cpu", style=style).unet.state_dict()

    pipe = StableDiffusionPipeline.from_pretrained(
        embedded.MODEL, torch_dtype=torch.float32, safety_checker=None
    )
    pipe.load_lora_weights(trained / "lora")
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    theirs = pipe.unet.state_dict()

    assert ours.keys() == theirs.keys()
    changed = set()
    for name, weight in ours.items():
        torch.testing.assert_close(weight, theirs[name], rtol=1e-5, atol=1e-6)
        if not torch.equal(weight, plain[name]):
            changed.add(name)
    attention = {
        name
        for name in plain
        if name.endswith(("to_q.weight", "to_k.weight", "to_v.weight", "to_out.0.weight"))
    }
    assert changed == attention


def test_lora_and_adaptor_are_joined_in_one_step(trained: Path) -> None:
    prompts = ["flat emoji of a fox"]
    strong = Style(loras=(LoraChoice(trained / "lora", 20.0),))
    joined = one_step_images(embedded.MODEL, embedded.ADAPTOR, prompts, [0], style=strong)
    alone = one_step_images(embedded.MODEL, embedded.ADAPTOR, prompts, [0])
    assert (joined != alone).any()


def test_the_same_seed_gives_the_same_lora(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train_lora = script("train_lora", monkeypatch)
    train_lora.main(trained / "images", tmp_path, steps=2, batch=2, rank=4)
    # The order of the tensors in the file is not the same each time; their values are.
    name = "pytorch_lora_weights.safetensors"
    again = load_file(tmp_path / name)
    first = load_file(trained / "lora" / name)
    assert again.keys() == first.keys()
    assert all(torch.equal(again[key], first[key]) for key in first)


@pytest.mark.thorough
@pytest.mark.slow
def test_the_report_has_every_row(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measure_style = script("measure_style", monkeypatch)
    fewer = measure_style.TEACHER.model_copy(update={"steps": 4})
    monkeypatch.setattr(measure_style, "TEACHER", fewer)
    measure_style.main(trained, tmp_path, repeats=2, count=8)
    table = json.loads((tmp_path / "table.json").read_text())
    styled = table[measure_style.STYLED][0]
    assert styled["distance"] == pytest.approx(0, abs=1e-5)
    assert abs(styled["teacher_kid"]) < abs(table[measure_style.BASE][0]["teacher_kid"])
    assert styled["high_frequency"] == pytest.approx(1)
    merged = table[measure_style.MERGED][0]
    assert 0 < merged["distance"] < table[measure_style.BASE][0]["distance"]
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.width > 5 * 128
        assert sheet.height > 8 * 128


def test_images_are_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measure_style = script("measure_style", monkeypatch)
    path = tmp_path / "images" / "row.npy"
    assert measure_style.kept(path, lambda: np.zeros(3)).tolist() == [0, 0, 0]
    assert measure_style.kept(path, lambda: np.ones(3)).tolist() == [0, 0, 0]
    assert [file.name for file in path.parent.iterdir()] == ["row.npy"]


def test_colour_and_recall(monkeypatch: pytest.MonkeyPatch) -> None:
    measure_style = script("measure_style", monkeypatch)
    grey = np.full((1, 2, 2, 3), 90, np.uint8)
    red = grey * np.array([1, 0, 0], np.uint8)
    assert measure_style.colour(grey) == 0
    assert measure_style.colour(red) == pytest.approx(90 / 255)

    assert measure_style.black_or_white(grey) == 0
    assert measure_style.black_or_white(np.zeros_like(grey)) == 1
    assert measure_style.black_or_white(np.full_like(grey, 255)) == 1

    real = torch.eye(8)
    assert measure_style.recall(real, real, at=1) == 1
    assert measure_style.recall(real.roll(1, dims=0), real, at=1) == 0


def test_images_vote_for_the_style_that_they_are_nearest_to(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measure_style = script("measure_style", monkeypatch)
    colours = np.random.default_rng(0).integers(0, 256, (6, 4, 4, 3), np.uint8)
    images_NHWC = colours.repeat(16, axis=1).repeat(16, axis=2)
    np.savez(tmp_path / "emoji.npz", images=images_NHWC)
    lines = ["style,caption"]
    for number in range(6):
        style = ("3d", "flat")[number % 2]
        lines.append(f"{style},{style} emoji of a {number}")
    (tmp_path / "captions.csv").write_text("\n".join(lines))

    shapes_NHWC, _ = measure_style.read_folder(trained / "rest")
    features_ND = measure_style.lite0_features(shapes_NHWC)
    real = measure_style.Real(shapes_NHWC, features_ND, features_ND)
    styles = measure_style.Styles.of(tmp_path, real, ["flat emoji of a 5"])
    assert styles.means_SD.shape == (3, 1280)
    assert styles.vote(features_ND) == 1
    assert styles.vote(measure_style.lite0_features(images_NHWC)) == 0


def test_the_concepts_to_measure_on_are_new_to_the_lora_and_to_the_training_of_hipa(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    build_images = script("build_images", monkeypatch)
    held_out = build_images.held_out_concepts()
    assert len(held_out) == len(set(held_out)) == build_images.HELD_OUT
    assert build_images.TRAINED.isdisjoint(held_out)
    assert len(build_images.TRAINED) == 20
    assert {*held_out, *build_images.TRAINED} <= set(build_images.known_concepts())

    prompts = build_images.training_prompts(held_out)
    assert "flat emoji of a fox on a pink background" in prompts
    for concept in held_out:
        caption = build_images.exact_caption("flat", concept)
        assert caption not in prompts
        assert not any(prompt.startswith(f"{caption} on a ") for prompt in prompts)


def test_missing_icons_are_an_error_with_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build_images = script("build_images", monkeypatch)
    with pytest.raises(SystemExit, match="npm install"):
        build_images.main(tmp_path / "out", modules=tmp_path)


def test_icons_are_rendered_with_their_captions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("resvg_py", reason="only the example needs it")
    build_images = script("build_images", monkeypatch)
    icons = {}
    for concept in build_images.known_concepts():
        icons[concept.replace(" ", "-")] = {"body": '<circle cx="16" cy="16" r="12"/>'}
    path = tmp_path / build_images.ICONS
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps({"icons": icons, "width": 32, "height": 32}))

    build_images.main(tmp_path / "out", modules=tmp_path)
    rows = (tmp_path / "out/images/metadata.jsonl").read_text().splitlines()
    captions = {json.loads(row)["file_name"]: json.loads(row)["text"] for row in rows}
    assert captions["gem-stone.png"] == "flat emoji of a gem stone"
    with Image.open(tmp_path / "out/images/gem-stone.png") as image:
        assert image.size == (256, 256)
        assert image.getpixel((128, 128)) == (0, 0, 0)
        assert image.getpixel((1, 1)) == (255, 255, 255)

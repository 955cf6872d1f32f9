from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image
from rich.console import Console

from hipa_deploy.errors import HipaError
from hipa_deploy.train.data import teacher_pairs
from hipa_deploy.train.data.examples import task_examples
from hipa_deploy.train.data.source_images import folder_source_images, teacher_source_images
from hipa_deploy.train.data.teacher_pairs import Pairs
from hipa_deploy.train.model.diffusion_model import DiffusionModel, to_float, to_uint8
from hipa_deploy.train.recipes.recipe import Recipe

QUIET = Console(quiet=True)


def test_captions_follow_the_prompts_that_there_are(model: DiffusionModel, tmp_path: Path) -> None:
    for name, colour in {"a.png": "red", "b.jpg": "blue", "c.png": "white"}.items():
        Image.new("RGB", (40, 30), colour).save(tmp_path / name)
    (tmp_path / "metadata.csv").write_text("file_name,text\na.png,snow\nb.jpg,a boat\n")
    images, prompts = folder_source_images(model, tmp_path, ["a boat"], QUIET)
    assert prompts == ["a boat", "snow", ""]
    assert images.prompt_N.tolist() == [1, 0, 2]
    assert (len(images), images.prompts, len(images.key["images"])) == (3, 3, 3)
    rows = torch.arange(3)
    assert images.images(rows).shape == (3, *model.resolution, 3)
    expected = model.encode(to_float(images.images(rows)))
    assert torch.allclose(images.latents(rows), expected, atol=1e-5)


def test_a_folder_without_images(model: DiffusionModel, tmp_path: Path) -> None:
    expected = r"Expected a folder of .bmp, .jpeg"
    with pytest.raises(HipaError, match=rf"none: there is no such folder. {expected}"):
        folder_source_images(model, tmp_path / "none", [], QUIET)
    (tmp_path / "file").touch()
    with pytest.raises(HipaError, match=rf"file: it is a file. {expected}"):
        folder_source_images(model, tmp_path / "file", [], QUIET)
    with pytest.raises(HipaError, match=rf"no image in it. {expected}"):
        folder_source_images(model, tmp_path, [], QUIET)


def test_a_damaged_image_is_found_at_once(
    model: DiffusionModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Also among images that do not fit in memory, which a step reads hours later.
    monkeypatch.setattr(teacher_pairs, "TABLE_BYTES", 0)
    for number in range(3):
        Image.new("RGB", (40, 30), "red").save(tmp_path / f"{number}.jpg")
    images, _ = folder_source_images(model, tmp_path, [], QUIET, captions=False)
    assert images.images(torch.tensor([2])).shape == (1, *model.resolution, 3)
    last = tmp_path / "2.jpg"
    last.write_bytes(last.read_bytes()[:-40])
    with pytest.raises(HipaError, match=r"2\.jpg cannot be read"):
        folder_source_images(model, tmp_path, [], QUIET, captions=False)


def test_the_teachers_images_are_decoded_from_its_latents(model: DiffusionModel) -> None:
    latents = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(0)).half()
    pairs = Pairs(latents, prompt_N=torch.tensor([1, 0, 1]), seed_N=torch.arange(3))
    images = teacher_source_images(model, pairs, 2, model.decode, QUIET)
    rows = torch.tensor([2, 0])
    with torch.no_grad():
        expected = to_uint8(model.decode(latents.float()))[rows]
    assert torch.equal(images.images(rows), expected)
    assert torch.equal(images.latents(rows), latents[rows].float())
    # Edits in the caches of older versions have this key.
    assert images.key == {"images": "teacher's"}


def test_few_large_images_are_encoded_at_once(
    model_dir: Path, recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(8):
        Image.new("RGB", (8, 8)).save(tmp_path / f"{number}.png")
    source = {"images": str(tmp_path), "captions": False, "factor": 2}
    values = recipe.model_dump() | {"task": "upscale", "source": source, "resolution": 400}
    large = Recipe.model_validate(values)
    model = DiffusionModel.load(model_dir, "cpu", size=large.size)
    encoded = []

    def encode(self: DiffusionModel, image_BCHW: torch.Tensor) -> torch.Tensor:
        encoded.append(len(image_BCHW))
        return torch.zeros(len(image_BCHW), *self.latent_shape_CHW)

    monkeypatch.setattr(DiffusionModel, "encode", encode)
    task_examples(model, large, ["a boat"], console=QUIET)
    # The images, and what they start from; the first of each says how large all are.
    assert encoded == [1, 6, 2, 1, 6, 2]

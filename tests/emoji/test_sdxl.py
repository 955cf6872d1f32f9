"""examples/emoji_sdxl: the embedded model becomes an SDXL that diffusers takes and that trains."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
import torch
from convert_unet import copy_unet, fit_contexts, load_pipeline, new_unet, save_model
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
from pretrain_unet import EACH
from pretrain_unet import main as pretrain
from sized_pictures import cropped, plain, small_original, variants
from train_second_encoder import EMBEDDED, POOLED, WIDTH, new_second_encoder, second_tokenizer

from hipa_deploy.train.model.conditions import predict
from hipa_deploy.train.model.diffusion_model import DiffusionModel

CAPTIONS = ["3d emoji of a red apple", "noto emoji of a fox"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's folder: two images and an untrained second encoder."""
    folder = tmp_path_factory.mktemp("run")
    torch.manual_seed(0)
    tokenizer = second_tokenizer()
    tokenizer.save_pretrained(folder / "tokenizer_2")
    new_second_encoder(tokenizer).save_pretrained(folder / "text_encoder_2")
    images = np.random.default_rng(0).integers(0, 256, (2, 128, 128, 3), dtype=np.uint8)
    np.savez(folder / "emoji.npz", images=images)
    with (folder / "captions.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["caption", "split"])
        writer.writerows([[caption, "train"] for caption in CAPTIONS])
    return folder


@pytest.fixture(scope="module")
def start(run: Path) -> Path:
    """The converted model."""
    save_model(load_pipeline(run, CAPTIONS), run / "start")
    return run / "start"


def test_the_unet_predicts_what_the_embedded_one_does_of_mapped_contexts() -> None:
    old = UNet2DConditionModel.from_pretrained(EMBEDDED, subfolder="unet").float()
    torch.manual_seed(0)
    new = new_unet(old, 192 + WIDTH, POOLED)
    fit_DE = torch.randn(192 + WIDTH, 192) / 16
    copy_unet(old, new, fit_DE)

    x = torch.randn(2, 4, 16, 16)
    context = torch.randn(2, 77, 192 + WIDTH)
    added = {"text_embeds": torch.randn(2, POOLED), "time_ids": torch.rand(2, 6) * 128}
    with torch.no_grad():
        ours = new(x, 500, context, added_cond_kwargs=added).sample
        theirs = old(x, 500, context @ fit_DE).sample
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_new_contexts_stand_for_the_old_ones(start: Path) -> None:
    pipe = StableDiffusionXLPipeline.from_pretrained(start, add_watermarker=False)
    fit_DE, explained = fit_contexts(pipe, CAPTIONS)
    assert 0.99 < explained <= 1

    # Against the embedded model's own pipeline, which encodes prompts by itself.
    old = StableDiffusionPipeline.from_pretrained(
        EMBEDDED, torch_dtype=torch.float32, safety_checker=None
    )
    theirs = old.encode_prompt(CAPTIONS, "cpu", 1, do_classifier_free_guidance=False)[0]
    ours = pipe.encode_prompt(CAPTIONS, do_classifier_free_guidance=False)[0] @ fit_DE
    assert (ours - theirs).square().mean() < 0.02 * theirs.var()


def test_diffusers_and_the_training_read_the_model(start: Path) -> None:
    pipe = StableDiffusionXLPipeline.from_pretrained(start, add_watermarker=False)
    pipe.set_progress_bar_config(disable=True)
    assert pipe.config.force_zeros_for_empty_prompt
    made = pipe(CAPTIONS, num_inference_steps=2, output_type="np", generator=torch.manual_seed(0))
    assert made.images.shape == (2, 128, 128, 3)

    model = DiffusionModel.load(start, "cpu")
    conditions = model.conditions(CAPTIONS)
    assert conditions.sizes_B6 is not None
    assert conditions.sizes_B6.tolist() == [[128, 128, 0, 0, 128, 128]] * 2
    context, _, pooled, _ = pipe.encode_prompt(CAPTIONS, do_classifier_free_guidance=False)
    torch.testing.assert_close(conditions.context_BLD, context)
    torch.testing.assert_close(conditions.pooled_BP, pooled)


def test_a_step_of_training_reaches_every_condition(run: Path, start: Path) -> None:
    pretrain(run, start, run / "sdxl", steps=2, batch=2, rate=0.1)
    model = DiffusionModel.load(run / "sdxl", "cpu")
    conditions = model.conditions(CAPTIONS[:1])
    x = model.noise([0])
    before = predict(model.unet, x, 999, conditions)
    others = model.conditions(CAPTIONS[1:])
    for name in ("context_BLD", "pooled_BP"):
        changed = conditions.__class__(**{**vars(conditions), name: getattr(others, name)})
        assert not torch.allclose(predict(model.unet, x, 999, changed), before, atol=1e-4), name
    for number in range(6):
        sizes = conditions.sizes_B6.clone()
        sizes[0, number] += 16
        changed = conditions.__class__(conditions.context_BLD, conditions.pooled_BP, sizes)
        assert not torch.allclose(predict(model.unet, x, 999, changed), before, atol=1e-5), number


def test_the_six_numbers_say_how_a_picture_was_made() -> None:
    image = np.zeros((128, 128, 3), np.uint8)
    image[40:88, 56:72] = 200
    assert plain(image).sizes == (128, 128, 0, 0, 128, 128)

    # Cut at 10 of 20 pixels, the image is in its old place; cut at 0 it lies 10 pixels further.
    middle = cropped(image, 20, 10, upright=False)
    assert middle.sizes == (128, 148, 0, 10, 128, 128)
    np.testing.assert_array_equal(middle.image_HWC, image)
    first = cropped(image, 20, 0, upright=True)
    assert first.sizes == (148, 128, 0, 0, 128, 128)
    np.testing.assert_array_equal(first.image_HWC[10:], image[:118])
    assert (first.image_HWC[:10] == 255).all()

    small = small_original(image, 16)
    assert small.sizes == (16, 16, 0, 0, 128, 128)
    assert np.abs(np.diff(small.image_HWC.astype(int), axis=1)).max() < 200

    made = variants(image, np.random.default_rng(0), EACH)
    assert len(made) == 1 + 2 * EACH
    assert {one.image_HWC.shape for one in made} == {(128, 128, 3)}

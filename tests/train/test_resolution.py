"""Training at another size than the model was made for: ``resolution`` of a recipe."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from diffusers import DDIMScheduler, StableDiffusionXLPipeline
from rich.console import Console

from hipa_deploy.errors import HipaError
from hipa_deploy.export.export_options import ExportOptions
from hipa_deploy.export.export_request import resolve_request
from hipa_deploy.models.adaptor_folder import read_metadata
from hipa_deploy.models.style import Style
from hipa_deploy.train.evaluation.contenders import OtherAdaptor
from hipa_deploy.train.evaluation.quality import one_step_images
from hipa_deploy.train.evaluation.quality_report import BASE, make_images
from hipa_deploy.train.evaluation.rivals import check_rivals, rival_images
from hipa_deploy.train.model.diffusion_model import DiffusionModel
from hipa_deploy.train.prediction import training_cost
from hipa_deploy.train.prediction.simulated_training import unloaded_model
from hipa_deploy.train.recipes.recipe import Recipe
from hipa_deploy.train.train_adaptor import train_adaptor
from hipa_deploy.train.training_request import check_dry_run, check_request

PROMPTS = ["a red apple", "a boat"]
SMALL = (32, 32)  # the tiny SDXL is made for 64
QUIET = Console(file=io.StringIO())


@pytest.fixture(scope="module")
def small_recipe() -> Recipe:
    return Recipe.model_validate(
        {
            "prompts": "model:prompts.txt",
            "steps": 2,
            "batch": 2,
            "samples": 1,
            "resolution": 32,
            "adaptor": {"preset": "full", "rank": 2},
            "teacher": {"steps": 3, "pairs": 4, "batch": 4},
            "optimiser": {"learning_rate": 0.1},
        }
    )


@pytest.fixture(scope="module")
def small(
    tmp_path_factory: pytest.TempPathFactory, sdxl_dir: Path, cache: Path, small_recipe: Recipe
) -> Path:
    """An adaptor that was trained at 32 pixels."""
    out = tmp_path_factory.mktemp("adaptor") / "small"
    return train_adaptor(small_recipe, sdxl_dir, out, cache=cache, console=QUIET, device="cpu")


def test_images_are_those_of_diffusers_at_that_size(sdxl_dir: Path, small: Path) -> None:
    assert read_metadata(small, sdxl_dir).resolution == SMALL
    ours = one_step_images(sdxl_dir, small, PROMPTS, [3, 4], device="cpu")
    assert ours.shape == (2, 32, 32, 3)

    # The pipeline tells the UNet 32, 32, 0, 0, 32, 32 of images of this size.
    pipe: Any = StableDiffusionXLPipeline.from_pretrained(sdxl_dir)
    pipe.load_lora_weights(small)
    pipe.scheduler = DDIMScheduler.from_pretrained(small / "scheduler")
    theirs = pipe(
        PROMPTS,
        latents=DiffusionModel.load(sdxl_dir, "cpu", size=SMALL).noise([3, 4]),
        height=32,
        width=32,
        num_inference_steps=1,
        guidance_scale=0.0,
        output_type="np",
    ).images
    theirs = np.round(theirs * 255).astype(np.int16)
    assert np.abs(ours.astype(np.int16) - theirs).max() <= 1


def test_reports_have_that_size_in_every_row(sdxl_dir: Path, small: Path, recipe: Recipe) -> None:
    rows, again = make_images(sdxl_dir, small, PROMPTS, recipe.teacher, 4, QUIET)
    assert {images.shape for images in [*rows.values(), again]} == {(4, 32, 32, 3)}
    assert BASE in rows

    # Another adaptor of this size is compared with it, and is refused at another size.
    other = OtherAdaptor(small)
    check_rivals([other], sdxl_dir, Style(), SMALL)
    made = rival_images(sdxl_dir, other, PROMPTS, [3, 4], device="cpu", size=SMALL)
    np.testing.assert_array_equal(
        made, one_step_images(sdxl_dir, small, PROMPTS, [3, 4], device="cpu")
    )
    with pytest.raises(HipaError, match=r"trained at 32x32 pixels .* report's images have 64x64"):
        check_rivals([other], sdxl_dir, Style())


def test_a_bundle_has_that_size_unless_another_is_asked_for(
    sdxl_dir: Path, small: Path, tmp_path: Path
) -> None:
    def size(**options: Any) -> tuple[int, int]:
        wanted = ExportOptions(model=str(sdxl_dir), out=tmp_path / "bundle", **options)
        step = resolve_request(wanted).step
        return step.height, step.width

    assert size() == (64, 64)
    assert size(adaptor=small) == SMALL
    assert size(adaptor=small, width=64) == (32, 64)
    with pytest.raises(HipaError, match="height 0 does not fit"):
        size(adaptor=small, height=0)


def test_predictions_are_for_that_size(
    sdxl_dir: Path, small_recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The whole prediction takes ten seconds: what it is made of is enough here.
    models = []

    def made(*given: Any) -> Any:
        models.append(unloaded_model(*given))
        raise InterruptedError

    monkeypatch.setattr(training_cost, "unloaded_model", made)
    for predict in (training_cost.predict_training, training_cost.measure_steps):
        with pytest.raises(InterruptedError):
            predict(small_recipe, sdxl_dir)
    assert [model.resolution for model in models] == [SMALL, SMALL]
    assert [model.latent_shape_CHW for model in models] == [(4, 8, 8)] * 2


def test_a_size_that_does_not_fit_is_refused_before_anything(
    sdxl_dir: Path, small_recipe: Recipe, tmp_path: Path
) -> None:
    odd = small_recipe.model_copy(update={"resolution": 40})
    message = r"resolution 40 does not fit .*\. Expected a multiple of 16: 32 is nearest"
    for check in (check_request, check_dry_run):
        with pytest.raises(HipaError, match=message):
            check(odd, sdxl_dir, None, Style())
    with pytest.raises(HipaError, match=message):
        train_adaptor(odd, sdxl_dir, tmp_path / "out", console=QUIET, device="cpu")
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match="greater than or equal to 8"):
        Recipe.model_validate({**small_recipe.model_dump(), "resolution": 4})

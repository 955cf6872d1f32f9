"""A tiny SDXL with its base UNet: final images are those of StableDiffusionXLPipeline."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionXLPipeline

from hipa_deploy import OneStepPipeline
from hipa_deploy.bundle.folder import Bundle
from hipa_deploy.bundle.manifest import RefineSettings
from hipa_deploy.export.export_bundle import export_bundle
from hipa_deploy.export.export_options import ExportOptions
from hipa_deploy.export.graph.axes import parse_axes
from hipa_deploy.generate.noise import initial_noise
from hipa_deploy.train.data.teacher_pairs import teacher_scheduler
from tests.export.conftest import SD_SCHEDULE, make_adaptor
from tests.tiny_sdxl import make_sdxl

RECIPE = {"teacher": {"sampler": "dpmsolver++", "steps": 5, "guidance": 2.5, "pairs": 64}}
OWN = {"sampler": "dpmsolver++", "steps": 5, "guidance": 2.5}
DDIM = {"sampler": "ddim", "steps": 4, "guidance": 7.5}
PROMPT = "a red apple!!"  # SDXL's two tokenizers read exclamation marks differently


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_sdxl(tmp_path_factory.mktemp("model") / "sdxl")


@pytest.fixture(scope="module")
def taught(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adaptor of every layer, those of the time embedding too."""
    return make_adaptor(model, tmp_path_factory.mktemp("taught") / "taught", recipe=RECIPE)


@pytest.fixture(scope="module")
def bundle(model: Path, taught: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    options = ExportOptions(
        model=str(model),
        out=tmp_path_factory.mktemp("refine") / "bundle",
        adaptor=taught,
        dtype="fp32",
        dynamic=parse_axes("batch=1:2:4"),
        with_teacher=True,
    )
    return export_bundle(options)


@pytest.fixture(scope="module")
def pipe(bundle: Bundle) -> Iterator[OneStepPipeline]:
    with OneStepPipeline.load(bundle.root, "onnxruntime") as loaded:
        yield loaded


def diffusers_result(model: Path, seed: int, settings: RefineSettings) -> tuple[Any, Any]:
    """Latents, scaled, and the image in levels of 0 to 255, of diffusers' own pipeline."""
    pipe = StableDiffusionXLPipeline.from_pretrained(model, add_watermarker=False)
    pipe.set_progress_bar_config(disable=True)
    schedule = {**SD_SCHEDULE, "prediction_type": "epsilon"}
    pipe.scheduler = teacher_scheduler(schedule, settings.sampler)
    request = {
        "prompt": PROMPT,
        "latents": torch.from_numpy(initial_noise([seed], (4, 16, 16))),
        "num_inference_steps": settings.steps,
        "guidance_scale": settings.guidance,
    }
    latents_BCHW = pipe(**request, output_type="latent").images.numpy()
    image_HWC = pipe(**request, output_type="np").images[0]
    return latents_BCHW, np.round(image_HWC * 255).astype(int)


def our_latents(pipe: OneStepPipeline, seed: int, settings: RefineSettings) -> np.ndarray:
    """What the decoder is given."""
    seen: dict[str, np.ndarray] = {}
    run = pipe.stages.run

    def record(feed: Any, *rest: Any) -> Any:
        seen.update(feed)
        return run(feed, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipe.stages, "run", record)
        pipe.refine(pipe(PROMPT, seed=seed), **settings.model_dump())
    return seen["latents"]


@pytest.mark.parametrize("wish", [OWN, DDIM, {**OWN, "guidance": 1}])
def test_final_images_are_those_of_diffusers(
    pipe: OneStepPipeline, model: Path, wish: dict[str, Any]
) -> None:
    settings = RefineSettings(**wish)
    expected_BCHW, expected_HWC = diffusers_result(model, 11, settings)
    latents_BCHW = our_latents(pipe, 11, settings)
    assert np.abs(latents_BCHW - expected_BCHW).max() < 1e-4 * np.abs(expected_BCHW).max()
    draft = pipe(PROMPT, seed=11)
    final = pipe.refine(draft, **wish)
    assert np.abs(final.images_BHWC[0] - expected_HWC).max() <= 1
    assert np.abs(draft.images_BHWC[0] - expected_HWC).mean() > 1

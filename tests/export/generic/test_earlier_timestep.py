"""An adaptor whose step starts before the last timestep, in diffusers, optimum and bundles."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import LCMScheduler, StableDiffusionPipeline

from hipa_deploy import OneStepPipeline
from hipa_deploy.bundle.parity import compare
from hipa_deploy.export.export_bundle import export_bundle
from hipa_deploy.export.export_options import ExportOptions
from hipa_deploy.generate.noise import initial_noise
from tests.export.conftest import make_adaptor

PROMPT = "a green pear"
TIMESTEP = 600


@pytest.fixture(scope="module")
def adaptor(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_adaptor(model_dir, tmp_path_factory.mktemp("early") / "adaptor", timestep=TIMESTEP)


def image_of(pipe: Any, **call: Any) -> np.ndarray:
    """The image uint8 [H, W, 3] that a pipeline with the interface of diffusers makes of seed 5."""
    pipe.set_progress_bar_config(disable=True)
    noise_BCHW = torch.from_numpy(initial_noise([5], (4, 8, 8)))
    images = pipe(PROMPT, guidance_scale=0, latents=noise_BCHW, output_type="np", **call).images
    return (images[0] * 255).round().astype(np.uint8)


@pytest.mark.parametrize("layout", ["onestep", "generic"])
def test_the_same_image_everywhere(
    model_dir: Path, adaptor: Path, tmp_path: Path, layout: str
) -> None:
    options = ExportOptions(
        model=str(model_dir), adaptor=adaptor, out=tmp_path / "b", dtype="fp32", layout=layout
    )
    bundle = export_bundle(options)
    assert bundle.manifest.one_step.timestep == TIMESTEP
    with OneStepPipeline.load(bundle.root, "onnxruntime") as pipe:
        ours_HWC = pipe(PROMPT, seed=5).images_BHWC[0]

    theirs = StableDiffusionPipeline.from_pretrained(model_dir, safety_checker=None)
    theirs.load_lora_weights(adaptor)
    theirs.scheduler = LCMScheduler.from_pretrained(adaptor, subfolder="scheduler")
    for call in ({"num_inference_steps": 1}, {"timesteps": [TIMESTEP]}):
        assert compare(image_of(theirs, **call), ours_HWC).psnr_db >= 40
    if layout == "generic":
        pytest.importorskip("optimum.onnxruntime")
        from optimum.onnxruntime import ORTDiffusionPipeline

        loaded = ORTDiffusionPipeline.from_pretrained(bundle.root, provider="CPUExecutionProvider")
        assert compare(image_of(loaded, num_inference_steps=1), ours_HWC).psnr_db >= 40

"""SDXL's VAE overflows float16: the gates find the layers, and islands mend the decoder."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from hipa_deploy.export.builders import decoder_module
from hipa_deploy.export.chosen_parts import ChosenParts
from hipa_deploy.export.graph.modules import stage_specs
from hipa_deploy.export.model_parts import ModelParts
from hipa_deploy.export.references import References, add_images
from hipa_deploy.export.task import TaskSettings
from hipa_deploy.export.writer import StageSource, StageWriter
from tests.tiny_sdxl import make_sdxl

# The published VAE reaches some 1e5 in the residual stream of its decoder.
SCALE = 3e5


@pytest.mark.parametrize(
    "overflows",
    [
        pytest.param(True, id="published"),
        pytest.param(False, id="fp16-fix", marks=pytest.mark.thorough),
    ],
)
def test_the_vae_that_overflows_gets_islands(tmp_path: Path, overflows: bool) -> None:
    folder = make_sdxl(tmp_path / "sdxl")
    if overflows:
        path = folder / "vae/diffusion_pytorch_model.safetensors"
        weights = load_file(path)
        # The norms after it divide by the size of their input, so the images stay images.
        for name in ("decoder.conv_in.weight", "decoder.conv_in.bias"):
            weights[name] *= SCALE
        save_file(weights, path, metadata={"format": "pt"})
    model = ModelParts.open(str(folder))
    parts = ChosenParts(model, "generate")
    step = model.one_step(999, None, None)
    latents = torch.randn(1, *step.latent_shape, generator=torch.Generator().manual_seed(0))
    made = References("", (0,), {"latents": latents.numpy()})
    made = add_images(made, parts, TaskSettings(), step, watch=True)
    specs = stage_specs("onestep", "fp16", 1, step, 77, 40, {})
    writer = StageWriter(tmp_path / "out", "fp16", specs, made)
    source = StageSource("vae_decoder", partial(decoder_module, parts), ("latents",), "images")
    stage = writer.write(source, made.tensors).stage
    assert stage.parity.psnr_db >= 35
    assert stage.precision == "fp16"
    if overflows:
        assert "decoder.conv_in" in stage.fp32_islands
    else:
        assert stage.fp32_islands == ()

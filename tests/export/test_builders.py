"""Which stages a bundle has, and what each is built from."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from hipa_deploy.export.builders import bundle_sources
from hipa_deploy.export.chosen_parts import ChosenParts
from hipa_deploy.export.export_options import ExportOptions
from hipa_deploy.export.generic.generic_modules import GenericDecoder, GenericUNet
from hipa_deploy.export.graph.modules import (
    Generator,
    OneStepDecoder,
    OneStepEncoder,
    OneStepUNet,
    TextEncoderStage,
)
from hipa_deploy.export.model_parts import ModelParts
from hipa_deploy.export.task import choose_task
from hipa_deploy.export.writer import StageSource


def sources_of(model_dir: Path, **changes) -> list[StageSource]:
    options = ExportOptions(model=str(model_dir), out=Path("out"), **changes)
    model = ModelParts.open(str(model_dir))
    settings = choose_task(options, model)
    step = model.one_step(settings.timestep, None, None)
    parts = ChosenParts.choose(model, options, settings.task)
    return bundle_sources(options, parts, settings, step)


@pytest.mark.parametrize(
    ("changes", "stages"),
    [
        (
            {},
            {"text_encoder": TextEncoderStage, "unet": OneStepUNet, "vae_decoder": OneStepDecoder},
        ),
        ({"fuse": True}, {"text_encoder": TextEncoderStage, "generator": Generator}),
        ({"prompts": Path("set.txt"), "fuse": True}, {"generator": Generator}),
        (
            {"task": "upscale", "fuse": True},
            {
                "text_encoder": TextEncoderStage,
                "vae_encoder": OneStepEncoder,
                "generator": Generator,
            },
        ),
        (
            {"layout": "generic"},
            {"text_encoder": TextEncoderStage, "unet": GenericUNet, "vae_decoder": GenericDecoder},
        ),
    ],
)  # fmt: skip
def test_the_stages_of_a_bundle(model_dir: Path, changes: dict, stages: dict[str, type]) -> None:
    built = {source.name: type(source.build()) for source in sources_of(model_dir, **changes)}
    assert built == stages


@pytest.mark.parametrize("changes", [{}, {"task": "edit"}, {"layout": "generic"}])
def test_a_stage_takes_what_the_stages_before_it_give(model_dir: Path, changes: dict) -> None:
    known = {"tokens", "noise", "image", "mask", "step", "timestep"}
    for source in sources_of(model_dir, **changes):
        # Of the generic UNet's output the runtime makes what the decoder takes.
        if "output" in known:
            known.add("latent_sample")
        assert known >= set(source.inputs)
        known.add(source.output)


@pytest.mark.parametrize(("dtype", "expected"), [("fp16", torch.float16), ("fp32", torch.float32)])
def test_the_context_has_the_type_that_the_unet_takes(
    model_dir: Path, dtype: str, expected: torch.dtype
) -> None:
    text_encoder = sources_of(model_dir, dtype=dtype)[0].build()
    assert text_encoder(torch.zeros(1, 77, dtype=torch.int64)).dtype == expected

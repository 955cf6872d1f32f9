"""The stages as modules: their tensors, and that conversion and names are right."""

from __future__ import annotations

import inspect
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel

from hipa_deploy.bundle.manifest import Axis, OneStep, Strength
from hipa_deploy.export.graph.fold import fold_timestep
from hipa_deploy.export.graph.modules import (
    Generator,
    OneStepDecoder,
    OneStepEncoder,
    OneStepUNet,
    from_uint8,
    place_of,
    seen_by_unet,
    stage_specs,
    to_uint8,
)
from hipa_deploy.tasks import Task, unet_inputs

STEP = OneStep(
    prediction_type="epsilon", timestep=999, alpha_bar=0.0047, scaling_factor=0.18215,
    latent_shape=(4, 8, 8), height=32, width=32,
)  # fmt: skip
STRENGTHS = (
    Strength(strength=1.0, timestep=999, alpha_bar=0.0047),
    Strength(strength=0.5, timestep=499, alpha_bar=0.2774),
)


def folded_unet(model_dir: Path, *timesteps: int) -> UNet2DConditionModel:
    unet = UNet2DConditionModel.from_pretrained(model_dir, subfolder="unet")
    fold_timestep(unet, *timesteps)
    return unet.requires_grad_(False)


def load_vae(model_dir: Path) -> AutoencoderKL:
    return AutoencoderKL.from_pretrained(model_dir, subfolder="vae").requires_grad_(False)


def test_uint8_there_and_back() -> None:
    image_BHWC = torch.arange(256, dtype=torch.uint8).repeat(3).view(1, 16, 16, 3)
    image01_BCHW = from_uint8(image_BHWC)
    assert image01_BCHW.shape == (1, 3, 16, 16)
    assert (float(image01_BCHW.min()), float(image01_BCHW.max())) == (0.0, 1.0)
    assert torch.equal(to_uint8(image01_BCHW), image_BHWC)


def test_values_out_of_range_are_clamped() -> None:
    image_BHWC = to_uint8(torch.tensor([-1.0, 0.5, 2.0]).view(1, 3, 1, 1))
    assert image_BHWC.flatten().tolist() == [0, 128, 255]


@pytest.mark.parametrize("task", ["generate", "edit", "inpaint", "upscale"])
@torch.no_grad()
def test_a_unet_takes_the_inputs_of_its_task(model_dir: Path, task: Task) -> None:
    module = OneStepUNet(folded_unet(model_dir, 999), STEP, task)
    tensors = {
        "noise": torch.randn(2, 4, 8, 8),
        "source": torch.randn(2, 4, 8, 8),
        "mask": torch.ones(2, 1, 8, 8),
        "context": torch.randn(2, 77, 16),
    }
    latents_BCHW = module(*[tensors[name] for name in unet_inputs(task)])
    assert latents_BCHW.shape == (2, 4, 8, 8)
    assert latents_BCHW.dtype == torch.float32


@torch.no_grad()
def test_each_strength_has_its_own_step(model_dir: Path) -> None:
    module = OneStepUNet(folded_unet(model_dir, 999, 499), STEP, "edit", STRENGTHS)
    alone = OneStepUNet(
        folded_unet(model_dir, 499), STEP.model_copy(update={"alpha_bar": 0.2774}), "edit"
    )
    noise_BCHW = torch.randn(1, 4, 8, 8)
    source_BCHW = torch.randn(1, 4, 8, 8)
    context_BLD = torch.randn(1, 77, 16)
    second = module(noise_BCHW, source_BCHW, torch.tensor([1]), context_BLD)
    expected = alone(noise_BCHW, source_BCHW, context_BLD)
    torch.testing.assert_close(second, expected, atol=1e-5, rtol=1e-5)


def test_constants_stay_float32_when_a_module_is_converted(model_dir: Path) -> None:
    unet = OneStepUNet(folded_unet(model_dir, 999, 499), STEP, "edit", STRENGTHS).half()
    decoder = OneStepDecoder(load_vae(model_dir)).half()
    assert unet.alpha_bar_K1.dtype == torch.float32
    assert decoder.offset.dtype == torch.float32


def test_arguments_have_the_names_that_the_graph_gets(model_dir: Path) -> None:
    unet = OneStepUNet(folded_unet(model_dir, 999, 499), STEP, "edit", STRENGTHS)
    generator = Generator(unet, OneStepDecoder(load_vae(model_dir)))
    for module in (unet, generator):
        names = list(inspect.signature(module.forward).parameters)
        assert names == ["noise_BCHW", "source_BCHW", "step_1", "context_BLD"]


@torch.no_grad()
def test_a_generator_is_unet_then_decoder(model_dir: Path) -> None:
    unet = OneStepUNet(folded_unet(model_dir, 999), STEP)
    decoder = OneStepDecoder(load_vae(model_dir))
    noise_BCHW = torch.randn(1, 4, 8, 8)
    context_BLD = torch.randn(1, 77, 16)
    images_BHWC = Generator(unet, decoder)(noise_BCHW, context_BLD)
    assert images_BHWC.shape == (1, 32, 32, 3)
    assert torch.equal(images_BHWC, decoder(unet(noise_BCHW, context_BLD)))


def test_an_inpainting_unet_sees_mask_and_source() -> None:
    start_BCHW = torch.zeros(1, 4, 8, 8)
    tensors = {"mask": torch.ones(1, 1, 8, 8), "source": torch.full((1, 4, 8, 8), 2.0)}
    seen_BCHW = seen_by_unet(start_BCHW, tensors, concatenates=True)
    assert seen_BCHW[0, :, 0, 0].tolist() == [0, 0, 0, 0, 1, 2, 2, 2, 2]
    assert seen_by_unet(start_BCHW, tensors, concatenates=False) is start_BCHW


def test_places_in_the_diffusers_folder(model_dir: Path) -> None:
    unet = OneStepUNet(folded_unet(model_dir, 999), STEP)
    generator = Generator(unet, OneStepDecoder(load_vae(model_dir)))
    encoder = OneStepEncoder(load_vae(model_dir))
    assert place_of(unet, "unet.conv_in.weight") == "unet.conv_in.weight"
    assert place_of(generator, "decoder.decoder.conv_in") == "vae.decoder.conv_in"
    assert place_of(generator, "decoder.offset") == "vae.post_quant_conv.bias"
    assert place_of(encoder, "encoder.conv_out") == "vae.encoder.conv_out"
    assert place_of(generator, "") == place_of(generator, "unet") == ""


def test_dynamic_axes_stand_in_the_shapes() -> None:
    axes = {
        "batch": Axis(min=1, opt=1, max=4),
        "height": Axis(min=32, opt=32, max=64, multiple=8),
        "latent_height": Axis(min=8, opt=8, max=16, multiple=2),
    }
    specs = stage_specs("onestep", "fp16", 1, STEP, 77, 16, axes)
    assert specs["unet"].inputs[0].shape == ("batch", 4, "latent_height", 8)
    assert specs["unet"].axes.keys() == {"batch", "latent_height"}
    assert specs["vae_decoder"].outputs[0].shape == ("batch", "height", 32, 3)
    assert specs["text_encoder"].axes.keys() == {"batch"}


@pytest.mark.parametrize(("precision", "dtype"), [("fp16", "float16"), ("fp32", "float32")])
def test_only_the_context_has_the_precision_of_the_graphs(precision: str, dtype: str) -> None:
    specs = stage_specs("onestep", precision, 2, STEP, 77, 16, {}, unet_inputs("inpaint"))
    types = {tensor.name: tensor.dtype for tensor in specs["generator"].inputs}
    assert types == {
        "noise": "float32",
        "source": "float32",
        "mask": "float32",
        "context": dtype,
    }
    generic = stage_specs("generic", precision, 2, STEP, 77, 16, {})
    types = {tensor.name: tensor.dtype for tensor in generic["unet"].inputs}
    assert types == {"sample": dtype, "timestep": "int64", "encoder_hidden_states": dtype}

"""Reference tensors, against diffusers' own parts and the formulas; nothing stays in memory."""

from __future__ import annotations

import gc
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from transformers import CLIPTextModel

from hipa_deploy.bundle.folder import Bundle
from hipa_deploy.bundle.manifest import OneStep
from hipa_deploy.errors import HipaError
from hipa_deploy.export.chosen_parts import ChosenParts
from hipa_deploy.export.export_options import ExportOptions
from hipa_deploy.export.model_parts import ModelParts
from hipa_deploy.export.references import (
    References,
    encode_closed_set,
    latent_sample,
    make_references,
    strength_key,
    text_references,
)
from hipa_deploy.export.task import TaskSettings, choose_task
from hipa_deploy.generate.noise import initial_noise
from hipa_deploy.tasks import Task

TOKENS_1L = np.arange(77, dtype=np.int64)[None]


def references_of(
    model_dir: Path,
    *,
    task: Task = "generate",
    layout: str = "onestep",
    watch: bool = False,
    batch: int = 1,
) -> tuple[References, OneStep]:
    model = ModelParts.open(str(model_dir))
    options = ExportOptions(model=str(model_dir), out=Path("out"), task=task)
    if task == "edit":
        options = ExportOptions(
            model=str(model_dir), out=Path("out"), task=task, strengths=(0.75, 0.5)
        )
    settings: TaskSettings = choose_task(options, model)
    step = model.one_step(settings.timestep, None, None)
    parts = ChosenParts.choose(model, options, task)
    references = text_references("a pear", TOKENS_1L, batch, step)
    return make_references(references, parts, settings, step, layout, watch=watch), step


@torch.no_grad()
def test_each_tensor_is_what_diffusers_gives(model_dir: Path) -> None:
    references, step = references_of(model_dir, batch=2)
    tensors = references.tensors
    encoder = CLIPTextModel.from_pretrained(model_dir, subfolder="text_encoder")
    unet = UNet2DConditionModel.from_pretrained(model_dir, subfolder="unet")
    vae = AutoencoderKL.from_pretrained(model_dir, subfolder="vae")

    tokens_BL = torch.from_numpy(TOKENS_1L).repeat(2, 1)
    noise_BCHW = torch.from_numpy(initial_noise([0, 1], (4, 8, 8)))
    context_BLD = encoder(tokens_BL).last_hidden_state
    output_BCHW = unet(noise_BCHW, 999, context_BLD).sample
    alpha_bar = step.alpha_bar
    latents_BCHW = (noise_BCHW - (1 - alpha_bar) ** 0.5 * output_BCHW) / alpha_bar**0.5
    sample_BCHW = vae.decode(latents_BCHW / vae.config.scaling_factor).sample

    assert list(tensors) == ["tokens", "noise", "context", "output", "latents", "images"]
    np.testing.assert_array_equal(tensors["noise"], noise_BCHW)
    np.testing.assert_allclose(tensors["context"], context_BLD, atol=1e-6)
    np.testing.assert_allclose(tensors["output"], output_BCHW, atol=1e-5)
    np.testing.assert_allclose(tensors["latents"], latents_BCHW, atol=1e-3)
    expected_BHWC = ((sample_BCHW / 2 + 0.5).clamp(0, 1) * 255).round().permute(0, 2, 3, 1)
    assert np.abs(tensors["images"] - expected_BHWC.numpy()).max() <= 1


@pytest.mark.parametrize(
    ("task", "inputs"),
    [
        ("generate", {"tokens", "noise"}),
        ("edit", {"tokens", "noise", "image", "step"}),
        ("inpaint", {"tokens", "noise", "image", "mask"}),
        ("upscale", {"tokens", "noise", "image"}),
    ],
)
def test_inputs_come_from_outside_of_the_model(
    model_dir: Path, task: Task, inputs: set[str]
) -> None:
    references, _ = references_of(model_dir, task=task)
    assert references.inputs().keys() == inputs
    assert ("source" in references.tensors) == (task != "generate")


def test_every_strength_of_an_edit_has_its_tensors(model_dir: Path) -> None:
    references, _ = references_of(model_dir, task="edit")
    for name in ("output", "latents", "images"):
        first = references.tensors[strength_key(name, 0)]
        second = references.tensors[strength_key(name, 1)]
        assert not np.array_equal(first, second)
    assert strength_key("latents", 0) == "latents"
    assert strength_key("latents", 1) == "latents_1"


def test_the_generic_layout_has_its_own_names(model_dir: Path) -> None:
    references, step = references_of(model_dir, layout="generic")
    tensors = references.tensors
    assert list(tensors)[3:] == [
        "output",
        "latents",
        "timestep",
        "latent_sample",
        "sample",
        "images",
    ]
    assert tensors["timestep"].tolist() == [999]
    np.testing.assert_array_equal(latent_sample(tensors, step), tensors["latent_sample"])
    scaled = tensors["latent_sample"] * np.float32(step.scaling_factor)
    np.testing.assert_allclose(scaled, tensors["latents"], rtol=1e-5)


def test_magnitudes_are_recorded_only_on_request(model_dir: Path) -> None:
    quiet, _ = references_of(model_dir)
    watched, _ = references_of(model_dir, watch=True)
    assert quiet.largest == {}
    heads = {place.split(".")[0] for place in watched.largest}
    assert heads == {"text_encoder", "unet", "vae"}
    # conv_in sees the noise itself, whose largest value is known.
    largest_noise = float(np.abs(watched.tensors["noise"]).max())
    assert watched.largest["unet.conv_in"] >= largest_noise


def test_a_closed_set_is_encoded_in_chunks(
    model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = ModelParts.open(str(model_dir))
    parts = ChosenParts(model, "generate")
    tokens_NL = np.random.default_rng(0).integers(0, 500, size=(5, 77))
    ones_NL = np.ones(tokens_NL.shape, np.float32)
    whole, pooled = encode_closed_set(parts, tokens_NL, ones_NL)
    assert pooled is None
    monkeypatch.setattr("hipa_deploy.export.references.ENCODED_AT_ONCE", 2)
    apart, _ = encode_closed_set(parts, tokens_NL, ones_NL)
    np.testing.assert_allclose(apart, whole, atol=1e-6)
    assert whole.shape == (5, 77, 16)


def test_references_are_frozen_values(model_dir: Path) -> None:
    step = ModelParts.open(str(model_dir)).one_step(999, None, None)
    first = text_references("a pear", TOKENS_1L, 2, step)
    second = first.plus({"context": np.zeros(1)}, {"unet.conv_in": 1.0})
    assert "context" not in first.tensors
    assert (second.prompt, second.seeds, second.batch) == ("a pear", (0, 1), 2)
    assert second.largest == {"unet.conv_in": 1.0}


def test_no_part_stays_in_memory(model_dir: Path) -> None:
    references, _ = references_of(model_dir, task="inpaint", watch=True)
    kinds = (UNet2DConditionModel, AutoencoderKL, CLIPTextModel)
    before = sum(isinstance(thing, kinds) for thing in gc.get_objects())
    gc.collect()
    after = sum(isinstance(thing, kinds) for thing in gc.get_objects())
    assert before == after
    assert references.tensors


@pytest.mark.parametrize(
    ("part", "weight", "value", "message"),
    [
        ("text_encoder", "text_model.final_layer_norm.weight", 3e38, "the text encoder gives NaN"),
        ("unet", "conv_out.bias", 500.0, "the UNet's prediction has a root mean square of 500"),
        ("unet", "conv_out.weight", 3e38, "the UNet gives NaN or infinity"),
        ("vae", "decoder.conv_out.weight", 3e38, "the decoder gives NaN or infinity"),
        ("vae", "decoder.conv_out.bias", 500.0, "every pixel of its images is 255"),
    ],
)
def test_a_reference_that_cannot_be_right_is_an_error(
    model_dir: Path, tmp_path: Path, part: str, weight: str, value: float, message: str
) -> None:
    """Every number of these weights is finite: only the result shows that they are wrong."""
    copy = Path(shutil.copytree(model_dir, tmp_path / "copy"))
    name = "model" if part == "text_encoder" else "diffusion_pytorch_model"
    path = copy / part / f"{name}.safetensors"
    weights = load_file(path)
    weights[weight].fill_(value)
    save_file(weights, path)
    with pytest.raises(HipaError, match=f"the reference is wrong: {message}"):
        references_of(copy)


def test_doubts_reach_the_user_in_one_line(fp32_export: tuple[Bundle, list[str]]) -> None:
    """The tiny model is untrained: its x0 is noise, enlarged 15 times."""
    lines = [line for line in fp32_export[1] if "warning: " in line]
    assert len(lines) == 1
    assert "the latents of the one step have a root mean square of 14.8" in lines[0]

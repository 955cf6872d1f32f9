"""A tiny SDXL in the layout generic, against optimum's pipeline and diffusers' own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionXLPipeline
from safetensors.torch import save_file

from hipa_deploy import OneStepPipeline
from hipa_deploy.bundle.folder import Bundle
from hipa_deploy.bundle.reference import REFERENCE_TENSORS
from hipa_deploy.bundle.text_settings import TextSettings
from hipa_deploy.doctor.self_check import check_bundle
from hipa_deploy.engines.build.engine_check import stage_reference
from hipa_deploy.errors import HipaError
from hipa_deploy.export.export_bundle import export_bundle
from hipa_deploy.export.export_options import ExportOptions
from hipa_deploy.export.export_request import SwapOptions, check_request
from hipa_deploy.export.export_swap import export_swap
from hipa_deploy.generate.noise import initial_noise
from hipa_deploy.generate.open_stages import check_stages
from hipa_deploy.models.style import LoraChoice, Style
from tests.export.conftest import make_adaptor
from tests.tiny_model import make_model
from tests.tiny_sdxl import FIRST_WIDTH, POOLED, SECOND_WIDTH, make_sdxl

MARKED = "a red apple!!"  # SDXL's two tokenizers read exclamation marks differently
SEED = 5


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_sdxl(tmp_path_factory.mktemp("model") / "sdxl")


@pytest.fixture(scope="module")
def bundle(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    out = tmp_path_factory.mktemp("bundle") / "generic"
    return export_bundle(ExportOptions(model=str(model), out=out, dtype="fp32", layout="generic"))


@pytest.fixture(scope="module")
def diffusers_pipe(model: Path, bundle: Bundle) -> Any:
    pipe = StableDiffusionXLPipeline.from_pretrained(model, add_watermarker=False)
    pipe.scheduler = DDIMScheduler.from_pretrained(bundle.root / "scheduler")
    pipe.set_progress_bar_config(disable=True)
    return pipe


def images_of(pipe: Any, prompt: str, **options: Any) -> np.ndarray:
    """The one step of a pipeline of diffusers or optimum, [1, H, W, 3] in levels of 255."""
    noise = torch.from_numpy(initial_noise([SEED], (4, 16, 16)))
    made = pipe(
        prompt,
        num_inference_steps=1,
        guidance_scale=0,
        latents=noise,
        output_type="np",
        **options,
    )
    return (made.images * 255).round()


@pytest.mark.thorough
@torch.no_grad()
def test_optimum_diffusers_and_the_runtime_give_one_image(
    bundle: Bundle, diffusers_pipe: Any
) -> None:
    pytest.importorskip("optimum.onnxruntime")
    from optimum.onnxruntime import ORTDiffusionPipeline, ORTStableDiffusionXLPipeline

    optimum = ORTDiffusionPipeline.from_pretrained(
        bundle.root, provider="CPUExecutionProvider", add_watermarker=False
    )
    assert isinstance(optimum, ORTStableDiffusionXLPipeline)
    optimum.set_progress_bar_config(disable=True)
    with OneStepPipeline.load(bundle.root, "onnxruntime") as pipe:
        for prompt in (MARKED, "", "a (green) pear"):
            theirs = images_of(optimum, prompt)
            ours = pipe(prompt, seed=SEED).images_BHWC.astype(np.float64)
            assert np.abs(theirs - images_of(diffusers_pipe, prompt)).max() <= 1
            assert np.abs(theirs - ours).max() <= 1

    # Every hidden state is where optimum looks for it.
    skipped = images_of(optimum, MARKED, clip_skip=1)
    assert np.abs(skipped - images_of(diffusers_pipe, MARKED, clip_skip=1)).max() <= 1
    assert np.abs(skipped - images_of(optimum, MARKED)).max() > 5


@pytest.mark.thorough
def test_the_runtime_is_the_same_in_every_way(bundle: Bundle) -> None:
    """Alone and in a batch, remembered or not, in turn, weighed, and the self-check."""
    with OneStepPipeline.load(bundle.root, "onnxruntime") as pipe:
        several = pipe([MARKED, "a boat"], seed=SEED).images_BHWC
        again = pipe("a boat", seed=SEED).images_BHWC
        weighed = pipe("a (red:1.5) apple!!", seed=SEED, prompt_weights=True).images_BHWC
    np.testing.assert_array_equal(several[1:], again)
    with OneStepPipeline.load(bundle.root, "onnxruntime", low_memory=True) as pipe:
        np.testing.assert_array_equal(pipe([MARKED, "a boat"], seed=SEED).images_BHWC, several)
        np.testing.assert_array_equal(pipe("a boat", seed=SEED).images_BHWC, again)
        in_turn = pipe("a (red:1.5) apple!!", seed=SEED, prompt_weights=True).images_BHWC
    np.testing.assert_array_equal(in_turn, weighed)
    assert np.abs(weighed.astype(int) - several[:1]).max() > 5
    assert check_bundle(bundle).problems == ()


@pytest.mark.thorough
def test_the_stages_are_as_optimum_exports_them(bundle: Bundle, model: Path) -> None:
    assert list(bundle.stages) == ["text_encoder", "text_encoder_2", "unet", "vae_decoder"]
    second = bundle.stages["text_encoder_2"].spec
    hidden = [f"hidden_states.{number}" for number in range(3)]
    names = [tensor.name for tensor in second.outputs]
    assert names == ["text_embeds", "last_hidden_state", *hidden]
    assert second.outputs[0].shape == (1, POOLED)
    assert second.outputs[1].shape == (1, 77, SECOND_WIDTH)
    names = [tensor.name for tensor in bundle.stages["text_encoder"].spec.outputs]
    assert names == ["last_hidden_state", *hidden]
    inputs = {tensor.name: tensor.shape for tensor in bundle.stages["unet"].spec.inputs}
    assert inputs == {
        "sample": (1, 4, 16, 16),
        "timestep": (1,),
        "encoder_hidden_states": (1, 77, FIRST_WIDTH + SECOND_WIDTH),
        "text_embeds": (1, POOLED),
        "time_ids": (1, 6),
    }
    index = json.loads((bundle.root / "model_index.json").read_text())
    assert index["_class_name"] == "StableDiffusionXLPipeline"
    assert index["force_zeros_for_empty_prompt"] is True
    # What only optimum reads is checked at the export, and not stored.
    stored = np.load(bundle.root / REFERENCE_TENSORS)
    assert {"context", "context_1", "context_2", "pooled", "time_ids"} <= set(stored)
    assert not [name for name in stored if "hidden" in name or name == "conditioning"]
    assert stage_reference(bundle, "text_encoder_2").expected.keys() == {
        "text_embeds",
        "hidden_states.2",
    }


@pytest.mark.thorough
def test_stages_that_do_not_fit(bundle: Bundle) -> None:
    first, second, *others = bundle.manifest.stages
    for changes, message in (
        ({"stages": (first, *others)}, "stage unet takes context"),
        ({"stages": (second, first, *others)}, "stage text_encoder_2 takes context_1"),
        ({"text_widths": ()}, "it has the stage text_encoder_2"),
        ({"layout": "onestep"}, "it has the stage text_encoder_2"),
    ):
        manifest = bundle.manifest.model_copy(update=changes)
        with pytest.raises(HipaError, match=message):
            check_stages(Bundle(bundle.root, manifest))


@pytest.mark.thorough
@torch.no_grad()
@pytest.mark.slow
def test_a_lora_of_both_encoders_is_swapped(
    model: Path, bundle: Bundle, diffusers_pipe: Any, tmp_path: Path
) -> None:
    tensors = {}
    layers = {
        "unet.time_embedding.linear_2": (64, 64),
        "text_encoder.text_model.encoder.layers.0.self_attn.q_proj": (FIRST_WIDTH, FIRST_WIDTH),
        "text_encoder_2.text_model.encoder.layers.2.self_attn.v_proj": (SECOND_WIDTH, SECOND_WIDTH),
    }
    for name, (outputs, inputs) in layers.items():
        tensors[f"{name}.lora_A.weight"] = torch.randn(2, inputs) * 0.7
        tensors[f"{name}.lora_B.weight"] = torch.randn(outputs, 2) * 0.7
    lora = tmp_path / "lora.safetensors"
    save_file(tensors, lora)
    out = tmp_path / "swap"
    options = SwapOptions(
        model=str(model),
        adaptor=None,
        bundle=bundle.root,
        out=out,
        style=Style(loras=(LoraChoice(lora),)),
    )
    swap = export_swap(options)
    assert list(swap.manifest.texts) == ["text_encoder", "text_encoder_2"]
    images = {}
    for low_memory in (False, True):
        with OneStepPipeline.load(bundle.root, "onnxruntime", low_memory=low_memory) as pipe:
            own = pipe(MARKED, seed=SEED).images_BHWC
            pipe.swap_adaptor(out)
            images[low_memory] = pipe(MARKED, seed=SEED).images_BHWC
            pipe.swap_adaptor(None)
            np.testing.assert_array_equal(pipe(MARKED, seed=SEED).images_BHWC, own)
    np.testing.assert_array_equal(images[True], images[False])

    diffusers_pipe.load_lora_weights(tmp_path, weight_name=lora.name)
    expected = images_of(diffusers_pipe, MARKED)
    diffusers_pipe.unload_lora_weights()
    assert np.abs(expected - images[False]).max() <= 1
    assert np.abs(expected - own).max() > 5


@pytest.mark.parametrize("changes", [{"fuse": True}, {"prompts": Path(__file__)}])
def test_what_the_layout_does_not_have(model: Path, tmp_path: Path, changes: dict) -> None:
    options = ExportOptions(model=str(model), out=tmp_path / "b", layout="generic", **changes)
    with pytest.raises(HipaError, match="needs --layout onestep"):
        check_request(options)


@pytest.mark.parametrize("family", ["sdxl", "sd15"])
def test_contexts_that_optimum_does_not_make(model: Path, tmp_path: Path, family: str) -> None:
    """optimum feeds 77 tokens whatever an adaptor was trained with."""
    base = model if family == "sdxl" else make_model(tmp_path / family)
    adaptor = make_adaptor(
        base, tmp_path / "adaptor", preset="paper", text=TextSettings(context_tokens=154)
    )
    options = ExportOptions(model=str(base), out=tmp_path / "b", adaptor=adaptor, layout="generic")
    with pytest.raises(HipaError, match=r"contexts of 154 tokens, .* Use --layout onestep"):
        check_request(options)

"""A tiny SDXL with its base UNet: final images are those of StableDiffusionXLPipeline."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionXLPipeline
from safetensors.torch import save_file

from hipa_deploy import OneStepPipeline
from hipa_deploy.bundle.folder import Bundle
from hipa_deploy.bundle.manifest import RefineSettings
from hipa_deploy.doctor.self_check import check_bundle
from hipa_deploy.export.chosen_parts import ChosenParts
from hipa_deploy.export.export_bundle import export_bundle
from hipa_deploy.export.export_options import ExportOptions
from hipa_deploy.export.export_request import SwapOptions
from hipa_deploy.export.export_swap import export_swap
from hipa_deploy.export.graph.axes import parse_axes
from hipa_deploy.export.model_parts import ModelParts
from hipa_deploy.export.teacher import teacher_stage
from hipa_deploy.generate.noise import initial_noise
from hipa_deploy.generate.pipeline import GenerateResult
from hipa_deploy.generate.prompts import TOKENIZER, TOKENIZER_2
from hipa_deploy.generate.tokenizer import PromptTokenizer
from hipa_deploy.train.data.teacher_pairs import teacher_scheduler
from tests.export.conftest import SD_SCHEDULE, make_adaptor
from tests.tiny_sdxl import FIRST_WIDTH, SECOND_WIDTH, make_sdxl

RECIPE = {"teacher": {"sampler": "dpmsolver++", "steps": 5, "guidance": 2.5, "pairs": 64}}
OWN = {"sampler": "dpmsolver++", "steps": 5, "guidance": 2.5}
DDIM = {"sampler": "ddim", "steps": 4, "guidance": 7.5}
PROMPT = "a red apple!!"  # SDXL's two tokenizers read exclamation marks differently

# The export takes a minute. That of one text encoder is in test_teacher_stage.py.
pytestmark = pytest.mark.thorough


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_sdxl(tmp_path_factory.mktemp("model") / "sdxl")


@pytest.fixture(scope="module")
def taught(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adaptor of every layer, those of the time embedding too."""
    folder = tmp_path_factory.mktemp("taught") / "taught"
    return make_adaptor(model, folder, recipe=RECIPE, resolution=(64, 64))


@pytest.fixture(scope="module")
def bundle(model: Path, taught: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    options = ExportOptions(
        model=str(model),
        out=tmp_path_factory.mktemp("refine") / "bundle",
        adaptor=taught,
        dtype="fp32",
        dynamic=parse_axes("batch=1:2:4,height=64:64:96"),
        with_teacher=True,
    )
    return export_bundle(options)


@pytest.fixture(scope="module")
def pipe(bundle: Bundle) -> Iterator[OneStepPipeline]:
    with OneStepPipeline.load(bundle.root, "onnxruntime") as loaded:
        yield loaded


def diffusers_result(
    model: Path, seed: int, height: int, settings: RefineSettings
) -> tuple[Any, Any]:
    """Latents, scaled, and the image in levels of 0 to 255, of diffusers' own pipeline."""
    pipe = StableDiffusionXLPipeline.from_pretrained(model, add_watermarker=False)
    pipe.set_progress_bar_config(disable=True)
    schedule = {**SD_SCHEDULE, "prediction_type": "epsilon"}
    pipe.scheduler = teacher_scheduler(schedule, settings.sampler)
    request = {
        "prompt": PROMPT,
        "latents": torch.from_numpy(initial_noise([seed], (4, height // 4, 16))),
        "num_inference_steps": settings.steps,
        "guidance_scale": settings.guidance,
        "height": height,
        "width": 64,
    }
    latents_BCHW = pipe(**request, output_type="latent").images.numpy()
    image_HWC = pipe(**request, output_type="np").images[0]
    return latents_BCHW, np.round(image_HWC * 255).astype(int)


def refined_latents(
    pipe: OneStepPipeline, draft: GenerateResult, settings: RefineSettings
) -> np.ndarray:
    """What the decoder is given."""
    seen: dict[str, np.ndarray] = {}
    run = pipe.stages.run

    def record(feed: Any, *rest: Any) -> Any:
        seen.update(feed)
        return run(feed, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipe.stages, "run", record)
        pipe.refine(draft, **settings.model_dump())
    return seen["latents"]


@pytest.mark.parametrize(("height", "wish"), [(64, OWN), (96, DDIM), (64, {**OWN, "guidance": 1})])
def test_final_images_are_those_of_diffusers(
    pipe: OneStepPipeline, model: Path, height: int, wish: dict[str, Any]
) -> None:
    """At another size the base UNet is told that size, as diffusers tells it."""
    settings = RefineSettings(**wish)
    expected_BCHW, expected_HWC = diffusers_result(model, 11, height, settings)
    draft = pipe(PROMPT, seed=11, height=height)
    latents_BCHW = refined_latents(pipe, draft, settings)
    assert np.abs(latents_BCHW - expected_BCHW).max() < 1e-4 * np.abs(expected_BCHW).max()
    final = pipe.refine(draft, **wish)
    assert np.abs(final.images_BHWC[0] - expected_HWC).max() <= 1
    assert np.abs(draft.images_BHWC[0] - expected_HWC).mean() > 1


def test_what_the_bundle_holds(bundle: Bundle, model: Path) -> None:
    refinement = bundle.manifest.refine
    assert refinement
    names = [tensor.name for tensor in refinement.stage.spec.inputs]
    assert names == ["sample", "timestep", "encoder_hidden_states", "text_embeds", "time_ids"]
    text = bundle.stages["text_encoder"].spec
    assert [tensor.name for tensor in text.outputs] == ["context", "conditioning", "pooled"]
    # model_index.json of SDXL says so.
    tables = np.load(bundle.path(refinement.tables))
    assert not tables["empty_context"].any()
    assert not tables["empty_pooled"].any()
    assert check_bundle(bundle, "onnxruntime").stages["teacher"].problem is None


@torch.no_grad()
def test_a_folder_that_wants_the_encoded_empty_prompt(
    bundle: Bundle, model: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(model, tmp_path / "copy"))
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(
        json.dumps({**index, "force_zeros_for_empty_prompt": False})
    )
    parts = ChosenParts(ModelParts.open(str(folder)), "generate")
    tokenizers = [PromptTokenizer(bundle.path(name)) for name in (TOKENIZER, TOKENIZER_2)]
    empty = teacher_stage._unguided(parts, tokenizers)
    pipe = StableDiffusionXLPipeline.from_pretrained(folder, add_watermarker=False)
    _, negative_1LD, _, negative_1P = pipe.encode_prompt(PROMPT)
    assert np.abs(empty["context"] - negative_1LD.numpy()).max() < 1e-5
    assert np.abs(empty["pooled"] - negative_1P.numpy()).max() < 1e-5
    assert np.abs(negative_1P.numpy()).max() > 0.1


@torch.no_grad()
@pytest.mark.slow
def test_a_swap_changes_the_draft_alone(
    model: Path, bundle: Bundle, pipe: OneStepPipeline, tmp_path: Path
) -> None:
    """It holds the UNet's weights and the text stage's; diffusers loads the same file."""
    layers = {
        "mid_block.attentions.0.transformer_blocks.0.attn2.to_k": (32, FIRST_WIDTH + SECOND_WIDTH),
        "down_blocks.1.resnets.0.time_emb_proj": (32, 64),
        "time_embedding.linear_2": (64, 64),
    }
    tensors = {}
    for name, (outputs, inputs) in layers.items():
        tensors[f"unet.{name}.lora_A.weight"] = torch.randn(2, inputs) * 0.3
        tensors[f"unet.{name}.lora_B.weight"] = torch.randn(outputs, 2) * 0.3
    lora = tmp_path / "lora.safetensors"
    save_file(tensors, lora)
    out = tmp_path / "swap"
    swap = export_swap(SwapOptions(model=str(model), adaptor=lora, bundle=bundle.root, out=out))
    assert swap.manifest.text is not None

    own = pipe.tensors(PROMPT, seed=3)
    draft = pipe(PROMPT, seed=3)  # its context is remembered now
    final = pipe.refine(draft, 3).images_BHWC
    pipe.swap_adaptor(out)
    swapped = pipe.tensors(PROMPT, seed=3)
    other_draft = pipe(PROMPT, seed=3)
    np.testing.assert_array_equal(pipe.refine(other_draft, 3).images_BHWC, final)
    pipe.swap_adaptor(None)
    np.testing.assert_array_equal(pipe(PROMPT, seed=3).images_BHWC, own["images"])
    np.testing.assert_array_equal(other_draft.images_BHWC, swapped["images"])
    assert np.abs(swapped["conditioning"] - own["conditioning"]).max() > 1e-2
    np.testing.assert_array_equal(swapped["pooled"], own["pooled"])

    reference = StableDiffusionXLPipeline.from_pretrained(model, add_watermarker=False)
    reference.set_progress_bar_config(disable=True)
    # Its one step ends at x0, as the bundle's does.
    reference.scheduler = DDIMScheduler.from_config(
        reference.scheduler.config,
        timestep_spacing="trailing",
        set_alpha_to_one=True,
        clip_sample=False,
        steps_offset=0,
    )
    reference.load_lora_weights(tmp_path, weight_name=lora.name)
    latents = reference(
        prompt=PROMPT,
        num_inference_steps=1,
        guidance_scale=1.0,
        latents=torch.from_numpy(swapped["noise"]),
        output_type="latent",
    ).images.numpy()
    assert np.abs(latents - own["latents"]).max() > 1e-2
    assert np.abs(latents - swapped["latents"]).max() < 1e-4

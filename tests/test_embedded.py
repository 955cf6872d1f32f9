"""What the package promises of its model, adaptor and bundle, on their real weights."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import LCMScheduler, StableDiffusionPipeline

from hipa_deploy import OneStepPipeline
from hipa_deploy.bundle.parity import compare
from hipa_deploy.embedded import ADAPTOR, ADAPTORS, BUNDLE, MODEL
from hipa_deploy.export.export_bundle import export_bundle
from hipa_deploy.export.export_options import ExportOptions
from hipa_deploy.generate.noise import initial_noise
from hipa_deploy.generate.prompt_files import read_prompt_file
from hipa_deploy.models.adaptor_folder import read_metadata
from hipa_deploy.train.evaluation.evaluation_request import draw, held_out_prompts
from hipa_deploy.train.evaluation.quality import kid_lite0, one_step_images, teacher_images
from hipa_deploy.train.recipes.recipe import load_recipe

PROMPT = "3d emoji of a red apple"
MEGABYTE = 10**6


def size(folder: Path) -> int:
    """Bytes of all files in a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def one_step_image(adaptor: Path | None, seed: int) -> np.ndarray:
    """The image as a diffusers user makes it: load_lora_weights and the shipped scheduler."""
    pipe = StableDiffusionPipeline.from_pretrained(MODEL, torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = LCMScheduler.from_pretrained(ADAPTOR, subfolder="scheduler")
    if adaptor:
        pipe.load_lora_weights(adaptor)
    noise = torch.from_numpy(initial_noise([seed], (4, 16, 16)))
    images = pipe(
        PROMPT, num_inference_steps=1, guidance_scale=0, latents=noise, output_type="np"
    ).images
    return (images[0] * 255).round().astype(np.uint8)


def test_the_adaptor_belongs_to_the_model_and_the_bundle_to_both() -> None:
    from hipa_deploy.bundle.folder import Bundle
    from hipa_deploy.disk.hashing import file_sha256

    metadata = read_metadata(ADAPTOR, MODEL)
    manifest = Bundle.open(BUNDLE).manifest
    assert manifest.base_model.sha256 == metadata.base_unet_sha256
    assert manifest.adaptor is not None
    assert manifest.adaptor.sha256 == file_sha256(ADAPTOR / "pytorch_lora_weights.safetensors")


def test_model_and_bundle_are_small_enough_to_be_carried() -> None:
    """Every clone and every installation has them."""
    assert size(MODEL) + size(BUNDLE) <= 45 * MEGABYTE


@pytest.mark.parametrize("name", sorted(ADAPTORS))
def test_each_adaptor_is_small(name: str) -> None:
    assert size(ADAPTORS[name]) <= 5 * MEGABYTE


@pytest.mark.slow
def test_fp32_bundle_equals_diffusers_with_the_adaptor_and_only_with_it(tmp_path: Path) -> None:
    out = tmp_path / "fp32"
    export_bundle(ExportOptions(model="emoji", adaptor=ADAPTOR, out=out, dtype="fp32"))
    with OneStepPipeline.load(out, "onnxruntime") as pipe:
        ours = pipe(PROMPT, seed=5).images_BHWC[0]
    assert compare(ours, one_step_image(ADAPTOR, 5)).psnr_db >= 40
    assert compare(ours, one_step_image(None, 5)).psnr_db < 30


def test_shipped_fp16_bundle_is_close_to_diffusers_in_fp32() -> None:
    with OneStepPipeline.load(BUNDLE, "onnxruntime") as pipe:
        ours = pipe(PROMPT, seed=5).images_BHWC[0]
    assert compare(ours, one_step_image(ADAPTOR, 5)).psnr_db >= 35


@pytest.mark.slow
def test_the_adaptor_brings_one_step_closer_to_the_teacher() -> None:
    texts, seeds = draw(held_out_prompts(MODEL), 32)
    truth = teacher_images(MODEL, texts, seeds, load_recipe("emoji").teacher)
    base = one_step_images(MODEL, None, texts, seeds)
    adapted = one_step_images(MODEL, ADAPTOR, texts, seeds)
    assert kid_lite0(adapted, truth, texts) < kid_lite0(base, truth, texts) / 2


@pytest.mark.parametrize("file", ["prompts_words.txt", "prompts_wide.txt"])
def test_adaptors_learn_from_nothing_that_is_held_out(file: str) -> None:
    pair_prompts = read_prompt_file(MODEL / "prompts_pair.txt")
    concept_prompts = read_prompt_file(MODEL / "prompts_concept.txt")
    held_out = pair_prompts + concept_prompts
    concepts = {prompt.split(" emoji of ")[1] for prompt in concept_prompts}
    background = re.compile(" on a [a-z]+ background$")
    bare = {background.sub("", prompt) for prompt in read_prompt_file(MODEL / file)}
    subjects = {prompt.partition(" emoji of ")[2] for prompt in bare}
    assert len(bare) > 1000
    assert not bare & set(held_out)
    assert not subjects & concepts

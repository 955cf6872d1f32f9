"""One-step LoRAs of others as rows of a quality report."""

from __future__ import annotations

import io
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import LCMScheduler, StableDiffusionPipeline
from rich.console import Console

from hipa_deploy.embedded import ADAPTOR
from hipa_deploy.errors import HipaError
from hipa_deploy.generate.noise import initial_noise
from hipa_deploy.models.style import Style
from hipa_deploy.train.evaluation.contenders import make_rival, parse_rival
from hipa_deploy.train.evaluation.quality_report import (
    BASE,
    make_images,
    quality_report,
    write_report,
)
from hipa_deploy.train.evaluation.rivals import check_rivals, rival_images
from hipa_deploy.train.recipes.recipe import TeacherSettings
from tests.one_step_loras import kohya, write_lora
from tests.tiny_model import PROMPTS


@pytest.fixture
def lora(model_dir: Path, tmp_path: Path) -> Path:
    return write_lora(model_dir, tmp_path / "lcm.safetensors", kohya)


def test_the_image_of_diffusers(model_dir: Path, lora: Path) -> None:
    rival = parse_rival(f"{lora}=lcm-sd15")
    image_HWC = rival_images(model_dir, rival, PROMPTS[:1], [3], device="cpu")[0]

    pipe = StableDiffusionPipeline.from_pretrained(model_dir, safety_checker=None)
    pipe.scheduler = LCMScheduler.from_config(pipe.scheduler.config)
    pipe.load_lora_weights(lora)
    noise = torch.from_numpy(initial_noise([3], (4, 8, 8)))
    expected = pipe(PROMPTS[0], latents=noise, num_inference_steps=1, guidance_scale=0.0,
                    output_type="np").images[0]  # fmt: skip
    error = np.mean((image_HWC / 255 - expected) ** 2)
    assert -10 * np.log10(error) >= 40


def test_a_report_with_rivals(model_dir: Path, lora: Path, tmp_path: Path) -> None:
    teacher = TeacherSettings(steps=2, guidance=2.0, pairs=1)
    other = tmp_path / "other.safetensors"
    shutil.copy(lora, other)
    rivals = [parse_rival(f"{lora}=lcm-sd15"), parse_rival(f"{other}=hyper-sd15-t800")]
    check_rivals(rivals, model_dir, Style())
    quiet = Console(file=io.StringIO())
    rows, again = make_images(model_dir, None, PROMPTS, teacher, 4, quiet, rivals=rivals)
    names = ["lcm (lcm-sd15), one step", "other (hyper-sd15-t800), one step"]
    assert list(rows) == ["teacher, 1 step", "teacher, 2 steps", BASE, *names]
    assert not np.array_equal(rows[names[0]], rows[names[1]])

    texts = [PROMPTS[number % 3] for number in range(4)]
    report = quality_report(teacher, texts, rows["teacher, 2 steps"], again, rows)
    text = write_report(tmp_path / "report", report, rows).read_text()
    assert all(f"| {name} |" in text for name in names)
    # Four images of three prompts leave a gap that is not clear of its noise.
    assert "is smaller than its own noise" in " ".join(text.split())
    assert all(f"| {name} |" in text for name in names)


def test_a_model_that_is_one_step_itself() -> None:
    assert parse_rival("sd-turbo").row == "sd-turbo, one step"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lcm-sd15", "lcm-sd15 is a LoRA. Name its file too: --rival FILE=lcm-sd15"),
        ("no.safetensors=lcm-sd15", "no.safetensors does not exist"),
        ("x=quick", "one-step method 'quick' does not exist"),
        ("hipa", "hipa is the step of --adaptor"),
        (f"{ADAPTOR}=lcm-sd15", "is an adaptor of HiPA"),
    ],
)
def test_a_rival_that_is_wrong(text: str, message: str) -> None:
    with pytest.raises(HipaError) as error:
        parse_rival(text)
    assert message in str(error.value)


def test_rivals_that_do_not_fit(model_dir: Path, lora: Path, tmp_path: Path) -> None:
    rival = parse_rival(f"{lora}=lcm-sd15")
    with pytest.raises(HipaError, match="two of them are called"):
        check_rivals([rival, rival], model_dir, Style())
    with pytest.raises(HipaError, match="is for SDXL"):
        check_rivals([parse_rival("sdxl-turbo")], model_dir, Style())
    with pytest.raises(HipaError, match="Expected a one-step LoRA's file"):
        make_rival("lcm-sd15", tmp_path / "none", "--one-step lcm-sd15")

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from rich.console import Console

from hipa_deploy.errors import HipaError
from hipa_deploy.train.evaluation.quality import (
    compare,
    decoded_images,
    kid,
    kid_lite0,
    one_step_images,
    teacher_images,
)
from hipa_deploy.train.model.diffusion_model import DiffusionModel
from hipa_deploy.train.recipes.recipe import Recipe, TeacherSettings
from hipa_deploy.train.train_adaptor import train_adaptor
from tests.tiny_model import PROMPTS


def smooth_images(count: int, seed: int) -> np.ndarray:
    coarse = torch.rand(count, 3, 8, 8, generator=torch.Generator().manual_seed(seed))
    fine = torch.nn.functional.interpolate(coarse, size=32, mode="bicubic").clamp(0, 1)
    return (fine * 255).to(torch.uint8).permute(0, 2, 3, 1).numpy()


def test_kid_by_hand() -> None:
    # D = 1: kernel (xy + 1)^3. Within a: 1 * 2 -> 27; within b: 0 * 3 -> 1; across: 1, 64, 1, 343.
    a = torch.tensor([[1.0], [2.0]])
    b = torch.tensor([[0.0], [3.0]])
    assert kid(a, b) == pytest.approx(27 + 1 - 2 * (1 + 64 + 1 + 343) / 4)


def test_kid_is_unbiased() -> None:
    torch.manual_seed(0)
    values = [kid(*torch.randn(2, 20, 8)) for _ in range(200)]
    assert abs(np.mean(values)) < 3 * np.std(values) / 200**0.5
    assert kid(torch.randn(50, 8), torch.randn(50, 8) + 1) > 1


def test_kid_by_hand_of_rows_that_share_prompts() -> None:
    # As above, and across only the rows of different prompts count: 1 * 3 -> 64, 2 * 0 -> 1.
    a = torch.tensor([[1.0], [2.0]])
    b = torch.tensor([[0.0], [3.0]])
    assert kid(a, b, ["x", "y"]) == pytest.approx(27 + 1 - 2 * (64 + 1) / 2)


def test_kid_is_unbiased_for_sets_of_the_same_prompts() -> None:
    """Each row is its prompt's and a little noise; each prompt has two rows."""
    torch.manual_seed(0)
    prompts = [f"prompt {n % 20}" for n in range(40)]
    values = []
    taken_for_independent = []
    for _ in range(200):
        of_prompt = torch.randn(20, 8).repeat(2, 1)
        a, b = of_prompt + 0.1 * torch.randn(2, 40, 8)
        values.append(kid(a, b, prompts))
        taken_for_independent.append(kid(a, b))
    assert abs(np.mean(values)) < 3 * np.std(values) / 200**0.5
    assert abs(np.mean(taken_for_independent)) > 3 * np.std(taken_for_independent) / 200**0.5


@pytest.mark.parametrize("prompts", [["a", "a"], ["a", "b", "c"]])
def test_kid_needs_a_prompt_for_each_row_and_two_of_them(prompts: list[str]) -> None:
    with pytest.raises(HipaError, match=r"Expected a prompt for each row, and at least two"):
        kid(torch.zeros(2, 4), torch.zeros(2, 4), prompts)


def test_kid_needs_two_images() -> None:
    with pytest.raises(HipaError, match="at least two"):
        kid(torch.zeros(1, 4), torch.zeros(5, 4))


def test_quality_orders_equal_blurred_and_noisy_sets() -> None:
    teacher = smooth_images(40, seed=0)
    others = smooth_images(40, seed=1)
    prompts = [f"prompt {n}" for n in range(40)]
    same = compare(teacher, teacher, others, prompts)
    assert same.distance == pytest.approx(0, abs=1e-5)
    assert same.high_frequency_ratio == 1
    noise = np.random.default_rng(0).normal(0, 40, teacher.shape)
    noisy = compare(np.clip(teacher + noise, 0, 255).astype(np.uint8), teacher, others, prompts)
    assert noisy.high_frequency_ratio > 1.5
    assert noisy.distance > 0.05
    assert noisy.kid_lite0 > 5 * abs(same.kid_lite0)
    assert same.kid_lite0 == kid_lite0(teacher, others, prompts)


def test_sets_of_other_shapes_are_refused() -> None:
    with pytest.raises(HipaError, match="Expected equal ones"):
        compare(smooth_images(3, 0), smooth_images(4, 0), smooth_images(3, 1), ["a", "b", "c"])


def test_images_depend_on_prompt_and_seed_alone(model_dir: Path) -> None:
    images = one_step_images(model_dir, None, PROMPTS[:2], [0, 1], device="cpu")
    assert images.shape == (2, 32, 32, 3)
    assert images.dtype == np.uint8
    alone = one_step_images(model_dir, None, PROMPTS[1:2], [1], device="cpu")
    assert np.abs(alone[0].astype(int) - images[1]).max() <= 1
    teacher = teacher_images(
        model_dir, PROMPTS[:2], [0, 1], TeacherSettings(steps=2, pairs=2), device="cpu"
    )
    assert teacher.shape == images.shape
    assert not np.array_equal(teacher, images)
    with pytest.raises(HipaError, match="one seed for each prompt"):
        one_step_images(model_dir, None, PROMPTS, [0], device="cpu")


def test_adapted_image_is_the_pipelines(
    recipe: Recipe, model: DiffusionModel, cache: Path, tmp_path: Path
) -> None:
    quiet = Console(file=io.StringIO())
    adaptor = train_adaptor(
        recipe, model.folder, tmp_path / "adaptor", cache=cache, console=quiet, device="cpu"
    )
    image = one_step_images(model.folder, adaptor, PROMPTS[:1], [5], device="cpu")[0]
    model.pipe.load_lora_weights(adaptor)
    model.pipe.scheduler = DDIMScheduler.from_pretrained(adaptor / "scheduler")
    settings = {"num_inference_steps": 1, "guidance_scale": 0, "output_type": "np"}
    expected = model.pipe(PROMPTS[0], latents=model.noise([5]), **settings).images[0]
    assert np.abs(image - expected * 255).max() <= 0.51
    assert not np.array_equal(
        image, one_step_images(model.folder, None, PROMPTS[:1], [5], device="cpu")[0]
    )


def test_wrong_models_are_refused(model_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(HipaError, match=r"no readable model_index.json"):
        DiffusionModel.load(tmp_path)
    (tmp_path / "model_index.json").write_text('{"_class_name": "FluxPipeline"}')
    with pytest.raises(
        HipaError, match=r"is FluxPipeline: its unet is None, expected UNet2DConditionModel"
    ):
        DiffusionModel.load(tmp_path)
    (tmp_path / "model_index.json").write_text((model_dir / "model_index.json").read_text())
    with pytest.raises(HipaError, match=r"no readable unet/config.json"):
        DiffusionModel.load(tmp_path)


def test_damaged_weights_are_refused(model: DiffusionModel, tmp_path: Path) -> None:
    with torch.no_grad():
        model.unet.conv_in.weight[0] = torch.inf
    model.pipe.save_pretrained(tmp_path / "model")
    with pytest.raises(HipaError, match=r"weight conv_in.weight holds NaN or infinity"):
        DiffusionModel.load(tmp_path / "model")
    weights = tmp_path / "model" / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(HipaError, match="is damaged"):
        DiffusionModel.load(tmp_path / "model")


def test_half_precision_files_load_in_float32(model: DiffusionModel, tmp_path: Path) -> None:
    model.pipe.to(torch.float16).save_pretrained(tmp_path / "half")
    assert DiffusionModel.load(tmp_path / "half", "cpu").unet.dtype == torch.float32


def test_few_large_images_are_made_at_once(
    model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # 32 of SD 1.5's images at once would take the decoder 28 GiB, and of SD 2.1's 59.
    model = DiffusionModel.load(model_dir, "cpu", size=(400, 400))
    made = []
    decoded = []

    def latents(noise_BCHW: torch.Tensor, conditions: object) -> torch.Tensor:
        made.append(len(noise_BCHW))
        return noise_BCHW

    def decode(self: DiffusionModel, latents_BCHW: torch.Tensor) -> torch.Tensor:
        decoded.append(len(latents_BCHW))
        return torch.zeros(len(latents_BCHW), 3, *self.resolution)

    monkeypatch.setattr(DiffusionModel, "decode", decode)
    images = decoded_images(model, latents, ["a boat"] * 30, range(30))
    assert images.shape == (30, 400, 400, 3)
    assert made == [24, 6]
    assert decoded == [6, 6, 6, 6, 6]

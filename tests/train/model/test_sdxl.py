"""SDXL in training: the teacher is StableDiffusionXLPipeline's, and so are the conditions."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel

from hipa_deploy.bundle.text_settings import TextSettings
from hipa_deploy.errors import HipaError
from hipa_deploy.models.configurations import write_config
from hipa_deploy.models.model_config import ModelConfig
from hipa_deploy.models.weights.part_config import build
from hipa_deploy.train.data.teacher_pairs import (
    prompt_conditions,
    teacher_latents,
    teacher_scheduler,
)
from hipa_deploy.train.model.conditions import Conditions, joined_rows, predict
from hipa_deploy.train.model.diffusion_model import DiffusionModel
from hipa_deploy.train.model.unet_adaptor import PRESETS, adaptor_parameters, add_adaptor
from hipa_deploy.train.recipes.recipe import TeacherSettings

PROMPTS = ["a red apple", "", "wow!! a boat"]
TEACHER = TeacherSettings(steps=3, guidance=4.0, pairs=2)


def diffusers_own(folder: Path, sampler: str = "ddim") -> Any:
    """The pipeline as a user loads it, with a deterministic sampler."""
    pipe: Any = StableDiffusionXLPipeline.from_pretrained(folder, torch_dtype=torch.float32)
    schedule = DiffusionModel.load(folder, "cpu").schedule
    pipe.scheduler = teacher_scheduler(schedule, sampler)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_conditions_are_those_of_the_pipeline(sdxl: DiffusionModel, sdxl_dir: Path) -> None:
    pipe = diffusers_own(sdxl_dir)
    context, _, pooled, _ = pipe.encode_prompt(PROMPTS, do_classifier_free_guidance=False)
    got = sdxl.conditions(PROMPTS)
    torch.testing.assert_close(got.context_BLD, context, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(got.pooled_BP, pooled, rtol=1e-5, atol=1e-5)
    assert got.sizes_B6 is not None
    assert got.sizes_B6.tolist() == [[64, 64, 0, 0, 64, 64]] * 3

    # The two tokenizers pad otherwise, so that one taken for the other would be seen.
    first, second = sdxl.tokenizers
    assert (first(PROMPTS) != second(PROMPTS)).any()


@pytest.mark.parametrize(("sampler", "zeros"), [("ddim", True), ("dpmsolver++", False)])
def test_the_teacher_is_the_pipeline(
    sdxl_dir: Path, tmp_path: Path, sampler: str, zeros: bool
) -> None:
    folder = shutil.copytree(sdxl_dir, tmp_path / "model")
    index = json.loads((folder / "model_index.json").read_text())
    index["force_zeros_for_empty_prompt"] = zeros
    (folder / "model_index.json").write_text(json.dumps(index))

    model = DiffusionModel.load(folder, "cpu")
    noise = model.noise([7, 8])
    prompts = ["a red apple", "a boat"]
    teacher = TEACHER.model_copy(update={"sampler": sampler})
    got = teacher_latents(model, noise, model.conditions(prompts), model.unguided(), teacher)
    expected = diffusers_own(folder, sampler)(
        prompts,
        latents=noise,
        num_inference_steps=3,
        guidance_scale=4.0,
        output_type="latent",
    ).images
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)

    # With the other empty prompt the images are others: the comparison above can fail.
    empty = model.conditions([""])
    other = empty if zeros else empty.zeroed()
    wrong = teacher_latents(model, noise, model.conditions(prompts), other, teacher)
    assert (wrong - expected).abs().max() > 1e-2


def test_a_folder_that_says_nothing_of_zeros_has_them(sdxl_dir: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(sdxl_dir, tmp_path / "model")
    index = json.loads((folder / "model_index.json").read_text())
    del index["force_zeros_for_empty_prompt"]
    (folder / "model_index.json").write_text(json.dumps(index))
    unguided = DiffusionModel.load(folder, "cpu").unguided()
    assert not unguided.context_BLD.any()
    assert unguided.sizes_B6 is not None
    assert unguided.sizes_B6.any()

    index["force_zeros_for_empty_prompt"] = "yes"
    (folder / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(HipaError, match="force_zeros_for_empty_prompt='yes'"):
        DiffusionModel.load(folder, "cpu")


def test_the_table_of_conditions_gives_the_rows(sdxl: DiffusionModel) -> None:
    rows = prompt_conditions(sdxl, PROMPTS)(torch.tensor([2, 0]))
    expected = sdxl.conditions([PROMPTS[2], PROMPTS[0]])
    torch.testing.assert_close(rows.context_BLD, expected.context_BLD, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(rows.pooled_BP, expected.pooled_BP, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(rows.sizes_B6, expected.sizes_B6)


def test_prompts_that_no_pair_uses_are_not_encoded(
    sdxl: DiffusionModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoded: list[str] = []
    conditions_of = DiffusionModel.conditions

    def conditions(model: DiffusionModel, prompts: list[str]) -> Conditions:
        encoded.extend(prompts)
        return conditions_of(model, prompts)

    many = [f"prompt {number}" for number in range(20)]
    monkeypatch.setattr(DiffusionModel, "conditions", conditions)
    some = prompt_conditions(sdxl, many, used_N=torch.tensor([7, 3, 7]))
    rows = some(torch.tensor([7, 3]))
    assert set(encoded) == {"prompt 0", "prompt 3", "prompt 7"}  # the first says how large rows are
    expected = conditions_of(sdxl, ["prompt 7", "prompt 3"])
    torch.testing.assert_close(rows.context_BLD, expected.context_BLD, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(rows.pooled_BP, expected.pooled_BP, rtol=1e-5, atol=1e-5)


def test_weights_of_words_change_the_context_alone(sdxl_dir: Path) -> None:
    settings = TextSettings(prompt_weights=True)
    model = DiffusionModel.load(sdxl_dir, "cpu", text=settings)
    plain = model.conditions(["a red apple"])
    weighed = model.conditions(["a (red:1.4) apple"])
    assert not torch.allclose(plain.context_BLD, weighed.context_BLD)
    # Each encoder's part keeps its own mean.
    for width in (slice(0, 16), slice(16, 40)):
        torch.testing.assert_close(
            weighed.context_BLD[..., width].mean(), plain.context_BLD[..., width].mean()
        )
    assert plain.pooled_BP is not None
    assert weighed.pooled_BP is not None
    torch.testing.assert_close(plain.pooled_BP, weighed.pooled_BP)


def test_rows_stay_together(sdxl: DiffusionModel) -> None:
    first = sdxl.conditions(["a", "b"])
    both = joined_rows([first, sdxl.conditions(["c"])])
    assert len(both) == 3
    picked = both[torch.tensor([2, 0])]
    mixed = both.where(torch.tensor([True, False, False]), picked[:1].repeated(3))
    for name in ("context_BLD", "pooled_BP", "sizes_B6"):
        own = getattr(both, name)
        assert torch.equal(getattr(picked, name), own[[2, 0]])
        assert torch.equal(getattr(mixed, name), own[[0, 2, 2]])
    assert first.added["added_cond_kwargs"].keys() == {"text_embeds", "time_ids"}
    assert Conditions(first.context_BLD).added == {}


def test_each_condition_reaches_the_unet(sdxl: DiffusionModel) -> None:
    conditions = sdxl.conditions(["a boat"])
    assert conditions.pooled_BP is not None
    assert conditions.sizes_B6 is not None
    noise = sdxl.noise([0])
    with torch.no_grad():
        output = predict(sdxl.unet, noise, 999, conditions)
        for change in (
            Conditions(conditions.context_BLD, conditions.pooled_BP + 1, conditions.sizes_B6),
            Conditions(conditions.context_BLD, conditions.pooled_BP, conditions.sizes_B6 / 2),
        ):
            assert not torch.allclose(predict(sdxl.unet, noise, 999, change), output)


@pytest.mark.parametrize(
    ("name", "preset", "expected"),
    [
        ("sdxl", "paper", 23_224_320),
        ("sdxl", "full", 48_619_520),
        ("ssd-1b", "paper", 10_829_824),
        ("vega", "full", 14_417_920),
    ],
)
def test_the_presets_on_the_published_unets_at_rank_16(
    name: str, preset: str, expected: int, tmp_path: Path
) -> None:
    config = ModelConfig.read(write_config(name, tmp_path / name))
    unet = build(UNet2DConditionModel, config.unet, Path("unet"))
    with torch.device("meta"):
        add_adaptor(unet, targets=PRESETS[preset], rank=16, alpha=16, seed=0)
    assert sum(weight.numel() for weight in adaptor_parameters(unet).values()) == expected

"""Training an adaptor of SDXL on the tiny model: exact resuming, crops, precision, interchange."""

from __future__ import annotations

import io
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionXLPipeline
from rich.console import Console
from safetensors.torch import save_file
from torch import Tensor

from hipa_deploy.errors import HipaError, StoppedError
from hipa_deploy.models.adaptor_folder import METADATA, read_metadata
from hipa_deploy.models.model_config import ModelConfig
from hipa_deploy.models.weights.weight_file import load_tensors
from hipa_deploy.publish.folders import Wishes, open_publication
from hipa_deploy.train.data.teacher_pairs import cache_folder
from hipa_deploy.train.evaluation.quality import one_step_images
from hipa_deploy.train.model.diffusion_model import DiffusionModel
from hipa_deploy.train.model.mixed_precision import decoder_precision
from hipa_deploy.train.model.unet_adaptor import WEIGHTS
from hipa_deploy.train.recipes.recipe import Recipe
from hipa_deploy.train.train_adaptor import train_adaptor
from tests.tiny_sdxl import make_sdxl
from tests.weights import differences, read_weights

QUIET = Console(file=io.StringIO())


def train(
    recipe: Recipe, model_dir: Path, out: Path, cache: Path, **options: Any
) -> dict[str, Tensor]:
    """The adaptor's weights after training."""
    train_adaptor(recipe, model_dir, out, cache=cache, console=QUIET, device="cpu", **options)
    return read_weights(out / WEIGHTS)


def changed(recipe: Recipe, **settings: Any) -> Recipe:
    """The recipe with other settings, and checked again; a dot is a table's."""
    values = recipe.model_dump()
    for key, value in settings.items():
        table, _, name = key.partition("__")
        if name:
            values[table][name] = value
        else:
            values[table] = value
    return Recipe.model_validate(values)


def as_vector(weights: dict[str, Tensor]) -> Tensor:
    return torch.cat([weight.flatten() for weight in weights.values()])


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, sdxl_dir: Path, cache: Path) -> Path:
    """An adaptor whose weights are far from zero."""
    recipe = Recipe.model_validate(
        {
            "prompts": "model:prompts.txt",
            "steps": 2,
            "batch": 2,
            "samples": 1,
            "adaptor": {"preset": "full", "rank": 2},
            "teacher": {"steps": 3, "pairs": 6, "batch": 4},
            "optimiser": {"learning_rate": 0.1},
        }
    )
    out = tmp_path_factory.mktemp("adaptor") / "sdxl"
    train(recipe, sdxl_dir, out, cache)
    return out


@pytest.mark.usefixtures("half_precision")
def test_resumed_equals_unbroken_with_everything_on(
    recipe: Recipe, sdxl_dir: Path, cache: Path, tmp_path: Path, stop_after
) -> None:
    everything = changed(
        recipe,
        steps=3,
        batch=3,
        micro_batch=2,
        ema_decay=0.9,
        mixed_precision="bf16",
        vae_precision="no",
        gradient_checkpointing=True,
        decode_crop=8,
    )
    unbroken = train(everything, sdxl_dir, tmp_path / "unbroken", cache)
    stop_after(2)
    with pytest.raises(StoppedError, match="stopped at step 2"):
        train(everything, sdxl_dir, tmp_path / "broken", cache)
    stop_after(None)
    assert not differences(train(everything, sdxl_dir, tmp_path / "broken", cache), unbroken)
    assert list((tmp_path / "broken.run" / "samples").glob("*.png"))


def test_checkpointing_and_micro_batches_change_rounding_alone(
    recipe: Recipe, sdxl_dir: Path, cache: Path, tmp_path: Path
) -> None:
    plain = changed(recipe, steps=2, batch=3)
    expected = as_vector(train(plain, sdxl_dir, tmp_path / "plain", cache))
    frugal = changed(plain, micro_batch=1, gradient_checkpointing=True)
    got = as_vector(train(frugal, sdxl_dir, tmp_path / "frugal", cache))
    assert (got - expected).norm() < 1e-2 * expected.norm()


def test_a_crop_of_the_full_size_is_no_crop(
    recipe: Recipe, sdxl_dir: Path, cache: Path, tmp_path: Path
) -> None:
    # One row a step, and one in the table: both then decode the same tensors.
    plain = changed(recipe, steps=2, batch=1, teacher__pairs=1, loss__latent_warmup_steps=0)
    expected = train(plain, sdxl_dir, tmp_path / "plain", cache)
    full = train(changed(plain, decode_crop=16), sdxl_dir, tmp_path / "full", cache)
    assert not differences(full, expected)


def test_a_crop_is_all_that_learning_decodes(
    recipe: Recipe, sdxl_dir: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shapes = []
    original = DiffusionModel.decode

    def decode(model: DiffusionModel, latents: Tensor) -> Tensor:
        if latents.requires_grad:
            shapes.append(tuple(latents.shape))
        return original(model, latents)

    monkeypatch.setattr(DiffusionModel, "decode", decode)
    cropped = changed(recipe, steps=2, batch=2, decode_crop=8, loss__latent_warmup_steps=0)
    train(cropped, sdxl_dir, tmp_path / "adaptor", cache)
    assert shapes == [(2, 4, 8, 8)] * 2


def test_crops_that_cannot_be(recipe: Recipe, sdxl_dir: Path, cache: Path, tmp_path: Path) -> None:
    large = changed(recipe, decode_crop=17)
    with pytest.raises(HipaError, match=r"decode_crop = 17 is larger .* Expected at most 16"):
        train(large, sdxl_dir, tmp_path / "adaptor", cache)
    with pytest.raises(ValueError, match="decode_crop is for the tasks generate and edit"):
        changed(recipe, task="inpaint", decode_crop=8)


def test_a_vae_that_overflows_is_refused_in_fp16(
    recipe: Recipe, sdxl_dir: Path, model_dir: Path, cache: Path, tmp_path: Path
) -> None:
    half = changed(recipe, mixed_precision="fp16", steps=1)
    with pytest.raises(HipaError, match=r'overflows fp16 .* Set vae_precision = "bf16" or "no"'):
        train(half, sdxl_dir, tmp_path / "adaptor", cache)

    # One that was mended for fp16 says so. SD 1.5's has the class's own default, and never did.
    own = ModelConfig.read(sdxl_dir)
    mended = replace(own, vae={**own.vae, "force_upcast": False})
    assert decoder_precision(half, mended) == "fp16"
    assert decoder_precision(half, ModelConfig.read(model_dir)) == "fp16"
    assert decoder_precision(changed(half, vae_precision="bf16"), own) == "bf16"
    train(changed(half, vae_precision="no"), sdxl_dir, tmp_path / "in-both", cache)


@pytest.mark.parametrize("task", ["edit", "inpaint", "upscale"])
def test_other_tasks_train(
    task: str, recipe: Recipe, sdxl_dir: Path, cache: Path, tmp_path: Path
) -> None:
    strengths = {"source__strengths": (0.4,), "teacher__steps": 5} if task == "edit" else {}
    chosen = changed(recipe, task=task, steps=2, **strengths)
    weights = train(chosen, sdxl_dir, tmp_path / "adaptor", cache)
    assert as_vector(weights).isfinite().all()
    assert read_metadata(tmp_path / "adaptor", sdxl_dir).task == task


def test_vega_trains_with_every_term(recipe: Recipe, cache: Path, tmp_path: Path) -> None:
    vega = make_sdxl(tmp_path / "vega", vega=True)
    everything = changed(
        recipe,
        steps=3,
        score={"weight": 1.0, "rank": 2},
        latent_discriminator={"weight": 0.1},
    )
    weights = train(everything, vega, tmp_path / "adaptor", cache)
    assert as_vector(weights).isfinite().all()


def test_diffusers_loads_the_adaptor_with_the_same_image(sdxl_dir: Path, trained: Path) -> None:
    prompts = ["a red apple", "a boat"]
    ours = one_step_images(sdxl_dir, trained, prompts, [3, 4], device="cpu")
    base = one_step_images(sdxl_dir, None, prompts, [3, 4], device="cpu")

    pipe: Any = StableDiffusionXLPipeline.from_pretrained(sdxl_dir)
    pipe.load_lora_weights(trained)
    model = DiffusionModel.load(sdxl_dir, "cpu")
    pipe.scheduler = DDIMScheduler.from_pretrained(trained / "scheduler")
    theirs = pipe(
        prompts,
        latents=model.noise([3, 4]),
        num_inference_steps=1,
        guidance_scale=0.0,
        output_type="np",
    ).images
    theirs = np.round(theirs * 255).astype(np.int16)
    assert np.abs(ours.astype(np.int16) - theirs).max() <= 1
    assert np.abs(base.astype(np.int16) - theirs).mean() > 2


@pytest.mark.filterwarnings("ignore::hipa_deploy.errors.HipaWarning")
def test_the_code_in_the_card_of_an_adaptor_runs(
    sdxl_dir: Path, trained: Path, tmp_path: Path
) -> None:
    """SDXL has a pipeline of its own, and an adaptor may be of another size than the model."""
    adaptor = Path(shutil.copytree(trained, tmp_path / "adaptor"))
    metadata = json.loads((adaptor / METADATA).read_text())
    (adaptor / METADATA).write_text(json.dumps(metadata | {"resolution": [32, 48]}))
    card = tmp_path / "card"
    card.mkdir()
    wishes = Wishes("me/one-step", model=str(sdxl_dir), base_model="me/sdxl")
    open_publication(str(adaptor), wishes).write(card)

    code = (card / "README.md").read_text().split("```python\n")[1].split("```")[0]
    code = code.replace("me/sdxl", str(sdxl_dir)).replace("me/one-step", str(card))
    made: dict[str, Any] = {}
    exec(code, made)
    assert isinstance(made["pipe"], StableDiffusionXLPipeline)
    assert made["image"].size == (48, 32)


def test_the_cache_is_bound_to_both_encoders(
    recipe: Recipe, sdxl_dir: Path, tmp_path: Path
) -> None:
    def name(folder: Path) -> str:
        model = DiffusionModel.load(folder, "cpu")
        return cache_folder(model, ["a"], recipe.teacher, 0, tmp_path).name

    names = [name(sdxl_dir)]
    for part in ("text_encoder", "text_encoder_2"):
        other = shutil.copytree(sdxl_dir, tmp_path / part)
        _change_weight(other / part / "model.safetensors")
        names.append(name(other))
    other = shutil.copytree(sdxl_dir, tmp_path / "tokenizer")
    settings = json.loads((other / "tokenizer_2/tokenizer_config.json").read_text())
    settings["model_max_length"] = 76
    (other / "tokenizer_2/tokenizer_config.json").write_text(json.dumps(settings) + "\n")
    names.append(name(other))
    other = shutil.copytree(sdxl_dir, tmp_path / "zeros")
    index = json.loads((other / "model_index.json").read_text())
    index["force_zeros_for_empty_prompt"] = False
    (other / "model_index.json").write_text(json.dumps(index))
    names.append(name(other))
    assert len(set(names)) == len(names)


def _change_weight(path: Path) -> None:
    tensors = load_tensors(path)
    key = sorted(tensors)[0]
    tensors[key] = tensors[key] + 1
    save_file(tensors, path)


def test_adaptors_of_the_other_family_are_refused(
    recipe: Recipe, sdxl_dir: Path, model_dir: Path, cache: Path, trained: Path, tmp_path: Path
) -> None:
    expected = "another base model .* It is for text contexts 40 wide, and the model has"
    with pytest.raises(HipaError, match=expected):
        one_step_images(model_dir, trained, ["a"], [0], device="cpu")
    train(changed(recipe, steps=1), model_dir, tmp_path / "sd", cache)
    with pytest.raises(HipaError, match="It is for text contexts 16 wide, and the model has"):
        one_step_images(sdxl_dir, tmp_path / "sd", ["a"], [0], device="cpu")

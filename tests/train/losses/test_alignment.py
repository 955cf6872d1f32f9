"""The alignment term: CLIP's own cosine, a user's scorer, and what a training makes of them."""

from __future__ import annotations

import io
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from rich.console import Console

from hipa_deploy.errors import HipaError
from hipa_deploy.models.adaptor_folder import WEIGHTS, read_metadata
from hipa_deploy.models.style import Style
from hipa_deploy.train.coco.clip_score import ClipScore
from hipa_deploy.train.losses.alignment import Alignment, load_alignment
from hipa_deploy.train.losses.clip_folder import clip_sha256
from hipa_deploy.train.prediction.simulated_training import SimulatedTraining, unloaded_model
from hipa_deploy.train.prediction.training_cost import predict_training
from hipa_deploy.train.recipes.alignment_settings import AlignmentSettings
from hipa_deploy.train.recipes.recipe import Recipe, load_recipe
from hipa_deploy.train.train_adaptor import train_adaptor
from hipa_deploy.train.training_request import check_request
from hipa_deploy.user_code import code_allowed
from tests.coco_samples import write_clip
from tests.weights import differences, read_weights

PROMPTS = ["a red apple", "a boat", "long " * 100]
SCORERS = """
import torch

def redness():
    def scorer(image, prompts):
        sign = torch.tensor([1.0 if "red" in prompt else -1.0 for prompt in prompts])
        return sign * (image[:, 0] - image[:, 2]).mean(dim=(1, 2))
    return scorer

def fails(): raise RuntimeError("no weights")
def number(): return 3
def one_argument(): return lambda image: image.mean()
def scalar(): return lambda image, prompts: image.mean()
def text(): return lambda image, prompts: "0.5"
def large(): return lambda image, prompts: 100 * image.mean(dim=(1, 2, 3))
def constant(): return lambda image, prompts: torch.zeros(2)
def rounded(): return lambda image, prompts: 0 * image.mean(dim=(1, 2, 3))
"""


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_clip(tmp_path_factory.mktemp("clip") / "clip")


@pytest.fixture
def modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The module my_scorers on Python's path."""
    (tmp_path / "my_scorers.py").write_text(SCORERS)
    monkeypatch.syspath_prepend(tmp_path)
    yield
    sys.modules.pop("my_scorers", None)


def changed(recipe: Recipe, **changes: Any) -> Recipe:
    return Recipe.model_validate(recipe.model_dump() | changes)


def aligned(recipe: Recipe, scorer: Path | str, **changes: Any) -> Recipe:
    return changed(recipe, alignment={"weight": 5.0, "scorer": str(scorer)}, **changes)


def clip_term(clip: Path, below: float = 1.0) -> Alignment:
    term = load_alignment(AlignmentSettings(weight=1.0, scorer=str(clip), below=below))
    assert term is not None
    return term


# Square as CLIP takes it, larger, and of another shape.
@pytest.mark.parametrize("size", [(32, 32), (96, 96), (64, 48)])
def test_the_term_is_what_the_score_on_coco_lacks(clip: Path, size: tuple[int, int]) -> None:
    """Against transformers' own preprocessing, which rounds images to whole levels of 255."""
    rng = np.random.default_rng(0)
    rough = rng.integers(0, 256, (3, 4, 4, 3)).repeat(size[0] // 4, 1).repeat(size[1] // 4, 2)
    images_BHWC = rough.astype(np.uint8)
    expected = ClipScore(clip, "cpu", "")(images_BHWC, PROMPTS)
    image01_BCHW = torch.from_numpy(images_BHWC).permute(0, 3, 1, 2).float() / 255
    term = clip_term(clip)
    cosines = term.scorer(image01_BCHW, PROMPTS)
    assert cosines.tolist() == pytest.approx(expected.tolist(), abs=2e-3)
    assert float(term(image01_BCHW, PROMPTS)) == pytest.approx(float(1 - expected.mean()), abs=2e-3)


def test_an_image_that_fits_well_enough_adds_nothing(clip: Path) -> None:
    image = torch.rand(3, 3, 32, 32, requires_grad=True)
    cosines = clip_term(clip).scorer(image, PROMPTS).detach()
    middle = float(cosines.sort().values[:2].mean())
    clip_term(clip, below=middle)(image, PROMPTS).backward()
    assert image.grad is not None
    moved = image.grad.flatten(1).any(dim=1)
    assert moved.tolist() == (cosines < middle).tolist()


def test_overshoot_counts_as_the_file_shows_it(clip: Path) -> None:
    image = torch.rand(3, 3, 32, 32) * 3 - 1
    term = clip_term(clip)
    assert torch.equal(term(image, PROMPTS), term(image.clamp(0, 1), PROMPTS))


def test_the_gradient_leads_to_a_better_fit(clip: Path) -> None:
    torch.manual_seed(0)
    image = torch.rand(3, 3, 32, 32, requires_grad=True)
    term = clip_term(clip)
    before = float(term(image.detach(), PROMPTS))
    optimizer = torch.optim.SGD([image], lr=5.0)
    for _ in range(5):
        optimizer.zero_grad()
        term(image, PROMPTS).backward()
        optimizer.step()
    assert float(term(image.detach(), PROMPTS)) < before


def train(recipe: Recipe, model_dir: Path, out: Path, cache: Path) -> dict[str, torch.Tensor]:
    quiet = Console(file=io.StringIO())
    folder = train_adaptor(recipe, model_dir, out, cache=cache, console=quiet, device="cpu")
    return read_weights(folder / WEIGHTS)


def test_it_changes_what_is_learned_and_a_resumed_training_is_an_unbroken_one(
    recipe: Recipe, model_dir: Path, cache: Path, clip: Path, tmp_path: Path, stop_after
) -> None:
    with_clip = aligned(recipe, clip, batch=3, micro_batch=2)
    without = train(changed(recipe, batch=3, micro_batch=2), model_dir, tmp_path / "0", cache)
    unbroken = train(with_clip, model_dir, tmp_path / "unbroken", cache)
    assert differences(unbroken, without)
    stop_after(3)
    with pytest.raises(HipaError, match="stopped at step 3"):
        train(with_clip, model_dir, tmp_path / "broken", cache)
    stop_after(None)

    # A folder that was moved is the same scorer, another CLIP is not.
    other = write_clip(tmp_path / "other")
    assert clip_sha256(other) == clip_sha256(clip)
    moved = aligned(recipe, other, batch=3, micro_batch=2)
    assert not differences(train(moved, model_dir, tmp_path / "broken", cache), unbroken)
    (other / "config.json").write_text((other / "config.json").read_text() + " ")
    longer = changed(moved, steps=5)
    with pytest.raises(HipaError, match=r"another alignment\.scorer"):
        train(longer, model_dir, tmp_path / "broken", cache)

    # A reader elsewhere learns its name, and not where it lay.
    stored = read_metadata(tmp_path / "unbroken").recipe
    assert stored["alignment"] == {"weight": 5.0, "scorer": "clip", "below": 1.0}


@pytest.mark.parametrize("task", ["generate", "edit"])
@pytest.mark.usefixtures("modules")
def test_a_scorer_of_ones_own_beside_score_distillation_alone(
    recipe: Recipe, model_dir: Path, cache: Path, tmp_path: Path, task: str
) -> None:
    """No term looks at targets: images are decoded for the scorer alone."""
    loss = {"perceptual": "none", "hf_weight": 0, "latent_weight": 0}
    own = aligned(
        recipe,
        "my_scorers:redness",
        loss=loss,
        score={"weight": 1e-6, "rank": 1},
        task=task,
        source={"strengths": [1.0]},
        steps=2,
    )
    with code_allowed():
        weights = train(own, model_dir, tmp_path / "a", cache)
    assert any(weight.any() for name, weight in weights.items() if "lora_B" in name)
    assert SimulatedTraining(unloaded_model(model_dir), own).scorer is None


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no_such_module:f", "cannot be made (ModuleNotFoundError"),
        ("my_scorers:fails", "cannot be made (RuntimeError: no weights)"),
        ("my_scorers:number", "is int"),
        ("my_scorers:one_argument", "fails on two images (TypeError"),
        ("my_scorers:scalar", "gives a tensor []"),
        ("my_scorers:text", "gives str"),
        ("my_scorers:large", "no cosines"),
        ("my_scorers:constant", "has no finite gradient"),
        ("my_scorers:rounded", "has no finite gradient"),
    ],
)
@pytest.mark.usefixtures("modules")
def test_what_is_no_scorer_is_refused_in_one_line(name: str, message: str) -> None:
    settings = AlignmentSettings(weight=1.0, scorer=name)
    with code_allowed(), pytest.raises(HipaError, match=re.escape(message)) as error:
        load_alignment(settings)
    assert "\n" not in str(error.value)
    assert name in str(error.value)


@pytest.mark.usefixtures("modules")
def test_code_that_was_not_allowed_is_not_imported(recipe: Recipe, tmp_path: Path) -> None:
    with pytest.raises(HipaError, match=r"scorer my_scorers:redness runs code.*--allow-code"):
        # Before the model is looked for.
        train_adaptor(
            aligned(recipe, "my_scorers:redness"), tmp_path / "none", tmp_path / "a", device="cpu"
        )
    assert "my_scorers" not in sys.modules


def test_a_folder_that_is_no_clip_is_refused_before_anything_slow(
    recipe: Recipe, model_dir: Path, tmp_path: Path, clip: Path
) -> None:
    with pytest.raises(HipaError, match=r"alignment\.scorer .*/nothing is no folder.*hf download"):
        check_request(aligned(recipe, tmp_path / "nothing"), model_dir, None, Style())
    check_request(aligned(recipe, clip), model_dir, None, Style())
    (tmp_path / "config.json").write_text("{")
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(HipaError, match=r"alignment\.scorer .* cannot be loaded"):
        load_alignment(AlignmentSettings(weight=1.0, scorer=str(tmp_path)))


def test_what_the_settings_exclude(recipe: Recipe, tmp_path: Path) -> None:
    for table in ({"weight": 1.0}, {"scorer": "clip"}):
        with pytest.raises(ValidationError, match="go together"):
            AlignmentSettings.model_validate(table)
    with pytest.raises(ValidationError, match="for the tasks generate and edit, this is upscale"):
        aligned(recipe, "clip", task="upscale")
    with pytest.raises(ValidationError, match="leave decode_crop out"):
        aligned(recipe, "clip", decode_crop=8)
    assert load_alignment(recipe.alignment) is None

    # A folder is relative to the recipe, code is not.
    text = 'prompts = "p.txt"\nsteps = 1\n[teacher]\npairs = 1\n[alignment]\nweight = 1\n'
    for scorer, read in (("clip", str(tmp_path / "clip")), ("a.b:c", "a.b:c")):
        (tmp_path / "r.toml").write_text(f'{text}scorer = "{scorer}"\n')
        assert load_recipe(tmp_path / "r.toml").alignment.scorer == read


@pytest.mark.thorough
def test_its_cost_is_counted(recipe: Recipe, model_dir: Path, clip: Path) -> None:
    """Fake tensors take what real ones take, and the vision part runs forth and back."""
    prediction = predict_training(aligned(recipe, clip), model_dir)
    real = SimulatedTraining(unloaded_model(model_dir), aligned(recipe, clip))
    cost = real.step_cost(recipe.batch, decoded=True)
    assert prediction.step.flops == cost.flops
    assert prediction.step.peak_bytes == pytest.approx(cost.peak_bytes, rel=0.03)
    plain = SimulatedTraining(unloaded_model(model_dir), recipe)
    without = plain.step_cost(recipe.batch, decoded=True)
    assert prediction.warm_up.flops == plain.step_cost(recipe.batch, decoded=False).flops

    # 17 tokens of width 16 in two layers: four square matrices and two of 16 x 32 in each,
    # attention, the patches of 8 x 8 x 3, and the projection to 8. The backward pass, for the
    # input, is as long, and that of attention two and a half times.
    tokens, width = 17, 16
    layer = 2 * tokens * (4 * width * width + 2 * width * 32)
    patches = 2 * 16 * width * 8 * 8 * 3
    projection = 2 * width * 8
    attention = 2 * 2 * tokens * tokens * width
    expected = recipe.batch * (2 * (2 * layer + patches + projection) + 2 * attention * 3.5)
    assert prediction.step.flops - without.flops == pytest.approx(expected, rel=0.02)

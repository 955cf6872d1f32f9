from __future__ import annotations

import gc
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from rich.console import Console
from safetensors.torch import load_file

from hipa_deploy.errors import HipaError
from hipa_deploy.train.data.examples import task_examples
from hipa_deploy.train.losses.hipa_loss import hipa_loss
from hipa_deploy.train.model.diffusion_model import DiffusionModel
from hipa_deploy.train.prediction import training_cost
from hipa_deploy.train.prediction.count_call import count_call
from hipa_deploy.train.prediction.simulated_training import (
    MicroBatchMemory,
    SimulatedTraining,
    TrainingCost,
    unloaded_model,
)
from hipa_deploy.train.prediction.training_cost import (
    measure_steps,
    predict_training,
)
from hipa_deploy.train.recipes.held_out_settings import HeldOutSettings
from hipa_deploy.train.recipes.recipe import Recipe, read_prompts
from tests.tiny_model import make_model

predict_once = cache(predict_training)
CHECKPOINTED = {"gradient_checkpointing": True}


@pytest.fixture
def training(model_dir: Path, recipe: Recipe) -> SimulatedTraining:
    """The step on real tensors."""
    return SimulatedTraining(unloaded_model(model_dir), recipe)


def test_facts(model: DiffusionModel, model_dir: Path, recipe: Recipe) -> None:
    prediction = predict_once(recipe, model_dir)
    assert (prediction.prediction_type, prediction.resolution) == ("epsilon", (32, 32))
    parts = {"text_encoder": model.pipe.text_encoder, "unet": model.unet, "vae": model.vae}
    for name, part in parts.items():
        assert prediction.parameters[name] == sum(weight.numel() for weight in part.parameters())
    assert prediction.parameters.keys() == parts.keys()
    assert prediction.pairs_bytes == 6 * (4 * 8 * 8 * 2 + 16)
    assert prediction.target is None


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("decoded", [False, True])
def test_fake_tensors_take_what_real_ones_take(
    model_dir: Path, recipe: Recipe, decoded: bool, checkpointing: bool
) -> None:
    recipe = recipe.model_copy(update=CHECKPOINTED if checkpointing else {})
    prediction = predict_once(recipe, model_dir)
    real = SimulatedTraining(unloaded_model(model_dir), recipe).step_cost(
        recipe.batch, decoded=decoded
    )
    predicted = prediction.step if decoded else prediction.warm_up
    assert predicted.flops == real.flops
    assert predicted.peak_bytes == pytest.approx(real.peak_bytes, rel=0.03)


BESIDE = {
    "score": {"weight": 1.0, "rank": 2},
    "latent_discriminator": {"weight": 1.0, "r1": 1.0},
}


def with_terms(recipe: Recipe, **changes: Any) -> Recipe:
    return Recipe.model_validate(recipe.model_dump() | changes)


@pytest.mark.thorough
def test_terms_that_compare_distributions_are_counted(model_dir: Path, recipe: Recipe) -> None:
    both = with_terms(recipe, **BESIDE, gradient_checkpointing=True)
    prediction = predict_once(both, model_dir)
    real = SimulatedTraining(unloaded_model(model_dir), both)
    assert prediction.fake is not None
    for predicted, cost in (
        (prediction.step, real.step_cost(both.batch, decoded=True)),
        (prediction.fake, real.fake_cost()),
    ):
        assert predicted.flops == cost.flops
        assert predicted.peak_bytes == pytest.approx(cost.peak_bytes, rel=0.03)


@pytest.mark.thorough
def test_score_distillation_costs_three_forward_passes_and_its_own_step(
    model_dir: Path, recipe: Recipe
) -> None:
    # The teacher's call with guidance has two rows for each of the batch, the fake score's one.
    score = {"weight": 1.0, "rank": 1, "steps": 1}
    loss = {"perceptual": "none", "hf_weight": 0.0, "latent_weight": 0.0}
    alone = with_terms(recipe, score=score, loss=loss, adaptor={"preset": "full", "rank": 1})
    prediction = predict_once(alone, model_dir)
    call = prediction.pairs.flops / alone.teacher.steps / (2 * alone.teacher.batch) * alone.batch
    assert prediction.fake is not None
    plain = predict_once(with_terms(recipe, adaptor={"preset": "full", "rank": 1}), model_dir)
    assert prediction.step.flops - plain.warm_up.flops == pytest.approx(3 * call, rel=0.1)
    assert prediction.fake.flops == pytest.approx(plain.warm_up.flops, rel=0.02)
    assert plain.fake is None

    # It needs no pairs but those that the sample grid shows.
    assert prediction.sampler_batches == alone.samples / alone.teacher.batch
    assert prediction.training_flops == 4 * (prediction.step.flops + prediction.fake.flops)


def test_the_loss_costs_what_the_real_one_costs(
    training: SimulatedTraining, recipe: Recipe
) -> None:
    stand_in = training.step_cost(recipe.batch, decoded=True)
    training.loss = hipa_loss(recipe.loss)
    real = training.step_cost(recipe.batch, decoded=True)
    assert stand_in.flops == real.flops
    assert stand_in.peak_bytes == pytest.approx(real.peak_bytes, rel=0.01)


def test_flops_are_those_of_a_product_and_its_gradients(training: SimulatedTraining) -> None:
    a = torch.ones(3, 5, requires_grad=True)
    b = torch.ones(5, 7, requires_grad=True)
    assert training._cost(lambda: (a @ b).sum().backward()).flops == 3 * (2 * 3 * 5 * 7)


def test_memory_is_the_most_that_lives_at_once() -> None:
    layer = torch.nn.Linear(10, 10)
    weights = 4 * (100 + 10)

    def call() -> None:
        for _ in range(3):
            torch.empty(1000)  # freed each time
        kept = torch.empty(500)
        view = kept[:10].reshape(2, 5)
        assert view.numel() == 10

    assert count_call(call, [layer]) == (0, weights + 4000)
    assert count_call(lambda: None, [layer]) == (0, weights)


@pytest.mark.thorough
def test_memory_does_not_wait_for_pythons_garbage_collection(
    model_dir: Path, recipe: Recipe
) -> None:
    checkpointed = recipe.model_copy(update=CHECKPOINTED)
    gc.disable()
    try:
        uncollected = predict_training(checkpointed, model_dir)
        memory = uncollected.memory
    finally:
        gc.enable()
    collected = predict_once(checkpointed, model_dir)
    assert uncollected == collected
    assert memory == collected.memory


@pytest.mark.thorough
def test_cost_grows_with_the_batch_and_memory_falls_with_checkpointing(
    model_dir: Path, recipe: Recipe
) -> None:
    usual = predict_once(recipe, model_dir)
    twice = predict_once(recipe.model_copy(update={"batch": 2 * recipe.batch}), model_dir)
    checkpointed = predict_once(recipe.model_copy(update=CHECKPOINTED), model_dir)
    assert twice.step.flops == pytest.approx(2 * usual.step.flops, rel=0.02)
    assert twice.step.peak_bytes > usual.step.peak_bytes > checkpointed.step.peak_bytes
    assert checkpointed.step.flops > usual.step.flops


@pytest.mark.thorough
def test_a_micro_batch_takes_less_memory_and_the_same_operations(
    model_dir: Path, recipe: Recipe
) -> None:
    whole = predict_once(recipe, model_dir)
    parts = predict_once(recipe.model_copy(update={"micro_batch": 1}), model_dir)
    assert parts.step.flops == pytest.approx(whole.step.flops, rel=0.02)
    assert parts.step.peak_bytes == parts.memory.one_row < whole.step.peak_bytes
    further = (recipe.batch - 1) * whole.memory.further_row
    assert whole.memory.one_row + further == pytest.approx(whole.step.peak_bytes, rel=0.02)


@pytest.mark.thorough
def test_gradients_of_earlier_rows_and_the_average_take_memory(
    model_dir: Path, recipe: Recipe
) -> None:
    whole = predict_once(recipe, model_dir)
    numbers = 4 * whole.trainable
    training = SimulatedTraining(unloaded_model(model_dir), recipe)
    first = training.step_cost(1, decoded=True).peak_bytes
    later = training.step_cost(1, decoded=True, accumulates=True).peak_bytes
    assert first < later <= first + numbers
    parts = predict_once(recipe.model_copy(update={"micro_batch": 1}), model_dir)
    assert parts.step.peak_bytes == pytest.approx(later, rel=0.01)

    averaged = predict_once(recipe.model_copy(update={"ema_decay": 0.9}), model_dir)
    assert averaged.step.peak_bytes == whole.step.peak_bytes + numbers


def test_the_largest_micro_batch() -> None:
    memory = MicroBatchMemory(one_row=100, further_row=10)
    assert [memory.largest(usable, 4) for usable in (99, 100, 109, 110, 129, 1000)] == [
        *(0, 1, 1, 2, 3, 4)
    ]


def test_processes_share_a_batch(model_dir: Path, recipe: Recipe) -> None:
    alone = predict_once(recipe, model_dir)
    two = predict_once(recipe, model_dir, 2)
    assert two.rows == -(-recipe.batch // 2)
    assert two.step.peak_bytes < alone.step.peak_bytes
    assert two.step.flops == pytest.approx(alone.step.flops, rel=0.02)
    with pytest.raises(HipaError, match="less than the 99 processes"):
        predict_training(recipe, model_dir, 99)


@pytest.mark.parametrize("precision", ["bf16", pytest.param("fp16", marks=pytest.mark.thorough)])
def test_mixed_precision_is_predicted_as_it_runs(
    model_dir: Path, recipe: Recipe, precision: str
) -> None:
    mixed = recipe.model_copy(update={"mixed_precision": precision})
    prediction = predict_once(mixed, model_dir)
    real = SimulatedTraining(unloaded_model(model_dir), mixed).step_cost(recipe.batch, decoded=True)
    assert prediction.step.flops == real.flops
    assert prediction.step.peak_bytes == pytest.approx(real.peak_bytes, rel=0.03)


def test_totals(model_dir: Path, recipe: Recipe) -> None:
    prediction = predict_once(recipe, model_dir)
    assert prediction.pairs_flops == prediction.pairs.flops * 6 / 4
    assert prediction.training_flops == prediction.warm_up.flops + 3 * prediction.step.flops
    assert prediction.peak_bytes == max(prediction.pairs.peak_bytes, prediction.step.peak_bytes)


def test_images_that_do_not_fit_are_decoded_in_each_step(
    model_dir: Path, recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training_cost, "TABLE_BYTES", 1000)
    prediction = predict_training(recipe, model_dir)
    assert isinstance(prediction.target, TrainingCost)
    assert prediction.training_flops == prediction.warm_up.flops + 3 * (
        prediction.step.flops + prediction.target.flops
    )

    # A training that looks at latents alone decodes none, and one on a folder reads its files.
    loss = recipe.loss.model_copy(update={"perceptual": "none", "hf_weight": 0.0})
    latents_alone = recipe.model_copy(update={"loss": loss})
    assert predict_training(latents_alone, model_dir).target is None
    of_folder = of_task(recipe, "upscale", images="photos", factor=2)
    assert predict_training(of_folder, model_dir).target is None


def test_edits_of_an_image_are_decoded_one_by_one(
    model_dir: Path, recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    edit = of_task(recipe, "edit", strengths=[1.0], per_image=2)
    monkeypatch.setattr(training_cost, "TABLE_BYTES", 3 * 32 * 32 * edit.teacher.pairs)
    assert predict_training(edit, model_dir).target is not None


def test_edits_of_pictures_are_made_beside_the_images_of_the_prompts(recipe: Recipe) -> None:
    alone = of_task(recipe, "generate")
    pictures = of_task(recipe, "generate", images="photos", strengths=[1.0], per_image=2)
    count = recipe.teacher.pairs
    assert training_cost.images_made(pictures) == count
    assert training_cost.edits_made(pictures) == 2 * count
    batches = training_cost.sampler_batches
    assert batches(pictures) == pytest.approx(3 * batches(alone))


def test_no_weights_are_needed(model_dir: Path, recipe: Recipe, tmp_path: Path) -> None:
    for path in model_dir.rglob("*.json"):
        target = tmp_path / path.relative_to(model_dir)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(path.read_bytes())
    assert predict_training(recipe, tmp_path) == predict_once(recipe, model_dir)
    with pytest.raises(HipaError, match=r"no readable model_index.json"):
        predict_training(recipe, tmp_path / "unet")


def test_measured_seconds(model_dir: Path, recipe: Recipe) -> None:
    seconds = measure_steps(recipe, model_dir, repeats=1)
    assert seconds.keys() == {"teacher call", "warm-up step", "step"}
    assert all(0 < value < 60 for value in seconds.values())


def of_task(recipe: Recipe, task: str, **source: Any) -> Recipe:
    return Recipe.model_validate(recipe.model_dump() | {"task": task, "source": source})


@pytest.mark.parametrize(
    ("task", "source"),
    [
        ("generate", {}),
        ("edit", {"strengths": [1.0], "per_image": 2}),
        ("edit", {"strengths": [1.0], "per_image": 2, "images": "FOLDER"}),
        ("upscale", {"images": "FOLDER", "factor": 2}),
    ],
)
def test_the_disk_is_what_a_training_writes(
    model_dir: Path, recipe: Recipe, tmp_path: Path, task: str, source: dict[str, Any]
) -> None:
    if "images" in source:
        source = {**source, "images": str(tmp_path / "photos"), "captions": False}
        (tmp_path / "photos").mkdir()
        for number in range(recipe.teacher.pairs):
            Image.new("RGB", (32, 32), (number, 0, 0)).save(tmp_path / f"photos/{number}.png")
    chosen = of_task(recipe, task, **source)
    cache_folder = tmp_path / "cache"
    cache_folder.mkdir()
    quiet = Console(quiet=True)
    model = DiffusionModel.load(model_dir, "cpu", chosen.task)
    task_examples(model, chosen, read_prompts(chosen, model_dir), cache=cache_folder, console=quiet)
    written = 0
    for path in cache_folder.rglob("*.safetensors"):
        written += sum(tensor.nbytes for tensor in load_file(path).values())
    assert predict_training(chosen, model_dir).pairs_bytes == written


@pytest.mark.thorough
def test_edits_take_a_share_of_the_sampler_and_real_images_none(
    model_dir: Path, recipe: Recipe
) -> None:
    teacher = recipe.teacher.model_copy(update={"steps": 5})
    edit = of_task(recipe.model_copy(update={"teacher": teacher}), "edit", strengths=[1, 0.2])
    batches = recipe.teacher.pairs / recipe.teacher.batch
    assert predict_training(edit, model_dir).sampler_batches == pytest.approx(1.6 * batches)
    real = of_task(recipe, "upscale", images="folder")
    assert predict_training(real, model_dir).sampler_batches == 0
    # The teacher makes the images of held-out prompts all the same.
    held_out = HeldOutSettings(prompts="included:held_out.txt", count=3)
    watched = predict_training(real.model_copy(update={"held_out": held_out}), model_dir)
    assert watched.sampler_batches == 3 / recipe.teacher.batch


@pytest.mark.thorough
def test_the_held_out_measure_is_counted(model_dir: Path, recipe: Recipe) -> None:
    plain = predict_once(recipe, model_dir)
    settings = HeldOutSettings(prompts="included:held_out.txt", count=3, every=3)
    watched = predict_training(recipe.model_copy(update={"held_out": settings}), model_dir)
    assert plain.held_out is None
    assert watched.held_out is not None
    # At the start, after every third of the steps, and after the last one.
    measurements = watched.recipe.measurements
    assert measurements == 1 + -(-recipe.steps // 3)
    more = watched.training_flops - plain.training_flops
    assert more == measurements * watched.held_out.flops
    pairs = recipe.teacher.pairs
    share = watched.sampler_batches / plain.sampler_batches
    assert share == pytest.approx((pairs + 3) / pairs)

    # One measurement is three images' forward passes, whatever goes through at once.
    apart = recipe.model_copy(update={"held_out": settings, "micro_batch": 1})
    assert predict_training(apart, model_dir).held_out.flops == pytest.approx(
        watched.held_out.flops, rel=0.02
    )


def test_a_nine_channel_model_is_predicted(recipe: Recipe, tmp_path: Path) -> None:
    prediction = predict_training(
        of_task(recipe, "inpaint", images="folder"), make_model(tmp_path / "nine", in_channels=9)
    )
    assert prediction.pairs.flops == 0
    assert prediction.step.flops > prediction.warm_up.flops > 0

"""The training loop and the run folder, driven by train_adaptor."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from rich.console import Console

from hipa_deploy.errors import HipaError
from hipa_deploy.train import train_adaptor as train_adaptor_module
from hipa_deploy.train.loop.run import Run
from hipa_deploy.train.loop.training_steps import batch_rows
from hipa_deploy.train.model.unet_adaptor import WEIGHTS
from hipa_deploy.train.recipes.recipe import Recipe
from hipa_deploy.train.train_adaptor import train_adaptor
from tests.tiny_model import PROMPTS
from tests.weights import differences, read_weights

QUIET = Console(file=io.StringIO())


def train(recipe: Recipe, model_dir: Path, out: Path, cache: Path) -> dict[str, torch.Tensor]:
    """The adaptor's weights after training."""
    folder = train_adaptor(recipe, model_dir, out, cache=cache, console=QUIET, device="cpu")
    return read_weights(folder / WEIGHTS)


def read_step(run_folder: Path) -> int:
    """The step of a run folder's checkpoint."""
    return torch.load(run_folder / "state.pt", weights_only=True)["step"]


@pytest.fixture
def stopped_run(recipe: Recipe, model_dir: Path, cache: Path, tmp_path: Path, stop_after) -> Path:
    """The checkpoint of a run to ``tmp_path / "adaptor"`` that was stopped after one step."""
    stop_after(1)
    with pytest.raises(HipaError, match="stopped"):
        train(recipe, model_dir, tmp_path / "adaptor", cache)
    stop_after(None)
    return tmp_path / "adaptor.run" / "state.pt"


def test_batches_depend_on_seed_and_step() -> None:
    assert torch.equal(batch_rows(100, 8, 0, 5), batch_rows(100, 8, 0, 5))
    assert not torch.equal(batch_rows(100, 8, 0, 5), batch_rows(100, 8, 0, 6))
    assert len(set(batch_rows(8, 8, 0, 0).tolist())) == 8
    assert len(batch_rows(2, 8, 0, 0)) == 8


def test_files_of_a_run_folder(
    recipe: Recipe, model_dir: Path, cache: Path, tmp_path: Path
) -> None:
    train(recipe, model_dir, tmp_path / "adaptor", cache)
    run = tmp_path / "adaptor.run"
    samples = run / "samples"
    assert {path.name for path in run.iterdir()} == {"state.pt", "samples", "tensorboard"}
    expected = {"step-00000002.png", "step-00000004.png"}
    assert {path.name for path in samples.iterdir()} == expected
    assert Image.open(samples / "step-00000004.png").size == (604, 306)


def test_a_full_disk_names_the_sample_that_met_it(
    recipe: Recipe, model_dir: Path, cache: Path, tmp_path: Path
) -> None:
    samples = tmp_path / "adaptor.run" / "samples"
    samples.mkdir(parents=True)
    sample = samples / "step-00000002.png"
    sample.symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left on device") as full:
        train(recipe, model_dir, tmp_path / "adaptor", cache)
    assert full.value.filename == str(sample)
    assert read_step(tmp_path / "adaptor.run") == 2


def test_another_recipe_does_not_resume(
    recipe: Recipe, model_dir: Path, cache: Path, tmp_path: Path, stopped_run: Path
) -> None:
    loss = recipe.loss.model_copy(update={"hf_weight": 2.0})
    changed = recipe.model_copy(update={"loss": loss})
    with pytest.raises(HipaError, match=r"another recipe: loss.hf_weight was 1.0, is 2.0"):
        train(changed, model_dir, tmp_path / "adaptor", cache)
    stopped_run.write_bytes(b"PK")
    with pytest.raises(HipaError, match="is damaged"):
        train(recipe, model_dir, tmp_path / "adaptor", cache)


def test_a_run_older_than_a_setting_resumes(
    recipe: Recipe, model_dir: Path, cache: Path, tmp_path: Path, stopped_run: Path
) -> None:
    state = torch.load(stopped_run, weights_only=True)
    identity = json.loads(state["identity"])
    del identity["recipe"]["adaptor"]["encoder_rank"]
    torch.save(state | {"identity": json.dumps(identity)}, stopped_run)
    assert train(recipe, model_dir, tmp_path / "adaptor", cache)


@pytest.mark.parametrize("table", ["source", "latent_discriminator"])
def test_other_images_or_captions_do_not_resume(
    recipe: Recipe, model_dir: Path, cache: Path, tmp_path: Path, stop_after, table: str
) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    image = folder / "a.png"
    caption = folder / "a.txt"
    Image.new("RGB", (32, 32), "red").save(image)
    caption.write_text("a red wall")
    values = recipe.model_dump()
    if table == "source":
        values |= {"task": "upscale", "source": {"images": str(folder)}}
    else:
        values |= {table: {"weight": 0.1, "real_images": str(folder)}}
    chosen = Recipe.model_validate(values)
    out = tmp_path / "adaptor"
    stop_after(1)
    with pytest.raises(HipaError, match="stopped"):
        train(chosen, model_dir, out, cache)
    stop_after(None)

    started = r"was started with other images or captions in " + table
    caption.write_text("a blue wall")
    with pytest.raises(HipaError, match=started):
        train(chosen, model_dir, out, cache)
    caption.write_text("a red wall")
    red = image.read_bytes()
    Image.new("RGB", (32, 32), "blue").save(image)
    with pytest.raises(HipaError, match=started):
        train(chosen, model_dir, out, cache)
    image.write_bytes(red)
    train(chosen, model_dir, out, cache)

    # The finished run is not extended with other images, and one of an older version goes on.
    Image.new("RGB", (32, 32), "blue").save(image)
    more = chosen.model_copy(update={"steps": 5})
    with pytest.raises(HipaError, match=started):
        train(more, model_dir, out, cache)
    path = out.with_name("adaptor.run") / "state.pt"
    state = torch.load(path, weights_only=True)
    identity = json.loads(state["identity"])
    del identity["source_images_sha256"], identity["real_images_sha256"]
    torch.save(state | {"identity": json.dumps(identity)}, path)
    assert train(more, model_dir, out, cache)


def test_another_part_of_the_model_does_not_resume(
    recipe: Recipe, model_dir: Path, v_model_dir: Path, cache: Path, tmp_path: Path, stop_after
) -> None:
    model = shutil.copytree(model_dir, tmp_path / "model")
    out = tmp_path / "adaptor"
    stop_after(1)
    with pytest.raises(HipaError, match="stopped"):
        train(recipe, model, out, cache)
    stop_after(None)

    # A fine-tune whose scheduler was mended after its first training.
    others = {
        "scheduler/scheduler_config.json": r"another noise schedule or prediction type \(sched",
        "text_encoder/model.safetensors": "another text encoder",
        "vae/diffusion_pytorch_model.safetensors": "another VAE",
    }
    for name, other in others.items():
        shutil.copy(v_model_dir / name, model / name)
        with pytest.raises(HipaError, match=f"was started with {other}"):
            train(recipe, model, out, cache)
        shutil.copy(model_dir / name, model / name)
    train(recipe, model, out, cache)


def test_another_choice_of_source_prompts_does_not_resume(
    recipe: Recipe, model_dir: Path, cache: Path, tmp_path: Path, stop_after
) -> None:
    shown = tmp_path / "shown.txt"
    shown.write_text("\n".join(PROMPTS[:2]))
    source = {"prompts": str(shown), "strengths": [1.0]}
    edit = Recipe.model_validate(recipe.model_dump() | {"task": "edit", "source": source})
    stop_after(1)
    with pytest.raises(HipaError, match="stopped"):
        train(edit, model_dir, tmp_path / "adaptor", cache)
    stop_after(None)

    # All prompts together are the same as before.
    shown.write_text(PROMPTS[0])
    with pytest.raises(HipaError, match=r"was started with other prompts in source\.prompts"):
        train(edit, model_dir, tmp_path / "adaptor", cache)


def test_edits_from_before_their_noise_was_another_do_not_go_on(
    recipe: Recipe, model_dir: Path, cache: Path, tmp_path: Path, stop_after
) -> None:
    values = recipe.model_dump() | {"task": "edit", "source": {"strengths": [1.0]}}
    edit = Recipe.model_validate(values)
    out = tmp_path / "adaptor"
    stop_after(1)
    with pytest.raises(HipaError, match="stopped"):
        train(edit, model_dir, out, cache)
    stop_after(None)
    path = out.with_name("adaptor.run") / "state.pt"
    state = torch.load(path, weights_only=True)
    identity = json.loads(state["identity"])
    del identity["edit_noise"]
    torch.save(state | {"identity": json.dumps(identity)}, path)
    with pytest.raises(HipaError, match="started with edits of the teacher's images by the very"):
        train(edit, model_dir, out, cache)

    # One of this version goes on, and its result is extended.
    torch.save(state, path)
    train(edit, model_dir, out, cache)
    train(edit.model_copy(update={"steps": edit.steps + 1}), model_dir, out, cache)


def test_divergence_stops_and_keeps_the_checkpoint(
    recipe: Recipe, model_dir: Path, cache: Path, tmp_path: Path, monkeypatch
) -> None:
    original = train_adaptor_module.task_latents
    calls = []

    def explode_in_step_3(*args: Any, **constants: Any) -> torch.Tensor:
        calls.append(1)
        latents = original(*args, **constants)
        # The calls: base samples, step 1, step 2, samples, step 3.
        return latents * float("nan") if len(calls) == 5 else latents

    monkeypatch.setattr(train_adaptor_module, "task_latents", explode_in_step_3)
    expected = r"diverged: loss nan.*at step 3. The checkpoint of step 2 is kept"
    with pytest.raises(HipaError, match=expected):
        train(recipe, model_dir, tmp_path / "adaptor", cache)
    assert read_step(tmp_path / "adaptor.run") == 2
    assert not (tmp_path / "adaptor").exists()


def test_a_full_disk_keeps_the_last_checkpoint(
    recipe: Recipe, model_dir: Path, cache: Path, tmp_path: Path, monkeypatch
) -> None:
    original = Run.accumulate
    scratch = tmp_path / "adaptor.run" / "state.tmp"

    def fill_disk(run: Run, *arguments: Any) -> dict[str, float]:
        # The next checkpoint goes to a device where every write fails as on a full disk.
        if run.step == 3:
            scratch.symlink_to("/dev/full")
        return original(run, *arguments)

    monkeypatch.setattr(Run, "accumulate", fill_disk)
    expected = (
        r"state.pt cannot be written: No space left on device \([0-9.]+ .B needed, .* free\)\. "
        "The checkpoint of step 2 is kept"
    )
    with pytest.raises(HipaError, match=expected):
        train(recipe, model_dir, tmp_path / "adaptor", cache)
    assert read_step(tmp_path / "adaptor.run") == 2
    assert not scratch.is_symlink()

    monkeypatch.undo()
    unbroken = train(recipe, model_dir, tmp_path / "unbroken", cache)
    assert not differences(train(recipe, model_dir, tmp_path / "adaptor", cache), unbroken)

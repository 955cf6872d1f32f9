"""A bundle with the base UNet: its final images are those of a diffusers pipeline."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline

from hipa_deploy import OneStepPipeline
from hipa_deploy.bundle.folder import Bundle
from hipa_deploy.bundle.manifest import RefineSettings
from hipa_deploy.bundle.reference import Reference
from hipa_deploy.errors import HipaError
from hipa_deploy.export.chosen_parts import ChosenParts
from hipa_deploy.export.export_bundle import export_bundle
from hipa_deploy.export.export_options import ExportOptions
from hipa_deploy.export.export_request import check_request
from hipa_deploy.export.graph.axes import parse_axes
from hipa_deploy.export.model_parts import ModelParts
from hipa_deploy.export.references import References
from hipa_deploy.export.teacher import teacher_stage
from hipa_deploy.export.writer import StageWriter
from hipa_deploy.generate.noise import initial_noise
from hipa_deploy.generate.tokenizer import PromptTokenizer
from hipa_deploy.models.adaptor_folder import teacher_settings
from hipa_deploy.train.data.teacher_pairs import teacher_scheduler
from tests.export.conftest import SD_SCHEDULE, make_adaptor

PROMPT = "a red apple"
RECIPE = {"teacher": {"sampler": "dpmsolver++", "steps": 5, "guidance": 2.5, "pairs": 64}}


@pytest.fixture(scope="module")
def taught_dir(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adaptor whose recipe names a teacher."""
    return make_adaptor(model_dir, tmp_path_factory.mktemp("taught") / "taught", recipe=RECIPE)


@pytest.fixture(scope="module")
def bundle(model_dir: Path, taught_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    options = ExportOptions(
        model=str(model_dir),
        out=tmp_path_factory.mktemp("refine") / "bundle",
        adaptor=taught_dir,
        dtype="fp32",
        dynamic=parse_axes("batch=1:2:4,height=32:32:64"),
        with_teacher=True,
    )
    return export_bundle(options)


def diffusers_image(model_dir: Path, seed: int, height: int, settings: RefineSettings) -> Any:
    pipe = StableDiffusionPipeline.from_pretrained(model_dir, safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    schedule = {**SD_SCHEDULE, "prediction_type": "epsilon"}
    pipe.scheduler = teacher_scheduler(schedule, settings.sampler)
    noise_BCHW = initial_noise([seed], (4, height // 4, 8))
    result = pipe(
        PROMPT,
        latents=torch.from_numpy(noise_BCHW),
        num_inference_steps=settings.steps,
        guidance_scale=settings.guidance,
        height=height,
        width=32,
        output_type="np",
    )
    return np.round(result.images[0] * 255).astype(int)


@pytest.mark.parametrize(
    ("height", "wish"),
    [
        (32, {}),
        (64, {"steps": 4, "guidance": 7.5, "sampler": "ddim"}),
        (32, {"steps": 3, "guidance": 1}),
    ],
)
def test_final_images_are_those_of_diffusers(
    bundle: Bundle, model_dir: Path, height: int, wish: dict[str, Any]
) -> None:
    with OneStepPipeline.load(bundle.root, "onnxruntime") as pipe:
        draft = pipe(PROMPT, seed=11, height=height)
        final = pipe.refine(draft, **wish)
    asked = RefineSettings(**{**RECIPE_SETTINGS, **wish})
    expected_HWC = diffusers_image(model_dir, 11, height, asked)
    difference = np.abs(final.images_BHWC[0] - expected_HWC)
    assert difference.max() <= 1
    assert np.abs(draft.images_BHWC[0] - expected_HWC).mean() > 1


RECIPE_SETTINGS = {"sampler": "dpmsolver++", "steps": 5, "guidance": 2.5}


def test_the_manifest_names_the_teacher(bundle: Bundle) -> None:
    refinement = bundle.manifest.refine
    assert refinement
    assert refinement.settings == RefineSettings(**RECIPE_SETTINGS)
    assert refinement.stage.parity.psnr_db > 60
    names = [tensor.name for tensor in refinement.stage.spec.inputs]
    assert names == ["sample", "timestep", "encoder_hidden_states"]
    assert {"teacher/model.onnx", "teacher/tables.npz"} <= bundle.manifest.files.keys()


def test_another_unet_does_not_pass_the_gate(
    bundle: Bundle,
    model_dir: Path,
    taught_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The adaptor's UNet in the teacher's place: an image that nobody could tell from right."""
    build = teacher_stage.generic_unet_module

    def with_adaptor(parts: Any) -> Any:
        return build(replace(parts, adaptor=taught_dir))

    monkeypatch.setattr(teacher_stage, "generic_unet_module", with_adaptor)
    model = ModelParts.open(str(model_dir))
    reference = Reference.read(bundle)
    references = References(reference.prompt, tuple(reference.seeds), reference.tensors)
    refinement = bundle.manifest.refine
    assert refinement
    with pytest.raises(HipaError, match=r"teacher in fp32 is .* dB from PyTorch"):
        teacher_stage.write_teacher(
            StageWriter(tmp_path, "fp32", {}, references),
            ChosenParts(model, "generate", adaptor=taught_dir),
            refinement.stage.spec,
            bundle.manifest.one_step,
            [PromptTokenizer(bundle.path("tokenizer/tokenizer.json"))],
            reference.tensors,
        )


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"adaptor": None}, "there is no adaptor"),
        ({"layout": "generic"}, "--with-teacher needs --layout onestep"),
        ({"fuse": True}, "which --fuse joins with the UNet"),
    ],
)
def test_what_has_no_teacher(
    model_dir: Path, taught_dir: Path, tmp_path: Path, changes: dict[str, Any], words: str
) -> None:
    options = ExportOptions(
        model=str(model_dir), out=tmp_path / "b", adaptor=taught_dir, with_teacher=True
    )
    with pytest.raises(HipaError, match=words):
        check_request(replace(options, **changes))


def test_another_task_has_none(model_dir: Path, tmp_path: Path) -> None:
    inpaint = make_adaptor(model_dir, tmp_path / "inpaint", task="inpaint")
    options = ExportOptions(
        model=str(model_dir), out=tmp_path / "b", adaptor=inpaint, with_teacher=True
    )
    with pytest.raises(HipaError, match="--with-teacher is for the task generate"):
        check_request(options)


def test_what_an_adaptor_says_of_its_teacher(taught_dir: Path, adaptor_dir: Path) -> None:
    assert teacher_settings(taught_dir) == RefineSettings(**RECIPE_SETTINGS)
    # This one does not say; a LoRA of others has no record.
    assert teacher_settings(adaptor_dir) == teacher_settings(None) == RefineSettings()


def test_a_damaged_record(model_dir: Path, tmp_path: Path) -> None:
    recipe = {"teacher": {"steps": 1, "guidance": 2.0}}
    adaptor = make_adaptor(model_dir, tmp_path / "adaptor", recipe=recipe)
    with pytest.raises(HipaError, match="Expected 2 to 1000 steps"):
        teacher_settings(adaptor)

"""Which task an export is for: the adaptor's word, the options, and both against each other."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from diffusers import EulerDiscreteScheduler

from hipa_deploy import OneStepPipeline
from hipa_deploy.errors import HipaError
from hipa_deploy.export.export_bundle import export_bundle
from hipa_deploy.export.export_options import ExportOptions
from hipa_deploy.export.export_request import SwapOptions
from hipa_deploy.export.export_swap import export_swap
from hipa_deploy.export.model_parts import ModelParts
from hipa_deploy.export.task import (
    TaskSettings,
    choose_task,
    parse_strengths,
    size_warning,
    step_warning,
)
from hipa_deploy.images.example_source import example_image
from tests.export.conftest import make_adaptor
from tests.tiny_model import make_model

EDIT = {"task": "edit", "timestep": 749, "strengths": (0.75, 0.5)}


@pytest.fixture(scope="module")
def edit_adaptor(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_adaptor(model_dir, tmp_path_factory.mktemp("adaptor") / "edit", **EDIT)


def chosen(model_dir: Path, **options) -> TaskSettings:
    return choose_task(
        ExportOptions(model=str(model_dir), out=Path("out"), **options),
        ModelParts.open(str(model_dir)),
    )


def test_the_adaptor_says(model_dir: Path, edit_adaptor: Path, tmp_path: Path) -> None:
    found = chosen(model_dir, adaptor=edit_adaptor)
    assert (found.task, found.timestep, found.upscale) == ("edit", 749, None)
    assert [(entry.strength, entry.timestep) for entry in found.strengths] == [
        (0.75, 749),
        (0.5, 499),
    ]
    assert found.inputs == ("noise", "source", "step", "context")
    fewer = chosen(model_dir, adaptor=edit_adaptor, task="edit", strengths=(0.5,))
    assert (fewer.timestep, fewer.inputs) == (499, ("noise", "source", "context"))
    larger = make_adaptor(model_dir, tmp_path / "larger", task="upscale", timestep=249, upscale=2)
    assert chosen(model_dir, adaptor=larger) == TaskSettings("upscale", 249, upscale=2)


def test_a_base_model_takes_what_is_options(model_dir: Path) -> None:
    assert chosen(model_dir) == TaskSettings("generate", 999)
    assert chosen(model_dir, task="inpaint") == TaskSettings("inpaint", 999)
    assert chosen(model_dir, task="upscale") == TaskSettings("upscale", 999, upscale=4)
    assert [entry.strength for entry in chosen(model_dir, task="edit").strengths] == [0.5]


@pytest.mark.parametrize(
    ("metadata", "options", "message"),
    [
        (EDIT, {"task": "inpaint"}, "was trained to edit, not to inpaint"),
        (EDIT, {"task": "generate"}, "was trained to edit, not to generate"),
        (
            EDIT,
            {"strengths": (0.6,)},
            r"not trained for strength 0\.6\. It was trained for: 0\.75, 0\.5",
        ),
        (EDIT, {"layout": "generic"}, "--layout generic is for the task generate, this is edit"),
        ({}, {"task": "edit"}, "was trained to generate, not to edit"),
        ({"task": "edit"}, {}, "names no strengths"),
    ],
)
def test_contradictions_are_refused(
    model_dir: Path, tmp_path: Path, metadata: dict, options: dict, message: str
) -> None:
    adaptor = make_adaptor(model_dir, tmp_path / "adaptor", **metadata)
    with pytest.raises(HipaError, match=message):
        chosen(model_dir, adaptor=adaptor, **options)


def test_another_size_than_the_adaptor_was_trained_at_is_a_warning(
    model_dir: Path, edit_adaptor: Path
) -> None:
    options = ExportOptions(model=str(model_dir), out=Path("out"), adaptor=edit_adaptor)
    model = ModelParts.open(str(model_dir))
    assert size_warning(options, model.one_step(749, None, None)) is None
    assert size_warning(options, model.one_step(749, 32, 32)) is None
    warning = size_warning(options, model.one_step(749, 48, 64))
    assert warning is not None
    assert "was trained at 32x32 pixels, and 64x48 is exported" in warning
    plain = ExportOptions(model=str(model_dir), out=Path("out"))
    assert size_warning(plain, model.one_step(749, 48, 64)) is None


def test_strengths_are_numbers() -> None:
    assert parse_strengths("0.75, 0.5") == (0.75, 0.5)
    with pytest.raises(HipaError, match="expected numbers"):
        parse_strengths("0.75;0.5")


@pytest.mark.thorough
def test_an_edit_takes_another_adaptor_at_every_strength(
    model_dir: Path, edit_adaptor: Path, tiny_vae_dir: Path, tmp_path: Path
) -> None:
    """To the byte what the other adaptor's own export gives: the tables of biases change too."""
    other = make_adaptor(model_dir, tmp_path / "other", preset="paper", rank=2, alpha=6.0, **EDIT)
    # The adaptors change the UNet alone: the other stages are the smallest that there are.
    options = ExportOptions(
        model=str(model_dir),
        out=tmp_path / "base",
        adaptor=edit_adaptor,
        dtype="fp32",
        encoder=tiny_vae_dir,
        decoder=tiny_vae_dir,
        prompts=model_dir / "prompts.txt",
    )
    base = export_bundle(options)
    own = export_bundle(replace(options, adaptor=other, out=tmp_path / "own"))
    export_swap(
        SwapOptions(model=str(model_dir), adaptor=other, bundle=base.root, out=tmp_path / "swap")
    )
    with (
        OneStepPipeline.load(base.root, "onnxruntime") as pipe,
        OneStepPipeline.load(own.root, "onnxruntime") as theirs,
    ):
        before = pipe.edit(example_image(32, 32), "a green pear", strength=0.5)
        pipe.swap_adaptor(tmp_path / "swap")
        for strength in (0.75, 0.5):
            ours, expected = (
                p.edit(example_image(32, 32), "a green pear", strength=strength)
                for p in (pipe, theirs)
            )
            assert ours.images_BHWC.tobytes() == expected.images_BHWC.tobytes()
            own = ("producer", "bundle", "bundle_name")  # of the two bundles, which are two
            shared = {name: ours.parameters[0][name] for name in own}
            assert ours.parameters[0] == expected.parameters[0] | shared
    assert before.images_BHWC.tobytes() != expected.images_BHWC.tobytes()
    generates = make_adaptor(model_dir, tmp_path / "generates")
    with pytest.raises(HipaError, match="was trained to generate, not to edit"):
        export_swap(
            SwapOptions(
                model=str(model_dir), adaptor=generates, bundle=base.root, out=tmp_path / "no"
            )
        )
    fewer = make_adaptor(model_dir, tmp_path / "fewer", **EDIT | {"strengths": (0.75,)})
    with pytest.raises(HipaError, match=r"not trained for strength 0\.5"):
        export_swap(
            SwapOptions(model=str(model_dir), adaptor=fewer, bundle=base.root, out=tmp_path / "no")
        )


def test_a_one_step_method_decides_the_step(model_dir: Path, tmp_path: Path) -> None:
    lora = tmp_path / "lora.safetensors"
    lora.touch()
    found = chosen(model_dir, adaptor=lora, one_step="hyper-sd15-t800")
    assert found.timestep == 800
    assert found.method is not None
    assert chosen(model_dir, adaptor=lora, one_step="hipa") == TaskSettings("generate", 999)
    merged = tmp_path / "merged.toml"
    merged.write_text('source = "me"\nscheduler = "LCMScheduler"\ntimestep = 499\n')
    assert chosen(model_dir, one_step=str(merged)).timestep == 499


FACTORS = 'source = "me"\ntimestep = 499\n[factors]\nnoise_scale = 1.0\nsample_factor = 1.0\n'


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"one_step": "hyper-sd15"}, "hyper-sd15 is a LoRA. Give its file with --adaptor"),
        ({"one_step": "sdxl-turbo"}, "sdxl-turbo is for SDXL"),
        ({"one_step": "sd-turbo", "task": "edit"}, "sd-turbo is for the task generate"),
        ({"one_step": "fast"}, "one-step method 'fast' does not exist"),
    ],
)
def test_a_method_that_does_not_belong(model_dir: Path, options: dict, message: str) -> None:
    with pytest.raises(HipaError) as error:
        chosen(model_dir, **options)
    assert message in str(error.value)


def test_an_adaptor_of_hipa_says_its_own_step(model_dir: Path, adaptor_dir: Path) -> None:
    with pytest.raises(HipaError, match=r"own step \(timestep 999\). Leave out --one-step lcm"):
        chosen(model_dir, adaptor=adaptor_dir, one_step="lcm-sd15")
    assert chosen(model_dir, adaptor=adaptor_dir, one_step="hipa").method is None


def test_factors_have_no_scheduler_for_the_generic_layout(model_dir: Path, tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(FACTORS + "output_factor = 1.0\n")
    assert chosen(model_dir, one_step=str(path)).timestep == 499
    with pytest.raises(HipaError, match=r"mine.toml has \[factors\]"):
        chosen(model_dir, one_step=str(path), layout="generic")


def warned(model_dir: Path, **options) -> str | None:
    whole = ExportOptions(model=str(model_dir), out=Path("out"), **options)
    model = ModelParts.open(str(model_dir))
    return step_warning(whole, choose_task(whole, model), model)


def test_a_foreign_lora_without_a_method_is_warned_of(
    model_dir: Path, adaptor_dir: Path, tmp_path: Path
) -> None:
    lora = tmp_path / "lora.safetensors"
    lora.touch()
    text = warned(model_dir, adaptor=lora)
    assert text is not None
    assert "x0 at timestep 999 is used" in text
    assert "hyper-sd15" in text
    assert warned(model_dir, adaptor=lora, one_step="hipa") is None
    assert warned(model_dir, adaptor=lora, one_step="lcm-sd15") is None
    assert warned(model_dir, adaptor=adaptor_dir) is None
    assert warned(model_dir) is None


def test_a_method_that_predicts_something_else_is_warned_of(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "v", "v_prediction")
    text = warned(folder, one_step="sd-turbo")
    assert text is not None
    assert "says v_prediction: epsilon is used" in text


def test_a_model_like_sd_turbo_is_told_of_its_preset(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "turbo")
    scheduler = EulerDiscreteScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        timestep_spacing="trailing",
    )
    scheduler.save_pretrained(folder / "scheduler")
    text = warned(folder)
    assert text is not None
    assert "use --one-step sd-turbo" in text
    assert warned(folder, one_step="sd-turbo") is None
    assert warned(folder, one_step="hipa") is None

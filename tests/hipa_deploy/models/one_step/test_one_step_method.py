"""Presets and files of one-step methods."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from hipa_deploy.errors import HipaError
from hipa_deploy.models.configurations import write_config
from hipa_deploy.models.model_config import ModelConfig
from hipa_deploy.models.one_step.one_step_method import (
    FAMILIES,
    check_fits,
    load_method,
    preset_names,
)
from hipa_deploy.models.one_step.step_constants import step_constants
from tests.one_step_loras import method

BASE = 'source = "the test"\nscheduler = "LCMScheduler"\ntimestep = 999\n'


def write(tmp_path: Path, text: str) -> str:
    path = tmp_path / "mine.toml"
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_every_preset_is_whole() -> None:
    for name in preset_names():
        preset = load_method(name)
        if preset is None:
            assert name == "hipa"
            continue
        assert preset.name == name
        assert preset.source.startswith("https://huggingface.co/")
        assert preset.family in FAMILIES
        assert preset.guidance_scale == 0


@pytest.mark.parametrize(
    ("name", "timestep", "scheduler"),
    [
        ("hyper-sd15", 999, "TCDScheduler"),
        ("hyper-sd15-t800", 800, "TCDScheduler"),
        ("hyper-sdxl", 999, "TCDScheduler"),
        ("hyper-sdxl-unet", 800, "LCMScheduler"),
        ("lcm-sd15", 999, "LCMScheduler"),
        ("tcd-sd15", 999, "TCDScheduler"),
        ("dmd2-sdxl-unet", 399, "LCMScheduler"),
        ("sd-turbo", 999, "EulerDiscreteScheduler"),
        ("sdxl-turbo", 999, "EulerAncestralDiscreteScheduler"),
        ("sdxl-lightning", 999, "EulerDiscreteScheduler"),
    ],
)
def test_what_the_authors_say(name: str, timestep: int, scheduler: str) -> None:
    preset = load_method(name)
    assert preset is not None
    assert (preset.timestep, preset.scheduler) == (timestep, scheduler)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (BASE + "steps = 1\n", "unknown key 'steps'. Expected: source, note, family"),
        (BASE + 'name = "x"\n', "unknown key 'name'"),
        (BASE.replace("999", "-1"), "timestep = -1: input should be greater than or equal to 0"),
        (BASE.replace("999", "999.5"), "timestep = 999.5: input should be a valid integer"),
        (BASE + "guidance_scale = 7.5\n", "guidance_scale = 7.5: one call of the UNet has no guid"),
        (BASE + "eta = 2\n", "eta = 2: input should be less than or equal to 1"),
        (BASE + 'family = "sd3"\n', "family = 'sd3': input should be 'sd1', 'sd2' or 'sdxl'"),
        (BASE + 'prediction_type = "flow"\n', "prediction_type = 'flow': input should be"),
        ('scheduler = "LCMScheduler"\ntimestep = 9\n', "key 'source' is missing"),
        ('source = "x"\ntimestep = 9\n', "expected either scheduler or"),
        (
            BASE + "[factors]\nnoise_scale = 1.0\nsample_factor = 1.0\noutput_factor = 1.0\n",
            "expected either scheduler or",
        ),
        ("timestep = \n", "cannot be read"),
    ],
)
def test_a_file_that_is_wrong(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(HipaError) as error:
        load_method(write(tmp_path, text))
    assert "mine.toml" in str(error.value)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_family_is_told_by_the_width_of_its_context(configs: dict[str, ModelConfig]) -> None:
    for name, other in (("hyper-sdxl", "sd15"), ("hyper-sd15", "sd21-v"), ("sd-turbo", "sd15")):
        preset = load_method(name)
        assert preset is not None
        with pytest.raises(HipaError, match=f"{name} is for .*Use one of: hipa, ") as error:
            check_fits(preset, configs[other])
        # The remedy names methods that this model can take.
        for known in str(error.value).rpartition("Use one of: ")[2].rstrip(".").split(", "):
            suggested = load_method(known)
            if suggested is not None:
                step_constants(suggested, configs[other])


def test_a_unet_that_takes_the_guidance(tmp_path: Path) -> None:
    """As LCM's own UNets, into which the guidance is distilled."""
    folder = write_config("sd15", tmp_path / "lcm")
    path = folder / "unet/config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "time_cond_proj_dim": 256}))
    with pytest.raises(HipaError, match=r"guidance as an input \(time_cond_proj_dim=256\)"):
        check_fits(method(), ModelConfig.read(folder))


def test_names_are_listed() -> None:
    with pytest.raises(HipaError, match=r"'hyper' does not exist.*hyper-sd15, .*sd-turbo"):
        load_method("hyper")


def test_another_timestep() -> None:
    preset = load_method("lcm-sd15")
    other = load_method("lcm-sd15@759")
    assert preset is not None
    assert other == preset.model_copy(update={"name": "lcm-sd15@759", "timestep": 759})
    with pytest.raises(HipaError, match=r"hipa@5: an adaptor of HiPA has its own step"):
        load_method("hipa@5")
    with pytest.raises(HipaError, match=r"lcm-sd15@200000: timestep = 200000"):
        load_method("lcm-sd15@200000")

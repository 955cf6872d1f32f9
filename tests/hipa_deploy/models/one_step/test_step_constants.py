"""The numbers of one-step methods, by the formulas of the papers; and the keys of their files."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hipa_deploy.errors import HipaError
from hipa_deploy.models.configurations import write_config
from hipa_deploy.models.lora.merge_lora import module_names
from hipa_deploy.models.lora.names import role_of
from hipa_deploy.models.model_config import ModelConfig
from hipa_deploy.models.one_step.one_step_method import load_method, preset_names
from hipa_deploy.models.one_step.step_constants import make_scheduler, start, step_constants
from tests.one_step_loras import Layout, kohya, lora_tensors, method, old_diffusers, peft

SD_ALPHA_BAR = {999: 0.0046601, 800: 0.0368696, 0: 0.99915}
A = math.sqrt(SD_ALPHA_BAR[999])
S = math.sqrt(1 - SD_ALPHA_BAR[999])


@pytest.mark.parametrize("name", [name for name in preset_names() if name != "hipa"])
def test_diffusers_takes_one_step_at_the_presets_timestep(
    name: str, configs: dict[str, ModelConfig]
) -> None:
    """For SDXL too: its noise schedule is SD's."""
    preset = load_method(name)
    assert preset is not None
    scheduler = make_scheduler(preset, configs["sd15"])
    call = start(scheduler, preset.timestep)
    assert [int(t) for t in scheduler.timesteps] == [preset.timestep]
    expected = {"num_inference_steps": 1}
    if preset.timestep != 999:
        expected["timesteps"] = [preset.timestep]
    assert call == expected


def test_lcm_mixes_the_noise_in(configs: dict[str, ModelConfig]) -> None:
    """Luo et al. 2023, section 4.1: c_skip z + c_out x0, at sigma_data = 0.5 and 10 t."""
    numbers = step_constants(method(), configs["sd15"]).method
    c_skip = 0.25 / ((10 * 999) ** 2 + 0.25)
    c_out = 10 * 999 / math.sqrt((10 * 999) ** 2 + 0.25)
    assert numbers.noise_scale == 1
    assert numbers.sample_factor == pytest.approx(c_out / A + c_skip, rel=1e-4)
    assert numbers.output_factor == pytest.approx(-c_out * S / A, rel=1e-4)

    # With a scaling at which the mix is visible.
    scaled = method(settings={"timestep_scaling": 0.001})
    numbers = step_constants(scaled, configs["sd15"]).method
    c_skip = 0.25 / (0.999**2 + 0.25)
    c_out = 0.999 / math.sqrt(0.999**2 + 0.25)
    assert numbers.sample_factor == pytest.approx(c_out / A + c_skip, rel=1e-4)


def test_tcd_ends_at_the_first_timestep(configs: dict[str, ModelConfig]) -> None:
    """Zheng et al. 2024, algorithm 1 with one step: sqrt(ab_0) x0 + sqrt(1 - ab_0) eps."""
    preset = load_method("hyper-sd15-t800")
    assert preset is not None
    numbers = step_constants(preset, configs["sd15"]).method
    a = math.sqrt(SD_ALPHA_BAR[800])
    s = math.sqrt(1 - SD_ALPHA_BAR[800])
    a0 = math.sqrt(SD_ALPHA_BAR[0])
    s0 = math.sqrt(1 - SD_ALPHA_BAR[0])
    assert numbers.sample_factor == pytest.approx(a0 / a, rel=1e-5)
    assert numbers.output_factor == pytest.approx(s0 - a0 * s / a, rel=1e-5)


def test_euler_scales_the_noise(configs: dict[str, ModelConfig]) -> None:
    """Trailing: noise times sigma, seen divided by sqrt(sigma^2 + 1), which is sqrt(1 - ab)."""
    preset = load_method("sd-turbo")
    assert preset is not None
    constants = step_constants(preset, configs["sd21-base"])
    assert constants.alpha_bar == pytest.approx(SD_ALPHA_BAR[999], rel=1e-4)
    assert constants.method.noise_scale == pytest.approx(S, rel=1e-6)
    assert constants.method.sample_factor == pytest.approx(1 / A, rel=1e-5)
    assert constants.method.output_factor == pytest.approx(-S / A, rel=1e-5)


def test_lightning_predicts_the_image_itself(tmp_path: Path) -> None:
    """Whatever the model's folder says: the noise is scaled as for Euler, the output is x0."""
    preset = load_method("sdxl-lightning")
    assert preset is not None
    config = ModelConfig.read(write_config("sdxl", tmp_path / "sdxl"))
    constants = step_constants(preset, config)
    assert constants.prediction_type == "sample"
    assert constants.method.noise_scale == pytest.approx(S, rel=1e-6)
    assert constants.method.sample_factor == pytest.approx(0, abs=1e-6)
    assert constants.method.output_factor == pytest.approx(1, rel=1e-6)


@settings(
    max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(timestep=st.integers(0, 999), kind=st.sampled_from(["sd15", "sd21-v"]))
def test_any_timestep_of_lcm(configs: dict[str, ModelConfig], timestep: int, kind: str) -> None:
    constants = step_constants(method(timestep=timestep), configs[kind])
    alpha_bar = configs[kind].alpha_bar(timestep)
    a = math.sqrt(alpha_bar)
    s = math.sqrt(1 - alpha_bar)
    from_z, from_output = (1 / a, -s / a) if kind == "sd15" else (a, -s)
    c_skip = 0.25 / ((10 * timestep) ** 2 + 0.25)
    c_out = 10 * timestep / math.sqrt((10 * timestep) ** 2 + 0.25)
    got = constants.method
    assert got.sample_factor == pytest.approx(c_out * from_z + c_skip, rel=1e-4, abs=1e-5)
    assert got.output_factor == pytest.approx(c_out * from_output, rel=1e-4, abs=1e-5)


def test_factors_in_place_of_a_scheduler(tmp_path: Path, configs: dict[str, ModelConfig]) -> None:
    text = (
        'source = "a paper"\ntimestep = 500\nprediction_type = "sample"\n'
        "[factors]\nnoise_scale = 2.0\nsample_factor = 0.0\noutput_factor = 1.0\n"
    )
    path = tmp_path / "mine.toml"
    path.write_text(text)
    mine = load_method(str(path))
    assert mine is not None
    constants = step_constants(mine, configs["sd15"])
    assert constants.prediction_type == "sample"
    assert constants.method.noise_scale == 2
    assert constants.method.output_factor == 1
    with pytest.raises(HipaError, match=r"no scheduler of DDPM's family"):
        make_scheduler(mine, configs["sd15"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scheduler": "DDIM"}, "scheduler = 'DDIM' is no scheduler"),
        ({"scheduler": "FlowMatchEulerDiscreteScheduler"}, "is no scheduler of DDPM's family"),
        ({"settings": {"shift": 3}}, "LCMScheduler has no setting 'shift'"),
        ({"settings": {"beta_schedule": "cubic"}}, "LCMScheduler cannot be made"),
        ({"timestep": 1000}, "timestep 1000 is out of range. Expected 0 to 999"),
        ({"eta": 0.5}, "LCMScheduler has no eta"),
        ({"settings": {"clip_sample": True}}, r"is not linear .*\(clip_sample = true\)"),
        ({"settings": {"thresholding": True}}, r"is not linear .*\(thresholding = true\)"),
        (
            {"scheduler": "EulerDiscreteScheduler", "settings": {"timestep_spacing": "leading"}},
            None,
        ),
        ({"scheduler": "DDIMScheduler"}, "DDIMScheduler cannot take one step from timestep 999"),
        ({"settings": {"rescale_betas_zero_snr": True}}, "timestep 999 has no signal"),
    ],
)
def test_a_method_that_this_model_cannot_take(
    configs: dict[str, ModelConfig], changes: dict, message: str | None
) -> None:
    if message is None:  # a start that the spacing does not have, and custom timesteps do
        constants = step_constants(method(**changes), configs["sd15"])
        assert constants.method.noise_scale == pytest.approx(1)
        return
    with pytest.raises(HipaError, match=message):
        step_constants(method(**changes), configs["sd15"])


def test_a_step_that_adds_noise(configs: dict[str, ModelConfig]) -> None:
    """With set_alpha_to_one = false, DDIM's last step has a variance for eta to multiply."""
    noisy = method(
        scheduler="DDIMScheduler",
        settings={"timestep_spacing": "trailing", "set_alpha_to_one": False},
        eta=1.0,
    )
    with pytest.raises(HipaError, match="it may add noise: set eta = 0"):
        step_constants(noisy, configs["sd15"])


@pytest.mark.parametrize("layout", [kohya, peft, old_diffusers])
def test_every_key_of_a_published_file_is_a_layer_of_sd15(
    layout: Layout, configs: dict[str, ModelConfig]
) -> None:
    """Shapes only, at the true size: rank 64 fills the published files.

    Hyper-SD15-1step-lora.safetensors has 269 MB in float32, lcm-lora-sdv1-5 has 67.5 M parameters.
    """
    keywords = json.loads((configs["sd15"].folder / "unet/config.json").read_text())
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(keywords)
    tensors = lora_tensors(unet, layout, rank=64)
    parameters = sum(value.numel() for value in tensors.values() if value.ndim)
    assert round(4 * parameters / 1e6) == 269
    modules = module_names({"unet": unet})
    layers = set()
    for key in tensors:
        split = role_of(key)
        assert split is not None
        found = modules.find(split[0])
        assert found is not None, key
        layers.add(found)
    assert len(layers) == 278

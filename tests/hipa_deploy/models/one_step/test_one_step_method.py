"""Presets and files of one-step methods, and their numbers by the formulas of the papers."""

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
from hipa_deploy.models.one_step.one_step_method import (
    FAMILIES,
    OneStepMethod,
    check_fits,
    load_method,
    preset_names,
)
from hipa_deploy.models.one_step.step_constants import make_scheduler, start, step_constants
from tests.one_step_loras import Layout, kohya, lora_tensors, old_diffusers, peft

SD_ALPHA_BAR = {999: 0.0046601, 800: 0.0368696, 0: 0.99915}
A = math.sqrt(SD_ALPHA_BAR[999])
S = math.sqrt(1 - SD_ALPHA_BAR[999])


@pytest.fixture(scope="module")
def configs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, ModelConfig]:
    folder = tmp_path_factory.mktemp("configs")
    names = ("sd15", "sd21-base", "sd21-v")
    return {name: ModelConfig.read(write_config(name, folder / name)) for name in names}


def write(tmp_path: Path, text: str) -> str:
    path = tmp_path / "mine.toml"
    path.write_text(text, encoding="utf-8")
    return str(path)


BASE = 'source = "the test"\nscheduler = "LCMScheduler"\ntimestep = 999\n'


def method(**changes: object) -> OneStepMethod:
    fields = {"name": "mine", "source": "the test", "scheduler": "LCMScheduler", "timestep": 999}
    return OneStepMethod.model_validate({**fields, **changes})


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
    ],
)
def test_what_the_authors_say(name: str, timestep: int, scheduler: str) -> None:
    preset = load_method(name)
    assert preset is not None
    assert (preset.timestep, preset.scheduler) == (timestep, scheduler)


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
    mine = load_method(write(tmp_path, text))
    assert mine is not None
    constants = step_constants(mine, configs["sd15"])
    assert constants.prediction_type == "sample"
    assert constants.method.noise_scale == 2
    assert constants.method.output_factor == 1
    with pytest.raises(HipaError, match=r"no scheduler of DDPM's family"):
        make_scheduler(mine, configs["sd15"])


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

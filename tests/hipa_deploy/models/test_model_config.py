"""What a model's configuration files mean, with the values that published files have and lack."""

from __future__ import annotations

import ast
import inspect
import json
import re
import shutil
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
from diffusers import schedulers

from hipa_deploy.errors import HipaError
from hipa_deploy.models.configurations import write_config
from hipa_deploy.models.model_config import SAME_DEFAULTS, SCHEDULE_KEYS, ModelConfig
from tests.published import PUBLISHED, write_configs
from tests.tiny_model import make_model

VAE = "vae/config.json"
UNET = "unet/config.json"
SCHEDULER = "scheduler/scheduler_config.json"


@pytest.fixture
def sd15(tmp_path: Path) -> Path:
    return write_config("sd15", tmp_path / "sd15")


def change(folder: Path, file: str, without: tuple[str, ...] = (), **values: Any) -> None:
    config = json.loads((folder / file).read_text())
    kept = {key: value for key, value in config.items() if key not in without}
    (folder / file).write_text(json.dumps(kept | values))


def test_stable_diffusion_1(sd15: Path) -> None:
    config = ModelConfig.read(sd15, "generate")
    assert config.native_latents == (4, 64, 64)
    assert config.native_size == (512, 512)
    assert config.vae_factor == 8
    assert config.size_multiple == 64
    assert config.text_width == 768
    assert config.prediction_type == "epsilon"
    assert not config.is_inpainting
    assert config.alpha_bar(999) == pytest.approx(0.0046601, rel=1e-4)


def test_a_vae_that_does_not_say_its_scaling_factor(sd15: Path) -> None:
    """As the published SD 1.x folders: the default of AutoencoderKL is meant."""
    change(sd15, VAE, without=("scaling_factor", "latent_channels"))
    config = ModelConfig.read(sd15)
    assert config.scaling_factor == 0.18215
    assert config.latent_channels == 4


@pytest.mark.parametrize(
    ("size", "latents", "pixels"),
    [(96, (4, 96, 96), (768, 768)), ([8, 16], (4, 8, 16), (64, 128))],
)
def test_a_size_is_a_number_or_height_and_width(
    sd15: Path, size: Any, latents: tuple, pixels: tuple
) -> None:
    change(sd15, UNET, sample_size=size)
    config = ModelConfig.read(sd15)
    assert config.native_latents == latents
    assert config.native_size == pixels


@pytest.mark.parametrize(
    ("version", "size", "native"),
    [("0.6.0", 32, 512), ("0.9.0.dev0", 32, 256), ("0.9.0", 32, 256), ("0.6.0", 96, 768)],
)
def test_an_old_folder_has_the_size_that_the_pipeline_takes(
    tmp_path: Path, version: str, size: int, native: int
) -> None:
    """diffusers before 0.9.0 wrote 32 for UNets of 64 latents; the pipeline corrects it."""
    folder = make_model(tmp_path / "tiny")
    change(folder, UNET, _diffusers_version=version, sample_size=size)
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
    config = ModelConfig.read(folder)
    assert config.native_latents[1:] == (pipe.unet.config.sample_size,) * 2
    assert config.native_size[0] * 8 == native * config.vae_factor


@pytest.mark.parametrize(
    ("file", "key", "value"),
    [
        (UNET, "sample_size", 0),
        (UNET, "sample_size", True),
        (UNET, "sample_size", 64.5),
        (UNET, "sample_size", [64, None]),
        (UNET, "sample_size", [8, 8, 8]),
        (UNET, "block_out_channels", None),
        (VAE, "block_out_channels", []),
        (VAE, "latent_channels", None),
        (VAE, "scaling_factor", None),
        (VAE, "scaling_factor", "big"),
        (VAE, "scaling_factor", 0),
        ("text_encoder/config.json", "hidden_size", None),
    ],
)
def test_a_value_that_no_model_can_have(sd15: Path, file: str, key: str, value: Any) -> None:
    change(sd15, file, **{key: value})
    with pytest.raises(HipaError, match=re.escape(f"{file} has {key}={value!r}. Expected a")):
        ModelConfig.read(sd15)


@pytest.mark.parametrize("without", [("sample_size",), ()])
def test_a_model_that_does_not_say_its_size(sd15: Path, without: tuple[str, ...]) -> None:
    change(sd15, UNET, without=without, **({} if without else {"sample_size": None}))
    config = ModelConfig.read(sd15)
    with pytest.raises(HipaError, match="does not say what size the model is for"):
        _ = config.native_size


@pytest.mark.parametrize("kind", ["v-prediction", "flow_prediction", None])
def test_another_prediction_type(sd15: Path, kind: str | None) -> None:
    change(sd15, SCHEDULER, prediction_type=kind)
    with pytest.raises(HipaError, match=rf"predicts {kind!r}\. Expected one of: epsilon, v_pred"):
        ModelConfig.read(sd15)


@pytest.mark.parametrize(
    "name",
    ["DDIMScheduler", "PNDMScheduler", "EulerDiscreteScheduler", "LCMScheduler", "TCDScheduler"],
)
def test_what_a_scheduler_leaves_out_is_its_own_classs_default(sd15: Path, name: str) -> None:
    (sd15 / SCHEDULER).write_text(json.dumps({"_class_name": name}))
    config = ModelConfig.read(sd15)
    kind = getattr(diffusers, name)
    own = inspect.signature(kind.__init__).parameters
    assert config.schedule["beta_start"] == own["beta_start"].default
    np.testing.assert_allclose(config.alphas_cumprod, kind().alphas_cumprod, rtol=1e-6)


def test_a_class_that_only_the_index_names(sd15: Path) -> None:
    change(sd15, SCHEDULER, without=("_class_name",))
    assert ModelConfig.read(sd15).schedule["beta_start"] == 0.00085


@pytest.mark.parametrize(("name", "other"), SAME_DEFAULTS.items())
def test_a_scheduler_whose_dependency_is_not_installed(sd15: Path, name: str, other: str) -> None:
    """Its defaults, read from diffusers' source, are those of the class that stands for it."""
    folder = Path(schedulers.__file__).parent
    sources = [path.read_text() for path in folder.glob("scheduling_*.py")]
    (source,) = [text for text in sources if f"class {name}(" in text]
    classes = {node.name: node for node in ast.parse(source).body if isinstance(node, ast.ClassDef)}
    functions = {node.name: node for node in classes[name].body if hasattr(node, "args")}
    arguments = functions["__init__"].args
    names = [argument.arg for argument in arguments.args][-len(arguments.defaults) :]
    defaults = dict(zip(names, map(ast.literal_eval, arguments.defaults), strict=True))
    beside = inspect.signature(getattr(schedulers, other).__init__).parameters
    of_the_schedule = [key for key in SCHEDULE_KEYS if key in defaults]
    assert len(of_the_schedule) >= 6
    for key in of_the_schedule:
        assert beside[key].default == defaults[key]
    change(sd15, SCHEDULER, _class_name=name)
    assert ModelConfig.read(sd15).alpha_bar(999) == pytest.approx(0.0046601, rel=1e-4)


@pytest.mark.parametrize("name", ["FlowMatchEulerDiscreteScheduler", "NoSuchScheduler"])
def test_a_listed_scheduler_of_another_family(sd15: Path, name: str) -> None:
    """The pipeline is loaded with it, although scheduler_config.json names another."""
    change(sd15, "model_index.json", scheduler=["diffusers", name])
    with pytest.raises(HipaError, match=f"scheduler {name}, which is not of DDPM's family"):
        ModelConfig.read(sd15)


@pytest.mark.parametrize(
    "scheduler",
    [
        {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000},
        {"_class_name": "EDMEulerScheduler", "sigma_min": 0.002},
        {"_class_name": "NoSuchScheduler"},
        {"_class_name": "DPMSolverMultistepScheduler", "use_flow_sigmas": True},
    ],
)
def test_a_scheduler_of_another_family(sd15: Path, scheduler: dict) -> None:
    (sd15 / SCHEDULER).write_text(json.dumps(scheduler))
    name = scheduler["_class_name"]
    with pytest.raises(HipaError, match=f"scheduler {name}.*is not of DDPM's family"):
        ModelConfig.read(sd15)


def test_a_schedule_that_ends_in_pure_noise(sd15: Path) -> None:
    change(sd15, SCHEDULER, rescale_betas_zero_snr=True)
    with pytest.raises(HipaError, match="timestep 999 has no signal, so eps says nothing about x0"):
        ModelConfig.read(sd15).alpha_bar(999)
    assert ModelConfig.read(sd15).alpha_bar(900) > 0
    change(sd15, SCHEDULER, prediction_type="v_prediction")
    assert ModelConfig.read(sd15).alpha_bar(999) == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("name", ["PNDMScheduler", "DEISMultistepScheduler"])
def test_a_schedule_that_the_listed_class_cannot_have(sd15: Path, name: str) -> None:
    """SD 1.x is published with PNDM's; a model of zero terminal SNR made from it says so beside."""
    values = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
    change(sd15, SCHEDULER, _class_name=name, **values)
    listed = getattr(diffusers, name).from_pretrained(sd15, subfolder="scheduler")
    expected = diffusers.DDIMScheduler.from_config(listed.config).alphas_cumprod
    config = ModelConfig.read(sd15)
    np.testing.assert_allclose(config.alphas_cumprod, expected, rtol=1e-6)
    assert config.alpha_bar(999) == 0
    change(sd15, SCHEDULER, rescale_betas_zero_snr="yes")
    with pytest.raises(HipaError, match=r"has rescale_betas_zero_snr='yes'\. Expected a value"):
        ModelConfig.read(sd15)


def test_a_schedule_of_500_timesteps(sd15: Path) -> None:
    change(sd15, SCHEDULER, num_train_timesteps=500)
    config = ModelConfig.read(sd15)
    assert len(config.alphas_cumprod) == 500
    with pytest.raises(HipaError, match=r"timestep 999 is out of range\. Expected 0 to 499"):
        config.alpha_bar(999)


@pytest.mark.parametrize("changes", [{"beta_schedule": "no_such"}, {"beta_start": -1.0}])
def test_a_schedule_that_cannot_be_made(sd15: Path, changes: dict) -> None:
    change(sd15, SCHEDULER, **changes)
    with pytest.raises(HipaError, match="its noise schedule cannot be made"):
        ModelConfig.read(sd15).alpha_bar(0)


def test_a_unet_for_inpainting(sd15: Path) -> None:
    change(sd15, UNET, in_channels=9)
    assert ModelConfig.read(sd15, "inpaint").is_inpainting
    with pytest.raises(HipaError, match="it is made for inpainting"):
        ModelConfig.read(sd15, "generate")


def test_files_that_are_missing(sd15: Path) -> None:
    shutil.rmtree(sd15 / "vae")
    with pytest.raises(HipaError, match="no readable vae/config"):
        ModelConfig.read(sd15)


@pytest.mark.parametrize(
    ("name", "size", "predicts"),
    [
        ("v1-5", 512, "epsilon"),
        ("2-1-base", 512, "epsilon"),
        ("2-1", 768, "v_prediction"),
        ("sd-turbo", 512, "epsilon"),
    ],
)
def test_the_configurations_as_published(
    tmp_path: Path, name: str, size: int, predicts: str
) -> None:
    config = ModelConfig.read(write_configs(name, tmp_path), "generate")
    assert config.native_size == (size, size)
    assert config.latent_channels == 4
    assert config.vae_factor == 8
    assert config.scaling_factor == 0.18215
    assert config.text_width == (768 if name == "v1-5" else 1024)
    assert config.prediction_type == predicts
    # Stable Diffusion's schedule, of which the papers give the last value.
    assert config.last_timestep == 999
    assert config.alpha_bar(999) == pytest.approx(0.0046601, rel=1e-4)


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_published_files_lack_what_they_lack(tmp_path: Path, name: str) -> None:
    """Otherwise the test above would not test the defaults."""
    folder = write_configs(name, tmp_path)
    vae = json.loads((folder / "vae/config.json").read_text())
    schedule = json.loads((folder / SCHEDULER).read_text())
    assert ("scaling_factor" in vae) == (name == "sd-turbo")
    assert ("prediction_type" in schedule) == (name != "v1-5")
    assert schedule["trained_betas"] is None


@pytest.mark.parametrize("betas", [[], [0.1, 1.5], [-0.1], ["x"], 0.1, "linear"])
def test_trained_betas_that_are_none(sd15: Path, betas: Any) -> None:
    change(sd15, SCHEDULER, trained_betas=betas)
    with pytest.raises(HipaError, match=r"has trained_betas=.* Expected null, or a number from 0"):
        ModelConfig.read(sd15)


def test_trained_betas_are_the_schedule(sd15: Path) -> None:
    change(sd15, SCHEDULER, trained_betas=[0.1, 0.5])
    config = ModelConfig.read(sd15)
    assert config.last_timestep == 1
    assert config.alpha_bar(1) == pytest.approx(0.9 * 0.5)


@pytest.mark.parametrize("changes", [{"beta_start": 5.0}, {"beta_end": 30.0}])
def test_a_schedule_without_sense(sd15: Path, changes: dict) -> None:
    change(sd15, SCHEDULER, **changes)
    with pytest.raises(HipaError, match=r"its noise schedule (has \d+ timesteps|cannot be made)"):
        _ = ModelConfig.read(sd15).alphas_cumprod

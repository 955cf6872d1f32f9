"""One-step methods of others: a bundle gives the image of diffusers' own pipeline for the method.

The weights are random, of the published layouts. diffusers loads the LoRA file, makes the scheduler
as the method's authors do, and takes the step; nothing of it goes through this project's code.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    EulerDiscreteScheduler,
    LCMScheduler,
    PNDMScheduler,
    StableDiffusionPipeline,
    TCDScheduler,
)

from hipa_deploy.bundle.folder import Bundle
from hipa_deploy.doctor.self_check import check_bundle
from hipa_deploy.errors import HipaError
from hipa_deploy.export.export_bundle import export_bundle
from hipa_deploy.export.export_options import ExportOptions
from hipa_deploy.export.export_swap import SwapOptions, export_swap
from hipa_deploy.generate.noise import initial_noise
from hipa_deploy.generate.pipeline import OneStepPipeline
from tests.one_step_loras import Layout, kohya, old_diffusers, peft, small_model, write_lora

PROMPT = "a red apple"
SEEDS = (0, 1, 7)
LEAST_DB = 40
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def published_scheduler(prediction_type: str) -> PNDMScheduler:
    """SD 1.5's and SD 2.1's scheduler/scheduler_config.json."""
    return PNDMScheduler(
        **BETAS,
        prediction_type=prediction_type,
        skip_prk_steps=True,
        set_alpha_to_one=False,
        steps_offset=1,
    )


def turbo_scheduler(prediction_type: str) -> EulerDiscreteScheduler:
    """SD-Turbo's scheduler/scheduler_config.json."""
    return EulerDiscreteScheduler(
        **BETAS, prediction_type=prediction_type, timestep_spacing="trailing", steps_offset=1
    )


@dataclass(frozen=True)
class Case:
    """A method, a model and a file for it, and how its authors call diffusers."""

    one_step: str
    width: int
    scheduler: type | None  # None is the model's own
    timesteps: list[int]
    call: dict[str, Any]
    lora: Layout | None = None
    prediction_type: str = "epsilon"
    turbo: bool = False
    settings: dict[str, Any] = field(default_factory=dict)
    within: float = 1e-4  # of latents, relative to the largest
    layout: Any = "onestep"


ONE = {"num_inference_steps": 1, "guidance_scale": 0.0}
CASES = {
    "hyper-sd15": Case("hyper-sd15", 768, TCDScheduler, [999], {**ONE, "eta": 1.0}, old_diffusers),
    "hyper-sd15-t800": Case(
        "hyper-sd15-t800", 768, TCDScheduler, [800], {**ONE, "eta": 1.0, "timesteps": [800]}, peft
    ),
    "lcm-sd15": Case("lcm-sd15", 768, LCMScheduler, [999], ONE, kohya),
    "tcd, v": Case(
        "tcd-sd21-base", 1024, TCDScheduler, [999], {**ONE, "eta": 0.3}, peft, "v_prediction"
    ),
    "sd-turbo": Case("sd-turbo", 1024, None, [999], ONE, turbo=True),
    "sd-turbo, generic": Case("sd-turbo", 1024, None, [999], ONE, turbo=True, layout="generic"),
    "euler from a file, v": Case(
        "euler.toml", 768, EulerDiscreteScheduler, [999], ONE, kohya, "v_prediction",
        settings={"timestep_spacing": "trailing", "rescale_betas_zero_snr": True},
        within=1e-3,  # diffusers subtracts samples of 4,096 times the noise, in float32
    ),
    "lcm from a file, v, generic": Case(
        "lcm.toml", 768, LCMScheduler, [601], {**ONE, "timesteps": [601]}, peft, "v_prediction",
        settings={"timestep_scaling": 0.001}, layout="generic",
    ),
}  # fmt: skip
# The constants of every method are those of diffusers: test_step_constants.py, without an export.
QUICK = ["lcm-sd15"]
THOROUGH = [pytest.param(name, marks=pytest.mark.thorough) for name in CASES if name not in QUICK]
TOML = {
    "euler.toml": """
        source = "this test"
        scheduler = "EulerDiscreteScheduler"
        timestep = 999
        [settings]
        timestep_spacing = "trailing"
        rescale_betas_zero_snr = true
    """,
    # At this scaling of the timestep, LCM's c_skip is 0.41 and c_out 0.77 of what they could be.
    "lcm.toml": """
        source = "this test"
        scheduler = "LCMScheduler"
        timestep = 601
        [settings]
        timestep_scaling = 0.001
    """,
}


def make_case(case: Case, folder: Path) -> ExportOptions:
    """Write the model, the LoRA file and the method of ``case``."""
    own = turbo_scheduler if case.turbo else published_scheduler
    model = small_model(folder / "model", case.width, own(case.prediction_type))
    one_step = case.one_step
    if one_step in TOML:
        (folder / one_step).write_text(TOML[one_step])
        one_step = str(folder / one_step)
    return ExportOptions(
        model=str(model),
        out=folder / "bundle",
        adaptor=write_lora(model, folder / "lora.safetensors", case.lora) if case.lora else None,
        one_step=one_step,
        dtype="fp32",
        layout=case.layout,
    )


def diffusers_pipeline(case: Case, options: ExportOptions) -> StableDiffusionPipeline:
    pipe = StableDiffusionPipeline.from_pretrained(options.model, safety_checker=None)
    if case.scheduler is not None:
        pipe.scheduler = case.scheduler.from_config(pipe.scheduler.config, **case.settings)
    if options.adaptor is not None:
        pipe.load_lora_weights(options.adaptor)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def call(pipe: Any, case: Case, seed: int, output_type: str) -> np.ndarray:
    """One image, or one latent, from the noise of ``seed``."""
    latents = torch.from_numpy(initial_noise([seed], (4, 8, 8)))
    with torch.no_grad():
        made = pipe(PROMPT, latents=latents, output_type=output_type, **case.call).images
    assert [round(float(t)) for t in pipe.scheduler.timesteps] == case.timesteps
    return np.asarray(made[0])


def psnr(got: np.ndarray, expected: np.ndarray) -> float:
    """dB of two images in [0, 1]."""
    error = np.mean((got.astype(np.float64) - expected) ** 2)
    return float(-10 * np.log10(max(error, 1e-20)))


@pytest.fixture(scope="module")
def lcm_bundle(tmp_path_factory: pytest.TempPathFactory) -> tuple[ExportOptions, Bundle]:
    """The case that two tests look at, exported once. Nobody changes it."""
    options = make_case(CASES["lcm-sd15"], tmp_path_factory.mktemp("lcm"))
    return options, export_bundle(options)


@pytest.mark.slow
@pytest.mark.parametrize("name", [*QUICK, *THOROUGH])
def test_a_bundle_gives_the_image_of_diffusers(
    name: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    case = CASES[name]
    if name == "lcm-sd15":
        options, bundle = request.getfixturevalue("lcm_bundle")
    else:
        options = make_case(case, tmp_path)
        bundle = export_bundle(options)
    step = bundle.manifest.one_step
    assert step.timestep == case.timesteps[0]
    assert step.method is not None

    expected_pipe = diffusers_pipeline(case, options)
    worst = np.inf
    with OneStepPipeline.load(bundle.root, "onnxruntime") as pipe:
        for seed in SEEDS:
            image_HWC = pipe(PROMPT, seed=seed).images_BHWC[0] / 255
            assert image_HWC.std() > 0.02  # not all black or white, where nothing would differ
            worst = min(worst, psnr(image_HWC, call(expected_pipe, case, seed, "np")))

            # Latents too: an image hides what lies beyond black and white.
            tensors = pipe.tensors(PROMPT, seed=seed)
            latents_CHW = tensors["latents"][0]
            if case.layout == "generic":
                latents_CHW = latents_CHW * step.scaling_factor
            expected_CHW = call(expected_pipe, case, seed, "latent")
            largest = np.abs(expected_CHW).max()
            np.testing.assert_allclose(
                latents_CHW, expected_CHW, rtol=0, atol=case.within * largest
            )
    print(f"{name}: {worst:.1f} dB")
    assert worst >= LEAST_DB
    assert check_bundle(bundle, "onnxruntime").problems == ()
    if case.layout == "generic" and find_spec("optimum"):
        check_optimum(bundle.root, case, image_HWC)


def check_optimum(root: Path, case: Case, image_HWC: np.ndarray) -> None:
    """optimum takes the same step with the scheduler that lies in the bundle."""
    from optimum.onnxruntime import ORTStableDiffusionPipeline

    pipe = ORTStableDiffusionPipeline.from_pretrained(root, local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    assert psnr(image_HWC, call(pipe, case, SEEDS[-1], "np")) >= LEAST_DB


@pytest.mark.thorough
@pytest.mark.slow
def test_a_lora_of_the_same_method_is_swapped_in(
    lcm_bundle: tuple[ExportOptions, Bundle], tmp_path: Path
) -> None:
    case = CASES["lcm-sd15"]
    options, untouched = lcm_bundle
    bundle = Bundle.open(Path(shutil.copytree(untouched.root, tmp_path / "bundle")))
    other = write_lora(Path(options.model), tmp_path / "other.safetensors", peft)
    swap = SwapOptions(
        model=options.model,
        adaptor=other,
        bundle=bundle.root,
        out=bundle.root / "adaptors/other",
        one_step="lcm-sd15",
    )
    for wrong in (None, "hyper-sd15-t800", "hipa", "hyper-sd15"):
        with pytest.raises(HipaError, match=r"xport a bundle of its own"):
            export_swap(replace(swap, one_step=wrong))
    export_swap(swap)
    with OneStepPipeline.load(bundle.root, "onnxruntime") as pipe:
        pipe.swap_adaptor("other")
        image_HWC = pipe(PROMPT, seed=4).images_BHWC[0] / 255
    expected_pipe = diffusers_pipeline(case, replace(options, adaptor=other))
    assert psnr(image_HWC, call(expected_pipe, case, 4, "np")) >= LEAST_DB


@pytest.mark.slow
def test_hipas_step_is_another(tmp_path: Path) -> None:
    """What the comparison above would see if a method were ignored."""
    case = CASES["lcm from a file, v, generic"]
    options = make_case(case, tmp_path)
    pipe = diffusers_pipeline(case, options)
    expected = call(pipe, case, 0, "latent")
    pipe.scheduler = DDIMScheduler.from_config(
        pipe.scheduler.config, timestep_spacing="trailing", set_alpha_to_one=True
    )
    with torch.no_grad():
        noise = torch.from_numpy(initial_noise([0], (4, 8, 8)))
        plain = pipe(PROMPT, latents=noise, output_type="latent", **ONE).images[0]
    assert np.abs(plain.numpy() - expected).max() > 0.1 * np.abs(expected).max()

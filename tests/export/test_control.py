"""Bundles with a ControlNet, against diffusers' own ControlNet pipelines."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    ControlNetModel,
    DDIMScheduler,
    StableDiffusionControlNetPipeline,
    StableDiffusionXLControlNetPipeline,
    UNet2DConditionModel,
)
from PIL import Image
from safetensors.torch import save_file

from hipa_deploy import OneStepPipeline
from hipa_deploy.bundle.adaptor_swap import read_weight_map
from hipa_deploy.bundle.folder import Bundle
from hipa_deploy.commands.app import main
from hipa_deploy.doctor.self_check import check_bundle
from hipa_deploy.errors import HipaError
from hipa_deploy.export.export_bundle import export_bundle
from hipa_deploy.export.export_options import ExportOptions
from hipa_deploy.export.export_request import SwapOptions
from hipa_deploy.export.export_swap import export_swap
from hipa_deploy.export.graph.axes import parse_axes
from hipa_deploy.generate.noise import initial_noise
from hipa_deploy.images.example_source import example_image
from hipa_deploy.images.png import read_parameters
from hipa_deploy.images.source import control_source
from hipa_deploy.models.locate import resolve_controlnet
from tests.one_step_loras import lora_tensors, peft
from tests.tiny_controlnet import make_controlnet, write_original
from tests.tiny_model import make_model
from tests.tiny_sdxl import make_sdxl

PROMPT = "a green pear"
SCALES = (0.0, 0.8, 1.6)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model") / "sd")


@pytest.fixture(scope="module")
def controlnet(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_controlnet(model, tmp_path_factory.mktemp("control") / "edges")


@pytest.fixture(scope="module")
def bundle(model: Path, controlnet: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    out = tmp_path_factory.mktemp("bundle") / "fp32"
    arguments = ["--model", str(model), "--controlnet", str(controlnet), "--dtype", "fp32"]
    run(["export", *arguments, "--dynamic", "batch=1:2:4", "--out", str(out)])
    return Bundle.open(out)


def run(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code in (0, None)


def reference(kind: Any, model: Path, controlnet: Path) -> Any:
    """diffusers' pipeline, whose one step ends at x0, as a bundle's does."""
    network = ControlNetModel.from_pretrained(controlnet)
    pipe = kind.from_pretrained(model, controlnet=network)
    pipe.scheduler = DDIMScheduler.from_config(
        pipe.scheduler.config,
        timestep_spacing="trailing",
        set_alpha_to_one=True,
        clip_sample=False,
        steps_offset=0,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def diffusers_image(
    pipe: Any, control_HWC: np.ndarray, scale: float, shape: tuple[int, int, int]
) -> np.ndarray:
    """The image of one step, of the same noise as a bundle's."""
    image = pipe(
        PROMPT,
        image=Image.fromarray(control_HWC),
        height=control_HWC.shape[0],
        width=control_HWC.shape[1],
        num_inference_steps=1,
        guidance_scale=1.0,
        latents=torch.from_numpy(initial_noise([3], shape)),
        controlnet_conditioning_scale=scale,
        output_type="np",
    ).images[0]
    return np.round(image * 255).astype(int)


@pytest.mark.parametrize("scale", SCALES)
def test_one_step_is_that_of_diffusers(
    model: Path, controlnet: Path, bundle: Bundle, scale: float
) -> None:
    control_HWC = example_image(32, 32, number=3)
    expected_HWC = diffusers_image(
        reference(StableDiffusionControlNetPipeline, model, controlnet),
        control_HWC,
        scale,
        (4, 8, 8),
    )
    with OneStepPipeline.load(bundle.root) as pipe:
        got_HWC = pipe.control(control_HWC, PROMPT, scale=scale, seed=3).images_BHWC[0]
        without_HWC = pipe.control(control_HWC, PROMPT, scale=0, seed=3).images_BHWC[0]
    assert np.abs(got_HWC.astype(int) - expected_HWC).max() <= 1
    # The control image is no decoration: it changes the image by far more than rounding.
    changed = np.abs(got_HWC.astype(int) - without_HWC).mean()
    assert changed > 2 if scale else changed == 0


@pytest.mark.parametrize(
    ("dynamic", "small"),
    [
        ("", False),
        pytest.param("", True, marks=pytest.mark.thorough),
        pytest.param("height=64:64:128", False, marks=pytest.mark.thorough),
    ],
)
def test_one_step_of_sdxl_is_that_of_diffusers(tmp_path: Path, dynamic: str, small: bool) -> None:
    model = make_sdxl(tmp_path / "sdxl")
    controlnet = make_controlnet(model, tmp_path / "edges", small=small)
    options = ExportOptions(
        model=str(model),
        controlnet=controlnet,
        out=tmp_path / "bundle",
        dtype="fp32",
        dynamic=parse_axes(dynamic) if dynamic else {},
    )
    bundle = export_bundle(options)
    height = 128 if dynamic else 64
    control_HWC = example_image(height, 64, number=3)
    expected_HWC = diffusers_image(
        reference(StableDiffusionXLControlNetPipeline, model, controlnet),
        control_HWC,
        0.8,
        (4, height // 4, 16),
    )
    with OneStepPipeline.load(bundle.root) as pipe:
        result = pipe.control(control_HWC, PROMPT, scale=0.8, seed=3, height=height)
    assert np.abs(result.images_BHWC[0].astype(int) - expected_HWC).max() <= 1


def test_half_precision_is_near_and_checks_itself(
    model: Path, controlnet: Path, bundle: Bundle, tmp_path: Path
) -> None:
    half = export_bundle(
        ExportOptions(model=str(model), controlnet=controlnet, out=tmp_path / "b", dtype="fp16")
    )
    control_HWC = example_image(32, 32, number=3)
    with OneStepPipeline.load(half.root) as pipe, OneStepPipeline.load(bundle.root) as exact:
        assert not check_bundle(half).problems
        got = pipe.control(control_HWC, PROMPT, seed=3).images_BHWC
        expected = exact.control(control_HWC, PROMPT, seed=3).images_BHWC
    assert np.abs(got.astype(int) - expected).mean() < 1


def test_an_image_does_not_depend_on_its_company(bundle: Bundle) -> None:
    with OneStepPipeline.load(bundle.root) as pipe:
        jobs = []
        alone = []
        for number, scale in enumerate(SCALES):
            source = control_source(
                bundle, example_image(32, 32, number), scale=scale, height=None, width=None
            )
            job = pipe.jobs([(PROMPT, number)], source=source)
            alone.append(pipe.make(job)[0].finished())
            jobs += job
        together = [made.finished() for made in pipe.make(jobs)]
    for one, among in zip(alone, together, strict=True):
        assert np.abs(one.astype(int) - among).max() <= 1
    assert np.abs(together[1].astype(int) - together[2]).mean() > 2


def make_lora(model: Path, path: Path) -> Path:
    torch.manual_seed(1)
    unet = UNet2DConditionModel.from_pretrained(model, subfolder="unet")
    save_file(lora_tensors(unet, peft), path)
    return path


@pytest.mark.thorough
def test_an_adaptor_is_swapped_beside_a_controlnet(
    model: Path, controlnet: Path, bundle: Bundle, tmp_path: Path
) -> None:
    lora = make_lora(model, tmp_path / "lora.safetensors")
    own = ExportOptions(
        model=str(model),
        adaptor=lora,
        controlnet=controlnet,
        out=tmp_path / "own",
        dtype="fp32",
        dynamic=parse_axes("batch=1:2:4"),
    )
    export_bundle(own)
    swap = SwapOptions(
        model=str(model),
        adaptor=lora,
        controlnet=controlnet,
        bundle=bundle.root,
        out=tmp_path / "swap",
    )
    export_swap(swap)
    control_HWC = example_image(32, 32, number=3)
    with OneStepPipeline.load(bundle.root) as pipe, OneStepPipeline.load(own.out) as whole:
        before = pipe.control(control_HWC, PROMPT, seed=3).images_BHWC
        pipe.swap_adaptor(str(tmp_path / "swap"))
        swapped = pipe.control(control_HWC, PROMPT, seed=3).images_BHWC
        expected = whole.control(control_HWC, PROMPT, seed=3).images_BHWC
    np.testing.assert_array_equal(swapped, expected)
    assert np.abs(swapped.astype(int) - before).mean() > 0.1

    other = make_controlnet(model, tmp_path / "depth", seed=1)
    for wrong in (other, None):
        with pytest.raises(HipaError, match=r"ControlNet edges.*--controlnet"):
            export_swap(replace(swap, controlnet=wrong, out=tmp_path / "no"))


def test_no_adaptor_changes_the_controlnet(bundle: Bundle) -> None:
    weights = read_weight_map(bundle, "unet")
    assert weights is not None
    of_control = 0
    for weight in weights.weights.values():
        if all(place.startswith("controlnet.") for place in weight.places):
            assert not weight.adaptable
            of_control += 1
    assert of_control > 20


@pytest.mark.parametrize("name", ["edges.safetensors", "edges.pth"])
@pytest.mark.parametrize("prefix", ["control_model.", ""])
def test_a_file_in_the_original_layout_is_the_folder(
    model: Path, tmp_path: Path, name: str, prefix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = make_published(model, tmp_path / "edges")
    file = write_original(folder, tmp_path / name, prefix)
    converted = ControlNetModel.from_pretrained(resolve_controlnet(str(file), str(model)))
    expected = ControlNetModel.from_pretrained(folder).state_dict()
    got = converted.state_dict()
    assert got.keys() == expected.keys()
    for weight, value in expected.items():
        torch.testing.assert_close(got[weight], value, rtol=0, atol=0)


def make_published(model: Path, folder: Path) -> Path:
    """A ControlNet whose reader of control images is as wide as the published ones'."""
    unet = UNet2DConditionModel.from_pretrained(model, subfolder="unet")
    torch.manual_seed(0)
    ControlNetModel.from_unet(unet).save_pretrained(folder)
    return folder


def test_the_command(bundle: Bundle, tmp_path: Path) -> None:
    image = tmp_path / "edges.png"
    Image.fromarray(example_image(48, 40)).save(image)
    made = tmp_path / "image.png"
    words = ["control", str(bundle.root), str(image), PROMPT, "--scale", "0.5", "--seed", "3"]
    run([*words, "--out", str(made)])
    parameters = read_parameters(made)
    assert (parameters["task"], parameters["scale"]) == ("control", 0.5)
    with OneStepPipeline.load(bundle.root) as pipe:
        expected_HWC = pipe.control(image, PROMPT, scale=0.5, seed=3).images_BHWC[0]
    np.testing.assert_array_equal(np.asarray(Image.open(made)), expected_HWC)


@pytest.mark.parametrize("scale", [-0.1, 2.1, float("nan"), True, "1"])
def test_a_scale_out_of_range_is_refused(bundle: Bundle, scale: Any) -> None:
    with pytest.raises(HipaError, match=r"scale .* Expected 0 to 2\."):
        control_source(bundle, example_image(32, 32), scale=scale, height=None, width=None)


def test_a_prompt_alone_is_refused(bundle: Bundle) -> None:
    with (
        OneStepPipeline.load(bundle.root) as pipe,
        pytest.raises(HipaError, match="a bundle to control, not to generate"),
    ):
        pipe(PROMPT)

"""The pipeline on the embedded bundle: the real model, through ONNX Runtime."""

import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from enum import Enum
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hipa_deploy import OneStepPipeline
from hipa_deploy.embedded import BUNDLE
from hipa_deploy.errors import HipaError
from hipa_deploy.images.png import read_parameters, save_image, save_png
from hipa_deploy.marks.a1111 import infotext
from tests.stages_as_one import StagesAsOne

APPLE = "3d emoji of a red apple"


@pytest.fixture(scope="module")
def pipe() -> Iterator[OneStepPipeline]:
    with OneStepPipeline.load("emoji", backend="onnxruntime") as pipe:
        yield pipe


def test_an_image(pipe: OneStepPipeline) -> None:
    result = pipe(APPLE)
    assert result.images_BHWC.shape == (1, 128, 128, 3)
    assert result.images_BHWC.dtype == np.uint8
    assert result.images[0].size == (128, 128)
    corners = result.images_BHWC[0, ::63, ::63].astype(float)
    assert corners.mean() > 230  # emoji stand on white
    # Below the leaf.
    red, green, blue = result.images_BHWC[0, 60:100, 40:90].reshape(-1, 3).mean(axis=0)
    assert red > green
    assert red > blue


def test_same_seed_same_image_in_a_new_pipeline(pipe: OneStepPipeline) -> None:
    with OneStepPipeline.load(BUNDLE, backend="onnxruntime") as again:
        np.testing.assert_array_equal(
            again(APPLE, seed=0).images_BHWC, pipe(APPLE, seed=0).images_BHWC
        )


def test_seeds_count_from_zero_and_differ(pipe: OneStepPipeline) -> None:
    result = pipe(APPLE, seed=0, count=2)
    assert result.seeds == (0, 1)
    np.testing.assert_array_equal(result.images_BHWC[1], pipe(APPLE, seed=1).images_BHWC[0])
    assert not np.array_equal(*result.images_BHWC)


def test_numbers_of_numpy_count_as_pythons_do(pipe: OneStepPipeline) -> None:
    seeds = pipe(APPLE, seed=np.uint8(254), count=np.int64(3)).seeds
    assert seeds == (254, 255, 256)


def test_truth_values_of_numpy_count_as_pythons_do(pipe: OneStepPipeline, tmp_path: Path) -> None:
    result = pipe(APPLE, truncate=np.bool_(True), prompt_weights=np.bool_(False))
    save_image(tmp_path / "a.webp", result.images_BHWC[0], result.parameters[0])
    assert read_parameters(tmp_path / "a.webp")["truncate"] is True
    for option in ("truncate", "prompt_weights"):
        with pytest.raises(HipaError, match=f"{option} is 'no'. Expected True or False"):
            pipe(APPLE, **{option: "no"})  # type: ignore[arg-type]


class Thing(str, Enum):
    APPLE = APPLE


def test_a_prompt_is_pythons_own_text(pipe: OneStepPipeline) -> None:
    expected = pipe(APPLE)
    for prompt in (Thing.APPLE, np.str_(APPLE)):
        result = pipe(prompt)
        assert repr(result) == repr(expected)
        assert infotext(result.parameters[0]) == infotext(expected.parameters[0])


def test_the_seeds_of_tensors_do_not_begin_again(pipe: OneStepPipeline) -> None:
    path = pipe.tensors(APPLE, seed=np.uint8(255), count=np.int64(1))
    np.testing.assert_array_equal(path["noise"], pipe.tensors(APPLE, seed=255)["noise"])
    for count in (0, 2, 1.0):
        with pytest.raises(HipaError, match="count is"):
            pipe.tensors(APPLE, count=count)  # type: ignore[arg-type]


def test_what_python_alone_can_get_wrong_is_one_line(pipe: OneStepPipeline) -> None:
    wrong: dict[str, Callable[[], object]] = {
        "a prompt is array": lambda: pipe(np.array(APPLE)),  # type: ignore[arg-type]
        "the requests are None": lambda: pipe.generate(None),  # type: ignore[arg-type]
        "largest is '2'": lambda: pipe.warmup("2"),  # type: ignore[arg-type]
        "the adaptor is 3": lambda: pipe.swap_adaptor(3),  # type: ignore[arg-type]
        "the bundle is None": lambda: OneStepPipeline.load(None),  # type: ignore[arg-type]
        "checker is 'nsfw'": lambda: OneStepPipeline.load(
            "emoji",
            checker="nsfw",  # type: ignore[arg-type]
        ),
        "watermark is 'on'": lambda: OneStepPipeline.load(
            "emoji",
            watermark="on",  # type: ignore[arg-type]
        ),
    }
    for message, call in wrong.items():
        with pytest.raises(HipaError, match=message):
            call()
    assert pipe.make(job for job in pipe.jobs([(APPLE, 1)]))[0].job.seed == 1  # type: ignore[arg-type]


def test_no_watermark_is_no_watermark() -> None:
    with OneStepPipeline.load("emoji", "onnxruntime", watermark=np.bool_(False)) as pipe:
        assert "watermark" not in pipe(APPLE).parameters[0]


@settings(
    max_examples=5, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(seed=st.integers(0, 2**63 - 4), count=st.integers(1, 3))
def test_an_image_does_not_depend_on_its_company(
    pipe: OneStepPipeline, seed: int, count: int
) -> None:
    together = pipe(["flat emoji of a cat", APPLE], seed=seed, count=count)
    alone = pipe(APPLE, seed=seed + count - 1)
    np.testing.assert_array_equal(together.images_BHWC[-1], alone.images_BHWC[0])


def test_prompt_steers(pipe: OneStepPipeline) -> None:
    images = pipe([APPLE, "3d emoji of a green apple"]).images_BHWC.astype(float)
    assert np.abs(images[0] - images[1]).mean() > 3


def test_command_and_python_give_the_same_bytes(pipe: OneStepPipeline, tmp_path: Path) -> None:
    script = Path(sys.executable).with_name("hipa-generate")
    for name in ("a.png", "b.png"):
        command = [script, "emoji", APPLE, "--seed", "3", "--backend", "onnxruntime", "--out", name]
        subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    result = pipe(APPLE, seed=3)
    save_png(tmp_path / "c.png", result.images_BHWC[0], result.parameters[0])
    assert len({(tmp_path / name).read_bytes() for name in ("a.png", "b.png", "c.png")}) == 1


def test_the_recipe_reproduces_the_image(pipe: OneStepPipeline, tmp_path: Path) -> None:
    result = pipe(APPLE, seed=11)
    save_png(tmp_path / "x.png", result.images_BHWC[0], result.parameters[0])
    recipe = read_parameters(tmp_path / "x.png")
    again = pipe(recipe["prompt"], seed=recipe["seed"])
    np.testing.assert_array_equal(again.images_BHWC, result.images_BHWC)


def test_stages_are_timed(pipe: OneStepPipeline) -> None:
    seen: list[str] = []
    for _ in range(2):
        pipe("noto emoji of a pear", timer=lambda stage: nullcontext(seen.append(stage)))
    assert seen == [
        "text_encoder",
        "unet",
        "vae_decoder",
        "unet",
        "vae_decoder",
    ]  # the text is cached


def test_stages_that_run_as_one_get_noise_and_text_and_give_images(pipe: OneStepPipeline) -> None:
    stages = StagesAsOne(pipe.runners)
    chained = OneStepPipeline(pipe.bundle, "tensorrt", stages)
    seen: list[str] = []
    for _ in range(2):
        made = chained(APPLE, seed=3, timer=lambda stage: nullcontext(seen.append(stage)))
        np.testing.assert_array_equal(made.images_BHWC, pipe(APPLE, seed=3).images_BHWC)
    assert seen == ["pipeline", "pipeline"]
    assert stages.log == [
        (["noise", "tokens"], ("images", "latents", "context")),
        (["context", "noise"], ("images", "latents")),
    ]
    np.testing.assert_array_equal(chained.generate_on_device(APPLE, seed=3), made.images_BHWC)
    with pytest.raises(HipaError, match="count is 2, a batch of this bundle holds 1 to 1"):
        chained.generate_on_device(APPLE, count=2)
    with pytest.raises(HipaError, match=r"a prompt is None\. Expected text"):
        chained.generate_on_device(None)


def test_host_backends_have_no_device_arrays(pipe: OneStepPipeline) -> None:
    with pytest.raises(HipaError, match="backend onnxruntime gives host arrays"):
        pipe.generate_on_device(APPLE)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompt": []}, "0 prompts"),
        ({"prompt": APPLE, "count": 0}, "count 0"),
        ({"prompt": APPLE, "count": 10**9}, "count"),
        ({"prompt": APPLE, "seed": -1}, "seed"),
        ({"prompt": "apple " * 100}, "77"),
        ({"prompt": APPLE, "height": 0}, "height 0 is not a size of this bundle. Expected 128"),
        ({"prompt": APPLE, "height": 128.0}, "height is 128.0. Expected a whole number"),
        ({"prompt": APPLE, "width": "128"}, "width is '128'. Expected a whole number"),
        ({"prompt": APPLE, "count": 2.0}, "count is 2.0. Expected a whole number"),
        ({"prompt": None}, "a prompt is None. Expected text, or a list"),
    ],
)
def test_bad_requests(pipe: OneStepPipeline, arguments: dict, message: str) -> None:
    with pytest.raises(HipaError, match=message):
        pipe(**arguments)


def test_truncation_on_request(pipe: OneStepPipeline) -> None:
    assert pipe("apple " * 100, truncate=True).images_BHWC.shape == (1, 128, 128, 3)


def test_unknown_backend() -> None:
    with pytest.raises(HipaError, match="vulkan"):
        OneStepPipeline.load("emoji", backend="vulkan")


@pytest.mark.parametrize("backend", ["onnxruntime-cuda", "tensorrt"])
def test_absent_backend_names_the_pip_command(backend: str) -> None:
    with pytest.raises(HipaError, match="pip install"):
        OneStepPipeline.load("emoji", backend=backend)


def test_corrupt_bundle(tmp_path: Path) -> None:
    root = Path(shutil.copytree(BUNDLE, tmp_path / "bundle"))
    with (root / "unet/model.onnx").open("r+b") as file:
        file.write(b"\0")
    with pytest.raises(HipaError, match="corrupt"):
        OneStepPipeline.load(root)


def test_the_name_of_generation_parameters_in_version_0_1_0(pipe: OneStepPipeline) -> None:
    result = pipe(APPLE, seed=5)
    assert result.recipes is result.parameters
    assert result.recipes[0]["seed"] == 5


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_no_library_reports_its_use(tmp_path: Path, backend: str) -> None:
    """The libraries keep a number of the user's in the home folder, for their reports."""
    if importlib.util.find_spec(backend) is None:
        pytest.skip(f"{backend} is not installed")
    unset = ("ORT_DISABLE_TELEMETRY", "CI", "TF_BUILD", "JENKINS_URL", "XDG_CACHE_HOME")
    environment = {name: value for name, value in os.environ.items() if name not in unset}
    code = f"from hipa_deploy import OneStepPipeline as P; P.load('emoji', '{backend}')('a cat')"
    command = [sys.executable, "-c", code]
    subprocess.run(command, env={**environment, "HOME": str(tmp_path)}, check=True)
    left = {path.relative_to(tmp_path).parts[:2] for path in tmp_path.rglob("*") if path.is_file()}
    assert left <= {(".cache", "hipa-deploy")}

"""Refining on TensorRT's runner: a fake GPU whose engines compute with ONNX Runtime."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from hipa_deploy import OneStepPipeline
from hipa_deploy.bundle.folder import Bundle
from hipa_deploy.doctor import self_check
from hipa_deploy.doctor.self_check import check_bundle
from hipa_deploy.errors import HipaError
from hipa_deploy.generate.refine.refiner import refine_settings
from tests.engines.bundle_gpu import BundleGpu
from tests.refine_samples import refine_bundle
from tests.sdxl_samples import sdxl_bundle

PROMPT = "a red apple!!"


@pytest.fixture(scope="module", params=["sd15", "sdxl"])
def bundle(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    unpack = refine_bundle if request.param == "sd15" else sdxl_bundle
    return unpack(tmp_path_factory.mktemp("refine"))


@pytest.fixture
def gpu(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> Iterator[BundleGpu]:
    fake = BundleGpu(bundle)
    fake.install(monkeypatch)
    yield fake
    assert fake.cudart.leaks == []


def test_the_same_final_image_as_on_the_cpu(bundle: Bundle, gpu: BundleGpu) -> None:
    with OneStepPipeline.load(bundle.root, "onnxruntime") as pipe:
        draft = pipe(PROMPT, seed=3)
        expected = pipe.refine(draft, 3).images_BHWC
    with OneStepPipeline.load(bundle.root, "tensorrt") as pipe:
        draft = pipe(PROMPT, seed=3)
        assert "teacher" not in gpu.loads, "it is loaded when it is needed"
        images = pipe.refine(draft, 3).images_BHWC
        again = pipe.refine(draft, 3).images_BHWC
        np.testing.assert_array_equal(pipe(PROMPT, seed=3).images_BHWC, draft.images_BHWC)
    assert gpu.loads.count("teacher") == 1
    np.testing.assert_array_equal(images, expected)
    np.testing.assert_array_equal(again, expected)


def test_low_memory_loads_its_engine_alone(bundle: Bundle, gpu: BundleGpu) -> None:
    with OneStepPipeline.load(bundle.root, "onnxruntime") as pipe:
        expected = pipe.refine(pipe(PROMPT, seed=3), 3).images_BHWC
    with OneStepPipeline.load(bundle.root, "tensorrt", low_memory=True) as pipe:
        draft = pipe(PROMPT, seed=3)
        gpu.loads.clear()
        gpu.at_load.clear()
        images = pipe.refine(draft, 3).images_BHWC
    assert gpu.loads[0] == "teacher"
    assert gpu.at_load[0] == 1, "nothing is loaded beside it"
    assert gpu.at_load[1] == 1, "it was closed before the decoder was loaded"
    np.testing.assert_array_equal(images, expected)


def test_the_doctor_runs_it_too(bundle: Bundle, gpu: BundleGpu) -> None:
    has_reference = "reference/teacher.npz" in bundle.manifest.files
    checked = check_bundle(bundle, "tensorrt")
    assert checked.problems == ()
    # The bundle of tiny_refine.zip is from before there was such a file.
    assert ("teacher" in checked.stages) is has_reference
    assert gpu.loads[-1] == "teacher" or not has_reference


def test_a_wrong_engine_is_told(
    bundle: Bundle, gpu: BundleGpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    if "reference/teacher.npz" not in bundle.manifest.files:
        pytest.skip("the bundle has nothing to compare with")
    right = self_check.teacher_tensors(bundle)
    wrong = {**right, "out_sample": right["out_sample"][..., ::-1]}
    monkeypatch.setattr(self_check, "teacher_tensors", lambda _: wrong)
    (problem,) = check_bundle(bundle, "tensorrt").problems
    assert problem.startswith("teacher on tensorrt is ")


def test_engines_that_were_built_without_it(bundle: Bundle, gpu: BundleGpu) -> None:
    for path in Path(bundle.root, "engines").glob("*/teacher-*"):
        path.unlink()
    with OneStepPipeline.load(bundle.root, "tensorrt") as pipe:
        draft = pipe(PROMPT, seed=3)
        words = r"no tensorrt engine of the base model, which refines. Run: hipa-build .*tensorrt"
        with pytest.raises(HipaError, match=words):
            pipe.refine(draft, 3)
        with pytest.raises(HipaError, match=words):
            refine_settings(bundle, backend="tensorrt")

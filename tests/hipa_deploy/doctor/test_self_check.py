"""The self-check on the embedded bundle, with ONNX Runtime, and on copies that were made wrong."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from hipa_deploy import OneStepPipeline, embedded
from hipa_deploy.bundle.folder import MANIFEST, Bundle
from hipa_deploy.bundle.reference import REFERENCE_PROMPTS, REFERENCE_TENSORS, Reference
from hipa_deploy.commands.app import main
from hipa_deploy.disk.hashing import file_sha256
from hipa_deploy.doctor.self_check import check_bundle, check_pipeline
from hipa_deploy.errors import HipaError
from tests.served import tiny_bundles


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    return Path(
        shutil.copytree(
            embedded.BUNDLE, tmp_path / "bundle", ignore=shutil.ignore_patterns("engines")
        )
    )


def sign(root: Path, name: str) -> Bundle:
    """Put the hash of a changed file into the manifest."""
    manifest = json.loads((root / MANIFEST).read_text())
    manifest["files"][name] = file_sha256(root / name)
    (root / MANIFEST).write_text(json.dumps(manifest))
    return Bundle.open(root)


def change_tensors(root: Path, **changes: np.ndarray | None) -> Bundle:
    """Replace tensors of a bundle's reference; None removes one."""
    tensors = {**Reference.read(Bundle.open(root)).tensors, **changes}
    kept = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    np.savez_compressed(root / REFERENCE_TENSORS, **kept)
    return sign(root, REFERENCE_TENSORS)


def test_the_embedded_bundle_passes_stage_by_stage_and_as_a_whole() -> None:
    found = check_bundle(Bundle.open(embedded.BUNDLE), "onnxruntime")
    assert found.problems == ()
    assert found.backend == "onnxruntime"
    assert list(found.stages) == ["text_encoder", "unet", "vae_decoder"]
    for check in (*found.stages.values(), found.end_to_end):
        assert check.parity is not None
        assert check.parity.psnr_db >= check.least_psnr_db == 35


def test_another_image_fails_with_stage_distance_and_gate(copy: Path) -> None:
    images = Reference.read(Bundle.open(copy)).tensors["images"]
    found = check_bundle(change_tensors(copy, images=255 - images), "onnxruntime")
    assert len(found.problems) == 2  # the decoder, and the whole
    assert found.problems[0].startswith("vae_decoder on onnxruntime is ")
    assert "expected at least 35 dB" in found.problems[0]
    assert found.problems[1].startswith("end to end on onnxruntime is ")


class Poisoned:
    """A runner whose outputs are NaN."""

    def __init__(self, runner) -> None:
        self.spec = runner.spec
        self.close = runner.close

    def __call__(self, **inputs):
        return {
            output.name: np.full(output.shape, np.nan, output.dtype) for output in self.spec.outputs
        }


def test_nan_is_a_problem_without_a_distance() -> None:
    with OneStepPipeline.load("emoji", "onnxruntime") as pipe:
        pipe.runners["unet"] = Poisoned(pipe.runners["unet"])
        found = check_pipeline(pipe)
    assert found.problems[0] == "unet on onnxruntime gives NaN or infinity."
    assert found.stages["unet"].parity is None
    assert found.stages["text_encoder"].problem is None


def test_another_shape_is_a_problem_without_a_distance(copy: Path) -> None:
    found = check_bundle(
        change_tensors(copy, context=np.zeros((1, 76, 192), np.float32)), "onnxruntime"
    )
    assert found.problems == (
        "text_encoder on onnxruntime gives shape [1, 77, 192], the reference has [1, 76, 192].",
    )


def test_a_missing_tensor_is_named(copy: Path) -> None:
    with pytest.raises(HipaError, match="no reference tensor 'latents'"):
        check_bundle(change_tensors(copy, latents=None), "onnxruntime")


def test_noise_of_another_seed_is_refused(copy: Path) -> None:
    noise = Reference.read(Bundle.open(copy)).tensors["noise"]
    with pytest.raises(HipaError, match=r"the noise of seeds \[0\] is not the reference's"):
        check_bundle(change_tensors(copy, noise=noise[::-1, ::-1]), "onnxruntime")


@pytest.mark.parametrize("content", ["{}", "no json", '{"prompts": [], "seeds": [0]}'])
def test_a_reference_that_cannot_be_read(copy: Path, content: str) -> None:
    (copy / REFERENCE_PROMPTS).write_text(content)
    with pytest.raises(HipaError, match="reference cannot be read"):
        check_bundle(sign(copy, REFERENCE_PROMPTS), "onnxruntime")


@pytest.mark.parametrize("task", ["tiny-upscale", "tiny"])
def test_a_watermark_that_is_too_large_for_the_bundle_s_own_size(task: str, tmp_path: Path) -> None:
    """Of one that enlarges, a tile is too small, and the images of its users are not."""
    root = tiny_bundles(tmp_path)[task].root
    manifest = json.loads((root / MANIFEST).read_text(encoding="utf-8"))
    manifest["marks"] = {"watermark": True}
    (root / MANIFEST).write_text(json.dumps(manifest), encoding="utf-8")
    assert check_bundle(Bundle.open(root), "onnxruntime").problems == ()


def test_doctor_prints_the_checks(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["doctor", "emoji", "--backend", "onnxruntime", "--json"])
    check = json.loads(capsys.readouterr().out)["bundle"]["self_check"]
    assert stopped.value.code == 0
    assert check["backend"] == "onnxruntime"
    assert check["end to end"].endswith("gate 35 dB: passes")


@pytest.mark.parametrize(
    ("backend", "message"),
    [
        ("onnxruntime", "vae_decoder on onnxruntime is "),
        ("onnxruntime-cuda", "pip install 'onnxruntime-gpu"),
    ],
)
def test_doctor_exits_with_1_on_a_problem(
    copy: Path, backend: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    change_tensors(copy, images=np.zeros((1, 128, 128, 3), np.uint8))
    with pytest.raises(SystemExit) as stopped:
        main(["doctor", str(copy), "--backend", backend, "--json"])
    assert stopped.value.code == 1
    assert message in json.loads(capsys.readouterr().out)["problems"][0]


def test_doctor_refuses_an_unknown_backend(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["doctor", "emoji", "--backend", "vulkan"])
    assert stopped.value.code == 1
    assert "'vulkan' is unknown" in capsys.readouterr().err

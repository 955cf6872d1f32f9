"""The safety checker of a model: prepared, exported and judged as diffusers and transformers do."""

from __future__ import annotations

import json
import shutil
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from onnxruntime import InferenceSession
from PIL import Image
from transformers import CLIPImageProcessor

from hipa_deploy import OneStepPipeline
from hipa_deploy.bundle.folder import Bundle
from hipa_deploy.commands.app import main
from hipa_deploy.doctor.self_check import check_bundle
from hipa_deploy.errors import HipaError
from hipa_deploy.export.builders import safety_source
from hipa_deploy.export.export_bundle import export_bundle
from hipa_deploy.export.export_options import ExportOptions
from hipa_deploy.export.graph.safety_module import (
    SafetyNetwork,
    load_safety_checker,
    reference_cosines,
    safety_settings,
    safety_spec,
)
from hipa_deploy.export.references import References
from hipa_deploy.export.writer import StageWriter
from hipa_deploy.marks.records import Marks, SafetySettings, parse_marks
from hipa_deploy.marks.safety import SafetyChecker, flagged_concepts, prepare_pixels
from tests.safety_model import add_safety_checker, add_true_shapes, pictures
from tests.served import running
from tests.tiny_model import make_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose checker flags nothing that it is likely to make."""
    folder = make_model(tmp_path_factory.mktemp("safety") / "tiny")
    return add_safety_checker(folder, threshold=2.0)


@pytest.fixture(scope="module")
def bundle(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    out = tmp_path_factory.mktemp("bundle") / "checked"
    options = ExportOptions(
        model=str(model),
        out=out,
        dtype="fp32",
        batch=2,
        marks=Marks(c2pa=True),
    )
    return export_bundle(options)


@pytest.fixture(scope="module")
def strict(bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same bundle with thresholds that every image passes."""
    return with_thresholds(bundle, tmp_path_factory.mktemp("strict") / "strict", -2.0)


def with_thresholds(bundle: Bundle, out: Path, threshold: float) -> Path:
    shutil.copytree(bundle.root, out)
    manifest = json.loads((out / "hipa.json").read_text())
    settings = manifest["safety"]["settings"]
    settings["thresholds"] = [threshold] * len(settings["thresholds"])
    manifest["marks"]["c2pa"] = False
    (out / "hipa.json").write_text(json.dumps(manifest))
    return out


def settings_of(folder: Path) -> SafetySettings:
    checker = load_safety_checker(folder / "safety_checker")
    return safety_settings(checker, folder / "safety_checker", folder / "feature_extractor")


@pytest.mark.parametrize("size", [(40, 32), (32, 57), (28, 28), (13, 99), (512, 512)])
def test_images_are_prepared_as_transformers_does(model: Path, size: tuple[int, int]) -> None:
    images_BHWC = pictures(2, *size)
    processor = CLIPImageProcessor.from_pretrained(model / "feature_extractor")
    pillow = [Image.fromarray(image_HWC) for image_HWC in images_BHWC]
    expected = processor(pillow, return_tensors="np").pixel_values
    got = prepare_pixels(images_BHWC, settings_of(model))
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-6)


def test_verdicts_are_those_of_diffusers(tmp_path: Path) -> None:
    folder = add_safety_checker(tmp_path, threshold=0.45)
    theirs = StableDiffusionSafetyChecker.from_pretrained(folder / "safety_checker")
    settings = settings_of(folder)
    images_BHWC = pictures(60)
    pixels = torch.from_numpy(prepare_pixels(images_BHWC, settings))
    _, expected = theirs(clip_input=pixels, images=list(images_BHWC.astype(np.float32)))

    module = SafetyNetwork(load_safety_checker(folder / "safety_checker"))

    def network(pixels: np.ndarray) -> dict[str, np.ndarray]:
        return {"cosines": module(torch.from_numpy(pixels)).detach().numpy()}

    got = SafetyChecker(network, settings)(images_BHWC)
    assert [bool(verdict) for verdict in got] == expected
    assert 5 < sum(expected) < 55  # some of each, or the test says nothing


def test_a_special_concept_lowers_the_other_thresholds() -> None:
    settings = SafetySettings(
        shortest_edge=28, crop=(28, 28), mean=(0, 0, 0), std=(1, 1, 1),
        special_thresholds=(0.2,), thresholds=(0.3, 0.5), sha256="",
    )  # fmt: skip
    assert flagged_concepts(np.asarray([0.1, 0.295, 0.0]), settings) == []
    assert flagged_concepts(np.asarray([0.3, 0.295, 0.0]), settings) == [0]
    # Three digits decide, as in diffusers.
    assert flagged_concepts(np.asarray([0.1, 0.3004, 0.6]), settings) == [1]
    assert flagged_concepts(np.asarray([0.1, 0.3006, 0.0]), settings) == [0]


def test_the_checker_is_a_stage_of_the_bundle(bundle: Bundle) -> None:
    assert list(bundle.stages) == ["text_encoder", "unet", "vae_decoder", "safety_checker"]
    assert [stage.spec.name for stage in bundle.manifest.stages] == list(bundle.path_stages)
    safety = bundle.manifest.safety
    assert safety is not None
    assert safety.stage.parity.psnr_db > 60
    assert safety.stage.cost is not None
    assert check_bundle(bundle, "onnxruntime").stages["safety_checker"].problem is None


def test_what_is_not_flagged_is_shown(bundle: Bundle) -> None:
    with OneStepPipeline.load(bundle.root) as pipe:
        result = pipe("a red apple", count=3)
    assert len(result.images) == 3
    assert result.flagged == ()


def test_a_flagged_image_is_withheld(strict: Path) -> None:
    with OneStepPipeline.load(strict) as pipe:
        result = pipe(["a red apple", "a pear"], seed=5)
    assert result.images == []
    assert [(one.index, one.prompt, one.seed) for one in result.flagged] == [
        (0, "a red apple", 5),
        (1, "a pear", 5),
    ]
    assert "safety checker" in result.flagged[0].reason
    assert "2 withheld" in repr(result)


def test_the_command_writes_no_file_and_says_so(
    strict: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "a.png"
    with pytest.raises(SystemExit) as stopped:
        main(["generate", str(strict), "a red apple", "--seed", "5", "--out", str(out)])
    said = capsys.readouterr()
    assert stopped.value.code == 1
    assert not out.exists()
    assert said.out == ""
    assert "1 of 1 images were withheld" in said.err
    assert "seed 5, was flagged by the bundle's safety checker" in said.err


def test_a_flagged_image_is_withheld_in_low_memory_too(strict: Path, bundle: Bundle) -> None:
    with OneStepPipeline.load(strict, low_memory=True) as pipe:
        assert len(pipe("a red apple", seed=5, count=2).flagged) == 2
    with OneStepPipeline.load(bundle.root) as pipe:
        expected = pipe("a red apple", seed=5, count=2).images_BHWC
    with OneStepPipeline.load(bundle.root, low_memory=True) as pipe:
        np.testing.assert_array_equal(pipe("a red apple", seed=5, count=2).images_BHWC, expected)


def test_a_checker_of_ones_own(bundle: Bundle) -> None:
    seen = []

    def second(images_BHWC: np.ndarray) -> list[bool | str]:
        seen.append(images_BHWC.shape)
        return [False, "too dark"] if len(images_BHWC) == 2 else [False]

    with OneStepPipeline.load(bundle.root, checker=second) as pipe:
        result = pipe("a red apple", count=3)
        with pytest.raises(HipaError, match="checked or watermarked"):
            pipe.generate_on_device("a red apple")
    assert seen == [(2, 32, 32, 3), (1, 32, 32, 3)]
    assert result.seeds == (0, 2)
    assert [(one.index, one.seed, one.reason) for one in result.flagged] == [(1, 1, "too dark")]


@pytest.mark.parametrize(
    ("checker", "message"),
    [
        (lambda images: [], "gave 0 answers for 1 images"),
        (lambda images: 1 / 0, r"failed \(division by zero\), so no image is shown"),
    ],
)
def test_a_checker_that_fails_shows_nothing(
    bundle: Bundle, checker: Callable[[np.ndarray], list[bool]], message: str
) -> None:
    with (
        OneStepPipeline.load(bundle.root, checker=checker) as pipe,
        pytest.raises(HipaError, match=message),
    ):
        pipe("a red apple")


def test_nan_flags_nothing_in_silence() -> None:
    settings = SafetySettings(
        shortest_edge=28, crop=(28, 28), mean=(0, 0, 0), std=(1, 1, 1),
        special_thresholds=(0.2,), thresholds=(0.3,), sha256="",
    )  # fmt: skip

    def network(pixels: np.ndarray) -> dict[str, np.ndarray]:
        return {"cosines": np.full((len(pixels), 2), np.nan)}

    with pytest.raises(HipaError, match="NaN"):
        SafetyChecker(network, settings)(pictures(1))


def test_the_network_in_half_precision(model: Path, tmp_path: Path) -> None:
    settings = settings_of(model)
    checker = load_safety_checker(model / "safety_checker")
    pixels = prepare_pixels(pictures(1), settings)
    cosines_BN = reference_cosines(checker, torch.from_numpy(pixels)).numpy()
    references = References("", (0,), {"pixels": pixels, "cosines": cosines_BN})
    specs = {"safety_checker": safety_spec(settings)}
    writer = StageWriter(tmp_path, "fp16", specs, references)
    written = writer.write(safety_source(model), references.tensors)
    assert written.stage.precision == "fp16"
    assert np.abs(written.output - cosines_BN).max() < 5e-3


@pytest.mark.slow
@pytest.mark.thorough
def test_the_true_shapes_give_what_the_original_gives(tmp_path: Path) -> None:
    """ViT-L/14 of random weights: 304 million parameters, one image at 224 pixels."""
    original = add_true_shapes(tmp_path / "model")
    assert sum(weight.numel() for weight in original.vision_model.parameters()) > 300_000_000
    settings = settings_of(tmp_path / "model")
    pixels_B3SS = prepare_pixels(pictures(3, 300, 260), settings)
    assert pixels_B3SS.shape == (3, 3, 224, 224)
    expected_BN = reference_cosines(original, torch.from_numpy(pixels_B3SS)).numpy()
    del original

    feed = {"pixels": pixels_B3SS[:1], "cosines": expected_BN[:1]}
    specs = {"safety_checker": safety_spec(settings)}
    writer = StageWriter(tmp_path / "out", "fp32", specs, References("", (0,), feed))
    written = writer.write(safety_source(tmp_path / "model"), feed)
    session = InferenceSession(
        tmp_path / "out" / written.stage.path, providers=["CPUExecutionProvider"]
    )
    for pixels_3SS, expected_N in zip(pixels_B3SS, expected_BN, strict=True):
        (cosines_BN,) = session.run(None, {"pixels": pixels_3SS[None]})
        np.testing.assert_allclose(cosines_BN[0], expected_N, rtol=0, atol=1e-5)
    # Pictures that differ, or the agreement says nothing.
    assert np.abs(expected_BN[0] - expected_BN[1]).max() > 1e-3


def test_what_the_owner_wants_is_in_the_manifest(bundle: Bundle) -> None:
    assert bundle.manifest.marks == Marks(c2pa=True)
    with pytest.raises(SystemExit) as stopped:
        main(["generate", str(bundle.root), "a red apple"])
    assert stopped.value.code == 1


def test_the_owner_can_leave_the_checker_out() -> None:
    assert parse_marks(["no-safety", "no-provenance"]) == (Marks(provenance=False), False)
    assert parse_marks(["watermark=0xC0FFEE"])[0] == Marks(watermark=True, watermark_id="c0ffee")
    for wish in ("watermark=red", "watermark=123456789", "blue"):
        with pytest.raises(HipaError, match=f"--mark {wish}"):
            parse_marks([wish])


def test_a_watermark_on_small_images_is_refused_before_the_export(
    model: Path, tmp_path: Path
) -> None:
    options = ExportOptions(model=str(model), out=tmp_path / "b", marks=Marks(watermark=True))
    with pytest.raises(HipaError, match="32x32 pixels is too small for the watermark"):
        export_bundle(options)


def test_a_processor_that_does_something_else_is_refused(tmp_path: Path) -> None:
    folder = add_safety_checker(tmp_path)
    path = folder / "feature_extractor" / "preprocessor_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "do_center_crop": False}))
    with pytest.raises(HipaError, match=r"do_center_crop.*--mark no-safety"):
        settings_of(folder)
    path.write_text(json.dumps({**config, "crop_size": 224}))
    with pytest.raises(HipaError, match="takes 28x28"):
        settings_of(folder)


def test_an_incomplete_checker_is_refused_at_once(model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "broken"
    shutil.copytree(model, folder)
    (folder / "safety_checker" / "model.safetensors").unlink()
    with pytest.raises(HipaError, match="safety_checker"):
        export_bundle(ExportOptions(model=str(folder), out=tmp_path / "out"))


def test_the_service_sends_no_flagged_image(strict: Path) -> None:
    with running(str(strict), "--backend", "onnxruntime") as server:
        for path, body in (
            ("/v1/images/generations", {"prompt": "a red apple", "n": 2}),
            ("/hipa/generate", {"prompt": "a red apple", "count": 2}),
        ):
            request = urllib.request.Request(
                server.url + path,
                json.dumps(body).encode(),
                {"content-type": "application/json"},
            )
            with pytest.raises(urllib.error.HTTPError) as refused:
                urllib.request.urlopen(request, timeout=60)
            assert refused.value.code == 400
            error = json.loads(refused.value.read())["error"]
            assert error["code"] == "moderation_blocked"
            assert "safety checker" in error["message"]

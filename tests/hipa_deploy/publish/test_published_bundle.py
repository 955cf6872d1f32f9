"""The folder of a published bundle."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from hipa_deploy import OneStepPipeline
from hipa_deploy.bundle.folder import Bundle
from hipa_deploy.bundle.manifest import LoraInfo, StepMethod
from hipa_deploy.embedded import BUNDLE
from hipa_deploy.errors import HipaError
from tests.sdxl_samples import sdxl_bundle

from .conftest import front_matter, written

pytestmark = pytest.mark.filterwarnings("ignore::hipa_deploy.errors.HipaWarning")


def test_the_folder_makes_the_same_image(tmp_path: Path) -> None:
    """The card beside the bundle's files changes nothing, and engines stay at home."""
    bundle = Path(shutil.copytree(BUNDLE, tmp_path / "bundle"))
    (bundle / "engines").mkdir(exist_ok=True)
    (bundle / "engines" / "unet.engine").write_bytes(b"x")
    out = written(bundle, tmp_path / "out")
    assert not (out / "engines").exists()
    Bundle.open(out).verify()
    with (
        OneStepPipeline.load(out, "onnxruntime") as pipe,
        OneStepPipeline.load(BUNDLE, "onnxruntime") as own,
    ):
        image = pipe("3d emoji of a red apple", seed=3).images_BHWC
        assert (image == own("3d emoji of a red apple", seed=3).images_BHWC).all()


def test_the_card_of_a_bundle(report: Path, tmp_path: Path) -> None:
    out = written("emoji-bundle", tmp_path / "out", licence="apache-2.0", reports=(report,))
    assert front_matter(out) == {
        "library_name": "hipa-deploy",
        "license": "apache-2.0",
        "pipeline_tag": "text-to-image",
        "tags": ["onnx", "one-step", "hipa"],
    }
    manifest = Bundle.open(BUNDLE).manifest
    text = (out / "README.md").read_text()
    for expected in (
        "hipa-generate my-bundle",
        f"UNet `{manifest.base_model.sha256}`",
        manifest.files["unet/model.onnx"],
        "| unet | fp16 | 78.5 dB | none |",
        "A safety checker is not in the bundle.",
        "Image size and batch are fixed.",
        "| HiPA | 0.1 |",
    ):
        assert expected in text


def test_a_card_names_what_others_made(tmp_path: Path) -> None:
    """Their licences apply to the bundle too, and their LoRA is none of HiPA."""
    bundle = Path(shutil.copytree(BUNDLE, tmp_path / "bundle"))
    manifest = Bundle.open(bundle).manifest
    assert manifest.adaptor is not None
    method = StepMethod(
        name="hyper-sd15",
        scheduler="TCDScheduler",
        noise_scale=1.0,
        sample_factor=14.6,
        output_factor=-14.6,
    )
    lora = LoraInfo(name="style.safetensors", sha256="1" * 64, scale=0.8, rank=4, parts=("unet",))
    changes = {
        "adaptor": manifest.adaptor.model_copy(update={"name": "Hyper-SD15.safetensors"}),
        "one_step": manifest.one_step.model_copy(update={"method": method}),
        "loras": (lora,),
    }
    (bundle / "hipa.json").write_text(manifest.model_copy(update=changes).to_json())
    text = (written(bundle, tmp_path / "out", licence="apache-2.0") / "README.md").read_text()
    assert "with a one-step LoRA (hyper-sd15) merged, as ONNX models" in text
    assert "a HiPA adaptor" not in text
    expected = "their licences apply as well: Hyper-SD15.safetensors, style.safetensors."
    assert expected in text[text.index("## Licence") :]


def of_a_bundle(report: Path, sha256: str) -> None:
    """Make a report on COCO one that measured a bundle and no adaptor."""
    numbers = json.loads((report / "report.json").read_text())
    row = numbers["rows"].pop("HiPA, one step")
    numbers["rows"]["mine (bundle)"] = {**row, "identity": {"bundle": sha256}}
    (report / "report.json").write_text(json.dumps(numbers))


def test_figures_of_coco_of_the_bundle_itself(coco_report: Path, tmp_path: Path) -> None:
    of_a_bundle(coco_report, Bundle.open(BUNDLE).sha256)
    out = written("emoji-bundle", tmp_path / "out", reports=(coco_report,))
    card = (out / "README.md").read_text()
    quality = card[card.index("## Measured quality") : card.index("## Marks")]
    assert "Of this bundle in the row 'mine (bundle)'." in quality
    assert "before it was merged" not in quality
    assert (out / "quality/coco-2014/report.json").is_file()
    with pytest.raises(HipaError, match="measured something else"):
        written("emoji", tmp_path / "adaptor", reports=(coco_report,))
    of_another = tmp_path / "of-another"
    shutil.copytree(coco_report, of_another)
    numbers = (of_another / "report.json").read_text()
    (of_another / "report.json").write_text(numbers.replace(Bundle.open(BUNDLE).sha256, "0" * 64))
    with pytest.raises(HipaError, match="measured something else"):
        written("emoji-bundle", tmp_path / "other", reports=(of_another,))


def test_figures_of_coco_of_the_merged_adaptor(coco_report: Path, tmp_path: Path) -> None:
    out = written("emoji-bundle", tmp_path / "out", reports=(coco_report,))
    assert "Of the adaptor, in PyTorch, before it was merged." in (out / "README.md").read_text()


def test_the_card_of_a_bundle_that_refines(tmp_path: Path) -> None:
    """Of SDXL: both tokenizers and the base UNet are published."""
    bundle = sdxl_bundle(tmp_path / "made")
    out = written(bundle.root, tmp_path / "out", licence="apache-2.0")
    Bundle.open(out).verify()
    text = (out / "README.md").read_text()
    assert 'hipa-generate my-bundle "a lighthouse" --refine teacher' in text
    assert "| teacher | fp16 |" in text
    assert "One step, always" not in text
    assert (out / "tokenizer_2/tokenizer.json").is_file()


def test_the_licence_of_the_base_model(model_with_licence: Path, tmp_path: Path) -> None:
    out = written("emoji-bundle", tmp_path / "out", model=str(model_with_licence))
    assert front_matter(out)["license"] == "openrail++"


def test_another_base_model_is_refused(model_with_licence: Path, tmp_path: Path) -> None:
    """Its licence would be in the card."""
    path = next((model_with_licence / "unet").glob("*.safetensors"))
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(HipaError, match=r"from another base model than .*my-model") as error:
        written("emoji-bundle", tmp_path / "out", model=str(model_with_licence))
    assert "Give --model as for the export: emoji. Or omit --model" in str(error.value)
    assert "\n" not in str(error.value)
    assert list((tmp_path / "out").iterdir()) == []


def test_a_model_card_without_weights_is_no_base_model(tmp_path: Path) -> None:
    """As for an adaptor: nothing shows that the card is the base model's."""
    (tmp_path / "card").mkdir()
    (tmp_path / "card" / "README.md").write_text("---\nlicense: mit\n---\n")
    with pytest.raises(HipaError, match=r"unet does not exist"):
        written("emoji-bundle", tmp_path / "out", model=str(tmp_path / "card"))


def test_a_damaged_bundle_is_refused(tmp_path: Path) -> None:
    bundle = Path(shutil.copytree(BUNDLE, tmp_path / "bundle"))
    (bundle / "unet" / "weights.json").write_text("{}")
    with pytest.raises(HipaError, match=r"weights.json is corrupt"):
        written(bundle, tmp_path / "out")

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from hipa_deploy.errors import HipaError
from hipa_deploy.models.configurations import write_config
from hipa_deploy.models.kind import UNSUPPORTED
from hipa_deploy.models.model_config import ModelConfig


@pytest.fixture(scope="module")
def sd15(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_config("sd15", tmp_path_factory.mktemp("config") / "sd15")


@pytest.mark.parametrize(
    ("file", "changes", "message"),
    [
        (
            "model_index.json",
            {
                "_class_name": "StableDiffusionXLPipeline",
                "text_encoder_2": ["transformers", "CLIPTextModel"],
            },
            "is StableDiffusionXLPipeline: its text_encoder_2 is CLIPTextModel, expected",
        ),
        ("model_index.json", {"unet": None}, "its unet is None, expected UNet2DConditionModel"),
        ("model_index.json", {"unet": 5}, "its unet is 5, expected UNet2DConditionModel"),
        ("model_index.json", {"vae": ["diffusers"]}, "its vae is None, expected AutoencoderKL"),
        ("model_index.json", {"scheduler": 5}, "has the scheduler 5, which is not of DDPM's"),
        ("vae/config.json", {"latent_channels": "x"}, "has latent_channels='x'"),
        (
            "model_index.json",
            {"text_encoder": ["transformers", "T5EncoderModel"]},
            "its text_encoder is T5EncoderModel",
        ),
        ("unet/config.json", {"in_channels": 9}, "the UNet takes 9 channels, expected 4"),
        ("unet/config.json", {"out_channels": 8}, "the UNet gives 8 channels, expected 4"),
        *(("unet/config.json", {key: 8}, f"the UNet has {key}=8") for key in UNSUPPORTED),
        (
            "scheduler/scheduler_config.json",
            {"prediction_type": "flow"},
            "predicts 'flow'. Expected one of: epsilon",
        ),
    ],
)
def test_wrong_kinds_are_refused_with_the_reason(
    sd15: Path, tmp_path: Path, file: str, changes: dict, message: str
) -> None:
    folder = Path(shutil.copytree(sd15, tmp_path / "copy"))
    ModelConfig.read(folder, "generate")
    (folder / file).write_text(json.dumps(json.loads((folder / file).read_text()) | changes))
    with pytest.raises(HipaError, match=message):
        ModelConfig.read(folder, "generate")


def test_a_unet_for_inpainting_is_for_that_task_alone(sd15: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(sd15, tmp_path / "copy"))
    config = json.loads((folder / "unet/config.json").read_text())
    (folder / "unet/config.json").write_text(json.dumps(config | {"in_channels": 9}))
    ModelConfig.read(folder, "inpaint")
    expected = r"expected 4: it is made for inpainting\. Use it for the task inpaint"
    with pytest.raises(HipaError, match=expected):
        ModelConfig.read(folder, "edit")


def test_files_that_are_missing_or_damaged(sd15: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(sd15, tmp_path / "copy"))
    (folder / "unet/config.json").write_text("no")
    with pytest.raises(HipaError, match="is not JSON"):
        ModelConfig.read(folder, "generate")
    (folder / "unet/config.json").unlink()
    with pytest.raises(HipaError, match=r"no readable unet/config.json"):
        ModelConfig.read(folder, "generate")


def test_a_pipeline_of_another_name_with_the_same_parts(sd15: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(sd15, tmp_path / "copy"))
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"_class_name": "MyPipeline"}))
    ModelConfig.read(folder, "generate")

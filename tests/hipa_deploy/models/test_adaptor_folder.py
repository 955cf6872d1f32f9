"""Adaptor folders, with the embedded adaptor and model."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from hipa_deploy.disk.hashing import file_sha256
from hipa_deploy.embedded import ADAPTOR, MODEL
from hipa_deploy.errors import HipaError
from hipa_deploy.models.adaptor_folder import (
    ENCODER_WEIGHTS,
    METADATA,
    WEIGHTS,
    check_schedule,
    read_metadata,
    weights_sha256,
)
from hipa_deploy.models.model_config import ModelConfig


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return Path(shutil.copytree(ADAPTOR, tmp_path / "adaptor"))


def change(folder: Path, **values: object) -> None:
    content = json.loads((folder / METADATA).read_text())
    (folder / METADATA).write_text(json.dumps(content | values))


def test_the_embedded_adaptor_is_for_the_embedded_model() -> None:
    metadata = read_metadata(ADAPTOR, MODEL)
    assert metadata.task == "generate"
    assert metadata.encoder_rank == 0


def test_a_folder_without_metadata_is_refused(tmp_path: Path) -> None:
    with pytest.raises(HipaError, match=f"has no {METADATA}. Expected a folder that hipa-train"):
        read_metadata(tmp_path)


@pytest.mark.parametrize("values", [{"schema_version": 2}, {"unknown": 1}, {"upscale": 1}])
def test_metadata_of_another_version_is_refused(folder: Path, values: dict[str, int]) -> None:
    change(folder, **values)
    with pytest.raises(HipaError, match=r"Copy the adaptor again, or update hipa-deploy"):
        read_metadata(folder)


def test_an_adaptor_of_another_unet_or_vae_is_refused(folder: Path) -> None:
    change(folder, base_vae_sha256="0" * 64)
    with pytest.raises(HipaError, match="trained with another VAE"):
        read_metadata(folder, MODEL)
    change(folder, base_unet_sha256="tensors-v1:" + "0" * 64)
    with pytest.raises(HipaError, match=r"trained on another base model.*differ\)\.$"):
        read_metadata(folder, MODEL)
    change(folder, base_unet_sha256="0" * 64)
    with pytest.raises(HipaError, match=r"another base model.* use the same folder as then\.$"):
        read_metadata(folder, MODEL)
    read_metadata(folder)


def test_an_adaptor_of_another_prediction_or_schedule_is_refused(
    folder: Path, tmp_path: Path
) -> None:
    # The weights are the same, as of one checkpoint that was converted as SD 2.1 and SD 2.1-base.
    model = tmp_path / "model"
    shutil.copytree(MODEL, model)
    scheduler = model / "scheduler" / "scheduler_config.json"
    settings = json.loads(scheduler.read_text())
    metadata = read_metadata(folder, model)
    check_schedule(folder, metadata, ModelConfig.read(model))

    scheduler.write_text(json.dumps(settings | {"prediction_type": "v_prediction"}))
    with pytest.raises(HipaError, match=r"predicts epsilon, and .* predicts v_prediction\. Corr"):
        read_metadata(folder, model)
    scheduler.write_text(json.dumps(settings | {"beta_end": 0.013}))
    with pytest.raises(HipaError, match=r"another noise schedule: alpha_bar is 0\.1608 at time"):
        check_schedule(folder, metadata, ModelConfig.read(model))


def test_an_adaptor_of_the_encoder_needs_its_weights(folder: Path) -> None:
    change(folder, encoder_rank=4)
    with pytest.raises(HipaError, match=f"lacks {ENCODER_WEIGHTS}"):
        read_metadata(folder)
    save_file({"a": np.zeros(1, np.float32)}, folder / ENCODER_WEIGHTS)
    assert read_metadata(folder).encoder_rank == 4


def test_the_hash_covers_both_files_of_weights(folder: Path) -> None:
    unet = file_sha256(folder / WEIGHTS)
    assert weights_sha256(folder) == unet
    save_file({"a": np.zeros(1, np.float32)}, folder / ENCODER_WEIGHTS)
    both = unet + file_sha256(folder / ENCODER_WEIGHTS)
    assert weights_sha256(folder) == hashlib.sha256(both.encode()).hexdigest()

"""Decoder folders, with the embedded decoder and model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from hipa_deploy.embedded import DECODER, MODEL
from hipa_deploy.errors import HipaError
from hipa_deploy.models.decoder_folder import (
    DECODER_METADATA,
    read_decoder_metadata,
    vae_sha256,
)


def test_the_embedded_decoder_is_for_the_embedded_model() -> None:
    metadata = read_decoder_metadata(DECODER)
    assert metadata.base_vae_sha256 == vae_sha256(MODEL)
    assert metadata.latent_channels == 4


def test_a_folder_without_metadata_is_refused(tmp_path: Path) -> None:
    expected = f"has no {DECODER_METADATA}. Expected a folder that hipa-train wrote"
    with pytest.raises(HipaError, match=expected):
        read_decoder_metadata(tmp_path)


@pytest.mark.parametrize("values", [{"schema_version": 2}, {"unknown": 1}, {"fidelity": {}}])
def test_metadata_of_another_version_is_refused(tmp_path: Path, values: dict) -> None:
    content = json.loads((DECODER / DECODER_METADATA).read_text())
    (tmp_path / DECODER_METADATA).write_text(json.dumps(content | values))
    with pytest.raises(HipaError, match=r"Copy the decoder again, or update hipa-deploy"):
        read_decoder_metadata(tmp_path)

from pathlib import Path

import pytest

from hipa_deploy.disk.hashing import file_sha256, folder_sha256
from hipa_deploy.errors import HipaError


def test_folder_hash_depends_on_content_and_names_only(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "w.safetensors").write_bytes(b"weights")
    assert folder_sha256(tmp_path / "a") == folder_sha256(tmp_path / "b")
    (tmp_path / "b" / "w.safetensors").write_bytes(b"weightz")
    assert folder_sha256(tmp_path / "a") != folder_sha256(tmp_path / "b")


def test_hash_is_sha256(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"abc")
    # The first example of FIPS 180-2.
    expected = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert file_sha256(tmp_path / "x") == expected


def test_folder_without_weights_is_refused(tmp_path: Path) -> None:
    with pytest.raises(HipaError, match="safetensors"):
        folder_sha256(tmp_path)

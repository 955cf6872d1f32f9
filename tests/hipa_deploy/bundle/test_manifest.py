import json
import shutil
from pathlib import Path

import pytest

from hipa_deploy.bundle.folder import MANIFEST, Bundle
from hipa_deploy.embedded import BUNDLE
from hipa_deploy.errors import HipaError


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    return Path(shutil.copytree(BUNDLE, tmp_path / "bundle"))


def edit(root: Path, **changes: object) -> None:
    path = root / MANIFEST
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_embedded_bundle_is_whole() -> None:
    bundle = Bundle.open(BUNDLE)
    bundle.verify()
    assert tuple(bundle.stages) == ("text_encoder", "unet", "vae_decoder")


def test_every_file_is_listed() -> None:
    bundle = Bundle.open(BUNDLE)
    found = {
        p.relative_to(BUNDLE).as_posix()
        for p in BUNDLE.rglob("*")
        if p.is_file() and "engines" not in p.parts
    }
    assert found == {*bundle.manifest.files, MANIFEST}


@pytest.mark.parametrize("damage", ["truncate", "flip", "remove"])
@pytest.mark.parametrize("name", ["unet/model.onnx", "tokenizer/tokenizer.json"])
def test_a_damaged_file_is_found(copy: Path, name: str, damage: str) -> None:
    path, data = copy / name, (copy / name).read_bytes()
    if damage == "remove":
        path.unlink()
    else:
        path.write_bytes(data[:-1] if damage == "truncate" else data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(HipaError, match="missing" if damage == "remove" else "corrupt"):
        Bundle.open(copy).verify()


def test_no_bundle(tmp_path: Path) -> None:
    with pytest.raises(HipaError, match=r"no hipa\.json"):
        Bundle.open(tmp_path)


def test_a_file_is_no_bundle(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(b"x")
    with pytest.raises(HipaError, match=r"model\.onnx is a file\. Expected a bundle's folder"):
        Bundle.open(tmp_path / "model.onnx")


@pytest.mark.parametrize("text", ["", "{", "[]", "null"])
def test_not_a_manifest(tmp_path: Path, text: str) -> None:
    (tmp_path / MANIFEST).write_text(text)
    with pytest.raises(HipaError, match="not a manifest"):
        Bundle.open(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"schema_version": 2}, "schema 2"),
        ({"batch": "x"}, "batch"),
        ({"surprise": 1}, "surprise"),
        ({"batch": 0}, "batch"),
        ({"stages": []}, "stages"),
    ],
)
def test_a_manifest_that_does_not_validate(copy: Path, changes: dict, message: str) -> None:
    edit(copy, **changes)
    with pytest.raises(HipaError, match=message):
        Bundle.open(copy)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"surprise": 1}, r"surprise: this version knows no such field"),
        ({"schema_version": 2}, "schema 2, this version reads 1"),
    ],
)
def test_a_bundle_of_another_version_says_so(copy: Path, changes: dict, message: str) -> None:
    """Exporting it again with the same version would not help."""
    edit(copy, producer="hipa-deploy 9.9.9", **changes)
    remedy = r"It was written by 'hipa-deploy 9\.9\.9'. Use that version, or export it again with"
    with pytest.raises(HipaError, match=rf"{message}\. {remedy}"):
        Bundle.open(copy)


@pytest.mark.parametrize("name", ["../secret", "/etc/hostname"])
def test_a_path_outside_the_bundle_is_refused(copy: Path, name: str) -> None:
    edit(copy, files={name: "0" * 64})
    with pytest.raises(HipaError, match="outside"):
        Bundle.open(copy)


def test_a_file_that_is_not_listed(copy: Path) -> None:
    with pytest.raises(HipaError, match="not listed"):
        Bundle.open(copy).path("notes.txt")

from pathlib import Path

import pytest

from hipa_deploy.errors import HipaError
from hipa_deploy.files import new_folder, write_file
from hipa_deploy.hashing import file_sha256, folder_sha256


def test_new_folder_appears_whole(tmp_path: Path) -> None:
    with new_folder(tmp_path / "a" / "out") as scratch:
        (scratch / "x").write_text("1")
        assert not (tmp_path / "a" / "out").exists()
    assert (tmp_path / "a" / "out" / "x").read_text() == "1"


def test_new_folder_leaves_nothing_behind_on_failure(tmp_path: Path) -> None:
    def interrupted() -> None:
        with new_folder(tmp_path / "out") as scratch:
            (scratch / "x").write_text("1")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("as_file", [True, False])
def test_new_folder_refuses_what_is_there(tmp_path: Path, as_file: bool) -> None:
    out = tmp_path / "out"
    if as_file:
        out.write_text("mine")
    else:
        out.mkdir()
        (out / "mine").write_text("mine")
    with pytest.raises(HipaError, match="not empty"), new_folder(out):
        pass
    assert (out if as_file else out / "mine").read_text() == "mine"


def test_new_folder_takes_an_empty_one(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with new_folder(tmp_path / "out") as scratch:
        (scratch / "x").touch()
    assert (tmp_path / "out" / "x").exists()


def test_write_file_replaces_whole(tmp_path: Path) -> None:
    path = tmp_path / "sub" / "x.bin"
    write_file(path, b"old")
    write_file(path, b"new")
    assert path.read_bytes() == b"new"
    assert [p.name for p in path.parent.iterdir()] == ["x.bin"]


def test_folder_hash_depends_on_content_and_names_only(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "w.safetensors").write_bytes(b"weights")
    assert folder_sha256(tmp_path / "a") == folder_sha256(tmp_path / "b")
    (tmp_path / "b" / "w.safetensors").write_bytes(b"weightz")
    assert folder_sha256(tmp_path / "a") != folder_sha256(tmp_path / "b")


def test_hash_is_sha256(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"abc")
    assert (
        file_sha256(tmp_path / "x")
        == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    )


def test_folder_without_weights_is_refused(tmp_path: Path) -> None:
    with pytest.raises(HipaError, match="safetensors"):
        folder_sha256(tmp_path)

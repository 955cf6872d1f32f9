"""Inputs are never written over, and existing files only on request."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from hipa_deploy.commands.files.outputs import check_outputs, next_free_name, write_output
from hipa_deploy.errors import HipaError, HipaWarning


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    path = tmp_path / "photo.png"
    path.write_bytes(b"photo")
    return path


@pytest.mark.parametrize("force", [True, False])
@pytest.mark.parametrize(
    "kind", ["itself", "other spelling", "link", "hard link", "link to folder"]
)
def test_an_input_is_never_an_output(
    photo: Path, tmp_path: Path, kind: str, force: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    other = tmp_path / "other.png"
    if kind == "link":
        other.symlink_to(photo)
    elif kind == "hard link":
        other.hardlink_to(photo)
    elif kind == "link to folder":
        (tmp_path / "folder").symlink_to(tmp_path)
        other = tmp_path / "folder" / "photo.png"
    elif kind == "spelling":
        other = Path("../") / tmp_path.name / "photo.png"
    else:
        other = photo
    with pytest.raises(HipaError, match=r"is the input .*photo\.png, which is never written over"):
        check_outputs([other], inputs=[Path("missing.png"), photo], force=force)


def test_names_that_the_disk_takes_for_one_are_one(
    photo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a disk that does not tell capitals from small letters."""
    stat = Path.stat

    def without_case(path: Path, **more: bool) -> os.stat_result:
        return stat(path.with_name(path.name.lower()), **more)

    monkeypatch.setattr(Path, "stat", without_case)
    monkeypatch.setattr(Path, "exists", lambda path: path.with_name(path.name.lower()) == photo)
    with pytest.raises(HipaError, match="never written over"):
        check_outputs([tmp_path / "PHOTO.PNG"], inputs=[photo], force=True)


def test_a_file_inside_an_input_folder(photo: Path, tmp_path: Path) -> None:
    with pytest.raises(HipaError, match="never written over"):
        check_outputs([photo], inputs=[tmp_path], force=True)
    check_outputs([tmp_path / "new.png"], inputs=[tmp_path])  # harms nothing


def test_an_existing_file_needs_force(photo: Path) -> None:
    with pytest.raises(HipaError, match=r"photo\.png exists\. Add --force to replace it"):
        check_outputs([photo])
    check_outputs([photo], force=True)


def test_places_where_nothing_can_be_written(photo: Path, tmp_path: Path) -> None:
    with pytest.raises(HipaError, match=r"is a folder\. Give the name of a file"):
        check_outputs([tmp_path], force=True)
    with pytest.raises(HipaError, match=r"photo\.png is no folder"):
        check_outputs([photo / "a" / "b.png"], force=True)
    with pytest.raises(HipaError, match="two outputs"):
        check_outputs([tmp_path / "a.json", tmp_path / "x" / ".." / "a.json"])
    check_outputs([Path(os.devnull), Path(os.devnull)])


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(HipaError, match="no permission to write"):
        check_outputs([tmp_path / "a" / "b.png"])


def test_next_free_names(tmp_path: Path) -> None:
    path = tmp_path / "image.png"
    assert next_free_name(path) == path
    path.touch()
    assert next_free_name(path) == tmp_path / "image-2.png"
    (tmp_path / "image-2.png").symlink_to("nowhere")
    assert next_free_name(path) == tmp_path / "image-3.png"
    (tmp_path / "images").mkdir()
    assert next_free_name(tmp_path / "images") == tmp_path / "images-2"


def test_a_file_that_appears_meanwhile_is_kept_and_so_is_the_result(photo: Path) -> None:
    with pytest.warns(HipaWarning, match=r"the result is in .*photo-2\.png"):
        assert write_output(photo, b"result") == photo.with_name("photo-2.png")
    assert photo.read_bytes() == b"photo"
    assert write_output(photo, b"result", force=True) == photo
    assert photo.read_bytes() == b"result"
    assert len(list(photo.parent.iterdir())) == 2

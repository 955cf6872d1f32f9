from pathlib import Path

import pytest

from hipa_deploy.errors import HipaError
from hipa_deploy.files import new_folder, write_file


def test_new_folder_appears_complete(tmp_path: Path) -> None:
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


def test_write_file_replaces_the_file_at_once(tmp_path: Path) -> None:
    path = tmp_path / "sub" / "x.bin"
    write_file(path, b"old")
    write_file(path, b"new")
    assert path.read_bytes() == b"new"
    assert [p.name for p in path.parent.iterdir()] == ["x.bin"]

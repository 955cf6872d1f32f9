"""Where a command's images go."""

from __future__ import annotations

from pathlib import Path

import pytest

from hipa_deploy.commands.make_images import image_paths
from hipa_deploy.commands.options import FileFormat
from hipa_deploy.errors import HipaError


def test_one_image_goes_to_one_file(tmp_path: Path) -> None:
    assert image_paths(tmp_path / "a.PNG", 1, 1, 0) == [tmp_path / "a.PNG"]


def test_several_go_to_numbered_files_in_a_folder(tmp_path: Path) -> None:
    paths = image_paths(tmp_path / "images", prompts=2, count=2, seed=7)
    names = ["000-seed7.png", "000-seed8.png", "001-seed7.png", "001-seed8.png"]
    assert paths == [tmp_path / "images" / name for name in names]


def test_a_folder_may_be_named_like_a_file(tmp_path: Path) -> None:
    folder = tmp_path / "images.png"
    folder.mkdir()
    assert image_paths(folder, 1, 1, 3) == [folder / "000-seed3.png"]


@pytest.mark.parametrize(
    ("name", "count", "message"), [("a.png", 2, "is one file for 2 images"), ("a.gif", 1, "PNG")]
)
def test_what_is_no_place_for_the_images(
    name: str, count: int, message: str, tmp_path: Path
) -> None:
    with pytest.raises(HipaError, match=message):
        image_paths(tmp_path / name, 1, count, 0)


def test_a_device_takes_one_png() -> None:
    device = Path("/dev/null")
    assert image_paths(device, 1, 1, 0) == [device]
    with pytest.raises(HipaError, match="is one file for 2 images"):
        image_paths(device, 2, 1, 0)
    with pytest.raises(HipaError, match="--format jpeg is not the format"):
        image_paths(device, 1, 1, 0, FileFormat.jpeg)

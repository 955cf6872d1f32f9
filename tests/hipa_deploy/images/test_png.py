from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from hipa_deploy.errors import HipaError
from hipa_deploy.images.png import grid, png_bytes, read_parameters, save_image, save_png

IMAGE = np.arange(4 * 5 * 3, dtype=np.uint8).reshape(4, 5, 3)


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_generation_parameters_survive_any_prompt(
    tmp_path_factory: pytest.TempPathFactory, prompt: str
) -> None:
    path = tmp_path_factory.mktemp("png") / "x.png"
    save_png(path, IMAGE, {"prompt": prompt, "seed": 0})
    assert read_parameters(path) == {"prompt": prompt, "seed": 0}
    np.testing.assert_array_equal(np.asarray(Image.open(path)), IMAGE)


def test_same_input_same_bytes() -> None:
    assert png_bytes(IMAGE, {"a": 1, "b": 2}) == png_bytes(IMAGE, {"b": 2, "a": 1})


def test_png_without_generation_parameters(tmp_path: Path) -> None:
    Image.fromarray(IMAGE).save(tmp_path / "x.png")
    with pytest.raises(HipaError, match="carries no generation parameters"):
        read_parameters(tmp_path / "x.png")


def test_not_an_image(tmp_path: Path) -> None:
    (tmp_path / "x.png").write_text("text")
    with pytest.raises(HipaError, match="cannot be read"):
        read_parameters(tmp_path / "x.png")


def test_grid_places_columns_side_by_side() -> None:
    black = np.zeros((2, 4, 5, 3), np.uint8)
    grey = np.full((2, 4, 5, 3), 9, np.uint8)
    sheet = grid([black, grey], gap=1)
    assert sheet.shape == (10, 12, 3)
    assert (sheet[:4, :5] == 0).all()
    assert (sheet[5:9, 6:11] == 9).all()
    assert (sheet[4] == 255).all()


def test_paths_may_be_text(tmp_path: Path) -> None:
    image_HWC = np.zeros((8, 8, 3), np.uint8)
    for name, save in (("a.png", save_png), ("b.webp", save_image)):
        save(f"{tmp_path}/{name}", image_HWC, {"seed": 1})
        assert read_parameters(f"{tmp_path}/{name}") == {"seed": 1}
        with pytest.raises(HipaError, match="exists"):
            save(f"{tmp_path}/{name}", image_HWC, {"seed": 1})

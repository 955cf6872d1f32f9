"""``--checker`` of the commands that make images."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hipa_deploy.commands.app import main
from hipa_deploy.images.example_source import example_image, example_mask
from tests.served import tiny_bundles

PROMPT = "a green pear"
MODULE = "checker_of_commands"
SOURCE = """
seen = []

def judge(images):
    seen.append(images.shape)
    return ["on a whim"] * len(images)

def second(images):
    seen.append(images.shape)
    return [len(seen) == 2 for image in images]
"""
LINES = {
    "generate": ("tiny", PROMPT),
    "edit": ("tiny-edit", "a.png", PROMPT),
    "inpaint": ("tiny-inpaint", "a.png", "mask.png", PROMPT),
    "control": ("tiny-control", "a.png", PROMPT),
    "upscale": ("tiny-upscale", "a.png"),
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    tiny_bundles(tmp_path)
    (tmp_path / f"{MODULE}.py").write_text(SOURCE, encoding="utf-8")
    Image.fromarray(np.asarray(example_image(32, 32, number=3))).save(tmp_path / "a.png")
    mask_HW = (np.asarray(example_mask(32, 32)) > 0).astype(np.uint8) * 255
    Image.fromarray(mask_HW).save(tmp_path / "mask.png")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, MODULE, raising=False)
    return tmp_path


def run(*words: str) -> int:
    with pytest.raises(SystemExit) as stopped:
        main(list(words))
    assert isinstance(stopped.value.code, int)
    return stopped.value.code


@pytest.mark.parametrize("verb", LINES)
def test_a_flagged_image_is_not_written(
    verb: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = (verb, *LINES[verb], "--out", "made.png", "--checker", f"{MODULE}:judge")
    assert run(*words) == 1
    assert f"runs code of the module {MODULE}" in capsys.readouterr().err
    assert MODULE not in sys.modules
    assert run(*words, "--allow-code") == 1
    assert "flagged by on a whim" in " ".join(capsys.readouterr().err.split())
    assert not (folder / "made.png").exists()
    assert len(sys.modules[MODULE].seen) == 1


def test_the_other_images_are_written(folder: Path) -> None:
    options = ("--count", "3", "--out", "made", "--checker", f"{MODULE}:second", "--allow-code")
    # One image a call, so that the function's second call is the second image.
    assert run("generate", "emoji", PROMPT, *options) == 1
    assert len(list((folder / "made").iterdir())) == 2
    assert [shape[0] for shape in sys.modules[MODULE].seen] == [1, 1, 1]

"""``hipa-generate --refine``: the final image of a draft, and mistakes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hipa_deploy import OneStepPipeline
from hipa_deploy.commands.app import main
from hipa_deploy.images.png import read_parameters
from tests.refine_samples import STEPS, refine_bundle

PROMPT = "a green pear"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(refine_bundle(tmp_path_factory.mktemp("refine")).root)


def test_the_images_are_those_of_the_pipeline(
    root: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["generate", root, PROMPT, "--refine", "teacher", "--guidance", "2", "--seed", "3"]
    command += ["--count", "2", "--backend", "onnxruntime", "--out", str(tmp_path / "images")]
    with pytest.raises(SystemExit) as stopped:
        main(command)
    assert not stopped.value.code
    paths = [Path(line) for line in capsys.readouterr().out.split()]
    with OneStepPipeline.load(root, "onnxruntime") as pipe:
        final = pipe.refine(pipe(PROMPT, seed=3, count=2), STEPS, guidance=2)
    for path, image_HWC, parameters in zip(paths, final.images_BHWC, final.parameters, strict=True):
        np.testing.assert_array_equal(np.asarray(Image.open(path)), image_HWC)
        assert read_parameters(path) == parameters

    # From what the file says, as for every other image.
    again = ["generate", root, "--again", str(paths[0]), "--out", str(tmp_path / "again.png")]
    with pytest.raises(SystemExit) as stopped:
        main(again)
    assert not stopped.value.code
    assert "the same image, pixel for pixel" in capsys.readouterr().err


def test_low_memory_names_the_base_unet(
    root: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["generate", root, PROMPT, "--refine", "2", "--low-memory"]
    with pytest.raises(SystemExit) as stopped:
        main([*command, "--backend", "onnxruntime", "--out", str(tmp_path / "x.png")])
    assert not stopped.value.code
    line = "low memory: text_encoder, then base UNet, then vae_decoder\n"
    assert capsys.readouterr().err.count(line) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--refine", "1"], "steps is 1. Expected a whole number of 2 to 1000"),
        (["--refine", "many"], "is no number of steps"),
        (["--refine", "4", "--guidance", "99"], "guidance is 99"),
        (["--guidance", "3"], "--guidance is for --refine"),
        (["--refine", "4", "--backend", "rtx"], "has no rtx engine of the base model"),
    ],
)
def test_a_mistake(
    root: str, options: list[str], message: str, refused: Callable[..., str]
) -> None:
    assert message in refused("generate", root, PROMPT, *options)


def test_a_bundle_without_the_base_model(refused: Callable[..., str]) -> None:
    message = refused("generate", "emoji", PROMPT, "--refine", "4")
    assert "does not have the base model that refines. Export it with --with-teacher" in message

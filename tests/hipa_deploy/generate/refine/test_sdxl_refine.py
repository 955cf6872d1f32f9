"""Drafts of a tiny SDXL, refined: what its second text encoder adds."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from hipa_deploy import OneStepPipeline
from hipa_deploy.bundle.folder import Bundle
from hipa_deploy.bundle.manifest import Manifest
from hipa_deploy.commands.app import main
from hipa_deploy.errors import HipaError
from hipa_deploy.generate.refine.refiner import read_tables
from tests.sdxl_samples import BAKED, NAME, sdxl_bundles
from tests.tiny_model import PROMPTS as BAKED_PROMPTS
from tests.tiny_sdxl import POOLED

PROMPTS = ["a green pear", "a red apple!!"]


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Bundle]:
    return sdxl_bundles(tmp_path_factory.mktemp("refine"))


@pytest.fixture(scope="module")
def bundle(bundles: dict[str, Bundle]) -> Bundle:
    return bundles[NAME]


@pytest.fixture(scope="module")
def pipe(bundle: Bundle) -> Iterator[OneStepPipeline]:
    with OneStepPipeline.load(bundle.root, "onnxruntime") as loaded:
        yield loaded


def test_a_final_image_depends_on_its_own_draft_alone(pipe: OneStepPipeline) -> None:
    """Neither on the others nor on what is remembered of the prompt."""
    together = pipe.refine(pipe(PROMPTS, seed=3, count=2), 3)
    alone = pipe.refine(pipe(PROMPTS[1], seed=4), 3)
    np.testing.assert_array_equal(together.images_BHWC[3], alone.images_BHWC[0])
    pipe._prompts.forget()
    again = pipe.refine(alone, 3)
    np.testing.assert_array_equal(again.images_BHWC, alone.images_BHWC)
    weighed = pipe.refine(pipe("a (red:1.5) apple!!", seed=4, prompt_weights=True), 3)
    assert np.any(weighed.images_BHWC != alone.images_BHWC)


def test_the_command_makes_it_again(
    bundle: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    final = str(tmp_path / "final.png")
    asked = [str(bundle.root), PROMPTS[1], "--seed", "7", "--backend", "onnxruntime"]
    again = ["--again", final, "--out", str(tmp_path / "again.png"), "--backend", "onnxruntime"]
    for arguments in ([*asked, "--refine", "3", "--out", final], [str(bundle.root), *again]):
        with pytest.raises(SystemExit) as ended:
            main(["generate", *arguments])
        assert ended.value.code == 0
    assert "the same image, pixel for pixel" in " ".join(capsys.readouterr().err.split())


def test_baked_prompts_have_their_pooled_vectors(bundles: dict[str, Bundle]) -> None:
    """Both bundles have the same UNets, so their final images differ by the text's rounding."""
    baked = bundles[BAKED]
    vectors = np.load(baked.root / "prompts/pooled.npy")
    assert (vectors.dtype, vectors.shape) == (np.float16, (len(BAKED_PROMPTS), POOLED))
    prompts = [BAKED_PROMPTS[1], BAKED_PROMPTS[2]]
    with OneStepPipeline.load(baked.root, "onnxruntime") as loaded:
        drafts = loaded(prompts, seed=4)
        finals = loaded.refine(drafts, 3).images_BHWC
    with OneStepPipeline.load(bundles[NAME].root, "onnxruntime") as loaded:
        expected = loaded.refine(loaded(prompts, seed=4), 3).images_BHWC
    assert np.abs(finals.astype(int) - expected).max() <= 2
    assert np.abs(finals.astype(int) - drafts.images_BHWC).mean() > 2
    assert np.abs(finals[0].astype(int) - finals[1]).mean() > 2


@pytest.mark.parametrize(
    "change",
    [
        lambda values: None,
        lambda values: values[:, :-1],
        lambda values: np.full_like(values, np.nan),
    ],
)
def test_damaged_tables(bundle: Bundle, tmp_path: Path, change: Any) -> None:
    copy = Bundle.open(shutil.copytree(bundle.root, tmp_path / "copy"))
    refinement = copy.manifest.refine
    assert refinement
    path = copy.path(refinement.tables)
    arrays = dict(np.load(path))
    arrays["empty_pooled"] = change(arrays["empty_pooled"])
    if arrays["empty_pooled"] is None:
        del arrays["empty_pooled"]
    np.savez(path, **arrays)
    with pytest.raises(HipaError, match=r"tables\.npz"):
        read_tables(copy, refinement)


def test_a_manifest_that_does_not_fit_itself(bundle: Bundle, tmp_path: Path) -> None:
    fields = json.loads(bundle.manifest.to_json())
    with pytest.raises(ValidationError, match="another number of text encoders"):
        Manifest.model_validate({**fields, "text_widths": []})

    # A text stage that calls the pooled vector otherwise.
    copy = Path(shutil.copytree(bundle.root, tmp_path / "copy"))
    text = (copy / "hipa.json").read_text()
    (copy / "hipa.json").write_text(text.replace('"name": "pooled"', '"name": "other"'))
    with pytest.raises(HipaError, match="the text stage gives no pooled vector"):
        OneStepPipeline.load(copy, "onnxruntime")

"""What the service sends is checked and marked as the commands' files are."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest

from hipa_deploy import OneStepPipeline
from hipa_deploy.bundle.folder import Bundle
from hipa_deploy.errors import HipaError
from hipa_deploy.marks.read_marks import read_marks
from hipa_deploy.marks.records import Marks
from hipa_deploy.serve.served import Models
from hipa_deploy.serve.service import ImageService, Order, _encoded
from hipa_deploy.serve.settings import Limits

PROMPT = "a green pear"


def order(pipe: OneStepPipeline, count: int, **choices: Any) -> Order:
    models = Models([str(pipe.bundle.root)])
    return Order(models.by_name[next(iter(models.by_name))], PROMPT, range(count), **choices)


@pytest.mark.parametrize("kind", ["png", "webp", "jpeg"])
def test_a_file_says_what_made_it(bundles: dict[str, Bundle], kind: str, tmp_path) -> None:
    with OneStepPipeline.load(bundles["tiny"].root) as pipe:
        made = pipe.make(pipe.jobs([(PROMPT, 0)]))
        files = _encoded(pipe, made, None, order(pipe, 1, format=kind), None)
        expected = pipe(PROMPT, seed=0).images_BHWC[0]
    path = tmp_path / f"image.{kind}"
    path.write_bytes(files.files[0])
    marks = read_marks(path)
    assert marks.parameters["prompt"] == PROMPT
    assert "trainedAlgorithmicMedia" in str(marks.xmp)
    if kind != "jpeg":
        from PIL import Image

        pixels = np.asarray(Image.open(io.BytesIO(files.files[0])).convert("RGB"))
        np.testing.assert_array_equal(pixels, expected)


def test_the_least_quality_of_openais_scale(bundles: dict[str, Bundle]) -> None:
    with OneStepPipeline.load(bundles["tiny"].root) as pipe:
        made = pipe.make(pipe.jobs([(PROMPT, 0)]))
        sizes = []
        for quality in (0, 100):
            chosen = order(pipe, 1, format="webp", quality=quality)
            sizes.append(len(_encoded(pipe, made, None, chosen, None).files[0]))
    assert sizes[0] < sizes[1]


def test_a_flagged_image_is_not_sent(bundles: dict[str, Bundle]) -> None:
    def second_is_bad(images_BHWC: np.ndarray) -> list[bool]:
        return [number == 1 for number in range(len(images_BHWC))]

    with OneStepPipeline.load(bundles["tiny"].root, checker=second_is_bad) as pipe:
        made = pipe.make(pipe.jobs([(PROMPT, 0), (PROMPT, 1), (PROMPT, 2)]))
        files = _encoded(pipe, made, None, order(pipe, 3), None)
    assert [facts["seed"] for facts in files.parameters] == [0, 2]
    assert len(files.files) == 2
    assert [one.seed for one in files.flagged] == [1]


def test_a_bundle_whose_owner_wants_signatures_needs_a_key(bundles: dict[str, Bundle]) -> None:
    models = Models([str(bundles["tiny"].root)])
    served = models.served[0]
    manifest = served.bundle.manifest.model_copy(update={"marks": Marks(c2pa=True)})
    served.bundle = Bundle(served.bundle.root, manifest)
    with pytest.raises(HipaError, match="content credentials"):
        ImageService(models, Limits())

"""Requests become jobs; their bundle is a manifest without graphs."""

from __future__ import annotations

import pytest

from hipa_deploy.bundle.folder import Bundle
from hipa_deploy.embedded import BUNDLE
from hipa_deploy.errors import HipaError
from hipa_deploy.generate.parts.job_maker import JobMaker
from hipa_deploy.generate.prompts import open_prompts
from hipa_deploy.images.example_source import example_image
from hipa_deploy.images.source import edit_source
from hipa_deploy.marks.marker import ImageMarker
from tests.hipa_deploy.images.manifests import bundle, strengths


def test_a_source_has_the_size_of_its_image() -> None:
    edits = bundle("edit", strengths=strengths(0.5))
    source = edit_source(edits, example_image(64, 64), height=None, width=None)
    maker = JobMaker(edits, open_prompts(Bundle.open(BUNDLE)), ImageMarker())
    pairs = [("a cat", 0)]
    (job,) = maker.jobs(pairs, source=source, height=64)
    assert job.latent_CHW[1:] == (16, 16)
    for wish in ({"height": 128}, {"width": 128}):
        with pytest.raises(HipaError, match=r"is 128, and the source was prepared for 64 pixels"):
            maker.jobs(pairs, source=source, **wish)

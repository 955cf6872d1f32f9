"""The reader of a bundle's reference, on the embedded bundle and on copies with broken files."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from hipa_deploy import embedded
from hipa_deploy.bundle.folder import Bundle
from hipa_deploy.bundle.reference import (
    REFERENCE_PROMPTS,
    REFERENCE_TENSORS,
    Reference,
    reference_prompt,
)
from hipa_deploy.errors import HipaError


@pytest.fixture
def copy(tmp_path: Path) -> Bundle:
    """The embedded bundle, its engines left behind, in a folder that a test may change."""
    ignored = shutil.ignore_patterns("engines")
    root = shutil.copytree(embedded.BUNDLE, tmp_path / "bundle", ignore=ignored)
    return Bundle.open(Path(root))


def test_the_embedded_bundle_has_a_prompt_a_seed_and_the_tensors_of_each_stage() -> None:
    reference = Reference.read(Bundle.open(embedded.BUNDLE))
    assert reference.prompt == "3d emoji of a red apple"
    assert reference.seeds == [0]
    assert reference.tensors.keys() >= {"noise", "context", "latents", "images"}
    assert reference.tensors["images"].shape == (1, 128, 128, 3)
    assert reference.tensors["images"].dtype == np.uint8


def test_the_prompt_alone_is_that_of_the_reference() -> None:
    bundle = Bundle.open(embedded.BUNDLE)
    assert reference_prompt(bundle) == Reference.read(bundle).prompt


BROKEN_PROMPTS = ["{}", "no json", '{"prompts": [], "seeds": [0]}', '{"prompts": ["a cat"]}']


@pytest.mark.parametrize("content", BROKEN_PROMPTS)
def test_broken_prompts_are_refused(copy: Bundle, content: str) -> None:
    (copy.root / REFERENCE_PROMPTS).write_text(content)
    for read in (Reference.read, reference_prompt):
        with pytest.raises(HipaError, match=r"reference cannot be read .*Export the bundle again"):
            read(copy)


def test_broken_tensors_are_refused_but_the_prompt_can_be_read(copy: Bundle) -> None:
    (copy.root / REFERENCE_TENSORS).write_bytes(b"no archive")
    with pytest.raises(HipaError, match="reference cannot be read"):
        Reference.read(copy)
    assert reference_prompt(copy) == "3d emoji of a red apple"


def test_a_bundle_without_a_reference_is_refused(copy: Bundle) -> None:
    del copy.manifest.files[REFERENCE_PROMPTS]
    with pytest.raises(HipaError, match=r"reference/prompts\.json is not listed in hipa\.json"):
        reference_prompt(copy)

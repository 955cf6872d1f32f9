import numpy as np

from hipa_deploy.images.example_source import example_inputs, example_source
from tests.hipa_deploy.images.manifests import bundle, strengths


def test_sources_differ_by_number_and_fit_the_bundle() -> None:
    assert example_source(bundle("generate")) is None
    edit_bundle = bundle("edit", strengths=strengths(1, 0.5))
    first = example_source(edit_bundle, 0)
    second = example_source(edit_bundle, 1)
    assert first is not None
    assert second is not None
    assert first.step == 0
    assert not np.array_equal(first.image_HWC, second.image_HWC)


def test_the_mask_is_on_the_latent_grid() -> None:
    inputs = example_inputs("inpaint", 64, 64, 4)
    assert inputs["mask"].shape == (1, 16, 16)
    assert 0 < inputs["mask"].mean() < 1


def test_the_image_to_enlarge_is_blurred() -> None:
    blurred = example_inputs("upscale", 64, 64, 4, upscale=4)["image"].astype(float)
    sharp = example_inputs("edit", 64, 64, 4)["image"].astype(float)
    assert np.abs(np.diff(blurred, axis=0)).max() < np.abs(np.diff(sharp, axis=0)).max()

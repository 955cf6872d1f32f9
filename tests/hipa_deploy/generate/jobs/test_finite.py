"""Networks that overflow: no image is shown, and the others of a batch are not lost."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from hipa_deploy import OneStepPipeline
from hipa_deploy.bundle.folder import Bundle
from hipa_deploy.generate.jobs.finite import NotFiniteError
from hipa_deploy.generate.noise import initial_noise
from hipa_deploy.images.example_source import example_image, example_mask
from tests.refine_samples import refine_bundle
from tests.served import tiny_bundles
from tests.swap_samples import scaled_weights, write_swap

ALL = 1000  # kernels
HUGE = 3e4  # the weights are still finite in float16, but not what is computed with them
CALLS: dict[str, Callable[[OneStepPipeline], object]] = {
    "tiny": lambda pipe: pipe("a red pear"),
    "tiny-edit": lambda pipe: pipe.edit(example_image(32, 32, number=1), "a red pear"),
    "tiny-inpaint": lambda pipe: pipe.inpaint(
        example_image(32, 32, number=1), example_mask(32, 32), "a red pear"
    ),
    "tiny-upscale": lambda pipe: pipe.upscale(example_image(24, 40, number=1)),
}


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Bundle]:
    return tiny_bundles(tmp_path_factory.mktemp("bundles"))


@pytest.mark.parametrize("low_memory", [False, True])
@pytest.mark.parametrize("name", CALLS)
def test_an_adaptor_that_overflows_gives_no_image(
    bundles: dict[str, Bundle], tmp_path: Path, name: str, low_memory: bool
) -> None:
    bundle = bundles[name]
    swap = write_swap(bundle, tmp_path / "huge", scaled_weights(bundle, HUGE, ALL))
    with OneStepPipeline.load(bundle.root, "onnxruntime", low_memory=low_memory) as pipe:
        pipe.swap_adaptor(swap)
        with pytest.raises(NotFiniteError, match="the one step gives NaN"):
            CALLS[name](pipe)
        pipe.swap_adaptor(None)
        CALLS[name](pipe)


def test_the_image_of_a_batch_is_named(
    bundles: dict[str, Bundle], monkeypatch: pytest.MonkeyPatch
) -> None:
    with OneStepPipeline.load(bundles["tiny"].root, "onnxruntime") as pipe:
        break_seed(pipe, 7, monkeypatch)
        with pytest.raises(NotFiniteError, match=r"1 of 3 .*'a boat' with seed 7"):
            pipe.generate([("a pear", 1), ("a pear", 2), ("a boat", 7)])
        assert len(pipe.generate([("a pear", 1), ("a pear", 2)]).images_BHWC) == 2


def break_seed(pipe: OneStepPipeline, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the UNet overflow for the noise of one seed."""
    unet = pipe.runners["unet"]
    run = unet._run  # type: ignore[attr-defined]

    def overflowing(inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        made: dict[str, np.ndarray] = run(inputs)
        broken_CHW = initial_noise([seed], inputs["noise"].shape[1:])[0]
        for place, noise_CHW in enumerate(inputs["noise"]):
            if np.array_equal(noise_CHW, broken_CHW):
                made["latents"][place, 0, 0, 0] = np.inf
        return made

    monkeypatch.setattr(unet, "_run", overflowing)


def test_a_refined_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with OneStepPipeline.load(refine_bundle(tmp_path).root, "onnxruntime") as pipe:
        draft = pipe("a green pear", seed=5)
        refiner = pipe._batches._refiner
        latents = refiner.latents

        def overflowing(*arguments: object, **options: object) -> np.ndarray:
            return latents(*arguments, **options) * np.float32(np.nan)  # type: ignore[arg-type]

        monkeypatch.setattr(refiner, "latents", overflowing)
        with pytest.raises(NotFiniteError, match="the base model gives NaN"):
            pipe.refine(draft, 2)

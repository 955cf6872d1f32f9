import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hipa_deploy.bundle.manifest import OneStep, StepMethod
from hipa_deploy.errors import HipaError
from hipa_deploy.generate.noise import bundle_noise, initial_noise

ALPHA_BAR = 0.0046601
BUNDLE_STEP = OneStep(
    prediction_type="epsilon",
    timestep=999,
    alpha_bar=ALPHA_BAR,
    scaling_factor=0.18215,
    latent_shape=(4, 8, 8),
    height=64,
    width=64,
)


def test_noise_is_standard_normal() -> None:
    noise = initial_noise([7], (4, 128, 128))
    assert noise.dtype == np.float32
    assert abs(noise.mean()) < 0.01
    assert abs(noise.std() - 1) < 0.01
    assert abs((noise**4).mean() - 3) < 0.1  # kurtosis of a normal distribution


def test_noise_values_are_pinned() -> None:
    """The numbers themselves: a seed must mean the same next year and on another machine."""
    np.testing.assert_array_equal(
        initial_noise([0], (1, 1, 4)).ravel(),
        np.float32(
            [0.15853384137153625, 2.982879400253296, -1.9256919622421265, -0.8249255418777466]
        ),
    )


@given(
    st.lists(st.integers(0, 2**63 - 1), min_size=1, max_size=4),
    st.integers(1, 3),
    st.integers(1, 5),
)
def test_noise_of_a_seed_does_not_depend_on_its_batch(
    seeds: list[int], channels: int, size: int
) -> None:
    together = initial_noise(seeds, (channels, size, size))
    for index, seed in enumerate(seeds):
        np.testing.assert_array_equal(
            together[index], initial_noise([seed], (channels, size, size))[0]
        )


def test_seeds_differ_and_zero_counts() -> None:
    zero, one = initial_noise([0, 1], (4, 8, 8))
    assert np.abs(zero).sum() > 0
    assert not np.array_equal(zero, one)


@pytest.mark.parametrize("seed", [-1, 2**63])
def test_seed_out_of_range(seed: int) -> None:
    with pytest.raises(HipaError, match="seed"):
        initial_noise([seed], (4, 8, 8))


def test_a_generic_unet_takes_the_noise_that_its_method_scales() -> None:
    """The graphs of the layout onestep scale it themselves."""
    method = StepMethod(
        name="m", scheduler="s", noise_scale=0.5, sample_factor=1.0, output_factor=1.0
    )
    step = BUNDLE_STEP.model_copy(update={"method": method})
    plain = initial_noise([3], (4, 8, 8))
    assert np.array_equal(bundle_noise([3], (4, 8, 8), step, "onestep"), plain)
    assert np.array_equal(bundle_noise([3], (4, 8, 8), step, "generic"), plain / 2)
    assert np.array_equal(bundle_noise([3], (4, 8, 8), BUNDLE_STEP, "generic"), plain)

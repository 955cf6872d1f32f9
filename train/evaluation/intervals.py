"""How much the numbers of a report depend on the prompts that were drawn: bootstrap intervals.

Prompts are drawn again with replacement, each with all of its images, and every number is computed
from the images that were drawn (Efron and Tibshirani 1993, 'An Introduction to the Bootstrap',
chapters 6 and 13). All rows of a report see the same draws, so that their differences are compared
like with like. An image that is drawn twice would be at no distance from itself: KID-Lite0 leaves
out pairs of one prompt, and such pairs with them.

Shapes: N images, R draws, D features.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

DRAWS = 1000
LEVEL = 0.95  # of the intervals
Z = 1.959964  # standard errors of a normal distribution each way, for LEVEL
Interval = tuple[float, float]


def draw_weights(prompts: Sequence[str], draws: int = DRAWS, seed: int = 0) -> Tensor:
    """How often each image was drawn, float64 [R, N].

    Args:
        prompts: The prompt of each image; at least two of them differ.
        draws: R.
        seed: The same prompts and seed give the same draws.

    """
    numbers = {prompt: number for number, prompt in enumerate(dict.fromkeys(prompts))}
    prompt_N = np.array([numbers[prompt] for prompt in prompts])
    generator = np.random.default_rng(seed)
    shares = np.full(len(numbers), 1 / len(numbers))
    counts = generator.multinomial(len(numbers), shares, size=draws)

    # A draw of one prompt alone has no pair to compare.
    alone = (counts > 0).sum(axis=1) < 2
    while alone.any():
        counts[alone] = generator.multinomial(len(numbers), shares, size=int(alone.sum()))
        alone = (counts > 0).sum(axis=1) < 2
    return torch.from_numpy(counts[:, prompt_N].astype(np.float64))


def kid_of_draws(
    kernels_NN: tuple[Tensor, Tensor, Tensor], compared_NN: Tensor, weights_RN: Tensor
) -> np.ndarray:
    """The kernel inception distance of every draw, float64 [R].

    Args:
        kernels_NN: The kernel within the first set, within the second, and across them.
        compared_NN: Which pairs count, bool: those of different prompts.
        weights_RN: As ``draw_weights``.

    """
    counted = compared_NN.double()
    pairs_R = ((weights_RN @ counted) * weights_RN).sum(1)
    means = []
    for kernel in kernels_NN:
        means.append(((weights_RN @ (kernel * counted)) * weights_RN).sum(1) / pairs_R)
    within_a, within_b, across = means
    return (within_a + within_b - 2 * across).numpy()


def mean_of_draws(values_N: Tensor, weights_RN: Tensor) -> np.ndarray:
    """The mean of a number of each image, in every draw, float64 [R]."""
    return ((weights_RN @ values_N.double()) / weights_RN.sum(1)).numpy()


def interval(values_R: np.ndarray) -> Interval:
    """The percentile interval of ``LEVEL``."""
    tail = 100 * (1 - LEVEL) / 2
    low, high = np.percentile(values_R, [tail, 100 - tail])
    return float(low), float(high)


def jackknife_interval(whole: float, left_out_G: np.ndarray) -> Interval:
    """The interval of ``LEVEL`` of a number, from its values without each of G groups.

    The delete-a-group jackknife (Efron and Tibshirani 1993, chapter 11; Shao and Wu 1989): the
    squared error is (G - 1) / G times the sum of squared differences to their mean. It needs no
    draw with repetitions, which some numbers do not stand.

    Args:
        whole: The number of the whole set.
        left_out_G: Of the set without each group.

    """
    groups = len(left_out_G)
    squares = (left_out_G - left_out_G.mean()) ** 2
    error = float(np.sqrt(squares.sum() * (groups - 1) / groups))
    return whole - Z * error, whole + Z * error

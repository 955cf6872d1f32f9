"""Random timesteps and noise of a training step, which a resumed run draws again.

Shape suffixes: B rows of a batch, C latent channels, H W latent size.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

# As ``row_draws``.
Draw = Callable[
    [int, int, int, Tensor, tuple[int, int], tuple[int, int, int]], tuple[Tensor, Tensor]
]

# Streams of the terms: no two share their randomness.
SCORE_STREAM = 16
DISCRIMINATOR_STREAM = 17
REAL_STREAM = 18
FAKE_STREAM = 32  # and those above, one for each step of the fake score


def row_draws(
    seed: int,
    stream: int,
    step: int,
    rows: Tensor,
    timesteps: tuple[int, int],
    shape_CHW: tuple[int, int, int],
) -> tuple[Tensor, Tensor]:
    """A timestep and standard normal noise for each row.

    They depend on (seed, stream, step, row) alone. So a checkpoint needs no state of a random
    generator, and a row draws the same in whichever process or micro-batch it is.

    Args:
        seed: Of the recipe.
        stream: Of the term.
        step: Of the training.
        rows: Examples, int64 [B].
        timesteps: First and last timestep that may be drawn.
        shape_CHW: Of a row's latents.

    Returns:
        Timesteps int64 [B], and noise float32 [B, C, H, W], on the CPU.

    Example:
        >>> timestep_B, noise_BCHW = row_draws(0, 16, 5, torch.arange(2), (20, 980), (4, 8, 8))
        >>> timestep_B.shape, noise_BCHW.shape
        (torch.Size([2]), torch.Size([2, 4, 8, 8]))

    """
    first, last = timesteps
    drawn_timesteps = []
    drawn_noise = []
    for row in rows.tolist():
        rng = np.random.default_rng((seed, stream, step, row))
        drawn_timesteps.append(int(rng.integers(first, last + 1)))
        drawn_noise.append(rng.standard_normal(shape_CHW, np.float32))
    return torch.tensor(drawn_timesteps), torch.from_numpy(np.stack(drawn_noise))

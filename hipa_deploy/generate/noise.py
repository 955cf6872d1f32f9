"""The arithmetic of one diffusion step, in numpy.

Shape suffixes throughout the package: B batch, L tokens, D width, C channels, H W latent or image size.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from hipa_deploy.errors import HipaError

SEED_LIMIT = 2**63


def check_seeds(first: int, count: int = 1) -> None:
    """Raise HipaError unless seeds ``first`` to ``first + count - 1`` are all in [0, 2**63)."""
    if first < 0 or first + count > SEED_LIMIT:
        raise HipaError(
            f"seed {first} (and the {count - 1} after it) is out of range. Expected 0 <= seed < 2**63."
        )


def initial_noise(seeds: Sequence[int], shape_CHW: tuple[int, int, int]) -> np.ndarray:
    """Standard normal noise, one independent stream a seed: float32 [B, C, H, W].

    Counter-based (Philox 4x64, Salmon et al. 2011) with Box-Muller in float64, so an image depends on its seed
    alone: not on the backend, nor on the batch it was made in, nor on numpy's version.

    Raises:
        HipaError: a seed outside [0, 2**63).

    """
    return np.stack([_noise(seed, shape_CHW) for seed in seeds])


def _noise(seed: int, shape_CHW: tuple[int, int, int]) -> np.ndarray:
    check_seeds(seed)
    count = int(np.prod(shape_CHW))
    raw = np.random.Philox(key=seed).random_raw(2 * ((count + 1) // 2))
    uniform = ((raw >> np.uint64(11)) + 0.5) * 2.0**-53  # in (0, 1): the logarithm stays finite
    radius, angle = np.sqrt(-2 * np.log(uniform[0::2])), 2 * np.pi * uniform[1::2]
    pairs = np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1)
    return pairs.reshape(-1)[:count].reshape(shape_CHW).astype(np.float32)

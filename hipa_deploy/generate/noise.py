"""The noise that an image starts from, equal on every backend and machine.

Shape suffixes: B batch, C latent channels, H W latent height and width.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from hipa_deploy.bundle.manifest import Layout, OneStep
from hipa_deploy.errors import HipaError, RequestError, brief

SEED_LIMIT = 2**63


def check_seeds(first: int, count: int = 1) -> None:
    """Check the seeds ``first`` to ``first + count - 1``.

    Raises:
        HipaError: one is not in [0, 2**63).

    """
    if not isinstance(first, int | np.integer) or isinstance(first, bool):
        raise HipaError(
            f"seed is {brief(first)}. Expected a whole number; for a seed of its own for each "
            "prompt call pipe.generate([(prompt, seed), …])."
        )
    if first < 0 or int(first) + count > SEED_LIMIT:
        last = f" (and the {count - 1} after it)" if count > 1 else ""
        raise RequestError(
            f"seed {first}{last} is out of range. Expected 0 <= seed < 2**63.", argument="seed"
        )


def initial_noise(seeds: Sequence[int], shape_CHW: tuple[int, int, int]) -> np.ndarray:
    """Standard normal noise, float32 [B, C, H, W]: one independent stream a seed.

    An image depends on its seed alone: not on the backend, nor on the batch that it was made in,
    nor on numpy's version. That is why neither numpy's own normal generator nor a backend's is
    used.

    Source: the counter-based generator Philox 4x64 (Salmon et al. 2011) with the Box-Muller
    transform in float64.

    Args:
        seeds: B numbers in [0, 2**63).
        shape_CHW: latent channels, height and width.

    Raises:
        HipaError: a seed out of range.

    Example:
        >>> initial_noise([0, 1], (4, 64, 64)).shape
        (2, 4, 64, 64)

    """
    return np.stack([_noise(seed, shape_CHW) for seed in seeds])


def bundle_noise(
    seeds: Sequence[int], shape_CHW: tuple[int, int, int], step: OneStep, layout: Layout
) -> np.ndarray:
    """The tensor 'noise' of a bundle's path, float32 [B, C, H, W].

    It is ``initial_noise``. A method of others may scale it: the graphs of the layout onestep do
    that themselves; a generic UNet, which is as diffusers has it, takes the scaled noise.

    Args:
        seeds: B numbers in [0, 2**63).
        shape_CHW: latent channels, height and width.
        step: the constants of the bundle's step.
        layout: of the bundle.

    Raises:
        HipaError: a seed out of range.

    """
    noise_BCHW = initial_noise(seeds, shape_CHW)
    if layout == "generic" and step.noise_scale != 1:
        return noise_BCHW * np.float32(step.noise_scale)
    return noise_BCHW


def _noise(seed: int, shape_CHW: tuple[int, int, int]) -> np.ndarray:
    check_seeds(seed)
    count = int(np.prod(shape_CHW))

    # Two uniform numbers make two normal ones, so an odd count draws one more. The upper 53 bits,
    # moved by half a step, lie in (0, 1): the logarithm stays finite.
    raw = np.random.Philox(key=seed).random_raw(2 * ((count + 1) // 2))
    uniform = ((raw >> np.uint64(11)) + 0.5) * 2.0**-53

    # Box-Muller. In float64, because the logarithm of a float32 near zero has few digits.
    radius = np.sqrt(-2 * np.log(uniform[0::2]))
    angle = 2 * np.pi * uniform[1::2]
    pairs = np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1)
    return pairs.reshape(-1)[:count].reshape(shape_CHW).astype(np.float32)

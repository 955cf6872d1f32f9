"""Latents that a network overflowed are noticed before anyone takes their image for one.

The decoder makes uint8 of NaN without a word: a black image, or a grey one.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from hipa_deploy.errors import HipaError
from hipa_deploy.generate.jobs.image_job import ImageJob


class NotFiniteError(HipaError):
    """A network gave NaN or infinity, so there is no image. The request is not at fault."""


def check_finite(
    values_BCHW: np.ndarray, jobs: Sequence[ImageJob], what: str, backend: str
) -> None:
    """Refuse NaN and infinity in what a network made of a batch.

    Args:
        values_BCHW: floats [B, C, H, W], an entry a job: latents, or pixels before they are uint8.
        jobs: what was to be made.
        what: what gave the values, for the message: 'the one step'.
        backend: on which it ran.

    Raises:
        NotFiniteError: it names the first image that is not finite, and says how many are not.

    Example:
        >>> check_finite(np.zeros((1, 4, 8, 8), np.float32), [job], "the one step", "rtx")

    """
    finite_B = np.isfinite(values_BCHW).all(axis=(1, 2, 3))
    if finite_B.all():
        return
    bad = np.flatnonzero(~finite_B)
    first = jobs[bad[0]]
    raise NotFiniteError(
        f"{what} gives NaN or infinity on backend {backend} in {len(bad)} of {len(finite_B)} "
        f"images, first for {first.prompt[:60]!r} with seed {first.seed}. Nothing was made. Export "
        "the bundle with --dtype fp32, or use another backend; for an engine, "
        "hipa-doctor --bisect finds the layer."
    )

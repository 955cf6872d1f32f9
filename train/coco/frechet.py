"""The Fréchet distance of two sets of features, and its spread.

Shapes: N images, D features, G groups of the jackknife.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from hipa_deploy.errors import HipaError

GROUPS = 20  # of the jackknife


@dataclass(frozen=True)
class Moments:
    """Mean and covariance of a set of features, as FID takes them.

    Attributes:
        mean_D: float64.
        covariance_DD: float64, unbiased (divided by N - 1), as in clean-fid and pytorch-fid.

    """

    mean_D: np.ndarray
    covariance_DD: np.ndarray

    @classmethod
    def of(cls, features_ND: np.ndarray) -> Moments:
        """The moments of features, computed in float64.

        Raises:
            HipaError: fewer than two rows, or values that are not finite.

        """
        if len(features_ND) < 2:
            raise HipaError(f"features of {len(features_ND)} images. Expected at least 2.")
        if not np.isfinite(features_ND).all():
            raise HipaError("features are not finite. Check the images and the network's file.")
        values_ND = features_ND.astype(np.float64)
        mean_D = values_ND.mean(axis=0)
        centred_ND = values_ND - mean_D
        return cls(mean_D, centred_ND.T @ centred_ND / (len(values_ND) - 1))

    @cached_property
    def root_DD(self) -> np.ndarray:
        """The symmetric square root of the covariance."""
        values_D, vectors_DD = np.linalg.eigh(self.covariance_DD)
        roots_D = np.sqrt(values_D.clip(min=0))  # rounding may leave zeros a little negative
        root: np.ndarray = (vectors_DD * roots_D) @ vectors_DD.T
        return root


def frechet_distance(reference: Moments, other: Moments) -> float:
    """The squared Fréchet distance of two normal distributions with these moments.

    Heusel et al. 2017, arXiv 1706.08500, equation 6::

        d = |m1 - m2|^2 + Tr(C1) + Tr(C2) - 2 Tr((C1 C2)^(1/2))

    The last trace is that of (R C2 R)^(1/2) with R = C1^(1/2), whose eigenvalues are real: no
    square root of a matrix without symmetry is needed, and nothing is added to singular ones.

    Args:
        reference: of the real images; its root is computed once.
        other: of the generated ones.

    Returns:
        0 for equal moments, larger the more they differ.

    """
    difference_D = reference.mean_D - other.mean_D
    root_DD = reference.root_DD
    values_D = np.linalg.eigvalsh(root_DD @ other.covariance_DD @ root_DD)
    cross = np.sqrt(values_D.clip(min=0)).sum()
    traces = np.trace(reference.covariance_DD) + np.trace(other.covariance_DD)
    return float(difference_D @ difference_D + traces - 2 * cross)


def distances_left_out(
    reference: Moments, features_ND: np.ndarray, groups: int = GROUPS
) -> np.ndarray:
    """The distance of the set without each of its groups, float64 [G], for a jackknife.

    A bootstrap would repeat images, which makes a covariance more singular and so every distance
    larger than the set's own.

    Args:
        reference: of the real images.
        features_ND: of the generated ones. Image n is in group n modulo G.
        groups: G, at most N / 2.

    """
    values_ND = features_ND.astype(np.float64)
    centre_D = values_ND.mean(axis=0)
    centred_ND = values_ND - centre_D  # so that no two large sums are subtracted
    products_DD = centred_ND.T @ centred_ND
    sums_D = centred_ND.sum(axis=0)
    distances = []
    for group in range(groups):
        left_out = centred_ND[group::groups]
        count = len(values_ND) - len(left_out)
        mean_D = (sums_D - left_out.sum(axis=0)) / count
        scatter_DD = products_DD - left_out.T @ left_out - count * np.outer(mean_D, mean_D)
        kept = Moments(centre_D + mean_D, scatter_DD / (count - 1))
        distances.append(frechet_distance(reference, kept))
    return np.array(distances)

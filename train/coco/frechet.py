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
        _check(features_ND)
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


def _check(features_ND: np.ndarray) -> None:
    """Raise HipaError for fewer than two rows, or values that are not finite."""
    if len(features_ND) < 2:
        raise HipaError(f"features of {len(features_ND)} images. Expected at least 2.")
    if not np.isfinite(features_ND).all():
        raise HipaError("features are not finite. Check the images and the network's file.")


def frechet_distance(reference: Moments, features_ND: np.ndarray) -> float:
    """The squared Fréchet distance of two sets of features, taken for normal distributions.

    Heusel et al. 2017, arXiv 1706.08500, equation 6::

        d = |m1 - m2|^2 + Tr(C1) + Tr(C2) - 2 Tr((C1 C2)^(1/2))

    The last trace is the sum of the roots of the eigenvalues of C1 C2. Those are the eigenvalues of
    the symmetric R C2 R with R = C1^(1/2), and of the symmetric A C1 A^T with C2 = A^T A, which is
    the smaller one for fewer images than features. So no square root of a matrix without symmetry
    is needed, and nothing is added to a singular one.

    Args:
        reference: of the real images.
        features_ND: of the generated ones.

    Returns:
        0 for equal moments, larger the more they differ.

    Raises:
        HipaError: as ``Moments.of``.

    """
    if len(features_ND) >= features_ND.shape[1]:
        other = Moments.of(features_ND)
        trace = float(np.trace(other.covariance_DD))
        return _distance(reference, other.mean_D, trace, _eigenvalues(reference, other))
    _check(features_ND)
    values_ND = features_ND.astype(np.float64)
    mean_D = values_ND.mean(axis=0)
    factor_ND = (values_ND - mean_D) / np.sqrt(len(values_ND) - 1)
    eigenvalues = np.linalg.eigvalsh(factor_ND @ reference.covariance_DD @ factor_ND.T)
    return _distance(reference, mean_D, float((factor_ND**2).sum()), eigenvalues)


def _eigenvalues(reference: Moments, other: Moments) -> np.ndarray:
    """The eigenvalues of R C2 R, float64 [D]."""
    root_DD = reference.root_DD
    values: np.ndarray = np.linalg.eigvalsh(root_DD @ other.covariance_DD @ root_DD)
    return values


def _distance(
    reference: Moments, mean_D: np.ndarray, trace: float, eigenvalues: np.ndarray
) -> float:
    """The distance to a set with this mean, trace of its covariance, and these eigenvalues."""
    difference_D = reference.mean_D - mean_D
    cross = np.sqrt(eigenvalues.clip(min=0)).sum()
    traces = np.trace(reference.covariance_DD) + trace
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
        groups: G, from 2 to N / 2.

    """
    numbers = np.arange(len(features_ND))
    if len(features_ND) < 2 * features_ND.shape[1]:
        kept = [features_ND[numbers % groups != group] for group in range(groups)]
        return np.array([frechet_distance(reference, rows) for rows in kept])

    # With many images the covariance is the work: that of all images less that of each group.
    values_ND = features_ND.astype(np.float64)
    centre_D = values_ND.mean(axis=0)
    values_ND -= centre_D  # so that no two large sums are subtracted
    products_DD = values_ND.T @ values_ND
    distances = []
    for group in range(groups):
        left_out = values_ND[group::groups]
        count = len(values_ND) - len(left_out)
        mean_D = -left_out.sum(axis=0) / count
        scatter_DD = products_DD - left_out.T @ left_out - count * np.outer(mean_D, mean_D)
        kept_set = Moments(centre_D + mean_D, scatter_DD / (count - 1))
        trace = float(np.trace(kept_set.covariance_DD))
        eigenvalues = _eigenvalues(reference, kept_set)
        distances.append(_distance(reference, kept_set.mean_D, trace, eigenvalues))
    return np.array(distances)

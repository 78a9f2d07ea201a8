"""How far samples are from data, by numbers that need no model of either."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from ebjax.evaluation.checks import flat_examples
from ebjax.samplers import diagnostics

__all__ = ["flat_pair", "frechet_distance", "maximum_mean_discrepancy"]


def flat_pair(
    first: npt.ArrayLike,
    second: npt.ArrayLike,
    names: tuple[str, str] = ("first", "second"),
    minimum: int = 2,
) -> tuple[np.ndarray, np.ndarray]:
    """Two samples as [N, D] and [M, D], checked to be finite and of one size D.

    Raises:
      ValueError: naming the sample and what is wrong with it.
    """
    first = flat_examples(names[0], first, minimum)
    second = flat_examples(names[1], second, minimum)
    if first.shape[1] != second.shape[1]:
        raise ValueError(
            f"Examples of {names[0]} have {first.shape[1]} components and those of {names[1]} "
            f"{second.shape[1]}; they must have the same."
        )
    return first, second


def frechet_distance(first: npt.ArrayLike, second: npt.ArrayLike) -> float:
    """Squared Fréchet distance between the Gaussians that fit two samples.

        |m1 - m2|² + tr(S1 + S2 - 2 (S1^½ S2 S1^½)^½)

    On pixels it compares means and covariances of the pixels and nothing else: a sampler that
    starts from a Gaussian fitted to the data is near 0 without having learned anything.

    Args:
      first: [N, ...], flattened to [N, D].
      second: [M, ...], flattened to [M, D].

    Returns:
      The distance, in squared units of the examples, at least 0.

    Raises:
      ValueError: if a sample has fewer than two examples or is not finite, or sizes differ.

    >>> float(frechet_distance(np.eye(3), np.eye(3)))
    0.0
    """
    first, second = flat_pair(first, second)
    covariance_1, covariance_2 = np.cov(first.T), np.cov(second.T)
    values, vectors = np.linalg.eigh(np.atleast_2d(covariance_1))
    root = (vectors * np.sqrt(np.maximum(values, 0.0))) @ vectors.T
    cross = np.linalg.eigvalsh(root @ np.atleast_2d(covariance_2) @ root)
    trace = np.trace(np.atleast_2d(covariance_1)) + np.trace(np.atleast_2d(covariance_2))
    mean_part = np.sum((first.mean(axis=0) - second.mean(axis=0)) ** 2)
    distance = mean_part + trace - 2.0 * np.sqrt(np.maximum(cross, 0.0)).sum()
    # The difference of two traces of this size cannot resolve less than this.
    return 0.0 if distance < 1e-12 * trace else float(distance)


def maximum_mean_discrepancy(first: npt.ArrayLike, second: npt.ArrayLike) -> float:
    """Unbiased squared MMD of two samples on the host, by ``diagnostics.maximum_mean_discrepancy``.

        mean_{i≠j} k(x_i, x_j) + mean_{i≠j} k(y_i, y_j) - 2 mean_{ij} k(x_i, y_j)

    with ``k(x, y) = exp(-|x - y|² / m)``, m the median squared distance. Zero in expectation for
    equal laws; it may be slightly negative.

    Args:
      first: [N, ...], flattened to [N, D].
      second: [M, ...], flattened to [M, D].

    Returns:
      The discrepancy, squared, as a number that can be written to JSON.

    Raises:
      ValueError: if a sample has fewer than two examples or is not finite, or sizes differ.

    >>> maximum_mean_discrepancy(np.eye(3), np.eye(3) + 9.0) > 0.5
    True
    """
    return float(diagnostics.maximum_mean_discrepancy(*flat_pair(first, second)))

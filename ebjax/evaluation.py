"""How far samples are from data, by numbers that need no model of either."""

from __future__ import annotations

import numpy as np

__all__ = ["frechet_distance", "maximum_mean_discrepancy"]


def _flat(name: str, sample: np.ndarray) -> np.ndarray:
    sample = np.asarray(sample, np.float64)
    if sample.ndim < 2 or len(sample) < 2:
        raise ValueError(f"{name} has shape {sample.shape}; give at least two examples, [N, ...].")
    return sample.reshape(len(sample), -1)


def frechet_distance(first: np.ndarray, second: np.ndarray) -> float:
    """Squared Fréchet distance between the Gaussians that fit two samples.

        |m1 - m2|² + tr(S1 + S2 - 2 (S1^½ S2 S1^½)^½)

    On pixels it compares means and covariances of the pixels and nothing else: a sampler that
    starts from a Gaussian fitted to the data is near 0 without having learned anything.

    Args:
      first: [N, ...], flattened to [N, D].
      second: [M, ...], flattened to [M, D].

    Returns:
      The distance, in squared units of the examples, at least 0.

    >>> float(frechet_distance(np.eye(3), np.eye(3)))
    0.0
    """
    first, second = _flat("first", first), _flat("second", second)
    covariance_1, covariance_2 = np.cov(first.T), np.cov(second.T)
    values, vectors = np.linalg.eigh(np.atleast_2d(covariance_1))
    root = (vectors * np.sqrt(np.maximum(values, 0.0))) @ vectors.T
    cross = np.linalg.eigvalsh(root @ np.atleast_2d(covariance_2) @ root)
    trace = np.trace(np.atleast_2d(covariance_1)) + np.trace(np.atleast_2d(covariance_2))
    mean_part = np.sum((first.mean(axis=0) - second.mean(axis=0)) ** 2)
    distance = mean_part + trace - 2.0 * np.sqrt(np.maximum(cross, 0.0)).sum()
    # The difference of two traces of this size cannot resolve less than this.
    return 0.0 if distance < 1e-12 * trace else float(distance)


def maximum_mean_discrepancy(first: np.ndarray, second: np.ndarray) -> float:
    """Unbiased squared MMD with ``k(x, y) = exp(-|x - y|² / m)``, m the median squared distance.

        mean_{i≠j} k(x_i, x_j) + mean_{i≠j} k(y_i, y_j) - 2 mean_{ij} k(x_i, y_j)

    Zero in expectation for equal laws; it may be slightly negative.

    Gretton et al., "A kernel two-sample test", JMLR 13 (2012).

    Args:
      first: [N, ...].
      second: [M, ...].
    """
    first, second = _flat("first", first), _flat("second", second)
    pool = np.concatenate([first, second])
    squares = np.sum(pool**2, axis=1)
    distances = np.maximum(squares[:, None] + squares[None] - 2.0 * pool @ pool.T, 0.0)
    off_diagonal = ~np.eye(len(pool), dtype=bool)
    bandwidth = np.median(distances[off_diagonal])
    kernel = np.exp(-distances / max(bandwidth, 1e-300))
    n = len(first)
    within_1, within_2, across = kernel[:n, :n], kernel[n:, n:], kernel[:n, n:]

    def mean_off_diagonal(block):
        size = len(block)
        return (block.sum() - np.trace(block)) / (size * (size - 1))

    return float(mean_off_diagonal(within_1) + mean_off_diagonal(within_2) - 2.0 * across.mean())

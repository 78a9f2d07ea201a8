"""Where samples lie among the data: memorised examples, and modes found and missed.

    d(x, A) = min_{a ∈ A} |x - a|
    memorisation   d(sample, training) against d(held out, training)

Samples of a model that has learned the law lie as far from the training set as held-out examples
do; copies lie nearer, blurred or broken samples may lie farther.

Meehan, Chaudhuri and Dasgupta, "A non-parametric test to detect data-copying in generative models",
AISTATS 2020.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from ebjax.evaluation.checks import flat_examples
from ebjax.evaluation.distances import flat_pair

__all__ = ["memorization_figures", "modes_covered", "nearest_neighbors"]


def nearest_neighbors(
    points: npt.ArrayLike, reference: npt.ArrayLike, *, num_neighbors: int = 1
) -> tuple[np.ndarray, np.ndarray]:
    """The nearest reference points of each point, in Euclidean distance.

    Args:
      points: [N, ...].
      reference: [M, ...].
      num_neighbors: K, at most M.

    Returns:
      ``(distances, indices)``, both [N, K], the nearest first.

    Raises:
      ValueError: if there are fewer than K reference points, a value is not finite, or sizes
        differ.

    >>> distances, indices = nearest_neighbors([[0.0], [5.0]], [[1.0], [7.0]])
    >>> distances.tolist(), indices.tolist()
    ([[1.0], [2.0]], [[0], [1]])
    """
    from sklearn.neighbors import NearestNeighbors

    points, reference = flat_pair(points, reference, ("points", "reference"), 1)
    if not 1 <= num_neighbors <= len(reference):
        raise ValueError(
            f"num_neighbors is {num_neighbors}; it must be from 1 to the {len(reference)} "
            "reference points."
        )
    return NearestNeighbors(n_neighbors=num_neighbors).fit(reference).kneighbors(points)


def memorization_figures(
    samples: npt.ArrayLike, training: npt.ArrayLike, held_out: npt.ArrayLike
) -> dict[str, float]:
    """Whether samples lie nearer to the training set than held-out examples do.

    Args:
      samples: [N, ...] of the model.
      training: [M, ...].
      held_out: [L, ...], of the same law as ``training``.

    Returns:
      ``nearest_distance_samples`` and ``nearest_distance_held_out`` (medians of the distance to
      the training set), ``nearest_distance_ratio`` (of these; well below 1: copies),
      ``share_of_copies`` (samples nearer than 99% of the held-out examples are; 0.01 is
      expected), and ``copy_p_value`` (of held-out examples being farther by rank, one-sided
      Mann and Whitney).

    Raises:
      ValueError: if a set has fewer than two examples or is not finite, or sizes differ.

    >>> rng = np.random.default_rng(0)
    >>> training, held_out, samples = rng.normal(size=(3, 300, 2))
    >>> memorization_figures(training[:50], training, held_out)["share_of_copies"]
    1.0
    """
    from scipy.stats import mannwhitneyu

    flat_examples("samples", samples)
    flat_examples("held_out", held_out)
    of_samples = nearest_neighbors(samples, training)[0][:, 0]
    of_held_out = nearest_neighbors(held_out, training)[0][:, 0]
    medians = float(np.median(of_samples)), float(np.median(of_held_out))
    if medians[1] == 0.0:
        raise ValueError("Half of the held-out examples are in the training set.")
    return {
        "nearest_distance_samples": medians[0],
        "nearest_distance_held_out": medians[1],
        "nearest_distance_ratio": medians[0] / medians[1],
        "share_of_copies": float(np.mean(of_samples < np.quantile(of_held_out, 0.01))),
        "copy_p_value": float(mannwhitneyu(of_samples, of_held_out, alternative="less").pvalue),
    }


def modes_covered(
    samples: npt.ArrayLike,
    modes: npt.ArrayLike,
    *,
    radius: float,
    weights: npt.ArrayLike | None = None,
    least_share: float = 0.1,
) -> dict[str, float]:
    """How many known modes the samples reach, and how evenly.

    Args:
      samples: [N, ...].
      modes: [K, ...], as a ``Target`` has them.
      radius: a sample belongs to its nearest mode if it lies within this distance.
      weights: [K] shares that the law gives its modes; equal by default.
      least_share: a mode counts as covered with this fraction of its share of the samples, in
        (0, 1].

    Returns:
      ``modes_covered``, ``num_modes``, ``share_near_a_mode`` (of all samples) and
      ``mode_total_variation`` (between the shares of the modes among those near one, and
      ``weights``; 1 if there are none).

    Raises:
      ValueError: if an option is out of range or shapes do not agree.

    >>> samples = [[0.0], [0.1], [5.0], [9.0]]
    >>> figures = modes_covered(samples, [[0.0], [5.0], [-5.0]], radius=1.0)
    >>> figures["modes_covered"], figures["share_near_a_mode"]
    (2, 0.75)
    """
    if not radius > 0.0 or not 0.0 < least_share <= 1.0:
        raise ValueError(
            f"radius is {radius} and least_share {least_share}; radius must be positive and "
            "least_share in (0, 1]."
        )
    distances, indices = nearest_neighbors(samples, modes)
    num_modes = len(np.asarray(modes))
    shares = np.full(num_modes, 1.0 / num_modes) if weights is None else np.asarray(weights, float)
    if shares.shape != (num_modes,) or shares.min() < 0.0 or not np.isclose(shares.sum(), 1.0):
        raise ValueError(f"weights is {shares}; give one share a mode, with sum 1.")
    is_near = distances[:, 0] <= radius
    counts = np.bincount(indices[is_near, 0], minlength=num_modes)
    needed = np.maximum(least_share * shares * len(distances), 1e-9)
    found = counts / max(counts.sum(), 1)
    return {
        "modes_covered": int(np.sum(counts >= needed)),
        "num_modes": num_modes,
        "share_near_a_mode": float(is_near.mean()),
        "mode_total_variation": float(0.5 * np.abs(found - shares).sum()) if is_near.any() else 1.0,
    }

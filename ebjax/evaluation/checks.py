"""What every figure of merit asks of its input: enough examples, all finite, shapes that agree."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

__all__ = ["check_labels", "check_scores", "flat_examples"]


def _check_finite(name: str, values: np.ndarray) -> None:
    bad = int(np.size(values) - np.isfinite(values).sum())
    if bad:
        raise ValueError(
            f"{name} has {bad} of {np.size(values)} values that are NaN or infinite; all must be "
            "finite."
        )


def flat_examples(name: str, examples: npt.ArrayLike, minimum: int = 2) -> np.ndarray:
    """[N, ...] -> [N, D] float64, checked to be finite and to hold at least ``minimum`` examples.

    Raises:
      ValueError: naming the argument and what is wrong with it.

    >>> flat_examples("images", np.zeros((3, 2, 2))).shape
    (3, 4)
    """
    examples = np.asarray(examples, np.float64)
    if examples.ndim < 2 or len(examples) < minimum:
        raise ValueError(
            f"{name} has shape {examples.shape}; give at least {minimum} examples, [N, ...]."
        )
    _check_finite(name, examples)
    return examples.reshape(len(examples), -1)


def check_scores(name: str, scores: npt.ArrayLike, minimum: int = 1) -> np.ndarray:
    """[N] float64, checked to be finite and to hold at least ``minimum`` numbers.

    Raises:
      ValueError: naming the argument and what is wrong with it.
    """
    scores = np.asarray(scores, np.float64)
    if scores.ndim != 1 or len(scores) < minimum:
        raise ValueError(
            f"{name} has shape {scores.shape}; give at least {minimum} numbers, one an example, "
            "[N]."
        )
    _check_finite(name, scores)
    return scores


def check_labels(
    labels: npt.ArrayLike, num_examples: int, num_classes: int | None = None
) -> np.ndarray:
    """[N] integers, one an example, in [0, K) where K is given.

    Raises:
      ValueError: saying what is wrong.
    """
    labels = np.asarray(labels)
    if labels.shape != (num_examples,):
        raise ValueError(
            f"labels has shape {labels.shape}; give one an example, ({num_examples},)."
        )
    if not np.issubdtype(labels.dtype, np.integer):
        raise ValueError(f"labels has type {labels.dtype}; give integers.")
    if labels.size and (labels.min() < 0 or (num_classes and labels.max() >= num_classes)):
        raise ValueError(
            f"labels lie between {labels.min()} and {labels.max()}; they must be from 0 to "
            + ("the number of classes." if num_classes is None else f"{num_classes - 1}.")
        )
    return labels

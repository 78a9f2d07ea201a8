"""Classifiers: accuracy, log-likelihood and calibration.

    confidence c(x) = max_k p(k | x);   bins b of confidence with n_b of N examples
    accuracy_b = share of right answers in b,   confidence_b = mean confidence in b
    ECE = Σ_b (n_b / N) |accuracy_b - confidence_b|
    NLL = -mean log p(y | x)   [nats],   Brier = mean Σ_k (p(k | x) - 1[k = y])²

Shapes: ``logits`` and ``probabilities`` [N, K] of N examples and K classes, ``labels`` [N].

Guo, Pleiss, Sun and Weinberger, "On calibration of modern neural networks", ICML 2017.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt
from scipy.special import log_softmax

from ebjax.evaluation.checks import check_labels, flat_examples

__all__ = [
    "ReliabilityCurve",
    "classification_figures",
    "expected_calibration_error",
    "reliability_curve",
]

_ROUNDING = 1e-3  # what float32 probabilities of many classes may be off by in their sum


class ReliabilityCurve(NamedTuple):
    """Confidence against accuracy; only bins that hold an example appear.

    Attributes:
      confidence: [bins] mean confidence, increasing.
      accuracy: [bins] share of right answers.
      num_examples: [bins] how many.
    """

    confidence: np.ndarray
    accuracy: np.ndarray
    num_examples: np.ndarray


def _check_probabilities(probabilities: npt.ArrayLike) -> np.ndarray:
    probabilities = flat_examples("probabilities", probabilities, 1)
    totals = probabilities.sum(axis=1)
    if probabilities.min() < 0.0 or np.abs(totals - 1.0).max() > _ROUNDING:
        raise ValueError(
            f"probabilities has rows that sum to between {totals.min():.4g} and "
            f"{totals.max():.4g}, smallest entry {probabilities.min():.4g}; each row must be a law "
            "over the classes."
        )
    return probabilities


def reliability_curve(
    probabilities: npt.ArrayLike,
    labels: npt.ArrayLike,
    *,
    num_bins: int = 15,
    bins: Literal["width", "count"] = "width",
) -> ReliabilityCurve:
    """Accuracy of the predictions made with each confidence.

    Args:
      probabilities: [N, K], rows sum to 1.
      labels: [N] integers in [0, K).
      num_bins: number of bins.
      bins: ``"width"`` cuts [0, 1] into equal parts, ``"count"`` gives each bin the same number of
        examples, up to one and up to equal confidences, which stay together.

    Returns:
      A ``ReliabilityCurve``.

    Raises:
      ValueError: if a row is no law, a label no class, or an option out of range.

    >>> probabilities = np.array([[0.9, 0.1], [0.9, 0.1], [0.4, 0.6]])
    >>> curve = reliability_curve(probabilities, np.array([0, 1, 1]), num_bins=10)
    >>> curve.accuracy.tolist(), curve.num_examples.tolist()
    ([1.0, 0.5], [1, 2])
    """
    if num_bins < 1:
        raise ValueError(f"num_bins is {num_bins}; it must be at least 1.")
    probabilities = _check_probabilities(probabilities)
    labels = check_labels(labels, *probabilities.shape)
    confidence = probabilities.max(axis=1)
    is_right = probabilities.argmax(axis=1) == labels
    if bins == "width":
        # Closed on the right, so that a confidence of 1 falls into the last bin.
        index = np.clip(np.ceil(confidence * num_bins).astype(int) - 1, 0, num_bins - 1)
    elif bins == "count":
        cuts = np.arange(1, num_bins) * len(confidence) // num_bins
        index = np.searchsorted(np.sort(confidence)[cuts], confidence, side="right")
    else:
        raise ValueError(f"bins is {bins!r}; it must be 'width' or 'count'.")
    count = np.bincount(index, minlength=num_bins)
    used = count > 0
    sums = [np.bincount(index, values, num_bins)[used] for values in (confidence, is_right)]
    return ReliabilityCurve(sums[0] / count[used], sums[1] / count[used], count[used])


def expected_calibration_error(
    probabilities: npt.ArrayLike,
    labels: npt.ArrayLike,
    *,
    num_bins: int = 15,
    bins: Literal["width", "count"] = "width",
) -> float:
    """Mean distance between confidence and accuracy, over bins of confidence; 0 is calibrated.

    It is biased upwards: n examples in a bin give a calibrated predictor about
    ``sqrt(2 c (1 - c) / (π n))`` there. Compare values of equal N and bins only.

    Args:
      probabilities: [N, K], rows sum to 1.
      labels: [N] integers in [0, K).
      num_bins: number of bins.
      bins: as for ``reliability_curve``.

    Returns:
      The error, in [0, 1].

    Raises:
      ValueError: if a row is no law, a label no class, or an option out of range.

    >>> always_sure = np.array([[1.0, 0.0]] * 4)
    >>> expected_calibration_error(always_sure, np.array([0, 0, 0, 1]))
    0.25
    """
    curve = reliability_curve(probabilities, labels, num_bins=num_bins, bins=bins)
    weights = curve.num_examples / curve.num_examples.sum()
    return float(np.sum(weights * np.abs(curve.accuracy - curve.confidence)))


def classification_figures(
    logits: npt.ArrayLike, labels: npt.ArrayLike, *, num_bins: int = 15
) -> dict[str, float]:
    """The usual figures of a classifier, by name.

    Args:
      logits: [N, K], unnormalised log probabilities (log probabilities are such); -E(x, k) of a
        joint energy.
      labels: [N] integers in [0, K).
      num_bins: bins of the calibration error.

    Returns:
      ``accuracy``, ``negative_log_likelihood`` [nats], ``expected_calibration_error`` and
      ``brier_score``.

    Raises:
      ValueError: if shapes do not agree, a logit is not finite or a label is no class.

    >>> figures = classification_figures(np.zeros((4, 2)), np.array([0, 0, 1, 1]))
    >>> figures["accuracy"], round(figures["negative_log_likelihood"], 4)
    (0.5, 0.6931)
    """
    logits = np.asarray(logits)
    if logits.ndim != 2:
        raise ValueError(f"logits has shape {logits.shape}; give one row an example, [N, K].")
    logits = flat_examples("logits", logits, 1)
    labels = check_labels(labels, *logits.shape)
    log_probs = log_softmax(logits, axis=1)
    probabilities = np.exp(log_probs)
    hits = np.arange(logits.shape[1]) == labels[:, None]
    return {
        "accuracy": float(np.mean(logits.argmax(axis=1) == labels)),
        "negative_log_likelihood": float(-log_probs[hits].mean()),
        "expected_calibration_error": expected_calibration_error(
            probabilities, labels, num_bins=num_bins
        ),
        "brier_score": float(np.square(probabilities - hits).sum(axis=1).mean()),
    }

"""Out-of-distribution detection: how well a score tells two sets of examples apart.

    score s(x), such as an energy: higher is less like the data;   accept x where s(x) <= τ
    true positive rate   TPR(τ) = P(s(x_in) <= τ)
    false positive rate  FPR(τ) = P(s(x_out) <= τ)
    AUROC = P(s(x_in) < s(x_out)) + P(s(x_in) = s(x_out)) / 2

For s normal with unit variance and means d' apart: AUROC = Φ(d' / √2), FPR at TPR q = Φ(z_q - d').

Shapes: ``scores_in`` [N] of examples like the data, ``scores_out`` [M] of others.

Hendrycks and Gimpel, "A baseline for detecting misclassified and out-of-distribution examples in
neural networks", ICLR 2017. Liu, Wang, Owens and Li, "Energy-based out-of-distribution detection",
NeurIPS 2020.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from ebjax.evaluation.checks import check_scores

__all__ = ["fpr_at_tpr", "out_of_distribution_figures"]


def fpr_at_tpr(scores_in: npt.ArrayLike, scores_out: npt.ArrayLike, *, tpr: float = 0.95) -> float:
    """Share of outliers accepted where a share ``tpr`` of the data is; lower is better.

    The threshold is the smallest one that accepts at least the share ``tpr`` of ``scores_in``. A
    score that cannot tell the sets apart has about ``tpr`` itself.

    Args:
      scores_in: [N], higher is less like the data: energies, or negated log densities.
      scores_out: [M], of outliers.
      tpr: in (0, 1].

    Returns:
      The share, in [0, 1].

    Raises:
      ValueError: if a set is empty or not finite, or if ``tpr`` is out of range.

    >>> fpr_at_tpr([0.0, 1.0, 2.0, 3.0], [1.5, 4.0], tpr=0.75)
    0.5
    """
    if not 0.0 < tpr <= 1.0:
        raise ValueError(f"tpr is {tpr}; it must be above 0 and at most 1.")
    scores_in, scores_out = (
        check_scores("scores_in", scores_in),
        check_scores("scores_out", scores_out),
    )
    # The rank is rounded before the ceiling: 0.95 * 100 is a little above 95 in floating point.
    rank = int(np.ceil(np.round(tpr * len(scores_in), 9)))
    threshold = np.sort(scores_in)[rank - 1]
    return float(np.mean(scores_out <= threshold))


def out_of_distribution_figures(
    scores_in: npt.ArrayLike, scores_out: npt.ArrayLike
) -> dict[str, float]:
    """The usual figures of a detector, by name.

    Args:
      scores_in: [N], higher is less like the data: energies, or negated log densities.
      scores_out: [M], of outliers.

    Returns:
      ``auroc``: 1 is perfect and 0.5 is chance. ``aupr_in`` and ``aupr_out``: average precision
      with the data, and with the outliers, as what is looked for; chance is N / (N + M) and
      M / (N + M). ``fpr95``: ``fpr_at_tpr`` at 0.95, 0 is perfect.

    Raises:
      ValueError: if a set is empty or not finite.

    >>> figures = out_of_distribution_figures([0.0, 1.0, 2.0, 4.0], [3.0, 5.0])
    >>> figures["auroc"], figures["fpr95"]
    (0.875, 0.5)
    """
    from sklearn.metrics import average_precision_score, roc_auc_score

    scores_in, scores_out = (
        check_scores("scores_in", scores_in),
        check_scores("scores_out", scores_out),
    )
    scores = np.concatenate([scores_in, scores_out])
    is_out = np.repeat([0, 1], [len(scores_in), len(scores_out)])
    return {
        "auroc": float(roc_auc_score(is_out, scores)),
        "aupr_in": float(average_precision_score(1 - is_out, -scores)),
        "aupr_out": float(average_precision_score(is_out, scores)),
        "fpr95": fpr_at_tpr(scores_in, scores_out),
    }

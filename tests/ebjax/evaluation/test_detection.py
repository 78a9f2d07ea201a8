"""Detection figures against the closed forms of two Gaussians and counts by hand."""

import numpy as np
import pytest
from scipy.stats import norm

from ebjax.evaluation import fpr_at_tpr, out_of_distribution_figures

NUM = 20_000


def gaussian_scores(separation, seed=0):
    rng = np.random.default_rng(seed)
    return rng.normal(size=NUM), separation + rng.normal(size=NUM)


def auroc_standard_error(auroc):
    """Hanley and McNeil's upper bound on the variance, for two sets of NUM."""
    return np.sqrt(auroc * (1.0 - auroc) / NUM)


def fpr_standard_error(separation, tpr):
    """Of the share of outliers, plus that of the threshold through the outliers' density."""
    fpr = norm.cdf(norm.ppf(tpr) - separation)
    threshold = np.sqrt(tpr * (1.0 - tpr) / NUM) / norm.pdf(norm.ppf(tpr))
    return np.hypot(
        np.sqrt(fpr * (1.0 - fpr) / NUM), threshold * norm.pdf(norm.ppf(tpr) - separation)
    )


@pytest.mark.parametrize("separation", [0.0, 0.7, 2.0])
def test_two_gaussians(separation):
    figures = out_of_distribution_figures(*gaussian_scores(separation))
    exact = norm.cdf(separation / np.sqrt(2.0))
    assert abs(figures["auroc"] - exact) < 5.0 * auroc_standard_error(exact)
    fpr = norm.cdf(norm.ppf(0.95) - separation)
    assert abs(figures["fpr95"] - fpr) < 5.0 * fpr_standard_error(separation, 0.95)
    # Equal numbers and a score symmetric about its middle: both precisions are the same.
    assert figures["aupr_in"] == pytest.approx(figures["aupr_out"], abs=0.02)


@pytest.mark.parametrize("tpr", [0.5, 0.8, 0.99])
def test_fpr_at_other_levels(tpr):
    fpr = fpr_at_tpr(*gaussian_scores(1.0, seed=1), tpr=tpr)
    assert abs(fpr - norm.cdf(norm.ppf(tpr) - 1.0)) < 5.0 * fpr_standard_error(1.0, tpr)


def test_the_check_sees_the_wrong_side():
    """Planted: outliers' own rate at 95%, and scores with the sign turned around."""
    inside, outside = gaussian_scores(1.0)
    exact, error = norm.cdf(norm.ppf(0.95) - 1.0), 5.0 * fpr_standard_error(1.0, 0.95)
    assert abs(fpr_at_tpr(outside, inside) - exact) > error
    assert abs(fpr_at_tpr(-inside, -outside) - exact) > error
    turned = out_of_distribution_figures(-inside, -outside)["auroc"]
    exact = norm.cdf(1.0 / np.sqrt(2.0))
    assert abs(turned - exact) > 5.0 * auroc_standard_error(exact)


def test_counts_by_hand():
    figures = out_of_distribution_figures([1.0, 2.0, 3.0], [2.5, 3.0, 4.0, 5.0])
    assert figures["auroc"] == pytest.approx((4 + 4 + 2 + 0.5) / 12)
    # Looking for the data from the lowest score up: 1/1, 2/2, then 3 of 5 (the tie counts once).
    assert figures["aupr_in"] == pytest.approx((1.0 + 1.0 + 3 / 5) / 3)
    # From the highest down: 1/1, 2/2, then 3 of 4 (tie), 4 of 5.
    assert figures["aupr_out"] == pytest.approx((1.0 + 1.0 + 3 / 4 + 4 / 5) / 4)
    assert figures["fpr95"] == 0.5


def test_chance_and_perfection():
    perfect = out_of_distribution_figures(np.arange(5.0), 10.0 + np.arange(15.0))
    assert perfect == {"auroc": 1.0, "aupr_in": 1.0, "aupr_out": 1.0, "fpr95": 0.0}
    blind = out_of_distribution_figures(np.zeros(5), np.zeros(15))
    assert blind == {"auroc": 0.5, "aupr_in": 0.25, "aupr_out": 0.75, "fpr95": 1.0}


def test_the_threshold_is_not_moved_by_rounding():
    """95 of 100 are to be accepted, and no more."""
    inside = np.arange(1.0, 101.0)
    assert fpr_at_tpr(inside, np.array([95.0, 95.5, 96.0])) == pytest.approx(1 / 3)
    assert fpr_at_tpr(inside, np.array([100.0, 101.0]), tpr=1.0) == 0.5


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: fpr_at_tpr([], [1.0]), "scores_in has shape"),
        (lambda: fpr_at_tpr([1.0], [np.nan, 1.0]), "scores_out has 1 of 2 values"),
        (lambda: fpr_at_tpr([1.0], [1.0], tpr=95), "tpr is 95"),
        (lambda: out_of_distribution_figures(np.ones((3, 1)), [1.0]), "scores_in has shape"),
        (lambda: out_of_distribution_figures([np.inf], [1.0]), "scores_in has 1 of 1"),
    ],
)
def test_wrong_calls_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()

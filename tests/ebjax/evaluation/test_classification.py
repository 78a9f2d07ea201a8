"""Calibration of predictors that are calibrated, and biased, by construction."""

import numpy as np
import pytest
from scipy.special import softmax

from ebjax.evaluation import (
    classification_figures,
    expected_calibration_error,
    reliability_curve,
)


def two_classes(confidence, num, num_right):
    """``num`` predictions of class 1 with one confidence, ``num_right`` of them right."""
    probabilities = np.tile([1.0 - confidence, confidence], (num, 1))
    return probabilities, (np.arange(num) < num_right).astype(int)


def together(*parts):
    return [np.concatenate(arrays) for arrays in zip(*parts, strict=True)]


@pytest.mark.parametrize("bins", ["width", "count"])
def test_a_calibrated_predictor_has_none(bins):
    data = together(two_classes(0.6, 500, 300), two_classes(0.9, 500, 450))
    assert expected_calibration_error(*data, num_bins=10, bins=bins) == pytest.approx(0.0, abs=1e-9)
    if bins == "width":
        curve = reliability_curve(*data, num_bins=10)
        np.testing.assert_allclose(curve.confidence, [0.6, 0.9])
        np.testing.assert_allclose(curve.accuracy, [0.6, 0.9])
        assert curve.num_examples.tolist() == [500, 500]


def test_a_biased_one_has_its_bias():
    """0.05 too sure on three quarters, 0.3 not sure enough on a quarter."""
    data = together(two_classes(0.95, 300, 270), two_classes(0.6, 100, 90))
    assert expected_calibration_error(*data) == pytest.approx(0.75 * 0.05 + 0.25 * 0.3)


def test_signs_do_not_cancel_between_bins_and_do_within():
    data = together(two_classes(0.9, 100, 80), two_classes(0.6, 100, 70))
    assert expected_calibration_error(*data, num_bins=10) == pytest.approx(0.1)
    assert expected_calibration_error(*data, num_bins=1) == pytest.approx(0.0, abs=1e-9)


def random_predictor(rng, num, sharpness=1.0):
    """Labels drawn from the predicted law; ``sharpness`` above 1 claims more than it knows."""
    logits = rng.normal(size=(num, 3))
    truth = softmax(logits, axis=1)
    labels = (rng.random((num, 1)) > np.cumsum(truth, axis=1)).sum(axis=1)
    return softmax(sharpness * logits, axis=1), np.minimum(labels, 2)


def mean_error_and_expectation(sharpness):
    """Mean ECE of 200 predictors, its standard error, and what binomial noise alone gives."""
    rng = np.random.default_rng(0)
    errors, noise = [], []
    for _ in range(200):
        probabilities, labels = random_predictor(rng, 2_000, sharpness)
        errors.append(expected_calibration_error(probabilities, labels, num_bins=5))
        confidence = probabilities.max(axis=1)
        cell = np.ceil(confidence * 5)
        variances = [np.sum((c := confidence[cell == b]) * (1 - c)) for b in range(1, 6)]
        noise.append(np.sqrt(2.0 / np.pi * np.array(variances)).sum() / 2_000)
    return np.mean(errors), np.std(errors) / np.sqrt(200), np.mean(noise)


def test_a_calibrated_sample_has_what_noise_gives():
    mean, standard_error, expected = mean_error_and_expectation(1.0)
    # The mean absolute value of a binomial is that of a normal to 1% with such counts.
    assert abs(mean - expected) < 5.0 * standard_error + 0.01 * expected
    mean, standard_error, expected = mean_error_and_expectation(1.5)
    assert mean - expected > 5.0 * standard_error


def test_equal_counts():
    probabilities, labels = random_predictor(np.random.default_rng(0), 1_000)
    curve = reliability_curve(probabilities, labels, num_bins=7, bins="count")
    assert curve.num_examples.max() - curve.num_examples.min() <= 1
    assert np.all(np.diff(curve.confidence) > 0.0)


def test_edges_fall_where_they_should():
    """A confidence of exactly 1 is in the last bin, one on an edge in the bin below."""
    probabilities = np.array([[1.0, 0.0], [0.5, 0.5]])
    assert reliability_curve(probabilities, np.zeros(2, int), num_bins=2).num_examples.tolist() == [
        1,
        1,
    ]


def test_figures():
    logits = np.log([[0.7, 0.2, 0.1], [0.1, 0.3, 0.6]])
    figures = classification_figures(logits + 5.0, np.array([0, 1]))
    assert figures["accuracy"] == 0.5
    assert figures["negative_log_likelihood"] == pytest.approx(-np.log([0.7, 0.3]).mean())
    brier = (0.09 + 0.04 + 0.01 + 0.01 + 0.49 + 0.36) / 2
    assert figures["brier_score"] == pytest.approx(brier)
    assert figures["expected_calibration_error"] == pytest.approx((0.3 + 0.6) / 2)
    far = classification_figures(np.array([[2e3, 0.0], [0.0, 2e3]]), np.array([0, 0]))
    assert far["negative_log_likelihood"] == pytest.approx(1e3)


GOOD = np.array([[0.5, 0.5], [0.2, 0.8]])
ONES = np.ones(2, int)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: expected_calibration_error(2 * GOOD, ONES), "must be a law"),
        (lambda: expected_calibration_error(np.array([[1.5, -0.5]]), ONES[:1]), "must be a law"),
        (lambda: expected_calibration_error(GOOD, ONES[:1]), r"labels has shape \(1,\)"),
        (lambda: expected_calibration_error(GOOD, ONES + 1), "from 0 to 1"),
        (lambda: expected_calibration_error(GOOD, ONES * 1.0), "integers"),
        (lambda: expected_calibration_error(GOOD, ONES, num_bins=0), "num_bins is 0"),
        (lambda: expected_calibration_error(GOOD, ONES, bins="equal"), "bins is 'equal'"),
        (lambda: classification_figures(GOOD[0], ONES), "logits has shape"),
        (lambda: classification_figures(GOOD * np.nan, ONES), "logits has 4 of 4"),
    ],
)
def test_wrong_calls_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()

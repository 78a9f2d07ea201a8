"""The test finds nothing between equal laws, and what it can between others."""

import numpy as np
import pytest
from scipy.stats import binom, norm
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis

from ebjax.evaluation import classifier_two_sample_test


@pytest.fixture(scope="module")
def replicates():
    """200 tests of two samples of 60 from one law."""
    rng = np.random.default_rng(0)
    return [
        classifier_two_sample_test(*rng.normal(size=(2, 60, 2)), num_folds=3) for _ in range(200)
    ]


def test_equal_laws(replicates):
    accuracies = np.array([test.accuracy for test in replicates])
    error = accuracies.std(ddof=1) / np.sqrt(len(accuracies))
    assert abs(accuracies.mean() - 0.5) < 5.0 * error
    # The folds share examples: the spread is near the binomial's, not equal to it.
    assert 0.7 < accuracies.std() / (0.5 / np.sqrt(120)) < 1.5


def test_p_values_of_equal_laws_are_rarely_small(replicates):
    p_values = np.array([test.p_value for test in replicates])
    # The spread above makes 1% into up to 6%.
    assert np.mean(p_values < 0.01) < 0.06 + 5.0 * np.sqrt(0.06 * 0.94 / len(p_values))


def test_a_shift_is_found_as_far_as_it_can_be():
    """Between N(0, I) and N(d e, I) the best accuracy is Φ(d / 2)."""
    rng = np.random.default_rng(0)
    shift = np.array([1.0, 0.0])
    first, second = rng.normal(size=(2, 2000, 2))
    test = classifier_two_sample_test(
        first, second + shift, classifier=LinearDiscriminantAnalysis()
    )
    best, error = norm.cdf(0.5), np.sqrt(0.25 / 4000)
    assert abs(test.accuracy - best) < 5.0 * error
    assert test.p_value < 1e-20
    neighbors = classifier_two_sample_test(first, second + shift)
    assert best - 0.05 < neighbors.accuracy < best + 5.0 * error


@pytest.mark.parametrize("classifier", ["nearest_neighbors", "trees"])
def test_a_spread_is_found_that_no_plane_sees(classifier):
    rng = np.random.default_rng(0)
    first, second = rng.normal(size=(2, 300, 2))
    assert classifier_two_sample_test(first, 2.5 * second, classifier=classifier).p_value < 1e-6
    plane = classifier_two_sample_test(first, 2.5 * second, classifier=LinearDiscriminantAnalysis())
    assert plane.accuracy < 0.6


def test_the_check_sees_training_examples_scored():
    """Planted: the accuracy of one nearest neighbour on its own training set is 1 at the null."""
    from sklearn.neighbors import KNeighborsClassifier

    rng = np.random.default_rng(0)
    pool, labels = rng.normal(size=(120, 2)), np.repeat([0, 1], 60)
    leaked = KNeighborsClassifier(1).fit(pool, labels).score(pool, labels)
    assert abs(leaked - 0.5) > 5.0 * 0.5 / np.sqrt(120)


def test_sizes_are_balanced_and_the_p_value_is_the_binomials():
    rng = np.random.default_rng(0)
    test = classifier_two_sample_test(rng.normal(size=(40, 2)), rng.normal(size=(400, 1, 2)))
    assert test.num_examples == 80
    right = round(test.accuracy * 80)
    assert test.p_value == pytest.approx(binom.sf(right - 1, 80, 0.5))
    again = classifier_two_sample_test(rng.normal(size=(40, 2)), rng.normal(size=(40, 2)), seed=3)
    assert again.num_examples == 80


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_folds": 1}, "num_folds is 1"),
        ({"num_folds": 6}, "6 folds need 12"),
        ({"classifier": "oracle"}, "classifier is 'oracle'"),
    ],
)
def test_wrong_calls_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        classifier_two_sample_test(np.eye(10), np.eye(10), **options)

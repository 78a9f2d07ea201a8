"""Features of a classifier trained on scikit-learn's digits see more than pixels do."""

import numpy as np
import pytest
from sklearn.datasets import load_digits

from ebjax.evaluation import (
    classifier_features,
    frechet_distance,
    frechet_distance_of_classifier_features,
)


@pytest.fixture(scope="module")
def digits():
    data = load_digits()
    # As they come, classes and writers take turns.
    order = np.random.default_rng(0).permutation(len(data.images))
    return data.images[order] / 8.0 - 1.0, data.target[order]


@pytest.fixture(scope="module")
def trained(digits):
    images, labels = digits
    return classifier_features(images[:1000], labels[:1000], num_features=32)


def test_the_classifier_is_one(digits, trained):
    images, labels = digits
    assert trained.accuracy > 0.9
    assert np.mean(trained.predict(images[1000:]) == labels[1000:]) > 0.85
    features = trained.features(images[:7])
    assert features.shape == (7, 32)
    assert features.min() >= 0.0


def test_the_features_are_the_hidden_layer(digits, trained):
    """A linear readout of them gives the labels back."""
    from sklearn.linear_model import LogisticRegression

    images, labels = digits
    features = trained.features(images)
    readout = LogisticRegression(max_iter=500).fit(features[:1000], labels[:1000])
    assert readout.score(features[1000:], labels[1000:]) > 0.85


def test_a_missing_class_shows(digits, trained):
    images, labels = digits
    held_out, held_out_labels = images[1000:], labels[1000:]
    half, other = held_out[::2], held_out[1::2]
    distance = lambda a, b: frechet_distance_of_classifier_features(a, b, trained)  # noqa: E731
    same = distance(half, other)
    missing = distance(half, other[held_out_labels[1::2] != 3])
    noise = distance(half, np.random.default_rng(0).uniform(-1, 1, other.shape))
    assert same < missing < noise
    assert distance(half, half) == 0.0


def test_a_gaussian_of_the_pixels_is_farther_in_features(digits, trained):
    """Moments of pixels right, no digit in sight: 1.5 times as far as digits, and 1.9 times."""
    images = digits[0][1000:].reshape(-1, 64)
    first, second = images[::2], images[1::2]
    fake = np.random.default_rng(0).multivariate_normal(
        first.mean(axis=0), np.cov(first.T), size=len(second)
    )
    pixels = frechet_distance(fake, second) / frechet_distance(first, second)
    features = frechet_distance_of_classifier_features(
        fake, second, trained
    ) / frechet_distance_of_classifier_features(first, second, trained)
    assert features > 1.2 * pixels


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: classifier_features(np.ones((20, 2)), np.ones(20, int)), "two classes"),
        (lambda: classifier_features(np.ones((20, 2)), np.arange(20)), "at least"),
        (lambda: classifier_features(np.ones((20, 2)), np.ones(19, int)), "labels has shape"),
        (
            lambda: classifier_features(np.ones((20, 2)), np.arange(20) % 2, num_features=0),
            "num_features is 0",
        ),
        (lambda: classifier_features(np.ones(20), np.arange(20) % 2), "examples has shape"),
    ],
)
def test_wrong_calls_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_sizes_must_agree(trained):
    with pytest.raises(ValueError, match="was trained on 64"):
        trained.features(np.ones((3, 5)))

"""Fréchet distance between features of a small classifier trained on the user's own labelled data.

    h(x) = max(0, W x + b), the hidden layer of softmax(V h + c) fitted to (examples, labels)
    distance = |m1 - m2|² + tr(S1 + S2 - 2 (S1^½ S2 S1^½)^½)   of h(first), h(second)

It sees what matters to tell the classes apart, better than pixels do and not well: a Gaussian
fitted to the pixels of 8x8 digits is 1.9 times as far from held-out digits as other digits are,
where in pixels it is 1.5 times. Values depend on the classifier: compare them under the same one
only, and never with distances of features from another network, such as FID's.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from ebjax.evaluation.checks import check_labels, flat_examples
from ebjax.evaluation.distances import frechet_distance

__all__ = [
    "ClassifierFeatures",
    "classifier_features",
    "frechet_distance_of_classifier_features",
]


class ClassifierFeatures(NamedTuple):
    """Features and how good they are.

    Attributes:
      features: ``examples [N, ...] -> [N, F]``.
      predict: ``examples [N, ...] -> [N]`` labels, for the classes of samples.
      accuracy: on a fifth of the labelled examples, kept out of the fit.
    """

    features: Callable[[npt.ArrayLike], np.ndarray]
    predict: Callable[[npt.ArrayLike], np.ndarray]
    accuracy: float


def classifier_features(
    examples: npt.ArrayLike, labels: npt.ArrayLike, *, num_features: int = 64, seed: int = 0
) -> ClassifierFeatures:
    """Trains the classifier.

    Args:
      examples: [N, ...], labelled; at least ten of each class.
      labels: [N] integers, two classes or more.
      num_features: F, width of the hidden layer.
      seed: of the split and the fit.

    Returns:
      ``ClassifierFeatures``. Where the accuracy is poor, so are the features.

    Raises:
      ValueError: if shapes do not agree, an example is not finite, or a class is too small.

    >>> rng = np.random.default_rng(0)
    >>> labels = np.arange(200) % 2
    >>> trained = classifier_features(rng.normal(size=(200, 3)) + 4.0 * labels[:, None], labels)
    >>> trained.accuracy > 0.9, trained.features(np.zeros((5, 3))).shape
    (True, (5, 64))
    """
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.model_selection import train_test_split
    from sklearn.neural_network import MLPClassifier

    flat = flat_examples("examples", examples)
    labels = check_labels(labels, len(flat))
    counts = np.unique(labels, return_counts=True)[1]
    if len(counts) < 2 or counts.min() < 10:
        raise ValueError(
            f"labels has classes of {counts.tolist()} examples; give at least two classes of at "
            "least 10."
        )
    if num_features < 1:
        raise ValueError(f"num_features is {num_features}; it must be at least 1.")
    # One mean and one spread for all components: dead pixels stay dead.
    mean, spread = flat.mean(), flat.std() + 1e-12

    def scaled(points: npt.ArrayLike) -> np.ndarray:
        points = flat_examples("examples", points, 1)
        if points.shape[1] != flat.shape[1]:
            raise ValueError(
                f"examples have {points.shape[1]} components; the classifier was trained on "
                f"{flat.shape[1]}."
            )
        return (points - mean) / spread

    training, test, training_labels, test_labels = train_test_split(
        (flat - mean) / spread, labels, test_size=0.2, stratify=labels, random_state=seed
    )
    network = MLPClassifier((num_features,), alpha=1e-3, max_iter=100, tol=1e-3, random_state=seed)
    with warnings.catch_warnings():
        # A hundred passes are enough, converged or not; ``accuracy`` says what they reached.
        warnings.simplefilter("ignore", ConvergenceWarning)
        network.fit(training, training_labels)
    weights, bias = network.coefs_[0], network.intercepts_[0]
    return ClassifierFeatures(
        features=lambda points: np.maximum(scaled(points) @ weights + bias, 0.0),
        predict=lambda points: network.predict(scaled(points)),
        accuracy=float(network.score(test, test_labels)),
    )


def frechet_distance_of_classifier_features(
    first: npt.ArrayLike, second: npt.ArrayLike, classifier: ClassifierFeatures
) -> float:
    """Squared Fréchet distance of two samples in the features of a classifier trained here.

    Args:
      first: [N, ...].
      second: [M, ...].
      classifier: of ``classifier_features``.

    Returns:
      The distance, at least 0. Quote beside it the distance of training to held-out examples.

    Raises:
      ValueError: if a sample has fewer than two examples or is not finite, or sizes differ.

    >>> classifier = ClassifierFeatures(lambda x: np.asarray(x) ** 2, np.sign, 1.0)
    >>> frechet_distance_of_classifier_features([[1.0], [2.0]], [[-1.0], [-2.0]], classifier)
    0.0
    """
    return frechet_distance(classifier.features(first), classifier.features(second))

"""Classifier two-sample test: can a classifier tell samples from data?

    accuracy a of a classifier of {first, second} on examples it was not trained on
    equal laws: a N ~ Binomial(N, 1/2);   p-value = P(Binomial(N, 1/2) >= a N)
    distinct laws: a -> (1 + TV) / 2 at best

Lopez-Paz and Oquab, "Revisiting classifier two-sample tests", ICLR 2017.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from ebjax.evaluation.distances import flat_pair

__all__ = ["TwoSampleTest", "classifier_two_sample_test"]

_CLASSIFIERS = ("nearest_neighbors", "trees", "network")


class TwoSampleTest(NamedTuple):
    """What the test found.

    Attributes:
      accuracy: share told apart rightly, 0.5 for equal laws.
      p_value: chance of that accuracy or more under equal laws.
      num_examples: N, of both samples together.
    """

    accuracy: float
    p_value: float
    num_examples: int


def _classifier(name: Any, num_training: int, seed: int):
    if not isinstance(name, str):
        return name
    from sklearn.ensemble import ExtraTreesClassifier
    from sklearn.neighbors import KNeighborsClassifier
    from sklearn.neural_network import MLPClassifier
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    if name == "nearest_neighbors":
        # Odd, so that there are no ties.
        num_neighbors = 2 * (int(np.sqrt(num_training)) // 2) + 1
        return make_pipeline(StandardScaler(), KNeighborsClassifier(num_neighbors))
    if name == "trees":
        return ExtraTreesClassifier(100, min_samples_leaf=5, random_state=seed)
    if name == "network":
        network = MLPClassifier((64, 64), max_iter=200, early_stopping=True, random_state=seed)
        return make_pipeline(StandardScaler(), network)
    raise ValueError(
        f"classifier is {name!r}; it must be one of {_CLASSIFIERS} or a scikit-learn classifier."
    )


def classifier_two_sample_test(
    first: npt.ArrayLike,
    second: npt.ArrayLike,
    *,
    classifier: Any = "nearest_neighbors",
    num_folds: int = 5,
    seed: int = 0,
) -> TwoSampleTest:
    """Tests whether two samples come from one law, by a classifier under cross-validation.

    Examples of each sample must be independent of each other: what lies near to its own kin (a
    chain's successive positions, copies after resampling) is told apart for that reason alone. The
    larger sample is cut to the size of the smaller one, at random.

    Data on levels (pixels of 256 values) give themselves away against samples that are not: add
    the same noise to both, or round both.

    The folds share training examples, so the p-value is approximate: of 200 tests of 2 x 60 normal
    pairs from one law, 5% had p < 0.05 and 1.5% had p < 0.01.

    Args:
      first: [N, ...].
      second: [M, ...].
      classifier: ``"nearest_neighbors"`` (√n of them, on standardised components; sees little in
        many dimensions),
        ``"trees"`` (a hundred random ones), ``"network"`` (two hidden layers of 64), or a
        scikit-learn classifier of your own.
      num_folds: parts of the cross-validation, at least 2.
      seed: of the folds, the cut and the classifier.

    Returns:
      A ``TwoSampleTest``.

    Raises:
      ValueError: if a sample has fewer than ``2 num_folds`` examples or is not finite, or an
        option is out of range.

    >>> rng = np.random.default_rng(0)
    >>> first, second = rng.normal(size=(2, 200, 2))
    >>> classifier_two_sample_test(first, second + 3.0).p_value < 1e-6
    True
    """
    from scipy.stats import binom
    from sklearn.model_selection import StratifiedKFold, cross_val_predict

    if num_folds < 2:
        raise ValueError(f"num_folds is {num_folds}; it must be at least 2.")
    first, second = flat_pair(first, second)
    size = min(len(first), len(second))
    if size < 2 * num_folds:
        raise ValueError(
            f"The smaller sample has {size} examples; {num_folds} folds need {2 * num_folds}."
        )
    rng = np.random.default_rng(seed)
    pool = np.concatenate([x[rng.permutation(len(x))[:size]] for x in (first, second)])
    labels = np.repeat([0, 1], size)
    folds = StratifiedKFold(num_folds, shuffle=True, random_state=seed)
    model = _classifier(classifier, 2 * size * (num_folds - 1) // num_folds, seed)
    num_right = int(np.sum(cross_val_predict(model, pool, labels, cv=folds) == labels))
    return TwoSampleTest(
        accuracy=num_right / len(labels),
        p_value=float(binom.sf(num_right - 1, len(labels), 0.5)),
        num_examples=len(labels),
    )

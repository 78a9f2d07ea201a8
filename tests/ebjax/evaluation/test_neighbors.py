"""Copies are found, independent draws are not taken for copies, and modes are counted."""

import numpy as np
import pytest
from scipy.spatial.distance import cdist

from ebjax.evaluation import memorization_figures, modes_covered, nearest_neighbors


def test_neighbors_are_those_of_all_pairs():
    rng = np.random.default_rng(0)
    points, reference = rng.normal(size=(20, 2, 3)), rng.normal(size=(30, 2, 3))
    distances, indices = nearest_neighbors(points, reference, num_neighbors=4)
    pairs = cdist(points.reshape(20, -1), reference.reshape(30, -1))
    np.testing.assert_array_equal(indices, np.argsort(pairs, axis=1)[:, :4])
    np.testing.assert_allclose(distances, np.sort(pairs, axis=1)[:, :4], rtol=1e-9)


def copying(noise, seed=0):
    """Figures of samples that are training examples with noise; ``None``: fresh draws."""
    rng = np.random.default_rng(seed)
    training, held_out, samples = rng.normal(size=(3, 400, 3))
    if noise is not None:
        samples = training + noise * samples
    return memorization_figures(samples, training, held_out)


def test_fresh_draws_are_not_copies():
    figures = [copying(None, seed) for seed in range(100)]
    shares = np.array([f["share_of_copies"] for f in figures])
    # The quantile of 400 held-out distances has an error too, of about the same size.
    error = shares.std(ddof=1) / np.sqrt(100)
    assert abs(shares.mean() - 0.01) < 5.0 * error
    p_values = np.array([f["copy_p_value"] for f in figures])
    assert abs(p_values.mean() - 0.5) < 5.0 * np.sqrt(1 / 12 / 100)
    ratios = np.log([f["nearest_distance_ratio"] for f in figures])
    assert abs(ratios.mean()) < 5.0 * ratios.std(ddof=1) / 10.0


def test_copies_are_found():
    exact, noisy = copying(0.0), copying(0.03)
    assert exact["nearest_distance_ratio"] == 0.0
    assert exact["share_of_copies"] == 1.0
    assert noisy["nearest_distance_ratio"] < 0.5
    assert noisy["copy_p_value"] < 1e-10
    # Planted: with held-out and samples exchanged nothing is found.
    rng = np.random.default_rng(0)
    training, held_out, samples = rng.normal(size=(3, 400, 3))
    exchanged = memorization_figures(held_out, training, training + 0.03 * samples)
    assert exchanged["copy_p_value"] > 0.99


MODES = np.array([[0.0, 0.0], [4.0, 0.0], [0.0, 4.0], [4.0, 4.0]])


def around(counts):
    rng = np.random.default_rng(0)
    return np.repeat(MODES, counts, axis=0) + 0.1 * rng.normal(size=(sum(counts), 2))


def test_modes_are_counted():
    far = np.full((20, 2), 2.0)
    figures = modes_covered(np.concatenate([around([40, 40, 20, 0]), far]), MODES, radius=1.0)
    assert figures["modes_covered"] == 3
    assert figures["num_modes"] == 4
    assert figures["share_near_a_mode"] == pytest.approx(100 / 120)
    assert figures["mode_total_variation"] == pytest.approx(0.3)


def test_weights_and_stray_samples():
    samples = around([90, 9, 1, 0])
    weights = [0.9, 0.1, 0.0, 0.0]
    figures = modes_covered(samples, MODES, radius=1.0, weights=weights)
    assert figures["mode_total_variation"] == pytest.approx(0.01)
    assert modes_covered(samples, MODES, radius=1.0)["modes_covered"] == 2  # 1 of 100 is a stray
    assert modes_covered(samples, MODES, radius=1.0, least_share=0.04)["modes_covered"] == 3
    nothing = modes_covered(samples + 100.0, MODES, radius=1.0)
    assert nothing["modes_covered"] == 0
    assert nothing["mode_total_variation"] == 1.0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: nearest_neighbors(MODES, MODES, num_neighbors=5), "num_neighbors is 5"),
        (lambda: nearest_neighbors(MODES, MODES[:, :1]), "Examples of points have 2"),
        (lambda: memorization_figures(MODES[:1], MODES, MODES), "samples has shape"),
        (lambda: memorization_figures(MODES, MODES, MODES), "in the training set"),
        (lambda: modes_covered(MODES, MODES, radius=0.0), "radius is 0"),
        (lambda: modes_covered(MODES, MODES, radius=1.0, weights=[1.0]), "one share a mode"),
        (lambda: modes_covered(MODES * np.nan, MODES, radius=1.0), "points has 8 of 8"),
    ],
)
def test_wrong_calls_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()

"""Subtrajectory balance: weights against loops, limits, padding. Windows of path consistency."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from all_paths import terminal_law
from small_environments import from_edges, sets, tabular

from gflownet.objectives import (
    detailed_balance_residuals,
    path_consistency,
    path_consistency_residuals,
    subtrajectory_balance,
    subtrajectory_losses,
    subtrajectory_residuals,
    subtrajectory_weights,
)

LENGTHS = np.array([3, 1, 5, 5])
T = 6
RNG = np.random.default_rng(0)
LOG_FLOW, LOG_PF, LOG_PB = (RNG.standard_normal((4, n)) for n in (T + 1, T, T))
VALID = np.arange(T) < LENGTHS[:, None]


def residual(b, i, j):
    steps = LOG_PF[b, i:j] - LOG_PB[b, i:j]
    return LOG_FLOW[b, i] + steps.sum() - LOG_FLOW[b, j]


def every(b):
    return [(i, j) for i in range(LENGTHS[b]) for j in range(i + 1, LENGTHS[b] + 1)]


def test_residuals_against_a_loop(x64):
    deltas = jax.vmap(subtrajectory_residuals)(LOG_FLOW, LOG_PF, LOG_PB, VALID)
    expected = np.zeros(deltas.shape)
    for b in range(4):
        for i, j in every(b):
            expected[b, i, j] = residual(b, i, j)
    np.testing.assert_allclose(deltas, expected, atol=1e-12)
    # On the diagonal above the main one, detailed balance.
    single = jax.vmap(detailed_balance_residuals)(LOG_FLOW, LOG_PF, LOG_PB, VALID)
    np.testing.assert_allclose(np.diagonal(deltas, 1, 1, 2), single, atol=1e-12)


def loss_by_loop(decay, normalize):
    weight = lambda i, j: decay ** (j - i)  # noqa: E731
    parts = [[(weight(i, j), residual(b, i, j) ** 2) for i, j in every(b)] for b in range(4)]
    if normalize == "trajectory":
        return np.mean([sum(w * v for w, v in part) / sum(w for w, _ in part) for part in parts])
    if normalize == "none":
        return np.mean([sum(w * v for w, v in part) for part in parts])
    together = [term for part in parts for term in part]
    if normalize == "batch":
        return sum(w * v for w, v in together) / sum(w for w, _ in together)
    lengths = range(1, LENGTHS.max() + 1)
    means = [
        np.mean([residual(b, i, j) ** 2 for b in range(4) for i, j in every(b) if j - i == n])
        for n in lengths
    ]
    return np.average(means, weights=[decay**n for n in lengths])


@pytest.mark.parametrize("decay", [0.5, 1.0, 1.9])
@pytest.mark.parametrize("normalize", ["trajectory", "batch", "length", "none"])
def test_weights_against_a_loop(decay, normalize, x64):
    values = np.square(jax.vmap(subtrajectory_residuals)(LOG_FLOW, LOG_PF, LOG_PB, VALID))
    losses = subtrajectory_losses(values, VALID.T, decay=decay, normalize=normalize)
    assert losses.shape == (4,)
    assert losses.mean() == pytest.approx(loss_by_loop(decay, normalize), rel=1e-10)
    # Control: the ways to divide differ.
    others = [n for n in ("trajectory", "batch", "length", "none") if n != normalize]
    for other in others:
        assert losses.mean() != pytest.approx(loss_by_loop(decay, other), rel=1e-3)


@pytest.mark.parametrize("normalize", ["trajectory", "batch"])
def test_limits(normalize, x64):
    values = np.square(jax.vmap(subtrajectory_residuals)(LOG_FLOW, LOG_PF, LOG_PB, VALID))

    def loss(decay):
        return subtrajectory_losses(values, VALID.T, decay=decay, normalize=normalize)

    singles = [[residual(b, i, i + 1) ** 2 for i in range(n)] for b, n in enumerate(LENGTHS)]
    wholes = np.array([residual(b, 0, n) ** 2 for b, n in enumerate(LENGTHS)])
    if normalize == "trajectory":
        assert loss(0.0).mean() == pytest.approx(np.mean([np.mean(row) for row in singles]))
        np.testing.assert_allclose(loss(math.inf), wholes)
    else:
        assert loss(0.0).mean() == pytest.approx(np.mean(np.concatenate(singles)))
        assert loss(math.inf).mean() == pytest.approx(wholes[LENGTHS == 5].mean())
    # Close to the limits, close to their values.
    np.testing.assert_allclose(loss(1e-7), loss(0.0), rtol=1e-5)
    np.testing.assert_allclose(loss(1e7), loss(math.inf), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("normalize", ["trajectory", "batch", "length", "none"])
def test_padding_changes_nothing(normalize, x64):
    def loss(width):
        pad = lambda rows, n: np.pad(rows, ((0, 0), (0, n - rows.shape[1])), constant_values=7.0)  # noqa: E731
        valid = np.arange(width) < LENGTHS[:, None]
        arrays = pad(LOG_FLOW, width + 1), pad(LOG_PF, width), pad(LOG_PB, width)
        values = np.square(jax.vmap(subtrajectory_residuals)(*arrays, valid))
        return subtrajectory_losses(values, valid.T, decay=0.9, normalize=normalize)

    np.testing.assert_allclose(loss(T), loss(T + 9), rtol=1e-12)
    # The planted bug: divided by the weights of the padded matrix.
    weights = np.triu(0.9 ** -np.subtract.outer(np.arange(T + 1.0), np.arange(T + 1.0)), 1)
    values = np.square(jax.vmap(subtrajectory_residuals)(LOG_FLOW, LOG_PF, LOG_PB, VALID))
    wrong = (weights * values).sum(axis=(1, 2)) / weights.sum()
    assert not np.allclose(wrong, loss(T), rtol=0.05)


def test_large_powers_are_finite():
    # λ^300 is beyond single precision, and weights relative to the largest are not.
    valid = jnp.arange(300) < 299
    weights = subtrajectory_weights(valid, 2.0)
    assert weights.max() == 1.0
    assert weights[0, 299] == 1.0
    assert weights[0, 298] == weights[1, 299] == 0.5
    assert jnp.isfinite(weights).all()


def test_wrong_options():
    environment, policy = tabular(sets())
    with pytest.raises(ValueError, match=r"-0\.5"):
        subtrajectory_balance(environment, policy, decay=-0.5)
    with pytest.raises(ValueError, match="'within'"):
        subtrajectory_balance(environment, policy, normalize="within")
    with pytest.raises(ValueError, match="0"):
        path_consistency(environment, policy, depth=0)


@pytest.mark.parametrize("depth", [1, 2, 9])
def test_windows_of_path_consistency(depth, x64):
    windows = jax.vmap(path_consistency_residuals, (0, 0, 0, 0, None))(
        LOG_FLOW, LOG_PF, LOG_PB, VALID, depth
    )
    expected = np.zeros((4, T))
    for b, length in enumerate(LENGTHS):
        for i in range(length):
            expected[b, i] = residual(b, i, min(i + depth, length))
    np.testing.assert_allclose(windows, expected, atol=1e-12)


def test_path_consistency_needs_the_corrected_reward(x64):
    # Two paths lead to one terminal state and one path to the other, of equal reward.
    edges = [(0, 0, 1), (0, 1, 2), (0, 2, 3), (1, 0, 4), (2, 1, 4), (3, 0, 5)]
    environment = from_edges(edges, [0.0] * 6, source=0, max_length=2)
    valid = jnp.ones(2, bool)

    def residuals(is_corrected, p_two, value):
        """Of a path through each of 1, 2 and 3 when the two first have probability p_two / 2."""
        reward = jnp.log(jnp.array([[1.0, 0.5], [1.0, 0.5], [1.0, 1.0]])) * is_corrected
        log_pf = jnp.log(jnp.array([[p_two / 2, 1.0], [p_two / 2, 1.0], [1 - p_two, 1.0]]))
        return jax.vmap(path_consistency_residuals, (0, 0, 0, None, None))(
            jnp.asarray(value), log_pf, reward, valid, 2
        )

    # V(s) = log Σ exp of what can be earned from s.
    right = np.log([[2.0, 0.5, 1.0], [2.0, 0.5, 1.0], [2.0, 1.0, 1.0]])
    np.testing.assert_allclose(residuals(1.0, 0.5, right), 0.0, atol=1e-12)
    law = terminal_law(environment, np.log([[0.25, 0.25, 0.5]] + [[1.0] * 3] * 5))
    assert law == pytest.approx({4: 0.5, 5: 0.5})
    # Without the correction, all is consistent at the wrong law, 2/3 to 1/3.
    plain = np.log([[3.0, 1.0, 1.0]] * 3)
    np.testing.assert_allclose(residuals(0.0, 2 / 3, plain), 0.0, atol=1e-12)
    assert np.abs(residuals(1.0, 2 / 3, plain)).max() > 0.1

"""Resampling: exact expectations by integrating over the uniforms, and weights of all sorts."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ebjax.samplers.smc import resampling
from ebjax.samplers.smc.resampling import (
    RESAMPLERS,
    conditional_effective_sample_size,
    effective_sample_size,
    log_mean_exp,
)

# Twentieths, one of them zero, so that all jumps in the uniforms are at multiples of 1 / 240.
WEIGHTS = np.array([7, 1, 0, 9, 3]) / 20
GRID = (np.arange(240) + 0.5) / 240

each_method = pytest.mark.parametrize("method", RESAMPLERS)


def mean_offspring(monkeypatch, method, num):
    """[N] the exact mean: offspring is a sum of functions of one uniform each, so all may agree."""

    def offspring(u):
        with monkeypatch.context() as patch:
            patch.setattr(resampling, "_uniform", lambda key, shape, dtype: jnp.full(shape, u))
            ancestors = RESAMPLERS[method](jax.random.key(0), jnp.log(WEIGHTS) + 3.0, num)
        assert ancestors.shape == (num,)
        assert ancestors.dtype == jnp.int32
        return jnp.bincount(ancestors, length=5)

    return np.asarray(jax.vmap(offspring)(jnp.asarray(GRID)))


@each_method
@pytest.mark.parametrize("num", [5, 4, 12])
def test_offspring_is_unbiased(monkeypatch, x64, method, num):
    offspring = mean_offspring(monkeypatch, method, num)
    np.testing.assert_allclose(offspring.mean(0), num * WEIGHTS, atol=1e-12)
    if method in ("systematic", "residual"):
        assert np.all(offspring >= np.floor(num * WEIGHTS))
    if method == "systematic":
        assert np.all(offspring <= np.ceil(num * WEIGHTS))


def test_the_check_sees_heights_that_are_not_random(monkeypatch, x64):
    monkeypatch.setattr(resampling, "_strata", lambda u, num: (jnp.arange(num) + 0.5) / num)
    offspring = mean_offspring(monkeypatch, "systematic", 5)
    assert np.abs(offspring.mean(0) - 5 * WEIGHTS).max() > 0.1


@each_method
def test_uniforms_are_used(method):
    """The unpatched function: frequencies over keys."""
    keys = jax.random.split(jax.random.key(0), 20_000)
    ancestors = jax.vmap(lambda key: RESAMPLERS[method](key, jnp.log(WEIGHTS)))(keys)
    offspring = np.stack([(np.asarray(ancestors) == i).sum(1) for i in range(5)], -1)
    assert np.all(offspring[:, 2] == 0)
    # Never noisier than the multinomial.
    scale = np.sqrt(5 * WEIGHTS * (1 - WEIGHTS) / len(keys)) + 1e-9
    assert np.all(np.abs(offspring.mean(0) - 5 * WEIGHTS) / scale < 5.0)


@each_method
def test_equal_weights(method):
    ancestors = RESAMPLERS[method](jax.random.key(1), jnp.full(1000, -700.0))
    if method != "multinomial":
        np.testing.assert_array_equal(ancestors, np.arange(1000))
    assert len(set(ancestors.tolist())) > 600


@each_method
def test_without_any_weight_all_are_equal(method):
    for nothing in (-jnp.inf, jnp.nan):
        ancestors = RESAMPLERS[method](jax.random.key(1), jnp.full(1000, nothing))
        assert len(set(ancestors.tolist())) > 600


@each_method
def test_no_weight_no_offspring(method):
    log_weights = jnp.array([-jnp.inf, 0.0, -jnp.inf, -1000.0, jnp.nan, 0.5, -jnp.inf])
    keys = jax.random.split(jax.random.key(2), 1000)
    ancestors = jax.vmap(lambda key: RESAMPLERS[method](key, log_weights, 50))(keys)
    assert set(np.unique(ancestors)) == {1, 5}


@each_method
def test_the_top_height_falls_on_a_particle_with_weight(monkeypatch, method):
    one = np.nextafter(np.float32(1.0), np.float32(0.0))
    monkeypatch.setattr(resampling, "_uniform", lambda key, shape, dtype: jnp.full(shape, one))
    log_weights = jnp.array([0.0] * 300 + [-jnp.inf])
    ancestors = RESAMPLERS[method](jax.random.key(0), log_weights)
    assert ancestors.max() == 299


@each_method
def test_one_infinite_weight_takes_all(method):
    ancestors = RESAMPLERS[method](jax.random.key(0), jnp.array([0.0, jnp.inf, 3.0]))
    assert ancestors.tolist() == [1, 1, 1]


def test_effective_sample_size(x64):
    log_weights = jnp.array([0.3, -1.0, 2.0, -jnp.inf])
    weights = np.exp(log_weights)
    exact = weights.sum() ** 2 / (weights**2).sum()
    for shift in (0.0, 1e4, -1e4):
        assert abs(effective_sample_size(log_weights + shift) - exact) < 1e-9
    assert effective_sample_size(jnp.zeros(7)) == 7.0
    assert effective_sample_size(jnp.full(7, -jnp.inf)) == 0.0
    assert effective_sample_size(jnp.array([-jnp.inf, 5.0])) == 1.0


def test_conditional_effective_sample_size(x64):
    log_weights, log_increments = jnp.array([[0.3, -1.0, 2.0, -jnp.inf], [5.0, 1.0, 2.0, 90.0]])
    weights = np.exp(log_weights)
    weights, increments = weights / weights.sum(), np.exp(log_increments)
    exact = 4 * (weights @ increments) ** 2 / (weights @ increments**2)
    for shift in (0.0, 1e4, -1e4):
        value = conditional_effective_sample_size(log_weights - shift, log_increments + shift)
        assert abs(value - exact) < 1e-9
    # Weights of their own do not matter where nothing changes, and the sign of a change does.
    assert abs(conditional_effective_sample_size(log_weights, jnp.zeros(4)) - 4.0) < 1e-12
    assert abs(conditional_effective_sample_size(log_weights, -log_increments) - exact) > 0.1
    assert conditional_effective_sample_size(log_weights, jnp.full(4, -jnp.inf)) == 0.0


def test_log_mean_exp(x64):
    assert (
        abs(log_mean_exp(jnp.array([1000.0, 1000.0 + math.log(3.0)])) - 1000.0) - math.log(2) < 1e-9
    )
    assert log_mean_exp(jnp.full(3, -jnp.inf)) == -jnp.inf

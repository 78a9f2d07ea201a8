"""Folds over chains against the same figures of kept positions."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ebjax.samplers import mala, sample
from ebjax.samplers.reducers import (
    StreamingMoments,
    expectation,
    fold,
    histogram,
    moments,
    pool_moments,
)

START = {"a": jnp.ones((6, 2)), "b": jnp.zeros(6)}


def energy_fn(params, x):
    return jnp.sum(0.25 * x["a"] ** 4 + params * x["a"]) + 0.5 * (x["b"] - x["a"][0]) ** 2


@functools.cache
def run():
    reducers = {
        "variances": moments(),
        "covariance": moments(dense=True),
        "histogram": histogram(-1.0, 1.5, 5),
        "mean": expectation(lambda x: {"square": x["a"] ** 2, "is_up": x["b"] > 0.0}),
        "peak": fold(lambda peak, x: jnp.maximum(peak, x["b"]), -np.inf),
    }
    return sample(
        jax.random.key(0),
        mala(step_size=0.4),
        energy_fn,
        0.5,
        START,
        num_samples=40,
        thinning=2,
        num_burn_in=3,
        reducers=reducers,
    )


def flat():
    positions = run().positions
    return np.concatenate([positions["a"], positions["b"][..., None]], -1).astype(np.float64)


def test_moments():
    draws, x = run(), flat()
    np.testing.assert_allclose(draws.reduced["variances"].mean, x.mean(0), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(draws.reduced["variances"].covariance, x.var(0, ddof=1), rtol=1e-4)
    for c in range(6):
        expected = np.cov(x[:, c].T)
        got = draws.reduced["covariance"].covariance[c]
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["variances", "covariance"])
def test_pooled_moments(name):
    pooled = pool_moments(run().reduced[name])
    x = flat().reshape(-1, 3)
    covariance = np.cov(x.T)
    assert pooled.num_points == len(x)
    np.testing.assert_allclose(pooled.mean, x.mean(0), rtol=1e-5, atol=1e-6)
    expected = covariance if name == "covariance" else np.diag(covariance)
    np.testing.assert_allclose(pooled.covariance, expected, rtol=1e-4, atol=1e-5)


def test_pooling_counts_the_spread_between_chains():
    chains = StreamingMoments(jnp.full(2, 10.0), jnp.array([[0.0], [4.0]]), jnp.zeros((2, 1)))
    np.testing.assert_allclose(pool_moments(chains).covariance, [20 * 4.0 / 19], rtol=1e-6)


def test_histogram():
    counts, x = run().reduced["histogram"], run().positions
    edges = [-np.inf, *np.linspace(-1.0, 1.5, 6), np.inf]
    for c in range(6):
        np.testing.assert_array_equal(counts["b"][c], np.histogram(x["b"][:, c], edges)[0])
        np.testing.assert_array_equal(counts["a"][c, 1], np.histogram(x["a"][:, c, 1], edges)[0])
    reducer = histogram(0.0, 1.0, 2)
    odd = jnp.array([jnp.nan, 1.0, 0.0, -jnp.inf, 0.5])
    placed = reducer.update(reducer.init(odd), odd)
    expected = [[0, 0, 0, 0], [0, 0, 0, 1], [0, 1, 0, 0], [1, 0, 0, 0], [0, 0, 1, 0]]
    np.testing.assert_array_equal(placed, expected)


def test_expectation_and_fold():
    draws = run()
    a, b = draws.positions["a"], draws.positions["b"]
    np.testing.assert_allclose(draws.reduced["mean"]["square"], (a**2).mean(0), rtol=1e-5)
    np.testing.assert_allclose(draws.reduced["mean"]["is_up"], (b > 0).mean(0), rtol=1e-5)
    np.testing.assert_array_equal(draws.reduced["peak"], b.max(0))


@pytest.mark.parametrize("options", [(1.0, 1.0, 3), (0.0, 1.0, 0)])
def test_a_histogram_of_nothing_is_refused(options):
    with pytest.raises(ValueError, match=f"low is {options[0]}"):
        histogram(*options)


def test_reducers_made_anew_do_not_compile_again():
    num_traces = 0

    def counted(params, x):
        nonlocal num_traces
        num_traces += 1
        return energy_fn(params, x)

    traces = []
    for _ in range(3):
        reducers = {"moments": moments(), "histogram": histogram(-1.0, 1.0, 3)}
        kernel = mala(step_size=0.4)
        sample(jax.random.key(0), kernel, counted, 0.5, START, num_samples=2, reducers=reducers)
        traces.append(num_traces)
    assert traces[0] == traces[2]

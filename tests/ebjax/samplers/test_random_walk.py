"""Random-walk Metropolis: detailed balance to the last digit, laws without gradients."""

import importlib
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ebjax.samplers import run_chain
from ebjax.samplers.random_walk import random_walk

# The package exports the function of the same name, which hides the module.
random_walk_module = importlib.import_module("ebjax.samplers.random_walk")

STEP_SIZE, TEMPERATURE = 0.9, 1.7
METRICS = {
    "identity": None,
    "diagonal": np.array([0.6, 2.0]),
    "dense": np.array([[0.4, -0.5], [-0.5, 1.9]]),
}


def asymmetric_energy(params, x):
    return jnp.sum(0.25 * x**4 - 0.5 * x**2 + 0.6 * x) + params * x[0] * x[1]


def balance_error(monkeypatch, kernel, inverse_mass, *, num_pairs=200):
    """Largest |log of π(x) q(y|x) a(x,y) / π(y) q(x|y) a(y,x)| over random pairs.

    The library's step computes a: its noise is replaced by the one that proposes y from x.
    """
    inverse_mass = np.eye(2) if inverse_mass is None else inverse_mass
    inverse_mass = np.diag(inverse_mass) if inverse_mass.ndim == 1 else inverse_mass
    root = STEP_SIZE * np.linalg.cholesky(inverse_mass)

    def log_flow(x, y):
        state = kernel.init(asymmetric_energy, 0.4, x)
        with monkeypatch.context() as patch:
            draw = (jnp.linalg.solve(root, y - x), jnp.array([0.0]))
            patch.setattr(random_walk_module, "random_normal_and_uniform", lambda key, tree: draw)
            new, info = kernel.step(jax.random.key(0), asymmetric_energy, 0.4, state)
        log_pi = -asymmetric_energy(0.4, x) / TEMPERATURE
        log_q = jax.scipy.stats.multivariate_normal.logpdf(y, x, STEP_SIZE**2 * inverse_mass)
        miss = jnp.abs(new.position - y).max()
        return log_pi + log_q + jnp.log(info.acceptance_rate), info.acceptance_rate, miss

    x, y = jax.random.normal(jax.random.key(1), (2, num_pairs, 2)) * 0.9
    forward, rate, miss = jax.jit(jax.vmap(log_flow))(x, y)
    backward, rate_back, _ = jax.jit(jax.vmap(log_flow))(y, x)
    assert miss.max() < 1e-12
    assert np.all((rate == 1.0) | (rate_back == 1.0))
    assert np.mean((rate < 1.0) | (rate_back < 1.0)) > 0.9
    return np.abs(forward - backward).max()


@pytest.mark.parametrize("name", METRICS)
def test_detailed_balance(monkeypatch, x64, name):
    options = {"step_size": STEP_SIZE, "inverse_mass": METRICS[name]}
    kernel = random_walk(**options, temperature=TEMPERATURE)
    assert balance_error(monkeypatch, kernel, METRICS[name]) < 1e-10
    planted = random_walk(**options, temperature=1.0)
    assert balance_error(monkeypatch, planted, METRICS[name]) > 1e-2


def staircase(params, x):
    """Levels with jumps, its gradient zero almost everywhere: p = (1 - r) r^floor(x), x > 0."""
    return jnp.where(x > 0.0, -jnp.floor(x) * jnp.log(params), jnp.inf)


def staircase_z_scores(kernel, *, num_chains=20_000, ratio=0.5):
    """Exact draws, 20 steps: the ends must be exact draws again."""

    @jax.jit
    @jax.vmap
    def end(key):
        level_key, place_key, chain_key = jax.random.split(key, 3)
        level = jnp.floor(jnp.log(jax.random.uniform(level_key)) / math.log(ratio))
        state = kernel.init(staircase, ratio, level + jax.random.uniform(place_key))
        state, info = run_chain(chain_key, kernel, staircase, ratio, state, 20)
        return state.position, info

    ends, info = end(jax.random.split(jax.random.key(0), num_chains))
    ends = np.asarray(ends, np.float64)
    assert np.all(ends > 0.0)
    # Proposals below 0 have infinite energy; they are seen and refused.
    assert 0.0 < info.is_finite.mean() < 1.0
    assert 0.2 < info.acceptance_rate.mean() < 0.9
    mean, variance = ratio / (1 - ratio) + 0.5, ratio / (1 - ratio) ** 2 + 1 / 12
    squares = (ends - mean) ** 2
    z_mean = (ends.mean() - mean) / math.sqrt(variance / num_chains)
    z_variance = (squares.mean() - variance) / (squares.std() / math.sqrt(num_chains))
    return max(abs(z_mean), abs(z_variance))


def test_a_law_without_gradients_is_invariant():
    assert staircase_z_scores(random_walk(step_size=1.5)) < 5.0


def test_the_invariance_check_sees_a_wrong_temperature():
    assert staircase_z_scores(random_walk(step_size=1.5, temperature=1.3)) > 5.0


def test_an_energy_is_evaluated_once_a_step_and_never_differentiated():
    num_traces = 0

    @jax.custom_jvp
    def counted(x):
        nonlocal num_traces
        num_traces += 1
        return jnp.sum(x**2)

    @counted.defjvp
    def never(primals, tangents):
        raise AssertionError

    energy_fn = lambda params, x: counted(x)  # noqa: E731
    kernel = random_walk(step_size=0.1)
    state = kernel.init(energy_fn, (), jnp.ones(2))
    assert num_traces == 1
    state, info = kernel.step(jax.random.key(0), energy_fn, (), state)
    assert num_traces == 2
    np.testing.assert_allclose(state.energy, jnp.sum(state.position**2), rtol=1e-6)
    assert info.energy == state.energy


def test_a_start_of_infinite_energy_walks_in_and_nan_stays_out():
    wall = lambda params, x: jnp.where(x > 0.0, jnp.where(x > 1.0, jnp.nan, x), jnp.inf)  # noqa: E731
    kernel = random_walk(step_size=0.5)
    state = kernel.init(wall, (), jnp.array(-0.1))
    state, info = run_chain(jax.random.key(0), kernel, wall, (), state, 100)
    assert 0.0 < state.position <= 1.0
    assert info.is_finite < 1.0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"step_size": 0}, "step_size is 0"),
        ({"step_size": 0.1, "temperature": -1.0}, "temperature is -1.0"),
        ({"step_size": 0.1, "inverse_mass": np.ones((2, 3))}, r"shape \(2, 3\)"),
    ],
)
def test_options_out_of_range_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        random_walk(**options)

"""MALA: detailed balance to the last digit, invariance of known laws, refusal of bad energies."""

import importlib
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ebjax.energies import targets
from ebjax.samplers import mala, run_chain

# The package exports the function of the same name, which hides the module.
mala_module = importlib.import_module("ebjax.samplers.mala")

STEP_SIZE, TEMPERATURE = 0.3, 1.7


def asymmetric_energy(params, x):
    return jnp.sum(0.25 * x**4 - 0.5 * x**2 + 0.6 * x) + params * x[0] * x[1]


def log_normal(end, mean, scale):
    return jnp.sum(jax.scipy.stats.norm.logpdf(end, mean, scale))


def balance_error(monkeypatch, *, temperature=TEMPERATURE, num_pairs=200):
    """Largest |log of π(x) q(y|x) a(x,y) / π(y) q(x|y) a(y,x)| over random pairs.

    The library's step computes a: its noise is replaced by the one that proposes y from x.
    """
    kernel = mala(step_size=STEP_SIZE, temperature=temperature)
    scale = math.sqrt(2.0 * STEP_SIZE * temperature)
    params = 0.4

    def log_flow(x, y):
        state = kernel.init(asymmetric_energy, params, x)
        mean = x - STEP_SIZE * jax.grad(asymmetric_energy, 1)(params, x)
        with monkeypatch.context() as patch:
            draw = ((y - mean) / scale, jnp.array([0.5]))
            patch.setattr(mala_module, "random_normal_and_uniform", lambda key, tree: draw)
            _, info = kernel.step(jax.random.key(0), asymmetric_energy, params, state)
        log_a = jnp.log(info.acceptance_rate)
        log_pi = -asymmetric_energy(params, x) / temperature
        return log_pi + log_normal(y, mean, scale) + log_a, info.acceptance_rate

    x, y = jax.random.normal(jax.random.key(1), (2, num_pairs, 2)) * 1.2
    forward, rate = jax.vmap(log_flow)(x, y)
    backward, rate_back = jax.vmap(log_flow)(y, x)
    # Of each pair one direction is certain and the other is not, so both branches are tested.
    assert np.all((rate == 1.0) | (rate_back == 1.0))
    assert np.mean((rate < 1.0) | (rate_back < 1.0)) > 0.9
    return np.abs(forward - backward).max()


@pytest.mark.parametrize("temperature", [1.0, TEMPERATURE])
def test_detailed_balance(monkeypatch, x64, temperature):
    assert balance_error(monkeypatch, temperature=temperature) < 1e-10


def test_the_check_sees_a_dropped_proposal_correction(monkeypatch, x64):
    monkeypatch.setattr(mala_module, "log_proposal", lambda start, end, **options: 0.0)
    assert balance_error(monkeypatch) > 1e-2


def test_log_proposal_is_the_density_of_the_proposal(x64):
    """Up to its constant, on a pytree."""
    kernel = mala(step_size=STEP_SIZE, temperature=TEMPERATURE)
    energy_fn = lambda params, x: asymmetric_energy(params, jnp.append(x["a"], x["b"]))  # noqa: E731
    start = kernel.init(energy_fn, 0.4, {"a": jnp.array([0.3]), "b": jnp.array(-0.8)})
    end = {"a": jnp.array([1.1]), "b": jnp.array(0.2)}
    ours = mala_module.log_proposal(start, end, step_size=STEP_SIZE, temperature=TEMPERATURE)
    scale = math.sqrt(2.0 * STEP_SIZE * TEMPERATURE)
    theirs = sum(
        log_normal(end[k], start.position[k] - STEP_SIZE * start.gradient[k], scale) for k in "ab"
    )
    constant = -2.0 * math.log(scale * math.sqrt(2.0 * math.pi))
    assert abs(ours + constant - theirs) < 1e-12


def test_acceptance_happens_as_often_as_it_says():
    kernel = mala(step_size=1.0)
    state = kernel.init(asymmetric_energy, 0.4, jnp.array([1.0, -1.5]))
    keys = jax.random.split(jax.random.key(0), 20_000)
    new, info = jax.vmap(lambda k: kernel.step(k, asymmetric_energy, 0.4, state))(keys)
    rate = np.asarray(info.acceptance_rate, np.float64)
    assert 0.05 < rate.mean() < 0.95
    # Given the proposals, the count is a sum of independent Bernoulli variables.
    z = (info.is_accepted.sum() - rate.sum()) / np.sqrt((rate * (1.0 - rate)).sum())
    assert abs(z) < 5.0
    moved = np.any(np.asarray(new.position) != np.asarray(state.position), axis=-1)
    np.testing.assert_array_equal(moved, info.is_accepted)


@pytest.mark.parametrize("step_size", [0.01, 0.3])
def test_the_state_caches_what_it_says(step_size):
    kernel = mala(step_size=step_size)
    state = kernel.init(asymmetric_energy, 0.4, jnp.array([1.0, -1.5]))
    state, info = run_chain(jax.random.key(0), kernel, asymmetric_energy, 0.4, state, 20)
    energy, gradient = jax.value_and_grad(asymmetric_energy, 1)(0.4, state.position)
    np.testing.assert_allclose(state.energy, energy, rtol=1e-5)
    np.testing.assert_allclose(state.gradient, gradient, rtol=1e-5)
    assert 0.0 < info.acceptance_rate <= 1.0


NUM_CHAINS, NUM_STEPS = 20_000, 25
KNOWN_LAWS = {
    # A step large enough that the Metropolis test has work to do.
    "double_well": (lambda: targets.double_well(tilt=0.8, quadratic=2.0), 0.15),
    "banana": (lambda: targets.banana(curvature=0.3, scale=1.5), 0.4),
}


def moment_z_scores(name):
    """Exact draws, 25 steps: the ends must be exact draws again. Chains are independent."""
    build, step_size = KNOWN_LAWS[name]
    target, kernel = build(), mala(step_size=step_size)

    @jax.jit
    @jax.vmap
    def end(key):
        start_key, chain_key = jax.random.split(key)
        state = kernel.init(target.energy, (), target.sample(start_key))
        state, info = run_chain(chain_key, kernel, target.energy, (), state, NUM_STEPS)
        return state.position, info.acceptance_rate

    ends, rate = end(jax.random.split(jax.random.key(0), NUM_CHAINS))
    assert 0.3 < rate.mean() < 0.9
    centred = np.asarray(ends, np.float64) - np.asarray(target.moments.mean)
    squares = centred**2
    variance = np.diag(target.moments.covariance)
    z_mean = centred.mean(0) / np.sqrt(variance / NUM_CHAINS)
    z_variance = (squares.mean(0) - variance) / np.sqrt(squares.var(0) / NUM_CHAINS)
    return np.abs(np.concatenate([z_mean, z_variance]))


@pytest.mark.parametrize("name", KNOWN_LAWS)
def test_known_laws_are_invariant(name):
    assert np.all(moment_z_scores(name) < 5.0)


@pytest.mark.parametrize("name", KNOWN_LAWS)
def test_the_invariance_check_sees_a_dropped_proposal_correction(monkeypatch, name):
    monkeypatch.setattr(mala_module, "log_proposal", lambda start, end, **options: 0.0)
    assert moment_z_scores(name).max() > 5.0


@pytest.mark.parametrize("outside", [jnp.inf, jnp.nan], ids=str)
def test_what_is_not_finite_is_rejected_and_flagged(outside):
    """The exponential law, with a wall at 0: E = x inside, infinite or undefined outside."""
    wall = lambda params, x: jnp.where(x > 0.0, x, outside)  # noqa: E731
    kernel = mala(step_size=0.5)
    num_chains = 10_000

    @jax.jit
    @jax.vmap
    def walk(key):
        start_key, chain_key = jax.random.split(key)
        state = kernel.init(wall, (), jax.random.exponential(start_key))

        def body(state, key):
            state, info = kernel.step(key, wall, (), state)
            return state, (state.position, info)

        return jax.lax.scan(body, state, jax.random.split(chain_key, 10))[1]

    positions, info = walk(jax.random.split(jax.random.key(0), num_chains))
    assert np.all(positions > 0.0)
    assert not np.all(info.is_finite)
    assert not np.any(info.is_accepted & ~info.is_finite)
    assert np.all(info.acceptance_rate[~info.is_finite] == 0.0)
    assert np.all(np.isfinite(info.energy))
    # The law has mean 1 and variance 1, and MALA keeps it whatever happens at the wall.
    assert abs(positions[:, -1].mean() - 1.0) * math.sqrt(num_chains) < 5.0


def test_a_start_without_an_energy_is_flagged():
    """The proposals would be fine; the chain cannot judge them, and says so."""
    start = jnp.array(2.0)
    hole = lambda params, x: jnp.where(x == start, jnp.nan, 0.5 * x**2)  # noqa: E731
    kernel = mala(step_size=0.1)
    state = kernel.init(hole, (), start)
    new, info = kernel.step(jax.random.key(0), hole, (), state)
    assert not info.is_finite
    assert not info.is_accepted
    assert info.acceptance_rate == 0.0
    assert new.position == start


def test_a_start_of_infinite_energy_walks_in():
    wall = lambda params, x: jnp.where(x > 0.0, 0.5 * x**2, jnp.inf)  # noqa: E731
    kernel = mala(step_size=0.5)
    state = kernel.init(wall, (), jnp.array(-0.1))
    state, _ = run_chain(jax.random.key(0), kernel, wall, (), state, 50)
    assert state.position > 0.0
    assert np.isfinite(state.energy)

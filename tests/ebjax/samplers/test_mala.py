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


METRICS = {
    "identity": None,
    "diagonal": np.array([0.6, 2.0]),
    "dense": np.array([[0.4, -0.5], [-0.5, 1.9]]),
}


def dense(inverse_mass):
    inverse_mass = np.eye(2) if inverse_mass is None else inverse_mass
    return np.diag(inverse_mass) if inverse_mass.ndim == 1 else inverse_mass


def log_proposal(x, y, *, inverse_mass, temperature):
    """log q(y|x) from its definition: a normal of mean x - h M⁻¹ ∇E(x), covariance 2hτ M⁻¹."""
    mean = x - STEP_SIZE * inverse_mass @ jax.grad(asymmetric_energy, 1)(0.4, x)
    covariance = 2.0 * STEP_SIZE * temperature * inverse_mass
    return jax.scipy.stats.multivariate_normal.logpdf(y, mean, covariance)


def balance_error(monkeypatch, *, temperature=TEMPERATURE, metric="identity", num_pairs=200):
    """Largest |log of π(x) q(y|x) a(x,y) / π(y) q(x|y) a(y,x)| over random pairs.

    The library's step computes a: its noise is replaced by the one that proposes y from x.
    """
    options = {"step_size": STEP_SIZE, "temperature": temperature}
    kernel = mala(**options, inverse_mass=METRICS[metric])
    inverse_mass, params = dense(METRICS[metric]), 0.4
    root = math.sqrt(2.0 * STEP_SIZE * temperature) * np.linalg.cholesky(inverse_mass)

    def log_flow(x, y):
        state = kernel.init(asymmetric_energy, params, x)
        mean = x - STEP_SIZE * inverse_mass @ jax.grad(asymmetric_energy, 1)(params, x)
        with monkeypatch.context() as patch:
            draw = (jnp.linalg.solve(root, y - mean), jnp.array([0.0]))
            patch.setattr(mala_module, "random_normal_and_uniform", lambda key, tree: draw)
            new, info = kernel.step(jax.random.key(0), asymmetric_energy, params, state)
        log_pi = -asymmetric_energy(params, x) / temperature
        log_q = log_proposal(x, y, inverse_mass=inverse_mass, temperature=temperature)
        # A uniform of zero accepts whatever can be accepted, so the end is what was proposed.
        miss = jnp.abs(new.position - y).max()
        return log_pi + log_q + jnp.log(info.acceptance_rate), info.acceptance_rate, miss

    x, y = jax.random.normal(jax.random.key(1), (2, num_pairs, 2)) * 0.9
    forward, rate, miss = jax.jit(jax.vmap(log_flow))(x, y)
    backward, rate_back, _ = jax.jit(jax.vmap(log_flow))(y, x)
    assert miss.max() < 1e-12
    # Of each pair one direction is certain and the other is not, so both branches are tested.
    assert np.all((rate == 1.0) | (rate_back == 1.0))
    assert np.mean((rate < 1.0) | (rate_back < 1.0)) > 0.9
    return np.abs(forward - backward).max()


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("temperature", [1.0, TEMPERATURE])
def test_detailed_balance(monkeypatch, x64, temperature, metric):
    assert balance_error(monkeypatch, temperature=temperature, metric=metric) < 1e-10


@pytest.mark.parametrize("metric", METRICS)
def test_the_check_sees_a_dropped_proposal_correction(monkeypatch, x64, metric):
    monkeypatch.setattr(mala_module, "log_proposal_ratio", lambda start, end, **options: 0.0)
    assert balance_error(monkeypatch, metric=metric) > 1e-2


@pytest.mark.parametrize("metric", ["diagonal", "dense"])
def test_the_check_sees_drifts_measured_without_the_metric(monkeypatch, x64, metric):
    ours = mala_module.kinetic_energy
    monkeypatch.setattr(
        mala_module, "kinetic_energy", lambda metric, g: ours(mala_module.make_metric(None), g)
    )
    assert balance_error(monkeypatch, metric=metric) > 1e-2


def test_log_proposal_ratio_is_that_of_the_densities(x64):
    """On a pytree."""
    inverse_mass = METRICS["dense"]
    kernel = mala(step_size=STEP_SIZE, temperature=TEMPERATURE)
    energy_fn = lambda params, x: asymmetric_energy(params, jnp.append(x["a"], x["b"]))  # noqa: E731
    x, y = jnp.array([0.3, -0.8]), jnp.array([1.1, 0.2])
    start, end = (kernel.init(energy_fn, 0.4, {"a": v[:1], "b": v[1]}) for v in (x, y))
    options = {"step_size": STEP_SIZE, "metric": mala_module.make_metric(inverse_mass)}
    ours = mala_module.log_proposal_ratio(start, end, temperature=TEMPERATURE, **options)
    options = {"inverse_mass": inverse_mass, "temperature": TEMPERATURE}
    theirs = log_proposal(y, x, **options) - log_proposal(x, y, **options)
    assert abs(ours - theirs) < 1e-12


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"step_size": -0.1}, "step_size is -0.1"),
        ({"step_size": 0.1, "temperature": 0.0}, "temperature is 0.0"),
        ({"step_size": 0.1, "inverse_mass": np.ones((2, 3))}, r"shape \(2, 3\)"),
    ],
)
def test_options_out_of_range_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        mala(**options)


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
    monkeypatch.setattr(mala_module, "log_proposal_ratio", lambda start, end, **options: 0.0)
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

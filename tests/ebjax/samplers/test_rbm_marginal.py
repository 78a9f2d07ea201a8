"""The visible chain of an RBM has its law, and annealing finds log Z and bounds the likelihood."""

import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ebjax.energies.boltzmann import (
    RBMParams,
    enumerate_law,
    rbm_free_energy,
    rbm_log_z,
    rbm_target,
)
from ebjax.samplers.rbm_marginal import (
    rbm_annealed_log_likelihood,
    rbm_annealed_log_z,
    rbm_marginal_gibbs,
)

module = importlib.import_module("ebjax.samplers.rbm_marginal")


def random_machine(num_visible, num_hidden, scale=1.0):
    generator = np.random.default_rng(0)
    shapes = ((num_visible, num_hidden), (num_visible,), (num_hidden,))
    return RBMParams(*(jnp.asarray(scale * generator.normal(size=s), jnp.float32) for s in shapes))


SMALL, BASE = random_machine(10, 6), jnp.linspace(-1.0, 1.0, 10)
# Nearly all of the way in one step, in the shape of the even ladder.
ONE_STEP = np.append(np.linspace(1e-6, 1e-4, 99), 1.0)


def law_z_scores(kernel, num_chains=20_000, num_steps=3):
    """From exact draws, frequencies of all states after a few steps against the exact law."""
    params = random_machine(3, 2, 1.5)
    target = rbm_target(params)
    start = jax.vmap(target.sample)(jax.random.split(jax.random.key(0), num_chains))

    def advance(key, x):
        state = kernel.init(rbm_free_energy, params, x)
        for step in range(num_steps):
            state, info = kernel.step(jax.random.fold_in(key, step), rbm_free_energy, params, state)
        return state.position, info.is_finite

    ends, is_finite = jax.jit(jax.vmap(advance))(
        jax.random.split(jax.random.key(1), num_chains), start
    )
    assert is_finite.all()
    probs = np.exp(enumerate_law(rbm_free_energy, params, (3,)).log_probs)
    counts = np.bincount(np.asarray(ends, int) @ np.array([4, 2, 1]), minlength=8)
    moved = np.mean(np.any(np.asarray(ends) != np.asarray(start), axis=1))
    assert moved > 0.2
    return np.abs(counts - num_chains * probs) / np.sqrt(num_chains * probs * (1.0 - probs))


def test_the_chain_keeps_the_law():
    assert law_z_scores(rbm_marginal_gibbs()).max() < 5.0


def test_the_law_check_sees_a_machine_without_its_hidden_bias():
    def without(params):
        return params._replace(hidden_bias=jnp.zeros_like(params.hidden_bias))

    assert law_z_scores(rbm_marginal_gibbs(machine=without)).max() > 5.0


def test_log_odds_that_are_not_finite_are_told():
    kernel = rbm_marginal_gibbs()
    broken = SMALL._replace(visible_bias=SMALL.visible_bias.at[0].set(jnp.nan))
    state = kernel.init(rbm_free_energy, broken, jnp.zeros(10))
    _, info = kernel.step(jax.random.key(0), rbm_free_energy, broken, state)
    assert not info.is_finite


def annealed(ladder=100):
    return rbm_annealed_log_z(
        jax.random.key(0), SMALL, BASE, num_chains=400, inverse_temperatures=ladder
    )


def log_z_z_score():
    result = annealed()
    assert result.log_z_standard_error < 0.05
    return abs(float((result.log_z - rbm_log_z(SMALL)) / result.log_z_standard_error))


def test_annealing_agrees_with_enumeration():
    assert log_z_z_score() < 5.0


def test_the_agreement_sees_a_base_without_its_hidden_units(monkeypatch):
    visible_only = lambda params, base_bias: jnp.sum(jax.nn.softplus(base_bias))  # noqa: E731
    monkeypatch.setattr(module, "_base_log_z", visible_only)
    assert log_z_z_score() > 5.0


def test_one_step_is_importance_sampling():
    """The log weights spread as those of independent pixels do, by enumeration."""
    states = enumerate_law(rbm_free_energy, SMALL, (10,)).states
    log_base = states @ BASE - jax.nn.softplus(BASE).sum()
    log_ratios = -jax.vmap(rbm_free_energy, (None, 0))(SMALL, states) - log_base
    mean = jnp.sum(jnp.exp(log_base) * log_ratios)
    deviation = jnp.sqrt(jnp.sum(jnp.exp(log_base) * (log_ratios - mean) ** 2))
    found = annealed(ONE_STEP).log_weights.std()
    assert abs(found / deviation - 1.0) < 5.0 / np.sqrt(400)  # a standard error is below 1/√N
    assert annealed().log_weights.std() < 0.5 * found


def bound_gaps(**options):
    """log p(x) less the conservative estimate, over exact draws of the machine."""
    target = rbm_target(SMALL)
    x = jax.jit(jax.vmap(target.sample))(jax.random.split(jax.random.key(3), 300))
    exact = -jax.vmap(rbm_free_energy, (None, 0))(SMALL, x) - rbm_log_z(SMALL)
    options = {"inverse_temperatures": 100, **options}
    return np.asarray(
        exact - rbm_annealed_log_likelihood(jax.random.key(4), SMALL, BASE, x, **options)
    )


def test_the_conservative_likelihood_is_below_and_close():
    gaps = bound_gaps()
    error = gaps.std() / np.sqrt(len(gaps))
    assert gaps.mean() > -5.0 * error
    assert gaps.mean() < 0.1
    assert bound_gaps(inverse_temperatures=ONE_STEP).mean() > gaps.mean() + 5.0 * error


def test_the_bound_check_sees_weights_of_the_wrong_sign(monkeypatch):
    """A run that starts at the examples but anneals from the base at them."""
    monkeypatch.setattr(module, "_backwards", lambda params: params)
    gaps = bound_gaps(inverse_temperatures=101)  # not the program that is compiled already
    error = gaps.std() / np.sqrt(len(gaps))
    assert gaps.mean() < -5.0 * error or gaps.mean() > 0.1


def test_errors_name_the_value():
    key = jax.random.key(0)
    with pytest.raises(ValueError, match=r"base_bias has shape \(3,\)"):
        rbm_annealed_log_z(key, SMALL, jnp.zeros(3))
    with pytest.raises(ValueError, match="num_chains is 0"):
        rbm_annealed_log_z(key, SMALL, BASE, num_chains=0)
    with pytest.raises(ValueError, match="inverse_temperatures is 0"):
        rbm_annealed_log_z(key, SMALL, BASE, inverse_temperatures=0)
    with pytest.raises(ValueError, match="chains_per_example is 0"):
        rbm_annealed_log_likelihood(key, SMALL, BASE, jnp.zeros((1, 10)), chains_per_example=0)

"""Deep Boltzmann machines against enumeration, in float64."""

import importlib
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ebjax.energies.boltzmann import (
    Layers,
    RBMParams,
    enumerate_states,
    rbm_free_energy,
    rbm_joint_energy,
    rbm_log_z,
)
from ebjax.energies.deep_boltzmann import (
    DeepBoltzmannParams,
    deep_boltzmann,
    deep_boltzmann_blocks,
    deep_boltzmann_energy,
    deep_boltzmann_free_energy,
    deep_boltzmann_log_z,
    deep_boltzmann_mean_field,
)
from ebjax.samplers import block_gibbs, sample

module = importlib.import_module("ebjax.energies.deep_boltzmann")

SIZES = [(3, 4), (3, 2, 4), (4, 3, 1, 2), (2, 3, 2, 2, 1)]


def machine(sizes, seed=0, scale=1.0):
    generator = np.random.default_rng(seed)
    weights = [scale * generator.normal(size=s) for s in itertools.pairwise(sizes)]
    return DeepBoltzmannParams(
        tuple(map(jnp.asarray, weights)),
        tuple(jnp.asarray(generator.normal(size=n)) for n in sizes),
    )


def all_states(sizes):
    states = np.asarray(enumerate_states((sum(sizes),)), float)
    return tuple(np.split(states, np.cumsum(sizes)[:-1], axis=1))


def energies_by_loop(params, states):
    """The energy written out with NumPy."""
    total = 0.0
    for layer, bias in zip(states, params.biases, strict=True):
        total = total - layer @ np.asarray(bias)
    for i, weights in enumerate(params.weights):
        total = total - np.einsum("si,ij,sj->s", states[i], np.asarray(weights), states[i + 1])
    return total


def log_sum_exp(values):
    peak = values.max()
    return peak + np.log(np.exp(values - peak).sum())


@pytest.mark.parametrize("sizes", SIZES)
def test_energy_and_log_z_by_enumeration(x64, sizes):
    params, states = machine(sizes), all_states(sizes)
    energies = energies_by_loop(params, states)
    ours = jax.jit(jax.vmap(deep_boltzmann_energy, (None, 0)))(params, states)
    np.testing.assert_allclose(ours, energies, atol=1e-12)
    log_z, slope = jax.jit(jax.value_and_grad(deep_boltzmann_log_z))(params)
    assert abs(log_z - log_sum_exp(-energies)) < 1e-11
    # The gradient of log Z is the mean of the statistics: what learning follows.
    probs = np.exp(-energies - float(log_z))
    for i, weights in enumerate(slope.weights):
        mean = np.einsum("s,si,sj->ij", probs, states[i], states[i + 1])
        np.testing.assert_allclose(weights, mean, atol=1e-11)
    np.testing.assert_allclose(slope.biases[-1], probs @ states[-1], atol=1e-11)


def log_z_error(sizes=(4, 3, 1, 2)):
    params = machine(sizes)
    exact = log_sum_exp(-energies_by_loop(params, all_states(sizes)))
    return abs(float(deep_boltzmann_log_z(params)) - exact)


def test_the_check_sees_a_layer_left_out(x64, monkeypatch):
    assert log_z_error() < 1e-11

    def without_above(params, x, layer):
        field = params.biases[layer]
        return field + x[layer - 1] @ params.weights[layer - 1] if layer else field

    monkeypatch.setattr(module, "_field", without_above)
    assert log_z_error() > 1e-2


@pytest.mark.parametrize("sizes", SIZES)
def test_free_energy_by_enumeration(x64, sizes):
    params, states = machine(sizes), all_states(sizes)
    energies = energies_by_loop(params, states)
    visible = np.asarray(enumerate_states((sizes[0],)), float)
    ours = jax.jit(jax.vmap(deep_boltzmann_free_energy, (None, 0)))(params, visible)
    for v, free in zip(visible, ours, strict=True):
        same = np.all(states[0] == v, axis=1)
        assert abs(free + log_sum_exp(-energies[same])) < 1e-11


def test_one_hidden_layer_is_the_restricted_machine(x64):
    params = machine((3, 4))
    (weights,), (visible_bias, hidden_bias) = params
    rbm = RBMParams(weights, visible_bias, hidden_bias)
    v, h = jnp.array([1.0, 0.0, 1.0]), jnp.array([0.0, 1.0, 1.0, 0.0])
    assert abs(deep_boltzmann_energy(params, (v, h)) - rbm_joint_energy(rbm, Layers(v, h))) < 1e-13
    assert abs(deep_boltzmann_free_energy(params, v) - rbm_free_energy(rbm, v)) < 1e-13
    assert abs(deep_boltzmann_log_z(params) - rbm_log_z(rbm)) < 1e-12


@pytest.mark.parametrize("sizes", [(3, 4), (3, 2, 4), (2, 3, 2, 2)])
def test_mean_field_bounds_the_free_energy_and_sweeps_lower_it(x64, sizes):
    params = machine(sizes, seed=1)
    visible = jnp.asarray(enumerate_states((sizes[0],)), float)
    exact = jax.jit(jax.vmap(deep_boltzmann_free_energy, (None, 0)))(params, visible)
    bounds = []
    for num_steps in (1, 2, 5, 200):
        fields = jax.jit(
            jax.vmap(
                lambda v, n=num_steps: deep_boltzmann_mean_field(params, v, num_steps=n),
            )
        )(visible)
        bounds.append(np.asarray(fields.free_energy))
        assert np.all(bounds[-1] >= np.asarray(exact) - 1e-12)
    assert np.all(np.diff(bounds, axis=0) <= 1e-12)
    assert np.max(fields.residual) < 1e-10
    if len(sizes) == 2:  # the hidden units are independent: nothing is lost
        np.testing.assert_allclose(bounds[0], exact, atol=1e-12)
    else:
        assert np.max(bounds[-1] - exact) > 1e-3


def test_block_gibbs_draws_the_joint_law():
    """Means of all units by two blocks, against enumeration; each block once in a step."""
    sizes = (3, 2, 3)
    params = machine(sizes, seed=2)
    states = all_states(sizes)
    energies = energies_by_loop(params, states)
    probs = np.exp(-energies - log_sum_exp(-energies))
    num_chains = 4000
    kernel = block_gibbs(blocks=deep_boltzmann_blocks(3))
    start = tuple(jnp.zeros((num_chains, n)) for n in sizes)
    draws = sample(
        jax.random.key(0),
        kernel,
        deep_boltzmann_energy,
        jax.tree.map(lambda leaf: leaf.astype(jnp.float32), params),
        start,
        num_samples=1,
        num_burn_in=40,
    ).positions
    z_scores, wrong = [], []
    for layer, drawn in zip(states, draws, strict=True):
        mean = probs @ layer
        error = np.sqrt(mean * (1 - mean) / num_chains)
        z_scores.append((np.asarray(drawn[0], np.float64).mean(axis=0) - mean) / error)
        wrong.append((layer.mean(axis=0) - mean) / error)
    assert np.abs(np.concatenate(z_scores)).max() < 5.0
    assert np.abs(np.concatenate(wrong)).max() > 5.0  # the uniform law would be seen


def test_initial_params_and_errors():
    energy = deep_boltzmann(scale=0.1)
    state = (jnp.ones(40), jnp.ones(30), jnp.ones(2))
    params = energy.init(jax.random.key(0), state)
    assert [leaf.shape for leaf in params.weights] == [(40, 30), (30, 2)]
    assert abs(float(params.weights[0].std()) - 0.1) < 0.01
    with pytest.raises(ValueError, match="The state has 2 layers; the machine has 3"):
        energy.apply(params, state[:2])
    with pytest.raises(ValueError, match="give at least 2"):
        energy.init(jax.random.key(0), state[:1])
    with pytest.raises(ValueError, match=r"2\^30 states are too many"):
        deep_boltzmann_log_z(params)
    with pytest.raises(ValueError, match="num_steps is 0"):
        deep_boltzmann_mean_field(params, state[0], num_steps=0)
    with pytest.raises(ValueError, match="num_layers is 1"):
        deep_boltzmann_blocks(1)

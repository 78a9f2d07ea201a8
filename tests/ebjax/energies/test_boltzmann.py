"""Boltzmann machines and enumerated laws."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ebjax.energies.boltzmann import (
    Layers,
    RBMParams,
    enumerate_law,
    enumerate_states,
    logit_table,
    rbm,
    rbm_free_energy,
    rbm_joint,
    rbm_joint_energy,
    rbm_log_z,
    rbm_target,
)


def machine(num_visible, num_hidden, seed=0):
    keys = jax.random.split(jax.random.key(seed), 3)
    shapes = ((num_visible, num_hidden), (num_visible,), (num_hidden,))
    return RBMParams(*(jax.random.normal(k, s) for k, s in zip(keys, shapes, strict=True)))


@pytest.mark.parametrize("sizes", [(3, 5), (5, 3)])
def test_free_energy_and_log_z_are_sums_over_the_joint_law(x64, sizes):
    params = machine(*sizes)
    visible, hidden = (jnp.asarray(enumerate_states((n,)), float) for n in sizes)
    joint = jax.vmap(lambda v: jax.vmap(lambda h: rbm_joint_energy(params, Layers(v, h)))(hidden))(
        visible
    )
    free = jax.vmap(lambda v: rbm_free_energy(params, v))(visible)
    np.testing.assert_allclose(free, -jax.nn.logsumexp(-joint, axis=1), atol=1e-12)
    assert abs(rbm_log_z(params) - jax.nn.logsumexp(-joint)) < 1e-12
    # d log Z / d b is the mean of v: the gradient that training follows.
    mean = jnp.einsum("vh,vi->i", jax.nn.softmax(-joint.ravel()).reshape(joint.shape), visible)
    np.testing.assert_allclose(jax.grad(rbm_log_z)(params).visible_bias, mean, atol=1e-12)
    no_bias = params._replace(hidden_bias=0.0 * params.hidden_bias)
    assert abs(rbm_log_z(no_bias) - jax.nn.logsumexp(-joint)) > 1e-3


@pytest.mark.parametrize("sizes", [(3, 6), (6, 3)])
def test_samples_of_either_layer(sizes):
    params = machine(*sizes, seed=1)
    weights = 2.0 * params.weights
    # Biases that nearly balance the weights: units are undecided alone and decided together.
    params = RBMParams(
        weights,
        0.3 * params.visible_bias - 0.5 * weights.sum(1),
        0.3 * params.hidden_bias - 0.5 * weights.sum(0),
    )
    target = rbm_target(params)
    law = enumerate_law(rbm_free_energy, params, (sizes[0],))
    assert abs(target.log_z - float(law.log_z)) < 1e-4
    draws = jax.vmap(target.sample)(jax.random.split(jax.random.key(0), 20_000))
    probs = np.exp(np.asarray(law.log_probs, np.float64))
    products = lambda x: np.einsum("si,sj->sij", x, x).reshape(len(x), -1)  # noqa: E731
    exact = probs @ products(np.asarray(law.states, np.float64))
    found = products(np.asarray(draws, np.float64)).mean(0)
    z = (found - exact) / np.sqrt(exact * (1.0 - exact) / len(draws))
    assert np.abs(z).max() < 5.0
    # The same check against independent units must fail: it sees correlations.
    mean = np.diag(exact.reshape(sizes[0], -1))
    alone = np.where(np.eye(sizes[0], dtype=bool), np.diag(mean), np.outer(mean, mean)).ravel()
    assert np.abs((found - alone) / np.sqrt(alone * (1.0 - alone) / len(draws))).max() > 5.0


def test_energies_of_machines():
    energy = rbm(4)
    params = energy.init(jax.random.key(0), jnp.zeros(6))
    assert params.weights.shape == (6, 4)
    x = Layers(jnp.ones(6), jnp.zeros(4))
    joint = rbm_joint()
    assert joint.init(jax.random.key(0), x).weights.shape == (6, 4)
    assert joint.apply(params, x).shape == ()
    with pytest.raises(ValueError, match="num_hidden is 0"):
        rbm(0)
    with pytest.raises(ValueError, match="too many"):
        rbm_log_z(RBMParams(jnp.zeros((21, 21)), jnp.zeros(21), jnp.zeros(21)))


@pytest.mark.parametrize(("shape", "num_categories"), [((2, 2), None), ((3,), 3)])
def test_states_are_all_and_in_order(shape, num_categories):
    states = enumerate_states(shape, num_categories)
    size, num_values = int(np.prod(shape)), num_categories or 2
    assert states.shape[0] == num_values**size
    digits = states if num_categories is None else states.argmax(-1)
    numbers = digits.reshape(len(states), -1) @ (num_values ** np.arange(size)[::-1])
    np.testing.assert_array_equal(numbers, np.arange(len(states)))
    assert num_categories is None or np.all(states.sum(-1) == 1.0)


@pytest.mark.parametrize("is_binary", [False, True])
def test_tables_are_what_they_say(x64, is_binary):
    logits = np.sin(np.arange(8.0) * 2.0).reshape(2, 2, 2)
    target = logit_table(logits, is_binary=is_binary)
    law = enumerate_law(target.energy, (), (3,), None if is_binary else 2)
    exact = np.exp(logits.ravel()) / np.exp(logits).sum()
    np.testing.assert_allclose(np.exp(law.log_probs), exact, atol=1e-12)
    assert abs(target.log_z - np.log(np.exp(logits).sum())) < 1e-12
    assert target.event_shape == law.states.shape[1:]
    draws = jax.vmap(target.sample)(jax.random.split(jax.random.key(0), 20_000))
    bits = np.asarray(draws if is_binary else draws[..., 1])
    counts = np.bincount((bits @ np.array([4, 2, 1])).astype(int), minlength=8)
    z = (counts - 20_000 * exact) / np.sqrt(20_000 * exact * (1.0 - exact))
    assert np.abs(z).max() < 5.0


def test_one_variable_and_wrong_tables():
    target = logit_table([0.3, -0.2, 1.0, 0.0])
    assert target.event_shape == (1, 4)
    np.testing.assert_allclose(target.energy((), jnp.eye(4)[2][None]), -1.0)
    for logits, options, message in (
        (np.zeros((2, 3)), {}, r"\(2, 3\)"),
        (np.zeros((3, 3)), {"is_binary": True}, "3 values"),
        ([0.0, np.inf], {}, "not finite"),
    ):
        with pytest.raises(ValueError, match=message):
            logit_table(logits, **options)

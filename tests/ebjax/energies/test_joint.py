"""Classifiers read as energies."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ebjax.energies.joint import (
    class_energy,
    classifier_from_linen,
    free_energy,
    joint_energy,
)
from ebjax.energies.networks import mlp_classifier

CLASSIFIER = mlp_classifier(4, (8,))


def made():
    params = CLASSIFIER.init(jax.random.key(0), jnp.zeros(2))
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.result_type(float)), params)
    return params, jax.random.normal(jax.random.key(1), (2,), jnp.result_type(float))


def test_the_class_sums_out(x64):
    """exp(-E(x)) = Σ_y exp(-E(x, y)), and the posterior of the class is the softmax."""
    params, x = made()
    marginal, joint = joint_energy(CLASSIFIER.apply), class_energy(CLASSIFIER.apply)
    energies = jnp.stack([joint(params, x, label) for label in range(4)])
    total = marginal(params, x)
    assert abs(total + jax.nn.logsumexp(-energies)) < 1e-13
    posterior = jax.nn.softmax(CLASSIFIER.apply(params, x))
    np.testing.assert_allclose(jnp.exp(total - energies), posterior, atol=1e-13)
    # The negative controls: logits that are normalised already, and a mean for a sum.
    normalised = joint_energy(lambda p, x: jax.nn.log_softmax(CLASSIFIER.apply(p, x)))
    assert abs(normalised(params, x)) < 1e-13
    assert abs(total) > 1e-2


def test_a_shift_of_all_logits_lowers_the_energy_and_keeps_the_posterior():
    logits = jnp.array([1.0, -0.5, 2.0])
    np.testing.assert_allclose(free_energy(logits + 3.0), free_energy(logits) - 3.0, rtol=1e-6)
    np.testing.assert_allclose(free_energy(jnp.full(5, 2.0)), -2.0 - np.log(5.0), rtol=1e-6)


@pytest.mark.parametrize("temperature", [0.1, 1.0, 10.0])
def test_bounds_of_the_free_energy(x64, temperature):
    logits = jnp.array([1.0, -0.5, 2.0, 0.3])
    energy = free_energy(logits, temperature)
    assert -2.0 - temperature * np.log(4) <= energy <= -2.0


def test_limits_of_the_temperature(x64):
    logits = jnp.array([[1.0, -0.5, 2.0], [1000.0, 999.0, -5.0]])
    np.testing.assert_allclose(free_energy(logits, 1e-3), -logits.max(axis=1), atol=1e-12)
    hot = free_energy(logits, 1e7)
    np.testing.assert_allclose(hot + 1e7 * np.log(3), -logits.mean(axis=1), atol=0.1)
    # The control: log Σ exp(f / T) without the factor T in front tends to neither.
    wrong = -jax.nn.logsumexp(logits / 1e-3, axis=-1)
    assert np.abs(wrong + logits.max(axis=1)).min() > 1.0


def test_a_temperature_of_the_joint_energy():
    params, x = made()
    expected = free_energy(CLASSIFIER.apply(params, x), 2.5)
    assert joint_energy(CLASSIFIER.apply, temperature=2.5)(params, x) == expected
    with pytest.raises(ValueError, match="temperature is 0"):
        joint_energy(CLASSIFIER.apply, temperature=0.0)


def test_a_label_out_of_range_is_not_a_class():
    params, x = made()
    assert jnp.isnan(class_energy(CLASSIFIER.apply)(params, x, 4))


def test_a_module_with_another_number_of_outputs_is_an_error():
    classifier = classifier_from_linen(nn.Dense(3), 4)
    params = classifier.init(jax.random.key(0), jnp.zeros(2))
    with pytest.raises(ValueError, match=r"Dense returned shape \(3,\)"):
        classifier.apply(params, jnp.zeros(2))
    with pytest.raises(ValueError, match="num_classes is 1"):
        classifier_from_linen(nn.Dense(1), 1)

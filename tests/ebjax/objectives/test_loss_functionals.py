"""Losses of energies of answers, by hand and by their limits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ebjax.objectives.loss_functionals import (
    classification_error_loss,
    energies_of_answers,
    hinge_loss,
    info_nce_loss,
    likelihood_loss,
    log_loss,
    perceptron_loss,
    square_square_loss,
)

ENERGIES = jnp.array([3.0, 1.0, 2.0])
LOSSES = [
    perceptron_loss,
    hinge_loss,
    log_loss,
    square_square_loss,
    classification_error_loss,
    likelihood_loss,
]


def test_values_by_hand():
    """With the answer 2 right, its energy is 2 and the most offending one has 1."""
    assert perceptron_loss(ENERGIES, 2) == 1.0
    assert hinge_loss(ENERGIES, 2, margin=0.5) == 1.5
    assert hinge_loss(ENERGIES, 1, margin=0.5) == 0.0
    np.testing.assert_allclose(log_loss(ENERGIES, 2), np.log(1 + np.exp(1.0)), rtol=1e-6)
    assert square_square_loss(ENERGIES, 2, margin=1.5) == 4.25
    np.testing.assert_allclose(
        classification_error_loss(ENERGIES, 2), 1 / (1 + np.exp(-1.0)), rtol=1e-6
    )
    expected = 2.0 + np.log(np.exp(-np.array([3.0, 1.0, 2.0])).sum())
    np.testing.assert_allclose(likelihood_loss(ENERGIES, 2), expected, rtol=1e-6)


def test_the_most_offending_answer_is_not_the_right_one():
    assert energies_of_answers(ENERGIES, 1) == (1.0, 2.0)
    assert energies_of_answers(ENERGIES, 0) == (3.0, 1.0)


def test_the_likelihood_between_its_limits(x64):
    """β → ∞ gives the perceptron loss; information NCE of all wrong answers is the likelihood."""
    energies = ENERGIES.astype(float)
    for label in range(3):
        cold = likelihood_loss(energies, label, inverse_temperature=1e4)
        assert abs(cold - perceptron_loss(energies, label)) < 1e-3
        wrong = jnp.delete(energies, label)
        for beta in (0.5, 1.0, 3.0):
            pair = (
                likelihood_loss(energies, label, inverse_temperature=beta),
                info_nce_loss(energies[label], wrong, inverse_temperature=beta),
            )
            assert abs(pair[0] - pair[1]) < 1e-12


@pytest.mark.parametrize("loss", LOSSES)
def test_a_step_lowers_the_right_answer_and_raises_the_offending_one(loss):
    slope = jax.grad(loss)(ENERGIES, 2)
    assert slope[2] > 0.0
    assert slope[1] < 0.0 or loss is square_square_loss  # beyond its margin of 1
    assert slope[0] <= 0.0


def test_only_the_perceptron_loss_is_content_with_collapse():
    collapsed = jnp.zeros(3)
    values = {loss.__name__: float(loss(collapsed, 0)) for loss in LOSSES}
    assert [name for name, value in values.items() if value == 0.0] == ["perceptron_loss"]

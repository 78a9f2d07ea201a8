"""Conditional NCE is stationary at the law of the data, and score matching at small noise."""

import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ebjax.objectives.conditional_noise_contrastive import (
    conditional_noise_contrastive,
    conditional_noise_contrastive_loss,
    gaussian_perturbation,
)
from ebjax.objectives.regularizers import energy_magnitude

module = importlib.import_module("ebjax.objectives.conditional_noise_contrastive")

TRUE = jnp.array([0.5, -0.8, 0.3])


def energy_fn(params, x):
    """Two wells of different depth, on the line."""
    return params[0] * x**4 + params[1] * x**2 + params[2] * x


def data_law():
    """A grid on the line and p_data there, times its spacing."""
    points = jnp.linspace(-4.0, 4.0, 401)
    weights = jnp.exp(-energy_fn(TRUE.astype(points.dtype), points))
    return points, weights / weights.sum()


def infinite_data(loss_fn, scale, bias=0.0):
    """The loss with both expectations by quadrature, over all pairs (x, ξ)."""
    points, weights = data_law()
    noise = jnp.linspace(-8.0, 8.0, 161)
    noise_weights = jnp.exp(-0.5 * noise**2)
    noise_weights = noise_weights / noise_weights.sum()

    def value(params):
        def pair(x, xi):
            y = x + scale * xi + bias
            return loss_fn(energy_fn(params, x), energy_fn(params, y)[None])

        losses = jax.vmap(jax.vmap(pair, (None, 0)), (0, None))(points, noise)
        return weights @ losses @ noise_weights

    return jax.jit(value)


def slope_at_truth(*arguments):
    return np.abs(jax.grad(infinite_data(*arguments))(TRUE.astype(float))).max()


@pytest.mark.parametrize("scale", [0.1, 0.7])
def test_the_truth_is_stationary(x64, scale):
    assert slope_at_truth(conditional_noise_contrastive_loss, scale) < 1e-10


def test_the_check_sees_a_wrong_sign_and_a_perturbation_with_a_drift(x64):
    wrong = lambda data, noise: conditional_noise_contrastive_loss(-data, -noise)  # noqa: E731
    assert slope_at_truth(wrong, 0.7) > 1e-2
    assert slope_at_truth(conditional_noise_contrastive_loss, 0.7, 0.3) > 1e-2


def test_small_noise_is_score_matching(x64):
    """(loss - 2 log 2) / (ε²/2) tends to E[|∇E|²/2 - ΔE], with an error of ε²."""
    params = jnp.array([0.4, -0.5, 0.1])
    points, weights = data_law()
    slope = jax.vmap(jax.grad(energy_fn, 1), (None, 0))(params, points)
    curvature = jax.vmap(jax.grad(jax.grad(energy_fn, 1), 1), (None, 0))(params, points)
    exact = weights @ (0.5 * slope**2 - curvature)
    errors = []
    for scale in (0.04, 0.02):
        value = infinite_data(conditional_noise_contrastive_loss, scale)(params)
        errors.append(abs((value - 2.0 * np.log(2.0)) / (0.5 * scale**2) - exact))
    assert errors[1] < 0.02 * abs(exact)
    assert 3.5 < errors[0] / errors[1] < 4.5


def known_shift(sign=1.0):
    """The objective with perturbations that are known, and the same by its formula."""
    params = TRUE.astype(float)
    batch = jnp.linspace(-1.0, 1.0, 5)
    objective = conditional_noise_contrastive(
        energy_fn, lambda key, x: x + 0.4, num_noise=2, regularizers=(energy_magnitude(0.1),)
    )
    keys = jax.random.split(jax.random.key(0), 5)
    loss, (carry, metrics) = objective.loss(
        params, objective.init(keys[0], params, batch), keys, batch
    )
    assert carry == ()
    data, shifted = energy_fn(params, batch), energy_fn(params, batch + 0.4)
    formula = 2.0 * jnp.log1p(jnp.exp(sign * (data - shifted))).mean()
    penalty = 0.1 * (jnp.sum(data**2) + 2.0 * jnp.sum(shifted**2)) / 15.0
    np.testing.assert_allclose(metrics["energy_gap"], (data - shifted).mean())
    np.testing.assert_allclose(metrics["accuracy"], (data < shifted).mean(), rtol=1e-6)
    return float(loss), float(formula + penalty)


def test_the_objective_is_its_formula(x64):
    np.testing.assert_allclose(*known_shift())


def test_the_formula_check_sees_the_wrong_sign(x64):
    loss, formula = known_shift(sign=-1.0)
    assert abs(loss - formula) > 0.1


def test_perturbations_differ_and_have_the_scale_asked_for():
    seen = []

    def perturb(key, x):
        y = gaussian_perturbation(0.3)(key, x)
        seen.append(y["a"])
        return y

    batch = {"a": jnp.zeros((200, 50)), "b": jnp.ones(200)}
    keys = jax.random.split(jax.random.key(0), 200)
    draws = jax.jit(jax.vmap(gaussian_perturbation(0.3)))(keys, batch)
    values = np.asarray(draws["a"])
    assert np.unique(values).size > 0.99 * values.size
    # The mean of n squares of N(0, s²) has the standard error s² sqrt(2/n).
    z = (np.mean(values**2) / 0.09 - 1.0) / np.sqrt(2.0 / values.size)
    assert abs(z) < 5.0
    objective = conditional_noise_contrastive(
        lambda params, x: params * x["b"], perturb, num_noise=3
    )
    loss, _ = jax.jit(objective.loss)(0.0, (), keys, batch)
    np.testing.assert_allclose(loss, 2.0 * np.log(2.0), rtol=1e-6)
    assert len(seen) == 1  # traced once, for all examples and perturbations


def test_errors_name_the_value():
    with pytest.raises(ValueError, match="num_noise is 0"):
        conditional_noise_contrastive(energy_fn, gaussian_perturbation(1.0), num_noise=0)
    with pytest.raises(ValueError, match=r"scale is 0\.0"):
        gaussian_perturbation(0.0)

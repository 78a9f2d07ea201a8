"""Ratio matching and marginalisation matching are smallest at the law of the data."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ebjax.energies.boltzmann import enumerate_law, enumerate_states
from ebjax.objectives.pseudolikelihood import flip_differences
from ebjax.objectives.ratio_matching import (
    marginalization_loss,
    ratio_matching,
    ratio_matching_loss,
)

LAWS = {"binary": ((4,), None), "categorical": ((2,), 3)}


def energy_fn(params, x):
    """A small network: no law on a lattice, and not affine in the sites."""
    hidden = jnp.tanh(params["w"] @ x.reshape(-1))
    return params["u"] @ hidden + params["b"] @ x.reshape(-1)


def random_params(num_inputs):
    generator = np.random.default_rng(0)
    shapes = {"w": (3, num_inputs), "u": (3,), "b": (num_inputs,)}
    return {name: jnp.asarray(generator.normal(size=shape)) for name, shape in shapes.items()}


def expected(loss_of_differences, law_name):
    """The expected loss and the parameters of the law that generates the data."""
    shape, num_categories = LAWS[law_name]
    truth = random_params(shape[0] * (num_categories or 1))
    law = enumerate_law(energy_fn, truth, shape, num_categories)

    def value(params):
        differences = jax.vmap(
            lambda x: flip_differences(energy_fn, params, x, num_categories=num_categories)
        )(law.states)
        return jnp.exp(law.log_probs) @ jax.vmap(loss_of_differences)(differences)

    return jax.jit(value), truth


def slope_at_truth(loss_of_differences, law_name):
    value, truth = expected(loss_of_differences, law_name)
    return max(np.abs(leaf).max() for leaf in jax.tree.leaves(jax.grad(value)(truth)))


FORMS = {"ratio": ratio_matching_loss, "marginalization": marginalization_loss}


@pytest.mark.parametrize("law_name", LAWS)
@pytest.mark.parametrize("form", FORMS)
def test_the_expected_loss_is_stationary_at_the_law_of_the_data(x64, form, law_name):
    assert slope_at_truth(FORMS[form], law_name) < 1e-10


BUGS = {
    "sign": lambda differences: ratio_matching_loss(-differences),
    "no square": lambda differences: jnp.sum(jax.nn.sigmoid(-differences)),
    "half of the ratio": lambda differences: ratio_matching_loss(0.5 * differences),
    "marginalisation without the other states": lambda differences: jnp.sum(
        jnp.square(1.0 + jnp.exp(-differences).sum(-1))
        - 2.0 * (1.0 + jnp.exp(-differences).sum(-1))
    ),
}


@pytest.mark.parametrize("law_name", LAWS)
@pytest.mark.parametrize("bug", BUGS)
def test_the_check_sees(x64, law_name, bug):
    assert slope_at_truth(BUGS[bug], law_name) > 1e-2


@pytest.mark.parametrize("law_name", LAWS)
@pytest.mark.parametrize("form", FORMS)
def test_other_laws_lose_more(x64, form, law_name):
    value, truth = expected(FORMS[form], law_name)
    for seed in range(5):
        away = jax.tree.map(
            lambda leaf, seed=seed: (
                leaf + 0.2 * jax.random.normal(jax.random.key(seed), leaf.shape)
            ),
            truth,
        )
        assert value(away) > value(truth) + 1e-6


def test_the_ratio_form_is_the_distance_of_ratios_and_a_constant(x64):
    """Hyvärinen's definition: Σ over pairs of (g of the model's ratio - g of the data's)²."""
    shape = LAWS["binary"][0]
    truth = random_params(4)
    data = enumerate_law(energy_fn, truth, shape)
    value, _ = expected(ratio_matching_loss, "binary")
    states = np.asarray(data.states)
    is_neighbour = np.abs(states[:, None] - states[None]).sum(-1) == 1

    def distance(params):
        model = np.asarray(enumerate_law(energy_fn, params, shape).log_probs)
        g = [1.0 / (1.0 + np.exp(a[:, None] - a[None])) for a in (model, data.log_probs)]
        pairs = np.exp(data.log_probs)[:, None] * np.square(g[0] - g[1]) * is_neighbour
        return pairs.sum()

    away = jax.tree.map(lambda leaf: 0.7 * leaf + 0.1, truth)
    # Each pair counts from both ends, and g(u)² + g(1/u)² has half of the slope of one end's.
    np.testing.assert_allclose(value(away) - value(truth), distance(away), rtol=1e-9)


def test_marginalisation_is_the_distance_of_inverse_conditionals_and_a_constant(x64):
    """Lyu's definition: E Σ_i (1 / p_data(x_i | rest) - 1 / p(x_i | rest))²."""
    shape, num_categories = LAWS["categorical"]
    value, truth = expected(marginalization_loss, "categorical")
    data = enumerate_law(energy_fn, truth, shape, num_categories)
    away = jax.tree.map(lambda leaf: 0.7 * leaf + 0.1, truth)

    def inverse(params):
        probs = np.exp(enumerate_law(energy_fn, params, shape, num_categories).log_probs)
        table = probs.reshape(3, 3)
        sums = (table.sum(0, keepdims=True), table.sum(1, keepdims=True))
        return np.stack([(total / table).ravel() for total in sums])

    weights = np.exp(data.log_probs)
    distance = (weights * np.square(inverse(away) - inverse(truth))).sum()
    np.testing.assert_allclose(value(away) - value(truth), distance, rtol=1e-9)


@pytest.mark.parametrize("form", FORMS)
def test_the_objective_is_the_mean_of_examples(x64, form):
    params = random_params(6)
    batch = jnp.asarray(enumerate_states((2,), 3)[:6], float)
    objective = ratio_matching(energy_fn, form=form, num_categories=3)
    keys = jax.random.split(jax.random.key(0), 6)
    loss, (carry, _) = objective.loss(params, objective.init(keys[0], params, batch), keys, batch)
    differences = jax.vmap(lambda x: flip_differences(energy_fn, params, x, num_categories=3))
    np.testing.assert_allclose(loss, jax.vmap(FORMS[form])(differences(batch)).mean())
    assert carry == ()


def test_errors_name_the_value():
    with pytest.raises(ValueError, match="form is 'other'"):
        ratio_matching(energy_fn, form="other")

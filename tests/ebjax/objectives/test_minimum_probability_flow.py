"""Minimum probability flow stands still at the law of the data, and only there."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ebjax.energies.boltzmann import enumerate_law, enumerate_states
from ebjax.energies.lattice import IsingParams, ising_lattice_energy
from ebjax.objectives.minimum_probability_flow import (
    minimum_probability_flow,
    minimum_probability_flow_loss,
)
from ebjax.objectives.pseudolikelihood import flip_differences

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


@pytest.mark.parametrize("law_name", LAWS)
def test_nothing_flows_at_the_law_of_the_data(x64, law_name):
    assert slope_at_truth(minimum_probability_flow_loss, law_name) < 1e-12


BUGS = {
    "sign": lambda differences: jnp.sum(jnp.exp(0.5 * differences)),
    "missing half": lambda differences: jnp.sum(jnp.exp(-differences)),
}


@pytest.mark.parametrize("law_name", LAWS)
@pytest.mark.parametrize("bug", BUGS)
def test_the_check_sees(x64, law_name, bug):
    assert slope_at_truth(BUGS[bug], law_name) > 1e-2


@pytest.mark.parametrize("law_name", LAWS)
def test_other_laws_lose_more(x64, law_name):
    value, truth = expected(minimum_probability_flow_loss, law_name)
    for seed in range(5):
        away = jax.tree.map(
            lambda leaf, seed=seed: (
                leaf + 0.2 * jax.random.normal(jax.random.key(seed), leaf.shape)
            ),
            truth,
        )
        assert value(away) > value(truth) + 1e-6


def test_the_loss_is_the_outflow_of_the_master_equation(x64):
    """d/dt of the probability that leaves x, with rates sqrt(p(y) / p(x)) over one-flip pairs."""
    truth = random_params(4)
    law = enumerate_law(energy_fn, truth, (4,))
    states, log_probs = np.asarray(law.states), np.asarray(law.log_probs)
    is_neighbour = np.abs(states[:, None] - states[None]).sum(-1) == 1
    rates = np.where(is_neighbour, np.exp(0.5 * (log_probs[None] - log_probs[:, None])), 0.0)
    losses = jax.vmap(
        lambda x: minimum_probability_flow_loss(flip_differences(energy_fn, truth, x))
    )(law.states)
    np.testing.assert_allclose(losses, rates.sum(1), rtol=1e-12)


def test_descent_on_every_state_finds_the_coupling(x64):
    """Exact weights instead of samples, as repeats of states: nothing but the objective's error."""
    apply = ising_lattice_energy(False).apply
    truth = IsingParams(jnp.array(0.5), jnp.array(-0.2))
    law = enumerate_law(apply, truth, (2, 2))
    objective = minimum_probability_flow(apply, is_multilinear=True)
    keys = jax.random.split(jax.random.key(0), 1)

    @jax.jit
    def update(params):
        def value(params):
            losses = jax.vmap(lambda x: objective.loss(params, (), keys, x[None])[0])(law.states)
            return jnp.exp(law.log_probs) @ losses

        return jax.tree.map(lambda p, g: p - 0.1 * g, params, jax.grad(value)(params))

    params = IsingParams(jnp.array(0.0), jnp.array(0.0))
    for _ in range(400):
        params = update(params)
    np.testing.assert_allclose(params, truth, atol=1e-6)


def test_the_objective_is_the_mean_of_examples(x64):
    params = random_params(4)
    batch = jnp.asarray(enumerate_states((4,))[:6], float)
    objective = minimum_probability_flow(energy_fn)
    keys = jax.random.split(jax.random.key(0), 6)
    loss, (carry, _) = objective.loss(params, objective.init(keys[0], params, batch), keys, batch)
    energies = jax.vmap(energy_fn, (None, 0))
    exact = 0.0
    for site in range(4):
        flipped = batch.at[:, site].set(1.0 - batch[:, site])
        exact += jnp.exp(0.5 * (energies(params, batch) - energies(params, flipped))).mean()
    np.testing.assert_allclose(loss, exact)
    assert carry == ()

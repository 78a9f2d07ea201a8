"""Chains that keep both layers of an RBM: their law, the gradient, what an update costs."""

import importlib
import re

import chex
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
)
from ebjax.objectives import persistent_contrastive_divergence
from ebjax.objectives.rbm_contrastive_divergence import rbm_persistent_contrastive_divergence
from ebjax.samplers.rbm_marginal import rbm_marginal_gibbs

module = importlib.import_module("ebjax.objectives.rbm_contrastive_divergence")


def random_machine(num_visible=3, num_hidden=2):
    generator = np.random.default_rng(0)
    shapes = ((num_visible, num_hidden), (num_visible,), (num_hidden,))
    return RBMParams(*(jnp.asarray(3.0 * generator.normal(size=s), float) for s in shapes))


def coins(key):
    return jax.random.bernoulli(key, 0.5, (3,)).astype(float)


def start(objective, params, num_slots, seed=0):
    """``(chains, keys, batch)``."""
    batch = jax.vmap(coins)(jax.random.split(jax.random.key(seed), num_slots))
    chains = objective.init(jax.random.key(seed + 1), params, batch)
    return chains, jax.random.split(jax.random.key(seed + 2), num_slots), batch


def chains_after(objective, params, num_updates, num_slots):
    """The chains under parameters that stay as they are."""
    chains, keys, batch = start(objective, params, num_slots)

    @jax.jit
    def advance(chains):
        def update(step, chains):
            step_keys = jax.vmap(jax.random.fold_in, (0, None))(keys, step)
            return objective.loss(params, chains, step_keys, batch)[1][0]

        return jax.lax.fori_loop(0, num_updates, update, chains)

    return advance(chains)


def law_z_scores(num_updates=40, num_slots=20_000, **options):
    """Frequencies of the states of both layers against the exact law."""
    params = random_machine()
    objective = rbm_persistent_contrastive_divergence(coins, **options)
    chains = chains_after(objective, params, num_updates, num_slots)
    states = enumerate_states((5,))
    energies = jax.vmap(rbm_joint_energy, (None, 0))(params, Layers(states[:, :3], states[:, 3:]))
    probs = np.asarray(jax.nn.softmax(-energies))
    # Chains of one slot are independent of each other too.
    units = np.concatenate([leaf.reshape(-1, leaf.shape[-1]) for leaf in chains.position], axis=1)
    counts = np.bincount(units.astype(int) @ 2 ** np.arange(5)[::-1], minlength=32)
    num = counts.sum()
    return np.abs(counts - num * probs) / np.sqrt(num * probs * (1.0 - probs))


@pytest.mark.parametrize("options", [{}, {"num_steps": 3}, {"chains_per_example": 2}], ids=str)
def test_chains_have_the_joint_law(options):
    num_updates = 80 if "chains_per_example" in options else 40
    assert law_z_scores(num_updates, **options).max() < 5.0


def test_the_law_check_sees_numbers_that_draw_both_layers(monkeypatch):
    move = module._move

    def reusing(keys, num_steps, rbm, hidden):
        moved = move(keys, num_steps, rbm, hidden)
        return moved._replace(uniform=moved.visible[:, :2] * moved.uniform)

    monkeypatch.setattr(module, "_move", reusing)
    assert law_z_scores().max() > 5.0


def test_the_law_check_sees_chains_that_are_born_at_each_update():
    assert law_z_scores(rebirth_probability=1.0).max() > 5.0


def test_the_gradient_is_that_of_the_free_energies(x64):
    params = random_machine()
    objective = rbm_persistent_contrastive_divergence(coins)
    chains, keys, batch = start(objective, params, 50)
    run = jax.jit(jax.value_and_grad(objective.loss, has_aux=True))
    (value, (new, metrics)), gradient = run(params, chains, keys, batch)

    def contrast(params):
        free = jax.vmap(rbm_free_energy, (None, 0))
        return free(params, batch).mean() - free(params, new.position.visible[:, 0]).mean()

    expected, slope = jax.value_and_grad(contrast)(params)
    chex.assert_trees_all_close((value, gradient), (expected, slope), rtol=1e-12, atol=1e-12)
    assert metrics["energy_gap"] == value
    assert np.any(new.position.visible[:, 0] != batch)


def compiled_products(objective):
    params = random_machine(20, 10)
    batch = jnp.zeros((6, 20))
    chains = objective.init(jax.random.key(0), params, batch)
    keys = jax.random.split(jax.random.key(1), 6)
    lowered = jax.jit(jax.grad(objective.loss, has_aux=True)).lower(params, chains, keys, batch)
    shapes = re.findall(r"= f32\[([0-9,]+)\]\S* dot\(", lowered.compile().as_text())
    # The product with the visible bias and its gradient are of a vector.
    return sum("1" not in shape.split(",") and "," in shape for shape in shapes)


def test_an_update_takes_three_products_of_matrices():
    def zeros(key):
        return jnp.zeros(20)

    assert compiled_products(rbm_persistent_contrastive_divergence(zeros)) == 3
    visible_only = persistent_contrastive_divergence(
        rbm_free_energy, rbm_marginal_gibbs(), zeros, num_steps=1, rebirth_probability=0.0
    )
    assert compiled_products(visible_only) == 4


# Hidden units that are what the visible ones are, and the other way round.
COPYING = RBMParams(200.0 * jnp.eye(3), jnp.full(3, -100.0), jnp.full(3, -100.0))


@pytest.mark.parametrize("rebirth_probability", [0.0, 0.3, 1.0])
def test_births_are_at_their_position(rebirth_probability):
    """Copying chains are for ever what they were at birth."""
    objective = rbm_persistent_contrastive_divergence(
        lambda key, example: example, num_steps=2, rebirth_probability=rebirth_probability
    )
    num_slots = 2000
    chains, keys, batch = start(objective, COPYING, num_slots)
    np.testing.assert_array_equal(chains.position.visible[:, 0], batch)
    np.testing.assert_array_equal(chains.position.hidden[:, 0], batch)
    others = 1.0 - batch
    _, (new, metrics) = jax.jit(objective.loss)(COPYING, chains, keys, others)
    is_reborn = new.position.visible[:, 0, 0] == others[:, 0]
    expected = np.where(is_reborn[:, None], others, batch)
    np.testing.assert_array_equal(new.position.visible[:, 0], expected)
    np.testing.assert_array_equal(new.position.hidden[:, 0], expected)
    _, (last, metrics) = jax.jit(objective.loss)(
        COPYING, new, jax.vmap(jax.random.fold_in, (0, None))(keys, 1), batch
    )
    p = rebirth_probability
    assert abs(is_reborn.mean() - p) <= 5.0 * np.sqrt(p * (1.0 - p) / num_slots)
    assert set(np.unique(last.age)) == {0.0: {4}, 0.3: {2, 4}, 1.0: {2}}[p]
    assert metrics["chain_age"] == last.age.mean()


def test_one_chain_of_a_slot_moves():
    objective = rbm_persistent_contrastive_divergence(coins, chains_per_example=3)
    chains, keys, batch = start(objective, random_machine(), 3000)
    _, (new, _) = jax.jit(objective.loss)(random_machine(), chains, keys, batch)
    moved = np.asarray(new.age - chains.age)
    assert set(np.unique(moved.sum(axis=1))) == {1}
    assert np.abs(moved.mean(axis=0) - 1 / 3).max() < 5.0 * np.sqrt(2 / 9 / 3000)
    for old, end in zip(chains.position, new.position, strict=True):
        is_changed = np.any(old != end, axis=-1)
        assert not np.any(is_changed & (moved == 0))
        assert np.any(is_changed & (moved == 1))


def test_log_odds_that_are_not_finite_are_told():
    objective = rbm_persistent_contrastive_divergence(coins, num_steps=2)
    params = random_machine()
    chains, keys, batch = start(objective, params, 10)
    for broken, share in (
        (params, 1.0),
        (params._replace(visible_bias=params.visible_bias.at[0].set(jnp.nan)), 0.0),
        (params._replace(hidden_bias=params.hidden_bias.at[0].set(jnp.inf)), 0.0),
    ):
        _, (_, metrics) = objective.loss(broken, chains, keys, batch)
        assert metrics["chains_finite"] == share


@pytest.mark.parametrize(
    ("field", "value"),
    [("num_steps", 0), ("chains_per_example", 0), ("rebirth_probability", 1.5)],
)
def test_impossible_options_are_named(field, value):
    with pytest.raises(ValueError, match=field):
        rbm_persistent_contrastive_divergence(coins, **{field: value})

"""The recipe of two modes: the weights find the masses, and without them nothing does."""

import functools

import jax
import numpy as np
import pytest

from ebjax.recipes.jarzynski import recipe
from ebjax.training import train


@functools.cache
def figures_of(method, dim=2, seed=0):
    config = recipe.config(
        method=method, dim=dim, seed=seed, num_devices=1, steps_per_call=200, log_every=200
    )
    run = recipe.build(config)
    state = train(run, config).state
    return run, state, run.evaluate(jax.random.key(1), state)


def check_jarzynski(figures):
    assert abs(figures["left_mass"] - 0.25) < 0.05
    assert abs(figures["kl"]) < 0.01
    assert figures["left_mean"] == pytest.approx(-5.0, abs=0.25)
    assert figures["right_mean"] == pytest.approx(4.0, abs=0.25)


def test_weighted_walkers_find_the_masses():
    run, state, figures = figures_of("jarzynski")
    check_jarzynski(figures)
    assert figures["log_z_error"] < 0.2
    assert 1 <= figures["num_resamplings"] <= 30
    draws = run.sample(jax.random.key(2), state, 100)
    assert draws["positions"].shape == (100, 2)
    assert set(run.figures(jax.random.key(3), state, draws)) == {"modes"}


def test_walkers_without_weights_lose_a_mode():
    _, _, figures = figures_of("pcd")
    assert min(figures["left_mass"], 1.0 - figures["left_mass"]) < 0.01
    assert figures["kl"] > 1.0
    with pytest.raises(AssertionError):
        check_jarzynski(figures)


def test_chains_from_the_data_do_not_see_the_masses():
    _, _, figures = figures_of("cd")
    assert 0.4 < figures["left_mass"] < 0.6
    assert figures["kl"] > 0.05
    with pytest.raises(AssertionError):
        check_jarzynski(figures)


@pytest.mark.slow
@pytest.mark.parametrize("dim", [2, 10])
def test_four_seeds(dim):
    """Mass 0.25 ± 0.03 over seeds, each within 0.05, KL below 0.01; the others fail."""
    all_figures = [figures_of("jarzynski", dim, seed)[2] for seed in range(4)]
    for figures in all_figures:
        check_jarzynski(figures)
    masses = np.array([figures["left_mass"] for figures in all_figures])
    assert abs(masses.mean() - 0.25) < 0.03
    for seed in range(4):
        lost = figures_of("pcd", dim, seed)[2]["left_mass"]
        assert min(lost, 1.0 - lost) < 0.01
        assert 0.4 < figures_of("cd", dim, seed)[2]["left_mass"] < 0.6


def test_each_example_comes_once_in_a_pass():
    run = recipe.build(recipe.config(num_data=7, batch_size=7))
    arrays = jax.tree.map(jax.numpy.asarray, run.source.arrays)
    batch = jax.vmap(lambda i: run.source.example(arrays, jax.random.key(0), i))(
        np.arange(14, dtype=np.uint32)
    )
    np.testing.assert_array_equal(batch[:7], run.source.arrays)
    np.testing.assert_array_equal(batch[7:], run.source.arrays)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("method", "score"),
        ("langevin_step_size", 0.0),
        ("left_mode", 5.0),
        ("left_mass", 0.0),
        ("ess_threshold", 2.0),
        ("dim", 0),
        ("learning_rate", -1.0),
    ],
)
def test_impossible_settings_are_named(field, value):
    with pytest.raises(ValueError, match=field):
        recipe.config(**{field: value})

"""The recipe of composed laws: each operation, each sampler, figures that can be wrong."""

import jax
import numpy as np
import pytest

from ebjax.evaluation import grid_law
from ebjax.recipes.composition import _SAMPLERS, recipe
from ebjax.training import train

SMALL = {
    "num_steps": 1500,
    "hidden_features": (64,),
    "num_frequencies": 16,
    "num_noise_levels": 40,
    "markov_steps": 1,
    "narrowest_noise": 0.2,
    "num_evaluated": 2000,
    "num_grid_points": 101,
    "num_devices": 1,
}


@pytest.fixture(scope="module")
def trained():
    """Operations differ in what is made of the energies, not in how they are learned."""
    config = recipe.config(**SMALL)
    return train(recipe.build(config), config).state


@pytest.mark.parametrize("operation", ["product", "mixture"])
def test_weighted_diffusion_has_the_exact_law(trained, operation):
    run = recipe.build(recipe.config(operation=operation, **SMALL))
    figures = run.evaluate(jax.random.key(1), trained)
    assert figures["tv_smc"] < 2.5 * figures["tv_of_exact_draws"]
    assert abs(figures["log_z_error"]) < 0.15
    assert {f"tv_{name}" for name in _SAMPLERS} < set(figures)
    if operation == "product":
        assert figures["tv_reverse"] > 2.0 * figures["tv_smc"]
    else:
        # Each part is normalised, so that both together have the mass of two.
        law = grid_law(run.energy, run.learned_params(trained), bounds=(-5.0, 5.0))
        assert law.log_z == pytest.approx(np.log(2.0), abs=0.15)


def test_draws_are_finite_and_drawn_as_pictures(trained):
    run = recipe.build(recipe.config(operation="negation", sampler="annealed", **SMALL))
    samples = run.sample(jax.random.key(2), trained, 50)
    assert samples["positions"].shape == (50, 2)
    assert np.isfinite(samples["energies"]).all()
    assert set(run.figures(jax.random.key(3), trained, samples)) == {"composition"}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"operation": "sum"}, "operation is 'sum'"),
        ({"first": "nowhere"}, "first is 'nowhere'"),
        ({"sampler": "gibbs"}, "sampler is 'gibbs'"),
        ({"widest_noise": 0.1}, "widest_noise is 0.1"),
        ({"temperature": 0.0}, "temperature"),
    ],
)
def test_wrong_settings_are_named(options, words):
    with pytest.raises(ValueError, match=words):
        recipe.config(**options)

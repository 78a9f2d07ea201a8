"""The diffusion recipe: a short run, figures of merit, settings that exclude each other."""

import jax
import pytest

from ebjax.training import train
from gflownet.recipes.diffusion import DiffusionConfig, build


@pytest.fixture(scope="module")
def trained():
    config = DiffusionConfig(
        num_steps=4,
        steps_per_call=2,
        log_every=2,
        checkpoint_every=4,
        batch_size=8,
        path_steps=4,
        features=8,
        num_layers=1,
        num_evaluated=64,
        num_devices=1,
    )
    return config, build(config), train(build(config), config)


def test_a_short_run_gives_all_figures(trained):
    _, run, result = trained
    state = result.state
    figures = run.evaluate(jax.random.key(0), state)
    assert figures["num_modes"] == 9.0
    assert figures["eubo_gap"] > 0.0
    assert figures["log_z_error"] > -figures["elbo_gap"]  # the bound is below the estimate
    assert 0.0 < figures["effective_share"] <= 1.0
    draws = run.sample(jax.random.key(1), state, 20)
    assert draws["positions"].shape == (20, 2)
    assert set(run.figures(jax.random.key(2), state, draws)) == {"samples"}
    assert set(run.monitor(jax.random.key(3), state)) == {"gap"}


@pytest.mark.parametrize(
    ("loss", "more"),
    [("vargrad", ()), ("pis", ()), ("tb", ("log_z",)), ("flsubtb", ("log_z", "flow"))],
)
def test_what_is_learned_is_what_the_loss_uses(loss, more):
    config = DiffusionConfig(loss=loss, features=4, path_steps=2)
    params = jax.eval_shape(build(config).init, jax.random.key(0))
    assert set(params) == {"policy", *more}
    assert (config.exploration == 0.0) == (loss == "pis")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"target": "moon"}, "target is 'moon'"),
        ({"loss": "mse"}, "loss is 'mse'"),
        ({"subtrajectory_decay": -1.0}, "subtrajectory_decay is -1"),
        ({"path_steps": 0}, "path_steps is 0"),
        ({"rebirth_probability": 1.5}, "rebirth_probability is 1.5"),
        ({"local_search_step_size": 0.0}, "local_search_step_size is 0.0"),
    ],
)
def test_impossible_settings_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        DiffusionConfig(**settings)


@pytest.mark.parametrize(
    ("target", "dim"),
    [
        ("nine_gaussians", 2),
        ("twenty_five_gaussians", 2),
        ("funnel", 10),
        ("many_well", 32),
    ],
)
def test_the_drift_has_the_dimensions_of_the_target(target, dim):
    config = DiffusionConfig(target=target, features=4, num_layers=1, path_steps=2)
    params = jax.eval_shape(build(config).init, jax.random.key(0))
    assert params["policy"]["Dense_4"]["bias"].shape == (dim,)

"""The continuous recipe: short runs, figures of merit, settings that exclude each other."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from ebjax.training import train
from gflownet.recipes import continuous
from gflownet.recipes.continuous import ContinuousConfig, build, kernel_density


@pytest.fixture(scope="module")
def trained():
    config = ContinuousConfig(
        environment="cube",
        num_steps=4,
        steps_per_call=2,
        log_every=2,
        checkpoint_every=4,
        batch_size=4,
        hidden_features=(8,),
        num_components=2,
        num_evaluated=64,
    )
    with pytest.MonkeyPatch.context() as patch:
        # Blocks of a size that takes one loop to compile, and a coarse picture.
        patch.setattr(continuous, "_BLOCK", 6)
        patch.setattr(continuous, "_GRID", 10)
        run = build(config)
        yield config, run, train(run, config)


def test_a_short_run_gives_all_figures(trained):
    config, run, result = trained
    state = result.state
    figures = run.evaluate(jax.random.key(0), state)
    assert figures["elbo_gap"] > -figures["log_z_error"]  # the bound is below the estimate
    assert 0.0 < figures["effective_share"] <= 1.0
    assert figures["jensen_shannon"] > figures["jensen_shannon_of_exact_samples"] > 0.0
    draws = run.sample(jax.random.key(1), state, 20)
    assert draws["positions"].shape == (20, 2)
    assert (draws["lengths"] >= 2).all()
    assert set(run.figures(jax.random.key(2), state, draws)) == {"densities"}
    assert set(run.monitor(jax.random.key(3), state)) == {"gap"}
    assert config.epsilon_decay_steps == 4


@pytest.mark.parametrize("environment", ["box", "corners", "torus"])
@pytest.mark.parametrize("objective", ["vargrad", "db", "subtb"])
def test_parameters_of_each_objective(environment, objective):
    config = ContinuousConfig(
        environment=environment, objective=objective, hidden_features=(4,), num_components=3
    )
    run = build(config)
    params = jax.eval_shape(run.init, jax.random.key(0))
    assert set(params) == {"policy"}
    assert run.flow is not None
    per_direction = run.flow.environment.num_actions + 2 * 3 * 3
    with_flow = objective in ("db", "subtb")
    assert params["policy"]["Dense_1"]["bias"].shape == (2 * per_direction + with_flow,)


def test_kernel_density_is_the_sum_of_kernels():
    points = np.random.default_rng(0).uniform(size=(7, 2))
    count = continuous._GRID
    middles = (np.arange(count) + 0.5) / count
    law = kernel_density(points).reshape(count, count)
    plain = np.zeros((count, count))
    for x, y in points:
        plain += np.exp(-np.hypot(middles[:, None] - x, middles[None] - y) / 0.1)
    np.testing.assert_allclose(law, plain / plain.sum(), rtol=1e-4)
    # On the circle 0 and the side are one place.
    circle = kernel_density(np.array([[0.0]]), side=2 * np.pi, is_periodic=True)
    np.testing.assert_allclose(circle, circle[::-1], rtol=1e-4)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"environment": "ball"}, "environment is 'ball'"),
        ({"objective": "fm"}, "objective is 'fm'"),
        ({"dim": 3}, "dim is 3; the box has 2"),
        ({"backward_policy": "free"}, "backward_policy is 'free'"),
        ({"epsilon": 1.5}, "epsilon is 1.5"),
        ({"hidden_features": (0,)}, r"hidden_features is \(0,\)"),
        ({"num_components": 0}, "num_components is 0"),
    ],
)
def test_impossible_settings_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        ContinuousConfig(**settings)

"""The recipe of sets: exact figures beside the learned ones, by objectives that fit."""

import jax
import pytest

from ebjax.training import train
from gflownet.recipes.sets import SetsConfig, build


def test_a_short_run_gives_all_figures():
    config = SetsConfig(
        size="small",
        num_steps=4,
        steps_per_call=2,
        log_every=2,
        checkpoint_every=4,
        batch_size=4,
        hidden_features=(8,),
        num_evaluated=20,
    )
    run = build(config)
    state = train(run, config).state
    figures = run.evaluate(jax.random.key(0), state)
    assert figures["elbo_gap"] > 0.0
    assert 0.0 < figures["inclusion_error"] <= figures["largest_inclusion_error"] < 1.0
    draws = run.sample(jax.random.key(1), state, 6)
    assert draws["sets"].shape == (6, 30)
    assert (draws["sets"].sum(axis=1) == 20).all()
    assert set(run.figures(jax.random.key(2), state, draws)) == {"inclusion"}
    assert set(run.monitor(jax.random.key(3), state)) == {"elbo_gap"}


@pytest.mark.parametrize("objective", ["tb", "flsubtb", "led", "tlm"])
def test_objectives_fit_the_loop(objective):
    """Parameters, carry and optimizer state keep their shapes; nothing is compiled."""
    config = SetsConfig(size="small", objective=objective, hidden_features=(8,), batch_size=4)
    run = build(config)

    def step(key):
        params = run.init(key)
        batch = jax.numpy.zeros(4)
        carry = run.objective.init(key, params, batch)
        keys = jax.random.split(key, 4)
        gradient, (after, _) = jax.grad(run.objective.loss, has_aux=True)(
            params, carry, keys, batch
        )
        opt_state = run.optimizer.init(params)
        updates, _ = run.optimizer.update(gradient, opt_state, params)
        return params, updates, carry, after

    params, updates, carry, after = jax.eval_shape(
        jax.vmap(step, axis_name="devices"), jax.random.split(jax.random.key(0), 1)
    )
    shapes = lambda tree: jax.tree.map(lambda leaf: leaf.shape, tree)  # noqa: E731
    assert shapes(params) == shapes(updates)
    assert shapes(carry) == shapes(after)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"size": "tiny"}, "size is 'tiny'"),
        ({"objective": "mdb"}, "take any other than mdb and forward_kl"),
        ({"objective": "nothing"}, "objective is 'nothing'"),
        ({"num_evaluated": 1}, "num_evaluated is 1"),
    ],
)
def test_impossible_settings_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        SetsConfig(**settings)

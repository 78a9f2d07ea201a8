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

"""Populations: ranks by hand, copies that are whole, members that are runs, a known toy."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ebjax.parallel import is_side_by_side
from ebjax.training import (
    Range,
    ScheduleConfig,
    hypervolume,
    rank_members,
    setting,
    train,
    train_population,
)
from ebjax.types import Objective, Recipe, Run, Source


@dataclasses.dataclass(frozen=True, kw_only=True)
class ToyConfig(ScheduleConfig):
    num_steps: int = setting(200)
    batch_size: int = setting(1)
    num_devices: int = setting(1)
    steps_per_call: int = setting(4)
    log_every: int = setting(4)
    learning_rate: float = setting(0.02)
    learning_rate_decay_steps: int = setting(0)
    first: float = setting(0.5, "weight of the first parameter")
    second: float = setting(0.5, "weight of the second")
    clip: float = setting(0.0, "0: none")


traced: list[bool] = []  # of each trace of a loss, whether it knew that others are beside it


def build(config):
    """Jaderberg's: the loss sees a weighted sum of squares, the figure an equal one."""

    def loss(params, carry, keys, batch):
        weights = jnp.stack([jnp.asarray(config.first), jnp.asarray(config.second)])
        traced.append(is_side_by_side())
        return jnp.sum(weights * jnp.square(params)), (carry, {})

    def figures(key, state):
        del key
        theta = np.asarray(state.params)
        return {"loss": float(np.sum(theta**2)), "first": float(abs(theta[0] - 0.5))}

    optimizer = optax.chain(
        *([optax.clip(config.clip)] if config.clip else []),
        optax.sgd(config.schedule(), momentum=0.5),
    )
    return Run(
        init=lambda key: jnp.full(2, 0.9) + 0.01 * jax.random.normal(key, (2,)),
        objective=Objective(lambda key, params, batch: jnp.zeros(len(batch)), loss),
        optimizer=optimizer,
        source=Source((), lambda arrays, key, position: position),
        sample=lambda key, state, num: {},
        evaluate=figures,
        figures=lambda key, state, samples: {},
        monitor=figures,
        monitor_name="loss",
    )


TOY = Recipe(ToyConfig, build, seed_is_key=True)
WEIGHTS = {"first": Range(0.0, 1.0), "second": Range(0.0, 1.0)}
LOSS = [("loss", 1.0)]


def run_toy(ranges=WEIGHTS, figures=LOSS, *, num_members=4, num_rounds=50, **options):
    history = []
    keywords = {
        name: options.pop(name)
        for name in ("quantile", "initial", "should_stop")
        if name in options
    }
    population = train_population(
        TOY,
        ToyConfig(**options),
        ranges,
        num_members=num_members,
        num_rounds=num_rounds,
        figures=figures,
        on_round=lambda number, population: history.append(population),
        **keywords,
    )
    return population, history


def test_ranks_by_hand():
    assert rank_members(np.array([[2.0], [1.0], [np.nan], [0.5]])).tolist() == [3, 1, 0, 2]
    # Two fronts; the second holds a copy of a member of the first, which adds nothing.
    scores = np.array([[0.0, 4.0], [4.0, 0.0], [1.0, 1.0], [1.0, 1.0], [4.0, 2.0], [np.nan, 0.0]])
    order = rank_members(scores).tolist()
    assert order[0] == 0  # best in the first figure
    assert order[1] == 1  # farthest from it
    assert set(order[2:4]) == {2, 3}
    assert order[4:] == [4, 5]
    assert rank_members(scores * [1.0, 100.0]).tolist() == order  # units do not matter


def test_hypervolume_by_hand():
    points = -np.array([[1.0, 2.0], [2.0, 1.0], [0.5, 0.5]])
    assert hypervolume(points, (0.0, 0.0)) == 3.0
    assert hypervolume(points[:1], (0.0, 0.0)) == 2.0
    assert hypervolume(points, (-1.0, -1.0)) == 0.0


def test_exploitation_finds_what_no_member_can():
    """Copies see both parameters in turn, though no member weighs them well for long."""
    best = {}
    for quantile in (0.0, 0.25):
        ends = [run_toy(seed=seed, quantile=quantile)[0].scores.min() for seed in range(3)]
        best[quantile] = max(ends)
    assert best[0.25] < 0.3 * best[0.0]


def test_a_member_is_the_run_that_it_is_alone():
    ranges = {"first": Range(0.1, 1.0), "learning_rate": Range(1e-3, 1e-1, is_log=True)}
    traced.clear()
    population, _ = run_toy(ranges, num_rounds=4, num_steps=40, quantile=0.0, seed=3)
    assert set(traced) == {True}
    traced.clear()
    for i, state in enumerate(population.states):
        own = {name: float(values[i]) for name, values in population.settings.items()}
        config = ToyConfig(num_steps=40, seed=3 + i, **own)
        alone = train(build(config), config).state
        np.testing.assert_allclose(state.params, alone.params, rtol=1e-5)
        np.testing.assert_allclose(state.ema, alone.ema, rtol=1e-5)
        assert int(state.step) == 40
    assert set(traced) == {False}


def test_copies_are_whole_and_only_they_change():
    _, history = run_toy(num_members=8, num_rounds=5, num_steps=40)
    copied = 0
    for before, after in itertools.pairwise(history):
        order = np.argsort(before.scores[:, 0])
        stays = before.parents == np.arange(8)
        assert set(np.flatnonzero(~stays)) <= set(order[-2:])
        assert set(before.parents[~stays]) <= set(order[:2])
        for name in WEIGHTS:
            np.testing.assert_array_equal(
                before.settings[name][stays], before.next_settings[name][stays]
            )
            np.testing.assert_array_equal(before.next_settings[name], after.settings[name])
        for i in np.flatnonzero(~stays):
            copied += 1
            state, parent = before.states[i], before.states[before.parents[i]]
            jax.tree.map(
                np.testing.assert_array_equal,
                (state.params, state.opt_state, state.ema, state.carry, state.step),
                (parent.params, parent.opt_state, parent.ema, parent.carry, parent.step),
            )
            assert not np.array_equal(
                jax.random.key_data(state.key), jax.random.key_data(parent.key)
            )
            assert any(
                before.next_settings[n][i] != before.settings[n][before.parents[i]] for n in WEIGHTS
            )
    assert copied == 8
    assert (history[-1].parents == np.arange(8)).all()


def test_members_that_diverge_are_replaced():
    ranges = {"learning_rate": Range(1e-2, 1e6, is_log=True)}
    population, history = run_toy(ranges, num_rounds=10, num_members=8)
    assert np.isnan(history[0].scores).any()
    assert not np.isnan(history[0].scores).all()
    assert np.isfinite(population.scores).sum() > np.isfinite(history[0].scores).sum()
    with pytest.raises(ValueError, match="no member"):
        run_toy({"learning_rate": Range(1e5, 1e6)}, num_rounds=2)


def test_a_stop_and_a_second_call_are_one_run():
    whole, _ = run_toy(num_rounds=6, num_steps=24)
    calls = iter([False, True])
    part, _ = run_toy(num_rounds=6, num_steps=24, should_stop=lambda: next(calls))
    assert part.step == 8
    joined, _ = run_toy(num_rounds=6, num_steps=24, initial=part)
    np.testing.assert_array_equal(joined.scores, whole.scores)
    for name in WEIGHTS:
        np.testing.assert_array_equal(joined.settings[name], whole.settings[name])


def test_two_figures_keep_a_front():
    """One wants the first parameter at 1/2, the other both at 0."""
    population, _ = run_toy(
        figures=[("loss", 1.0), ("first", 1.0)], num_members=8, num_rounds=10, num_steps=400
    )
    assert np.ptp(population.scores[:, 1]) > 0.1
    assert population.scores[:, 0].min() < 0.3


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"ranges": {"clip": Range(0.1, 1.0)}}, "decides what is computed"),
        ({"ranges": {"batch_size": Range(1.0, 2.0)}}, "batch_size is not a real number"),
        ({"ranges": {"first": Range(1.0, 0.0)}}, "first has the range"),
        ({"ranges": {"first": Range(0.0, 1.0, is_log=True)}}, "above 0"),
        ({"ranges": {}}, "ranges is empty"),
        ({"num_members": 1}, "num_members is 1"),
        ({"num_rounds": 7}, "num_rounds is 7"),
        ({"quantile": 0.7}, "quantile is 0.7"),
        ({"figures": [("kl", 1.0)]}, "no figure 'kl'"),
    ],
)
def test_wrong_calls_are_named(options, words):
    with pytest.raises(ValueError, match=words):
        run_toy(**{"num_rounds": 5, "num_steps": 20, **options})

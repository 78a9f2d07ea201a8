"""Several seeds in one program compute what each computes alone."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ebjax.loading import RECIPES, find_recipe
from ebjax.parallel import AXIS_NAME, is_side_by_side
from ebjax.training import TrainingConfig, init_state, make_update, train, train_seeds
from ebjax.types import Objective, Run, Source

SMALL = {
    "density": {"hidden_features": (8,), "num_frequencies": 4, "langevin_steps": 5},
    "digits": {"hidden_features": (8,), "chains_per_example": 1},
    "images": {"features": (8,), "chains_per_example": 1},
    "jem": {"hidden_features": (8,), "chains_per_example": 1},
    "jarzynski": {"num_data": 16},
    "energy_ood": {"hidden_features": (8,)},
    "rbm": {"num_hidden": 3},
    "diffusion": {"features": 8, "path_steps": 4},
    "hypergrid": {"hidden_features": (8,), "side": 3},
    "sets": {"hidden_features": (8,), "size": "small"},
}
# Traced in a second or two.
QUICK = ("density", "energy_ood", "hypergrid", "jarzynski", "rbm")


def built(name, seed, **settings):
    config = find_recipe(name).config(
        **{"batch_size": 8, **SMALL.get(name, {}), "seed": seed, **settings}
    )
    return find_recipe(name).build(config), config


def close(first, second, **options):
    first, second = (
        jax.tree.map(
            lambda leaf: (
                jax.random.key_data(leaf)
                if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
                else leaf
            ),
            tree,
        )
        for tree in (first, second)
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **options), first, second)


@pytest.mark.parametrize("name", [pytest.param("diffusion", marks=pytest.mark.slow), "density"])
def test_each_seed_is_the_run_that_it_is_alone(name):
    """States, metrics and judgements; a flow without chains, and an energy with them."""
    steps = {"num_steps": 12, "steps_per_call": 4, "log_every": 5, "checkpoint_every": 6}
    seeds, more = (3, 0, 8), {"num_grid_points": 21} if name == "density" else {}
    made = [built(name, seed, num_devices=1, **steps, **more) for seed in seeds]
    logged, saved = {}, {}
    states = train_seeds(
        made[0][0],
        [config for _, config in made],
        on_log=lambda i, step, metrics: logged.__setitem__((i, step), metrics),
        on_save=lambda i, step, state, figures: saved.__setitem__((i, step), (state, figures)),
    )
    assert len({float(jax.tree.leaves(state.params)[0].sum()) for state in states}) == 3
    for i, (run, config) in enumerate(made):
        rows = {}
        alone = train(
            run, config, on_log=lambda s, metrics, _, rows=rows: rows.update({s: metrics})
        )
        close(states[i], alone.state, rtol=2e-3, atol=2e-4)
        assert sorted(rows) == [step for j, step in sorted(logged) if j == i] == [5, 6, 10, 12]
        for step, row in rows.items():
            assert set(row) == set(logged[i, step])
            for metric, value in row.items():
                assert logged[i, step][metric] == pytest.approx(value, rel=2e-3, abs=2e-4)
        assert [step for j, step in sorted(saved) if j == i] == [6, 12]
        close(saved[i, 12][0], states[i], rtol=0, atol=0)
        assert saved[i, 12][1].items() <= logged[i, 12].items()


def test_a_stop_and_a_second_call_are_one_run():
    steps = {"num_steps": 12, "steps_per_call": 4, "checkpoint_every": 100}
    made = [built("rbm", seed, **steps) for seed in (1, 2)]
    run, configs = made[0][0], [config for _, config in made]
    whole = train_seeds(run, configs)
    saved = {}
    half = train_seeds(
        run,
        configs,
        on_save=lambda i, step, state, figures: saved.__setitem__(i, (step, state)),
        should_stop=lambda: True,
    )
    assert [saved[i][0] for i in (0, 1)] == [4, 4]
    assert [int(state.step) for state in half] == [4, 4]
    ended = train_seeds(run, configs, initial=[saved[i][1] for i in (0, 1)])
    for first, second in zip(whole, ended, strict=True):
        close(first, second, rtol=0, atol=0)


def fits_a_number(limit):
    """A run whose loss is NaN once an example is above a limit, which depends on the seed."""

    def loss(params, carry, keys, batch):
        value = jnp.mean(jnp.square(params - batch))
        metrics = {"side_by_side": jnp.asarray(is_side_by_side(), float)}
        return jnp.where(jnp.max(batch) > limit, jnp.nan, value), (carry, metrics)

    return Run(
        init=lambda key: jnp.zeros(()),
        objective=Objective(lambda key, params, batch: (), loss),
        optimizer=optax.sgd(0.1),
        source=Source((), lambda arrays, key, i: jax.random.normal(jax.random.fold_in(key, i))),
        sample=lambda key, state, num: {},
        evaluate=lambda key, state: {},
        figures=lambda key, state, samples: {},
    )


def test_a_seed_that_diverges_leaves_the_others_alone():
    base = TrainingConfig(num_steps=20, batch_size=4, steps_per_call=2, checkpoint_every=4)
    configs = [dataclasses.replace(base, seed=seed) for seed in range(6)]
    saved = []
    states = train_seeds(
        fits_a_number(2.6),
        configs,
        on_save=lambda i, step, state, _: saved.append((i, step, state)),
    )
    is_bad = [state is None for state in states]
    assert 0 < sum(is_bad) < 6
    rows = []
    without_limit = train_seeds(
        fits_a_number(np.inf), configs, on_log=lambda i, step, metrics: rows.append(metrics)
    )
    # They know that they are not alone, and one that is knows it too.
    assert {row["side_by_side"] for row in rows} == {1.0}
    train(fits_a_number(np.inf), base, on_log=lambda s, metrics, _: rows.append(metrics))
    assert rows[-1]["side_by_side"] == 0.0
    for i, state in enumerate(states):
        if state is not None:
            close(state, without_limit[i], rtol=1e-6)
            assert [step for j, step, _ in saved if j == i] == [4, 8, 12, 16, 20]
        else:  # what was saved of it before is good
            assert all(np.isfinite(kept.params) for j, _, kept in saved if j == i)
            assert len([step for j, step, _ in saved if j == i]) < 5


@pytest.mark.parametrize(
    "name",
    [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in RECIPES],
)
def test_recipes_say_whether_the_seed_is_the_key(name):
    """The program of an update, with its constants and data, is the same for two seeds or not."""

    def program(seed):
        run, config = built(name, seed)
        update = make_update(
            run.objective, run.optimizer, run.source, batch_size=8, axis_name=AXIS_NAME
        )
        state = jax.eval_shape(lambda: init_state(run, config))
        mapped = jax.vmap(update, (0, None), axis_name=AXIS_NAME)
        first = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((1, *leaf.shape), leaf.dtype), state)
        jaxpr = jax.make_jaxpr(mapped)(first, run.source.arrays)
        text = re.sub(r"0x[0-9a-f]+", "", str(jaxpr.jaxpr))
        return text, [*jaxpr.consts, *jax.tree.leaves(run.source.arrays)]

    (text, constants), (other_text, others) = program(0), program(1)
    is_same = text == other_text and all(
        np.array_equal(a, b) for a, b in zip(constants, others, strict=True)
    )
    assert find_recipe(name).seed_is_key == is_same


def test_what_cannot_be_together_is_refused():
    run, config = built("hypergrid", 0)
    with pytest.raises(ValueError, match="configs is empty"):
        train_seeds(run, [])
    with pytest.raises(ValueError, match="configs have num_steps 1000 and 7"):
        train_seeds(run, [dataclasses.replace(config, num_steps=n) for n in (1000, 7)])
    state = init_state(run, config)
    with pytest.raises(ValueError, match=r"states at the steps \[0, 1\]"):
        train_seeds(run, [config] * 2, initial=[state, state._replace(step=state.step + 1)])
    streaming = run._replace(source=run.source._replace(load=lambda key, first, num: ()))
    with pytest.raises(ValueError, match="source streams"):
        train_seeds(streaming, [config] * 2)

"""The one training step: devices, calls, average, groups, types, seeds."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ebjax.parallel import AXIS_NAME, data_parallel
from ebjax.training import (
    TrainingConfig,
    by_group,
    init_state,
    make_update,
    make_update_many,
)

BATCH_SIZE = 8
CONFIG = TrainingConfig(batch_size=BATCH_SIZE)


@functools.cache  # compiling is most of the time of these tests
def cached_run(make):
    return make()


def compiled(run, num_devices, backend):
    update = make_update(
        run.objective, run.optimizer, run.source, batch_size=BATCH_SIZE, axis_name=AXIS_NAME
    )
    devices = jax.devices()[:num_devices]
    return data_parallel(make_update_many(update), devices=devices, backend=backend)


def once_for_each_run(fn):
    results = {}

    def cached(run, *args):
        if (id(run), *args) not in results:
            # The run stays in the value, so that its id is not given to another one.
            results[id(run), *args] = run, fn(run, *args)
        return results[id(run), *args][1]

    return cached


cached = once_for_each_run(compiled)
initial = once_for_each_run(init_state)


def advance(run, *, num_devices=1, backend="pmap", calls=(3, 2), config=CONFIG, compiled=cached):
    """State and metrics after some calls of some updates each."""
    program, state = compiled(run, num_devices, backend), initial(run, config)
    replicated, split = program.place(state._replace(carry=()), state.carry)
    arrays, all_metrics = program.place_constant(run.source.arrays), []
    for length in calls:
        count = program.place_constant(jnp.asarray(length, jnp.int32))
        replicated, split, metrics = program.step(replicated, split, (arrays, count))
        all_metrics.append(jax.device_get(metrics))
    state, carry = program.collect(replicated, split)
    return state._replace(carry=carry), all_metrics


def numbers(state):
    return jax.tree.map(np.asarray, state._replace(key=jax.random.key_data(state.key)))


def assert_same(one, other, rtol=2e-5):
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=rtol),
        (numbers(one[0]), one[1]),
        (numbers(other[0]), other[1]),
    )


@pytest.mark.parametrize("backend", ["pmap", "shard_map"])
def test_1_2_and_8_devices_give_the_same_run(any_run, backend):
    run = cached_run(any_run)
    one = advance(run)  # plain SGD: Adam would hide a wrong scale of the gradient
    for num_devices in (2, 8):
        assert_same(one, advance(run, num_devices=num_devices, backend=backend))


@pytest.mark.parametrize("backend", ["pmap", "shard_map"])
@pytest.mark.parametrize("bug", ["no mean", "sum for mean"])
def test_the_comparison_of_devices_catches_a_planted_bug(pcd_run, monkeypatch, bug, backend):
    run = cached_run(pcd_run)
    one = advance(run)
    wrong = {"no mean": lambda tree, axis: tree, "sum for mean": jax.lax.psum}[bug]
    with monkeypatch.context() as patch:
        patch.setattr(jax.lax, "pmean", wrong)
        two = advance(run, num_devices=2, backend=backend, compiled=compiled)
    params = (one[0]._replace(carry=()), []), (two[0]._replace(carry=()), [])
    with pytest.raises(AssertionError):
        assert_same(*params, rtol=1e-3)


def test_backends_agree_on_one_device(any_run):
    run = cached_run(any_run)
    chex.assert_trees_all_close(
        numbers(advance(run)[0]), numbers(advance(run, backend="shard_map")[0]), rtol=1e-6
    )


def test_the_length_of_calls_does_not_change_the_parameters(any_run):
    run = cached_run(any_run)
    states = [numbers(advance(run, calls=calls)[0]) for calls in ((1,) * 10, (5, 5), (7, 3), (10,))]
    for state in states[1:]:
        chex.assert_trees_all_equal(state, states[0])


def test_metrics_are_means_over_the_updates_of_a_call(pcd_run):
    _, singles = advance(cached_run(pcd_run), calls=(1,) * 4)
    _, (together,) = advance(cached_run(pcd_run), calls=(4,))
    for name in ("loss", "energy_data", "gradient_norm"):
        mean = np.mean([metrics[name] for metrics in singles])
        np.testing.assert_allclose(together[name], mean, rtol=1e-5)


def test_the_energy_is_traced_once_for_a_whole_run(pcd_run):
    calls = []

    def counted(apply):
        def energy_fn(params, x):
            calls.append(None)
            return apply(params, x)

        return energy_fn

    run = pcd_run(energy_fn=counted)
    update = make_update(
        run.objective, run.optimizer, run.source, batch_size=BATCH_SIZE, axis_name=AXIS_NAME
    )
    program = data_parallel(make_update_many(update), devices=jax.devices()[:2])
    state = init_state(run, CONFIG)
    replicated, split = program.place(state._replace(carry=()), state.carry)
    assert not calls  # chains start from noise and ask for no energy
    counts = []
    for length in (5, 5, 3, 1, 7):
        count = jnp.asarray(length, jnp.int32)
        replicated, split, _ = program.step(replicated, split, (run.source.arrays, count))
        counts.append(len(calls))
    # Once for the kernel's start, once in its step, once in the loss; and never again, although
    # the parameters and the length of the calls change.
    assert counts == [counts[0]] * 5
    assert counts[0] <= 3


def test_state_is_a_fixed_point_in_structure_shape_and_dtype(any_run):
    run = any_run(optax.adam(1e-2))
    update = make_update(run.objective, run.optimizer, run.source, batch_size=BATCH_SIZE)
    state = init_state(run, CONFIG)
    after, metrics = jax.eval_shape(update, state, run.source.arrays)
    chex.assert_trees_all_equal_shapes_and_dtypes(after, jax.eval_shape(lambda state: state, state))
    assert all(leaf.shape == () for leaf in jax.tree.leaves(metrics))
    assert {"loss", "gradient_norm"} <= set(metrics)


def test_average_follows_its_formula(pcd_run):
    run, decay = pcd_run(), 0.3
    update = jax.jit(
        make_update(
            run.objective, run.optimizer, run.source, batch_size=BATCH_SIZE, ema_decay=decay
        )
    )
    state = init_state(run, CONFIG)
    chex.assert_trees_all_equal(state.ema, state.params)
    expected = jax.tree.map(np.asarray, state.params)
    for step in range(6):
        state, _ = update(state, jnp.asarray(run.source.arrays))
        kept = min(decay, (1 + step) / (10 + step))
        expected = jax.tree.map(
            lambda e, p, kept=kept: kept * e + (1 - kept) * np.asarray(p), expected, state.params
        )
    chex.assert_trees_all_close(state.ema, expected, rtol=1e-5, atol=1e-7)


def test_groups_have_their_own_rates(pcd_run):
    groups = by_group({"Dense_0": optax.sgd(1e-3), "Dense_1": optax.sgd(0.0)})

    def moved(run):  # by one step of SGD, so the rate times the gradient
        before, (after, _) = initial(run, CONFIG), advance(run, calls=(1,))
        return jax.tree.map(lambda a, b: np.asarray(b - a), before.params, after.params)

    by_one_rate, by_two = moved(cached_run(pcd_run)), moved(pcd_run(groups))
    expected = jax.tree.map(lambda step: step / 100, by_one_rate["Dense_0"])
    chex.assert_trees_all_close(by_two["Dense_0"], expected, rtol=1e-3, atol=1e-7)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(by_two["Dense_1"]))


def test_the_seed_decides_the_run(any_run):
    run = cached_run(any_run)
    same = [numbers(advance(run)[0]) for _ in range(2)]
    chex.assert_trees_all_equal(*same)
    other = numbers(advance(run, config=TrainingConfig(batch_size=BATCH_SIZE, seed=1))[0])
    differs = jax.tree.map(lambda a, b: np.any(a != b), same[0].params, other.params)
    assert any(jax.tree.leaves(differs))


def test_the_first_bad_step_is_named(pcd_run):
    run = pcd_run()

    def broken(params, carry, keys, batch):
        value, (carry, metrics) = run.objective.loss(params, carry, keys, batch)
        # The oldest chain gains at most 3 steps an update, so the first update is still good.
        return jnp.where(carry.age.max() >= 6, jnp.nan, value), (carry, metrics)

    bad = run._replace(objective=run.objective._replace(loss=broken))
    _, (together,) = advance(bad, calls=(10,))
    _, singles = advance(bad, calls=(1,) * 10)
    first = [int(metrics["bad_step"]) >= 0 for metrics in singles].index(True)
    assert 1 <= first < 10
    assert int(together["bad_step"]) == first
    assert int(advance(cached_run(pcd_run))[1][0]["bad_step"]) == -1


def test_parameters_that_overflow_in_the_last_update_are_bad(pcd_run):
    run = pcd_run(optax.sgd(jnp.inf))
    _, (metrics,) = advance(run, calls=(1,))
    assert np.isfinite(metrics["loss"])
    assert int(metrics["bad_step"]) == 0

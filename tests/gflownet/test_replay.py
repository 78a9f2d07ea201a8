"""Replay: buffers against a plain list, laws of drawing, what is replayed, settings of recipes."""

from __future__ import annotations

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats
from small_environments import exact_tables, random_tables, sets, tabular, tabulate

from ebjax.training import Checkpointer, init_state, train
from gflownet import score
from gflownet.objectives import trajectory_balance
from gflownet.recipes.hypergrid import HypergridConfig, build
from gflownet.replay import (
    REPLAY_RULES,
    ReplayBuffer,
    empty_buffer,
    replay_probabilities,
    replay_sampler,
    store,
)
from gflownet.sampling import backward_sampler, forward_sampler, mixed_sampler

FIVE_SIGMA = 2 * stats.norm.sf(5)


# Buffers


def plain_store(kept, x, log_reward, *, rule, capacity, min_distance):
    """The list of ``(x, log R)``, oldest first, after one more object."""
    near = [entry for entry in kept if abs(entry[0] - x) <= min_distance]
    if any(entry[1] >= log_reward for entry in near):
        return kept
    kept = [entry for entry in kept if entry not in near]
    if len(kept) == capacity:
        given_up = kept[0] if rule == "fifo" else min(kept, key=lambda entry: entry[1])
        if rule != "fifo" and given_up[1] >= log_reward:
            return kept
        kept = [entry for entry in kept if entry is not given_up]
    return [*kept, (x, log_reward)]


@pytest.mark.parametrize("min_distance", [0.0, 2.0])
@pytest.mark.parametrize("rule", ["fifo", "ranked"])
def test_buffer_is_a_plain_list(rule, min_distance):
    rng = np.random.default_rng(0)
    xs = rng.integers(0, 30, 120)
    # Rewards without ties; that of an object may have changed when it comes again.
    log_rewards = rng.permutation(120).astype(np.float32)
    kept: list = []
    histories, sizes = [], set()
    for x, log_reward in zip(xs.tolist(), log_rewards.tolist(), strict=True):
        options = {"rule": rule, "capacity": 7, "min_distance": min_distance}
        kept = plain_store(kept, x, log_reward, **options)
        histories.append(kept)
        sizes.add(len(kept))

    def body(buffer, item):
        buffer = store(buffer, *item, rule=rule, min_distance=min_distance)
        return buffer, buffer

    start = empty_buffer(jnp.zeros((), jnp.int32), 7)
    items = (jnp.asarray(xs, jnp.int32), jnp.asarray(log_rewards))
    _, buffers = jax.jit(lambda: jax.lax.scan(body, start, items))()
    for step, expected in enumerate(histories):
        states, rewards, order = (np.asarray(leaf)[step] for leaf in buffers)
        places = np.argsort(order)[np.sort(order) >= 0]
        found = [(int(states[i]), float(rewards[i])) for i in places]
        assert found == expected, step
        assert (rewards[order < 0] == -np.inf).all()
    assert max(sizes) == 7
    if min_distance:  # the better of those nearby stay
        gaps = np.diff(sorted(x for x, _ in kept))
        assert (gaps > min_distance).all()


def expected_probabilities(log_reward, rule):
    """In numpy, of N filled places."""
    reward = np.exp(np.asarray(log_reward, np.float64))
    if rule == "fifo":
        return np.full(len(reward), 1.0 / len(reward))
    if rule == "prioritized":
        threshold = np.percentile(reward, 90)
        # Interpolation may miss a tie by a rounding error.
        high, low = reward >= threshold * (1 - 1e-12), reward <= threshold * (1 + 1e-12)
        return 0.5 * high / high.sum() + 0.5 * low / low.sum()
    rank = stats.rankdata(-reward, method="ordinal") - 1
    weights = 1.0 / (0.01 * len(reward) + rank)
    return weights / weights.sum()


@pytest.mark.parametrize("count", [1, 2, 10, 11, 12, 31, 40])
@pytest.mark.parametrize("rule", REPLAY_RULES)
def test_probabilities(rule, count):
    rng = np.random.default_rng(count)
    for values in (rng.standard_normal(count), rng.integers(0, 3, count)):
        places = rng.permutation(50)[:count]
        log_reward = np.full(50, -np.inf, np.float32)
        order = np.full(50, -1, np.int32)
        log_reward[np.sort(places)] = values
        order[np.sort(places)] = rng.permutation(count)
        buffer = ReplayBuffer((), jnp.asarray(log_reward), jnp.asarray(order))
        found = np.asarray(replay_probabilities(buffer, rule))
        assert not found[order < 0].any()
        np.testing.assert_allclose(
            found[np.sort(places)], expected_probabilities(values, rule), rtol=1e-5
        )
    if rule == "prioritized" and count == 40:
        assert expected_probabilities(np.arange(40.0), rule)[-1] > 0.1  # and not 1 / 40


@pytest.mark.parametrize("rule", REPLAY_RULES)
def test_what_comes_often_is_not_drawn_more_often(rule):
    items = [(jnp.asarray(x), jnp.asarray(float(x))) for x in range(20)]
    once, often = empty_buffer(jnp.asarray(0), 30), empty_buffer(jnp.asarray(0), 30)
    put = jax.jit(lambda buffer, item: store(buffer, *item, rule=rule))
    for item in items:
        once = put(once, item)
    for item in [*items[:4], *[items[3]] * 100, *items[4:]]:
        often = put(often, item)
    probabilities = [np.asarray(replay_probabilities(buffer, rule)) for buffer in (once, often)]
    np.testing.assert_array_equal(*probabilities)


def test_empty_buffers_have_no_probability():
    for rule in REPLAY_RULES:
        assert not replay_probabilities(empty_buffer(jnp.asarray(0), 5), rule).any()


# The sampler


def replay_of(environment, policy, *, rule="fifo", num_new=2, num_replayed=2, **options):
    """New trajectories end where the batch says."""
    states = tabulate(environment).states
    given = backward_sampler(
        environment, policy, lambda key, i: jax.tree.map(lambda leaf: jnp.asarray(leaf)[i], states)
    )
    return replay_sampler(
        environment,
        policy,
        given,
        num_new=num_new,
        num_replayed=num_replayed,
        capacity=10,
        rule=rule,
        **options,
    )


def test_replayed_objects_come_from_the_buffer_of_their_group():
    environment, policy = tabular(sets())
    params = {"policy": random_tables(sets(), 0)}
    tables = tabulate(sets())
    ends = np.flatnonzero(tables.is_terminal)
    sampler = replay_of(environment, policy, rule="ranked", num_new=2, num_replayed=500)
    assert sampler.is_on_policy
    assert sampler.feedback is None
    batch = np.zeros(2 * 502, np.int64)
    carry = sampler.init(jax.random.key(0), params, batch)
    assert carry.buffer.log_reward.shape == (2, 10)

    @jax.jit
    def draw(carry, keys, batch):
        return sampler.sample(params, carry, keys, batch)

    for step in range(2):
        found = ends[[step, step + 1, 4 + step, 4 + step]]  # two of the first group, one
        batch[[0, 1, 502, 503]] = found
        keys = jax.random.split(jax.random.key(step), len(batch))
        t, carry, metrics = draw(carry, keys, batch)
        places = np.asarray(jax.vmap(environment.state_index)(t.terminal)).reshape(2, 502)
        np.testing.assert_array_equal(places[:, :2].ravel(), found)
        np.testing.assert_allclose(t.log_reward, tables.log_reward[places.ravel()], rtol=1e-6)
        known = (ends[: step + 2], ends[4 : 5 + step])
        for group, objects in enumerate(known):
            expected = 500 * expected_probabilities(tables.log_reward[objects], "ranked")
            counts = np.array([(places[group, 2:] == x).sum() for x in objects])
            assert counts.sum() == 500
            if len(objects) > 1:
                assert stats.chisquare(counts, expected).pvalue > FIVE_SIGMA
                # The planted bug: the worst has rank 0.
                wrong = expected_probabilities(-tables.log_reward[objects], "ranked")
                assert stats.chisquare(counts, 500 * wrong).pvalue < FIVE_SIGMA
        assert metrics["buffer_size"] == np.mean([len(objects) for objects in known])
    assert metrics["reward_calls"] == pytest.approx(2 / 502)
    assert metrics["replayed_log_reward"] == pytest.approx(
        float(np.asarray(t.log_reward).reshape(2, 502)[:, 2:].mean()), rel=1e-5
    )
    new = jax.tree.map(np.asarray, (t.log_reward, t.log_pf, t.log_pb))
    is_new = np.tile(np.arange(502) < 2, 2)
    elbo = (new[0] - (new[1] - new[2]).sum(axis=0))[is_new].mean()
    assert metrics["elbo"] == pytest.approx(float(elbo), rel=1e-5)
    assert metrics["log_reward"] == pytest.approx(float(new[0][is_new].mean()), rel=1e-5)


def test_nothing_of_the_policy_is_stored():
    # After the policy has changed, the loss on the same objects is that of the new one.
    environment, policy = tabular(sets())
    old, changed = random_tables(sets(), 0), random_tables(sets(), 1)
    sampler = replay_of(environment, policy)
    batch = jnp.asarray(np.resize(np.flatnonzero(tabulate(sets()).is_terminal), 8))
    keys = jax.random.split(jax.random.key(0), 8)
    objective = trajectory_balance(environment, policy, sampler=sampler)

    @jax.jit
    def after(tables, carry):
        params = {"policy": tables, "log_z": jnp.zeros(())}
        value, (carry, _) = objective.loss(params, carry, keys, batch)
        t = sampler.sample(params, carry, keys, batch)[0]
        anew = score(environment, policy, tables, t, is_on_policy=False)
        recorded = jnp.abs(anew.log_pf - t.log_pf).max() + jnp.abs(anew.log_pb - t.log_pb).max()
        residual = (anew.log_pf - anew.log_pb).sum(axis=0) - t.log_reward
        return value, jnp.mean(residual**2), recorded, carry

    carry = sampler.init(keys[0], {"policy": old}, batch)
    first, _, _, carry = after(old, carry)
    second, anew, recorded, carry = after(changed, carry)
    assert recorded < 1e-5
    assert second == pytest.approx(float(anew), rel=1e-5)
    assert abs(second - first) > 0.1


def test_mixture_of_new_replayed_and_given():
    environment, policy = tabular(sets())
    tables, log_z = exact_tables(sets(), "random")
    params = {"policy": jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), tables)}
    params["log_z"] = jnp.float32(log_z)
    new = forward_sampler(environment, policy, epsilon=1.0, temperature=2.0)
    replay = replay_sampler(
        environment, policy, new, num_new=1, num_replayed=1, capacity=5, rule="prioritized"
    )
    ends = jnp.asarray(np.resize(np.flatnonzero(tabulate(sets()).is_terminal), 12))
    states = jax.tree.map(lambda leaf: jnp.asarray(leaf)[ends], tabulate(sets()).states)
    sampler = mixed_sampler([(replay, 2), (backward_sampler(environment, policy), 1)])
    objective = trajectory_balance(environment, policy, sampler=sampler)
    keys = jax.random.split(jax.random.key(0), 12)
    carry = sampler.init(keys[0], params, states)
    assert carry[0].buffer.order.shape == (4, 5)

    @jax.jit
    def draw(carry, keys, states):
        return sampler.sample(params, carry, keys, states)[:2]

    @jax.jit
    @jax.value_and_grad
    def loss(params):
        return objective.loss(params, carry, keys, states)[0]

    t, after = draw(carry, keys, states)
    np.testing.assert_array_equal(t.terminal[2::3], states[2::3])
    # At the first update only what is new can be replayed.
    np.testing.assert_array_equal(t.terminal[1::3], t.terminal[::3])
    # At the exact flow every residual vanishes, and so does the gradient.
    value, gradient = loss(params)
    assert value < 1e-9
    assert max(jnp.abs(leaf).max() for leaf in jax.tree.leaves(gradient)) < 1e-4
    # Two halves on two devices are the whole.
    half = jax.tree.map(lambda leaf: leaf[: len(leaf) // 2], (carry, keys, states))
    other = jax.tree.map(lambda leaf: leaf[len(leaf) // 2 :], (carry, keys, states))
    parts = [draw(*part) for part in (half, other)]
    joined = jnp.concatenate([part[0].actions for part in parts], axis=1)
    np.testing.assert_array_equal(joined, t.actions)
    stored = jnp.concatenate([part[1][0].buffer.log_reward for part in parts])
    np.testing.assert_array_equal(stored, after[0].buffer.log_reward)


def test_losses_of_new_trajectories_find_their_way_back():
    environment, policy = tabular(sets())
    seen = []
    new = backward_sampler(environment, policy)._replace(
        feedback=lambda carry, t, losses: seen.append((t.valid.shape, losses.tolist())) or carry
    )
    sampler = replay_sampler(environment, policy, new, num_new=2, num_replayed=1, capacity=5)
    params = {"policy": random_tables(sets(), 0)}
    ends = np.resize(np.flatnonzero(tabulate(sets()).is_terminal), 6)
    states = jnp.asarray(tabulate(sets()).states[ends])
    carry = sampler.init(jax.random.key(0), params, states)
    keys = jax.random.split(jax.random.key(0), 6)
    shapes = jax.eval_shape(lambda: sampler.sample(params, carry, keys, states)[0])
    t = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    sampler.feedback(carry, t, jnp.arange(6.0))
    assert seen == [((3, 4), [0.0, 1.0, 3.0, 4.0])]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("num_new", 0),
        ("num_replayed", 0),
        ("capacity", 0),
        ("rule", "best"),
        ("min_distance", -1.0),
    ],
)
def test_options_that_are_refused(name, value):
    environment, policy = tabular(sets())
    options = {"num_new": 1, "num_replayed": 1, "capacity": 5, name: value}
    with pytest.raises(ValueError, match=f"{name} is {value!r}"):
        replay_sampler(environment, policy, forward_sampler(environment, policy), **options)


# Recipes

SMALL = {
    "side": 4,
    "hidden_features": (8,),
    "log_every": 3,
    "checkpoint_every": 3,
    "steps_per_call": 3,
    "num_steps": 6,
}


def test_a_recipe_replays_alike_on_two_devices_and_after_an_interruption(tmp_path):
    options = {
        **SMALL,
        "batch_size": 8,
        "replay": "prioritized",
        "replay_buffers": 2,
        "replay_capacity": 6,
    }
    config = HypergridConfig(**options)
    run = build(config)
    with contextlib.closing(Checkpointer(tmp_path)) as checkpointer:
        whole = train(run, config, checkpointer=checkpointer).state
        _, half = checkpointer.restore(init_state(run, config), 3)
    buffer = whole.carry.buffer
    assert buffer.order.shape == (2, 6)
    assert (buffer.order >= 0).sum() >= 6
    assert not np.array_equal(buffer.log_reward[0], buffer.log_reward[1])
    config = HypergridConfig(**options, num_devices=2)
    split = train(build(config), config).state
    np.testing.assert_allclose(split.carry.buffer.log_reward, buffer.log_reward, rtol=1e-5)
    np.testing.assert_allclose(split.params["log_z"], whole.params["log_z"], rtol=1e-5)
    assert int(half.step) == 3
    assert not np.array_equal(half.carry.buffer.order, buffer.order)
    resumed = train(run, HypergridConfig(**options), initial=half).state
    jax.tree.map(np.testing.assert_array_equal, resumed.carry.buffer, buffer)
    jax.tree.map(np.testing.assert_array_equal, resumed.params, whole.params)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"replay": "best"}, "replay is 'best'"),
        ({"replay": "fifo", "replay_share": 1.0}, r"replay_share is 1\.0"),
        ({"replay": "fifo", "replay_share": 0.01}, r"replay_share is 0\.01"),
        ({"replay": "fifo", "replay_buffers": 3}, "replay_buffers is 3"),
        ({"replay": "fifo", "replay_buffers": 1, "num_devices": 2}, "replay_buffers is 1"),
        ({"replay_capacity": 0}, "replay_capacity is 0"),
        ({"replay_distance": -1.0}, r"replay_distance is -1\.0"),
        ({"local_search_revisions": 4}, "local_search_revisions is 4"),
        ({"local_search_revisions": 15, "replay": "fifo"}, "local_search_revisions is 15"),
        ({"local_search_steps": 0}, "local_search_steps is 0"),
        ({"local_search_accept": "worse"}, "local_search_accept is 'worse'"),
        ({"temperature": 0.0}, r"temperature is 0\.0"),
        ({"stop_bias": float("inf")}, "stop_bias is inf"),
        ({"objective": "reverse_kl", "replay": "fifo"}, "replay is 'fifo'; with objective"),
        ({"objective": "forward_kl", "temperature": 2.0}, r"temperature is 2\.0; with objective"),
        ({"objective": "tlm", "local_search_revisions": 1}, "local_search_revisions is 1; with"),
    ],
)
def test_settings_that_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        HypergridConfig(**options)


def test_shares_of_a_batch():
    config = HypergridConfig(
        batch_size=32, replay="ranked", replay_share=0.25, local_search_revisions=5
    )
    assert (config.num_new, config.num_replayed) == (24, 8)
    config = HypergridConfig(batch_size=32, replay="fifo", replay_buffers=4)
    assert (config.num_new, config.num_replayed) == (4, 4)
    config = HypergridConfig(batch_size=32, local_search_revisions=7)
    assert (config.num_new, config.num_replayed) == (32, 0)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "num_steps", "seeds", "smallest", "largest"),
    [
        # 16 rewards an update. Uniform actions alone find other modes by luck: the median of five
        # seeds misses half of the mass.
        ({}, 3000, range(5), 0.45, 1.0),
        ({"replay": "prioritized", "batch_size": 32}, 1500, [0], 0.0, 0.05),
        ({"local_search_revisions": 3}, 3000, [0], 0.0, 0.2),
    ],
    ids=["uniform actions", "replay", "local search"],
)
def test_sparse_grid(options, num_steps, seeds, smallest, largest):
    distances = []
    for seed in seeds:
        config = HypergridConfig(
            seed=seed,
            side=20,
            reward_floor=1e-4,
            epsilon_decay_steps=0,
            learning_rate_decay_steps=0,
            num_steps=num_steps,
            log_every=num_steps,
            checkpoint_every=num_steps,
            **options,
        )
        metrics = []
        train(build(config), config, on_log=lambda step, logged, rate, m=metrics: m.append(logged))
        assert metrics[-1].get("reward_calls", 1.0) * config.batch_size == 16
        distances.append(metrics[-1]["total_variation"])
    assert smallest <= np.median(distances) <= largest

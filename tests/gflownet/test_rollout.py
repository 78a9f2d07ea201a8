"""Rollouts replayed step by step on tables, and the laws that they draw from.

Statistical tests use Pearson's statistic: under the right law it follows chi-square, and the
threshold is exceeded with probability 5.7e-7, that of five standard errors.
"""

from __future__ import annotations

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats
from small_environments import (
    SMALL,
    masked_log_softmax,
    random_tables,
    tabular,
    tabulate,
)

from gflownet import backward_rollout, exact, forward_rollout, lanes, rollout

# The grid of three dimensions, slow to compile, is in the laws of the objectives as well.
FEW = ["hypergrid_2x5", "sets_5_3", "diamond"]
FIVE_SIGMA = 2 * stats.norm.sf(5)


@pytest.fixture(autouse=True)
def in_phases(monkeypatch):
    """Ever fewer lanes, as long trajectories are drawn, though these are short."""
    counts = lambda environment, size: [size, size // 2, size // 4]  # noqa: E731
    monkeypatch.setattr(lanes, "_lane_counts", counts)


@functools.cache
def setting(name):
    """The environment observed by index, and its tabular policy."""
    return tabular(SMALL[name]())


@functools.cache
def forward(name):
    environment, policy = setting(name)
    return jax.jit(
        lambda keys, params, epsilon: forward_rollout(
            keys, environment, policy, params, epsilon=epsilon
        )
    )


@functools.cache
def backward(name):
    environment, policy = setting(name)
    return jax.jit(
        lambda keys, params, terminal: backward_rollout(keys, environment, policy, params, terminal)
    )


def keys(seed, num):
    return jax.random.split(jax.random.key(seed), num)


def some_terminal(name, num, seed):
    """[num] indices of terminal states, and these states."""
    environment, _ = setting(name)
    tables = tabulate(environment)
    ends = np.flatnonzero(tables.is_terminal)
    index = np.random.default_rng(seed).choice(ends, num)
    return index, jax.tree.map(lambda leaf: jnp.asarray(leaf[index]), tables.states)


def stopping_is_last(name, params):
    """The policy that stops only when nothing else is allowed."""
    environment, _ = setting(name)
    if environment.stop_action is not None:
        params = params | {"forward": params["forward"].at[:, environment.stop_action].set(-60.0)}
    return params


@functools.cache
def to_index(name, num_axes):
    fn = setting(name)[0].state_index
    for _ in range(num_axes):
        fn = jax.vmap(fn)
    return jax.jit(fn)


def tabled(name, trajectories):
    """With states by their index."""
    return trajectories._replace(
        states=to_index(name, 2)(trajectories.states),
        terminal=to_index(name, 1)(trajectories.terminal),
    )


def check_replay(name, params, trajectories):
    """Every field of every trajectory, against tables made from the environment's functions."""
    environment, _ = setting(name)
    tables = tabulate(environment)
    log_pf = masked_log_softmax(params["forward"], tables.forward)
    log_pb = masked_log_softmax(params["backward"], tables.backward)
    t = jax.tree.map(np.asarray, tabled(name, trajectories))
    steps, batch = t.valid.shape
    assert steps == environment.max_length
    assert t.actions.dtype == np.int32
    lengths = t.valid.sum(axis=0)
    np.testing.assert_array_equal(trajectories.length, lengths)
    expected_pf, expected_pb = np.zeros((steps, batch)), np.zeros((steps, batch))
    for b in range(batch):
        state, length = tables.source, lengths[b]
        np.testing.assert_array_equal(t.valid[:, b], np.arange(steps) < length)
        for i in range(length):
            assert t.states[i, b] == state
            action = t.actions[i, b]
            assert tables.forward[state, action]
            num_choices = tables.forward[state].sum(), tables.backward[state].sum()
            assert t.is_choice[i, b] == (num_choices[0] > 1 or (i > 0 and num_choices[1] > 1))
            child = tables.children[state, action]
            expected_pf[i, b] = log_pf[state, action]
            expected_pb[i, b] = log_pb[child, action]
            state = child
        assert t.terminal[b] == state == t.states[length, b]
        assert tables.is_terminal[state]
        assert t.is_choice[length, b] == (tables.backward[state].sum() > 1)
        assert t.log_reward[b] == tables.log_reward[state]
        assert not t.is_choice[length + 1 :, b].any()
        for leaf in (t.actions, t.log_pf, t.log_pb):
            assert not leaf[length:, b].any()
    np.testing.assert_allclose(t.log_pf, expected_pf, atol=1e-5)
    np.testing.assert_allclose(t.log_pb, expected_pb, atol=1e-5)


@pytest.mark.parametrize("epsilon", [0.0, 0.5])
@pytest.mark.parametrize("name", SMALL)
def test_forward_replay(name, epsilon):
    params = random_tables(setting(name)[0], 0)
    check_replay(name, params, forward(name)(keys(1, 16), params, epsilon))


@pytest.mark.parametrize("name", FEW)
def test_backward_replay(name):
    params = random_tables(setting(name)[0], 0)
    index, terminal = some_terminal(name, 16, 0)
    trajectories = backward(name)(keys(2, 16), params, terminal)
    check_replay(name, params, trajectories)
    np.testing.assert_array_equal(np.asarray(to_index(name, 1)(trajectories.terminal)), index)


@pytest.mark.parametrize("name", SMALL)
def test_longest_trajectories(name):
    environment, _ = setting(name)
    params = stopping_is_last(name, random_tables(environment, 0))
    trajectories = forward(name)(keys(1, 16), params, 0.0)
    check_replay(name, params, trajectories)
    longest = environment.max_length
    if environment.stop_action is not None:
        assert (trajectories.length == longest).all()
    assert trajectories.length.max() == longest
    # The same end points backward.
    back = backward(name)(keys(3, 16), params, trajectories.terminal)
    check_replay(name, params, back)
    assert back.length.max() == longest


@pytest.mark.parametrize("corrupt", ["actions", "log_pf", "log_pb", "valid", "is_choice", "states"])
def test_replay_catches(corrupt):
    # The planted bugs: a field shifted by one step in time.
    params = random_tables(setting("hypergrid_2x5")[0], 0)
    trajectories = forward("hypergrid_2x5")(keys(1, 16), params, 0.0)
    shifted = jax.tree.map(lambda leaf: jnp.roll(leaf, 1, axis=0), getattr(trajectories, corrupt))
    with pytest.raises(AssertionError):
        check_replay("hypergrid_2x5", params, trajectories._replace(**{corrupt: shifted}))


def assert_same_trajectory(name, one, a, other, b):
    """Column ``a`` of ``one`` is column ``b`` of ``other``, up to the end of the trajectory."""
    one, other = (jax.tree.map(np.asarray, tabled(name, each)) for each in (one, other))
    length = int(one.length[a])
    assert length == int(other.length[b])
    for field in ("actions", "valid", "log_pf", "log_pb"):
        np.testing.assert_allclose(
            getattr(one, field)[:, a], getattr(other, field)[:, b], atol=1e-6, err_msg=field
        )
    np.testing.assert_array_equal(one.is_choice[:, a], other.is_choice[:, b])
    assert float(one.log_reward[a]) == float(other.log_reward[b])
    np.testing.assert_array_equal(one.states[: length + 1, a], other.states[: length + 1, b])


@pytest.mark.parametrize("name", FEW)
def test_batch_mates_do_not_matter(name):
    params = random_tables(setting(name)[0], 0)
    together = forward(name)(keys(1, 16), params, 0.3)
    order = np.argsort(together.length)
    _, terminal = some_terminal(name, 16, 0)
    together_back = backward(name)(keys(1, 16), params, terminal)
    for b in (order[0], order[8], order[-1]):
        alone = forward(name)(keys(1, 16)[b : b + 1], params, 0.3)
        assert_same_trajectory(name, alone, 0, together, b)
        end = jax.tree.map(lambda leaf, b=b: leaf[b : b + 1], terminal)
        alone = backward(name)(keys(1, 16)[b : b + 1], params, end)
        assert_same_trajectory(name, alone, 0, together_back, b)
    # Control: another key gives another trajectory.
    other = forward(name)(keys(1, 16)[order[-1]][None], params, 0.3)
    with pytest.raises(AssertionError):
        assert_same_trajectory(name, other, 0, together, order[0])


@pytest.mark.parametrize("name", FEW)
def test_deterministic_in_the_key(name):
    params = random_tables(setting(name)[0], 0)
    first = forward(name)(keys(1, 16), params, 0.3)
    again = forward(name)(keys(1, 16), params, 0.3)
    jax.tree.map(np.testing.assert_array_equal, first, again)
    other = forward(name)(keys(2, 16), params, 0.3)
    assert not np.array_equal(first.actions, other.actions)


def test_one_trace_for_all_lengths():
    environment, policy = setting("hypergrid_2x5")
    traces = []

    @jax.jit
    def roll(keys, params, epsilon):
        traces.append(1)
        return forward_rollout(keys, environment, policy, params, epsilon=epsilon).length

    params = random_tables(environment, 0)
    for seed, table in enumerate((params, stopping_is_last("hypergrid_2x5", params))):
        roll(keys(seed, 4), table, jnp.asarray(0.1 * seed))
    assert len(traces) == 1


def test_vmap_over_parameters_changes_nothing():
    name = "hypergrid_2x5"
    environment, policy = setting(name)
    tables = [random_tables(environment, seed) for seed in range(3)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *tables)
    batched = jax.jit(
        jax.vmap(lambda p: forward_rollout(keys(1, 8), environment, policy, p, epsilon=0.3))
    )(stacked)
    batched = jax.tree.map(np.asarray, batched)
    for i, table in enumerate(tables):
        alone = forward(name)(keys(1, 8), table, 0.3)
        one = jax.tree.map(lambda leaf, i=i: leaf[i], batched)
        for b in range(8):
            assert_same_trajectory(name, one, b, alone, b)


def test_jit_changes_nothing():
    environment, policy = setting("diamond")
    params = random_tables(environment, 0)
    alone = forward_rollout(keys(1, 8), environment, policy, params, epsilon=0.3)
    compiled = forward("diamond")(keys(1, 8), params, 0.3)
    for b in range(8):
        assert_same_trajectory("diamond", alone, b, compiled, b)


@pytest.mark.parametrize("name", ["hypergrid_2x5", "sets_5_3"])
def test_double_precision(name, x64):
    environment, policy = tabular(SMALL[name]())  # not traced in single precision before
    params = random_tables(environment, 0)
    draw = jax.jit(lambda keys: forward_rollout(keys, environment, policy, params))
    back = jax.jit(lambda keys, end: backward_rollout(keys, environment, policy, params, end))
    there = draw(keys(1, 16))
    for trajectories in (there, back(keys(1, 16), there.terminal)):
        assert trajectories.log_pf.dtype == trajectories.log_reward.dtype == jnp.float64
        assert trajectories.actions.dtype == jnp.int32


def test_nothing_carries_gradient():
    environment, policy = setting("sets_5_3")

    def total(params, energies):
        trajectories = forward_rollout(
            keys(0, 4), environment, policy, params, reward_params=energies
        )
        return trajectories.log_pf.sum() + trajectories.log_pb.sum() + trajectories.log_reward.sum()

    gradient = jax.jit(jax.grad(total, (0, 1)))(random_tables(environment, 0), jnp.ones(5))
    assert all(not leaf.any() for leaf in jax.tree.leaves(gradient))


def test_reward_parameters_are_used():
    environment, policy = setting("sets_5_3")
    energies = jnp.arange(5.0)
    params = random_tables(environment, 0)

    @jax.jit
    def roll(energies):
        there = forward_rollout(keys(0, 6), environment, policy, params, reward_params=energies)
        back = backward_rollout(
            keys(0, 6), environment, policy, params, there.terminal, reward_params=energies
        )
        return there, back

    trajectories, back = roll(energies)
    np.testing.assert_allclose(trajectories.log_reward, -(trajectories.terminal @ energies))
    np.testing.assert_allclose(back.log_reward, trajectories.log_reward)


# Laws


def chi_square(counts, probabilities) -> float:
    """The probability of so bad a fit, with rare cells put together (at least 5 expected)."""
    counts, probabilities = np.asarray(counts, float), np.asarray(probabilities, float)
    order = np.argsort(probabilities)
    expected = probabilities[order] / probabilities.sum() * counts.sum()
    group = np.minimum(np.floor(np.cumsum(expected) / 5), np.arange(len(order))).astype(int)
    # A last group with less than 5 joins the one before.
    observed = np.bincount(group, counts[order])
    expected = np.bincount(group, expected)
    keep = expected > 0
    observed, expected = observed[keep], expected[keep]
    if expected[-1] < 5:
        observed = np.append(observed[:-2], observed[-2:].sum())
        expected = np.append(expected[:-2], expected[-2:].sum())
    return float(stats.chisquare(observed, expected).pvalue)


NUM_DRAWS = 20_000


@functools.cache
def draws(name, epsilon):
    params = random_tables(setting(name)[0], 3)
    return params, forward(name)(keys(11, NUM_DRAWS), params, epsilon)


def uniformity(name, trajectories):
    """Pearson's statistic of the actions at all states with a choice, summed, and its tail."""
    environment, _ = setting(name)
    tables = tabulate(environment)
    visited = np.asarray(to_index(name, 2)(trajectories.states))[:-1]
    valid = np.asarray(trajectories.valid)
    counts = np.zeros(tables.forward.shape)
    np.add.at(counts, (visited[valid], np.asarray(trajectories.actions)[valid]), 1)
    assert not counts[~tables.forward].any()
    choices = tables.forward.sum(1)
    expected = counts.sum(1) / np.maximum(choices, 1)
    used = (expected >= 5) & (choices > 1)
    error = np.where(tables.forward, counts - expected[:, None], 0.0)[used]
    statistic = (error**2 / expected[used, None]).sum()
    return float(stats.chi2.sf(statistic, (choices[used] - 1).sum()))


@pytest.mark.parametrize("name", FEW)
def test_full_exploration_is_uniform(name):
    assert uniformity(name, draws(name, 1.0)[1]) > FIVE_SIGMA
    # The planted bug: a tenth of the draws by the policy.
    assert uniformity(name, draws(name, 0.9)[1]) < FIVE_SIGMA


def explored(name, params, epsilon):
    """Logits of the exploring policy."""
    environment, _ = setting(name)
    mask = tabulate(environment).forward
    probs = np.exp(masked_log_softmax(params["forward"], mask))
    uniform = mask / np.maximum(mask.sum(1, keepdims=True), 1)
    mixed = (1 - epsilon) * probs + epsilon * uniform
    return params | {"forward": jnp.asarray(np.log(np.where(mask, mixed, 1.0)))}


@pytest.mark.parametrize("epsilon", [0.0, 0.5])
@pytest.mark.parametrize("name", FEW)
def test_terminal_frequencies(name, epsilon):
    environment, policy = setting(name)
    params, trajectories = draws(name, epsilon)
    graph = exact.enumerate_graph(environment)
    law = exact.terminal_distribution(environment, policy, explored(name, params, epsilon), graph)
    ends = np.flatnonzero(tabulate(environment).is_terminal)
    counts = np.bincount(
        np.asarray(to_index(name, 1)(trajectories.terminal)), minlength=ends.max() + 1
    )[ends]
    assert counts.sum() == NUM_DRAWS
    assert chi_square(counts, law) > FIVE_SIGMA
    # The planted bugs: states numbered off by one; exploration left out or put in.
    assert chi_square(counts, np.roll(law, 1)) < FIVE_SIGMA
    wrong = exact.terminal_distribution(
        environment, policy, explored(name, params, 0.5 - epsilon), graph
    )
    assert chi_square(counts, wrong) < FIVE_SIGMA


def test_lengths_are_those_of_the_frequencies():
    # The diamond's paths have one to three actions: probabilities by hand.
    params, trajectories = draws("diamond", 0.0)
    tables = tabulate(setting("diamond")[0])
    p = np.exp(masked_log_softmax(params["forward"], tables.forward))
    one, two = p[4, 2], p[4, 1] * p[5, 1]
    counts = np.bincount(np.asarray(trajectories.length), minlength=4)
    assert counts[0] == 0
    assert chi_square(counts[1:], [one, two, 1 - one - two]) > FIVE_SIGMA
    assert chi_square(counts[1:], [1 - one - two, two, one]) < FIVE_SIGMA


def test_backward_path_frequencies():
    # Three paths lead to state 1 of the diamond; P_B draws each with the product of its steps.
    environment, _ = setting("diamond")
    params = random_tables(environment, 3)
    terminal = jnp.full(NUM_DRAWS, 1, jnp.int32)
    trajectories = backward("diamond")(keys(5, NUM_DRAWS), params, terminal)
    tables = tabulate(environment)
    p = np.exp(masked_log_softmax(params["backward"], tables.backward))
    middle = np.asarray(trajectories.states)[1]
    counts = [(middle == state).sum() for state in (1, 2, 5)]
    assert sum(counts) == NUM_DRAWS
    # 1 <- 4 by action 2;   1 <- 0 by action 0, then 0 <- 2 by 1 or 0 <- 5 by 0.
    law = [p[1, 2], p[1, 0] * p[0, 1], p[1, 0] * p[0, 0]]
    assert sum(law) == pytest.approx(1.0)
    assert chi_square(counts, law) > FIVE_SIGMA
    assert chi_square(counts, [law[0], law[2], law[1]]) < FIVE_SIGMA


@pytest.mark.parametrize("how", ["by_key", "all_lanes", "few_looks", "one_look"])
@pytest.mark.parametrize("roll", [forward_rollout, backward_rollout])
def test_the_way_of_the_loop_draws_the_same(roll, how, monkeypatch):
    environment, policy = setting("hypergrid_2x5")
    params = random_tables(environment, 3)
    ends = (some_terminal("hypergrid_2x5", 64, seed=4)[1],) if roll is backward_rollout else ()

    def draw():
        drawn = jax.jit(lambda keys: roll(keys, environment, policy, params, *ends))(keys(5, 64))
        # What stands behind the end of a trajectory is not part of it.
        is_part = jnp.arange(environment.max_length + 1)[:, None] <= drawn.length
        return drawn._replace(
            states=lanes.select(is_part, drawn.states, jax.tree.map(jnp.zeros_like, drawn.states)),
            actions=jnp.where(drawn.valid, drawn.actions, 0),
        )

    many = draw()
    if how == "by_key":
        # A number for each step at once, or one from the key of the step.
        monkeypatch.setattr(rollout, "draw", lambda law, noise: law.sample(noise.key))
    else:
        monkeypatch.setattr(lanes, "_lane_counts", lambda environment, size: [size])
    if how in ("few_looks", "one_look"):
        monkeypatch.setattr(lanes, "on_accelerator", lambda: True)
    if how == "few_looks":
        monkeypatch.setattr(lanes, "STEPS_A_LOOK", 4)
    assert len(set(many.length.tolist())) > 4
    assert (environment.max_length + 1) % 4
    assert environment.max_length < lanes.STEPS_A_LOOK or how == "few_looks"
    chex.assert_trees_all_close(many, draw(), rtol=1e-6)

"""Local search: moves against all pairs of legs written out, invariance, slots, reward calls."""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats
from small_environments import (
    diamond,
    exact_tables,
    masked_log_softmax,
    random_tables,
    sets,
    tabular,
    tabulate,
)

from gflownet.environments import hypergrid
from gflownet.local_search import back_and_forth, local_search_sampler
from gflownet.objectives import trajectory_balance
from gflownet.sampling import backward_sampler, forward_sampler

FIVE_SIGMA = 2 * stats.norm.sf(5)


@functools.cache
def grid():
    return hypergrid(dim=2, side=3, reward_floor=0.1)


# (environment, K, whether the number of steps is random)
MOVES = {
    "sets": (sets, 2, False),
    "sets, up to 2": (sets, 2, True),
    "diamond, from the source": (diamond, 3, False),
    "diamond, up to 2": (diamond, 2, True),
    "hypergrid": (grid, 3, False),
    "hypergrid, up to 4": (grid, 4, True),
}


class Move(NamedTuple):
    """A leg down and a leg up: from where to where, its probability and that of the way back."""

    start: int
    end: int
    q: float
    back: float


def legs(state, moves_to, allowed, log_here, log_other, most):
    """All paths of at most so many steps: ``(end, steps, log-probability, the reverse's)``."""
    found = [(state, 0, 0.0, 0.0)]
    for action in np.flatnonzero(allowed[state]) if most else ():
        there = moves_to[state, action]
        found += [
            (end, steps + 1, here + log_here[state, action], other + log_other[there, action])
            for end, steps, here, other in legs(
                there, moves_to, allowed, log_here, log_other, most - 1
            )
        ]
    return found


def all_moves(environment, params, num_steps, is_random, *, with_backward=True, with_length=True):
    """Every move from every terminal state; the options leave something out of the way back."""
    tables = tabulate.__wrapped__(environment)
    log_pf = masked_log_softmax(np.asarray(params["forward"]), tables.forward)
    log_pb = masked_log_softmax(np.asarray(params["backward"]), tables.backward)
    numbers = range(1, num_steps + 1) if is_random else [num_steps]

    def share(bottom, steps):
        """Of the numbers of steps, those that end a leg at this bottom after so many."""
        is_end = [n == steps or (n > steps and bottom == tables.source) for n in numbers]
        return sum(is_end) / len(numbers)

    moves = []
    for start in np.flatnonzero(tables.is_terminal):
        down = legs(start, tables.parents, tables.backward, log_pb, log_pf, num_steps)
        for bottom, down_steps, down_pb, down_pf in down:
            if not share(bottom, down_steps):
                continue
            up = legs(bottom, tables.children, tables.forward, log_pf, log_pb, 99)
            for end, up_steps, up_pf, up_pb in up:
                if tables.is_terminal[end]:
                    q = share(bottom, down_steps) * np.exp(down_pb + up_pf)
                    back = np.exp(down_pf + with_backward * up_pb)
                    back *= share(bottom, up_steps) if with_length else 1.0
                    moves.append(Move(start, end, q, back))
    return moves


def transition_matrix(moves, log_reward, power=1.0):
    """[S, S] of the Metropolis chain; ``power`` tempers the reward in its test."""
    matrix = np.zeros((len(log_reward), len(log_reward)))
    for start, end, q, back in moves:
        ratio = np.exp(power * (log_reward[end] - log_reward[start])) * back / q
        matrix[start, end] += q * min(1.0, ratio)
        matrix[start, start] += q * (1.0 - min(1.0, ratio))
    return matrix


def target(environment):
    """[S] R / Z at terminal states, 0 at others."""
    tables = tabulate.__wrapped__(environment)
    weights = np.where(tables.is_terminal, np.exp(np.asarray(tables.log_reward, np.float64)), 0.0)
    return weights / weights.sum()


@pytest.mark.parametrize("name", MOVES)
def test_moves_leave_the_target_invariant(name, x64):
    build, num_steps, is_random = MOVES[name]
    environment = build()
    params = random_tables(environment, 0)
    log_reward = np.asarray(tabulate.__wrapped__(environment).log_reward, np.float64)
    law = target(environment)
    right = all_moves(environment, params, num_steps, is_random)
    matrix = transition_matrix(right, log_reward)
    np.testing.assert_allclose(matrix.sum(axis=1)[law > 0], 1.0, atol=1e-12)
    flux = law[:, None] * matrix
    np.testing.assert_allclose(flux, flux.T, atol=1e-14)  # detailed balance

    def error(matrix):
        return 0.5 * np.abs(law @ matrix - law).sum()

    assert error(matrix) < 1e-14
    # The planted bugs: a ratio without P_B of the upper leg, without the lengths, of another R.
    no_backward = all_moves(environment, params, num_steps, is_random, with_backward=False)
    assert error(transition_matrix(no_backward, log_reward)) > 1e-3
    if is_random or build is grid:
        no_length = all_moves(environment, params, num_steps, is_random, with_length=False)
        if build is not sets:  # where all legs have one length, it cancels
            assert error(transition_matrix(no_length, log_reward)) > 1e-3
    assert error(transition_matrix(right, log_reward, power=3.0)) > 1e-3


def test_objects_of_several_lengths_need_a_random_number_of_steps(x64):
    # With K fixed, the far corner cannot be left; up to K steps, every object is reached.
    params = random_tables(grid(), 0)
    log_reward = np.asarray(tabulate.__wrapped__(grid()).log_reward, np.float64)
    ends = np.flatnonzero(target(grid()))
    reached = {}
    for is_random in (False, True):
        matrix = transition_matrix(all_moves(grid(), params, 3, is_random), log_reward)
        many = np.linalg.matrix_power(matrix[np.ix_(ends, ends)], 2000)
        reached[is_random] = (many > 1e-9).sum(axis=1)
    assert reached[False].min() == 1
    assert reached[True].min() == len(ends)


@functools.cache
def compiled_moves(name):
    build, num_steps, is_random = MOVES[name]
    environment, policy = tabular(build())
    return jax.jit(
        lambda keys, params, states: back_and_forth(
            keys, environment, policy, params, states, num_steps=num_steps, random_length=is_random
        )
    )


def classes(moves):
    """Of each (start, end) the possible log ratios, and the probability of each."""
    by_pair: dict = {}
    for start, end, q, back in moves:
        ratio = np.log(back / q) if back else -1e9
        known = by_pair.setdefault((start, end), [])
        for entry in known:
            if abs(entry[0] - ratio) < 1e-3:
                entry[1] += q
                break
        else:
            known.append([ratio, q])
    return {pair: np.array(known) for pair, known in by_pair.items()}


def fit(moves, starts, ends, log_ratios):
    """p-value of draws under the law of (end, log ratio) given the start; 0 if one cannot be."""
    known = classes(moves)
    expected = {
        (*pair, i): chance * (starts == pair[0]).sum()
        for pair, rows in known.items()
        for i, (_, chance) in enumerate(rows)
    }
    observed = dict.fromkeys(expected, 0)
    for start, end, ratio in zip(starts, ends, np.maximum(log_ratios, -1e9), strict=True):
        rows = known.get((start, end))
        if rows is None or (np.abs(rows[:, 0] - ratio).min() > 2e-3 and ratio > -1e8):
            return 0.0
        observed[start, end, int(np.abs(rows[:, 0] - ratio).argmin())] += 1
    e, o = (np.array([d[key] for key in expected]) for d in (expected, observed))
    rare = e < 5
    e, o = (np.append(v[~rare], v[rare].sum()) for v in (e, o))
    e, o = (v[e > 0] for v in (e, o))
    return stats.chisquare(o, e * o.sum() / e.sum()).pvalue


@pytest.mark.parametrize("name", MOVES)
def test_draws_and_ratios_are_those_of_the_legs(name):
    build, num_steps, is_random = MOVES[name]
    environment = build()
    params = random_tables(environment, 0)
    tables = tabulate(environment)
    starts = np.resize(np.flatnonzero(tables.is_terminal), 6000)
    states = jax.tree.map(lambda leaf: jnp.asarray(leaf)[starts], tables.states)
    keys = jax.random.split(jax.random.key(0), len(starts))
    proposal = compiled_moves(name)(keys, params, states)
    ends = np.asarray(jax.vmap(environment.state_index)(proposal.state))
    np.testing.assert_allclose(
        proposal.log_reward, np.asarray(tables.log_reward)[ends], rtol=1e-6, atol=1e-6
    )
    ratios = np.asarray(proposal.log_ratio, np.float64)
    right = all_moves(environment, params, num_steps, is_random)
    assert fit(right, starts, ends, ratios) > FIVE_SIGMA
    # The planted bugs: one step more, no P_B of the upper leg, one leg's P_F instead of the other.
    assert (
        fit(all_moves(environment, params, num_steps + 1, is_random), starts, ends, ratios)
        < (FIVE_SIGMA)
        or name == "diamond, from the source"
    )
    wrong = all_moves(environment, params, num_steps, is_random, with_backward=False)
    assert fit(wrong, starts, ends, ratios) == 0.0


def test_exact_flow_accepts_everything():
    environment, policy = tabular(sets())
    tables, _ = exact_tables(sets(), "random")
    t = tabulate(environment)
    starts = np.resize(np.flatnonzero(t.is_terminal), 60)
    keys = jax.random.split(jax.random.key(0), 60)

    @jax.jit
    def gains(params, num_steps):
        states = jnp.asarray(t.states)[starts]
        proposal = back_and_forth(keys, environment, policy, params, states, num_steps=num_steps)
        return proposal.log_reward - jnp.asarray(t.log_reward)[starts] + proposal.log_ratio

    # The number of steps may be traced.
    for num_steps in (1, 2, 3):
        np.testing.assert_allclose(gains(tables, num_steps), 0.0, atol=1e-5)
    assert np.abs(gains(random_tables(sets(), 0), 2)).max() > 0.1


def from_ends(environment, policy):
    """A sampler whose trajectories end where the batch says."""
    states = tabulate(environment).states
    return backward_sampler(
        environment, policy, lambda key, i: jax.tree.map(lambda leaf: jnp.asarray(leaf)[i], states)
    )


@pytest.mark.parametrize("accept", ["metropolis", "better"])
def test_chains_of_the_sampler(accept):
    # Started in the target, Metropolis chains stay in it; those that only climb do not.
    environment, policy = tabular(grid())
    params = {"policy": random_tables(grid(), 1)}
    law = target(grid())
    starts = np.random.default_rng(0).choice(len(law), 8000, p=law)
    sampler = local_search_sampler(
        environment,
        policy,
        from_ends(environment, policy),
        num_steps=3,
        num_revisions=3,
        accept=accept,
        trained="final",
    )
    keys = jax.random.split(jax.random.key(0), len(starts))
    t, _, metrics = jax.jit(lambda batch: sampler.sample(params, (), keys, batch))(starts)
    counts = np.bincount(jax.vmap(environment.state_index)(t.terminal), minlength=len(law))
    p_value = stats.chisquare(counts[law > 0], law[law > 0] * len(starts)).pvalue
    assert (p_value > FIVE_SIGMA) == (accept == "metropolis")
    assert metrics["reward_calls"] == 4.0
    assert 0.0 < metrics["acceptance_rate"] < 1.0
    rewards = np.asarray(tabulate(environment).log_reward)
    assert metrics["revised_log_reward"] == pytest.approx(float(t.log_reward.mean()), rel=1e-5)
    if accept == "better":
        assert (np.asarray(t.log_reward) >= rewards[starts] - 1e-6).all()
        assert t.log_reward.mean() > rewards[starts].mean() + 0.1


def test_slots_of_proposals():
    environment, policy = tabular(grid())
    params = {"policy": random_tables(grid(), 1)}
    new = forward_sampler(environment, policy, epsilon=0.5)
    sampler = local_search_sampler(environment, policy, new, num_steps=4, num_revisions=2)
    keys = jax.random.split(jax.random.key(0), 12)
    carry = sampler.init(keys[0], params, jnp.arange(12))
    assert carry.shape == (4,)

    @jax.jit
    def draw(keys, carry):
        return sampler.sample(params, carry, keys, jnp.arange(len(keys)))

    t, after, metrics = draw(keys, carry)
    assert (after == 1).all()
    alone = jax.jit(lambda: new.sample(params, carry, keys[::3], ())[0])()
    for name in ("actions", "valid", "log_pf", "log_pb"):
        np.testing.assert_allclose(getattr(t, name)[:, ::3], getattr(alone, name), atol=1e-6)
    ends = np.asarray(jax.vmap(environment.state_index)(t.terminal))
    np.testing.assert_allclose(t.log_reward, tabulate(environment).log_reward[ends], atol=1e-6)
    # Revisions are chains: the second starts from the better of the two before.
    assert (ends[1::3] != ends[::3]).any()
    best = np.asarray(t.log_reward).reshape(4, 3).max(axis=1)
    assert metrics["revised_log_reward"] == pytest.approx(float(best.mean()), rel=1e-5)
    assert metrics["log_reward"] == pytest.approx(float(t.log_reward[::3].mean()), rel=1e-5)
    assert metrics["reward_calls"] == 1.0
    # Two halves on two devices are the whole.
    halves = [draw(keys[part], carry[:2])[0] for part in (slice(0, 6), slice(6, 12))]
    joined = jnp.concatenate([half.actions for half in halves], axis=1)
    np.testing.assert_array_equal(joined, t.actions)
    with pytest.raises(ValueError, match="sum of counts is 3"):
        sampler.init(keys[0], params, jnp.arange(10))


def test_reward_calls():
    calls = []
    plain = grid()

    def log_reward(params, state):
        jax.debug.callback(lambda _: calls.append(1), state.position)
        return plain.log_reward(params, state)

    environment, policy = tabular(plain)
    environment = environment._replace(log_reward=log_reward)
    new = forward_sampler(environment, policy)
    sampler = local_search_sampler(environment, policy, new, num_steps=3, num_revisions=3)
    params = {"policy": random_tables(plain, 0)}
    carry = sampler.init(jax.random.key(0), params, jnp.arange(8))
    keys = jax.random.split(jax.random.key(0), 8)
    out = jax.jit(lambda: sampler.sample(params, carry, keys, jnp.arange(8)))()
    jax.block_until_ready(out)
    jax.effects_barrier()
    # M chains of I revisions evaluate M (I + 1) rewards, accepted or not.
    assert len(calls) == 2 * (3 + 1)
    assert 8 * out[2]["reward_calls"] == len(calls)


def test_residuals_vanish_at_the_exact_flow():
    environment, policy = tabular(grid())
    tables, log_z = exact_tables(grid(), "random")
    new = forward_sampler(environment, policy, epsilon=0.5)
    sampler = local_search_sampler(environment, policy, new, num_steps=3, num_revisions=3)
    assert sampler.is_on_policy
    objective = trajectory_balance(environment, policy, sampler=sampler)
    keys = jax.random.split(jax.random.key(0), 16)

    @jax.jit
    @jax.value_and_grad
    def loss(tables):
        params = {"policy": tables, "log_z": jnp.asarray(log_z)}
        carry = sampler.init(keys[0], params, jnp.arange(16))
        return objective.loss(params, carry, keys, jnp.arange(16))[0]

    value, gradient = loss(jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), tables))
    assert value < 1e-9
    assert max(jnp.abs(leaf).max() for leaf in jax.tree.leaves(gradient)) < 1e-4
    assert loss(random_tables(grid(), 0))[0] > 0.1


@pytest.mark.parametrize(
    ("name", "value"),
    [("num_steps", 0), ("num_revisions", 0), ("accept", "worse"), ("trained", "some")],
)
def test_options_that_are_refused(name, value):
    environment, policy = tabular(grid())
    options = {"num_steps": 2, "num_revisions": 1, name: value}
    with pytest.raises(ValueError, match=f"{name} is {value!r}"):
        local_search_sampler(environment, policy, forward_sampler(environment, policy), **options)

"""Samplers of trajectories, conditional flows, losses of residuals, flows that rollouts record."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_environments import SMALL, random_tables, sets, tabular, tabulate

from gflownet import backward_rollout, exact, forward_rollout, score
from gflownet.conditional import at_condition, conditional
from gflownet.objectives import (
    detailed_balance,
    huber,
    linex,
    log_cosh,
    shifted_cosh,
    squared,
    trajectory_balance,
)
from gflownet.policies import mlp_policy
from gflownet.sampling import (
    TrajectorySampler,
    backward_sampler,
    forward_sampler,
    given_trajectories,
    mixed_sampler,
)

KEYS = jax.random.split(jax.random.key(0), 12)


def tables_with_flow(environment, seed=0):
    tables = random_tables(environment, seed)
    log_flow = np.random.default_rng(seed).standard_normal(len(tables["log_flow"]))
    return tables | {"log_flow": jnp.asarray(log_flow, jnp.float32)}


# Flows


@pytest.mark.parametrize("name", ["hypergrid_2x5", "diamond"])
def test_recorded_flows_and_scores(name):
    environment, policy = tabular(SMALL[name]())
    tables = tables_with_flow(environment)

    @jax.jit
    def everything(tables):
        there = forward_rollout(KEYS, environment, policy, tables, epsilon=0.3)
        back = backward_rollout(KEYS, environment, policy, tables, there.terminal)
        out = []
        for t in (there, back):
            index = jax.vmap(jax.vmap(environment.state_index))(t.states)
            left = jnp.concatenate([t.valid, jnp.zeros_like(t.valid[:1])])

            def plain(tables, index=index, left=left):
                flow = jnp.where(left, tables["log_flow"][index], 0.0)
                return jnp.sum(jnp.cos(flow)), flow

            def scored(tables, is_on_policy, t=t):
                scores = score(
                    environment,
                    policy,
                    tables,
                    t,
                    is_on_policy=is_on_policy,
                    with_flow=True,
                    chunk_size=7,
                )
                return jnp.sum(jnp.cos(scores.log_flow)), scores.log_flow

            gradient = functools.partial(jax.grad, has_aux=True)
            recorded = gradient(functools.partial(scored, is_on_policy=True))(tables)
            anew = gradient(functools.partial(scored, is_on_policy=False))(tables)
            out.append((t.log_flow, gradient(plain)(tables), recorded, anew))
        return out

    for log_flow, expected, recorded, anew in everything(tables):
        np.testing.assert_allclose(log_flow, expected[1], atol=1e-6)
        close = functools.partial(np.testing.assert_allclose, atol=1e-5)
        jax.tree.map(close, recorded, expected)
        jax.tree.map(close, anew, expected)
        assert np.abs(expected[0]["log_flow"]).max() > 0.1


def test_stop_probabilities():
    environment, policy = tabular(SMALL["hypergrid_2x5"]())
    tables = tables_with_flow(environment)

    @jax.jit
    def both(tables):
        t = forward_rollout(KEYS, environment, policy, tables)
        return t, score(environment, policy, tables, t, is_on_policy=True, with_stop=True)

    t, scores = both(tables)
    stopping = np.asarray(t.valid) & (np.asarray(t.actions) == 2)
    np.testing.assert_allclose(scores.log_stop[:-1][stopping], t.log_pf[stopping], atol=1e-6)
    left = np.concatenate([t.valid, np.zeros((1, 12), bool)])
    assert not scores.log_stop[~left].any()
    assert scores.log_flow is None
    assert (scores.log_stop[left] <= 0).all()
    with pytest.raises(ValueError, match="stop action"):
        score(*tabular(sets()), tables, t, is_on_policy=True, with_stop=True)


def test_network_with_flow_is_one_trunk():
    environment = SMALL["hypergrid_2x5"]()
    observation = environment.observe(environment.initial(KEYS[0]))
    plain, flow = (mlp_policy(3, (8,), with_flow=with_flow) for with_flow in (False, True))
    sizes = [
        sum(leaf.size for leaf in jax.tree.leaves(p.init(KEYS[0], observation)))
        for p in (plain, flow)
    ]
    assert sizes[1] - sizes[0] == 9
    masks = (jnp.ones(3, bool), jnp.ones(3, bool))
    params = flow.init(KEYS[0], observation)
    assert flow.apply(params, observation, *masks).log_flow.shape == ()
    assert plain.apply(plain.init(KEYS[0], observation), observation, *masks).log_flow is None


# Samplers


def test_mixed_batch():
    environment, policy = tabular(SMALL["diamond"]())
    params = {"policy": tables_with_flow(environment)}
    seen = []
    forward = forward_sampler(environment, policy, epsilon=0.5)
    back = backward_sampler(environment, policy)._replace(
        feedback=lambda carry, t, losses: seen.append((t.length.shape, losses)) or carry
    )
    sampler = mixed_sampler([(forward, 2), (back, 1)])
    ends = jnp.where(jnp.arange(12) % 2 == 0, 1, 3)
    carry = sampler.init(KEYS[0], params, ends)
    assert carry[0].shape == (8,)

    def draw(keys, carry, ends):
        return sampler.sample(params, carry, keys, ends)

    t, carry, metrics = jax.jit(draw)(KEYS, carry, ends)
    assert float(metrics["epsilon"]) == 0.5
    assert (carry[0] == 1).all()
    # The third of every three slots ends where it was told to; each slot is what it is alone.
    np.testing.assert_array_equal(t.terminal[2::3], ends[2::3])
    is_forward = np.flatnonzero(np.arange(12) % 3 < 2)
    alone = jax.jit(lambda c: forward.sample(params, c, KEYS[is_forward], ()))(jnp.zeros(8, int))[0]
    for name in ("actions", "valid", "log_pf", "log_pb"):
        np.testing.assert_allclose(
            getattr(t, name)[:, is_forward], getattr(alone, name), atol=1e-6, err_msg=name
        )
    np.testing.assert_array_equal(t.terminal[is_forward], alone.terminal)
    np.testing.assert_allclose(
        t.log_reward, np.asarray(tabulate(environment).log_reward)[t.terminal], rtol=1e-6
    )
    # Two halves on two devices are the whole.
    init = lambda n: (jnp.zeros(n, int), ())  # noqa: E731
    halves = [jax.jit(draw)(KEYS[part], init(4), ends[part])[0] for part in HALVES]
    joined = jnp.concatenate([half.actions for half in halves], axis=1)
    np.testing.assert_array_equal(joined, t.actions)
    # Losses find their way back.
    sampler.feedback(carry, t, jnp.arange(12.0))
    assert seen[0][0] == (4,)
    assert seen[0][1].tolist() == [2.0, 5.0, 8.0, 11.0]
    # As an objective's source: on policy, for both kinds were drawn by the present policy.
    assert sampler.is_on_policy
    assert not mixed_sampler([(forward, 1), (given_trajectories(), 1)]).is_on_policy
    objective = detailed_balance(environment, policy, sampler=sampler)
    tables = params["policy"]
    given = detailed_balance(environment, policy, sampler=given_trajectories())

    @jax.jit
    def losses(tables):
        mixed = objective.loss({"policy": tables}, carry, KEYS, ends)
        return mixed[0], given.loss({"policy": tables}, (), KEYS, _redrawn(sampler, tables, ends))[
            0
        ]

    mixed, again = losses(tables)
    assert mixed == pytest.approx(float(again), rel=1e-5)
    with pytest.raises(ValueError, match="sum of counts"):
        sampler.init(KEYS[0], params, ends[:10])
    with pytest.raises(ValueError, match="count is 0"):
        mixed_sampler([(forward, 0)])


HALVES = (slice(0, 6), slice(6, 12))


def _redrawn(sampler, tables, ends):
    carry = (jnp.ones(8, int), ())
    return sampler.sample({"policy": tables}, carry, KEYS, ends)[0]


def test_stored_trajectories_are_scored_anew():
    # A sampler that gives yesterday's trajectories: their recorded values must not be used.
    environment, policy = tabular(SMALL["diamond"]())
    old, new = tables_with_flow(environment, 0), tables_with_flow(environment, 1)
    stored = jax.jit(lambda tables: forward_rollout(KEYS, environment, policy, tables))(old)
    sampler = TrajectorySampler(
        init=lambda key, params, batch: (),
        sample=lambda params, carry, keys, batch: (stored, carry, {}),
        is_on_policy=False,
        feedback=lambda carry, t, losses: carry,
    )
    stale = sampler._replace(is_on_policy=True)

    @jax.jit
    def loss(tables):
        params = {"policy": tables, "log_z": jnp.zeros(())}
        return [
            trajectory_balance(environment, policy, sampler=s).loss(params, (), KEYS, ())[0]
            for s in (sampler, stale)
        ]

    right, wrong = loss(new)
    fresh = jax.jit(lambda: score(environment, policy, new, stored, is_on_policy=False))()
    residual = (fresh.log_pf - fresh.log_pb).sum(axis=0) - stored.log_reward
    assert right == pytest.approx(float(jnp.mean(residual**2)), rel=1e-5)
    assert abs(right - wrong) > 0.1  # the planted bug
    assert loss(old)[0] == pytest.approx(float(loss(old)[1]), rel=1e-5)


# Conditional flows


def test_conditional_law_and_log_z():
    inner = sets()
    environment = conditional(inner, lambda key: jax.random.uniform(key, (), minval=0.5, maxval=3))
    state = environment.initial(KEYS[0])
    assert environment.observe(state).shape == (6,)
    for beta in (0.5, 2.0):
        at = at_condition(inner, environment, jnp.float32(beta))
        graph = exact.enumerate_graph(at)
        _, log_z = exact.target_distribution(at, graph)
        terminal = tabulate(inner).is_terminal
        expected = np.logaddexp.reduce(beta * tabulate(inner).log_reward[terminal])
        assert log_z == pytest.approx(float(expected), abs=1e-5)
        tables, _ = exact.exact_flow(at, graph)
        log_flow = tables["log_flow"][tabulate(inner).source]
        assert log_flow == pytest.approx(float(expected), abs=1e-5)
        energy = at.intermediate_energy((), jax.tree.map(lambda leaf: leaf[3], graph.states))
        assert energy == pytest.approx(
            beta * float(inner.intermediate_energy((), graph.states.state[3])), rel=1e-5
        )
    with pytest.raises(ValueError, match="enumerate"):
        at_condition(environment, environment, jnp.float32(1.0))


def test_conditional_flow_is_exact_at_every_condition():
    # A policy that looks up the tables of its condition, and log Z as a function of it.
    inner = sets()
    betas = jnp.array([0.5, 1.0, 2.0])
    environment = conditional(inner, lambda key: jax.random.choice(key, betas))
    by_beta = []
    for beta in betas:
        at = at_condition(inner, environment, beta)
        by_beta.append(exact.exact_flow(at, exact.enumerate_graph(at)))
    stacked = jax.tree.map(
        lambda *leaves: jnp.asarray(np.stack(leaves), jnp.float32),
        *[tables for tables, _ in by_beta],
    )
    log_z = jnp.asarray([value for _, value in by_beta])
    _, table_policy = tabular(inner)

    def which(condition):
        return jnp.argmin(jnp.abs(betas - condition))

    def apply(params, observation, forward_mask, backward_mask):
        condition, index = observation
        tables = jax.tree.map(lambda leaf: leaf[which(condition)], params)
        return table_policy.apply(tables, index, forward_mask, backward_mask)

    policy = table_policy._replace(apply=apply)
    environment = environment._replace(
        observe=lambda state: (state.condition, inner.state_index(state.state))
    )

    def log_z_of(params, source):
        return params[which(source.condition)]

    options = {"epsilon": 0.3}
    params = {"policy": stacked, "log_z": log_z}

    @jax.jit
    def losses(params):
        carry = jnp.zeros(12, jnp.int32)
        balance = trajectory_balance(environment, policy, log_z=log_z_of, **options)
        constant = trajectory_balance(environment, policy, log_z=lambda p, s: p[0], **options)
        local = detailed_balance(environment, policy, **options)
        return [o.loss(params, carry, KEYS, ())[0] for o in (balance, local, constant)]

    balance, local, constant = losses(params)
    assert balance < 1e-9
    assert local < 1e-9
    assert constant > 0.01  # the planted bug: one log Z for all conditions


# Losses of residuals

LOSSES = {
    "squared": squared,
    "huber": huber(0.5),
    "log_cosh": log_cosh,
    "shifted_cosh": shifted_cosh,
    "linex": linex(1.0),
    "linex_other_side": linex(-0.5),
}


@pytest.mark.parametrize("name", LOSSES)
def test_residual_losses(name, x64):
    loss = LOSSES[name]
    small = jnp.linspace(-1e-3, 1e-3, 11)
    np.testing.assert_allclose(loss(small), small**2, rtol=2e-3, atol=1e-12)
    grid = jnp.linspace(-5, 5, 101)
    values = loss(grid)
    assert values.min() == pytest.approx(0.0, abs=1e-12)
    assert (jnp.diff(values)[:50] < 0).all()
    assert (jnp.diff(values)[50:] > 0).all()
    assert jnp.isfinite(jax.vmap(jax.grad(lambda x: loss(x)))(grid)).all()
    at = {
        "squared": grid**2,
        "huber": np.where(np.abs(grid) < 0.5, grid**2, np.abs(grid) - 0.25),
        "log_cosh": 2 * np.log(np.cosh(grid)),
        "shifted_cosh": np.exp(grid) + np.exp(-grid) - 2,
        "linex": 2 * (np.exp(grid) - grid - 1),
        "linex_other_side": 8 * (np.exp(-grid / 2) + grid / 2 - 1),
    }
    np.testing.assert_allclose(values, at[name], rtol=1e-10, atol=1e-10)
    assert loss(jnp.array(1e4)) > 0
    for build, value in ((huber, 0.0), (linex, 0.0)):
        with pytest.raises(ValueError, match=r"is 0\.0"):
            build(value)


def test_log_cosh_does_not_overflow():
    assert log_cosh(jnp.float32(500.0)) == pytest.approx(1000.0 - 2 * np.log(2.0))

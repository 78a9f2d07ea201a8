"""Laws of every flow objective: at an exact flow its residual and its gradient are zero, whatever
drew the trajectories; planted bugs are not.

The flow is exact by dynamic programming, for a uniform and for a random backward policy. A new
objective is one row of ``OBJECTIVES``.
"""

from __future__ import annotations

import functools
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "gflownet"))

from small_environments import (
    SMALL,
    exact_tables,
    masked_log_softmax,
    plain_scores,
    tabular,
    tabulate,
)

from gflownet import backward_rollout, exact, forward_rollout, score
from gflownet.objectives import trajectory_balance, trajectory_balance_residual

BACKWARD = ("uniform", "random")
NUM = 64


def balance(log_z, log_pf, log_pb, trajectories):
    """[B] trajectory-balance residuals."""
    return jax.vmap(trajectory_balance_residual, (None, 1, 1, 0, 1))(
        log_z, log_pf, log_pb, trajectories.log_reward, trajectories.valid
    )


# An objective is ``(environment, policy, epsilon) -> Objective``; its params as given here.
OBJECTIVES = {
    "trajectory_balance": lambda environment, policy, epsilon: trajectory_balance(
        environment, policy, epsilon=epsilon, chunk_size=32
    ),
}


@functools.cache
def setting(name):
    return tabular(SMALL[name]())


@functools.cache
def flow(name, backward):
    """Exact parameters as numpy float64, and log Z."""
    tables, log_z = exact_tables(SMALL[name](), backward)
    return jax.tree.map(np.asarray, tables), log_z


@functools.cache
def samplers(name):
    environment, policy = setting(name)
    keys = jax.random.split(jax.random.key(0), NUM)
    forward = jax.jit(
        lambda params, epsilon: forward_rollout(keys, environment, policy, params, epsilon=epsilon)
    )
    backward = jax.jit(
        lambda params, terminal: backward_rollout(keys, environment, policy, params, terminal)
    )
    return forward, backward


@functools.cache
def rollouts(name, backward):
    """Trajectories of several behaviours under the exact flow (float32)."""
    params = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), flow(name, backward)[0])
    draw_forward, draw_backward = samplers(name)
    drawn = {f"epsilon {epsilon}": draw_forward(params, epsilon) for epsilon in (0.0, 0.5, 1.0)}
    tables = tabulate(setting(name)[0])
    ends = np.random.default_rng(0).choice(np.flatnonzero(tables.is_terminal), NUM)
    terminal = jax.tree.map(lambda leaf: jnp.asarray(leaf[ends]), tables.states)
    return drawn | {"backward": draw_backward(params, terminal)}


@pytest.mark.parametrize("backward", BACKWARD)
@pytest.mark.parametrize("name", SMALL)
def test_flow_is_exact(name, backward, x64):
    # The tables are right by the definition of a flow, and not only by the recursion.
    environment, _ = setting(name)
    params, log_z = exact_tables(environment, backward)
    tables = tabulate.__wrapped__(environment)
    forward, back = np.asarray(params["forward"]), np.asarray(params["backward"])
    log_flow = np.asarray(params["log_flow"])
    assert log_z == pytest.approx(environment.log_z, abs=1e-10)
    assert log_flow[tables.source] == pytest.approx(log_z, abs=1e-12)
    ends = tables.is_terminal
    np.testing.assert_allclose(log_flow[ends], tables.log_reward[ends], atol=1e-12)
    # F(s) P_F(s' | s) = F(s') P_B(s | s') on every edge.
    state, action = np.nonzero(tables.forward)
    child = tables.children[state, action]
    np.testing.assert_allclose(
        log_flow[state] + forward[state, action], log_flow[child] + back[child, action], atol=1e-10
    )
    # Both policies are normalised where they have a choice, P_B over the parents.
    for table, mask, none in (
        (forward, tables.forward, ends),
        (back, tables.backward, np.arange(len(ends)) == tables.source),
    ):
        total = np.where(mask, np.exp(table), 0.0).sum(axis=1)
        np.testing.assert_allclose(total, np.where(none, 0.0, 1.0), atol=1e-12)
    if backward == "uniform":
        expected = masked_log_softmax(np.zeros(back.shape), tables.backward)
        np.testing.assert_allclose(back[tables.backward], expected[tables.backward], atol=1e-12)


@pytest.mark.parametrize("backward", BACKWARD)
@pytest.mark.parametrize("name", SMALL)
def test_terminal_distribution_is_the_target(name, backward):
    environment, policy = setting(name)
    params = jax.tree.map(jnp.asarray, flow(name, backward)[0])
    graph = exact.enumerate_graph(environment)
    law = exact.terminal_distribution(environment, policy, params, graph)
    target, log_z = exact.target_distribution(environment, graph)
    assert law.sum() == pytest.approx(1.0, abs=1e-6)
    assert target.sum() == pytest.approx(1.0, abs=1e-12)
    assert log_z == pytest.approx(environment.log_z, abs=1e-5)
    np.testing.assert_allclose(law, target, atol=1e-6)
    # The planted bug: one logit that is wrong.
    state = np.flatnonzero(tabulate(environment).forward.sum(axis=1) > 1)[0]
    wrong = params["forward"].at[state, 0].add(0.5)
    law = exact.terminal_distribution(environment, policy, params | {"forward": wrong}, graph)
    assert law.sum() == pytest.approx(1.0, abs=1e-6)
    assert exact.total_variation(law, target) > 1e-4


@pytest.mark.parametrize("backward", BACKWARD)
@pytest.mark.parametrize("name", SMALL)
def test_balance_of_recorded_values(name, backward):
    _, log_z = flow(name, backward)
    for drawn_by, t in rollouts(name, backward).items():
        residual = balance(jnp.asarray(log_z, jnp.float32), t.log_pf, t.log_pb, t)
        np.testing.assert_allclose(residual, 0.0, atol=1e-5, err_msg=drawn_by)


@pytest.mark.parametrize("backward", BACKWARD)
@pytest.mark.parametrize("name", SMALL)
def test_balance_in_double_precision(name, backward):
    # The same trajectories, scored anew in float64.
    drawn = rollouts(name, backward)
    with jax.enable_x64(True):
        environment, policy = setting(name)
        params, log_z = exact_tables(environment, backward)

        @jax.jit
        def residuals(t):
            scores = score(environment, policy, params, t, is_on_policy=False)
            return balance(log_z, scores.log_pf, scores.log_pb, t)

        for drawn_by, t in drawn.items():
            log_reward = jax.vmap(environment.log_reward, (None, 0))((), t.terminal)
            t = t._replace(
                log_pf=t.log_pf.astype(float),
                log_pb=t.log_pb.astype(float),
                log_reward=log_reward,
            )
            residual = residuals(t)
            assert residual.dtype == jnp.float64
            np.testing.assert_allclose(residual, 0.0, atol=1e-10, err_msg=drawn_by)


BUGS = {
    "scored with the exploring policy": ("epsilon 0.5", {"behaviour_epsilon": 0.5}),
    "scored with the uniform policy": ("epsilon 1.0", {"behaviour_epsilon": 1.0}),
    "the last step left out": ("epsilon 0.0", {"drop_last": True}),
    "the mask of P_B at the parent": ("epsilon 0.0", {"backward_mask_at": "parent"}),
    "the last step left out, backward": ("backward", {"drop_last": True}),
}


@pytest.mark.parametrize("name", SMALL)
def test_bugs_break_the_balance(name):
    environment, policy = setting(name)
    params, log_z = flow(name, "random")
    params = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), params)
    drawn = rollouts(name, "random")

    @functools.partial(jax.jit, static_argnums=1)
    def residuals(t, options):
        return balance(log_z, *plain_scores(environment, policy, params, t, **dict(options)), t)

    for t in drawn.values():
        np.testing.assert_allclose(residuals(t, ()), 0.0, atol=1e-5)
    for bug, (drawn_by, options) in BUGS.items():
        wrong = residuals(drawn[drawn_by], tuple(options.items()))
        assert np.abs(wrong).max() > 0.05, bug


@pytest.mark.parametrize("name", SMALL)
def test_reward_of_the_state_before_breaks_the_balance(name):
    environment, _ = setting(name)
    t, log_z = rollouts(name, "random")["epsilon 0.5"], flow(name, "random")[1]
    # A stop leaves the position as it is: there, the state two before.
    back = 1 if environment.stop_action is None else 2
    index = jnp.maximum(t.length - back, 0)
    before = jax.tree.map(lambda leaf: leaf[index, jnp.arange(NUM)], t.states)
    wrong = t._replace(log_reward=jax.vmap(environment.log_reward, (None, 0))((), before))
    assert np.abs(balance(log_z, t.log_pf, t.log_pb, wrong)).max() > 0.05


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_gradient_at_the_exact_flow(objective, name, x64):
    environment, policy = setting(name)
    tables, log_z = exact_tables(environment, "random")
    params = {"policy": tables, "log_z": jnp.asarray(log_z)}
    # The schedule is 0, 1/2 and 1 at the updates 0, 1 and 2: one program for all.
    loss = OBJECTIVES[objective](environment, policy, lambda count: 0.5 * count).loss
    keys = jax.random.split(jax.random.key(1), NUM)

    @jax.jit
    def evaluate(params, carry):
        return jax.value_and_grad(lambda p: loss(p, carry, keys, ())[0])(params)

    for count in range(3):
        value, gradient = evaluate(params, jnp.full(NUM, count, jnp.int32))
        assert value == pytest.approx(0.0, abs=1e-18)
        for leaf in jax.tree.leaves(gradient):
            np.testing.assert_allclose(leaf, 0.0, atol=1e-9)
    # Control: away from it neither is zero, and P_F, P_B and log Z all get gradient.
    away = params | {"log_z": params["log_z"] + 0.1}
    value, gradient = evaluate(away, jnp.zeros(NUM, jnp.int32))
    assert value == pytest.approx(0.01, rel=1e-6)
    assert float(gradient["log_z"]) == pytest.approx(0.2, rel=1e-6)
    assert np.abs(gradient["policy"]["forward"]).max() > 1e-3
    assert np.abs(gradient["policy"]["backward"]).max() > 1e-3
    # No gradient reaches a logit that is not allowed.
    tabled = tabulate.__wrapped__(environment)
    assert not np.asarray(gradient["policy"]["forward"])[~tabled.forward].any()
    assert not np.asarray(gradient["policy"]["backward"])[~tabled.backward].any()


@pytest.mark.parametrize("name", ["hypergrid_2x5", "sets_5_3"])
def test_scoring_with_the_exploring_policy_has_a_gradient(name, x64):
    # The control of the test above at epsilon = 1.
    environment, policy = setting(name)
    tables, log_z = exact_tables(environment, "random")
    keys = jax.random.split(jax.random.key(1), NUM)

    @jax.jit
    def gradient(tables):
        t = forward_rollout(keys, environment, policy, tables, epsilon=1.0)

        def loss(tables, behaviour):
            scores = plain_scores(environment, policy, tables, t, behaviour_epsilon=behaviour)
            return jnp.mean(jnp.square(balance(log_z, *scores, t)))

        return jax.grad(loss)(tables, None), jax.grad(loss)(tables, 0.9)

    right, wrong = gradient(tables)
    assert np.abs(right["backward"]).max() < 1e-9
    assert np.abs(wrong["backward"]).max() > 1e-2

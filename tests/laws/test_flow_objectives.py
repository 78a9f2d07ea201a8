"""Laws of every flow objective: at an exact flow its residual and its gradient are zero, whatever
drew the trajectories; planted bugs are not.

The flow is exact by dynamic programming, for a uniform and for a random backward policy. A new
objective is one row of ``OBJECTIVES``. Those whose loss is an expectation, and not zero at the flow
(the Kullback-Leibler divergences, trajectory likelihood), are tested in files of their own.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import in_haste
import jax
import jax.numpy as jnp
import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "gflownet"))

from small_environments import (
    SMALL,
    exact_posterior,
    exact_tables,
    masked_log_softmax,
    plain_scores,
    state_energies,
    tabular,
    tabulate,
)

from gflownet import backward_rollout, exact, forward_rollout, objectives, score
from gflownet.objectives import (
    detailed_balance_residuals,
    subtrajectory_residuals,
    terminal_flow,
    trajectory_balance,
    trajectory_balance_residual,
)
from gflownet.policies import tabular_policy
from gflownet.sampling import forward_sampler, given_trajectories

BACKWARD = ("uniform", "random")
NUM = 64


def balance(log_z, log_pf, log_pb, trajectories):
    """[B] trajectory-balance residuals."""
    return jax.vmap(trajectory_balance_residual, (None, 1, 1, 0, 1))(
        log_z, log_pf, log_pb, trajectories.log_reward, trajectories.valid
    )


class Row(NamedTuple):
    """An objective of the suite.

    Attributes:
      build: ``(environment, policy, sampler, axis_name) -> Objective``; the environment has an
        energy of every state.
      params: ``(environment, exact tables, log Z) -> params`` at the exact flow.
      needs_stop: whether it is for graphs with a stop action.
    """

    build: Callable[..., Any]
    params: Callable[..., Any]
    needs_stop: bool = False


def only_policy(environment, tables, log_z):
    return {"policy": tables}


def with_log_z(environment, tables, log_z):
    return {"policy": tables, "log_z": log_z}


def with_target(environment, tables, log_z):
    return {"policy": tables, "target": tables}


def looking_forward(environment, tables, log_z):
    # log F~ = log F + E.
    log_flow = tables["log_flow"] + state_energies(environment)
    return {"policy": {**tables, "log_flow": log_flow}}


def with_potential(environment, tables, log_z):
    params = looking_forward(environment, tables, log_z)
    return {**params, "potential": state_energies(environment)}


def posterior(environment, tables, log_z):
    del tables, log_z
    prior, forward, log_mean = exact_posterior(environment, inverse_temperature=0.7)
    return {"policy": {**prior, "forward": forward}, "prior": prior, "log_z": log_mean}


def plain(name, **options):
    """An objective that takes nothing but options."""
    build = getattr(objectives, name)
    return lambda environment, policy, sampler, axis_name: build(
        environment, policy, sampler=sampler, chunk_size=32, **options
    )


def shared(name, **options):
    """One whose mean is over the batch of all devices."""
    build = getattr(objectives, name)
    return lambda environment, policy, sampler, axis_name: build(
        environment, policy, sampler=sampler, axis_name=axis_name, chunk_size=32, **options
    )


def decomposition(environment, policy, sampler, axis_name):
    return objectives.learned_energy_decomposition(
        environment,
        policy,
        lambda table, pair: table[pair[0]] - table[pair[1]],
        dropout=0.0,
        sampler=sampler,
        axis_name=axis_name,
        chunk_size=32,
    )


def relative(environment, policy, sampler, axis_name):
    del axis_name
    return objectives.relative_trajectory_balance(
        environment, policy, policy, inverse_temperature=0.7, sampler=sampler, chunk_size=32
    )


OBJECTIVES = {
    "trajectory_balance": Row(plain("trajectory_balance"), with_log_z),
    "log_partition_variance": Row(shared("log_partition_variance"), only_policy),
    "detailed_balance": Row(shared("detailed_balance"), only_policy),
    "subtrajectory_balance": Row(plain("subtrajectory_balance"), only_policy),
    "subtrajectory_balance_batch": Row(
        shared("subtrajectory_balance", decay=1.9, normalize="batch"), only_policy
    ),
    "subtrajectory_balance_length": Row(
        shared("subtrajectory_balance", decay=1.0, normalize="length"), only_policy
    ),
    "subtrajectory_balance_none": Row(
        plain("subtrajectory_balance", normalize="none", residual_loss=objectives.log_cosh),
        only_policy,
    ),
    "flow_matching": Row(shared("flow_matching", terminal_weight=10.0, floor=0.01), only_policy),
    "modified_detailed_balance": Row(
        shared("modified_detailed_balance"), only_policy, needs_stop=True
    ),
    "modified_detailed_balance_target": Row(
        shared("modified_detailed_balance", has_target=True), with_target, needs_stop=True
    ),
    "soft_q_learning": Row(shared("soft_q_learning"), with_target),
    "munchausen": Row(
        shared("soft_q_learning", munchausen=0.15, has_target=False, terminal_weight=5.0),
        only_policy,
    ),
    "path_consistency": Row(shared("path_consistency", depth=2), only_policy),
    "forward_looking_detailed_balance": Row(
        shared("forward_looking_detailed_balance"), looking_forward
    ),
    "forward_looking_subtrajectory_balance": Row(
        shared("forward_looking_subtrajectory_balance"), looking_forward
    ),
    "learned_energy_decomposition": Row(decomposition, with_potential),
    "relative_trajectory_balance": Row(relative, posterior),
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
        """Of whole, of single and of all parts of trajectories."""
        scores = plain_scores(environment, policy, params, t, **dict(options))
        log_flow = jax.vmap(terminal_flow, (1, 0, 1), out_axes=1)(t.log_flow, t.log_reward, t.valid)
        return (
            balance(log_z, *scores, t),
            jax.vmap(detailed_balance_residuals, 1)(log_flow, *scores, t.valid),
            jax.vmap(subtrajectory_residuals, 1)(log_flow, *scores, t.valid),
        )

    for t in drawn.values():
        for right in residuals(t, ()):
            np.testing.assert_allclose(right, 0.0, atol=1e-5)
    for bug, (drawn_by, options) in BUGS.items():
        for wrong in residuals(drawn[drawn_by], tuple(options.items())):
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


def in_double_precision(environment, t):
    """The same trajectories with rewards in float64; what they recorded is not used."""
    log_reward = jax.vmap(environment.log_reward, (None, 0))((), t.terminal)
    return t._replace(
        log_pf=t.log_pf.astype(float), log_pb=t.log_pb.astype(float), log_reward=log_reward
    )


def with_energies(environment):
    table = jnp.asarray(state_energies(environment))
    return environment._replace(
        intermediate_energy=lambda params, state: table[environment.state_index(state)]
    )


def exact_params(environment):
    """The params of every objective at the exact flow of one backward policy."""
    tables, log_z = exact_tables(environment, "random")
    is_stopping = environment.stop_action is not None
    return {
        name: jax.tree.map(jnp.asarray, row.params(environment, tables, log_z))
        for name, row in OBJECTIVES.items()
        if is_stopping or not row.needs_stop
    }


def shifted(tree, seed=0):
    """Other parameters: of every entry, a little."""
    leaves, treedef = jax.tree.flatten(tree)
    rng = np.random.default_rng(seed)
    return treedef.unflatten([leaf + 0.2 * rng.standard_normal(leaf.shape) for leaf in leaves])


@pytest.mark.parametrize("name", ["hypergrid_2x5", "diamond"])
def test_losses_at_the_exact_flow(name, x64):
    environment, policy = setting(name)
    environment = with_energies(environment)
    every_params = exact_params(environment)
    keys = jax.random.split(jax.random.key(1), NUM)

    def loss_fn(row, t):
        objective = OBJECTIVES[row].build(environment, policy, given_trajectories(), None)
        return lambda params: objective.loss(params, (), keys, t)[0]

    # A program for all objectives runs a few times only.
    hasty_jit = functools.partial(jax.jit, compiler_options=in_haste.OPTIONS)

    @hasty_jit
    def evaluate(every_params, t):
        return {row: loss_fn(row, t)(params) for row, params in every_params.items()}

    @hasty_jit
    def differentiate(every_params, t):
        return {row: jax.grad(loss_fn(row, t))(params) for row, params in every_params.items()}

    tabled = tabulate.__wrapped__(environment)
    for drawn_by, t in rollouts(name, "random").items():
        t = in_double_precision(environment, t)
        for row, value in evaluate(every_params, t).items():
            assert value == pytest.approx(0.0, abs=1e-15), (row, drawn_by)
    # Control: away from it nothing is zero. (Nor need the gradient at it be looked at: it is that
    # of a square.)
    away = shifted(every_params)
    for row, value in evaluate(away, t).items():
        assert value > 1e-3, row
    # All that is learned gets gradient; each row once, on the graph where it compiles soonest.
    own = {row for row in away if OBJECTIVES[row].needs_stop == (name == "hypergrid_2x5")}
    away = {row: away[row] for row in own if row.removeprefix("subtrajectory_balance_") == row}
    for row, gradient in differentiate(away, t).items():
        fixed = [name for name in ("prior", "target") if name in gradient]
        for name in fixed:
            assert not any(leaf.any() for leaf in jax.tree.leaves(gradient[name])), row
        learned = {name: leaf for name, leaf in gradient.items() if name not in fixed}
        unused = ["backward"] if row in WITHOUT_BACKWARD else []
        unused += ["log_flow"] if row in WITHOUT_FLOW else []
        for path, leaf in jax.tree_util.tree_leaves_with_path(learned):
            is_unused = any(name in jax.tree_util.keystr(path) for name in unused)
            assert (np.abs(leaf).max() > 1e-4) != is_unused, (row, path)
        # No gradient reaches a logit that is not allowed, or the flow of a terminal state.
        tables = gradient["policy"]
        assert not np.asarray(tables["forward"])[~tabled.forward].any()
        assert not np.asarray(tables["backward"])[~tabled.backward].any()
        assert not np.asarray(tables["log_flow"])[tabled.is_terminal].any()


WITHOUT_BACKWARD = (
    "flow_matching",
    "soft_q_learning",
    "munchausen",
    "relative_trajectory_balance",
)
WITHOUT_FLOW = (
    "trajectory_balance",
    "log_partition_variance",
    "modified_detailed_balance",
    "modified_detailed_balance_target",
    "relative_trajectory_balance",
)


# One of each way to take a mean over the batch.
MEANS = (
    "detailed_balance",
    "log_partition_variance",
    "subtrajectory_balance_batch",
    "subtrajectory_balance_length",
)


def test_devices_share_the_batch():
    # The slices of 1 and of 4 devices have the same mean loss and gradient.
    environment, policy = tabular_of_its_own("hypergrid_2x5")
    exact_flow = exact_params(environment)
    every_params = shifted({row: exact_flow[row] for row in MEANS})
    tables = every_params["detailed_balance"]["policy"]
    sampler = forward_sampler(environment, policy)
    keys = jax.random.split(jax.random.key(1), 16)

    def device(keys):
        t, _, _ = sampler.sample({"policy": tables}, jnp.zeros(len(keys), int), keys, ())
        out = {}
        for row, params in every_params.items():
            loss = OBJECTIVES[row].build(environment, policy, given_trajectories(), "devices").loss
            out[row] = jax.value_and_grad(lambda p, loss=loss: loss(p, (), keys, t)[0])(params)
        return out

    def mean(num_devices):
        mapped = jax.pmap(device, axis_name="devices", devices=jax.devices()[:num_devices])
        parts = mapped(keys.reshape(num_devices, -1))
        return jax.tree.map(lambda leaf: np.asarray(leaf).mean(axis=0), parts)

    together, apart = mean(1), mean(4)
    for row in every_params:
        jax.tree.map(
            functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5, err_msg=row),
            apart[row],
            together[row],
        )


def tabular_of_its_own(name):
    """Not traced in double precision before."""
    environment = SMALL[name]()
    size = len(jax.tree.leaves(environment.enumerate())[0])
    policy = tabular_policy(size, environment.num_actions)
    return environment._replace(observe=environment.state_index), policy


@pytest.mark.parametrize("name", SMALL)
def test_gradient_at_the_exact_flow(name, x64):
    # With the sampler that objectives have by default.
    environment, policy = setting(name)
    tables, log_z = exact_tables(environment, "random")
    params = {"policy": tables, "log_z": jnp.asarray(log_z)}
    # The schedule is 0, 1/2 and 1 at the updates 0, 1 and 2: one program for all.
    loss = trajectory_balance(
        environment, policy, epsilon=lambda count: 0.5 * count, chunk_size=32
    ).loss
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

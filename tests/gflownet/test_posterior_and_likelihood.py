"""Relative trajectory balance, trajectory likelihood, separate policies."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from all_paths import all_trajectories, path_log_probabilities, terminal_law
from small_environments import (
    SMALL,
    diamond,
    exact_posterior,
    exact_tables,
    masked_log_softmax,
    random_tables,
    tabular,
    tabulate,
)

from gflownet import forward_rollout
from gflownet.objectives import (
    detailed_balance,
    relative_trajectory_balance,
    trajectory_balance,
    trajectory_likelihood,
    with_target,
)
from gflownet.policies import mlp_policy, separate_backward
from gflownet.sampling import forward_sampler, given_trajectories

KEYS = jax.random.split(jax.random.key(0), 6)


# Relative trajectory balance


@pytest.mark.parametrize("beta", [0.0, 0.7])
def test_posterior_law(beta, x64):
    # What the law suite takes for exact is the prior times R^β.
    environment = diamond()
    prior, forward, log_z = exact_posterior(environment, beta)
    before = terminal_law(environment, prior["forward"])
    after = terminal_law(environment, forward)
    rewards = tabulate.__wrapped__(environment).log_reward
    weights = {x: mass * np.exp(beta * rewards[x]) for x, mass in before.items()}
    assert log_z == pytest.approx(np.log(sum(weights.values())))
    assert after == pytest.approx({x: w / sum(weights.values()) for x, w in weights.items()})
    if beta == 0:
        assert log_z == pytest.approx(0.0)
        log_prior = masked_log_softmax(np.asarray(prior["forward"]), tabulate(environment).forward)
        mask = tabulate(environment).forward
        np.testing.assert_allclose(np.asarray(forward)[mask], log_prior[mask], atol=1e-12)


def test_relative_balance_of_one_trajectory_each(x64):
    environment, policy = tabular(diamond())
    t = all_trajectories(environment)
    objective = relative_trajectory_balance(
        environment, policy, policy, inverse_temperature=0.7, sampler=given_trajectories()
    )
    params = {
        "policy": random_tables(environment, 1),
        "prior": random_tables(environment, 2),
        "log_z": jnp.asarray(0.4),
    }
    keys = jax.random.split(jax.random.key(0), len(t.log_reward))

    @jax.jit
    def both(params):
        def plain(params):
            log_pf, _ = path_log_probabilities(environment, params["policy"])
            log_prior, _ = path_log_probabilities(environment, params["prior"])
            log_prior = jax.lax.stop_gradient(log_prior)
            return jnp.mean((params["log_z"] + log_pf - log_prior - 0.7 * t.log_reward) ** 2)

        loss = lambda params: objective.loss(params, (), keys, t)  # noqa: E731
        return jax.value_and_grad(loss, has_aux=True)(params), jax.value_and_grad(plain)(params)

    ((loss, (_, metrics)), gradient), (value, expected) = both(params)
    assert loss == pytest.approx(float(value))
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-10), gradient, expected)
    assert not any(leaf.any() for leaf in jax.tree.leaves(gradient["prior"]))
    assert not gradient["policy"]["backward"].any()
    assert metrics["log_z"] == pytest.approx(0.4)


# Trajectory likelihood


@functools.cache
def separate():
    environment = SMALL["hypergrid_2x5"]()
    forward = mlp_policy(3, (8,), backward="uniform", with_flow=True)
    policy = separate_backward(forward, mlp_policy(3, (8,)))
    params = policy.init(jax.random.key(0), environment.observe(environment.initial(KEYS[0])))
    other = jax.tree.map(lambda leaf: leaf + 0.3, params)
    return environment, policy, {"policy": params, "target": other, "log_z": jnp.float32(0.3)}


@pytest.mark.parametrize("build", [trajectory_balance, detailed_balance])
def test_neither_loss_moves_the_other_policy(build):
    environment, policy, params = separate()
    objective = trajectory_likelihood(environment, policy, build, epsilon=0.2)
    # The forward policy's loss alone, with the target's P_B as a constant.
    mixed = {
        "forward": params["policy"]["forward"],
        "backward": params["target"]["backward"],
    }
    alone = build(environment, policy, epsilon=0.2)
    carry = jnp.zeros(6, jnp.int32)
    value_and_grad = functools.partial(jax.value_and_grad, has_aux=True)

    @jax.jit
    def both(params, mixed):
        joint = value_and_grad(lambda p: objective.loss(p, carry, KEYS, ()))(params)
        apart = {**params, "policy": mixed}
        expected = value_and_grad(lambda p: alone.loss(p, carry, KEYS, ()))(apart)
        t = forward_rollout(KEYS, environment, policy, params["policy"], epsilon=0.2)

        def likelihood(params):
            """With every state evaluated, valid or not."""
            states = jax.tree.map(lambda leaf: leaf[1:], t.states)
            log_pb = jax.vmap(jax.vmap(lambda s, a: _log_pb(environment, policy, params, s, a)))(
                states, t.actions
            )
            return -jnp.mean(jnp.where(t.valid, log_pb, 0.0).sum(axis=0) / t.length)

        return joint, expected, jax.value_and_grad(likelihood)(params["policy"])

    ((loss, (_, metrics)), gradient), ((value, _), expected), (likelihood, taught) = both(
        params, mixed
    )
    assert metrics["backward_loss"] == pytest.approx(float(likelihood), rel=1e-5)
    assert loss == pytest.approx(float(value + likelihood), rel=1e-5)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6)
    jax.tree.map(close, gradient["policy"]["forward"], expected["policy"]["forward"])
    jax.tree.map(close, gradient["policy"]["backward"], taught["backward"])
    assert max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(taught)) > 1e-2
    assert not any(leaf.any() for leaf in jax.tree.leaves(gradient["target"]))
    # The planted bug: P_B of the policy itself, to which the flow's loss has a gradient.
    naive = max(float(jnp.abs(l).max()) for l in jax.tree.leaves(expected["policy"]["backward"]))  # noqa: E741
    assert naive > 1e-2


def _log_pb(environment, policy, params, state, action):
    mask = environment.backward_mask(state)
    output = policy.apply(params, environment.observe(state), environment.forward_mask(state), mask)
    return jnp.where(mask[action], output.backward.log_prob(action), 0.0)


def test_feedback_passes_through():
    environment, policy, params = separate()
    inner = forward_sampler(environment, policy)

    def sample(params, carry, keys, batch):
        own = {"policy": params["policy"]["policy"]}
        t, _, metrics = inner.sample(own, jnp.zeros(len(keys), jnp.int32), keys, batch)
        return t, carry, metrics

    sampler = inner._replace(
        sample=sample, feedback=lambda carry, trajectories, losses: losses, is_on_policy=False
    )
    objective = trajectory_likelihood(environment, policy, trajectory_balance, sampler=sampler)
    loss, (losses, metrics) = jax.jit(lambda: objective.loss(params, jnp.zeros(6), KEYS, ()))()
    assert losses.shape == (6,)
    assert losses.mean() == pytest.approx(float(loss - metrics["backward_loss"]), rel=1e-5)


def test_learns_both_policies():
    # Tables on the diamond: the law is right, and P_B is that of P_F's trajectories.
    environment, table = tabular(diamond())
    policy = separate_backward(table, table)
    own = policy.init(jax.random.key(0), 0)
    params = {"policy": own, "target": own, "log_z": jnp.zeros(())}
    objective = trajectory_likelihood(environment, policy, trajectory_balance)
    rule = with_target(optax.adam(0.02), rate=0.25)

    @jax.jit
    def train(params):
        def step(loop, key):
            params, state, carry = loop
            keys = jax.random.split(key, 16)
            gradient, (carry, metrics) = jax.grad(objective.loss, has_aux=True)(
                params, carry, keys, ()
            )
            updates, state = rule.update(gradient, state, params)
            return (optax.apply_updates(params, updates), state, carry), metrics

        start = (params, rule.init(params), jnp.zeros(16, jnp.int32))
        keys = jax.random.split(jax.random.key(0), 1500)
        (params, _, _), metrics = jax.lax.scan(step, start, keys)
        return params, metrics

    params, metrics = train(params)
    exact, log_z = exact_tables(environment, "uniform")
    del exact
    assert abs(params["log_z"] - log_z) < 0.05
    target = np.exp([0.3, -0.9]) / np.exp([0.3, -0.9]).sum()
    law = terminal_law(environment, params["policy"]["forward"]["forward"])
    assert abs(law[1] - target[0]) < 0.03
    assert metrics["backward_loss"][-50:].mean() < metrics["backward_loss"][:50].mean()
    # P_B of P_F's own trajectories is P(s) P_F(s' | s) / P(s'), at state 0 say.
    log_pf = np.exp(
        masked_log_softmax(
            np.asarray(params["policy"]["forward"]["forward"]), tabulate(environment).forward
        )
    )
    by_2, by_5 = log_pf[4, 0] * log_pf[2, 1], log_pf[4, 1] * log_pf[5, 0]
    backward = masked_log_softmax(
        np.asarray(params["policy"]["backward"]["backward"]), tabulate(environment).backward
    )
    assert np.exp(backward[0, 1]) == pytest.approx(by_2 / (by_2 + by_5), abs=0.1)

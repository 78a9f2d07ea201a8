"""Soft Q-learning: it is detailed balance with half a gradient; Munchausen's temperature."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from small_environments import SMALL, exact_tables, random_tables, tabular

from gflownet import forward_rollout
from gflownet.objectives import (
    detailed_balance,
    huber,
    soft_q_learning,
    soft_q_residuals,
    squared,
    terminal_flow,
    with_target,
)
from gflownet.sampling import given_trajectories

NUM = 32


@functools.cache
def drawn(name):
    environment, policy = tabular(SMALL[name]())
    keys = jax.random.split(jax.random.key(0), NUM)
    draw = jax.jit(lambda tables: forward_rollout(keys, environment, policy, tables, epsilon=0.5))
    tables, _ = exact_tables(environment, "random")
    return environment, policy, draw(tables)


def residuals(t, munchausen, floor=-100.0):
    """Of the recorded values of the exact flow."""
    flow = jax.vmap(terminal_flow, (1, 0, 1), out_axes=1)(t.log_flow, t.log_reward, t.valid)
    fn = functools.partial(soft_q_residuals, munchausen=munchausen, floor=floor)
    return jax.vmap(fn, 1)(flow, t.log_pf, t.log_pb, flow, t.log_pf, t.valid)


@pytest.mark.parametrize("name", ["hypergrid_2x5", "diamond"])
def test_munchausen_at_the_exact_flow(name):
    _, _, t = drawn(name)
    for munchausen in (0.0, 0.15, 0.9):
        np.testing.assert_allclose(residuals(t, munchausen), 0.0, atol=1e-4)
    # The planted bug: temperature 1 instead of 1 / (1 - α).
    flow = jax.vmap(terminal_flow, (1, 0, 1), out_axes=1)(t.log_flow, t.log_reward, t.valid)
    plain = jax.vmap(soft_q_residuals, 1)(flow, t.log_pf, t.log_pb, flow, t.log_pf, t.valid)
    wrong = plain - 0.15 * jnp.where(t.valid, t.log_pf, 0.0).T
    assert np.abs(wrong).max() > 0.1
    # A floor above some of the log-probabilities is felt.
    assert np.abs(residuals(t, 0.15, floor=-0.5)).max() > 0.01


def test_gradient_is_half_of_detailed_balance(x64):
    environment, policy, t = drawn("diamond")
    t = t._replace(
        log_pf=t.log_pf.astype(float),
        log_pb=t.log_pb.astype(float),
        log_reward=jax.vmap(environment.log_reward, (None, 0))((), t.terminal),
    )
    keys = jax.random.split(jax.random.key(0), NUM)
    tables = random_tables(environment, 2) | {
        "log_flow": jnp.asarray(np.random.default_rng(3).standard_normal(6))
    }
    options = {"sampler": given_trajectories(), "residual_loss": squared}
    soft = soft_q_learning(environment, policy, has_target=False, **options)
    with_copy = soft_q_learning(environment, policy, has_target=True, **options)
    balance = detailed_balance(environment, policy, **options)
    weighted = soft_q_learning(
        environment, policy, has_target=False, terminal_weight=5.0, **options
    )

    @jax.jit
    def everything(tables):
        def value(objective, **others):
            loss = lambda tables: objective.loss({"policy": tables, **others}, (), keys, t)[0]  # noqa: E731
            return jax.value_and_grad(loss)(tables)

        def by_hand(tables, target):
            """Of the tables' own values, with those of the target at s'."""
            log_pf = _log_softmax(tables["forward"], environment)
            log_pb = _log_softmax(tables["backward"], environment, backward=True)
            s, child, a = t.states[:-1], t.states[1:], t.actions
            is_end = jax.vmap(jax.vmap(lambda s: ~environment.forward_mask(s).any()))(child)
            ahead = jnp.where(is_end, t.log_reward, target["log_flow"][child])
            flow = tables["log_flow"][s] + log_pf[s, a]
            delta = flow - jax.lax.stop_gradient(ahead + log_pb[child, a])
            return jnp.sum(jnp.where(t.valid, delta**2, 0.0)) / t.valid.sum()

        return (
            value(soft),
            value(with_copy, target=tables),
            jax.value_and_grad(by_hand)(tables, tables),
            value(balance),
            value(weighted),
        )

    soft, with_copy, expected, balance, weighted = everything(tables)
    check = functools.partial(np.testing.assert_allclose, atol=1e-10)
    jax.tree.map(check, soft, expected)
    jax.tree.map(check, with_copy, expected)
    # The value is that of detailed balance; the gradient lacks the side of s'.
    assert soft[0] == pytest.approx(float(balance[0]), abs=1e-12)
    assert np.abs(balance[1]["log_flow"] - soft[1]["log_flow"]).max() > 1e-2
    assert np.abs(balance[1]["backward"]).max() > 1e-2
    assert not soft[1]["backward"].any()
    assert weighted[0] > 1.5 * soft[0]


def _log_softmax(logits, environment, backward=False):
    mask_fn = environment.backward_mask if backward else environment.forward_mask
    mask = jax.vmap(mask_fn)(jnp.asarray(environment.enumerate()))
    mask = mask | ~mask.any(axis=1, keepdims=True)
    return jax.nn.log_softmax(jnp.where(mask, logits, -1e9))


def test_target_network_follows():
    params = {
        "policy": {"w": jnp.arange(3.0)},
        "target": {"w": jnp.zeros(3)},
        "log_z": jnp.ones(()),
    }
    gradient = jax.tree.map(jnp.ones_like, params)

    def run(rule, steps):
        state, now, seen = rule.init(params), params, []
        for _ in range(steps):
            updates, state = rule.update(gradient, state, now)
            now = optax.apply_updates(now, updates)
            seen.append(now)
        return seen

    seen = run(with_target(optax.sgd(0.5), rate=0.25), 3)
    target = np.zeros(3)
    for step, now in enumerate(seen, 1):
        policy = np.arange(3.0) - 0.5 * step
        np.testing.assert_allclose(now["policy"]["w"], policy)
        target = target + 0.25 * (policy - target)
        np.testing.assert_allclose(now["target"]["w"], target, rtol=1e-6)
        assert now["log_z"] == 1 - 0.5 * step
    seen = run(with_target(optax.sgd(0.5), period=2), 5)
    copies = [now["target"]["w"][0] for now in seen]
    assert copies == [0.0, -1.0, -1.0, -2.0, -2.0]
    for options in ({}, {"rate": 0.1, "period": 2}, {"rate": 0.0}, {"rate": 1.5}, {"period": 0}):
        with pytest.raises(ValueError, match=r"(rate|period) is"):
            with_target(optax.sgd(1.0), **options)


def test_wrong_options():
    environment, policy, _ = drawn("diamond")
    for options in ({"munchausen": 1.0}, {"floor": 1.0}, {"terminal_weight": 0.0}):
        with pytest.raises(ValueError, match=str(next(iter(options.values())))):
            soft_q_learning(environment, policy, **options)
    assert huber(1.0)(jnp.array(2.0)) == 3.0

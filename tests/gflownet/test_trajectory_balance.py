"""The trajectory-balance objective: metrics, carry, exploration, devices, gradients, traces."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from small_environments import SMALL, plain_scores, random_tables, sets, tabular

from ebjax.training.update import initial_state, make_update
from ebjax.types import Source, TrainState
from gflownet import forward_rollout
from gflownet.objectives import trajectory_balance, trajectory_balance_residual

BATCH = 16
KEYS = jax.random.split(jax.random.key(4), BATCH)


@functools.cache
def setting(name):
    environment, policy = tabular(SMALL[name]())
    params = {"policy": random_tables(environment, 1), "log_z": jnp.float32(0.7)}
    return environment, policy, params


def test_residual():
    log_pf, log_pb = jnp.array([-1.0, -2.0, 50.0]), jnp.array([-0.25, 0.0, jnp.inf])
    valid = jnp.array([True, True, False])
    residual = functools.partial(trajectory_balance_residual, jnp.array(2.0))
    assert residual(log_pf, log_pb, jnp.array(0.5), valid) == 2.0 - 3.0 + 0.25 - 0.5
    # What stands after the end has no gradient either, infinite or not.
    gradient = jax.grad(lambda pf, pb: residual(pf, pb, jnp.array(0.5), valid), (0, 1))
    np.testing.assert_array_equal(gradient(log_pf, log_pb), [[1, 1, 0], [-1, -1, 0]])
    with pytest.raises(AssertionError):
        residual(log_pf, log_pb[:2], jnp.array(0.5), valid)
    with pytest.raises(AssertionError):
        residual(log_pf, log_pb, jnp.zeros(3), valid)


@pytest.mark.parametrize("name", ["hypergrid_2x5", "sets_5_3", "diamond"])
def test_loss_metrics_and_gradient(name):
    environment, policy, params = setting(name)
    objective = trajectory_balance(environment, policy, epsilon=0.25, chunk_size=7)
    carry = objective.init(jax.random.key(0), params, jnp.zeros(BATCH))
    assert carry.shape == (BATCH,)
    assert not carry.any()

    @jax.jit
    def both(params):
        def plain(params):
            t = forward_rollout(KEYS, environment, policy, params["policy"], epsilon=0.25)
            log_pf, log_pb = plain_scores(environment, policy, params["policy"], t)
            residual = params["log_z"] + (log_pf - log_pb).sum(axis=0) - t.log_reward
            return jnp.mean(residual**2), {
                "log_z": params["log_z"],
                "elbo": jnp.mean(t.log_reward + (log_pb - log_pf).sum(axis=0)),
                "log_reward": t.log_reward.mean(),
                "trajectory_length": t.valid.sum() / BATCH,
                "epsilon": jnp.asarray(0.25),
            }

        loss = lambda p: objective.loss(p, carry, KEYS, ())  # noqa: E731
        gradient = functools.partial(jax.value_and_grad, has_aux=True)
        return gradient(loss)(params), gradient(plain)(params)

    ((loss, (new_carry, metrics)), gradient), ((plain_loss, plain_metrics), plain_gradient) = both(
        params
    )
    np.testing.assert_array_equal(new_carry, np.ones(BATCH))
    assert loss == pytest.approx(float(plain_loss), rel=1e-5)
    assert metrics.keys() == plain_metrics.keys()
    for metric, value in metrics.items():
        assert value.shape == ()
        assert value == pytest.approx(float(plain_metrics[metric]), rel=1e-4, abs=1e-5), metric
    check = functools.partial(np.testing.assert_allclose, atol=1e-4)
    jax.tree.map(check, gradient, plain_gradient)


@pytest.mark.parametrize("schedule", [optax.linear_schedule(0.8, 0.0, 4), 0.3])
def test_schedule_of_exploration(schedule):
    environment, policy, params = setting("diamond")
    objective = trajectory_balance(environment, policy, epsilon=schedule)
    # A policy that always takes action 2 (the short cut) unless it explores.
    short = jnp.zeros((6, 3)).at[4, 2].set(60.0)
    params = params | {"policy": params["policy"] | {"forward": short}}
    keys = jax.random.split(jax.random.key(0), 512)

    @jax.jit
    def step(carry):
        _, (carry, metrics) = objective.loss(params, carry, keys, ())
        return carry, metrics

    carry = objective.init(jax.random.key(0), params, jnp.zeros(512))
    for count in range(6):
        assert (carry == count).all()
        carry, metrics = step(carry)
        epsilon = max(0.8 * (1 - count / 4), 0.0) if callable(schedule) else schedule
        assert metrics["epsilon"] == pytest.approx(epsilon, abs=1e-6)
        # A third of the explored first actions goes each way: to the end, to 2 (3 actions in all),
        # and to 5, where the policy is uniform anyway (2 or 3 actions).
        mean = 1 + epsilon / 3 * (2 + 1.5)
        # Lengths lie in [1, 3], so their variance is at most (mean - 1) (3 - mean).
        bound = 5 * np.sqrt((mean - 1) * (3 - mean) / 512)
        assert abs(metrics["trajectory_length"] - mean) <= bound + 1e-6
        # The planted bug: no exploration at all.
        assert (abs(metrics["trajectory_length"] - 1) > bound + 1e-6) == (epsilon > 0)


def test_negative_rounding_of_a_schedule_is_no_exploration():
    environment, policy, params = setting("diamond")
    objective = trajectory_balance(environment, policy, epsilon=lambda count: -1e-9 * (1 + count))
    loss = jax.jit(lambda carry: objective.loss(params, carry, KEYS, ()))
    _, (_, metrics) = loss(jnp.zeros(BATCH, jnp.int32))
    assert metrics["epsilon"] == 0.0


def test_devices_share_the_batch():
    # The slices of 1, 2 and 8 devices have the same loss, metrics and gradient.
    environment, policy, params = setting("hypergrid_2x5")
    objective = trajectory_balance(environment, policy, epsilon=0.25, chunk_size=16)
    carry = jnp.full(BATCH, 3, jnp.int32)

    def device(keys, carry):
        (loss, (_, metrics)), gradient = jax.value_and_grad(objective.loss, has_aux=True)(
            params, carry, keys, ()
        )
        return gradient, metrics | {"loss": loss}

    def run(num_devices):
        """What each device computes, [devices, ...]."""
        split = lambda leaf: leaf.reshape(num_devices, -1, *leaf.shape[1:])  # noqa: E731
        mapped = jax.pmap(device, devices=jax.devices()[:num_devices])
        return jax.tree.map(np.asarray, mapped(split(KEYS), split(carry)))

    close = functools.partial(np.testing.assert_allclose, atol=2e-5, rtol=1e-5)
    expected = jax.tree.map(np.asarray, jax.jit(device)(KEYS, carry))
    for num_devices in (1, 2, 8):
        parts = run(num_devices)
        jax.tree.map(close, jax.tree.map(lambda leaf: leaf.mean(axis=0), parts), expected)
    # The planted bug: a sum where the mean belongs.
    with pytest.raises(AssertionError):
        jax.tree.map(close, jax.tree.map(lambda leaf: leaf.sum(axis=0), parts), expected)


def test_reward_parameters_get_no_gradient():
    environment, policy = tabular(sets())
    params = {"policy": random_tables(environment, 1), "log_z": jnp.asarray(0.0)}

    @jax.jit
    def gradient(energies):
        def loss(params, energies):
            objective = trajectory_balance(environment, policy, reward_params=energies)
            return objective.loss(params, jnp.zeros(BATCH, jnp.int32), KEYS, ())[0]

        return jax.value_and_grad(loss, (0, 1))(params, energies)

    value, (to_params, to_energies) = gradient(jnp.arange(5.0))
    assert not to_energies.any()
    assert to_params["log_z"] != 0.0
    # Control: the reward does depend on them.
    assert gradient(jnp.ones(5))[0] != value


def test_one_trace_in_the_training_step():
    environment, policy, params = setting("sets_5_3")
    inner = trajectory_balance(environment, policy, epsilon=optax.linear_schedule(0.5, 0.0, 5))
    traces = []

    def loss(*args):
        traces.append(1)
        return inner.loss(*args)

    objective = inner._replace(loss=loss)
    source = Source((), lambda arrays, key, position: position)
    state = initial_state(
        jax.random.key(0), lambda key: params, objective, optax.sgd(0.01), source, BATCH
    )
    assert isinstance(state, TrainState)
    update = jax.jit(make_update(objective, optax.sgd(0.01), source, batch_size=BATCH))
    seen = []
    for _ in range(4):
        state, metrics = update(state, ())
        seen.append(float(metrics["epsilon"]))
    np.testing.assert_allclose(seen, [0.5, 0.4, 0.3, 0.2], atol=1e-6)
    assert (state.carry == 4).all()
    assert len(traces) == 1

"""Log-partition variance: the mean with and without gradient, groups, one condition a group."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_environments import random_tables, sets, tabular

from gflownet.conditional import conditional
from gflownet.objectives import log_partition_variance, log_partition_variance_residuals
from gflownet.sampling import forward_sampler

KEYS = jax.random.split(jax.random.key(0), 12)


def test_gradient_of_the_mean_cancels(x64):
    ratios = lambda theta: jnp.sin(theta * jnp.arange(1.0, 7.0))  # noqa: E731

    def loss(theta, is_detached):
        deviations = log_partition_variance_residuals(
            ratios(theta), group_size=3, is_detached=is_detached
        )
        return jnp.mean(deviations**2)

    gradients = [jax.grad(loss)(0.7, detached) for detached in (True, False)]
    assert gradients[0] == pytest.approx(float(gradients[1]), abs=1e-12)
    groups = np.sin(0.7 * np.arange(1.0, 7.0)).reshape(2, 3)
    assert loss(0.7, True) == pytest.approx(groups.var(axis=1).mean())
    # Control: about another number the gradient flows through it.
    other = lambda theta, stop: jnp.mean((ratios(theta) - stop(ratios(theta)[0])) ** 2)  # noqa: E731
    free = [jax.grad(other)(0.7, stop) for stop in (jax.lax.stop_gradient, lambda x: x)]
    assert abs(free[0] - free[1]) > 0.1


def test_one_of_a_kind_is_refused():
    environment, policy = tabular(sets())
    with pytest.raises(ValueError, match="group_size is 1"):
        log_partition_variance(environment, policy, group_size=1)
    objective = log_partition_variance(environment, policy)
    params = {"policy": random_tables(environment, 0)}
    with pytest.raises(ValueError, match="1 trajectory"):
        jax.eval_shape(objective.loss, params, jnp.zeros(1, jnp.int32), KEYS[:1], ())
    objective = log_partition_variance(environment, policy, group_size=5)
    with pytest.raises(ValueError, match="group_size is 5"):
        jax.eval_shape(objective.loss, params, jnp.zeros(12, jnp.int32), KEYS, ())


def test_groups_share_a_condition():
    inner, _ = tabular(sets())
    environment = conditional(inner, lambda key: jax.random.uniform(key, (), minval=0.5, maxval=2))
    environment = environment._replace(observe=lambda state: inner.observe(state.state))
    _, policy = tabular(sets())
    params = {"policy": random_tables(inner, 0)}
    sampler = forward_sampler(environment, policy, group_size=4)
    draw = jax.jit(lambda carry: sampler.sample(params, carry, KEYS, ()))
    t, carry, _ = draw(jnp.zeros(12, jnp.int32))
    condition = np.asarray(t.states.condition)
    assert (carry == 1).all()
    np.testing.assert_array_equal(condition[0], condition[-1])
    groups = condition[0].reshape(3, 4)
    np.testing.assert_array_equal(groups, np.repeat(groups[:, :1], 4, axis=1))
    assert len(np.unique(groups)) == 3
    assert len(np.unique(np.asarray(t.actions), axis=1).T) > 3  # and not a trajectory
    objective = log_partition_variance(environment, policy, group_size=4)
    loss, (_, metrics) = jax.jit(lambda: objective.loss(params, carry, KEYS, ()))()
    # The same trajectories by hand.
    ratio = np.asarray((t.log_pf - t.log_pb).sum(axis=0) - t.log_reward)
    assert loss == pytest.approx(ratio.reshape(3, 4).var(axis=1).mean(), rel=1e-4)
    assert metrics["log_z"] == pytest.approx(-ratio.mean(), rel=1e-4)
    # The planted bug: one mean for all conditions.
    assert loss != pytest.approx(ratio.var(), rel=1e-2)

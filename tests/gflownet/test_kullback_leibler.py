"""Both divergences: gradients against sums over all trajectories, and that of TB beside them."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from all_paths import all_trajectories, path_log_probabilities
from small_environments import diamond, random_tables, sets, tabular

from gflownet import score
from gflownet.objectives import (
    forward_kullback_leibler,
    log_partition_variance,
    reverse_kullback_leibler,
    reverse_surrogate,
    trajectory_balance_residual,
)
from gflownet.sampling import given_trajectories

ENVIRONMENTS = {"diamond": diamond, "sets_5_3": sets}


def close(one, other, atol=1e-10):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=atol), one, other)


@pytest.mark.parametrize("name", ENVIRONMENTS)
def test_gradients_by_enumeration(name, x64):
    environment, policy = tabular(ENVIRONMENTS[name]())
    tables, t = random_tables(environment, 0), all_trajectories(environment)

    def log_ratio(tables):
        log_pf, log_pb = path_log_probabilities(environment, tables)
        return log_pf, log_pf - log_pb - t.log_reward

    def scored(tables):
        return score(environment, policy, tables, t, is_on_policy=False)

    @jax.jit
    def everything(tables, baseline):
        log_pf, _ = log_ratio(tables)
        probability = jax.lax.stop_gradient(jnp.exp(log_pf))

        def divergence(tables):
            log_pf, ratio = log_ratio(tables)
            return jnp.sum(jnp.exp(log_pf) * ratio)

        def surrogate(tables):
            scores = scored(tables)
            values = jax.vmap(reverse_surrogate, (1, 1, 0, None))(
                scores.log_pf, scores.log_pb, t.log_reward, baseline
            )
            return jnp.sum(probability * values)

        def balance(tables, weight):
            scores = scored(tables)
            residuals = jax.vmap(trajectory_balance_residual, (None, 1, 1, 0, 1))(
                -baseline, scores.log_pf, scores.log_pb, t.log_reward, t.valid
            )
            return jnp.sum(weight * residuals**2)

        uniform = jnp.full_like(probability, 1 / len(probability))
        return (
            probability.sum(),
            jax.value_and_grad(divergence)(tables),
            jax.value_and_grad(surrogate)(tables),
            jax.grad(balance)(tables, probability),
            jax.grad(balance)(tables, uniform),
        )

    for baseline in (0.0, 1.3):
        total, exact, surrogate, balance, off_policy = everything(tables, jnp.asarray(baseline))
        assert total == pytest.approx(1.0)
        close(surrogate, exact)
        # On policy, trajectory balance has twice the gradient for P_F, whatever log Z is.
        close(balance["forward"], 2.0 * exact[1]["forward"])
        # The planted bugs: trajectories of another behaviour; P_B as if it were the same.
        assert np.abs(off_policy["forward"] - 2.0 * exact[1]["forward"]).max() > 1e-2
        assert np.abs(balance["backward"] - 2.0 * exact[1]["backward"]).max() > 1e-2


def test_reverse_objective(x64):
    """Loss, leave-one-out baseline and gradient of a batch, with every trajectory once."""
    environment, policy = tabular(diamond())
    tables = random_tables(environment, 0)
    t = all_trajectories(environment)
    keys = jax.random.split(jax.random.key(0), len(t.log_reward))
    objective = reverse_kullback_leibler(environment, policy, sampler=given_trajectories())

    def expected(tables):
        log_pf, log_pb = path_log_probabilities(environment, tables)
        ratio = jax.lax.stop_gradient(log_pf - log_pb - t.log_reward)
        others = jnp.array([jnp.delete(ratio, b).mean() for b in range(len(ratio))])
        return jnp.mean((ratio - others) * log_pf - log_pb), ratio.mean()

    @jax.jit
    def both(tables):
        loss = lambda tables: objective.loss({"policy": tables}, (), keys, t)  # noqa: E731
        value, gradient = jax.value_and_grad(loss, has_aux=True)(tables)
        return value, gradient, jax.grad(expected, has_aux=True)(tables)

    (loss, (_, metrics)), gradient, (plain, mean) = both(tables)
    close(gradient, plain)
    assert loss == pytest.approx(float(mean))
    assert metrics["elbo"] == pytest.approx(-float(loss))
    # With the whole batch's mean instead, the gradient is that of the log-partition variance, but
    # for factors and P_B.
    variance = log_partition_variance(environment, policy, sampler=given_trajectories())
    other = jax.grad(lambda tables: variance.loss({"policy": tables}, (), keys, t)[0])(tables)
    size = len(t.log_reward)
    close(gradient["forward"], other["forward"] / 2 * size / (size - 1))


def test_forward_objective_is_maximum_likelihood(x64):
    # Of trajectories drawn by P_B from given ends, -log P_F.
    environment, policy = tabular(diamond())
    tables, every = random_tables(environment, 0), all_trajectories(environment)
    keys = jax.random.split(jax.random.key(0), 4000)
    objective = forward_kullback_leibler(environment, policy)
    # The terminal states 1 and 3, in proportion to their rewards.
    shares = np.exp([0.3, -0.9]) / np.exp([0.3, -0.9]).sum()
    ends = np.where(np.arange(4000) < 4000 * shares[0], 1, 3)

    @jax.jit
    def both(tables):
        loss = lambda tables: objective.loss({"policy": tables}, (), keys, jnp.asarray(ends))  # noqa: E731
        return jax.value_and_grad(loss, has_aux=True)(tables)

    (loss, (carry, metrics)), gradient = both(tables)
    assert carry == ()
    assert "elbo" not in metrics
    log_pf, log_pb = map(np.asarray, path_log_probabilities(environment, tables))
    last = np.asarray(every.terminal)
    law = np.exp(log_pb) * np.where(last == 1, shares[0], shares[1])
    assert law.sum() == pytest.approx(1.0)
    # The mean of -log P_F over the exact law, within 5 standard errors.
    mean = -(law * log_pf).sum()
    error = np.sqrt((law * (log_pf + mean) ** 2).sum() / 4000)
    assert abs(loss - mean) < 5 * error
    bound = (law * (every.log_reward + log_pb - log_pf)).sum()
    assert metrics["eubo"] == pytest.approx(float(bound), abs=0.2)
    log_z = np.logaddexp(0.3, -0.9)
    assert metrics["eubo"] > log_z
    # The planted bug: trajectories of P_F's own.
    assert abs(loss + (np.exp(log_pf) * log_pf).sum()) > 5 * error
    assert not gradient["backward"].any()
    exact = jax.grad(lambda tables: -jnp.sum(law * path_log_probabilities(environment, tables)[0]))(
        tables
    )
    np.testing.assert_allclose(gradient["forward"], exact["forward"], atol=0.05)
    assert np.abs(exact["forward"]).max() > 0.1


def test_the_baseline_is_of_all_devices(x64):
    """Slices of 1 and 2 devices have the same mean gradient; with baselines of their own, not."""
    environment, policy = tabular(diamond())
    tables = random_tables(environment, 3)
    keys = jax.random.split(jax.random.key(0), 8)

    def mean_gradient(num_devices, axis_name):
        objective = reverse_kullback_leibler(environment, policy, axis_name=axis_name)

        def device(keys):
            carry = objective.init(keys[0], {"policy": tables}, keys)
            return jax.grad(lambda params: objective.loss(params, carry, keys, ())[0])(
                {"policy": tables}
            )

        slices = keys.reshape(num_devices, -1)
        gradients = jax.jit(jax.vmap(device, axis_name="devices"))(slices)
        return jax.tree.map(lambda leaf: leaf.mean(axis=0), gradients)

    together = mean_gradient(1, "devices")
    close(mean_gradient(2, "devices"), together)
    own = mean_gradient(2, None)
    assert (
        max(jax.tree.leaves(jax.tree.map(lambda a, b: jnp.abs(a - b).max(), own, together))) > 0.01
    )

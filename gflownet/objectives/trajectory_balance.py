"""Trajectory balance (TB).

    δ(τ) = log Z + Σ_t log P_F(s_{t+1} | s_t) - log R(x) - Σ_t log P_B(s_t | s_{t+1}),  loss = δ²

At δ = 0 on all trajectories, P_F draws x with probability R(x) / Z. The gradient flows to log Z,
P_F and P_B; trajectories, rewards and the exploring policy that drew them get none.

Malkin et al., "Trajectory balance: improved credit assignment in GFlowNets", NeurIPS 2022.
"""

from __future__ import annotations

from collections.abc import Callable

import chex
import jax
import jax.numpy as jnp

from ebjax.types import Objective, Params
from gflownet.rollout import forward_rollout, score
from gflownet.types import Environment, Policy

__all__ = ["trajectory_balance", "trajectory_balance_residual"]


def trajectory_balance_residual(
    log_z: jax.Array,
    log_pf: jax.Array,
    log_pb: jax.Array,
    log_reward: jax.Array,
    valid: jax.Array,
) -> jax.Array:
    """δ of one trajectory.

    Args:
      log_z: [] learned log Z.
      log_pf: [T].
      log_pb: [T].
      log_reward: [] log R of the terminal state.
      valid: [T] bool; steps that are not valid count nothing.

    Returns:
      [] the residual.

    >>> import jax.numpy as jnp
    >>> valid = jnp.array([True, False])
    >>> float(trajectory_balance_residual(
    ...     jnp.array(1.0), jnp.array([-2.0, 9.0]), jnp.array([-0.5, 9.0]), jnp.array(0.0), valid))
    -0.5
    """
    chex.assert_rank([log_z, log_reward], 0)
    chex.assert_equal_shape([log_pf, log_pb, valid])
    return log_z + jnp.sum(jnp.where(valid, log_pf - log_pb, 0.0)) - log_reward


def trajectory_balance(
    environment: Environment,
    policy: Policy,
    *,
    epsilon: Callable[[jax.Array], jax.Array] | float = 0.0,
    reward_params: Params = (),
    chunk_size: int = 64,
) -> Objective:
    """Builds the objective: each update draws one new trajectory an example slot.

    Args:
      environment: the graph and its reward.
      policy: P_F and P_B.
      epsilon: share of uniform exploration, a number or a schedule of the update count.
      reward_params: the reward's parameters.
      chunk_size: states evaluated at a time in the gradient pass.

    Returns:
      An ``Objective`` whose parameters are ``{"policy": ..., "log_z": []}``, whose batch is not
      used, and whose carry counts the updates of each slot (the schedule's argument). Metrics:
      ``log_z``, ``log_reward``, ``trajectory_length``, ``epsilon``, and ``elbo``, the mean of
      log R + log P_B - log P_F, a lower bound of log Z when nothing is explored.
    """

    def init(key, params, batch):
        del key, params
        return jnp.zeros(len(jax.tree.leaves(batch)[0]), jnp.int32)

    def loss(params, carry, keys, batch):
        del batch
        # A schedule may end a rounding error below 0.
        share = jnp.maximum(epsilon(carry[0]) if callable(epsilon) else epsilon, 0.0)
        trajectories = forward_rollout(
            keys,
            environment,
            policy,
            params["policy"],
            epsilon=share,
            reward_params=reward_params,
        )
        scores = score(
            environment,
            policy,
            params["policy"],
            trajectories,
            is_on_policy=True,
            chunk_size=chunk_size,
        )
        residual = jax.vmap(trajectory_balance_residual, (None, 1, 1, 0, 1))(
            params["log_z"],
            scores.log_pf,
            scores.log_pb,
            trajectories.log_reward,
            trajectories.valid,
        )
        metrics = {
            "log_z": params["log_z"],
            "elbo": params["log_z"] - residual.mean(),
            "log_reward": trajectories.log_reward.mean(),
            "trajectory_length": trajectories.length.mean(dtype=jnp.float32),
            "epsilon": share,
        }
        return jnp.mean(jnp.square(residual)), (carry + 1, metrics)

    return Objective(init=init, loss=loss)

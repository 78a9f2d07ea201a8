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
from gflownet.objectives.flow_objective import LogZ, constant_log_z, flow_objective
from gflownet.objectives.residual_losses import ResidualLoss, squared
from gflownet.sampling import TrajectorySampler, forward_sampler
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
    sampler: TrajectorySampler | None = None,
    log_z: LogZ = constant_log_z,
    residual_loss: ResidualLoss = squared,
    chunk_size: int = 64,
) -> Objective:
    """Builds the objective: each update draws one new trajectory an example slot.

    Args:
      environment: the graph and its reward.
      policy: P_F and P_B.
      epsilon: share of uniform exploration, a number or a schedule of the update count.
      reward_params: the reward's parameters.
      sampler: where trajectories come from instead; it then stands for the two options above.
      log_z: ``(params["log_z"], source state) -> []``; by default the parameter is log Z. A flow
        that is conditional on its source learns a function of it.
      residual_loss: loss of δ.
      chunk_size: states evaluated at a time in the gradient pass.

    Returns:
      An ``Objective`` whose parameters are ``{"policy": ..., "log_z": ...}``. With the default
      sampler the batch is not used, and the carry counts the updates of each slot (the schedule's
      argument). Metrics: ``log_z``, ``log_reward``, ``trajectory_length``, ``epsilon``, and
      ``elbo``, the mean of log R + log P_B - log P_F, a lower bound of log Z when nothing is
      explored.
    """

    def losses(batch):
        t, scores = batch.trajectories, batch.scores
        source = jax.tree.map(lambda leaf: leaf[0], t.states)
        learned = jax.vmap(log_z, (None, 0), axis_size=t.valid.shape[1])(
            batch.params["log_z"], source
        )
        residual = jax.vmap(trajectory_balance_residual, (0, 1, 1, 0, 1))(
            learned, scores.log_pf, scores.log_pb, t.log_reward, t.valid
        )
        return residual_loss(residual), {"log_z": learned.mean()}

    sampler = sampler or forward_sampler(
        environment, policy, epsilon=epsilon, reward_params=reward_params
    )
    return flow_objective(environment, policy, losses, sampler, chunk_size=chunk_size)

"""Path consistency learning (PCL) with the corrected reward, on windows of d steps.

    δ_i = V(s_i) + Σ_{t=i}^{j-1} [log P_F(t) - r(t)] - V(s_j),    j = min(i + d, end)

the soft-consistency of maximum-entropy reinforcement learning. With r = log P_B on every edge and
V(x) = log R(x) it is the subtrajectory balance of the window: d = 1 is detailed balance, and d = T
compares every state with the end. Without log P_B in the reward the policy would draw x in
proportion to R(x) times the number of paths that lead to it.

Nachum et al., "Bridging the gap between value and policy based reinforcement learning", NeurIPS
2017; Deleu et al., "Discrete probabilistic inference as control in multi-path environments", UAI
2024.
"""

from __future__ import annotations

from collections.abc import Callable

import chex
import jax
import jax.numpy as jnp

from ebjax.types import Objective, Params
from gflownet.objectives.detailed_balance import FlowFn
from gflownet.objectives.flow_objective import flow_objective, over_transitions, state_flows
from gflownet.objectives.residual_losses import ResidualLoss, squared
from gflownet.sampling import TrajectorySampler, forward_sampler
from gflownet.types import Environment, Policy

__all__ = ["path_consistency", "path_consistency_residuals"]


def path_consistency_residuals(
    value: jax.Array, log_policy: jax.Array, reward: jax.Array, valid: jax.Array, depth: int
) -> jax.Array:
    """δ of the windows of one trajectory, one for each state that is left.

    Args:
      value: [T + 1], log R at the end.
      log_policy: [T] log-probabilities of the actions.
      reward: [T] of the steps; log P_B for a flow.
      valid: [T] bool.
      depth: d, at least 1; windows are shorter at the end.

    Returns:
      [T] residuals, 0 where not valid.

    >>> value, valid = jnp.array([2.0, 1.0, -1.0]), jnp.array([True, True])
    >>> path_consistency_residuals(value, jnp.zeros(2), jnp.zeros(2), valid, 2).tolist()
    [3.0, 2.0]
    """
    chex.assert_rank(value, 1)
    chex.assert_equal_shape([value[1:], log_policy, reward, valid])
    steps = jnp.where(valid, log_policy - reward, 0.0)
    height = value - jnp.concatenate([jnp.zeros_like(steps[:1]), jnp.cumsum(steps)])
    start = jnp.arange(valid.shape[0])
    return jnp.where(valid, height[:-1] - height[jnp.minimum(start + depth, valid.sum())], 0.0)


def path_consistency(
    environment: Environment,
    policy: Policy,
    *,
    depth: int,
    epsilon: Callable[[jax.Array], jax.Array] | float = 0.0,
    reward_params: Params = (),
    sampler: TrajectorySampler | None = None,
    flow_fn: FlowFn = state_flows,
    residual_loss: ResidualLoss = squared,
    axis_name: str | None = None,
    chunk_size: int = 64,
) -> Objective:
    """Builds the objective.

    Args:
      environment: the graph and its reward.
      policy: P_F, P_B and log F (the value).
      depth: d, steps of a window, at least 1.
      epsilon: share of uniform exploration, a number or a schedule of the update count.
      reward_params: the reward's parameters.
      sampler: where trajectories come from instead; it then stands for the two options above.
      flow_fn: as in ``detailed_balance``.
      residual_loss: loss of δ.
      axis_name: the mapped axis over which devices share the batch.
      chunk_size: states evaluated at a time in the gradient pass.

    Returns:
      An ``Objective`` whose parameters are ``{"policy": ...}``; the loss is the mean over windows.
      Metrics: ``log_z`` (value of the source) and those of ``flow_objective``.

    Raises:
      ValueError: if ``depth`` is below 1.
    """
    if depth < 1:
        raise ValueError(f"depth is {depth}; a window has at least 1 step.")

    def losses(batch):
        t, scores = batch.trajectories, batch.scores
        value = flow_fn(t, scores.log_flow)
        residuals = jax.vmap(path_consistency_residuals, (1, 1, 1, 1, None), out_axes=1)(
            value, scores.log_pf, scores.log_pb, t.valid, depth
        )
        means = over_transitions(residual_loss(residuals), t.valid, axis_name)
        return means, {"log_z": value[0].mean()}

    sampler = sampler or forward_sampler(
        environment, policy, epsilon=epsilon, reward_params=reward_params
    )
    return flow_objective(
        environment, policy, losses, sampler, with_flow=True, chunk_size=chunk_size
    )

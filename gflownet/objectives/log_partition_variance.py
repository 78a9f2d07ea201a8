"""Log-partition variance (VarGrad): trajectory balance without a learned log Z.

    r(τ) = Σ_t [log P_F - log P_B] - log R(x),    loss = mean of (r - r̄)²

with r̄ the mean over the trajectories of a group, so that -r̄ is the group's estimate of log Z. The
gradient is the same whether or not it flows through r̄, for the deviations from a mean sum to 0; it
does not here, so that r̄ may be a mean over devices. In a conditional flow log Z depends on the
condition: then a group is several trajectories of one condition.

Richter et al., "VarGrad: a low-variance gradient estimator for variational inference", NeurIPS
2020; Zhang et al., "Robust scheduling with GFlowNets", ICLR 2023.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from ebjax.types import Objective, Params
from gflownet.objectives.flow_objective import flow_objective
from gflownet.objectives.residual_losses import ResidualLoss, squared
from gflownet.objectives.trajectory_balance import trajectory_balance_residual
from gflownet.sampling import TrajectorySampler, forward_sampler
from gflownet.types import Environment, Policy

__all__ = ["log_partition_variance", "log_partition_variance_residuals"]


def log_partition_variance_residuals(
    log_ratio: jax.Array,
    *,
    group_size: int | None = None,
    is_detached: bool = True,
    axis_name: str | None = None,
) -> jax.Array:
    """Deviations of r from the mean of its group.

    Args:
      log_ratio: [B] r of each trajectory.
      group_size: consecutive trajectories of a group, the whole batch by default.
      is_detached: whether no gradient flows through the mean.
      axis_name: the mapped axis over which devices share the batch; only the mean of the whole
        batch is taken over it, and then it must be detached.

    Returns:
      [B] residuals.

    >>> log_partition_variance_residuals(jnp.array([1.0, 3.0, 5.0, 5.0]), group_size=2).tolist()
    [-1.0, 1.0, 0.0, 0.0]
    """
    groups = log_ratio.reshape(-1, group_size or log_ratio.shape[0])
    mean = groups.mean(axis=1, keepdims=True)
    if is_detached:
        mean = jax.lax.stop_gradient(mean)
    if axis_name is not None and group_size is None:
        mean = jax.lax.pmean(mean, axis_name)
    return (groups - mean).reshape(-1)


def log_partition_variance(
    environment: Environment,
    policy: Policy,
    *,
    group_size: int | None = None,
    epsilon: Callable[[jax.Array], jax.Array] | float = 0.0,
    reward_params: Params = (),
    sampler: TrajectorySampler | None = None,
    residual_loss: ResidualLoss = squared,
    axis_name: str | None = None,
    chunk_size: int = 64,
) -> Objective:
    """Builds the objective.

    Args:
      environment: the graph and its reward.
      policy: P_F and P_B.
      group_size: consecutive trajectories that share a source and so a log Z, at least 2; by
        default there is one source, and all trajectories are one group.
      epsilon: share of uniform exploration, a number or a schedule of the update count.
      reward_params: the reward's parameters.
      sampler: where trajectories come from instead; it then stands for the two options above and
        has to give groups.
      residual_loss: loss of the deviation. With another one than the square the mean of the group
        is no longer the best log Z, and the minimum is the same.
      axis_name: the mapped axis over which devices share the batch, so that one group is the batch
        of all of them. Groups of ``group_size`` lie within a device.
      chunk_size: states evaluated at a time in the gradient pass.

    Returns:
      An ``Objective`` whose parameters are ``{"policy": ...}``. Metrics: ``log_z``, the mean of
      -r, and those of ``flow_objective``.

    Raises:
      ValueError: for groups of one; and, when the batch is known, if it is no multiple of groups.
    """
    if group_size is not None and group_size < 2:
        raise ValueError(f"group_size is {group_size}; a variance takes at least 2 trajectories.")

    def losses(batch):
        t, scores = batch.trajectories, batch.scores
        zeros = jnp.zeros_like(t.log_reward)
        log_ratio = jax.vmap(trajectory_balance_residual, (0, 1, 1, 0, 1))(
            zeros, scores.log_pf, scores.log_pb, t.log_reward, t.valid
        )
        if len(log_ratio) == 1 and axis_name is None:
            raise ValueError("The batch is 1 trajectory; a variance takes at least 2.")
        residuals = log_partition_variance_residuals(
            log_ratio, group_size=group_size, axis_name=axis_name
        )
        return residual_loss(residuals), {"log_z": -log_ratio.mean()}

    sampler = sampler or forward_sampler(
        environment,
        policy,
        epsilon=epsilon,
        reward_params=reward_params,
        group_size=group_size or 1,
    )
    return flow_objective(environment, policy, losses, sampler, chunk_size=chunk_size)

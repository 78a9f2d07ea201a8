"""Detailed balance (DB).

    δ(s, s') = log F(s) + log P_F(s' | s) - log F(s') - log P_B(s | s'),  F(x) = R(x) at the end

and the loss is the mean of δ² over all transitions of the batch. At δ = 0 on all of them, F is the
flow through states, F(s0) = Z, and P_F draws x with probability R(x) / Z.

Bengio et al., "GFlowNet foundations", JMLR 24 (2023).
"""

from __future__ import annotations

from collections.abc import Callable

import chex
import jax
import jax.numpy as jnp

from ebjax.types import Objective, Params
from gflownet.objectives.flow_objective import flow_objective, over_transitions, state_flows
from gflownet.objectives.residual_losses import ResidualLoss, squared
from gflownet.sampling import TrajectorySampler, forward_sampler
from gflownet.types import Environment, Policy, Trajectories

__all__ = ["FlowFn", "detailed_balance", "detailed_balance_residuals"]

FlowFn = Callable[[Trajectories, jax.Array], jax.Array]


def detailed_balance_residuals(
    log_flow: jax.Array, log_pf: jax.Array, log_pb: jax.Array, valid: jax.Array
) -> jax.Array:
    """δ of all transitions of one trajectory.

    Args:
      log_flow: [T + 1], log R at the end (see ``terminal_flow``).
      log_pf: [T].
      log_pb: [T].
      valid: [T] bool.

    Returns:
      [T] residuals, 0 where not valid.

    >>> valid = jnp.array([True, True, False])
    >>> log_flow, log_pf = jnp.array([1.0, 0.5, 2.0, 7.0]), jnp.array([-1.0, -2.0, 7.0])
    >>> detailed_balance_residuals(log_flow, log_pf, jnp.array([-0.5, 0.0, 7.0]), valid).tolist()
    [0.0, -3.5, 0.0]
    """
    chex.assert_rank(log_flow, 1)
    chex.assert_equal_shape([log_flow[1:], log_pf, log_pb, valid])
    return jnp.where(valid, log_flow[:-1] + log_pf - log_flow[1:] - log_pb, 0.0)


def detailed_balance(
    environment: Environment,
    policy: Policy,
    *,
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
      policy: P_F, P_B and log F.
      epsilon: share of uniform exploration, a number or a schedule of the update count.
      reward_params: the reward's parameters.
      sampler: where trajectories come from instead; it then stands for the two options above.
      flow_fn: ``(trajectories, what the policy says [T + 1, B]) -> log F [T + 1, B]``; by default
        the policy's own, with log R at the ends. See ``forward_looking``.
      residual_loss: loss of δ.
      axis_name: the mapped axis over which devices share the batch, so that the mean is over the
        transitions of all of them.
      chunk_size: states evaluated at a time in the gradient pass.

    Returns:
      An ``Objective`` whose parameters are ``{"policy": ...}``. Metrics: ``log_z`` (log F of the
      source) and those of ``flow_objective``.
    """

    def losses(batch):
        t, scores = batch.trajectories, batch.scores
        log_flow = flow_fn(t, scores.log_flow)
        residuals = jax.vmap(detailed_balance_residuals, 1, out_axes=1)(
            log_flow, scores.log_pf, scores.log_pb, t.valid
        )
        means = over_transitions(residual_loss(residuals), t.valid, axis_name)
        return means, {"log_z": log_flow[0].mean()}

    sampler = sampler or forward_sampler(
        environment, policy, epsilon=epsilon, reward_params=reward_params
    )
    return flow_objective(
        environment, policy, losses, sampler, with_flow=True, chunk_size=chunk_size
    )

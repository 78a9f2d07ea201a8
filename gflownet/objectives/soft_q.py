"""Soft Q-learning (soft DQN), plain and Munchausen, as a GFlowNet objective.

In the Markov decision process with reward log P_B(s | s') on each edge and log R(x) besides on the
last, temperature 1 and no discount, the soft-optimal values are those of the flow: Q(s, a) = log
F(s -> s'), V(s) = log F(s), and the soft-optimal policy is P_F. With Q = log F + τ log P_F, the
policy being softmax(Q / τ),

    δ = log F(s) + τ log P_F(s' | s) - y
    y = log P_B(s | s') + log F⁻(s') + (τ - 1) max(log P_F⁻(s' | s), l),     log F⁻(x) = log R(x)

where ⁻ marks a target network (or the policy itself), and no gradient flows through y. τ = 1 is
soft DQN, whose δ is that of detailed balance. Munchausen's share α of the policy's own
log-probability has τ = 1 / (1 - α), since α τ = τ - 1: only so is the fixed point the flow. (The
floor l is that of τ log P_F⁻ divided by τ.)

Tiapkin, Morozov, Naumov and Vetrov, "Generative flow networks as entropy-regularized RL", AISTATS
2024; Vieillard, Pietquin and Geist, "Munchausen reinforcement learning", NeurIPS 2020.
"""

from __future__ import annotations

from collections.abc import Callable

import chex
import jax
import jax.numpy as jnp

from ebjax.types import Objective, Params
from gflownet.objectives.flow_objective import (
    flow_objective,
    over_transitions,
    state_flows,
    target_scores,
)
from gflownet.objectives.residual_losses import ResidualLoss, huber
from gflownet.sampling import TrajectorySampler, forward_sampler
from gflownet.types import Environment, Policy

__all__ = ["soft_q_learning", "soft_q_residuals"]


def soft_q_residuals(
    log_flow: jax.Array,
    log_pf: jax.Array,
    log_pb: jax.Array,
    target_log_flow: jax.Array,
    target_log_pf: jax.Array,
    valid: jax.Array,
    *,
    munchausen: float = 0.0,
    floor: float = -100.0,
) -> jax.Array:
    """δ of all transitions of one trajectory.

    Args:
      log_flow: [T + 1] V of the states.
      log_pf: [T].
      log_pb: [T].
      target_log_flow: [T + 1] V of the target network, log R at the end.
      target_log_pf: [T] of the target network.
      valid: [T] bool.
      munchausen: α in [0, 1).
      floor: l of τ log P_F⁻, at most 0.

    Returns:
      [T] residuals, 0 where not valid; gradient to ``log_flow`` and ``log_pf`` only.

    >>> ones, valid = jnp.ones(2), jnp.array([True])
    >>> soft_q_residuals(2 * ones, -ones[:1], ones[:1], ones, ones[:1], valid).tolist()
    [-1.0]
    """
    chex.assert_equal_shape([log_flow, target_log_flow])
    chex.assert_equal_shape([log_flow[1:], log_pf, log_pb, target_log_pf, valid])
    temperature = 1.0 / (1.0 - munchausen)
    target = log_pb + target_log_flow[1:]
    if munchausen:
        target += munchausen * jnp.maximum(temperature * target_log_pf, floor)
    value = log_flow[:-1] + temperature * log_pf
    return jnp.where(valid, value - jax.lax.stop_gradient(target), 0.0)


def soft_q_learning(
    environment: Environment,
    policy: Policy,
    *,
    munchausen: float = 0.0,
    floor: float = -100.0,
    terminal_weight: float = 1.0,
    has_target: bool = True,
    epsilon: Callable[[jax.Array], jax.Array] | float = 0.0,
    reward_params: Params = (),
    sampler: TrajectorySampler | None = None,
    residual_loss: ResidualLoss | None = None,
    axis_name: str | None = None,
    chunk_size: int = 64,
) -> Objective:
    """Builds the objective.

    Args:
      environment: the graph and its reward.
      policy: P_F, log F (the value V) and P_B, which gets no gradient: uniform, or learned beside
        (``trajectory_likelihood``).
      munchausen: α in [0, 1); 0 is soft DQN.
      floor: least τ log P_F⁻ that counts.
      terminal_weight: factor of the loss of last transitions, where the reward comes in.
      has_target: whether y is computed with ``params["target"]`` (see ``with_target``).
      epsilon: share of uniform exploration, a number or a schedule of the update count.
      reward_params: the reward's parameters.
      sampler: where trajectories come from instead; it then stands for the two options above.
      residual_loss: loss of δ, by default Huber's with threshold 1.
      axis_name: the mapped axis over which devices share the batch.
      chunk_size: states evaluated at a time in the gradient pass.

    Returns:
      An ``Objective`` whose parameters are ``{"policy": ...}`` and perhaps ``"target"``. Metrics:
      ``log_z`` (V of the source) and those of ``flow_objective``.

    Raises:
      ValueError: for an option out of range.
    """
    if not 0 <= munchausen < 1:
        raise ValueError(f"munchausen is {munchausen}; it must lie in [0, 1).")
    if floor > 0:
        raise ValueError(f"floor is {floor}; it must be at most 0.")
    if not terminal_weight > 0:
        raise ValueError(f"terminal_weight is {terminal_weight}; it must be positive.")
    measure = residual_loss or huber(1.0)

    def losses(batch):
        t, scores = batch.trajectories, batch.scores
        target = target_scores(
            environment,
            policy,
            batch,
            has_target=has_target,
            with_flow=True,
            chunk_size=chunk_size,
        )

        def residuals(log_flow, log_pf, log_pb, target_flow, target_pf, valid):
            return soft_q_residuals(
                log_flow,
                log_pf,
                log_pb,
                target_flow,
                target_pf,
                valid,
                munchausen=munchausen,
                floor=floor,
            )

        log_flow = state_flows(t, scores.log_flow)
        delta = jax.vmap(residuals, 1, out_axes=1)(
            log_flow,
            scores.log_pf,
            scores.log_pb,
            state_flows(t, target.log_flow),
            target.log_pf,
            t.valid,
        )
        is_last = jnp.arange(t.valid.shape[0])[:, None] == t.length - 1
        weighted = jnp.where(is_last, terminal_weight, 1.0) * measure(delta)
        means = over_transitions(weighted, t.valid, axis_name)
        return means, {"log_z": log_flow[0].mean()}

    sampler = sampler or forward_sampler(
        environment, policy, epsilon=epsilon, reward_params=reward_params
    )
    return flow_objective(
        environment, policy, losses, sampler, with_flow=True, chunk_size=chunk_size
    )

"""Subtrajectory balance, SubTB(λ).

    δ_ij = log F(s_i) + Σ_{t=i}^{j-1} [log P_F(t) - log P_B(t)] - log F(s_j),    i < j

With c_t the sum of log P_F - log P_B up to t this is one matrix, (log F_i - c_i) - (log F_j - c_j).
The loss is a weighted mean of δ_ij² with weights λ^{j-i}; λ = 0 is detailed balance, λ = ∞ is
trajectory balance with log F(s0) for log Z, λ = 1 weighs all subtrajectories alike. What the
weights are divided by:

    "trajectory"   their sum over the subtrajectories of the same trajectory, then the mean over
                   trajectories; long and short ones count alike
    "batch"        their sum over the whole batch; long trajectories count more
    "length"       subtrajectories of one length are averaged over the batch, the means of the
                   lengths that occur are weighted by λ^{length}
    "none"         nothing: the plain sum over a trajectory, for graphs of one length

Madan et al., "Learning GFlowNets from partial episodes for improved convergence and stability",
ICML 2023.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import chex
import jax
import jax.numpy as jnp

from ebjax.types import Objective, Params
from gflownet.objectives.detailed_balance import FlowFn
from gflownet.objectives.flow_objective import flow_objective, state_flows
from gflownet.objectives.residual_losses import ResidualLoss, squared
from gflownet.sampling import TrajectorySampler, forward_sampler
from gflownet.types import Environment, Policy

__all__ = [
    "NORMALIZATIONS",
    "subtrajectory_balance",
    "subtrajectory_losses",
    "subtrajectory_residuals",
    "subtrajectory_weights",
]

NORMALIZATIONS = ("trajectory", "batch", "length", "none")


def subtrajectory_residuals(
    log_flow: jax.Array, log_pf: jax.Array, log_pb: jax.Array, valid: jax.Array
) -> jax.Array:
    """δ_ij of all subtrajectories of one trajectory.

    Args:
      log_flow: [T + 1], log R at the end (see ``terminal_flow``).
      log_pf: [T].
      log_pb: [T].
      valid: [T] bool.

    Returns:
      [T + 1, T + 1] residuals, 0 where i >= j or j is after the end.

    >>> valid, zeros = jnp.array([True, False]), jnp.zeros(2)
    >>> subtrajectory_residuals(jnp.array([1.0, -1.0, 5.0]), zeros, zeros, valid).tolist()
    [[0.0, 2.0, 0.0], [0.0, 0.0, 0.0], [0.0, 0.0, 0.0]]
    """
    chex.assert_rank(log_flow, 1)
    chex.assert_equal_shape([log_flow[1:], log_pf, log_pb, valid])
    steps = jnp.where(valid, log_pf - log_pb, 0.0)
    height = log_flow - jnp.concatenate([jnp.zeros_like(steps[:1]), jnp.cumsum(steps)])
    return jnp.where(_is_subtrajectory(valid), height[:, None] - height[None, :], 0.0)


def _is_subtrajectory(valid: jax.Array) -> jax.Array:
    """[T + 1, T + 1] bool: i < j <= length."""
    place = jnp.arange(valid.shape[0] + 1)
    return (place[:, None] < place[None, :]) & (place[None, :] <= valid.sum())


def subtrajectory_weights(valid: jax.Array, decay: float) -> jax.Array:
    """λ^{j-i} of the subtrajectories of one trajectory, divided by the largest of them.

    Args:
      valid: [T] bool.
      decay: λ in [0, ∞]; only the shortest count at 0, and only the whole trajectory at ∞.

    Returns:
      [T + 1, T + 1] weights with largest 1, so that no power overflows; 0 where there is none.

    >>> subtrajectory_weights(jnp.array([True, True]), 2.0).tolist()
    [[0.0, 0.5, 1.0], [0.0, 0.0, 0.5], [0.0, 0.0, 0.0]]
    """
    place = jnp.arange(valid.shape[0] + 1)
    span = place[None, :] - place[:, None]
    strongest = valid.sum() if decay > 1 else 1
    return jnp.where(_is_subtrajectory(valid), _power(decay, span - strongest), 0.0)


def _power(decay: float, exponent: jax.Array) -> jax.Array:
    """λ^e for exponents on the side where it is at most 1."""
    if decay in (0.0, math.inf):
        return jnp.where(exponent == 0, 1.0, 0.0)
    return jnp.exp(math.log(decay) * exponent.astype(jnp.result_type(float)))


def subtrajectory_losses(
    values: jax.Array,
    valid: jax.Array,
    *,
    decay: float,
    normalize: str,
    axis_name: str | None = None,
) -> jax.Array:
    """Losses of trajectories from those of their subtrajectories.

    Args:
      values: [B, T + 1, T + 1] losses of δ_ij.
      valid: [T, B] bool.
      decay: λ.
      normalize: one of ``NORMALIZATIONS``.
      axis_name: the mapped axis over which devices share the batch.

    Returns:
      [B], whose mean is the loss.
    """

    def over_devices(mean):
        return mean if axis_name is None else jax.lax.pmean(mean, axis_name)

    weights = jax.vmap(subtrajectory_weights, (1, None))(valid, decay)
    if normalize == "trajectory":
        total = jnp.sum(weights * values, axis=(1, 2))
        return total / jnp.maximum(weights.sum(axis=(1, 2)), 1e-30)
    length = valid.sum(axis=0)
    if normalize == "none":
        total = jnp.sum(weights * values, axis=(1, 2))
        if decay in (0.0, math.inf):
            return total
        # The weights themselves, and not in units of the largest.
        return jnp.power(decay, jnp.where(decay > 1, length, 1).astype(values.dtype)) * total
    longest = length.max()
    if axis_name is not None:
        longest = jax.lax.pmax(longest, axis_name)
    # In units of the largest weight of the batch.
    scale = _power(decay, length - longest) if decay > 1 else jnp.ones_like(values[:, 0, 0])
    if normalize == "batch":
        mean = over_devices(jnp.mean(scale * weights.sum(axis=(1, 2))))
        return scale * jnp.sum(weights * values, axis=(1, 2)) / jnp.maximum(mean, 1e-30)
    is_any = jax.vmap(_is_subtrajectory, 1)(valid)
    place = jnp.arange(valid.shape[0] + 1)
    span = jnp.clip(place[None, :] - place[:, None], 0)
    count = jnp.zeros(len(place)).at[span].add(is_any.sum(axis=0))
    count = over_devices(count) / values.shape[0]  # of each length, in a mean trajectory
    strongest = longest if decay > 1 else 1
    occurs = (count > 0) & (place > 0)
    by_length = jnp.where(occurs, _power(decay, place - strongest), 0.0)
    by_length = by_length / jnp.maximum(by_length.sum() * jnp.where(occurs, count, 1.0), 1e-30)
    return jnp.sum(jnp.where(is_any, by_length[span] * values, 0.0), axis=(1, 2))


def subtrajectory_balance(
    environment: Environment,
    policy: Policy,
    *,
    decay: float = 0.9,
    normalize: str = "trajectory",
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
      decay: λ in [0, ∞].
      normalize: what weights are divided by, one of ``NORMALIZATIONS``.
      epsilon: share of uniform exploration, a number or a schedule of the update count.
      reward_params: the reward's parameters.
      sampler: where trajectories come from instead; it then stands for the two options above.
      flow_fn: as in ``detailed_balance``.
      residual_loss: loss of δ_ij.
      axis_name: the mapped axis over which devices share the batch, for the weights that are
        divided by a sum over it.
      chunk_size: states evaluated at a time in the gradient pass.

    Returns:
      An ``Objective`` whose parameters are ``{"policy": ...}``. Metrics: ``log_z`` (log F of the
      source) and those of ``flow_objective``.

    Raises:
      ValueError: for a negative ``decay`` or an unknown ``normalize``.
    """
    if not decay >= 0:
        raise ValueError(f"decay is {decay}; it must be at least 0.")
    if normalize not in NORMALIZATIONS:
        raise ValueError(
            f"normalize is {normalize!r}; it must be one of {', '.join(NORMALIZATIONS)}."
        )

    def losses(batch):
        t, scores = batch.trajectories, batch.scores
        log_flow = flow_fn(t, scores.log_flow)
        residuals = jax.vmap(subtrajectory_residuals, 1)(
            log_flow, scores.log_pf, scores.log_pb, t.valid
        )
        weighted = subtrajectory_losses(
            residual_loss(residuals),
            t.valid,
            decay=decay,
            normalize=normalize,
            axis_name=axis_name,
        )
        return weighted, {"log_z": log_flow[0].mean()}

    sampler = sampler or forward_sampler(
        environment, policy, epsilon=epsilon, reward_params=reward_params
    )
    return flow_objective(
        environment, policy, losses, sampler, with_flow=True, chunk_size=chunk_size
    )

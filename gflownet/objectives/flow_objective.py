"""What all flow objectives share: draw trajectories, score them, measure them.

    trajectories = sampler(params, ...)                no gradient
    scores = log P_F, log P_B, log F of their states   one pass of the policy, gradient to params
    loss = mean of losses(params, trajectories, scores)

An objective is the function in the last line, which applies the residual of one trajectory to a
batch of them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from ebjax.types import Objective, Params
from gflownet.sampling import TrajectorySampler
from gflownet.scoring import Scores, score
from gflownet.types import Environment, Policy, State, Trajectories

__all__ = [
    "FlowBatch",
    "LogZ",
    "constant_log_z",
    "flow_objective",
    "over_transitions",
    "state_flows",
    "target_scores",
    "terminal_flow",
]

LogZ = Callable[[Params, State], jax.Array]


class FlowBatch(NamedTuple):
    """What an objective computes its losses from.

    Attributes:
      params: the parameters of the objective, a dict.
      trajectories: B of them.
      scores: what the policy says of them.
      keys: [B] for noise of the objective's own.
    """

    params: Params
    trajectories: Trajectories
    scores: Scores
    keys: jax.Array


def flow_objective(
    environment: Environment,
    policy: Policy,
    losses_fn: Callable[[FlowBatch], tuple[jax.Array, dict[str, jax.Array]]],
    sampler: TrajectorySampler,
    *,
    with_flow: bool = False,
    with_stop: bool = False,
    chunk_size: int = 64,
) -> Objective:
    """Builds an objective from the losses of a batch of scored trajectories.

    Args:
      environment: the graph.
      policy: P_F, P_B and perhaps log F, with parameters ``params["policy"]``.
      losses_fn: ``FlowBatch -> (losses [B], metrics)``.
      sampler: where the trajectories come from.
      with_flow: whether scores hold log F.
      with_stop: whether scores hold log P_F(stop | s).
      chunk_size: states evaluated at a time in the gradient pass.

    Returns:
      An ``Objective`` whose carry is the sampler's. Metrics: those of the sampler and of
      ``losses_fn``, ``log_reward``, ``trajectory_length``, and ``elbo``, the mean of log R + log
      P_B - log P_F, a lower bound of log Z when nothing is explored.
    """

    def loss(params, carry, keys, batch):
        trajectories, carry, metrics = sampler.sample(params, carry, keys, batch)
        scores = score(
            environment,
            policy,
            params["policy"],
            trajectories,
            is_on_policy=sampler.is_on_policy,
            with_flow=with_flow,
            with_stop=with_stop,
            chunk_size=chunk_size,
        )
        losses, own_metrics = losses_fn(FlowBatch(params, trajectories, scores, keys))
        if sampler.feedback is not None:
            carry = sampler.feedback(carry, trajectories, jax.lax.stop_gradient(losses))
        log_ratio = jnp.sum(scores.log_pf - scores.log_pb, axis=0)
        metrics = {
            "elbo": jnp.mean(trajectories.log_reward - log_ratio),
            "log_reward": trajectories.log_reward.mean(),
            "trajectory_length": trajectories.length.mean(dtype=jnp.float32),
            **metrics,
            **own_metrics,
        }
        return losses.mean(), (carry, metrics)

    return Objective(init=sampler.init, loss=loss)


def constant_log_z(params: Params, source: State) -> jax.Array:
    """log Z as a scalar parameter; a conditional flow gives a function of its source instead."""
    del source
    return params


def terminal_flow(log_flow: jax.Array, log_reward: jax.Array, valid: jax.Array) -> jax.Array:
    """log F along one trajectory, with F(x) = R(x) at its end.

    Args:
      log_flow: [T + 1] of the states that are left.
      log_reward: [] log R of the terminal state.
      valid: [T] bool.

    Returns:
      [T + 1]; 0 after the end.

    >>> terminal_flow(
    ...     jnp.array([3.0, 2.0, 9.0, 9.0]), jnp.array(-1.0), jnp.array([True, True, False])
    ... ).tolist()
    [3.0, 2.0, -1.0, 0.0]
    """
    none = jnp.zeros_like(valid[:1])
    is_left, is_entered = jnp.concatenate([valid, none]), jnp.concatenate([none, valid])
    return jnp.where(is_left, log_flow, jnp.where(is_entered, log_reward, 0.0))


def state_flows(trajectories: Trajectories, log_flow: jax.Array) -> jax.Array:
    """``terminal_flow`` of a batch: [T + 1, B]."""
    return jax.vmap(terminal_flow, (1, 0, 1), out_axes=1)(
        log_flow, trajectories.log_reward, trajectories.valid
    )


def target_scores(
    environment: Environment,
    policy: Policy,
    batch: FlowBatch,
    *,
    has_target: bool,
    with_flow: bool = False,
    with_stop: bool = False,
    chunk_size: int,
) -> Scores:
    """Scores without gradient, by ``params["target"]``, or by the policy itself without one."""
    if not has_target:
        return jax.lax.stop_gradient(batch.scores)
    return jax.lax.stop_gradient(
        score(
            environment,
            policy,
            jax.lax.stop_gradient(batch.params["target"]),
            batch.trajectories,
            is_on_policy=False,
            with_flow=with_flow,
            with_stop=with_stop,
            chunk_size=chunk_size,
        )
    )


def over_transitions(
    values: jax.Array, valid: jax.Array, axis_name: str | None = None
) -> jax.Array:
    """[B] whose mean is the mean of ``values`` [T, B] over all valid transitions of the batch.

    Args:
      values: [T, B].
      valid: [T, B] bool.
      axis_name: the mapped axis over which devices share the batch.
    """
    mean_length = valid.sum(axis=0).mean(dtype=values.dtype)
    if axis_name is not None:
        mean_length = jax.lax.pmean(mean_length, axis_name)
    return jnp.sum(jnp.where(valid, values, 0.0), axis=0) / jnp.maximum(mean_length, 1e-6)

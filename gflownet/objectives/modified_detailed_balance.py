"""Modified detailed balance (MDB), for graphs in which every state may stop.

There F(s) P_F(stop | s) = R(s) at the exact flow, which eliminates F from detailed balance:

    δ(s, s') = log R(s) - log P_F(stop | s) + log P_F(s' | s)
             - log R(s') + log P_F(stop | s') - log P_B(s | s')

Neither F nor Z is learned, and only differences of log R along an action are needed. The stop
itself has no residual: at the flow it is what defines F. (The sign is that of the other residuals:
positive where too much flows from s to s'.)

Deleu et al., "Bayesian structure learning with generative flow networks", UAI 2022.
"""

from __future__ import annotations

from collections.abc import Callable

import chex
import jax
import jax.numpy as jnp

from ebjax.types import Objective, Params
from gflownet.objectives.flow_objective import flow_objective, over_transitions, target_scores
from gflownet.objectives.residual_losses import ResidualLoss, huber
from gflownet.sampling import TrajectorySampler, forward_sampler
from gflownet.scoring import at_states
from gflownet.types import Environment, Policy

__all__ = ["modified_detailed_balance", "modified_detailed_balance_residuals"]


def modified_detailed_balance_residuals(
    log_stop: jax.Array,
    next_log_stop: jax.Array,
    log_pf: jax.Array,
    log_pb: jax.Array,
    log_reward: jax.Array,
    is_inner: jax.Array,
) -> jax.Array:
    """δ of the transitions of one trajectory between states that may stop.

    Args:
      log_stop: [T + 1] log P_F(stop | s) of the states that are left.
      next_log_stop: [T + 1] the same, as used at s': perhaps a target network's.
      log_pf: [T].
      log_pb: [T].
      log_reward: [T + 1] log R of each state, were it to stop.
      is_inner: [T] bool, transitions of the trajectory other than the stop.

    Returns:
      [T] residuals, 0 where not inner.

    >>> log_stop, log_reward = jnp.array([-1.0, -3.0, 0.0]), jnp.array([0.5, 1.0, 0.0])
    >>> log_pf, log_pb, is_inner = jnp.array([-2.0, -3.0]), jnp.zeros(2), jnp.array([True, False])
    >>> modified_detailed_balance_residuals(
    ...     log_stop, log_stop, log_pf, log_pb, log_reward, is_inner
    ... ).tolist()
    [-4.5, 0.0]
    """
    chex.assert_equal_shape([log_stop, next_log_stop, log_reward])
    chex.assert_equal_shape([log_stop[1:], log_pf, log_pb, is_inner])
    flow = log_reward[:-1] - log_stop[:-1]
    next_flow = log_reward[1:] - next_log_stop[1:]
    return jnp.where(is_inner, flow + log_pf - next_flow - log_pb, 0.0)


def modified_detailed_balance(
    environment: Environment,
    policy: Policy,
    *,
    has_target: bool = False,
    epsilon: Callable[[jax.Array], jax.Array] | float = 0.0,
    reward_params: Params = (),
    sampler: TrajectorySampler | None = None,
    residual_loss: ResidualLoss | None = None,
    axis_name: str | None = None,
    chunk_size: int = 64,
) -> Objective:
    """Builds the objective.

    Args:
      environment: the graph and its reward, with a stop action allowed wherever any action is.
      policy: P_F and P_B.
      has_target: whether log P_F(stop | s') comes from ``params["target"]``, without gradient (see
        ``with_target``); otherwise it is the policy's own, with gradient.
      epsilon: share of uniform exploration, a number or a schedule of the update count.
      reward_params: the reward's parameters.
      sampler: where trajectories come from instead; it then stands for epsilon.
      residual_loss: loss of δ, by default Huber's with threshold 1.
      axis_name: the mapped axis over which devices share the batch.
      chunk_size: states evaluated at a time in the gradient pass.

    Returns:
      An ``Objective`` whose parameters are ``{"policy": ...}`` and perhaps ``"target"``; the loss
      is the mean over transitions that are no stops. Metrics: ``log_z`` (log R - log P_F(stop) of
      the source) and those of ``flow_objective``.

    Raises:
      ValueError: if the environment has no stop action.
    """
    stop = environment.stop_action
    if stop is None:
        raise ValueError(
            "The environment has no stop action; modified detailed balance needs one everywhere."
        )
    measure = residual_loss or huber(1.0)

    def log_reward_of_stopping(params, state):
        return environment.log_reward(params, environment.step(state, jnp.asarray(stop)))

    def losses(batch):
        t, scores = batch.trajectories, batch.scores
        is_left = jnp.concatenate([t.valid, jnp.zeros_like(t.valid[:1])])
        log_reward = at_states(
            log_reward_of_stopping, reward_params, t.states, is_left, chunk_size=chunk_size
        )
        next_log_stop = scores.log_stop
        if has_target:
            next_log_stop = target_scores(
                environment, policy, batch, has_target=True, with_stop=True, chunk_size=chunk_size
            ).log_stop
        is_inner = t.valid & (t.actions != stop)
        residuals = jax.vmap(modified_detailed_balance_residuals, 1, out_axes=1)(
            scores.log_stop, next_log_stop, scores.log_pf, scores.log_pb, log_reward, is_inner
        )
        means = over_transitions(measure(residuals), is_inner, axis_name)
        return means, {"log_z": jnp.mean(log_reward[0] - scores.log_stop[0])}

    sampler = sampler or forward_sampler(
        environment, policy, epsilon=epsilon, reward_params=reward_params
    )
    return flow_objective(
        environment, policy, losses, sampler, with_stop=True, chunk_size=chunk_size
    )

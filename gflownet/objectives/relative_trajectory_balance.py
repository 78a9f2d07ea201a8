"""Relative trajectory balance (RTB): a posterior from a prior policy and a likelihood.

    δ(τ) = log Z + Σ_t log P_F(s_{t+1} | s_t) - Σ_t log P_prior(s_{t+1} | s_t) - β log r(x)

At δ = 0 the policy draws trajectories with probability P_prior(τ) r(x)^β / Z, with Z the prior's
mean of r^β, and so objects from the prior's law times r^β. There is no P_B. The prior is another
policy on the same graph; it is evaluated on the same states and gets no gradient.

Venkatraman et al., "Amortizing intractable inference in diffusion models for vision, language, and
control", NeurIPS 2024.
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
from gflownet.scoring import score
from gflownet.types import Environment, Policy

__all__ = ["relative_trajectory_balance", "relative_trajectory_balance_residual"]


def relative_trajectory_balance_residual(
    log_z: jax.Array,
    log_pf: jax.Array,
    log_prior: jax.Array,
    log_likelihood: jax.Array,
    valid: jax.Array,
) -> jax.Array:
    """δ of one trajectory.

    Args:
      log_z: [] learned log Z.
      log_pf: [T] of the posterior's policy.
      log_prior: [T] of the prior's.
      log_likelihood: [] β log r of the terminal state.
      valid: [T] bool.

    Returns:
      [] the residual.

    >>> one, valid = jnp.ones(1), jnp.array([True])
    >>> float(relative_trajectory_balance_residual(
    ...     jnp.array(1.0), -2.0 * one, -3.0 * one, jnp.array(0.5), valid))
    1.5
    """
    chex.assert_rank([log_z, log_likelihood], 0)
    chex.assert_equal_shape([log_pf, log_prior, valid])
    return log_z + jnp.sum(jnp.where(valid, log_pf - log_prior, 0.0)) - log_likelihood


def relative_trajectory_balance(
    environment: Environment,
    policy: Policy,
    prior: Policy,
    *,
    inverse_temperature: float = 1.0,
    epsilon: Callable[[jax.Array], jax.Array] | float = 0.0,
    reward_params: Params = (),
    sampler: TrajectorySampler | None = None,
    log_z: LogZ = constant_log_z,
    residual_loss: ResidualLoss = squared,
    chunk_size: int = 64,
) -> Objective:
    """Builds the objective.

    Args:
      environment: the graph; its reward is the likelihood r.
      policy: P_F of the posterior; start it at the prior's parameters where it can.
      prior: the policy of the prior.
      inverse_temperature: β; 0 asks for the prior itself, with log Z = 0.
      epsilon: share of uniform exploration, a number or a schedule of the update count.
      reward_params: the likelihood's parameters.
      sampler: where trajectories come from instead; it then stands for the two options above.
      log_z: as in ``trajectory_balance``.
      residual_loss: loss of δ.
      chunk_size: states evaluated at a time.

    Returns:
      An ``Objective`` whose parameters are ``{"policy": ..., "prior": ..., "log_z": ...}``, the
      second of which has gradient 0 (give it ``optax.set_to_zero()``). Metrics: ``log_z``,
      ``log_prior`` (mean over trajectories), those of ``flow_objective``, and ``elbo``, the mean of
      β log r + log P_prior - log P_F.
    """

    def losses(batch):
        t, scores = batch.trajectories, batch.scores
        source = jax.tree.map(lambda leaf: leaf[0], t.states)
        learned = jax.vmap(log_z, (None, 0), axis_size=t.valid.shape[1])(
            batch.params["log_z"], source
        )
        log_prior = jax.lax.stop_gradient(
            score(
                environment,
                prior,
                jax.lax.stop_gradient(batch.params["prior"]),
                t,
                is_on_policy=False,
                chunk_size=chunk_size,
            ).log_pf
        )
        residual = jax.vmap(relative_trajectory_balance_residual, (0, 1, 1, 0, 1))(
            learned, scores.log_pf, log_prior, inverse_temperature * t.log_reward, t.valid
        )
        return residual_loss(residual), {
            "log_z": learned.mean(),
            "log_prior": log_prior.sum(axis=0).mean(),
            "elbo": jnp.mean(learned - residual),
        }

    sampler = sampler or forward_sampler(
        environment, policy, epsilon=epsilon, reward_params=reward_params
    )
    return flow_objective(environment, policy, losses, sampler, chunk_size=chunk_size)

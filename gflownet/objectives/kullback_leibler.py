"""Both Kullback-Leibler divergences between the trajectories of P_F and those of R P_B / Z.

With r(τ) = Σ_t [log P_F - log P_B] - log R(x),

    reverse    KL(P_F ‖ R P_B / Z) = log Z + E_{τ ~ P_F} r(τ)       -r is the evidence lower bound
    forward    KL(R P_B / Z ‖ P_F) = -log Z - E_{τ ~ R P_B / Z} r   -r is the evidence upper bound

The reverse one is minimised by its score-function gradient, E[(r - b) ∇ log P_F] - E[∇ log P_B],
with b the mean of the other trajectories of the batch, which leaves it unbiased. On policy this is
half the gradient of trajectory balance but for the baseline, which is -log Z there. The forward one
is maximum likelihood of P_F on backward trajectories from true samples.

Unlike balance residuals these are expectations: trajectories must come from P_F itself, or from
samples of the target, and from nowhere else.

Malkin et al., "GFlowNets and variational inference", ICLR 2023; Blessing et al., "Beyond ELBOs: a
large-scale evaluation of variational methods for sampling", ICML 2024 (EUBO).
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from ebjax.types import Objective, Params, PyTree
from gflownet.objectives.flow_objective import flow_objective
from gflownet.sampling import TrajectorySampler, backward_sampler, forward_sampler
from gflownet.types import Environment, Policy, State

__all__ = ["forward_kullback_leibler", "reverse_kullback_leibler", "reverse_surrogate"]


def reverse_surrogate(
    log_pf: jax.Array, log_pb: jax.Array, log_reward: jax.Array, baseline: jax.Array
) -> jax.Array:
    """r of one trajectory as value, and one sample of the divergence's gradient as gradient.

    Args:
      log_pf: [T], 0 where not valid.
      log_pb: [T], 0 where not valid.
      log_reward: [].
      baseline: [] b.

    Returns:
      [] r(τ).

    >>> one = jnp.ones(1)
    >>> def surrogate(theta):
    ...     return reverse_surrogate(theta * one, 0 * one, jnp.array(0.0), jnp.array(5.0))
    >>> value, gradient = jax.value_and_grad(surrogate)(2.0)
    >>> float(value), float(gradient)
    (2.0, -3.0)
    """
    log_ratio = jnp.sum(log_pf - log_pb) - log_reward
    fixed = jax.lax.stop_gradient(log_ratio)
    surrogate = (fixed - baseline) * jnp.sum(log_pf) - jnp.sum(log_pb)
    return fixed + surrogate - jax.lax.stop_gradient(surrogate)


def reverse_kullback_leibler(
    environment: Environment,
    policy: Policy,
    *,
    reward_params: Params = (),
    sampler: TrajectorySampler | None = None,
    axis_name: str | None = None,
    chunk_size: int = 64,
) -> Objective:
    """Builds the objective; trajectories are drawn from P_F without exploration.

    Args:
      environment: the graph and its reward.
      policy: P_F and P_B.
      reward_params: the reward's parameters.
      sampler: where trajectories come from instead: it must draw from P_F.
      axis_name: the mapped axis over which devices share the batch, so that the baseline is over
        all of it.
      chunk_size: states evaluated at a time in the gradient pass.

    Returns:
      An ``Objective`` whose parameters are ``{"policy": ...}`` and whose loss is the mean of r, the
      negative of the evidence lower bound. Metrics: those of ``flow_objective``.
    """

    def losses(batch):
        t, scores = batch.trajectories, batch.scores
        log_ratio = jax.lax.stop_gradient(
            jnp.sum(scores.log_pf - scores.log_pb, axis=0) - t.log_reward
        )
        total, count = log_ratio.sum(), len(log_ratio)
        if axis_name is not None:
            total = jax.lax.psum(total, axis_name)
            count = jax.lax.psum(count, axis_name)
        others = (total - log_ratio) / max(count - 1, 1)
        values = jax.vmap(reverse_surrogate, (1, 1, 0, 0))(
            scores.log_pf, scores.log_pb, t.log_reward, others
        )
        return values, {}

    sampler = sampler or forward_sampler(environment, policy, reward_params=reward_params)
    return flow_objective(environment, policy, losses, sampler, chunk_size=chunk_size)


def forward_kullback_leibler(
    environment: Environment,
    policy: Policy,
    *,
    terminal: Callable[[jax.Array, PyTree], State] = lambda key, example: example,
    reward_params: Params = (),
    sampler: TrajectorySampler | None = None,
    chunk_size: int = 64,
) -> Objective:
    """Builds the objective: maximum likelihood of P_F on trajectories that P_B draws from data.

    Args:
      environment: the graph and its reward.
      policy: P_F, and P_B, which gets no gradient.
      terminal: ``(key, example) -> state``, the terminal state of a slot, a draw of the target; by
        default the example itself.
      reward_params: the reward's parameters; the reward is only reported.
      sampler: where trajectories come from instead: it must draw from R P_B / Z.
      chunk_size: states evaluated at a time in the gradient pass.

    Returns:
      An ``Objective`` whose parameters are ``{"policy": ...}`` and whose loss is the mean of -log
      P_F(τ). Metrics: ``eubo``, the mean of log R + log P_B - log P_F, an upper bound of log Z,
      and those of ``flow_objective`` but ``elbo``.
    """

    def losses(batch):
        t, scores = batch.trajectories, batch.scores
        log_pf, log_pb = scores.log_pf.sum(axis=0), scores.log_pb.sum(axis=0)
        return -log_pf, {"eubo": jnp.mean(t.log_reward + log_pb - log_pf)}

    sampler = sampler or backward_sampler(
        environment, policy, terminal, reward_params=reward_params
    )
    objective = flow_objective(environment, policy, losses, sampler, chunk_size=chunk_size)

    def loss(params, carry, keys, batch):
        value, (carry, metrics) = objective.loss(params, carry, keys, batch)
        # The same mean as eubo, and on these trajectories no lower bound.
        metrics = {name: metric for name, metric in metrics.items() if name != "elbo"}
        return value, (carry, metrics)

    return objective._replace(loss=loss)

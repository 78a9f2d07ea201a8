"""Learned energy decomposition (LED-GFN): how much of log R each step has earned, learned.

A potential φ(s, s') is fitted to the rewards of whole trajectories, with a random part of the steps
left out, which spreads what it says over them:

    L_φ = (log R(x) - T / Σ_t z_t  Σ_t z_t φ_t)²,    z_t ~ Bernoulli(1 - γ), at least one kept

The flow then looks forward by the potential, corrected so that it sums to log R exactly:

    φ̄_t = φ_t + (log R - Σ φ) / T,    no gradient
    δ(s, s') = log F̃(s) + log P_F(s' | s) - log F̃(s') - log P_B(s | s') - φ̄_t,    F̃(x) = 1

The correction belongs to the trajectory and not to the edge, so the target is exact once Σ φ = log
R on all paths: watch ``potential_error`` go to 0. With γ > 0 it does not where steps earn unequal
parts, for the fit then gives up some of the sum to be even, and the law stays off by as much. A
stop has no potential to learn, φ = 0.

Jang, Kim and Ahn, "Learning energy decompositions for partial inference of GFlowNets", ICLR 2024.
"""

from __future__ import annotations

from collections.abc import Callable

import chex
import jax
import jax.numpy as jnp

from ebjax.types import EnergyFn, Objective, Params
from gflownet.compaction import compact_map
from gflownet.objectives.detailed_balance import detailed_balance_residuals
from gflownet.objectives.flow_objective import FlowBatch, flow_objective, over_transitions
from gflownet.objectives.forward_looking import forward_looking_flow
from gflownet.objectives.residual_losses import ResidualLoss, squared
from gflownet.sampling import TrajectorySampler, forward_sampler
from gflownet.types import Environment, Policy

__all__ = [
    "corrected_potential",
    "decomposed_residuals",
    "learned_energy_decomposition",
    "potential_loss",
]


def potential_loss(
    potential: jax.Array, log_reward: jax.Array, is_kept: jax.Array, has_potential: jax.Array
) -> jax.Array:
    """L_φ of one trajectory.

    Args:
      potential: [T] φ.
      log_reward: [].
      is_kept: [T] bool z, at least one of the steps that have a potential.
      has_potential: [T] bool, valid steps but the stop; T of the equation is their number.

    Returns:
      [] the loss; 0 where no step has a potential.

    >>> every = jnp.array([True, True])
    >>> phi, log_r, kept = jnp.array([1.0, 5.0]), jnp.array(3.0), jnp.array([True, False])
    >>> float(potential_loss(phi, log_r, kept, every))
    1.0
    """
    chex.assert_equal_shape([potential, is_kept, has_potential])
    is_kept = is_kept & has_potential
    scale = has_potential.sum() / jnp.maximum(is_kept.sum(), 1)
    fitted = scale * jnp.sum(jnp.where(is_kept, potential, 0.0))
    return jnp.where(has_potential.any(), jnp.square(log_reward - fitted), 0.0)


def corrected_potential(potential: jax.Array, log_reward: jax.Array, valid: jax.Array) -> jax.Array:
    """φ̄ of one trajectory, which sums to log R.

    Args:
      potential: [T] φ, 0 where there is none.
      log_reward: [].
      valid: [T] bool.

    Returns:
      [T]; 0 where not valid; no gradient.

    >>> every = jnp.array([True, True])
    >>> corrected_potential(jnp.array([1.0, 5.0]), jnp.array(3.0), every).tolist()
    [-0.5, 3.5]
    """
    potential = jnp.where(valid, potential, 0.0)
    missing = (log_reward - potential.sum()) / jnp.maximum(valid.sum(), 1)
    return jax.lax.stop_gradient(jnp.where(valid, potential + missing, 0.0))


def decomposed_residuals(
    log_flow: jax.Array,
    log_pf: jax.Array,
    log_pb: jax.Array,
    potential: jax.Array,
    log_reward: jax.Array,
    valid: jax.Array,
) -> jax.Array:
    """δ of all transitions of one trajectory: forward-looking, with E(s_t) = -Σ_{u < t} φ̄_u.

    Args:
      log_flow: [T + 1] log F̃ of the states that are left.
      log_pf: [T].
      log_pb: [T].
      potential: [T] φ̄.
      log_reward: [], the sum of φ̄.
      valid: [T] bool.

    Returns:
      [T] residuals, 0 where not valid.
    """
    earned = jnp.concatenate([jnp.zeros_like(potential[:1]), jnp.cumsum(potential)])
    flow = forward_looking_flow(log_flow, -earned, log_reward, valid)
    return detailed_balance_residuals(flow, log_pf, log_pb, valid)


def learned_energy_decomposition(
    environment: Environment,
    policy: Policy,
    potential_fn: EnergyFn,
    *,
    dropout: float = 0.1,
    potential_weight: float = 1.0,
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
      policy: P_F, P_B and log F̃.
      potential_fn: ``(params, (observation of s, observation of s')) -> []``, φ; ``mlp_energy``
        fits, its sign being free.
      dropout: γ in [0, 1), the chance that a step is left out of the fit.
      potential_weight: factor of L_φ; with Adam a learning rate of the entry ``"potential"`` says
        more.
      epsilon: share of uniform exploration, a number or a schedule of the update count.
      reward_params: the reward's parameters.
      sampler: where trajectories come from instead; it then stands for the two options above.
      residual_loss: loss of δ.
      axis_name: the mapped axis over which devices share the batch.
      chunk_size: states evaluated at a time.

    Returns:
      An ``Objective`` whose parameters are ``{"policy": ..., "potential": ...}``. Metrics:
      ``potential_loss``, ``potential_error`` (mean of |log R - Σ φ|), ``log_z`` (log F̃ of the
      source) and those of ``flow_objective``.

    Raises:
      ValueError: if ``dropout`` is out of range.
    """
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout is {dropout}; it must lie in [0, 1).")

    def potentials(batch: FlowBatch, has_potential):
        t = batch.trajectories

        def at_pair(params, item):
            before, after = item
            pair = (environment.observe(before), environment.observe(after))
            return potential_fn(params, pair)

        flat = lambda leaf: leaf.reshape(-1, *leaf.shape[2:])  # noqa: E731
        before = jax.tree.map(lambda leaf: flat(leaf[:-1]), t.states)
        after = jax.tree.map(lambda leaf: flat(leaf[1:]), t.states)
        values = compact_map(
            at_pair,
            batch.params["potential"],
            (before, after),
            has_potential.reshape(-1),
            like=t.log_pf.dtype.type(0),
            chunk_size=chunk_size,
        )
        return values.reshape(has_potential.shape)

    def keep(key, has_potential):
        """z of one trajectory; where all steps are dropped, one of them is kept."""
        drop_key, one_key = jax.random.split(key)
        is_kept = jax.random.bernoulli(drop_key, 1.0 - dropout, has_potential.shape)
        is_kept = is_kept & has_potential
        lots = jnp.where(has_potential, jax.random.uniform(one_key, has_potential.shape), -1.0)
        one = (jnp.arange(len(lots)) == jnp.argmax(lots)) & has_potential
        return jnp.where(is_kept.any(), is_kept, one)

    def losses(batch):
        t, scores = batch.trajectories, batch.scores
        has_potential = t.valid
        if environment.stop_action is not None:
            has_potential = t.valid & (t.actions != environment.stop_action)
        potential = potentials(batch, has_potential)
        keys = jax.vmap(jax.random.fold_in, (0, None))(batch.keys, 1)
        is_kept = jax.vmap(keep, (0, 1), out_axes=1)(keys, has_potential)
        fits = jax.vmap(potential_loss, (1, 0, 1, 1))(
            potential, t.log_reward, is_kept, has_potential
        )
        corrected = jax.vmap(corrected_potential, (1, 0, 1), out_axes=1)(
            potential, t.log_reward, t.valid
        )
        residuals = jax.vmap(decomposed_residuals, (1, 1, 1, 1, 0, 1), out_axes=1)(
            scores.log_flow, scores.log_pf, scores.log_pb, corrected, t.log_reward, t.valid
        )
        means = over_transitions(residual_loss(residuals), t.valid, axis_name)
        error = jnp.where(has_potential.any(axis=0), t.log_reward - potential.sum(axis=0), 0.0)
        return means + potential_weight * fits, {
            "potential_loss": fits.mean(),
            "potential_error": jnp.abs(error).mean(),
            "log_z": scores.log_flow[0].mean(),
        }

    sampler = sampler or forward_sampler(
        environment, policy, epsilon=epsilon, reward_params=reward_params
    )
    return flow_objective(
        environment, policy, losses, sampler, with_flow=True, chunk_size=chunk_size
    )

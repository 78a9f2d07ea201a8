"""Cooperative training: a sampler proposes, a Markov chain refines, each learns from the other.

    x̂ ~ q_φ,    x = K transitions of the chain of E_θ from x̂

    energy     mean E_θ(x⁺) - mean E_θ(x)                  x a constant
    sampler    mean loss(φ; x̂, x)                          x̂ and x constants, such as -log q_φ(x)

The chain starts near its law and so can be short; the sampler is taught what the chain has found
out, so that it amortises the chain. The fixed point is q_φ = p_θ = data.

Xie, Lu, Gao, Zhu and Wu, "Cooperative training of descriptor and generator networks", IEEE PAMI 42
(2020).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from ebjax.objectives.regularizers import Regularizer, mean_penalty
from ebjax.samplers.run import run_chain
from ebjax.types import EnergyFn, Kernel, Objective, Params, Position

__all__ = ["CooperativeSamples", "cooperative"]


class CooperativeSamples(NamedTuple):
    """The samples of the last update, to look at; the next one does not depend on them.

    Attributes:
      proposal: [B, ...] x̂ of the sampler.
      refined: [B, ...] x at the ends of the chains.
    """

    proposal: Position
    refined: Position


def cooperative(
    energy_fn: EnergyFn,
    propose: Callable[[Params, jax.Array], Position],
    sampler_loss: Callable[[Params, jax.Array, Position, Position], jax.Array],
    kernel: Kernel,
    *,
    num_steps: int,
    sampler_weight: float = 1.0,
    regularizers: Sequence[Regularizer] = (),
) -> Objective:
    """Builds the objective.

    ``params`` is ``{"energy": θ, "sampler": φ}``; give each its optimizer by
    ``ebjax.training.by_group``.

    Args:
      energy_fn: the energy that is trained.
      propose: ``(φ, key) -> x̂``, one draw of any amortised sampler: a generator, a flow, a
        GFlowNet's rollout.
      sampler_loss: ``(φ, key, x̂, x) -> []``, what the sampler learns from one pair. ``key`` is that
        of the proposal, so that a generator finds its latent variables again: ``|g_φ(z(key)) - x|²
        / 2`` moves the output of the same latent to where the chain took it. A sampler with a
        density may take ``-log q_φ(x)``.
      kernel: the transition that refines.
      num_steps: K, at least 1.
      sampler_weight: factor of the sampler's loss, at least 0.
      regularizers: penalties on the energy, applied to data and refined samples.

    Returns:
      An ``Objective`` over batches of examples [B, ...], one proposal each, whose carry is
      ``CooperativeSamples``. No gradient passes from one network to the other. Metrics:
      ``energy_data``, ``energy_samples`` (refined), ``energy_proposals``, ``energy_gap`` (data
      minus refined), ``sampler_loss``, ``chains_finite``, ``acceptance_rate`` where the kernel
      reports it, and ``penalty`` where there is one.

    Raises:
      ValueError: naming the option that is out of range.
    """
    if num_steps < 1:
        raise ValueError(f"num_steps is {num_steps}; a chain takes at least 1 step.")
    if not (math.isfinite(sampler_weight) and sampler_weight >= 0.0):
        raise ValueError(
            f"sampler_weight is {sampler_weight}; it must be a finite number of at least 0."
        )
    penalties = tuple(regularizers)

    def init(key, params, batch):
        keys = jax.random.split(key, len(jax.tree.leaves(batch)[0]))
        proposals = jax.vmap(propose, (None, 0))(params["sampler"], keys)
        return CooperativeSamples(proposals, proposals)

    def sample(params, key):
        """One proposal with its key, refined."""
        propose_key, chain_key = jax.random.split(key)
        proposal = propose(params["sampler"], propose_key)
        state = kernel.init(energy_fn, params["energy"], proposal)
        state, info = run_chain(chain_key, kernel, energy_fn, params["energy"], state, num_steps)
        return propose_key, CooperativeSamples(proposal, state.position), info

    def loss(params, carry, keys, batch):
        del carry
        frozen = jax.lax.stop_gradient(params)
        propose_keys, samples, info = jax.vmap(sample, (None, 0))(frozen, keys)
        samples, info = jax.lax.stop_gradient((samples, info))
        both = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), batch, samples.refined)
        energies = jax.vmap(energy_fn, (None, 0))(params["energy"], both)
        positive, negative = jnp.split(energies, 2)
        losses = jax.vmap(sampler_loss, (None, 0, 0, 0))(
            params["sampler"], propose_keys, samples.proposal, samples.refined
        )
        value = (positive - negative + sampler_weight * losses).mean()
        proposals = jax.vmap(energy_fn, (None, 0))(frozen["energy"], samples.proposal)
        metrics = {
            "energy_data": positive.mean(),
            "energy_samples": negative.mean(),
            "energy_proposals": proposals.mean(),
            "energy_gap": positive.mean() - negative.mean(),
            "sampler_loss": losses.mean(),
            "chains_finite": info.is_finite.mean(),
        }
        if hasattr(info, "acceptance_rate"):
            metrics["acceptance_rate"] = info.acceptance_rate.mean()
        if penalties:
            # The mean over data and samples is half the sum of their means.
            metrics["penalty"] = 2.0 * mean_penalty(penalties, energy_fn, params["energy"], both)
            value += metrics["penalty"]
        return value, (samples, metrics)

    return Objective(init=init, loss=loss)

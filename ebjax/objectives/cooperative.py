"""Cooperative training: a sampler proposes, a Markov chain refines, each learns from the other.

    x̂ ~ q_φ,    x = K transitions of the chain of E_θ from x̂
    or x̂ one of M draws of q_φ, taken with probability in proportion to exp(-E_θ) / q_φ

    energy     mean E_θ(x⁺) - mean E_θ(x)                  x a constant
    sampler    mean loss(φ; x̂, x)                          x̂ and x constants, such as -log q_φ(x)

The chain starts near its law and so can be short; the sampler is taught what the chain has found
out, so that it amortises the chain. The fixed point is q_φ = p_θ = data. A short chain does not
cross between far modes, and so by itself leaves their masses as the sampler has them; a sampler
with a density can propose several points of which the energy chooses one (sampling importance
resampling), which carries its masses over.

Xie, Lu, Gao, Zhu and Wu, "Cooperative training of descriptor and generator networks", IEEE PAMI 42
(2020). Rubin, "The calculation of posterior distributions by data augmentation: comment", JASA 82
(1987).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ebjax.objectives.regularizers import Regularizer, mean_penalty
from ebjax.samplers.run import run_chain
from ebjax.samplers.smc.resampling import effective_sample_size
from ebjax.types import EnergyFn, Kernel, Objective, Params, Position

__all__ = ["CooperativeSamples", "cooperative", "refined_proposal"]


class CooperativeSamples(NamedTuple):
    """The samples of the last update, to look at; the next one does not depend on them.

    Attributes:
      proposal: [B, ...] x̂ of the sampler.
      refined: [B, ...] x at the ends of the chains.
    """

    proposal: Position
    refined: Position


def refined_proposal(
    energy_fn: EnergyFn,
    propose: Callable[[Params, jax.Array], Position],
    kernel: Kernel,
    *,
    num_steps: int,
    num_proposals: int = 1,
    log_prob: Callable[[Params, Position], jax.Array] | None = None,
) -> Callable[[Params, jax.Array], tuple[jax.Array, CooperativeSamples, Any, jax.Array]]:
    """What energy and sampler draw together.

    Args:
      (all): as of ``cooperative``.

    Returns:
      ``(params, key) -> (key of the proposal, samples, info, share)``: the samples of one slot, the
      mean info of its chain, and the effective share 1 / (M Σ w²) of the M proposals' weights w.

    Raises:
      ValueError: naming the option that is out of range.
    """
    if num_steps < 1:
        raise ValueError(f"num_steps is {num_steps}; a chain takes at least 1 step.")
    if num_proposals < 1:
        raise ValueError(f"num_proposals is {num_proposals}; it must be at least 1.")
    if num_proposals > 1 and log_prob is None:
        raise ValueError(
            f"num_proposals is {num_proposals} and log_prob None; proposals are weighed by the "
            "density that they come from."
        )

    def chosen(params, key):
        """The key of a proposal, the proposal, and the effective share of all."""
        if log_prob is None or num_proposals == 1:
            return key, propose(params["sampler"], key), jnp.ones(())
        choice_key, *keys = jax.random.split(key, num_proposals + 1)
        keys = jnp.stack(keys)
        proposals = jax.vmap(propose, (None, 0))(params["sampler"], keys)
        energies = jax.vmap(energy_fn, (None, 0))(params["energy"], proposals)
        densities = jax.vmap(log_prob, (None, 0))(params["sampler"], proposals)
        log_weights = -energies - densities
        # A proposal that has no finite weight is taken only where none has one.
        log_weights = jnp.where(jnp.isfinite(log_weights), log_weights, -1e30)
        share = effective_sample_size(log_weights) / num_proposals
        one = jax.random.categorical(choice_key, log_weights)
        return keys[one], jax.tree.map(lambda x: x[one], proposals), share

    def sample(params, key):
        propose_key, chain_key = jax.random.split(key)
        propose_key, proposal, share = chosen(params, propose_key)
        state = kernel.init(energy_fn, params["energy"], proposal)
        state, info = run_chain(chain_key, kernel, energy_fn, params["energy"], state, num_steps)
        return propose_key, CooperativeSamples(proposal, state.position), info, share

    return sample


def cooperative(
    energy_fn: EnergyFn,
    propose: Callable[[Params, jax.Array], Position],
    sampler_loss: Callable[[Params, jax.Array, Position, Position], jax.Array],
    kernel: Kernel,
    *,
    num_steps: int,
    num_proposals: int = 1,
    log_prob: Callable[[Params, Position], jax.Array] | None = None,
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
      num_proposals: M, at least 1.
      log_prob: ``(φ, x̂) -> []``, log q_φ; for M > 1.
      sampler_weight: factor of the sampler's loss, at least 0.
      regularizers: penalties on the energy, applied to data and refined samples.

    Returns:
      An ``Objective`` over batches of examples [B, ...], one proposal each, whose carry is
      ``CooperativeSamples``. No gradient passes from one network to the other. Metrics:
      ``energy_data``, ``energy_samples`` (refined), ``energy_proposals``, ``energy_gap`` (data
      minus refined), ``sampler_loss``, ``chains_finite``, ``acceptance_rate`` where the kernel
      reports it, ``proposal_effective_share`` (of the weights of M > 1 proposals, 1 where all weigh
      the same) and ``penalty`` where there is one.

    Raises:
      ValueError: naming the option that is out of range.
    """
    sample = refined_proposal(
        energy_fn,
        propose,
        kernel,
        num_steps=num_steps,
        num_proposals=num_proposals,
        log_prob=log_prob,
    )
    if not (math.isfinite(sampler_weight) and sampler_weight >= 0.0):
        raise ValueError(
            f"sampler_weight is {sampler_weight}; it must be a finite number of at least 0."
        )
    penalties = tuple(regularizers)

    def init(key, params, batch):
        keys = jax.random.split(key, len(jax.tree.leaves(batch)[0]))
        proposals = jax.vmap(propose, (None, 0))(params["sampler"], keys)
        return CooperativeSamples(proposals, proposals)

    def loss(params, carry, keys, batch):
        del carry
        frozen = jax.lax.stop_gradient(params)
        propose_keys, samples, info, share = jax.vmap(sample, (None, 0))(frozen, keys)
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
        if num_proposals > 1:
            metrics["proposal_effective_share"] = share.mean()
        if penalties:
            # The mean over data and samples is half the sum of their means.
            metrics["penalty"] = 2.0 * mean_penalty(penalties, energy_fn, params["energy"], both)
            value += metrics["penalty"]
        return value, (samples, metrics)

    return Objective(init=init, loss=loss)

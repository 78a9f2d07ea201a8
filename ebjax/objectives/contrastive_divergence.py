"""Maximum likelihood by sampling: persistent contrastive divergence (PCD).

    ∇_θ (-log p_θ(x⁺)) = ∇_θ E_θ(x⁺) - E_{x⁻ ~ p_θ} ∇_θ E_θ(x⁻)

    loss = mean E(x⁺) - mean E(x⁻) + α mean(E(x⁺)² + E(x⁻)²)

The negatives x⁻ are the ends of Markov chains that persist between updates and are constants in
the loss. A share of them is reborn from noise at each update.

Tieleman, "Training restricted Boltzmann machines using approximations to the likelihood gradient",
ICML 2008. Du and Mordatch, "Implicit generation and modeling with energy based models", NeurIPS
2019 (replay with rebirth, energy regulariser).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from ebjax.samplers.run import run_chain
from ebjax.types import EnergyFn, Kernel, Objective, Position

__all__ = ["PersistentChains", "contrastive_loss", "persistent_contrastive_divergence"]


class PersistentChains(NamedTuple):
    """The chains that belong to the example slots.

    Attributes:
      position: [B, M, ...] M chains a slot.
      age: [B, M] int32, steps since the chain was born from noise.
    """

    position: Position
    age: jax.Array


def contrastive_loss(
    positive_energy: jax.Array, negative_energy: jax.Array, *, energy_regularizer: float = 0.0
) -> jax.Array:
    """``E⁺ - E⁻ + α (E⁺² + E⁻²)`` of one pair.

    A step against its gradient lowers the energy of data and raises that of samples. The
    regulariser penalises the square of each energy, not of their mean, and so bounds their spread.

    >>> float(contrastive_loss(jnp.array(1.0), jnp.array(3.0), energy_regularizer=0.5))
    3.0
    """
    square = jnp.square(positive_energy) + jnp.square(negative_energy)
    return positive_energy - negative_energy + energy_regularizer * square


def persistent_contrastive_divergence(
    energy_fn: EnergyFn,
    kernel: Kernel,
    initial_position: Callable[[jax.Array], Position],
    *,
    num_steps: int,
    chains_per_example: int = 1,
    rebirth_probability: float = 0.05,
    energy_regularizer: float = 0.0,
) -> Objective:
    """Builds the objective.

    Each example slot owns ``chains_per_example`` chains. An update advances one of them, chosen at
    random, by ``num_steps`` transitions under the current parameters and writes it back to its
    place; with all slots this is a replay buffer of ``B * chains_per_example`` chains.

    Args:
      energy_fn: the energy that is trained.
      kernel: the transition of the chains.
      initial_position: ``key -> x``, the noise that chains are born from.
      num_steps: transitions of a chain in one update.
      chains_per_example: M, at least 1.
      rebirth_probability: chance that the chosen chain starts anew from noise, in [0, 1]. At 1 no
        chain persists: short-run MCMC from noise.
      energy_regularizer: α >= 0.

    Returns:
      An ``Objective`` over batches of examples [B, ...], whose carry is ``PersistentChains``.
      Metrics: ``energy_data``, ``energy_samples``, ``energy_gap`` (data minus samples),
      ``sampler_gradient_norm`` and ``acceptance_rate`` where the kernel reports them, ``chain_age``
      (mean steps since birth) and ``chains_finite`` (share of transitions that were finite).

    Raises:
      ValueError: naming the option that is out of range.
    """
    if num_steps < 1:
        raise ValueError(f"num_steps is {num_steps}; a chain takes at least 1 step an update.")
    if chains_per_example < 1:
        raise ValueError(f"chains_per_example is {chains_per_example}; it must be at least 1.")
    if not 0.0 <= rebirth_probability <= 1.0:
        raise ValueError(f"rebirth_probability is {rebirth_probability}; it must be in [0, 1].")

    def init(key, params, batch):
        del params
        batch_size = len(jax.tree.leaves(batch)[0])
        keys = jax.random.split(key, (batch_size, chains_per_example))
        position = jax.vmap(jax.vmap(initial_position))(keys)
        return PersistentChains(position, jnp.zeros(keys.shape, jnp.int32))

    def negative(params, chains, key):
        """One slot: the end of its chosen chain, and the slot's chains with it written back."""
        choice_key, rebirth_key, birth_key, chain_key = jax.random.split(key, 4)
        row = jax.random.randint(choice_key, (), 0, chains_per_example)
        is_reborn = jax.random.bernoulli(rebirth_key, rebirth_probability)
        start = jax.tree.map(
            lambda kept, born: jnp.where(is_reborn, born, kept[row]),
            chains.position,
            initial_position(birth_key),
        )
        age = jnp.where(is_reborn, 0, chains.age[row]) + num_steps
        state = kernel.init(energy_fn, params, start)
        state, info = run_chain(chain_key, kernel, energy_fn, params, state, num_steps)
        end = state.position
        position = jax.tree.map(lambda all_, one: all_.at[row].set(one), chains.position, end)
        return end, PersistentChains(position, chains.age.at[row].set(age)), info

    def loss(params, carry, keys, batch):
        frozen = jax.lax.stop_gradient(params)
        ends, carry, info = jax.vmap(negative, (None, 0, 0))(frozen, carry, keys)
        ends, carry, info = jax.lax.stop_gradient((ends, carry, info))
        # One pass over data and samples together: half the calls, twice the batch.
        both = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), batch, ends)
        energies = jax.vmap(energy_fn, (None, 0))(params, both)
        positive, negative_ = jnp.split(energies, 2)
        losses = jax.vmap(
            lambda p, n: contrastive_loss(p, n, energy_regularizer=energy_regularizer)
        )(positive, negative_)
        metrics = {
            "energy_data": positive.mean(),
            "energy_samples": negative_.mean(),
            "energy_gap": positive.mean() - negative_.mean(),
            "chain_age": carry.age.mean(dtype=jnp.float32),
            "chains_finite": info.is_finite.mean(),
        }
        reported = {"sampler_gradient_norm": "gradient_norm", "acceptance_rate": "acceptance_rate"}
        for name, field in reported.items():
            if hasattr(info, field):
                metrics[name] = getattr(info, field).mean()
        return losses.mean(), (carry, metrics)

    return Objective(init=init, loss=loss)

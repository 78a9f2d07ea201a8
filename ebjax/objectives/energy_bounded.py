"""Energy-bounded learning: a classifier whose energy tells its own inputs from foreign ones.

    E(x) = -log Σ_k exp f_k(x)
    loss = mean -log p(y | x) + λ { mean_in [E(x) - m_in]₊² + mean_out [m_out - E(x)]₊² }

The two squared hinges push the energy of inputs below m_in and that of auxiliary outliers above
m_out, and vanish beyond the margins. Low E is familiar, high E is foreign.

The hinges may wait for ``num_pretraining_steps`` updates of plain classification. The margin m_in
can be set from what these left: the mean energy of the inputs at that moment plus an offset.

Liu, Wang, Owens and Li, "Energy-based out-of-distribution detection", NeurIPS 2020.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from ebjax.energies.joint import LogitsFn, free_energy
from ebjax.objectives.joint_classification import cross_entropy
from ebjax.types import Objective, Position

__all__ = [
    "EnergyBounds",
    "OutlierBatch",
    "energy_bounded",
    "inlier_hinge",
    "outlier_hinge",
]


class OutlierBatch(NamedTuple):
    """What one example slot gets.

    Attributes:
      examples: [...] an input.
      label: [] integer, its class.
      outliers: [M, ...] auxiliary inputs that are of no class.
    """

    examples: Position
    label: jax.Array
    outliers: Position


class EnergyBounds(NamedTuple):
    """What the objective remembers of each slot; equal on any number of devices.

    Attributes:
      step: [B] int32, updates done.
      mean_energy: [B] running mean of the slot's energies, held from the end of pretraining on.
    """

    step: jax.Array
    mean_energy: jax.Array


def inlier_hinge(energy: jax.Array, margin: float | jax.Array) -> jax.Array:
    """``[E - m]₊²``, 0 with slope 0 below the margin.

    >>> float(inlier_hinge(jnp.array(-3.0), -5.0)), float(inlier_hinge(jnp.array(-6.0), -5.0))
    (4.0, 0.0)
    """
    return jnp.square(jax.nn.relu(energy - margin))


def outlier_hinge(energy: jax.Array, margin: float | jax.Array) -> jax.Array:
    """``[m - E]₊²``, 0 with slope 0 above the margin.

    >>> float(outlier_hinge(jnp.array(-3.0), -1.0)), float(outlier_hinge(jnp.array(0.0), -1.0))
    (4.0, 0.0)
    """
    return jnp.square(jax.nn.relu(margin - energy))


_MEAN_DECAY = 0.95


def energy_bounded(
    logits_fn: LogitsFn,
    *,
    weight: float = 0.1,
    margin_out: float = -5.0,
    margin_in: float | None = None,
    margin_in_offset: float = 0.0,
    num_pretraining_steps: int = 0,
    axis_name: str | None = None,
) -> Objective:
    """Builds the objective.

    Args:
      logits_fn: ``(params, x) -> [K]``.
      weight: λ >= 0.
      margin_out: m_out, near the mean energy that outliers have without the hinges.
      margin_in: m_in, or ``None`` to take the mean energy of the inputs at the end of
        pretraining plus ``margin_in_offset``.
      margin_in_offset: in units of energy; a little below 0 asks for more than there is.
      num_pretraining_steps: updates of plain classification before the hinges count.
      axis_name: the mapped axis over which a measured m_in is averaged; needed for it on several
        devices.

    Returns:
      An ``Objective`` over batches ``OutlierBatch`` [B, ...], whose carry is ``EnergyBounds``.
      Metrics: ``cross_entropy``, ``accuracy``, ``energy_in``, ``energy_out``, ``margin_in``, and
      ``share_in_below`` and ``share_out_above`` their margins.

    Raises:
      ValueError: naming the option that is out of range.
    """
    if not (math.isfinite(weight) and weight >= 0.0):
        raise ValueError(f"weight is {weight}; it must be a finite number of at least 0.")
    if num_pretraining_steps < 0:
        raise ValueError(
            f"num_pretraining_steps is {num_pretraining_steps}; it must be at least 0."
        )
    if margin_in is None and num_pretraining_steps == 0:
        raise ValueError(
            "margin_in is None and num_pretraining_steps is 0; give the margin, or steps after "
            "which it can be measured."
        )

    def init(key, params, batch):
        del key, params
        num_slots = len(batch.label)
        return EnergyBounds(jnp.zeros(num_slots, jnp.int32), jnp.zeros(num_slots))

    def remember(carry, energy):
        """The carry after this update."""
        count = carry.step.astype(energy.dtype)
        decay = jnp.minimum(_MEAN_DECAY, (1.0 + count) / (10.0 + count))
        moved = carry.mean_energy + (1.0 - decay) * (energy - carry.mean_energy)
        is_measured = carry.step < num_pretraining_steps
        mean = jnp.where(is_measured, moved, carry.mean_energy).astype(carry.mean_energy.dtype)
        return EnergyBounds(carry.step + 1, mean)

    def low_margin(mean_energy):
        if margin_in is not None:
            return jnp.asarray(margin_in, mean_energy.dtype)
        mean = mean_energy.mean()
        if axis_name is not None:
            mean = jax.lax.pmean(mean, axis_name)
        return mean + margin_in_offset

    def loss(params, carry, keys, batch):
        del keys
        logits = jax.vmap(logits_fn, (None, 0))(params, batch.examples)
        outlier_logits = jax.vmap(jax.vmap(logits_fn, (None, 0)), (None, 0))(params, batch.outliers)
        energy, foreign = free_energy(logits), free_energy(outlier_logits)
        margin = low_margin(carry.mean_energy)
        hinges = inlier_hinge(energy, margin) + outlier_hinge(foreign, margin_out).mean(axis=1)
        is_on = carry.step >= num_pretraining_steps
        entropy = jax.vmap(cross_entropy)(logits, batch.label)
        total = entropy + weight * jnp.where(is_on, hinges, 0.0)
        metrics = {
            "cross_entropy": entropy.mean(),
            "accuracy": (logits.argmax(-1) == batch.label).mean(dtype=jnp.float32),
            "energy_in": energy.mean(),
            "energy_out": foreign.mean(),
            "margin_in": margin,
            "share_in_below": (energy < margin).mean(dtype=jnp.float32),
            "share_out_above": (foreign > margin_out).mean(dtype=jnp.float32),
        }
        return total.mean(), (remember(carry, jax.lax.stop_gradient(energy)), metrics)

    return Objective(init=init, loss=loss)

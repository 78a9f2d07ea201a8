"""Penalties that steady the training of an energy, each on one example.

    energy magnitude     w E(x)²
    gradient penalty     w (|∇_x E(x)| - c)²     zero-centred for c = 0

    regularized objective    loss + mean over the data of the penalties

Energies are only determined up to a constant, and contrastive losses are unbounded below in their
differences; a penalty holds them in place. None is free: the minimiser of the sum is not that of
the loss. A large weight gives a run that is steady and a law that is wrong, so raise a weight no
further than the run needs, and judge the law and not the loss.

Du and Mordatch, "Implicit generation and modeling with energy based models", NeurIPS 2019 (squared
energies). Gulrajani et al., "Improved training of Wasserstein GANs", NeurIPS 2017 (two-sided, c =
1). Mescheder, Geiger and Nowozin, "Which training methods for GANs do actually converge?", ICML
2018 (zero-centred).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from ebjax.types import EnergyFn, Objective, Params, Position, PyTree, bind

Regularizer = Callable[[EnergyFn, Params, Position], jax.Array]

__all__ = [
    "Regularizer",
    "energy_magnitude",
    "gradient_penalty",
    "mean_penalty",
    "regularized",
]


def energy_magnitude(weight: float) -> Regularizer:
    """``w E(x)²``: holds energies near zero.

    It fixes energies that drift to ±∞ together, which the difference of energies does not see, and
    differences that grow without bound. It is the square of each energy, not of their mean, which
    would let their spread grow. It biases the law towards a flat one: with energies of a normalised
    law of size e, a weight is small if ``w e`` is well below 1. On eight Gaussians in the plane a
    weight of 0.01 is harmless and a weight of 1 is not, with no sign of it in the loss.

    Args:
      weight: w >= 0.

    Returns:
      ``(energy_fn, params, x) -> []``.

    Raises:
      ValueError: if the weight is negative or not finite.

    >>> float(energy_magnitude(0.5)(lambda params, x: params * x, 2.0, jnp.array(3.0)))
    18.0
    """
    _check_weight(weight)
    return bind(_energy_magnitude, weight=weight)


def _energy_magnitude(energy_fn, params, x, *, weight):
    return weight * jnp.square(energy_fn(params, x))


def gradient_penalty(weight: float, *, target: float = 0.0) -> Regularizer:
    """``w (|∇_x E(x)| - c)²``: holds the slope of the energy.

    It fixes cliffs: energies so steep beside the data that a sampler's step overshoots or its
    gradient overflows. Zero-centred (c = 0) it flattens the energy where it is applied; on the data
    of a contrastive objective that smooths the law, as tempering it does. With c = 1 it asks for a
    slope of one everywhere, as a critic of the Wasserstein distance has, which the energy of no
    Gaussian satisfies: use it for such critics. The gradient of the penalty differentiates the
    energy twice.

    Args:
      weight: w >= 0.
      target: c >= 0, the slope that costs nothing.

    Returns:
      ``(energy_fn, params, x) -> []``; ``x`` may be any pytree, with the norm over all of it.

    Raises:
      ValueError: if an argument is negative or not finite.

    >>> slope = lambda params, x: params * jnp.sum(x)
    >>> float(gradient_penalty(1.0)(slope, 3.0, jnp.zeros(4)))
    36.0
    >>> float(gradient_penalty(1.0, target=1.0)(slope, 3.0, jnp.zeros(4)))
    25.0
    """
    _check_weight(weight)
    if not (math.isfinite(target) and target >= 0.0):
        raise ValueError(f"target is {target}; a slope is a finite number of at least 0.")
    return bind(_gradient_penalty, weight=weight, target=target)


def _gradient_penalty(energy_fn, params, x, *, weight, target):
    gradient = jax.grad(lambda x: energy_fn(params, x))(x)
    square = sum(jnp.sum(jnp.square(leaf)) for leaf in jax.tree.leaves(gradient))
    if target == 0.0:
        return weight * square
    # The norm has no derivative at zero: the inner `where` keeps it finite there.
    is_flat = square == 0.0
    norm = jnp.where(is_flat, 0.0, jnp.sqrt(jnp.where(is_flat, 1.0, square)))
    return weight * jnp.square(norm - target)


def _check_weight(weight: float) -> None:
    if not (math.isfinite(weight) and weight >= 0.0):
        raise ValueError(f"weight is {weight}; it must be a finite number of at least 0.")


def mean_penalty(
    regularizers: tuple[Regularizer, ...],
    energy_fn: EnergyFn,
    params: Params,
    positions: Position,
    contexts: Any = None,
) -> jax.Array:
    """[] sum of the penalties, mean over examples.

    Args:
      regularizers: the penalties.
      energy_fn: ``(params, x) -> []``, or ``(params, x, context) -> []`` with contexts.
      params: its parameters.
      positions: [B, ...].
      contexts: [B, ...] or ``None``.
    """

    def one(x, context):
        conditional = energy_fn
        if contexts is not None:
            conditional = lambda params, x: energy_fn(params, x, context)  # noqa: E731
        penalties = [regularizer(conditional, params, x) for regularizer in regularizers]
        return sum(penalties[1:], penalties[0])

    return jax.vmap(one)(positions, contexts).mean()


def regularized(
    objective: Objective,
    energy_fn: EnergyFn,
    *regularizers: Regularizer,
    positions: Callable[[PyTree], Position] = lambda batch: batch,
) -> Objective:
    """Adds penalties on the data to any objective.

    Contrastive objectives take ``regularizers`` themselves and apply them to their samples too.

    Args:
      objective: what is minimised without them.
      energy_fn: the energy as a function of the objective's ``params``, so where they hold several
        networks ``lambda params, x: energy(params["energy"], x)``.
      *regularizers: the penalties, at least one.
      positions: from the batch to what the energy takes, for batches that hold more.

    Returns:
      An ``Objective`` with the same carry, and the mean penalty as ``penalty`` in its metrics.

    Raises:
      ValueError: if there is no penalty.

    >>> from ebjax.types import Objective
    >>> plain = Objective(lambda key, params, batch: (), lambda p, c, k, b: (p * 0.0, (c, {})))
    >>> objective = regularized(plain, lambda params, x: params * x, energy_magnitude(1.0))
    >>> loss, (carry, metrics) = objective.loss(jnp.array(2.0), (), None, jnp.array([1.0, 3.0]))
    >>> float(loss), float(metrics["penalty"])
    (20.0, 20.0)
    """
    if not regularizers:
        raise ValueError("No regularizers were given; give at least one.")

    def loss(params, carry, keys, batch):
        value, (carry, metrics) = objective.loss(params, carry, keys, batch)
        penalty = mean_penalty(regularizers, energy_fn, params, positions(batch))
        return value + penalty, (carry, {**metrics, "penalty": penalty})

    return Objective(init=objective.init, loss=loss)

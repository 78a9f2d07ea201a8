"""Conditional noise-contrastive estimation: data against their own perturbations.

    y = perturbation of x with p_c(y | x) = p_c(x | y),    G(x, y) = E(y) - E(x)
    loss = 2 E_x E_{y|x} softplus(-G)

Which of the two is the data point? log Z cancels, no noise law is to be chosen, and the noise lies
beside the data by itself. With y = x + ε ξ and small ε the loss is 2 log 2 + (ε²/2) times that of
score matching, E[|∇E|²/2 - ΔE]: a small ε sees the slopes only, and not the weights of modes that
lie further apart than it.

Shapes: M perturbations an example.

Ceylan and Gutmann, "Conditional noise-contrastive estimation of unnormalised models", ICML 2018.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from ebjax.numerics import random_normal_like
from ebjax.objectives.noise_contrastive import join_examples
from ebjax.objectives.regularizers import Regularizer, mean_penalty
from ebjax.types import EnergyFn, Objective, Position, bind

__all__ = [
    "conditional_noise_contrastive",
    "conditional_noise_contrastive_loss",
    "gaussian_perturbation",
]


def conditional_noise_contrastive_loss(
    data_energy: jax.Array, perturbed_energy: jax.Array
) -> jax.Array:
    """``2 mean softplus(E(x) - E(y))`` of one example.

    Args:
      data_energy: [] E(x).
      perturbed_energy: [M] E(y).

    >>> round(float(conditional_noise_contrastive_loss(jnp.array(0.0), jnp.zeros(3))), 4)
    1.3863
    """
    return 2.0 * jnp.mean(jax.nn.softplus(data_energy - perturbed_energy))


def gaussian_perturbation(scale: float) -> Callable[[jax.Array, Position], Position]:
    """``(key, x) -> x + ε ξ`` with standard normal ξ, for positions of any structure.

    Args:
      scale: ε > 0, in the units of the positions. A fraction of the data's own spread.

    Raises:
      ValueError: if ε is not positive.
    """
    if not (math.isfinite(scale) and scale > 0.0):
        raise ValueError(f"scale is {scale}; it must be a positive number.")
    return bind(_add_noise, scale=scale)


def _add_noise(key, x, *, scale):
    return jax.tree.map(lambda a, b: a + scale * b, x, random_normal_like(key, x))


def conditional_noise_contrastive(
    energy_fn: EnergyFn,
    perturb: Callable[[jax.Array, Position], Position],
    *,
    num_noise: int = 1,
    regularizers: tuple[Regularizer, ...] = (),
) -> Objective:
    """Conditional noise-contrastive estimation with a symmetric perturbation.

    Args:
      energy_fn: the energy that is trained.
      perturb: ``(key, x) -> y``, as likely from x to y as from y to x: ``gaussian_perturbation``,
        or flips of random sites for discrete examples. Not checked.
      num_noise: M perturbations an example.
      regularizers: penalties ``(energy_fn, params, x) -> []`` on data and perturbations.

    Returns:
      An ``Objective`` over batches of examples, without carry; its params are those of
      ``energy_fn``. Metrics: ``accuracy`` (share of pairs in which the data point has the lower
      energy), ``energy_data`` and ``energy_gap`` (data minus perturbations).

    Raises:
      ValueError: if ``num_noise`` is not positive.

    >>> objective = conditional_noise_contrastive(
    ...     lambda params, x: 0.5 * params * jnp.sum(x**2), gaussian_perturbation(1.0)
    ... )
    >>> keys = jax.random.split(jax.random.key(0), 4)
    >>> round(float(objective.loss(0.0, (), keys, jnp.ones((4, 2)))[0]), 4)
    1.3863
    """
    if num_noise < 1:
        raise ValueError(f"num_noise is {num_noise}; it must be at least 1.")

    def draw(key, x):
        return jax.vmap(perturb, (0, None))(jax.random.split(key, num_noise), x)

    def loss(params, carry, keys, batch):
        points = jax.lax.stop_gradient(jax.vmap(draw)(keys, batch))
        both = join_examples(batch, points)
        energies = jax.vmap(energy_fn, (None, 0))(params, both)
        data, perturbed = energies[: len(keys)], energies[len(keys) :].reshape(-1, num_noise)
        value = jax.vmap(conditional_noise_contrastive_loss)(data, perturbed).mean()
        metrics = {
            "accuracy": jnp.mean(data[:, None] < perturbed),
            "energy_data": data.mean(),
            "energy_gap": data.mean() - perturbed.mean(),
        }
        if regularizers:
            metrics["penalty"] = mean_penalty(regularizers, energy_fn, params, both)
            value = value + metrics["penalty"]
        return value, (carry, metrics)

    return Objective(init=lambda key, params, batch: (), loss=loss)

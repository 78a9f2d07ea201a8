"""Losses of energy-based learning as functions of energies of right and wrong answers.

    perceptron       F(y) - min_k F_k             hinge           [m + F(y) - F(ȳ)]₊
    log              log(1 + exp(F(y) - F(ȳ)))    square-square   F(y)² + [m - F(ȳ)]₊²
    classification   σ(F(y) - F(ȳ))
    likelihood       F(y) + (1/β) log Σ_k exp(-β F_k)
    InfoNCE          the likelihood among y and sampled wrong answers

ȳ is the most offending wrong answer, the one of lowest energy. A loss is safe from collapse (one
energy for all answers) only if it pushes wrong answers up by a margin: the perceptron loss is 0 at
constant energies, all others are not.

Shapes: ``energies`` [K] of all answers to one example, ``label`` [] the index of the right one.

LeCun et al., "A tutorial on energy-based learning", 2006. van den Oord, Li and Vinyals,
"Representation learning with contrastive predictive coding", 2018.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

__all__ = [
    "classification_error_loss",
    "energies_of_answers",
    "hinge_loss",
    "info_nce_loss",
    "likelihood_loss",
    "log_loss",
    "perceptron_loss",
    "square_square_loss",
]


def energies_of_answers(energies: jax.Array, label: jax.Array) -> tuple[jax.Array, jax.Array]:
    """([], []) the energy of the right answer, and of the most offending wrong one.

    >>> right, wrong = energies_of_answers(jnp.array([3.0, 1.0, 2.0]), 1)
    >>> float(right), float(wrong)
    (1.0, 2.0)
    """
    is_right = jnp.arange(energies.shape[-1]) == label
    return energies[label], jnp.where(is_right, jnp.inf, energies).min()


def perceptron_loss(energies: jax.Array, label: jax.Array) -> jax.Array:
    """``F(y) - min_k F_k``, 0 where the right answer is the lowest; no margin.

    >>> float(perceptron_loss(jnp.array([3.0, 1.0]), 0))
    2.0
    """
    return energies[label] - energies.min()


def hinge_loss(energies: jax.Array, label: jax.Array, *, margin: float = 1.0) -> jax.Array:
    """``[m + F(y) - F(ȳ)]₊``.

    >>> float(hinge_loss(jnp.array([3.0, 1.0]), 1, margin=2.5))
    0.5
    """
    right, wrong = energies_of_answers(energies, label)
    return jax.nn.relu(margin + right - wrong)


def log_loss(energies: jax.Array, label: jax.Array) -> jax.Array:
    """``log(1 + exp(F(y) - F(ȳ)))``, a hinge without a corner.

    >>> round(float(log_loss(jnp.array([0.0, 0.0]), 1)), 4)
    0.6931
    """
    right, wrong = energies_of_answers(energies, label)
    return jax.nn.softplus(right - wrong)


def square_square_loss(energies: jax.Array, label: jax.Array, *, margin: float = 1.0) -> jax.Array:
    """``F(y)² + [m - F(ȳ)]₊²``, for energies that are at least 0.

    >>> float(square_square_loss(jnp.array([3.0, 0.5]), 0))
    9.25
    """
    right, wrong = energies_of_answers(energies, label)
    return jnp.square(right) + jnp.square(jax.nn.relu(margin - wrong))


def classification_error_loss(energies: jax.Array, label: jax.Array) -> jax.Array:
    """``σ(F(y) - F(ȳ))``, a smooth count of errors (minimum classification error).

    >>> float(classification_error_loss(jnp.array([0.0, 0.0]), 1))
    0.5
    """
    right, wrong = energies_of_answers(energies, label)
    return jax.nn.sigmoid(right - wrong)


def likelihood_loss(
    energies: jax.Array, label: jax.Array | int, *, inverse_temperature: float | jax.Array = 1.0
) -> jax.Array:
    """``F(y) + (1/β) log Σ_k exp(-β F_k)``, minus log p(y | x) over β.

    >>> round(float(likelihood_loss(jnp.array([1.0, 1.0]), 1)), 4)
    0.6931
    """
    beta = inverse_temperature
    return energies[label] + jax.nn.logsumexp(-beta * energies) / beta


def info_nce_loss(
    positive: jax.Array, negatives: jax.Array, *, inverse_temperature: float | jax.Array = 1.0
) -> jax.Array:
    """The likelihood loss of the right answer among N sampled wrong ones.

    Args:
      positive: [] F(y).
      negatives: [N] energies of wrong answers.
      inverse_temperature: β > 0.

    >>> round(float(info_nce_loss(jnp.array(0.0), jnp.zeros(3))), 4)
    1.3863
    """
    energies = jnp.concatenate([positive[None], negatives])
    return likelihood_loss(energies, 0, inverse_temperature=inverse_temperature)

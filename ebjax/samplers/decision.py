"""The decision of Metropolis and Hastings, taken once for all that hangs on it.

    accept where u < exp(log a),   u uniform on (0, 1)

A step selects many arrays by one decision: the position, its energy, its gradient. XLA may compute
a cheap decision anew in each loop that selects by it, and may round differently there (a product
and a sum become one operation or stay two). Where log u and log a are equal but for rounding, a
chain would then have the position of the proposal and the energy of its start, and would hold on to
it for as long as that energy is too low. An exponential is dear enough to be computed once, and
comparing it with u rounds nothing.
"""

from __future__ import annotations

from typing import TypeVar

import jax
import jax.numpy as jnp

__all__ = ["metropolis", "select"]

T = TypeVar("T")


def metropolis(uniform: jax.Array, log_acceptance: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Whether to accept, and with which probability.

    Args:
      uniform: [...] on (0, 1).
      log_acceptance: [...] log a; NaN is rejected.

    Returns:
      ``(is_accepted, acceptance_rate)``, both [...]; the rate is min(1, a), and 0 for NaN.

    >>> [x.tolist() for x in metropolis(jnp.array([0.4, 0.4]), jnp.log(jnp.array([0.5, 0.25])))]
    [[True, False], [0.5, 0.25]]
    """
    is_nan = jnp.isnan(log_acceptance)
    rate = jnp.exp(jnp.where(is_nan, -jnp.inf, jnp.minimum(log_acceptance, 0.0)))
    return uniform < rate, rate


def select(is_new: jax.Array, new: T, old: T) -> T:
    """Each leaf of ``new`` or of ``old``, by one decision []."""
    return jax.tree.map(lambda a, b: jnp.where(is_new, a, b), new, old)

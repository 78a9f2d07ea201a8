"""Losses of a residual δ, all equal to δ² near 0 and different in their tails.

    squared        δ²
    huber          δ² up to a threshold h, 2 h |δ| - h² beyond
    log_cosh       2 log cosh δ, twice the absolute value in the tails
    shifted_cosh   2 (cosh δ - 1), exponential in both tails
    linex          2 (e^{a δ} - a δ - 1) / a², exponential on one side and linear on the other

The minimum of each is δ = 0, so the flow that is learned is the same; the tails say what is done
about trajectories that are still far from it. With linex and a > 0, P_F that is too large for the
reward is punished most, which seeks modes; with a < 0, P_F too small, which covers them.

Hu et al., "Beyond squared error: exploring loss design for enhanced training of generative flow
networks", ICLR 2025.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

__all__ = ["ResidualLoss", "huber", "linex", "log_cosh", "shifted_cosh", "squared"]

ResidualLoss = Callable[[jax.Array], jax.Array]


def squared(residual: jax.Array) -> jax.Array:
    """``δ²``."""
    return jnp.square(residual)


def huber(threshold: float = 1.0) -> ResidualLoss:
    """Quadratic up to ``threshold`` > 0 and linear beyond.

    >>> huber(1.0)(jnp.array([0.5, -3.0])).tolist()
    [0.25, 5.0]
    """
    if not threshold > 0:
        raise ValueError(f"threshold is {threshold}; it must be positive.")

    def loss(residual):
        size = jnp.abs(residual)
        within = jnp.minimum(size, threshold)
        return jnp.square(within) + 2.0 * threshold * (size - within)

    return loss


def log_cosh(residual: jax.Array) -> jax.Array:
    """``2 log cosh δ``, without overflow.

    >>> float(log_cosh(jnp.array(0.0)))
    0.0
    """
    return 2.0 * (jnp.logaddexp(residual, -residual) - math.log(2.0))


def shifted_cosh(residual: jax.Array) -> jax.Array:
    """``2 (cosh δ - 1)``; overflows where |δ| is above 88 in single precision."""
    return 4.0 * jnp.square(jnp.sinh(0.5 * residual))


def linex(slope: float = 1.0) -> ResidualLoss:
    """Exponential in ``slope * δ``; start with log Z near its value, or the loss overflows."""
    if slope == 0 or not math.isfinite(slope):
        raise ValueError(f"slope is {slope}; it must be finite and not 0.")

    def loss(residual):
        return 2.0 * (jnp.expm1(slope * residual) - slope * residual) / slope**2

    return loss

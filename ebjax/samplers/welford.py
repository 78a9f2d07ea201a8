"""Running mean and covariance by Welford's recursion, a batch at a time, mergeable.

    mean <- mean + (b / n) (batch mean - mean)
    scatter <- scatter + batch scatter + (a b / n) (batch mean - mean)(batch mean - mean)'

for ``a`` points so far, ``b`` new ones and ``n = a + b``: sums of squares about the mean are never
differences of large numbers. ``covariance = scatter / (n - 1)``.

Welford, "Note on a method for calculating corrected sums of squares and products", Technometrics 4
(1962). Chan, Golub and LeVeque, "Updating formulae and a pairwise algorithm for computing sample
variances", COMPSTAT 1982.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ebjax.numerics import full_precision_matmul

__all__ = [
    "WelfordState",
    "shrunk_covariance",
    "welford_final",
    "welford_gather",
    "welford_init",
    "welford_merge",
    "welford_update",
]


class WelfordState(NamedTuple):
    """Moments of the points so far.

    Attributes:
      num_points: [] how many.
      mean: [D].
      scatter: sum of squares about the mean, [D] or with products [D, D].
    """

    num_points: jax.Array
    mean: jax.Array
    scatter: jax.Array


def welford_init(size: int, *, is_dense: bool = False, dtype: Any = jnp.float32) -> WelfordState:
    """No points yet, of ``size`` components each."""
    shape = (size, size) if is_dense else (size,)
    return WelfordState(jnp.zeros((), dtype), jnp.zeros(size, dtype), jnp.zeros(shape, dtype))


def welford_update(state: WelfordState, points: jax.Array) -> WelfordState:
    """Adds ``points``, [D] or a batch of them [B, D].

    >>> state = welford_update(welford_init(1), jnp.array([[1.0], [2.0]]))
    >>> state = welford_update(state, jnp.array([6.0]))
    >>> state.mean.tolist(), welford_final(state).tolist()
    ([3.0], [7.0])
    """
    points = jnp.atleast_2d(points)
    mean = points.mean(axis=0)
    centred = points - mean
    if state.scatter.ndim == 1:
        scatter = jnp.square(centred).sum(axis=0)
    else:
        scatter = full_precision_matmul(centred.T, centred)
    count = jnp.asarray(len(points), state.num_points.dtype)
    return welford_merge(state, WelfordState(count, mean, scatter))


def welford_merge(first: WelfordState, second: WelfordState) -> WelfordState:
    """The state of the points of both, such as those of two chains or devices."""
    count = first.num_points + second.num_points
    difference = second.mean - first.mean
    # Both may be empty.
    share = second.num_points / jnp.maximum(count, 1.0)
    if first.scatter.ndim == 1:
        squares = jnp.square(difference)
    else:
        squares = jnp.outer(difference, difference)
    scatter = first.scatter + second.scatter + first.num_points * share * squares
    return WelfordState(count, first.mean + share * difference, scatter)


def welford_gather(state: WelfordState, axis_name: str | None) -> WelfordState:
    """The state of the points of all devices, by sums over ``axis_name``; as it is for ``None``."""
    if axis_name is None:
        return state
    count = jax.lax.psum(state.num_points, axis_name)
    mean = jax.lax.psum(state.num_points * state.mean, axis_name) / jnp.maximum(count, 1.0)
    difference = state.mean - mean
    if state.scatter.ndim == 1:
        squares = jnp.square(difference)
    else:
        squares = jnp.outer(difference, difference)
    scatter = jax.lax.psum(state.scatter + state.num_points * squares, axis_name)
    return WelfordState(count, mean, scatter)


def welford_final(state: WelfordState) -> jax.Array:
    """The covariance with divisor n - 1, [D] (its diagonal) or [D, D]; NaN below two points."""
    return state.scatter / jnp.where(state.num_points > 1.0, state.num_points - 1.0, jnp.nan)


def shrunk_covariance(state: WelfordState) -> jax.Array:
    """The covariance pulled towards a small multiple of the identity, as Stan does.

        n / (n + 5) covariance + 5 / (n + 5) 10⁻³ I

    Positive definite also where there are fewer points than components.
    """
    weight = state.num_points / (state.num_points + 5.0)
    target = 1e-3 if state.scatter.ndim == 1 else 1e-3 * jnp.eye(len(state.mean))
    shrunk = weight * welford_final(state) + (1.0 - weight) * target
    return shrunk.astype(state.scatter.dtype)

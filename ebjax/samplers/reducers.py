"""Folds over the positions of a chain, for runs that are too long to keep.

    accumulator <- update(accumulator, position)         result(accumulator) at the end

Each is a ``Reducer`` of one chain, passed to ``sample(..., reducers={"name": ...})``.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

from ebjax.samplers.run import Reducer
from ebjax.samplers.welford import WelfordState, welford_final, welford_init, welford_update
from ebjax.types import Position, PyTree, bind

__all__ = ["StreamingMoments", "expectation", "fold", "histogram", "moments", "pool_moments"]


class StreamingMoments(NamedTuple):
    """First two moments of the positions, raveled to [D].

    Attributes:
      num_points: [] how many.
      mean: [D].
      covariance: [D] variances or [D, D], with the divisor n - 1; NaN for one position.
    """

    num_points: jax.Array
    mean: jax.Array
    covariance: jax.Array


def moments(*, dense: bool = False) -> Reducer:
    """Mean and variances (or, if ``dense``, the covariance matrix) of the position, raveled.

    >>> import jax, jax.numpy as jnp
    >>> from ebjax.samplers import mala, sample
    >>> draws = sample(jax.random.key(0), mala(step_size=0.5), lambda p, x: 0.5 * jnp.sum(x**2),
    ...                (), jnp.zeros((100, 2)), num_samples=500, keep_positions=False,
    ...                reducers={"moments": moments()})
    >>> pooled = pool_moments(draws.reduced["moments"])
    >>> int(pooled.num_points), bool(jnp.all(abs(pooled.covariance - 1.0) < 0.1))
    (50000, True)
    """
    return Reducer(
        init=bind(_no_moments, dense=dense), update=bind(_add_to_moments), result=bind(_moments)
    )


def _no_moments(position: Position, *, dense: bool) -> WelfordState:
    flat, _ = ravel_pytree(position)
    return welford_init(flat.size, is_dense=dense, dtype=flat.dtype)


def _add_to_moments(state: WelfordState, position: Position) -> WelfordState:
    return welford_update(state, ravel_pytree(position)[0])


def _moments(state: WelfordState) -> StreamingMoments:
    return StreamingMoments(state.num_points, state.mean, welford_final(state))


def pool_moments(reduced: StreamingMoments) -> StreamingMoments:
    """Moments of the union of several chains, from theirs [C, ...]."""
    total = reduced.num_points.sum()
    contract = functools.partial(jnp.einsum, precision="highest")
    mean = contract("c,cd->d", reduced.num_points, reduced.mean) / total
    apart = reduced.mean - mean
    products = "c,ci,cj->ij" if reduced.covariance.ndim == 3 else "c,ci,ci->i"
    between = contract(products, reduced.num_points, apart, apart)
    within = contract("c,c...->...", reduced.num_points - 1, reduced.covariance)
    return StreamingMoments(total, mean, (within + between) / (total - 1))


def expectation(function: Callable[[Position], PyTree]) -> Reducer:
    """Mean of ``function(position)``, any pytree of arrays."""
    return Reducer(
        init=bind(_no_mean, function=function),
        update=bind(_add_to_mean, function=function),
        result=bind(_second),
    )


def _no_mean(position, *, function):
    # From values and not from shapes: zeros are then typed as the position within `shard_map`.
    return jnp.zeros(()), jax.tree.map(lambda v: jnp.zeros_like(v, _float(v)), function(position))


def _add_to_mean(state, position, *, function):
    count, mean = state
    count = count + 1
    mean = jax.tree.map(lambda m, v: m + (v - m) / count.astype(m.dtype), mean, function(position))
    return count, mean


def _second(state):
    return state[1]


def _float(value):
    return jnp.promote_types(jnp.result_type(value), jnp.float32)


def histogram(low: float, high: float, num_bins: int) -> Reducer:
    """Counts of each component of the position in equal bins on [low, high).

    The result has the position's structure, with leaves [..., num_bins + 2] int32: below, the
    bins, and at or above ``high``; NaN counts nowhere.

    Raises:
      ValueError: if the range is empty or there is no bin.
    """
    if not low < high or num_bins < 1:
        raise ValueError(
            f"low is {low}, high is {high} and num_bins is {num_bins}; low must be below high, "
            "and there must be at least one bin."
        )
    options = {"low": low, "high": high, "num_bins": num_bins}
    return Reducer(init=bind(_no_counts, num_bins=num_bins), update=bind(_count, **options))


def _no_counts(position: Position, *, num_bins: int) -> PyTree:
    return jax.tree.map(lambda x: jnp.zeros((*jnp.shape(x), num_bins + 2), jnp.int32), position)


def _count(counts, position, *, low, high, num_bins):
    def add(counts, x):
        place = jnp.floor((x - low) * (num_bins / (high - low))).astype(jnp.int32)
        place = jnp.where(x < low, -1, jnp.where(x >= high, num_bins, jnp.clip(place, 0, num_bins)))
        return (
            counts + ((place + 1)[..., None] == jnp.arange(num_bins + 2)) * ~jnp.isnan(x)[..., None]
        )

    return jax.tree.map(add, counts, position)


def fold(update: Callable[[Any, Position], Any], initial: PyTree) -> Reducer:
    """Any fold of one's own: ``accumulator = update(accumulator, position)`` from ``initial``.

    >>> longest = fold(lambda peak, x: jnp.maximum(peak, jnp.max(x)), -jnp.inf)
    """
    return Reducer(init=bind(_initial, initial=initial), update=update)


def _initial(position, *, initial):
    del position
    return jax.tree.map(jnp.asarray, initial)

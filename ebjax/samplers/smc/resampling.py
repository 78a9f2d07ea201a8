"""Resampling: N ancestors drawn so that particle i has M w_i / Σ w offspring on average.

    multinomial   M independent draws
    stratified    one uniform in each of M equal strata of the cumulative weight
    systematic    the same uniform in each stratum
    residual      floor(M w_i / Σ w) copies of i, the rest multinomial from what remains

All are unbiased; the last three give every particle its mean number of offspring up to less than
one (residual: at least its floor), and so less variance than the first. Weights are unnormalised
and logarithmic. -inf (and NaN) is no weight at all: such a particle has no offspring, unless all
are so, and then all are equal.

Douc, Cappé and Moulines, "Comparison of resampling schemes for particle filtering", ISPA 2005.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from ebjax.types import PyTree

__all__ = [
    "RESAMPLERS",
    "conditional_effective_sample_size",
    "effective_sample_size",
    "log_mean_exp",
    "multinomial",
    "residual",
    "stratified",
    "systematic",
]


def log_mean_exp(log_weights: jax.Array) -> jax.Array:
    """[] ``log (1/N) Σ exp(log_weights)`` of [N]; -inf where all are."""
    return jax.nn.logsumexp(log_weights) - jnp.log(jnp.array(log_weights.size, log_weights.dtype))


def effective_sample_size(log_weights: jax.Array) -> jax.Array:
    """[] ``(Σ w)² / Σ w²`` in [1, N]; 0 where no weight is positive.

    >>> float(effective_sample_size(jnp.zeros(4)).round(4))
    4.0
    """
    log_weights = _relative(log_weights)
    weights = jnp.exp(log_weights)
    return _ratio(jnp.square(jnp.sum(weights)), jnp.sum(jnp.square(weights)))


def conditional_effective_sample_size(
    log_weights: jax.Array, log_increments: jax.Array
) -> jax.Array:
    """[] ``N (Σ W u)² / Σ W u²`` in [0, N], with W = w / Σ w and the increments u.

    The effective size that N equal particles would keep if they were weighted by u: how far the
    next law is from this one, whatever the weights already are. It falls from N to 0 as the laws
    part, so the largest step with a value of at least a N is where it crosses a N from above.

    Zhou, Johansen and Aston, "Toward automatic model comparison: an adaptive sequential Monte
    Carlo approach", Journal of Computational and Graphical Statistics 25 (2016).

    Args:
      log_weights: [N] log w before the increments, unnormalised.
      log_increments: [N] log u.
    """
    weights = jnp.exp(_relative(log_weights))
    increments = jnp.exp(_relative(jnp.where(weights > 0.0, log_increments, -jnp.inf)))
    first = jnp.sum(weights * increments)
    second = jnp.sum(weights * jnp.square(increments))
    return log_weights.size * _ratio(jnp.square(first), second * jnp.sum(weights))


def _relative(log_weights: jax.Array) -> jax.Array:
    """Log weights over the largest of them; all -inf where none is above -inf."""
    log_weights = jnp.where(jnp.isnan(log_weights), -jnp.inf, log_weights)
    peak = jnp.max(log_weights)
    return jnp.where(jnp.isfinite(peak), log_weights - peak, log_weights)


def _ratio(above: jax.Array, below: jax.Array) -> jax.Array:
    return jnp.where(below > 0.0, above / jnp.where(below > 0.0, below, 1.0), 0.0)


def _weights(log_weights: jax.Array) -> jax.Array:
    """Weights with a largest of 1; equal where all log weights are -inf."""
    log_weights = jnp.where(jnp.isnan(log_weights), -jnp.inf, log_weights)
    peak = jnp.max(log_weights)
    # The comparison makes inf - inf a weight of 1.
    return jnp.exp(jnp.where(log_weights == peak, 0.0, log_weights - peak))


def _inverse_cdf(weights: jax.Array, heights: jax.Array) -> jax.Array:
    """The particle that holds each height of the cumulative weight, heights in [0, 1]."""
    cumulative = jnp.cumsum(weights)
    index = jnp.searchsorted(cumulative, heights * cumulative[-1], side="right", method="scan")
    # Rounding can put the top height on the total; the particle there must have a weight.
    last = weights.size - 1 - jnp.argmax(weights[::-1] > 0.0)
    return jnp.minimum(index, last).astype(jnp.int32)


def _uniform(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    return jax.random.uniform(key, shape, dtype)


def multinomial(key: jax.Array, log_weights: jax.Array, num: int | None = None) -> jax.Array:
    """Ancestors drawn independently with probabilities w / Σ w.

    Args:
      key: [] key, consumed.
      log_weights: [N], unnormalised.
      num: M, ancestors to draw; N by default.

    Returns:
      [M] int32 in [0, N).
    """
    num = log_weights.size if num is None else num
    return _inverse_cdf(_weights(log_weights), _uniform(key, (num,), log_weights.dtype))


def stratified(key: jax.Array, log_weights: jax.Array, num: int | None = None) -> jax.Array:
    """Ancestors at the heights (k + u_k) / M of the cumulative weight; see ``multinomial``."""
    num = log_weights.size if num is None else num
    uniforms = _uniform(key, (num,), log_weights.dtype)
    return _inverse_cdf(_weights(log_weights), _strata(uniforms, num))


def systematic(key: jax.Array, log_weights: jax.Array, num: int | None = None) -> jax.Array:
    """Ancestors at the heights (k + u) / M of the cumulative weight; see ``multinomial``.

    >>> systematic(jax.random.key(0), jnp.log(jnp.array([0.5, 0.0, 0.25, 0.25]))).tolist()
    [0, 0, 2, 3]
    """
    num = log_weights.size if num is None else num
    return _inverse_cdf(_weights(log_weights), _strata(_uniform(key, (), log_weights.dtype), num))


def _strata(uniforms: jax.Array, num: int) -> jax.Array:
    return (jnp.arange(num, dtype=uniforms.dtype) + uniforms) / num


def residual(key: jax.Array, log_weights: jax.Array, num: int | None = None) -> jax.Array:
    """``floor(M W_i)`` copies of each particle and the rest multinomial; see ``multinomial``."""
    num = log_weights.size if num is None else num
    weights = _weights(log_weights)
    expected = num * weights / jnp.sum(weights)
    copies = jnp.floor(expected)
    slots = jnp.arange(num)
    certain = jnp.cumsum(copies.astype(jnp.int32))
    kept = jnp.searchsorted(certain, slots, side="right", method="scan").astype(jnp.int32)
    remaining = expected - copies
    # Only read where something remains, so its value where nothing does is free.
    remaining = jnp.where(jnp.any(remaining > 0.0), remaining, weights)
    drawn = _inverse_cdf(remaining, _uniform(key, (num,), log_weights.dtype))
    return jnp.where(slots < certain[-1], kept, drawn)


RESAMPLERS: dict[str, Callable[..., PyTree]] = {
    "multinomial": multinomial,
    "stratified": stratified,
    "systematic": systematic,
    "residual": residual,
}

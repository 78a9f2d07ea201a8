"""A mixture of Gaussians whose means and weights are parameters, unnormalised.

    E(x) = -log Σ_k exp(l_k - |x - m_k|² / (2σ²)),    l_1 = 0
    log Z = log Σ_k exp(l_k) + (D / 2) log(2πσ²),     share of component k: softmax(l)_k

With log Z and draws known it is the test bed of objectives that do without them: a loss that cannot
see how mass is shared between far modes leaves l where it started.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from ebjax.types import EnergyFn, Position

__all__ = ["LearnedMixture", "LearnedMixtureParams", "learned_gaussian_mixture"]


class LearnedMixtureParams(NamedTuple):
    """``means`` m [K, D] and ``log_weights`` [K-1], those of the components after the first."""

    means: jax.Array
    log_weights: jax.Array


class LearnedMixture(NamedTuple):
    """An ``Energy`` that knows its own law.

    Attributes:
      init: ``(key, x) -> params``.
      apply: the energy.
      log_z: ``params -> []``.
      sample: ``(key, params) -> x``, one exact draw.
      shares: ``params -> [K]``, the probability of each component.
    """

    init: Callable[[jax.Array, Position], LearnedMixtureParams]
    apply: EnergyFn
    log_z: Callable[[LearnedMixtureParams], jax.Array]
    sample: Callable[[jax.Array, LearnedMixtureParams], jax.Array]
    shares: Callable[[LearnedMixtureParams], jax.Array]


def learned_gaussian_mixture(
    num_components: int, *, standard_deviation: float = 1.0, scale: float = 0.1
) -> LearnedMixture:
    """Builds the energy on R^D.

    Args:
      num_components: K, at least 1.
      standard_deviation: σ > 0, shared and fixed.
      scale: standard deviation of the initial means, which are drawn about zero; equal weights.

    Raises:
      ValueError: naming the argument that is out of range.

    >>> mixture = learned_gaussian_mixture(2)
    >>> params = LearnedMixtureParams(jnp.array([[-1.0], [1.0]]), jnp.log(jnp.array([3.0])))
    >>> mixture.shares(params).round(2).tolist(), round(float(mixture.log_z(params)), 4)
    ([0.25, 0.75], 2.3052)
    """
    if num_components < 1:
        raise ValueError(f"num_components is {num_components}; it must be at least 1.")
    for name, number in (("standard_deviation", standard_deviation), ("scale", scale)):
        if not (math.isfinite(number) and number > 0.0):
            raise ValueError(f"{name} is {number}; it must be positive.")
    variance = standard_deviation**2

    def init(key, x):
        means = scale * jax.random.normal(key, (num_components, jnp.size(x)))
        return LearnedMixtureParams(means, jnp.zeros(num_components - 1))

    def all_log_weights(params):
        later = jnp.asarray(params.log_weights)
        return jnp.concatenate([jnp.zeros(1, later.dtype), later])

    def apply(params, x):
        squares = jnp.sum(jnp.square(x - params.means), axis=-1)
        return -jax.nn.logsumexp(all_log_weights(params) - squares / (2.0 * variance))

    def log_z(params):
        dim = params.means.shape[1]
        log_volume = 0.5 * dim * math.log(2.0 * math.pi * variance)
        return jax.nn.logsumexp(all_log_weights(params)) + log_volume

    def sample(key, params):
        component_key, noise_key = jax.random.split(key)
        component = jax.random.categorical(component_key, all_log_weights(params))
        means = jnp.asarray(params.means)
        noise = jax.random.normal(noise_key, means.shape[1:], means.dtype)
        return means[component] + standard_deviation * noise

    return LearnedMixture(
        init, apply, log_z, sample, lambda params: jax.nn.softmax(all_log_weights(params))
    )

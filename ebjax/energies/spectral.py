"""Spectral normalisation: every weight matrix divided by its largest singular value.

    W <- c W / σ_1(W),    σ_1 = u' W v,    u and v by power iteration, constants

An energy of such layers and of activations with slope at most s has a slope of at most (c s)^L,
L layers deep: it cannot build cliffs that a sampler falls off. Neither can it be steep where the
data's law is: with c = 1 a network's energies differ by no more than the distance of the points
(times s^L), so give the energy a temperature, or c > 1.

σ_1 is computed from the weights at every call, and from nothing else: no vectors that lag behind
the weights, and nothing to carry. The iteration costs two products with W a step, independent of
the batch. Inside a sampler, normalise once, outside of the loop: ``spectral_normalize(params)``
before the objective's loss (``normalized_objective`` does that).

A kernel of a convolution [height, width, in, out] is normalised as the matrix [height width in,
out]; the norm of the convolution itself is between that and sqrt(height width) times that.

Miyato et al., "Spectral normalization for generative adversarial networks", ICLR 2018.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from ebjax.types import Energy, Objective, Params, bind

__all__ = [
    "is_matrix",
    "largest_singular_value",
    "normalized_objective",
    "spectral_normalize",
    "spectrally_normalized",
]

_NUM_ITERATIONS = 30


def largest_singular_value(
    matrix: jax.Array, *, num_iterations: int = _NUM_ITERATIONS
) -> jax.Array:
    """[] σ_1 of ``matrix`` [..., N], all axes but the last taken together.

    From below: an iteration of n steps misses components whose singular value is above about
    (1 - 1/n) σ_1, which changes the estimate by less than that. Its gradient is u v', that of σ_1
    where the vectors have converged.

    Args:
      matrix: at least two axes.
      num_iterations: n >= 1.

    >>> round(float(largest_singular_value(jnp.diag(jnp.array([1.0, 3.0, 2.0])))), 4)
    3.0
    """
    flat = matrix.reshape(-1, matrix.shape[-1])
    constant = jax.lax.stop_gradient(flat)
    # Always the same start: a function of the matrix alone. Random, so in no special direction.
    start = jax.random.normal(jax.random.key(0), constant.shape[1:], constant.dtype)

    def body(_, right):
        left = _unit(constant @ right)
        return _unit(constant.T @ left)

    right = jax.lax.fori_loop(0, num_iterations, body, _unit(start))
    left = _unit(constant @ right)
    return left @ flat @ right


def _unit(vector: jax.Array) -> jax.Array:
    """The vector over its norm; zero stays zero."""
    norm = jnp.linalg.norm(vector)
    return vector / jnp.where(norm > 0.0, norm, 1.0)


def is_matrix(path: tuple[Any, ...], leaf: Any) -> bool:
    """Whether a leaf is a weight matrix: two axes or more (biases and scales have one)."""
    del path
    return jnp.ndim(leaf) >= 2


def spectral_normalize(
    params: Params,
    *,
    bound: float = 1.0,
    num_iterations: int = _NUM_ITERATIONS,
    select: Callable[[tuple[Any, ...], Any], bool] = is_matrix,
) -> Params:
    """Every selected leaf scaled to the largest singular value ``bound``; gradients flow through.

    A leaf that is zero stays zero.

    Args:
      params: any tree of arrays.
      bound: c > 0.
      num_iterations: of the power iteration, at least 1.
      select: ``(path, leaf) -> bool``, with the path of ``jax.tree_util``; matrices by default.

    Returns:
      A tree as ``params``.

    Raises:
      ValueError: naming the option that is out of range.

    >>> params = {"kernel": 5.0 * jnp.eye(3), "bias": jnp.full(3, 7.0)}
    >>> normal = spectral_normalize(params, bound=2.0)
    >>> round(float(normal["kernel"][0, 0]), 4), float(normal["bias"][0])
    (2.0, 7.0)
    """
    _check(bound, num_iterations)

    def normalize(path, leaf):
        if not select(path, leaf):
            return leaf
        sigma = largest_singular_value(leaf, num_iterations=num_iterations)
        return leaf * (bound / jnp.where(sigma > 0.0, sigma, 1.0))

    return jax.tree_util.tree_map_with_path(normalize, params)


def _check(bound: float, num_iterations: int) -> None:
    if not (math.isfinite(bound) and bound > 0.0):
        raise ValueError(f"bound is {bound}; a singular value is a finite positive number.")
    if num_iterations < 1:
        raise ValueError(f"num_iterations is {num_iterations}; it must be at least 1.")


def spectrally_normalized(energy: Energy, **options: Any) -> Energy:
    """The energy of normalised weights; its params are those of ``energy``, not normalised.

    Args:
      energy: any parametric energy.
      **options: of ``spectral_normalize``.

    Returns:
      An ``Energy``.

    Raises:
      ValueError: naming the option that is out of range.

    >>> from ebjax.energies.networks import mlp_energy
    >>> energy = spectrally_normalized(mlp_energy((16,)))
    >>> params = energy.init(jax.random.key(0), jnp.zeros(2))
    >>> larger = jax.tree.map(lambda leaf: 10.0 * leaf if leaf.ndim == 2 else leaf, params)
    >>> bool(abs(energy.apply(larger, jnp.ones(2)) - energy.apply(params, jnp.ones(2))) < 1e-5)
    True
    """
    _check(options.get("bound", 1.0), options.get("num_iterations", _NUM_ITERATIONS))
    return Energy(energy.init, bind(_apply, energy_fn=energy.apply, **options))


def _apply(params, x, *context, energy_fn, **options):
    return energy_fn(spectral_normalize(params, **options), x, *context)


def normalized_objective(
    objective: Objective, *, name: str | None = None, **options: Any
) -> Objective:
    """The objective at normalised weights, computed once an update and not at every energy.

    Build ``objective`` with the plain energy. What is trained are the weights before they are
    normalised; samplers and evaluations outside of training take ``spectral_normalize(params)``.

    Args:
      objective: what is minimised.
      name: the entry of a ``params`` dict that holds the energy, where it holds other networks too.
      **options: of ``spectral_normalize``.

    Returns:
      An ``Objective`` with the same carry.

    Raises:
      ValueError: naming the option that is out of range.
    """
    _check(options.get("bound", 1.0), options.get("num_iterations", _NUM_ITERATIONS))

    def normalize(params):
        if name is None:
            return spectral_normalize(params, **options)
        return {**params, name: spectral_normalize(params[name], **options)}

    def loss(params, carry, keys, batch):
        return objective.loss(normalize(params), carry, keys, batch)

    def init(key, params, batch):
        return objective.init(key, normalize(params), batch)

    return Objective(init=init, loss=loss)

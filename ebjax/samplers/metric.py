"""Euclidean metrics: the inverse mass matrix M⁻¹ of Hamiltonian and preconditioned samplers.

    M⁻¹ = I, diag(v) or a dense matrix, over the position raveled to [D] (``jax.flatten_util``)
    p = M^½ ξ,   velocity = M⁻¹ p,   kinetic energy = p' M⁻¹ p / 2,   ξ ~ N(0, I)

M⁻¹ is best near the covariance of the law. ``factor`` holds a square root F of it, M⁻¹ = F F',
made once and not at every step.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
from jax.flatten_util import ravel_pytree

from ebjax.numerics import full_precision_matmul, inner_product
from ebjax.types import Position, PyTree

__all__ = [
    "Metric",
    "kinetic_energy",
    "make_metric",
    "momentum",
    "scaled_gradient",
    "scaled_noise",
    "velocity",
]


class Metric(NamedTuple):
    """M⁻¹ and its root: both ``None`` (identity), [D] (diagonal) or [D, D] (dense, lower)."""

    inverse_mass: jax.Array | None
    factor: jax.Array | None


def make_metric(inverse_mass: npt.ArrayLike | None) -> Metric:
    """Builds the metric; may be traced.

    Args:
      inverse_mass: ``None`` for the identity, the diagonal [D], or a matrix [D, D], symmetric and
        positive definite.

    Raises:
      ValueError: if it is no vector and no square matrix, or its values, where they are known, are
        not those of an inverse mass.
    """
    if inverse_mass is None:
        return Metric(None, None)
    if not isinstance(inverse_mass, jax.core.Tracer):
        _check_values(np.asarray(inverse_mass))
    inverse_mass = jnp.asarray(inverse_mass)
    if inverse_mass.ndim == 1:
        return Metric(inverse_mass, jnp.sqrt(inverse_mass))
    if inverse_mass.ndim == 2 and inverse_mass.shape[0] == inverse_mass.shape[1]:
        return Metric(inverse_mass, jnp.linalg.cholesky(inverse_mass))
    raise ValueError(
        f"inverse_mass has shape {inverse_mass.shape}; it must be a diagonal [D] or a matrix "
        "[D, D], with D the number of components of the position."
    )


def _check_values(inverse_mass: np.ndarray) -> None:
    values = inverse_mass.astype(np.float64)
    if values.ndim == 1 and not np.all((values > 0.0) & np.isfinite(values)):
        raise ValueError(
            "inverse_mass has components that are not all positive and finite; a diagonal must be."
        )
    if values.ndim == 2 and values.shape[0] == values.shape[1]:
        # Covariances that were estimated in float32 are symmetric to its precision only.
        if not np.allclose(values, values.T, rtol=1e-4, atol=1e-6 * np.abs(values).max()):
            raise ValueError("inverse_mass is not symmetric; a matrix must be.")
        if not np.linalg.eigvalsh(values).min() > 0.0:
            raise ValueError("inverse_mass is not positive definite; a matrix must be.")


def _on_flat(function, tree: PyTree) -> PyTree:
    flat, unravel = ravel_pytree(tree)
    return unravel(function(flat).astype(flat.dtype))


def _check(metric: Metric, tree: PyTree) -> None:
    size = sum(jnp.size(leaf) for leaf in jax.tree.leaves(tree))
    if metric.inverse_mass is not None and metric.inverse_mass.shape[0] != size:
        raise ValueError(
            f"inverse_mass has shape {metric.inverse_mass.shape}, but the position has {size} "
            "components."
        )


def velocity(metric: Metric, vector: Position) -> Position:
    """``M⁻¹ p``, for a momentum or a gradient as ``vector``."""
    _check(metric, vector)
    if metric.inverse_mass is None:
        return vector
    if metric.inverse_mass.ndim == 1:
        return _on_flat(lambda p: metric.inverse_mass * p, vector)
    return _on_flat(lambda p: full_precision_matmul(metric.inverse_mass, p), vector)


def momentum(metric: Metric, noise: Position) -> Position:
    """``M^½ ξ``: a momentum ~ N(0, M) from standard normal ``noise``."""
    _check(metric, noise)
    if metric.factor is None:
        return noise
    if metric.factor.ndim == 1:
        return _on_flat(lambda xi: xi / metric.factor, noise)
    solve = jax.scipy.linalg.solve_triangular
    return _on_flat(lambda xi: solve(metric.factor, xi, trans="T", lower=True), noise)


def scaled_noise(metric: Metric, noise: Position) -> Position:
    """``F ξ`` ~ N(0, M⁻¹): a displacement from standard normal ``noise``."""
    _check(metric, noise)
    if metric.factor is None:
        return noise
    if metric.factor.ndim == 1:
        return _on_flat(lambda xi: metric.factor * xi, noise)
    return _on_flat(lambda xi: full_precision_matmul(metric.factor, xi), noise)


def scaled_gradient(metric: Metric, gradient: Position) -> Position:
    """``F' g``: a gradient in the coordinates in which the metric is the identity."""
    _check(metric, gradient)
    if metric.factor is None:
        return gradient
    if metric.factor.ndim == 1:
        return _on_flat(lambda g: metric.factor * g, gradient)
    return _on_flat(lambda g: full_precision_matmul(metric.factor.T, g), gradient)


def kinetic_energy(metric: Metric, vector: Position) -> jax.Array:
    """[] ``p' M⁻¹ p / 2``."""
    return 0.5 * inner_product(vector, velocity(metric, vector))

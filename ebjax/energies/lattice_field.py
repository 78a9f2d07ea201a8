"""The φ⁴ field on a lattice, a law on real numbers.

    E(φ) = Σ_i [ ½ Σ_μ (φ_{i+μ} - φ_i)² + ½ m² φ_i² + λ/4! φ_i⁴ ]

In units of the lattice spacing. A side that closes has at least 2 sites, and one of exactly 2 has
its bond twice.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ebjax.energies.lattice import bonds, check_lattice
from ebjax.types import Moments, Target

__all__ = ["phi4"]

_MAX_COVARIANCE = 256


def phi4(
    shape: tuple[int, ...],
    *,
    mass_squared: float,
    coupling: float,
    periodic: bool = True,
) -> Target:
    """The φ⁴ field on a lattice, x of this shape, real.

    Args:
      shape: sides.
      mass_squared: m², negative for the broken phase (which needs λ > 0).
      coupling: λ >= 0.
      periodic: whether all sides close.

    Returns:
      A ``Target``. At λ = 0 (m² > 0) it is a Gaussian, with log Z, exact samples and, up to 256
      sites, moments. At λ > 0 log Z is known in 1-D, by quadrature of the transfer operator.

    Raises:
      ValueError: if exp(-E) cannot be normalised.

    >>> target = phi4((1,), mass_squared=1.0, coupling=0.0, periodic=False)
    >>> round(target.log_z, 6), round(0.5 * math.log(2 * math.pi), 6)
    (0.918939, 0.918939)
    """
    check_lattice(shape, periodic)
    if coupling < 0 or (coupling == 0 and not mass_squared > 0):
        raise ValueError(
            f"coupling is {coupling} and mass_squared {mass_squared}; the coupling must be "
            "positive, or zero with a positive mass_squared."
        )

    def energy(params, x):
        del params
        total = jnp.sum(0.5 * mass_squared * jnp.square(x) + (coupling / 24.0) * x**4)
        for axis in range(x.ndim):
            first, second = bonds(x, axis, periodic)
            total = total + 0.5 * jnp.sum(jnp.square(second - first))
        return total

    if coupling > 0:
        log_z = None
        if len(shape) == 1:
            log_z = _chain_log_z(shape[0], mass_squared, coupling, periodic)
        return Target(energy, shape, log_z)
    return _free_field(energy, shape, mass_squared, periodic)


def _free_field(energy: Any, shape: tuple[int, ...], mass_squared: float, periodic: bool) -> Target:
    """The Gaussian at λ = 0, from the eigenvectors of the Laplacian of each side."""
    bases, eigenvalues = [], np.full(shape, float(mass_squared))
    for axis, side in enumerate(shape):
        differences = np.zeros((side, side))
        for i in range(side if periodic else side - 1):
            step = np.zeros(side)
            step[i] -= 1.0
            step[(i + 1) % side] += 1.0
            differences += np.outer(step, step)
        values, vectors = np.linalg.eigh(differences)
        bases.append(vectors)
        eigenvalues = eigenvalues + np.maximum(values, 0.0).reshape(
            [-1 if i == axis else 1 for i in range(len(shape))]
        )
    size = math.prod(shape)
    log_z = 0.5 * (size * math.log(2.0 * math.pi) - np.log(eigenvalues).sum())
    scales = jnp.asarray(1.0 / np.sqrt(eigenvalues))

    def sample(key):
        x = jax.random.normal(key, shape) * scales
        for axis, basis in enumerate(bases):
            turned = jnp.tensordot(jnp.asarray(basis), x, (1, axis), precision="highest")
            x = jnp.moveaxis(turned, 0, axis)
        return x

    moments = None
    if size <= _MAX_COVARIANCE:
        basis = np.ones((1, 1))
        for vectors in bases:
            basis = np.kron(basis, vectors)
        covariance = (basis / eigenvalues.reshape(-1)) @ basis.T
        moments = Moments(jnp.zeros(size), jnp.asarray(covariance))
    return Target(energy, shape, float(log_z), sample, moments)


def _chain_log_z(side: int, mass_squared: float, coupling: float, periodic: bool) -> float:
    """log Z of a chain at λ > 0, by the trapezoidal rule, which is exact here to rounding.

    The integrand dies off beyond where the potential is 40 above its least value.
    """
    least = -1.5 * min(mass_squared, 0.0) ** 2 / coupling
    # λ/24 y² + m²/2 y - (40 + least) = 0 for y = φ².
    a, b, c = coupling / 24.0, 0.5 * mass_squared, -(40.0 + least)
    extent = math.sqrt((-b + math.sqrt(b * b - 4 * a * c)) / (2 * a))
    grid = np.linspace(-extent, extent, max(400, int(16 * extent)))
    potential = 0.5 * mass_squared * grid**2 + coupling / 24.0 * grid**4 - least
    root = np.exp(-0.5 * potential) * math.sqrt(grid[1] - grid[0])
    hop = np.exp(-0.5 * np.subtract.outer(grid, grid) ** 2)
    values, vectors = np.linalg.eigh(root[:, None] * hop * root)
    largest = values[-1]
    if periodic:
        log_total = side * math.log(largest) + math.log(np.sum((values / largest) ** side))
    else:
        weights = (root @ vectors) ** 2
        total = np.sum(weights * (values / largest) ** (side - 1))
        log_total = (side - 1) * math.log(largest) + math.log(total)
    return float(log_total - side * least)

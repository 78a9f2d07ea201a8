"""A Gaussian fitted to an energy at its mode, by Newton's method.

N(m, H^{-1}),   m = argmin E,   H = ∇²E(m),   log Z ≈ -E(m) + (D log 2π - log det H) / 2
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

from ebjax.energies.targets.gaussian import gaussian
from ebjax.types import EnergyFn, Params, Target

__all__ = ["laplace_approximation"]


def laplace_approximation(
    energy_fn: EnergyFn, params: Params, position: npt.ArrayLike, *, max_steps: int = 100
) -> Target:
    """Fits a Gaussian at the mode that Newton's method finds from ``position``.

    Steps are halved until the energy falls. Where the Hessian is not positive definite, a multiple
    of the identity is added to it. Good as the base of a tempered sampler on a posterior with one
    mode, such as a regression's or the Cox process's. Runs on the host, not inside ``jit``.

    Args:
      energy_fn: twice differentiable.
      params: its parameters.
      position: [D], where to start.
      max_steps: of Newton's method.

    Returns:
      A ``Target``, the Gaussian. Its energy is shifted so that it equals ``energy_fn`` at the mode,
      and its ``log_z`` is Laplace's estimate of the log Z of ``energy_fn``.

    Raises:
      ValueError: if ``position`` is not a vector, or Newton's method finds no mode.

    >>> target = gaussian([1.0, -2.0], [[2.0, 0.5], [0.5, 1.0]])
    >>> fitted = laplace_approximation(target.energy, (), jnp.zeros(2))
    >>> bool(abs(fitted.log_z - target.log_z) < 1e-5), fitted.modes.round(3).tolist()
    (True, [[1.0, -2.0]])
    """
    x = jnp.asarray(position)
    if x.ndim != 1:
        raise ValueError(f"position has shape {x.shape}; it must be a vector [D].")
    energy = jax.jit(lambda x: energy_fn(params, x))
    gradient = jax.jit(jax.grad(lambda x: energy_fn(params, x)))
    hessian = jax.jit(jax.hessian(lambda x: energy_fn(params, x)))
    for _ in range(max_steps):
        direction, decrement = _newton_direction(np.asarray(hessian(x)), np.asarray(gradient(x)))
        # The energy is about to fall by half the decrement; less than this it cannot resolve.
        resolution = float(jnp.finfo(x.dtype).eps) * max(1.0, abs(float(energy(x))))
        if decrement <= 4.0 * resolution:
            break
        start, step = float(energy(x)), 1.0
        while step > 1e-8 and not float(energy(x + step * direction)) < start + resolution:
            step *= 0.5
        x = x + (step * direction).astype(x.dtype)
    else:
        raise ValueError(
            f"Newton's method found no mode in {max_steps} steps; start nearer to one, "
            "or give more steps."
        )
    return _gaussian_at(x, float(energy(x)), np.asarray(hessian(x), float))


def _newton_direction(hessian: np.ndarray, gradient: np.ndarray) -> tuple[np.ndarray, float]:
    """``-H^{-1} ∇E``, with H made positive definite, and the decrement ∇E' H^{-1} ∇E."""
    hessian, gradient = hessian.astype(float), gradient.astype(float)
    shift = 0.0
    while True:
        try:
            root = np.linalg.cholesky(hessian + shift * np.eye(len(hessian)))
            break
        except np.linalg.LinAlgError:
            lowest = np.linalg.eigvalsh(hessian).min()  # NaN raises here, as it should
            shift = max(2.0 * shift, 1e-3 - 1.5 * lowest)
    scaled = np.linalg.solve(root, gradient)
    return -np.linalg.solve(root.T, scaled), float(scaled @ scaled)


def _gaussian_at(mode: jax.Array, lowest: float, hessian: np.ndarray) -> Target:
    covariance = np.linalg.inv(0.5 * (hessian + hessian.T))
    fitted = gaussian(np.asarray(mode), 0.5 * (covariance + covariance.T))
    log_determinant = float(np.linalg.slogdet(hessian)[1])
    log_z = 0.5 * (mode.size * math.log(2.0 * math.pi) - log_determinant) - lowest

    def energy(params, x):
        return fitted.energy(params, x) + lowest

    return fitted._replace(energy=energy, log_z=log_z)

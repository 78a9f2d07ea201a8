"""Known laws: energies with exact samples, moments and log Z, for tests and benchmarks.

Energies are written out here. Samples and moments come from distrax where it has the law.
The energy of a target ignores its ``params``; pass ``()``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

from ebjax.types import Moments, Target

__all__ = [
    "banana",
    "double_well",
    "eight_gaussians",
    "forty_gaussians",
    "funnel",
    "gaussian",
    "gaussian_mixture",
]

_LOG_2PI = math.log(2.0 * math.pi)
_MAX_UNROLLED_DIM = 8


def _distrax():
    import distrax  # seconds to import, so not before someone asks for a target

    return distrax


def gaussian(mean: npt.ArrayLike, covariance: npt.ArrayLike) -> Target:
    """``E(x) = (x - m)' S^{-1} (x - m) / 2``, with ``log Z = (D log 2π + log det S) / 2``.

    Args:
      mean: m [D].
      covariance: S [D, D], symmetric and positive definite.

    Raises:
      ValueError: if the shapes do not fit or S is not symmetric and positive definite.
    """
    mean = np.asarray(mean, float)
    covariance = np.asarray(covariance, float)
    if mean.ndim != 1 or covariance.shape != (mean.size, mean.size):
        raise ValueError(
            f"mean has shape {mean.shape} and covariance {covariance.shape}; "
            "they must be [D] and [D, D]."
        )
    if not np.allclose(covariance, covariance.T):
        raise ValueError(f"covariance is not symmetric: {covariance.tolist()}.")
    sign, log_determinant = np.linalg.slogdet(covariance)
    if sign <= 0 or np.linalg.eigvalsh(covariance).min() <= 0:
        raise ValueError("covariance is not positive definite.")
    precision = np.linalg.inv(covariance)
    law = _distrax().MultivariateNormalFullCovariance(jnp.asarray(mean), jnp.asarray(covariance))

    def energy(params, x):
        del params
        centred = x - jnp.asarray(mean, x.dtype)
        return 0.5 * centred @ jnp.asarray(precision, x.dtype) @ centred

    return Target(
        energy=energy,
        event_shape=mean.shape,
        log_z=float(0.5 * (mean.size * _LOG_2PI + log_determinant)),
        sample=lambda key: law.sample(seed=key),
        moments=Moments(jnp.asarray(mean), jnp.asarray(covariance)),
        modes=jnp.asarray(mean)[None],
    )


def gaussian_mixture(
    means: np.ndarray | jax.Array,
    standard_deviation: float,
    weights: Sequence[float] | None = None,
) -> Target:
    """``E(x) = -log Σ_k w_k N(x; m_k, σ² I)``, normalised, so ``log Z = 0``.

    Args:
      means: m [K, D].
      standard_deviation: σ > 0, shared.
      weights: w [K], positive; equal by default. They are normalised.

    Raises:
      ValueError: if the shapes do not fit, or σ or a weight is not positive.
    """
    means = np.asarray(means, float)
    if means.ndim != 2:
        raise ValueError(f"means has shape {means.shape}; it must be [K, D].")
    if not standard_deviation > 0:
        raise ValueError(f"standard_deviation is {standard_deviation}; it must be positive.")
    num_modes, dim = means.shape
    probs = np.full(num_modes, 1.0) if weights is None else np.asarray(weights, float)
    if probs.shape != (num_modes,) or probs.min() <= 0:
        raise ValueError(f"weights are {weights}; there must be {num_modes} positive ones.")
    probs = probs / probs.sum()
    variance = float(standard_deviation) ** 2
    log_constants = np.log(probs) - 0.5 * dim * (_LOG_2PI + math.log(variance))

    def energy(params, x):
        del params
        centres = jnp.asarray(means, x.dtype)
        if dim <= _MAX_UNROLLED_DIM:
            # Sums over a short last axis do not vectorise; a sum of [K] arrays runs 4 times faster.
            squares = sum(jnp.square(x[d] - centres[:, d]) for d in range(dim))
        else:
            squares = jnp.sum(jnp.square(x - centres), axis=-1)
        exponents = jnp.asarray(log_constants, x.dtype) - squares / (2.0 * variance)
        return -jax.nn.logsumexp(exponents)

    distrax = _distrax()
    law = distrax.MixtureSameFamily(
        distrax.Categorical(probs=jnp.asarray(probs)),
        distrax.MultivariateNormalDiag(
            jnp.asarray(means), jnp.full(means.shape, float(standard_deviation))
        ),
    )
    mean = probs @ means
    spread = (means - mean).T @ (probs[:, None] * (means - mean))
    return Target(
        energy=energy,
        event_shape=(dim,),
        log_z=0.0,
        sample=lambda key: law.sample(seed=key),
        moments=Moments(jnp.asarray(mean), jnp.asarray(spread + variance * np.eye(dim))),
        modes=jnp.asarray(means),
    )


def eight_gaussians(radius: float = 2.0, standard_deviation: float = 0.2) -> Target:
    """Eight equal Gaussians on a circle in 2-D."""
    angles = 2.0 * np.pi * np.arange(8) / 8
    means = radius * np.stack([np.cos(angles), np.sin(angles)], axis=-1)
    return gaussian_mixture(means, standard_deviation)


def forty_gaussians(seed: int = 0) -> Target:
    """Forty equal Gaussians in 2-D, means uniform in [-40, 40]², standard deviation log(1 + e).

    Midgley et al., "Flow annealed importance sampling bootstrap", ICLR 2023, with means drawn by
    NumPy's ``default_rng(seed)``.
    """
    means = np.random.default_rng(seed).uniform(-40.0, 40.0, (40, 2))
    return gaussian_mixture(means, math.log(1.0 + math.e))


def funnel(dim: int = 10, scale: float = 3.0) -> Target:
    """Neal's funnel: ``v ~ N(0, scale²)``, the other D - 1 coordinates ``~ N(0, e^v)`` given v.

    Normalised, so ``log Z = 0``. The covariance of the others is ``exp(scale²/2) I``.

    Args:
      dim: D, at least 2.
      scale: standard deviation of v, which is ``x[0]``.
    """
    if dim < 2:
        raise ValueError(f"dim is {dim}; a funnel has at least 2 dimensions.")
    constant = 0.5 * dim * _LOG_2PI + math.log(scale)

    def energy(params, x):
        del params
        v, rest = x[0], x[1:]
        return (
            0.5 * jnp.square(v / scale)
            + 0.5 * jnp.exp(-v) * jnp.sum(jnp.square(rest))
            + 0.5 * (dim - 1) * v
            + constant
        )

    def sample(key):
        noise = jax.random.normal(key, (dim,))
        v = scale * noise[0]
        return jnp.concatenate([v[None], jnp.exp(0.5 * v) * noise[1:]])

    variances = np.full(dim, math.exp(0.5 * scale**2))
    variances[0] = scale**2
    moments = Moments(jnp.zeros(dim), jnp.diag(jnp.asarray(variances)))
    return Target(energy, (dim,), 0.0, sample, moments)


def banana(curvature: float = 0.5, scale: float = 2.0) -> Target:
    """A bent Gaussian in 2-D: ``x0 = scale z0``, ``x1 = z1 + curvature (x0² - scale²)``.

    With z standard normal. The map has unit Jacobian up to ``scale``, so the law is normalised.
    """
    variance_1 = 1.0 + 2.0 * curvature**2 * scale**4

    def energy(params, x):
        del params
        straight = x[1] - curvature * (jnp.square(x[0]) - scale**2)
        return 0.5 * (jnp.square(x[0] / scale) + jnp.square(straight)) + _LOG_2PI + math.log(scale)

    def sample(key):
        z = jax.random.normal(key, (2,))
        x0 = scale * z[0]
        return jnp.stack([x0, z[1] + curvature * (jnp.square(x0) - scale**2)])

    moments = Moments(jnp.zeros(2), jnp.diag(jnp.array([scale**2, variance_1])))
    return Target(energy, (2,), 0.0, sample, moments)


def double_well(tilt: float = 0.5, quadratic: float = 6.0) -> Target:
    """``E(x, y) = x⁴ - b x² - a x + y²/2`` in 2-D; a is the tilt, b the quadratic term.

    ``log Z``, moments and exact samples come from quadrature of the first coordinate on a fine
    grid (the integrand is smooth and dies off like exp(-x⁴), so the error is that of rounding).
    Samples invert its distribution function by linear interpolation between 20,001 points.
    """
    # Beyond this x⁴ outweighs the other terms by more than float64 can tell.
    extent = 3.0 + 2.0 * math.sqrt(abs(quadratic)) + abs(tilt) ** (1 / 3)
    grid = np.linspace(-extent, extent, 20_001)
    step = grid[1] - grid[0]

    def marginal(x):
        return x**4 - quadratic * x**2 - tilt * x

    lowest = marginal(grid).min()
    density = np.exp(lowest - marginal(grid))
    z = density.sum() * step
    mean = float((grid * density).sum() * step / z)
    variance = float(((grid - mean) ** 2 * density).sum() * step / z)
    cumulative = np.concatenate([[0.0], np.cumsum(0.5 * (density[1:] + density[:-1]))])
    cumulative /= cumulative[-1]

    def energy(params, x):
        del params
        return marginal(x[0]) + 0.5 * jnp.square(x[1])

    def sample(key):
        x_key, y_key = jax.random.split(key)
        first = jnp.interp(jax.random.uniform(x_key), jnp.asarray(cumulative), jnp.asarray(grid))
        return jnp.stack([first, jax.random.normal(y_key)])

    roots = np.roots([4.0, 0.0, -2.0 * quadratic, -tilt])
    roots = np.sort(roots[np.abs(roots.imag) < 1e-9].real)
    minima = roots[12.0 * roots**2 - 2.0 * quadratic > 0]
    return Target(
        energy=energy,
        event_shape=(2,),
        log_z=float(np.log(z) - lowest + 0.5 * _LOG_2PI),
        sample=sample,
        moments=Moments(jnp.array([mean, 0.0]), jnp.diag(jnp.array([variance, 1.0]))),
        modes=jnp.stack([jnp.asarray(minima), jnp.zeros(len(minima))], axis=-1),
    )

"""Shapes that are hard to sample: a funnel, bent laws, wells."""

from __future__ import annotations

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np

from ebjax.energies.targets.reductions import total
from ebjax.energies.targets.tabulated import TabulatedLaw, tabulate
from ebjax.types import Moments, Target

__all__ = [
    "banana",
    "double_well",
    "funnel",
    "many_well",
    "rosenbrock",
]

_LOG_2PI = math.log(2.0 * math.pi)
_MAX_LISTED_MODES = 1024


def funnel(dim: int = 10, scale: float = 3.0) -> Target:
    """Neal's funnel: ``v ~ N(0, scale²)``, the other D - 1 coordinates ``~ N(0, e^v)`` given v.

    Normalised, so ``log Z = 0``. The covariance of the others is ``exp(scale²/2) I``.

    Neal, "Slice sampling", Annals of Statistics 31 (2003).

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
    mode = np.zeros((1, dim))
    mode[0, 0] = -0.5 * (dim - 1) * scale**2
    return Target(energy, (dim,), 0.0, sample, moments, jnp.asarray(mode))


def banana(curvature: float = 0.5, scale: float = 2.0) -> Target:
    """A bent Gaussian in 2-D: ``x0 = scale z0``, ``x1 = z1 + curvature (x0² - scale²)``.

    With z standard normal. The map has unit Jacobian up to ``scale``, so the law is normalised.

    Haario, Saksman and Tamminen, "Adaptive proposal distribution for random walk Metropolis
    algorithm", Computational Statistics 14 (1999).
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
    return Target(energy, (2,), 0.0, sample, moments, jnp.array([[0.0, -curvature * scale**2]]))


def rosenbrock(dim: int = 2, a: float = 0.05, b: float = 5.0) -> Target:
    """``E(x) = a (x0 - 1)² + b Σ_i (x_i - x0²)²``: D - 1 curved sheets that share one axis.

        x0 ~ N(1, 1/(2a)),  x_i | x0 ~ N(x0², 1/(2b)),  log Z = log(π/a)/2 + (D - 1) log(π/b)/2

    In 2-D with the default a and b it is the density of Goodman and Weare, "Ensemble samplers with
    affine invariance", 2010. For more dimensions it is the hybrid law with blocks of length 2 of
    Pagani, Wiegand and Nadarajah, "An n-dimensional Rosenbrock distribution for Markov chain Monte
    Carlo testing", Scandinavian Journal of Statistics 49 (2022).

    Raises:
      ValueError: if there are less than 2 dimensions, or a or b is not positive.
    """
    if dim < 2 or not a > 0 or not b > 0:
        raise ValueError(
            f"dim is {dim}, a {a} and b {b}; there must be at least 2 dimensions, "
            "and a and b must be positive."
        )

    def energy(params, x):
        del params
        return a * jnp.square(x[0] - 1.0) + b * jnp.sum(jnp.square(x[1:] - jnp.square(x[0])))

    def sample(key):
        z = jax.random.normal(key, (dim,))
        x0 = 1.0 + z[0] * math.sqrt(0.5 / a)
        return jnp.concatenate([x0[None], jnp.square(x0) + z[1:] * math.sqrt(0.5 / b)])

    variance = 0.5 / a
    mean = np.full(dim, 1.0 + variance)
    mean[0] = 1.0
    covariance = np.full((dim, dim), 2.0 * variance**2 + 4.0 * variance)
    covariance[0] = covariance[:, 0] = 2.0 * variance
    covariance += np.diag([variance - 2.0 * variance] + [0.5 / b] * (dim - 1))
    return Target(
        energy=energy,
        event_shape=(dim,),
        log_z=0.5 * math.log(math.pi / a) + 0.5 * (dim - 1) * math.log(math.pi / b),
        sample=sample,
        moments=Moments(jnp.asarray(mean), jnp.asarray(covariance)),
        modes=jnp.ones((1, dim)),
    )


def _well_law(tilt: float, quadratic: float) -> TabulatedLaw:
    # Beyond this x⁴ outweighs the other terms by more than float64 can tell.
    extent = 3.0 + 2.0 * math.sqrt(abs(quadratic)) + abs(tilt) ** (1 / 3)
    return tabulate(lambda x: x**4 - quadratic * x**2 - tilt * x, -extent, extent)


def many_well(dim: int = 32, tilt: float = 0.5, quadratic: float = 6.0) -> Target:
    """``E(x) = Σ_i u_i⁴ - b u_i² - a u_i + v_i²/2`` over the D/2 pairs ``(u, v) = x[2i], x[2i+1]``.

    With a the tilt and b the quadratic term. 2^(D/2) modes of known weight; those of positive u
    are deeper. By default the law of Noé et al., "Boltzmann generators", Science 365 (2019), made
    many by Midgley et al., "Flow annealed importance sampling bootstrap", ICLR 2023, whose log Z
    for D = 32 is 164.6957.

    ``log Z``, moments and exact samples come from quadrature of one well, up to rounding. The
    modes are listed where they are at most 1,024.

    Raises:
      ValueError: if D is not even and positive.

    >>> round(many_well().log_z, 4)
    164.6957
    """
    if dim < 2 or dim % 2:
        raise ValueError(f"dim is {dim}; wells come in pairs of coordinates, so it must be even.")
    num_wells = dim // 2
    law = _well_law(tilt, quadratic)
    # Coefficients for all coordinates: slices of every second one would not vectorise.
    fourth, second, first = (
        np.tile(pair, num_wells) for pair in ([1.0, 0.0], [-quadratic, 0.5], [-tilt, 0.0])
    )

    def energy(params, x):
        del params
        c4, c2, c1 = (jnp.asarray(c, x.dtype) for c in (fourth, second, first))
        return total(x * (c1 + x * (c2 + c4 * x * x)))

    def sample(key):
        well_key, normal_key = jax.random.split(key)
        wells = law.sample(well_key, (num_wells,))
        return jnp.stack([wells, jax.random.normal(normal_key, (num_wells,))], axis=-1).ravel()

    mean = law.mean()
    variance = law.mean(lambda u: (u - mean) ** 2)
    roots = np.roots([4.0, 0.0, -2.0 * quadratic, -tilt])
    roots = np.sort(roots[np.abs(roots.imag) < 1e-9].real)
    minima = roots[12.0 * roots**2 - 2.0 * quadratic > 0]
    modes = None
    if len(minima) ** num_wells <= _MAX_LISTED_MODES:
        wells = np.array(list(itertools.product(minima, repeat=num_wells)))
        modes = jnp.asarray(np.stack([wells, np.zeros_like(wells)], -1).reshape(len(wells), dim))
    return Target(
        energy=energy,
        event_shape=(dim,),
        log_z=num_wells * (law.log_z + 0.5 * _LOG_2PI),
        sample=sample,
        moments=Moments(
            jnp.tile(jnp.array([mean, 0.0]), num_wells),
            jnp.diag(jnp.tile(jnp.array([variance, 1.0]), num_wells)),
        ),
        modes=modes,
    )


def double_well(tilt: float = 0.5, quadratic: float = 6.0) -> Target:
    """``E(x, y) = x⁴ - b x² - a x + y²/2`` in 2-D: ``many_well`` with one well."""
    return many_well(2, tilt, quadratic)

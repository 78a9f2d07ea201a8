"""Small shapes that are hard to sample: wells, a funnel, bent and hollow laws."""

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
    "checkerboard",
    "double_well",
    "funnel",
    "many_well",
    "ring",
    "rosenbrock",
    "two_moons",
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


def _radius(x: jax.Array) -> jax.Array:
    """|x| in 2-D, with gradient zero and not NaN at the origin."""
    square = jnp.square(x[0]) + jnp.square(x[1])
    is_positive = square > 0
    return jnp.where(is_positive, jnp.sqrt(jnp.where(is_positive, square, 1.0)), 0.0)


def _radial_law(radius: float, deviation: float) -> TabulatedLaw:
    """The law of |x| where ``E = (|x| - R)² / (2σ²)`` in 2-D: density ∝ r exp(-(r - R)² / 2σ²)."""
    if not radius > 0 or not deviation > 0:
        raise ValueError(f"radius is {radius} and its deviation {deviation}; both are positive.")

    def energy(r):
        with np.errstate(divide="ignore"):
            return 0.5 * ((r - radius) / deviation) ** 2 - np.log(r)

    return tabulate(energy, max(0.0, radius - 12.0 * deviation), radius + 12.0 * deviation)


def ring(radius: float = 2.0, standard_deviation: float = 0.4) -> Target:
    """``E(x) = (|x| - R)² / (2σ²)`` in 2-D: a circle of modes about a hole.

    By default E = (|x| - 2)² / 0.32, the ring of Li and Wang, "Neural network renormalization
    group", Physical Review Letters 121 (2018). Radii are drawn by inverting their tabulated
    distribution function.

    Raises:
      ValueError: if the radius or the deviation is not positive.
    """
    law = _radial_law(radius, standard_deviation)

    def energy(params, x):
        del params
        return 0.5 * jnp.square((_radius(x) - radius) / standard_deviation)

    def sample(key):
        radius_key, angle_key = jax.random.split(key)
        angle = jax.random.uniform(angle_key, maxval=2.0 * math.pi)
        return law.sample(radius_key) * jnp.stack([jnp.cos(angle), jnp.sin(angle)])

    covariance = 0.5 * law.mean(np.square) * np.eye(2)
    return Target(
        energy=energy,
        event_shape=(2,),
        log_z=math.log(2.0 * math.pi) + law.log_z,
        sample=sample,
        moments=Moments(jnp.zeros(2), jnp.asarray(covariance)),
    )


def two_moons(
    radius: float = 2.0, radial_deviation: float = 0.4, horizontal_deviation: float = 0.6
) -> Target:
    """Two facing crescents in 2-D, left and right on a circle of radius R.

        E(x) = (|x| - R)² / (2σ²) - log(exp(-(x0 - R)² / (2s²)) + exp(-(x0 + R)² / (2s²)))

    By default the first energy of Rezende and Mohamed, "Variational inference with normalizing
    flows", ICML 2015; deviations 0.2 and 0.3 give the sharper one of the ``normflows`` package.

    ``log Z`` and moments come from quadrature in polar coordinates. Samples are exact: the ring's,
    kept with the probability exp(-(x0 - R)² / (2s²)), then mirrored by a coin.

    Raises:
      ValueError: if the radius or a deviation is not positive.
    """
    if not horizontal_deviation > 0:
        raise ValueError(f"horizontal_deviation is {horizontal_deviation}; it must be positive.")
    circle = ring(radius, radial_deviation)
    law = _radial_law(radius, radial_deviation)
    precision = 1.0 / horizontal_deviation**2

    def energy(params, x):
        pull = radius * precision * x[0]
        return (
            circle.energy(params, x)
            + 0.5 * precision * (jnp.square(x[0]) + radius**2)
            - jnp.logaddexp(pull, -pull)
        )

    def sample(key):
        coin_key, key = jax.random.split(key)

        def propose(attempt):
            ring_key, accept_key = jax.random.split(jax.random.fold_in(key, attempt))
            x = circle.sample(ring_key)
            log_keep = -0.5 * precision * jnp.square(x[0] - radius)
            return attempt + 1, x, jnp.log(jax.random.uniform(accept_key)) < log_keep

        _, x, _ = jax.lax.while_loop(
            lambda loop: ~loop[2], lambda loop: propose(loop[0]), propose(jnp.int32(0))
        )
        side = jnp.where(jax.random.bernoulli(coin_key), 1.0, -1.0)
        return jnp.stack([side.astype(x.dtype) * x[0], x[1]])

    # Periodic in the angle, so equal steps converge as fast as along the radius.
    angles = np.linspace(0.0, 2.0 * np.pi, 512, endpoint=False)
    coarse = slice(None, None, 10)  # 2,001 radii are plenty
    r, weights = law.grid[coarse, None], law.weights[coarse, None]
    x0, x1 = r * np.cos(angles), r * np.sin(angles)
    # Both crescents weigh the same, so one is enough, and twice its weight.
    terms = weights / weights.sum() * np.exp(-0.5 * precision * (x0 - radius) ** 2) / angles.size
    second = [float((terms * x**2).sum() / terms.sum()) for x in (x0, x1)]
    return Target(
        energy=energy,
        event_shape=(2,),
        log_z=float(circle.log_z + np.log(2.0 * terms.sum())),
        sample=sample,
        moments=Moments(jnp.zeros(2), jnp.diag(jnp.array(second))),
        modes=jnp.array([[-radius, 0.0], [radius, 0.0]]),
    )


def checkerboard(num_cells: int = 4, side: float = 2.0) -> Target:
    """Uniform on every second square of a board in 2-D: ``E = 0`` there and ``+inf`` elsewhere.

    By default the board [-4, 4]² with 4 by 4 squares. Its gradient is zero where it exists, so
    only what tolerates infinite energies can sample it.

    Args:
      num_cells: squares along one edge, at least 2.
      side: of one square.

    Raises:
      ValueError: if there are less than 2 squares, or the side is not positive.
    """
    if num_cells < 2 or not side > 0:
        raise ValueError(
            f"num_cells is {num_cells} and side {side}; there must be at least 2 squares "
            "along an edge, and their side must be positive."
        )
    half = 0.5 * num_cells * side
    cells = np.array([c for c in np.ndindex(num_cells, num_cells) if sum(c) % 2 == 0])
    corners = side * cells - half

    def energy(params, x):
        del params
        cell = jnp.floor((x + half) / side)
        is_on_board = jnp.all((cell >= 0) & (cell < num_cells))
        is_filled = is_on_board & (jnp.mod(jnp.sum(cell), 2.0) == 0)
        return jnp.where(is_filled, jnp.zeros((), x.dtype), jnp.inf)

    def sample(key):
        cell_key, place_key = jax.random.split(key)
        corner = jax.random.choice(cell_key, jnp.asarray(corners))
        return corner + side * jax.random.uniform(place_key, (2,))

    covariance = np.cov(corners.T, bias=True) + side**2 / 12.0 * np.eye(2)
    return Target(
        energy=energy,
        event_shape=(2,),
        log_z=math.log(len(cells) * side**2),
        sample=sample,
        moments=Moments(jnp.asarray(corners.mean(0) + 0.5 * side), jnp.asarray(covariance)),
    )

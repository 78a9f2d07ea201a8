"""Seven laws in the plane as bits: points, their code, and the law of the code on all cells.

    x = m(u) + w v + σ z,    u ~ U[0, 1]²,  v ~ U[-1/2, 1/2]²,  z ~ N(0, I)

m is a curve, or two, or a few points; in the pinwheel it fills the plane by itself. Given u the
coordinates are independent, so that the probability of a cell is a mean over u of products of two
differences of distribution functions, taken over the midpoints of a grid in u.

A coordinate is one bit for its sign (1: negative) and B - 1 for ⌊|x| 2^(B-1) / h⌋ as a Gray code,
in which neighbours differ by one bit; h is half the side of the square that is coded. It exceeds
by 2 the largest coordinate of 5,000 draws, as published, and is a constant of each law here, so
that no data enter it. The bits of both coordinates take turns, the coarsest first.

Grathwohl et al., "FFJORD", ICLR 2019, for most laws; Dai et al., "Learning discrete energy-based
models via auxiliary-variable local exploration", NeurIPS 2020, for the code.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import ndtri
from scipy.special import ndtr

__all__ = ["LAWS", "PlaneLaw", "cell_centres", "coded_law", "decode", "encode", "entropy"]

_NUM_POINTS = 4096  # of the grid in u
_POINTS_OF_A_HISTOGRAM = (4_000, 1_000)  # of the lattice in u, where there is no noise
_GOLDEN_RATIO = 0.5 * (1.0 + math.sqrt(5.0))
# With more bits a law is as good as uniform in a cell.
_FINEST_BITS = 9
# Uniform numbers in single precision reach 0, where normal quantiles are infinite.
_SMALLEST = 1e-7


class PlaneLaw(NamedTuple):
    """A law in the plane.

    Attributes:
      curve: m, ``u [2] -> [2]``.
      half_side: h, of the square about the origin that is coded.
      width: w, of the uniform noise.
      deviation: σ, of the normal noise.
    """

    curve: Callable[[jax.Array], jax.Array]
    half_side: float
    width: float = 0.0
    deviation: float = 0.0

    def sample(self, key: jax.Array) -> jax.Array:
        """[2] one point."""
        curve_key, uniform_key, normal_key = jax.random.split(key, 3)
        return (
            self.curve(jax.random.uniform(curve_key, (2,)))
            + self.width * (jax.random.uniform(uniform_key, (2,)) - 0.5)
            + self.deviation * jax.random.normal(normal_key, (2,))
        )


def _branch(u: jax.Array, number: int) -> tuple[jax.Array, jax.Array]:
    """Which of equally likely branches, int32, and the place in it, in [0, 1)."""
    branch = jnp.minimum(jnp.floor(number * u[0]), number - 1)
    return branch.astype(jnp.int32), number * u[0] - branch


def _two_spirals(u):
    branch, place = _branch(u, 2)
    t = 3.0 * math.pi * jnp.sqrt(place)
    # A quarter is the middle of the uniform noise, which turns with the spiral.
    point = jnp.stack([0.25 - t * jnp.cos(t), 0.25 + t * jnp.sin(t)]) / 3.0
    return jnp.where(branch == 0, point, -point)


def _eight_gaussians(u):
    angle = _branch(u, 8)[0] * (math.pi / 4.0)
    return 4.0 / 1.414 * jnp.stack([jnp.cos(angle), jnp.sin(angle)])


def _circles(u):
    branch, place = _branch(u, 2)
    angle = 2.0 * math.pi * place
    return jnp.where(branch == 0, 3.0, 1.5) * jnp.stack([jnp.cos(angle), jnp.sin(angle)])


def _moons(u):
    branch, place = _branch(u, 2)
    cosine, sine = jnp.cos(math.pi * place), jnp.sin(math.pi * place)
    upper, lower = jnp.stack([cosine, sine]), jnp.stack([1.0 - cosine, 0.5 - sine])
    return 2.0 * jnp.where(branch == 0, upper, lower) - jnp.array([1.0, 0.2])


def _pinwheel(u):
    branch, place = _branch(u, 5)
    along, across = ndtri(jnp.clip(jnp.stack([place, u[1]]), _SMALLEST, 1.0 - _SMALLEST))
    along, across = 1.0 + 0.3 * along, 0.1 * across
    angle = branch * (2.0 * math.pi / 5.0) + 0.25 * jnp.exp(along)
    cosine, sine = jnp.cos(angle), jnp.sin(angle)
    return 2.0 * jnp.stack([along * cosine - across * sine, along * sine + across * cosine])


def _swiss_roll(u):
    t = 1.5 * math.pi * (1.0 + 2.0 * u[0])
    return t / 5.0 * jnp.stack([jnp.cos(t), jnp.sin(t)])


def _checkerboard(u):
    square = _branch(u, 8)[0]
    column = square // 2
    return 2.0 * jnp.stack([column, 2 * (square % 2) + column % 2]) - 3.0


LAWS = {
    "two_spirals": PlaneLaw(_two_spirals, 5.48, width=0.5 / 3.0, deviation=0.1),
    "eight_gaussians": PlaneLaw(_eight_gaussians, 6.20, deviation=0.5 / 1.414),
    "circles": PlaneLaw(_circles, 5.78, deviation=0.24),
    "moons": PlaneLaw(_moons, 5.67, deviation=0.2),
    "pinwheel": PlaneLaw(_pinwheel, 5.95),
    "swiss_roll": PlaneLaw(_swiss_roll, 5.27, deviation=0.2),
    "checkerboard": PlaneLaw(_checkerboard, 6.00, width=2.0),
}


def encode(x: jax.Array, half_side: float, bits: int) -> jax.Array:
    """[..., 2 B] float32 in {0, 1}: both signs, then the Gray codes of points [..., 2], bit by bit.

    What lies outside of the square has the code of the outermost cell.

    >>> encode(jnp.array([2.5, -1.0]), 4.0, 3).tolist()  # magnitudes 2 and 1 of 4: 11 and 01
    [0.0, 1.0, 1.0, 0.0, 1.0, 1.0]
    """
    most = 2 ** (bits - 1)
    magnitude = jnp.minimum(jnp.floor(jnp.abs(x) * (most / half_side)), most - 1).astype(jnp.int32)
    gray = magnitude ^ (magnitude >> 1)
    digits = gray[..., None] >> jnp.arange(bits - 1)[::-1] & 1
    code = jnp.concatenate([(x < 0)[..., None], digits], axis=-1).swapaxes(-1, -2)
    return code.reshape(*x.shape[:-1], 2 * bits).astype(jnp.float32)


def decode(code: jax.Array, half_side: float) -> jax.Array:
    """[..., 2] centres of the cells of codes [..., 2 B].

    >>> decode(encode(jnp.array([2.5, -1.0]), 4.0, 3), 4.0).tolist()
    [2.5, -1.5]
    """
    code = jnp.asarray(code).reshape(*code.shape[:-1], -1, 2).swapaxes(-1, -2).astype(jnp.int32)
    digits = jnp.cumsum(code[..., 1:], axis=-1) % 2
    most = 2 ** digits.shape[-1]
    magnitude = digits @ 2 ** jnp.arange(digits.shape[-1])[::-1]
    return jnp.where(code[..., 0] == 1, -1.0, 1.0) * (magnitude + 0.5) * (half_side / most)


def cell_centres(half_side: float, bits: int) -> np.ndarray:
    """[2^B] centres of the cells of a coordinate, from left to right."""
    edges = half_side * np.linspace(-1.0, 1.0, 2**bits + 1)
    return 0.5 * (edges[1:] + edges[:-1])


def _noise_below(x: np.ndarray, law: PlaneLaw) -> np.ndarray:
    """P(w v + σ z <= x) in one coordinate; with uniform noise by integrating that of the rest."""
    width, deviation = law.width, law.deviation
    if not width:
        return ndtr(x / deviation)

    def integral(y):
        if not deviation:
            return np.maximum(y, 0.0)
        z = y / deviation
        return deviation * (z * ndtr(z) + np.exp(-0.5 * z**2) / math.sqrt(2.0 * math.pi))

    return (integral(x + 0.5 * width) - integral(x - 0.5 * width)) / width


@functools.lru_cache(maxsize=16)
def coded_law(law: PlaneLaw, bits: int) -> np.ndarray:
    """[2^B, 2^B] float64 probabilities of the cells, by first and second coordinate.

    Exact to about 1e-6, but for the pinwheel, which is a histogram of 4,000,000 points.
    """
    points = jax.jit(jax.vmap(law.curve))
    if not law.width and not law.deviation:
        return _histogram(points, law.half_side, 2**bits)
    u = np.full((_NUM_POINTS, 2), 0.5, np.float32)
    u[:, 0] = (np.arange(_NUM_POINTS) + 0.5) / _NUM_POINTS
    edges = law.half_side * np.linspace(-1.0, 1.0, 2**bits + 1)
    edges[[0, -1]] *= 1e3  # the outermost cells have what lies outside
    first, second = (
        np.maximum(np.diff(_noise_below(edges - centre[:, None], law)), 0.0)
        for centre in np.asarray(points(u), np.float64).T
    )
    return first.T @ second / _NUM_POINTS


def _histogram(points, half_side: float, number: int) -> np.ndarray:
    """[number, number] shares of the points of a lattice in u."""
    along, across = _POINTS_OF_A_HISTOGRAM
    counts = np.zeros(number**2)
    for row in range(across):
        u = np.empty((along, 2), np.float32)
        u[:, 0] = (np.arange(along) + (row * _GOLDEN_RATIO) % 1.0) / along
        u[:, 1] = (row + 0.5) / across
        cells = np.floor((np.asarray(points(u)) / half_side + 1.0) * (number / 2))
        first, second = np.clip(cells, 0, number - 1).astype(int).T
        counts += np.bincount(number * first + second, minlength=number**2)
    return (counts / counts.sum()).reshape(number, number)


def entropy(law: PlaneLaw, bits: int) -> float:
    """Of the code, in nats: what no model has a smaller negative log-likelihood than.

    From 9 bits of a coordinate on, each further one adds ln 2, to within 0.01 nats in all.
    """
    table = coded_law(law, min(bits, _FINEST_BITS))
    filled = table[table > 0]
    return float(-filled @ np.log(filled) + 2.0 * max(bits - _FINEST_BITS, 0) * math.log(2.0))

"""Checkerboard Gibbs sampling of Ising models on a lattice: half of the spins at once, packed.

    p(x_i = 1 | rest) = σ( -∂E/∂x_i / τ ),    ∂E/∂x_i = a_i + b_i m_i,    m_i = number of neighbours
                                                                              of i with x = 1

for E = -J Σ_<ij> s_i s_j - Σ_i h_i s_i with s = 2x - 1, fields h_i that may differ from site to
site and one coupling J. The two colours are packed into arrays of half the width, a draw is one
comparison of 32 random bits with one of 2d + 1 thresholds, and no gradient is computed on the way:
a and b come from the gradient at x = 0 and at x = 1, the same for all chains, so that ``vmap``
computes them once. The kernel therefore follows ``energy_fn`` and ``params`` (also a tempered one)
as any other does. Exact up to the 2^-32 of a random word.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ebjax.numerics import all_finite, random_words
from ebjax.samplers.discrete import check_positive
from ebjax.samplers.evaluate import value_and_gradient
from ebjax.types import EnergyFn, Kernel, Params, bind

__all__ = ["CheckerboardInfo", "CheckerboardState", "checkerboard_blocks", "checkerboard_gibbs"]

_TOLERANCE = 1e-3


class CheckerboardState(NamedTuple):
    """``position``: spins as x = (s + 1)/2 in {0, 1}, an array with the shape of the lattice."""

    position: jax.Array


class CheckerboardInfo(NamedTuple):
    """Diagnosis of one step.

    Attributes:
      energy: [] energy after the step.
      is_finite: [] bool, whether the energy is finite and is that of an Ising lattice with one
        coupling. If not, the spins stay.
    """

    energy: jax.Array
    is_finite: jax.Array


class Couplings(NamedTuple):
    """What the two probes say of the energy.

    Attributes:
      energy: [] E(0).
      offset: a [...], the gradient at x = 0.
      slope: b [], change of a site's gradient for each neighbour with x = 1.
      is_lattice: [] bool, whether the slope is the same everywhere.
    """

    energy: jax.Array
    offset: jax.Array
    slope: jax.Array
    is_lattice: jax.Array


def checkerboard_blocks(shape: tuple[int, ...]) -> np.ndarray:
    """The parity of the sum of the indices: blocks for ``block_gibbs`` on a lattice.

    Right for free boundaries, and for periodic ones along even sides.

    >>> checkerboard_blocks((2, 3)).tolist()
    [[0, 1, 0], [1, 0, 1]]
    """
    return np.indices(shape).sum(axis=0) % 2


def checkerboard_gibbs(
    *, periodic: bool = True, num_sweeps: int = 1, temperature: float | jax.Array = 1.0
) -> Kernel:
    """Builds the kernel, for positions of any number of axes.

    Args:
      periodic: static, whether the lattice of the energy is a torus; the sides must then be even.
        With free boundaries the last one must be.
      num_sweeps: static, sweeps (each spin once) in a step. A step of one chain costs about two
        gradients beside them; of many chains under ``vmap``, close to nothing.
      temperature: τ > 0; the chain's law is exp(-E/τ).

    Returns:
      A ``Kernel`` with ``CheckerboardState`` and ``CheckerboardInfo``. Two gradients a step, for
      all chains together.

    Raises:
      ValueError: naming the option that is out of range.

    >>> import jax, jax.numpy as jnp
    >>> from ebjax.energies import lattice
    >>> target = lattice.ising_lattice((4, 4), coupling=5.0, field=1.0)
    >>> kernel = checkerboard_gibbs(num_sweeps=5)
    >>> state = kernel.init(target.energy, (), jnp.zeros((4, 4)))
    >>> state, info = kernel.step(jax.random.key(0), target.energy, (), state)
    >>> state.position.shape, bool(info.is_finite)
    ((4, 4), True)
    """
    check_positive(temperature=temperature)
    if num_sweeps < 1:
        raise ValueError(f"num_sweeps is {num_sweeps}; it must be at least 1.")
    step = bind(_step, periodic=periodic, num_sweeps=num_sweeps, temperature=temperature)
    return Kernel(bind(_init), step, 2)


def _init(energy_fn: EnergyFn, params: Params, position: jax.Array) -> CheckerboardState:
    del energy_fn, params  # the next step needs nothing but the position
    return CheckerboardState(position)


def num_neighbours(shape: tuple[int, ...], periodic: bool) -> np.ndarray:
    """How many neighbours each site has. A side of 2 that closes has its neighbour twice."""
    total = np.zeros(shape)
    for axis, side in enumerate(shape):
        index = np.arange(side).reshape([-1 if i == axis else 1 for i in range(len(shape))])
        total = total + (2 if periodic else (index > 0) * 1 + (index < side - 1) * 1)
    return total


def probe(
    energy_fn: EnergyFn, params: Params, shape: tuple[int, ...], dtype: Any, periodic: bool
) -> Couplings:
    """Reads a_i and b off the energy."""
    energy, low, _ = value_and_gradient(energy_fn, params, jnp.zeros(shape, dtype))
    _, high, _ = value_and_gradient(energy_fn, params, jnp.ones(shape, dtype))
    degree = num_neighbours(shape, periodic)
    slopes = (high - low) / jnp.maximum(degree, 1).astype(dtype)
    slope = jnp.sum(high - low) / float(degree.sum())
    spread = jnp.max(jnp.abs(slopes - slope))
    scale = jnp.max(jnp.abs(slopes)) + jnp.max(jnp.abs(low)) * jnp.finfo(dtype).eps
    return Couplings(energy, low, slope, spread <= _TOLERANCE * scale)


def pack(lattice: jax.Array) -> tuple[jax.Array, jax.Array]:
    """[..., W] -> two arrays [..., W/2], the sites with even and with odd sum of indices."""
    pairs = lattice.reshape(*lattice.shape[:-1], -1, 2)
    is_odd = _row_parity(lattice.shape)
    first, second = pairs[..., 0], pairs[..., 1]
    return jnp.where(is_odd, second, first), jnp.where(is_odd, first, second)


def unpack(even: jax.Array, odd: jax.Array) -> jax.Array:
    """The inverse of ``pack``."""
    shape = (*even.shape[:-1], 2 * even.shape[-1])
    is_odd = _row_parity(shape)
    straight = jnp.stack([even, odd], axis=-1).reshape(shape)
    crossed = jnp.stack([odd, even], axis=-1).reshape(shape)
    return jnp.where(is_odd, crossed, straight)


def _row_parity(shape: tuple[int, ...]) -> np.ndarray:
    """[..., 1] bool, whether the sum of all indices but the last is odd."""
    return (np.indices((*shape[:-1], 1)).sum(axis=0) % 2).astype(bool)


def count_up(other: jax.Array, color: int, periodic: bool) -> jax.Array:
    """m of the sites of one colour (0 even, 1 odd) from the packed other one."""
    shape = (*other.shape[:-1], 2 * other.shape[-1])
    starts_odd = _row_parity(shape) ^ bool(color)
    padded = _with_halo(other, periodic)

    def shifted(axis, shift):
        starts = [1] * other.ndim
        starts[axis] += shift
        stops = [start + side for start, side in zip(starts, other.shape, strict=True)]
        return jax.lax.slice(padded, starts, stops)

    last = other.ndim - 1
    # A row whose sites of this colour are at odd columns has its neighbours at j and j + 1.
    total = shifted(last, 0) + jnp.where(starts_odd, shifted(last, 1), shifted(last, -1))
    for axis in range(last):
        total = total + shifted(axis, 1) + shifted(axis, -1)
    return total


def _with_halo(x: jax.Array, periodic: bool) -> jax.Array:
    """One more site at both ends of every axis: the other end, or zeros.

    Neighbours are then slices, which XLA reads many at a time, as it does not rolled arrays.
    """
    for axis in range(x.ndim):
        first = jax.lax.slice_in_dim(x, 0, 1, axis=axis)
        last = jax.lax.slice_in_dim(x, x.shape[axis] - 1, None, axis=axis)
        if not periodic:
            first = last = jnp.zeros_like(first)
        x = jnp.concatenate([last, x, first], axis=axis)
    return jax.lax.optimization_barrier(x)


def thresholds(offset: jax.Array, slope: jax.Array, temperature: Any) -> list[jax.Array]:
    """P(x = 1) in units of 2^-32 for m = 0 .. 2d, each shaped as ``offset``."""
    words = []
    for count in range(2 * offset.ndim + 1):
        logit = -(offset + slope * count) / temperature
        # Rounded on the side where the probability is small, so that nearly certain spins are as
        # exact as nearly impossible ones.
        small = (jax.nn.sigmoid(-jnp.abs(logit)) * 2.0**32).astype(jnp.uint32)
        words.append(jnp.where(logit < 0.0, small, jnp.uint32(0) - jnp.maximum(small, 1)))
    return words


def site_thresholds(
    table: list[jax.Array], other: jax.Array, color: int, periodic: bool
) -> jax.Array:
    """The entry of the table that each site of one colour is drawn by; ``other`` is packed."""
    up = count_up(other, color, periodic)
    threshold = table[-1]
    for count, entry in enumerate(table[:-1]):
        threshold = jnp.where(up == count, entry, threshold)
    return threshold


def _step(
    key: jax.Array,
    energy_fn: EnergyFn,
    params: Params,
    state: CheckerboardState,
    *,
    periodic,
    num_sweeps,
    temperature,
) -> tuple[CheckerboardState, CheckerboardInfo]:
    position = state.position
    _check_shape(position.shape, periodic)
    couplings = probe(energy_fn, params, position.shape, position.dtype, periodic)
    offsets = pack(couplings.offset)
    table = [thresholds(offset, couplings.slope, temperature) for offset in offsets]

    def sweep(key, colors):
        words = random_words(key, position.size).reshape(2, *colors[0].shape)
        colors = list(colors)
        for color in (0, 1):
            threshold = site_thresholds(table[color], colors[1 - color], color, periodic)
            drawn = (words[color] < threshold).astype(position.dtype)
            # Else XLA draws a spin again for each neighbour that reads it.
            colors[color] = jax.lax.optimization_barrier(drawn)
        return tuple(colors)

    colors = pack(position)
    if num_sweeps == 1:
        colors = sweep(key, colors)
    else:
        colors = jax.lax.fori_loop(
            0, num_sweeps, lambda i, c: sweep(jax.random.fold_in(key, i), c), colors
        )
    # All bonds join the two colours: count them from the odd side.
    bonds = jnp.sum(colors[1] * count_up(colors[0], 1, periodic))
    fields = sum(jnp.sum(x * offset) for x, offset in zip(colors, offsets, strict=True))
    energy = couplings.energy + fields + couplings.slope * bonds
    is_finite = couplings.is_lattice & all_finite((energy, couplings.offset, couplings.slope))
    new = jnp.where(is_finite, unpack(*colors), position)
    return CheckerboardState(new), CheckerboardInfo(energy, is_finite)


def _check_shape(shape: tuple[int, ...], periodic: bool) -> None:
    sides = shape if periodic else shape[-1:]
    if not shape or any(side % 2 or side == 0 for side in sides):
        raise ValueError(
            f"a position has shape {shape}; a checkerboard needs even sides where the lattice is "
            "periodic, and an even last side in any case."
        )

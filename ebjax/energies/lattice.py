"""Ising and Potts models on graphs and lattices.

    Ising    E(x) = -Σ_(ij) J_ij s_i s_j - Σ_i h_i s_i,    s = 2x - 1,  x_i ∈ {0, 1}
    Potts    E(x) = -Σ_(ij) J_ij x_i · x_j - Σ_i h · x_i,  x_i one-hot in R^K

Couplings are in units of the temperature (K = J/τ). Bonds of a lattice join nearest neighbours; a
side that closes has at least 2 sites, and one of exactly 2 has its bond twice. Ising and Potts
energies are affine in each variable, as block Gibbs sampling needs.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

from ebjax.energies.boltzmann import (
    MAX_STATES,
    enumerate_states,
    target_from_table,
)
from ebjax.energies.exact_lattice import kaufman_log_z, strip_log_z
from ebjax.types import Energy, Target

__all__ = [
    "IsingParams",
    "bonds",
    "check_lattice",
    "ising",
    "ising_energy",
    "ising_lattice",
    "ising_lattice_energy",
    "lattice_edges",
    "potts",
    "potts_lattice",
]

# Up to here states, samples and moments are kept in a table; log Z goes further.
_MAX_TABLE = 2**14
_MAX_STRIP_WORK = 2**20


class IsingParams(NamedTuple):
    """``coupling``: J, [] or one an edge [number of edges]; ``field``: h, [] or one a site."""

    coupling: jax.Array
    field: jax.Array


def lattice_edges(shape: tuple[int, ...], periodic: bool = True) -> np.ndarray:
    """Nearest-neighbour pairs [number of edges, 2] of a lattice, sites in raveled order.

    >>> lattice_edges((3,)).tolist()
    [[0, 1], [1, 2], [2, 0]]
    """
    check_lattice(shape, periodic)
    site = np.arange(math.prod(shape)).reshape(shape)
    pairs = []
    for axis, side in enumerate(shape):
        num = side if periodic else side - 1
        first = np.take(site, np.arange(num), axis)
        second = np.take(np.roll(site, -1, axis), np.arange(num), axis)
        pairs.append(np.stack([first.ravel(), second.ravel()], axis=-1))
    return np.concatenate(pairs)


def check_lattice(shape: tuple[int, ...], periodic: bool) -> None:
    """Raises ValueError unless there are sides, each long enough to close where it does."""
    smallest = 2 if periodic else 1
    if not shape or min(shape) < smallest:
        raise ValueError(f"shape is {shape}; a lattice has sides of at least {smallest} sites.")


def bonds(x: jax.Array, axis: int, periodic: bool) -> tuple[jax.Array, jax.Array]:
    """Both ends of all bonds along an axis, as arrays of the same shape."""
    if periodic:
        return x, jnp.roll(x, -1, axis)
    side = x.shape[axis]
    return (
        jax.lax.slice_in_dim(x, 0, side - 1, axis=axis),
        jax.lax.slice_in_dim(x, 1, side, axis=axis),
    )


def ising_energy(edges: npt.ArrayLike) -> Energy:
    """The Ising energy on a graph; ``IsingParams`` with a coupling an edge and a field a site.

    Args:
      edges: [number of edges, 2] integers, indices into the raveled position.

    >>> energy = ising_energy([(0, 1)])
    >>> params = IsingParams(jnp.array([1.0]), jnp.array([0.5, 0.0]))
    >>> float(energy.apply(params, jnp.array([1.0, 0.0])))
    0.5
    """
    pairs = np.asarray(edges, int).reshape(-1, 2)

    def init(key, x):
        coupling = 0.01 * jax.random.normal(key, (len(pairs),))
        return IsingParams(coupling, jnp.zeros(jnp.shape(x)))

    def apply(params, x):
        spins = 2.0 * x - 1.0
        flat = spins.reshape(-1)
        products = flat[pairs[:, 0]] * flat[pairs[:, 1]]
        return -jnp.sum(params.coupling * products) - jnp.sum(params.field * spins)

    return Energy(init, apply)


def ising_lattice_energy(periodic: bool = True) -> Energy:
    """The Ising energy on a lattice, x of any shape; ``IsingParams`` of one coupling, and a field
    [] or one a site.
    """

    def init(key, x):
        return IsingParams(0.01 * jax.random.normal(key, ()), jnp.zeros(jnp.shape(x)))

    def apply(params, x):
        check_lattice(x.shape, periodic)
        spins = 2.0 * x - 1.0
        total = 0.0
        for axis in range(x.ndim):
            first, second = bonds(spins, axis, periodic)
            total = total + jnp.sum(first * second)
        return -params.coupling * total - jnp.sum(params.field * spins)

    return Energy(init, apply)


def _pairwise_energies(
    edges: np.ndarray, coupling: np.ndarray, bond: np.ndarray, site: np.ndarray
) -> np.ndarray:
    """[K^N] energies ``-Σ_e J_e bond[k_i, k_j] - Σ_i site[i, k_i]`` of all states, float64."""
    num_sites, num_values = site.shape
    powers = num_values ** np.arange(num_sites)[::-1]
    energies = np.zeros(num_values**num_sites)
    for first in range(0, len(energies), 2**14):
        index = np.arange(first, min(first + 2**14, len(energies)))
        digits = index[:, None] // powers % num_values
        pairs = bond[digits[:, edges[:, 0]], digits[:, edges[:, 1]]]
        energies[index] = -pairs @ coupling - site[np.arange(num_sites), digits].sum(axis=-1)
    return energies


def _pairwise_target(
    energy: Any,
    event_shape: tuple[int, ...],
    num_categories: int | None,
    edges: np.ndarray,
    coupling: np.ndarray,
    bond: np.ndarray,
    site: np.ndarray,
) -> Target:
    """The target with what can be had by enumeration."""
    num_sites, num_values = site.shape
    if num_sites * math.log(num_values) > math.log(MAX_STATES) + 1e-9:
        return Target(energy, event_shape)
    energies = _pairwise_energies(edges, coupling, bond, site)
    if len(energies) > _MAX_TABLE:
        peak = -energies.min()
        return Target(energy, event_shape, float(peak + np.log(np.exp(-energies - peak).sum())))
    states = enumerate_states((num_sites,), num_categories).reshape(-1, *event_shape)
    return target_from_table(energy, energies, states)


_SPINS = np.array([-1.0, 1.0])


def ising(
    edges: npt.ArrayLike, coupling: npt.ArrayLike, field: npt.ArrayLike, *, num_sites: int
) -> Target:
    """The Ising law on a graph, x [num_sites] in {0, 1}.

    Args:
      edges: [number of edges, 2].
      coupling: J, [] or [number of edges].
      field: h, [] or [num_sites].
      num_sites: N.

    Returns:
      A ``Target`` with log Z up to 2^20 states, and samples and moments up to 2^14.

    Raises:
      ValueError: if an edge leaves the sites.

    >>> target = ising([(0, 1)], 0.7, 0.0, num_sites=2)
    >>> round(target.log_z, 6), round(math.log(4 * math.cosh(0.7)), 6)
    (1.613565, 1.613565)
    """
    pairs = np.asarray(edges, int).reshape(-1, 2)
    if pairs.size and (pairs.min() < 0 or pairs.max() >= num_sites):
        raise ValueError(
            f"edges has sites from {pairs.min()} to {pairs.max()}; there are {num_sites}, from 0."
        )
    couplings = np.broadcast_to(np.asarray(coupling, float), (len(pairs),))
    fields = np.broadcast_to(np.asarray(field, float), (num_sites,))
    apply = ising_energy(pairs).apply

    def energy(params, x):
        del params
        return apply(IsingParams(jnp.asarray(couplings, x.dtype), jnp.asarray(fields, x.dtype)), x)

    site = fields[:, None] * _SPINS
    return _pairwise_target(
        energy, (num_sites,), None, pairs, couplings, np.outer(_SPINS, _SPINS), site
    )


def ising_lattice(
    shape: tuple[int, ...],
    *,
    coupling: float,
    field: npt.ArrayLike = 0.0,
    periodic: bool = True,
) -> Target:
    """The Ising law on a lattice, x of this shape in {0, 1}.

    Args:
      shape: sides.
      coupling: K = J/τ.
      field: h/τ, [] or one a site.
      periodic: whether all sides close.

    Returns:
      A ``Target``; log Z is Kaufman's for a torus in 2-D without a field (of even sides, if K is
      negative), else by enumeration or by a transfer matrix where that is quick (a short side of at
      most 10 or so; ``exact_lattice.strip_log_z`` goes to 12), else ``None``.

    >>> target = ising_lattice((4, 4), coupling=0.4)
    >>> target.event_shape, round(target.log_z, 4)
    ((4, 4), 14.5611)
    """
    edges = lattice_edges(shape, periodic)
    fields = np.broadcast_to(np.asarray(field, float), shape)
    apply = ising_lattice_energy(periodic).apply

    def energy(params, x):
        del params
        field = jnp.asarray(fields, x.dtype) if np.ptp(fields) else x.dtype.type(fields.flat[0])
        return apply(IsingParams(x.dtype.type(coupling), field), x)

    couplings, bond = np.full(len(edges), float(coupling)), np.outer(_SPINS, _SPINS)
    site = fields[..., None] * _SPINS
    flat_site = site.reshape(-1, 2)
    target = _pairwise_target(energy, shape, None, edges, couplings, bond, flat_site)
    is_bipartite = all(side % 2 == 0 for side in shape)
    if len(shape) == 2 and periodic and not fields.any() and (coupling > 0 or is_bipartite):
        log_z = kaufman_log_z((shape[0], shape[1]), abs(coupling)) if coupling else None
        return target._replace(log_z=log_z if coupling else math.prod(shape) * math.log(2.0))
    return _with_strip(target, shape, float(coupling) * bond, site, periodic)


def _with_strip(
    target: Target, shape: tuple[int, ...], bond: np.ndarray, site: np.ndarray, periodic: bool
) -> Target:
    """Adds log Z by a transfer matrix where there is none and the strip is narrow."""
    if target.log_z is not None or len(shape) > 2:
        return target
    if len(shape) == 1:
        sides, closes, site = (1, shape[0]), (False, periodic), site[None]
    else:
        sides, closes = (shape[0], shape[1]), (periodic, periodic)
    if len(bond) ** (min(sides) * (2 if periodic else 1)) > _MAX_STRIP_WORK:
        return target
    return target._replace(log_z=strip_log_z(sides, bond, site, closes))


def _potts_energy(edges_or_lattice, coupling, field):
    def energy(params, x):
        del params
        weights = jnp.asarray(field, x.dtype)
        if isinstance(edges_or_lattice, np.ndarray):
            pairs = edges_or_lattice
            overlaps = jnp.sum(x[pairs[:, 0]] * x[pairs[:, 1]], axis=-1)
            return -jnp.sum(jnp.asarray(coupling, x.dtype) * overlaps) - jnp.sum(weights * x)
        total = 0.0
        for axis in range(x.ndim - 1):
            first, second = bonds(x, axis, edges_or_lattice)
            total = total + jnp.sum(first * second)
        return -x.dtype.type(coupling) * total - jnp.sum(weights * x)

    return energy


def potts(
    edges: npt.ArrayLike,
    coupling: npt.ArrayLike,
    field: npt.ArrayLike,
    *,
    num_sites: int,
) -> Target:
    """The Potts law on a graph, x [num_sites, K] one-hot.

    Args:
      edges: [number of edges, 2].
      coupling: J, [] or [number of edges].
      field: h, [K] or [num_sites, K].
      num_sites: N.

    Returns:
      A ``Target`` with log Z up to 2^20 states, and samples and moments up to 2^14.
    """
    pairs = np.asarray(edges, int).reshape(-1, 2)
    field = np.asarray(field, float)
    num_categories = field.shape[-1]
    couplings = np.broadcast_to(np.asarray(coupling, float), (len(pairs),))
    site = np.broadcast_to(field, (num_sites, num_categories))
    energy = _potts_energy(pairs, couplings, site)
    shape, bond = (num_sites, num_categories), np.eye(num_categories)
    return _pairwise_target(energy, shape, num_categories, pairs, couplings, bond, site)


def potts_lattice(
    shape: tuple[int, ...],
    *,
    num_categories: int,
    coupling: float,
    field: npt.ArrayLike = 0.0,
    periodic: bool = True,
) -> Target:
    """The Potts law on a lattice, x [*shape, K] one-hot.

    Args:
      shape: sides.
      num_categories: K >= 2.
      coupling: J/τ of equal neighbours.
      field: h/τ, [] or [K] or [*shape, K].
      periodic: whether all sides close.

    Returns:
      A ``Target`` with log Z by enumeration or by a transfer matrix where that is quick.

    >>> target = potts_lattice((4, 4), num_categories=3, coupling=0.5)
    >>> target.event_shape
    (4, 4, 3)
    """
    if num_categories < 2:
        raise ValueError(f"num_categories is {num_categories}; it must be at least 2.")
    edges = lattice_edges(shape, periodic)
    site = np.broadcast_to(np.asarray(field, float), (*shape, num_categories))
    energy = _potts_energy(periodic, float(coupling), site)
    couplings, bond = np.full(len(edges), float(coupling)), np.eye(num_categories)
    flat_site = site.reshape(-1, num_categories)
    event_shape = (*shape, num_categories)
    target = _pairwise_target(
        energy, event_shape, num_categories, edges, couplings, bond, flat_site
    )
    return _with_strip(target, shape, float(coupling) * bond, site, periodic)

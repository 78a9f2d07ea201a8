"""Laws on a grid: log Z, densities and divergences of low-dimensional energies by quadrature.

    Z ≈ Σ_i w_i exp(-E(x_i)),   p_i = exp(-E(x_i)) / Z
    KL(p‖q) ≈ Σ_i w_i p_i log(p_i / q_i),   TV(p, q) ≈ ½ Σ_i w_i |p_i - q_i|

with the trapezoidal rule on a regular grid: its error falls faster than any power of the spacing
for a smooth density that vanishes at the edge, and as the square of the spacing otherwise.

Shapes: D dimensions (1 or 2, more if the grid allows), G points along each.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

from ebjax.evaluation.checks import flat_examples
from ebjax.types import EnergyFn, Params, Target

__all__ = ["CellDistance", "GridLaw", "cell_total_variation", "grid_figures", "grid_law"]

_MAX_POINTS = 2**24
_POINTS_AT_A_TIME = 2**14

Bounds = tuple[float, float] | Sequence[tuple[float, float]]


class GridLaw(NamedTuple):
    """A law on a grid.

    Attributes:
      axes: D coordinates, each [G].
      energies: [G] * D.
      log_weights: [G] * D, logs of the quadrature's weights (volumes).
      log_density: [G] * D, -E - log Z.
      log_z: log of the integral over the box.
      log_z_error: absolute difference to the integral over every second point. For a smooth
        density the error of ``log_z`` itself is far smaller.
      boundary_mass: probability of the outermost points. Where the law is not meant to end at the
        box, a mass that is not tiny says that the box cuts off more.
    """

    axes: tuple[np.ndarray, ...]
    energies: np.ndarray
    log_weights: np.ndarray
    log_density: np.ndarray
    log_z: float
    log_z_error: float
    boundary_mass: float


@functools.partial(jax.jit, static_argnums=0)
def _energies(energy_fn, params, points):
    batch_size = min(len(points), _POINTS_AT_A_TIME)
    return jax.lax.map(lambda x: energy_fn(params, x), points, batch_size=batch_size)


def _axes(bounds: Bounds, num_points: int) -> tuple[np.ndarray, ...]:
    """[G] coordinates of each dimension; G is odd, so that every second point is a grid too."""
    box = np.asarray(bounds, np.float64)
    if box.shape == (2,):
        box = np.stack([box, box])
    if box.ndim != 2 or box.shape[1] != 2 or not len(box):
        raise ValueError(
            f"bounds is {bounds}; give (low, high) for a square, or a pair for each dimension."
        )
    if not (np.isfinite(box).all() and np.all(box[:, 0] < box[:, 1])):
        raise ValueError(f"bounds is {bounds}; each pair must be finite, the lower end first.")
    if num_points < 5:
        raise ValueError(f"num_points is {num_points}; a grid has at least 5 points a dimension.")
    num_points += 1 - num_points % 2
    if num_points ** len(box) > _MAX_POINTS:
        raise ValueError(
            f"{num_points} points in each of {len(box)} dimensions are too many; at most "
            f"{_MAX_POINTS} in all."
        )
    return tuple(np.linspace(low, high, num_points) for low, high in box)


def _log_weights(axes: Sequence[np.ndarray]) -> np.ndarray:
    """Trapezoidal rule: half of a cell at an end, so half of half in a corner."""
    total = np.zeros(())
    for axis in axes:
        weights = np.full(len(axis), axis[1] - axis[0])
        weights[[0, -1]] *= 0.5
        total = total[..., None] + np.log(weights)
    return total


def _log_sum_exp(values: np.ndarray) -> float:
    peak = values.max()
    return float(peak + np.log(np.exp(values - peak).sum()))


def _coarse(axes: Sequence[np.ndarray], *arrays: np.ndarray):
    """Every second point, with its weights."""
    skip = (slice(None, None, 2),) * len(axes)
    return _log_weights([axis[::2] for axis in axes]), *(array[skip] for array in arrays)


def grid_law(
    energy_fn: EnergyFn, params: Params, *, bounds: Bounds, num_points: int = 201
) -> GridLaw:
    """The law p ∝ exp(-E) on a box, by evaluating the energy at all points of a grid.

    Energies are evaluated in JAX's default precision and summed in float64.

    Args:
      energy_fn: E, of positions [D].
      params: its parameters.
      bounds: ``(low, high)`` for a square in two dimensions; ``[(low, high)]`` for one dimension;
        one pair for each dimension.
      num_points: G, points along each dimension; an even number is raised by one.

    Returns:
      A ``GridLaw``.

    Raises:
      ValueError: if the box or the grid is out of range, if an energy is NaN or -inf, or if all
        are infinite.

    >>> law = grid_law(lambda params, x: 0.5 * jnp.sum(x**2), (), bounds=(-8.0, 8.0))
    >>> round(law.log_z, 4), law.log_z_error < 1e-5, law.boundary_mass < 1e-9
    (1.8379, True, True)
    """
    axes = _axes(bounds, num_points)
    points = np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1)
    shape = points.shape[:-1]
    flat = jnp.asarray(points.reshape(-1, len(axes)), float)
    energies = np.asarray(_energies(energy_fn, params, flat), np.float64)
    if energies.shape != (len(flat),):
        raise ValueError(
            f"energy_fn gives shape {energies.shape[1:]} for one example; it must give a scalar."
        )
    energies = energies.reshape(shape)
    bad = int(np.sum(np.isnan(energies) | (energies == -np.inf)))
    if bad or not np.isfinite(energies).any():
        raise ValueError(
            f"The energy is NaN or -inf at {bad} of {energies.size} points and finite at "
            f"{np.isfinite(energies).sum()}; it must be finite or +inf, and finite somewhere."
        )
    log_weights = _log_weights(axes)
    log_z = _log_sum_exp(log_weights - energies)
    coarse_weights, coarse_energies = _coarse(axes, energies)
    inner = (slice(1, -1),) * len(axes)
    log_density = -energies - log_z
    inside = np.exp((log_weights + log_density)[inner]).sum()
    return GridLaw(
        axes=axes,
        energies=energies,
        log_weights=log_weights,
        log_density=log_density,
        log_z=log_z,
        log_z_error=abs(log_z - _log_sum_exp(coarse_weights - coarse_energies)),
        boundary_mass=float(max(1.0 - inside, 0.0)),
    )


def _divergence(log_weights: np.ndarray, log_p: np.ndarray, log_q: np.ndarray) -> float:
    """KL(p‖q) of laws normalised on the same grid; no mass of p contributes nothing."""
    has_mass = log_p > -np.inf
    mass = np.exp((log_weights + log_p)[has_mass])
    return float(np.sum(mass * (log_p - log_q)[has_mass]))


def grid_figures(model: GridLaw, reference: Target | GridLaw) -> dict[str, float]:
    """Exact distances of a model from a known law, both on the model's grid.

    Args:
      model: from ``grid_law``.
      reference: the law to compare with: a ``Target``, whose energy is evaluated on the same grid
        and normalised there, or another ``GridLaw`` on it.

    Returns:
      In nats: ``kl_reference_model`` = KL(reference‖model), what maximum likelihood minimises;
      ``kl_model_reference``; ``total_variation`` in [0, 1]; ``entropy_model`` and
      ``entropy_reference``; and what they rest on: ``log_z`` and ``log_z_error`` of the model,
      ``kl_error`` (the larger change of the two divergences on every second point) and
      ``boundary_mass`` (the larger of both laws).

    Raises:
      ValueError: if the two grids differ.

    >>> energy_fn = lambda mean, x: 0.5 * jnp.sum((x - mean) ** 2)
    >>> box = {"bounds": (-9.0, 9.0), "num_points": 101}
    >>> laws = [grid_law(energy_fn, mean, **box) for mean in (0.0, 1.0)]
    >>> round(grid_figures(*laws)["kl_reference_model"], 4)
    1.0
    """
    axes = model.axes
    if not isinstance(reference, GridLaw):
        ends = [(axis[0], axis[-1]) for axis in axes]
        reference = grid_law(reference.energy, (), bounds=ends, num_points=len(axes[0]))
    same = len(axes) == len(reference.axes) and all(
        np.array_equal(a, b) for a, b in zip(axes, reference.axes, strict=True)
    )
    if not same:
        raise ValueError(
            f"The grids differ: {[(a[0], a[-1], len(a)) for a in axes]} and "
            f"{[(a[0], a[-1], len(a)) for a in reference.axes]} as (low, high, points)."
        )

    def both_divergences(log_weights, log_p, log_q):
        log_p = log_p - _log_sum_exp(log_weights + log_p)
        log_q = log_q - _log_sum_exp(log_weights + log_q)
        with np.errstate(invalid="ignore"):  # -inf - -inf, where neither has mass
            pairs = ((log_q, log_p), (log_p, log_q))
            return np.array([_divergence(log_weights, *pair) for pair in pairs])

    log_p, log_q, log_weights = model.log_density, reference.log_density, model.log_weights
    divergences = both_divergences(log_weights, log_p, log_q)
    coarse = both_divergences(*_coarse(axes, log_p, log_q))
    with np.errstate(invalid="ignore"):  # both infinite: no change
        change = np.where(divergences == coarse, 0.0, divergences - coarse)
    densities = np.exp(log_p), np.exp(log_q)
    entropies = [
        -np.sum(np.exp(log_weights) * p * np.where(p > 0.0, log, 0.0))
        for p, log in zip(densities, (log_p, log_q), strict=True)
    ]
    difference = np.abs(densities[0] - densities[1])
    return {
        "kl_reference_model": float(divergences[0]),
        "kl_model_reference": float(divergences[1]),
        "total_variation": float(0.5 * np.sum(np.exp(log_weights) * difference)),
        "entropy_model": float(entropies[0]),
        "entropy_reference": float(entropies[1]),
        "log_z": model.log_z,
        "log_z_error": model.log_z_error,
        "kl_error": float(np.abs(change).max()),
        "boundary_mass": max(model.boundary_mass, reference.boundary_mass),
    }


class CellDistance(NamedTuple):
    """``total_variation`` in [0, 1] of draws, and ``of_exact_draws``, the mean of as many exact."""

    total_variation: float
    of_exact_draws: float


def cell_total_variation(
    draws: npt.ArrayLike, law: GridLaw, *, num_cells: int = 12, num_repeats: int = 50
) -> CellDistance:
    """How far draws are from a law on a grid: ½ Σ |share of the draws - mass| over equal cells.

    Shares of finitely many draws differ from the masses by chance; what that alone gives is
    returned beside the distance, from repeated draws of cells with a fixed seed. Draws outside of
    the box count as a cell without mass.

    Args:
      draws: [N, D].
      law: of the same D.
      num_cells: along each dimension.
      num_repeats: of N exact draws.

    Returns:
      A ``CellDistance``.

    Raises:
      ValueError: if draws are not finite or of another D, or there are more cells than points.

    >>> law = grid_law(lambda params, x: 0.5 * jnp.sum(x**2), (), bounds=(-8.0, 8.0))
    >>> draws = np.random.default_rng(0).normal(size=(4000, 2))
    >>> distance = cell_total_variation(draws, law)
    >>> 0.5 < distance.total_variation / distance.of_exact_draws < 2.0
    True
    >>> bool(cell_total_variation(draws + 0.5, law).total_variation > 0.1)
    True
    """
    points = flat_examples("draws", draws, 1)
    dim, num_points = len(law.axes), len(law.axes[0])
    if points.shape[1] != dim:
        raise ValueError(f"draws have {points.shape[1]} coordinates and the law {dim}.")
    if not 1 <= num_cells < num_points:
        raise ValueError(f"num_cells is {num_cells}; it must be from 1 to {num_points - 1}.")
    edges = [np.linspace(axis[0], axis[-1], num_cells + 1) for axis in law.axes]
    grid = np.stack(np.meshgrid(*law.axes, indexing="ij"), axis=-1).reshape(-1, dim)
    point_masses = np.exp(law.log_weights + law.log_density).ravel()
    masses, _ = np.histogramdd(grid, edges, weights=point_masses)
    counts, _ = np.histogramdd(points, edges)
    masses = np.append(masses.ravel() / masses.sum(), 0.0)
    shares = np.append(counts.ravel(), len(points) - counts.sum()) / len(points)
    exact = np.random.default_rng(0).multinomial(len(points), masses, size=num_repeats)
    return CellDistance(
        total_variation=float(0.5 * np.abs(shares - masses).sum()),
        of_exact_draws=float(0.5 * np.abs(exact / len(points) - masses).sum(axis=1).mean()),
    )

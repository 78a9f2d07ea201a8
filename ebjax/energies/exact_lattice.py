"""Exact solutions of lattice models: transfer matrices, Onsager's and Kaufman's formulas.

All in float64 by NumPy, on the host.

    strip     Z = Σ over rows Π D(row) Π_i B(row_i, next row_i),  B = exp(log weight of a bond)
    Kaufman   Z of the Ising torus of m x n sites without a field, K = J/τ
    Onsager   energy a spin of the infinite square lattice

Kramers and Wannier, Phys. Rev. 60 (1941); Onsager, Phys. Rev. 65 (1944); Kaufman, Phys. Rev. 76
(1949).
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

__all__ = ["kaufman_energy", "kaufman_log_z", "onsager_energy", "strip_log_z"]

_MAX_STRIP_STATES = 2**24


def strip_log_z(
    shape: tuple[int, int],
    bond: npt.ArrayLike,
    site: npt.ArrayLike,
    periodic: bool | tuple[bool, bool],
) -> float:
    """log Z of a nearest-neighbour model on a strip, by a transfer matrix applied row by row.

    Args:
      shape: sides; the work is of the order of K^(short side) a row, and of its square where the
        long side is periodic.
      bond: [K, K] log weights -E of a pair of neighbours, symmetric.
      site: log weights -E of a site, [K] or one for each site [*shape, K].
      periodic: whether each side closes; one that closes has at least 2 sites.

    Returns:
      log Z.

    Raises:
      ValueError: if a strip needs more than 2^24 numbers.
    """
    bond = np.asarray(bond, float)
    closes = (periodic, periodic) if isinstance(periodic, bool) else tuple(periodic)
    num_values = len(bond)
    site = np.broadcast_to(np.asarray(site, float), (*shape, num_values))
    if shape[0] > shape[1]:
        shape, closes, site = shape[::-1], closes[::-1], site.swapaxes(0, 1)
    width, length = shape
    if num_values ** (width * (2 if closes[1] else 1)) > _MAX_STRIP_STATES:
        raise ValueError(
            f"a strip of width {width} with {num_values} values a site is too wide; it needs "
            f"at most {_MAX_STRIP_STATES} numbers."
        )
    axes = range(width)

    def along(vector, axis):
        """[K] * width array that varies along one axis of a row."""
        return vector.reshape([-1 if i == axis else 1 for i in axes])

    within = np.zeros((num_values,) * width)
    for axis in range(width if closes[0] else width - 1):
        other = (axis + 1) % width
        pair = [1] * width
        pair[axis] = pair[other] = num_values
        within = within + (bond if axis < other else bond.T).reshape(pair)
    rows = [within + sum(along(site[i, j], i) for i in axes) for j in range(length)]
    weights = np.exp(bond - bond.max())

    def transfer(state):
        # The row is the last `width` axes; a bond acts on each of them apart.
        for axis in range(state.ndim - width, state.ndim):
            state = np.moveaxis(np.tensordot(state, weights, axes=(axis, 0)), -1, axis)
        return state

    log_scale = rows[0].max()
    state = np.exp(rows[0] - log_scale)
    if closes[1]:
        first = np.eye(state.size).reshape(state.size, *state.shape)
        state = first * state
    for row in rows[1:]:
        state = transfer(state) * np.exp(row - row.max())
        peak = state.max()
        state /= peak
        log_scale += row.max() + width * bond.max() + math.log(peak)
    if closes[1]:
        state = transfer(state)
        log_scale += width * bond.max()
        size = len(state)
        return float(log_scale + math.log(np.trace(state.reshape(size, size))))
    return float(log_scale + math.log(state.sum()))


def _kaufman_terms(
    shape: tuple[int, int], coupling: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Logs, signs and d log/dK of the four products of Kaufman's formula."""
    num_modes, length = shape
    base = math.cosh(2 * coupling) / math.tanh(2 * coupling)
    # d/dK of cosh(2K) coth(2K)
    base_slope = (
        2 * math.cosh(2 * coupling) - 2 * math.cosh(2 * coupling) / math.sinh(2 * coupling) ** 2
    )
    angles = np.pi * np.arange(2 * num_modes) / num_modes
    cosh_gamma = np.maximum(base - np.cos(angles), 1.0)
    gamma = np.arccosh(cosh_gamma)
    sinh_gamma = np.sqrt(cosh_gamma**2 - 1.0)
    slope = np.divide(base_slope, sinh_gamma, out=np.zeros_like(gamma), where=sinh_gamma > 1e-12)
    gamma[0] = 2 * coupling + math.log(math.tanh(coupling))
    slope[0] = 2.0 + 2.0 / math.sinh(2 * coupling)
    logs, signs, slopes = [], [], []
    for parity in (1, 0):
        half, slope_half = 0.5 * length * gamma[parity::2], 0.5 * length * slope[parity::2]
        size = np.abs(half)
        logs.append(np.sum(size + np.log1p(np.exp(-2 * size))))
        signs.append(1.0)
        slopes.append(np.sum(slope_half * np.tanh(half)))
        with np.errstate(divide="ignore", invalid="ignore"):
            logs.append(np.sum(size + np.log(-np.expm1(-2 * size))))
            signs.append(float(np.prod(np.sign(half))))
            slopes.append(np.sum(slope_half / np.tanh(half)))
    return np.array(logs), np.array(signs), np.array(slopes)


def _check_torus(shape: tuple[int, int], coupling: float) -> None:
    if len(shape) != 2 or min(shape) < 2:
        raise ValueError(f"shape is {shape}; the formula is for two sides of at least 2.")
    if not coupling > 0:
        raise ValueError(f"coupling is {coupling}; it must be positive.")


def kaufman_log_z(shape: tuple[int, int], coupling: float) -> float:
    """log Z of the Ising torus with ``E = -K Σ_<ij> s_i s_j``, K > 0; any two sides >= 2.

    A side of 2 counts the bond between its two spins twice.

    Raises:
      ValueError: if the shape is not of two such sides or K is not positive.

    >>> round(kaufman_log_z((2, 2), 0.1), 6)  # log(12 + 4 cosh(0.8))
    2.853578
    """
    _check_torus(shape, coupling)
    logs, signs, _ = _kaufman_terms(shape, coupling)
    peak = logs.max()
    total = math.log(np.sum(signs * np.exp(logs - peak)))
    size = math.prod(shape)
    constant = 0.5 * size * math.log(2.0 * math.sinh(2.0 * coupling)) - math.log(2.0)
    return float(constant + peak + total)


def kaufman_energy(shape: tuple[int, int], coupling: float) -> float:
    """Mean of ``-Σ_<ij> s_i s_j`` a spin on the Ising torus: -d log Z / dK / (m n).

    Raises:
      ValueError: as ``kaufman_log_z``.
    """
    _check_torus(shape, coupling)
    logs, signs, slopes = _kaufman_terms(shape, coupling)
    if not np.isfinite(slopes).all():
        # sinh(0) at the critical point, to the last bit: its logarithm has no slope there.
        logs, signs, slopes = _kaufman_terms(shape, coupling * (1.0 + 1e-13))
    weights = signs * np.exp(logs - logs.max())
    size = math.prod(shape)
    mean_slope = np.sum(weights * slopes) / weights.sum()
    return float(-1.0 / math.tanh(2.0 * coupling) - mean_slope / size)


def onsager_energy(coupling: float) -> float:
    """Mean of ``-Σ_<ij> s_i s_j`` a spin on the infinite square lattice, K > 0.

    ``-coth(2K) (1 + (2/π) (2 tanh²(2K) - 1) F(k))`` with the complete elliptic integral F of the
    modulus ``k = 2 sinh(2K) / cosh²(2K)``, by the arithmetic-geometric mean.

    Raises:
      ValueError: if K is not positive.

    >>> round(onsager_energy(0.3), 6)
    -0.704499
    """
    if not coupling > 0:
        raise ValueError(f"coupling is {coupling}; it must be positive.")
    tanh = math.tanh(2.0 * coupling)
    factor = 2.0 * tanh**2 - 1.0
    mean = 1.0
    if factor != 0.0:
        # sqrt(1 - k²) is |2 tanh² - 1|.
        first, second = 1.0, abs(factor)
        while abs(first - second) > 1e-15 * first:
            first, second = 0.5 * (first + second), math.sqrt(first * second)
        mean += factor / first
    return -mean / tanh

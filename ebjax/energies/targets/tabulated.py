"""Laws on an interval, by quadrature on a fine grid: normaliser, moments and exact draws.

The integrands are smooth. Where they die off at the ends too, the trapezoid rule converges faster
than any power of the step, and its error is that of rounding.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

__all__ = ["TabulatedLaw", "tabulate"]

_NUM_POINTS = 20_001


class TabulatedLaw(NamedTuple):
    """A law on ``[grid[0], grid[-1]]``.

    Attributes:
      grid: [G] equally spaced points.
      weights: [G] probabilities of the points, summing to 1: E[f] = Σ weights f(grid).
      cumulative: [G] its distribution function.
      log_z: log of the integral of exp(-energy).
    """

    grid: np.ndarray
    weights: np.ndarray
    cumulative: np.ndarray
    log_z: float

    def mean(self, function: Callable[[np.ndarray], np.ndarray] = lambda x: x) -> float:
        """E[function(x)]."""
        return float(self.weights @ function(self.grid))

    def sample(self, key: jax.Array, shape: tuple[int, ...] = ()) -> jax.Array:
        """Draws by inverting the distribution function, linear between the points."""
        uniform = jax.random.uniform(key, shape)
        return jnp.interp(uniform, jnp.asarray(self.cumulative), jnp.asarray(self.grid))


def tabulate(energy: Callable[[np.ndarray], np.ndarray], low: float, high: float) -> TabulatedLaw:
    """The law proportional to ``exp(-energy(x))`` on ``[low, high]``."""
    grid = np.linspace(low, high, _NUM_POINTS)
    energies = energy(grid)
    lowest = energies.min()
    density = np.exp(lowest - energies)
    cumulative = np.concatenate([[0.0], np.cumsum(0.5 * (density[1:] + density[:-1]))])
    weights = density / cumulative[-1]
    weights[[0, -1]] *= 0.5
    log_z = np.log(cumulative[-1] * (grid[1] - grid[0])) - lowest
    return TabulatedLaw(grid, weights, cumulative / cumulative[-1], float(log_z))

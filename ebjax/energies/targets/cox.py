"""The log-Gaussian Cox process on a grid: how a rate over the unit square explains its points.

    x ~ N(μ 1, K),   K_mn = s² exp(-|m - n| / (β n)),   y_m | x ~ Poisson(a e^{x_m}),   a = 1/n²

over n x n cells m with counts y. With s² = 1.91, β = 1/33, μ = log 126 - s²/2 and n = 40 it is the
model of Møller, Syversveen and Waagepetersen, "Log Gaussian Cox processes", Scandinavian Journal of
Statistics 25 (1998), and the benchmark of Heng et al., "Controlled sequential Monte Carlo", Annals
of Statistics 48 (2020). As there, the likelihood is Σ_m x_m y_m - a e^{x_m}: terms that do not
depend on x are left out, so that figures for log Z compare.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

from ebjax.energies.targets.gaussian import diagonal_gaussian
from ebjax.energies.targets.posterior import Posterior, make_posterior
from ebjax.energies.targets.reductions import half_quadratic_form, matrix_product, total
from ebjax.types import Moments, Target

__all__ = ["count_points", "log_gaussian_cox"]

_VARIANCE = 1.91
_LENGTH_SCALE = 1.0 / 33.0
_MEAN = math.log(126.0) - 0.5 * _VARIANCE


def count_points(points: npt.ArrayLike, grid_size: int) -> np.ndarray:
    """Counts [n, n] of ``points`` [N, 2] in the cells of the unit square.

    The first coordinate is the row. Points on the far edges belong to the last cells.

    Raises:
      ValueError: if the points are not [N, 2] or not all in the unit square.

    >>> count_points([[0.1, 0.9], [1.0, 1.0], [0.2, 0.7]], 2).tolist()
    [[0, 2], [0, 1]]
    """
    points = np.asarray(points, float)
    if points.ndim != 2 or points.shape[1] != 2:
        raise ValueError(f"points has shape {points.shape}; it must be [N, 2].")
    if not np.all((points >= 0.0) & (points <= 1.0)):
        raise ValueError("Some points lie outside the unit square; rescale them to [0, 1]².")
    cells = np.minimum((points * grid_size).astype(int), grid_size - 1)
    counts = np.zeros((grid_size, grid_size), int)
    np.add.at(counts, (cells[:, 0], cells[:, 1]), 1)
    return counts


def log_gaussian_cox(
    grid_size: int = 40,
    *,
    counts: npt.ArrayLike | None = None,
    seed: int = 0,
    is_whitened: bool = False,
) -> Posterior:
    """The posterior of x given the counts, in D = n² dimensions.

    Args:
      grid_size: n, cells along one edge.
      counts: y [n, n], nonnegative; ``count_points`` makes them of points, such as the 126 pines of
        the papers. By default they are drawn from the model with ``seed``.
      seed: of NumPy's ``default_rng``.
      is_whitened: whether positions are z ~ N(0, I) with x = μ + L z and K = L L', rather than x.
        log Z is the same.

    Returns:
      A ``Posterior`` over [n²]; log Z, moments and exact draws are not known, those of the prior
      are. One product with an n² x n² matrix an evaluation with gradient, two if whitened.

    Raises:
      ValueError: if the counts are not n x n nonnegative numbers.
    """
    if grid_size < 1:
        raise ValueError(f"grid_size is {grid_size}; it must be at least 1.")
    num_cells = grid_size**2
    covariance = _covariance(grid_size)
    root = np.linalg.cholesky(covariance)
    y = _draw_counts(root, seed) if counts is None else np.asarray(counts)
    if y.shape != (grid_size, grid_size) or not np.all(y >= 0):
        raise ValueError(
            f"counts has shape {y.shape}; it must be [{grid_size}, {grid_size}] and not negative."
        )
    y = y.astype(float).ravel()

    def unwhitened_likelihood(params, x):
        del params
        return total(jnp.exp(x) / num_cells - jnp.asarray(y, x.dtype) * x)

    def whitened_likelihood(params, z):
        return unwhitened_likelihood(params, matrix_product(root, z) + _MEAN)

    if is_whitened:
        prior = diagonal_gaussian(np.zeros(num_cells), np.ones(num_cells), is_normalised=True)
        return make_posterior(prior, whitened_likelihood)
    return make_posterior(_prior(covariance, root), unwhitened_likelihood)


def _covariance(grid_size: int) -> np.ndarray:
    cells = np.stack(np.meshgrid(*2 * [np.arange(grid_size)], indexing="ij"), -1).reshape(-1, 2)
    distances = np.linalg.norm(cells[:, None] - cells[None], axis=-1)
    return _VARIANCE * np.exp(-distances / (grid_size * _LENGTH_SCALE))


def _draw_counts(root: np.ndarray, seed: int) -> np.ndarray:
    generator = np.random.default_rng(seed)
    rates = np.exp(_MEAN + root @ generator.normal(size=len(root))) / len(root)
    return generator.poisson(rates).reshape(2 * [math.isqrt(len(root))])


def _prior(covariance: np.ndarray, root: np.ndarray) -> Target:
    dim = len(covariance)
    precision = np.linalg.inv(covariance)
    form = half_quadratic_form(0.5 * (precision + precision.T))
    log_z = 0.5 * dim * math.log(2.0 * math.pi) + float(np.log(np.diag(root)).sum())

    def energy(params, x):
        del params
        return form(x - _MEAN) + log_z

    def sample(key):
        noise = jax.random.normal(key, (dim,))
        return _MEAN + matrix_product(root, noise)

    mean = np.full(dim, _MEAN)
    moments = Moments(jnp.asarray(mean), jnp.asarray(covariance))
    return Target(energy, (dim,), 0.0, sample, moments, jnp.asarray(mean)[None])

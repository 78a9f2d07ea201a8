"""Distance of draws from a law: Stein discrepancy, maximum mean discrepancy, error of log Z.

The law p ∝ exp(-E) is known by its gradient (Stein) or by exact samples (MMD).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy.typing as npt
from jax.flatten_util import ravel_pytree
from scipy.special import stdtrit

from ebjax.numerics import full_precision_matmul
from ebjax.samplers.evaluate import value_and_gradient
from ebjax.types import EnergyFn, Params, Position, PyTree

__all__ = [
    "LogZInterval",
    "kernel_stein_discrepancy",
    "log_z_interval",
    "maximum_mean_discrepancy",
]

# Entries of a kernel matrix that exist at a time.
_PAIRS_AT_A_TIME = 2**22
# Points whose distances give a median; its error is far below what the width needs.
_MEDIAN_POINTS = 1_000


def _flat(name: str, points: PyTree, minimum: int) -> jax.Array:
    """Pytree of [B, ...] -> [B, D]."""
    leaves = jax.tree.leaves(points)
    if not leaves or any(jnp.ndim(leaf) < 1 for leaf in leaves):
        raise ValueError(f"{name} has no leading axis of points; give it as [B, ...].")
    sizes = [len(leaf) for leaf in leaves]
    if len(set(sizes)) > 1 or sizes[0] < minimum:
        raise ValueError(
            f"{name} has {sizes} points in its leaves; all must have the same number, at least "
            f"{minimum}."
        )
    return jax.vmap(lambda x: ravel_pytree(x)[0])(points)


def _sum_of_rows(row: Callable[[jax.Array], jax.Array], num_rows: int, width: int) -> jax.Array:
    """``sum_i row(i)`` for rows of ``width`` entries, some rows at a time."""
    size = max(1, _PAIRS_AT_A_TIME // width)
    return jax.lax.map(row, jnp.arange(num_rows), batch_size=min(size, num_rows)).sum(axis=0)


def kernel_stein_discrepancy(
    energy_fn: EnergyFn,
    params: Params,
    positions: Position,
    *,
    length_scale: float | jax.Array = 1.0,
    is_unbiased: bool = False,
) -> jax.Array:
    """Squared kernel Stein discrepancy of points from p ∝ exp(-E), with no normaliser or sample.

        KSD² = mean_ij u(x_i, x_j),    s = -∇E,    k(x, y) = (1 + |x - y|²)^(-1/2),
        u(x, y) = s(x)·s(y) k + s(x)·∇_y k + s(y)·∇_x k + tr ∇_x ∇_y k

    in the coordinates x / l.

    Its expectation is zero for draws from p and, with this kernel, it goes to zero only where the
    law goes to p, provided that p has light tails. It does not see missing modes that are far
    apart: between them u is small.

    Gorham and Mackey, "Measuring sample quality with kernels", ICML 2017.

    Args:
      energy_fn: E.
      params: its parameters.
      positions: pytree of [B, ...]; of ``sample``'s [N, C, ...], two axes made one. Work grows
        with B², memory with B.
      length_scale: l > 0, a number or one for each component [D].
      is_unbiased: (static) leave the pairs i = j out: then zero in expectation under p, and
        possibly negative.

    Returns:
      [], squared.

    Raises:
      ValueError: if there are fewer than two points.

    >>> import jax
    >>> energy_fn = lambda params, x: 0.5 * jnp.sum((x - params) ** 2)
    >>> x = jax.random.normal(jax.random.key(0), (500, 2))
    >>> right, wrong = (kernel_stein_discrepancy(energy_fn, mean, x) for mean in (0.0, 1.0))
    >>> bool(right < 0.02), bool(wrong > 0.5)
    (True, True)
    """
    flat = _flat("positions", positions, 2)
    return _stein(
        params, positions, flat, length_scale, energy_fn=energy_fn, is_unbiased=is_unbiased
    )


@functools.partial(jax.jit, static_argnames=("energy_fn", "is_unbiased"))
def _stein(params, positions, flat, length_scale, *, energy_fn, is_unbiased):
    gradients = jax.vmap(lambda x: ravel_pytree(value_and_gradient(energy_fn, params, x)[1])[0])
    # In the coordinates x / l the kernel has width 1 and the score is l times as large.
    score = -gradients(positions) * length_scale
    points = flat / length_scale
    num_points, dim = points.shape

    def row(i):
        difference = points[i] - points
        squares = jnp.square(difference).sum(axis=-1)
        root = jax.lax.rsqrt(1.0 + squares)
        cubed = root**3
        pulls = (difference * (score[i] - score)).sum(axis=-1)
        products = full_precision_matmul(score, score[i])
        u = products * root + (pulls + dim) * cubed - 3.0 * squares * root**5
        if is_unbiased:
            u = jnp.where(jnp.arange(num_points) == i, 0.0, u)
        return u.sum()

    total = _sum_of_rows(row, num_points, num_points * dim)
    return total / (num_points * (num_points - is_unbiased))


def maximum_mean_discrepancy(
    first: PyTree, second: PyTree, *, bandwidth: float | jax.Array | None = None
) -> jax.Array:
    """Unbiased squared MMD of two samples with ``k(x, y) = exp(-|x - y|² / m)``.

        mean_{i≠j} k(x_i, x_j) + mean_{i≠j} k(y_i, y_j) - 2 mean_{ij} k(x_i, y_j)

    Zero in expectation for equal laws; it may be slightly negative.

    Gretton, Borgwardt, Rasch, Schölkopf and Smola, "A kernel two-sample test", JMLR 13 (2012).

    Args:
      first: pytree of [B, ...]; of ``sample``'s [N, C, ...], two axes made one.
      second: pytree of [M, ...], such as exact samples. Work grows with (B + M)², memory with
        B + M.
      bandwidth: m > 0; by default the median squared distance between points of both samples
        (of at most 1,000 of them, evenly spaced). Give it where several values are compared.

    Returns:
      [], squared.

    Raises:
      ValueError: if a sample has fewer than two points, or their points differ in size.

    >>> import jax
    >>> x, y = jax.random.normal(jax.random.key(0), (2, 500, 3))
    >>> bool(abs(maximum_mean_discrepancy(x, y)) < 0.005)
    True
    >>> bool(maximum_mean_discrepancy(x, y + 1.0) > 0.1)
    True
    """
    x, y = _flat("first", first, 2), _flat("second", second, 2)
    if x.shape[1] != y.shape[1]:
        raise ValueError(
            f"Points of first have {x.shape[1]} components and those of second {y.shape[1]}; they "
            "must have the same."
        )
    return _mmd(x, y, bandwidth)


def _median_square(x: jax.Array, y: jax.Array) -> jax.Array:
    points = jnp.concatenate([x, y])
    points = points[:: -(-len(points) // _MEDIAN_POINTS)]
    squares = jax.lax.map(lambda p: jnp.square(p - points).sum(-1), points, batch_size=64)
    pairs = jnp.triu_indices(len(points), 1)
    return jnp.maximum(jnp.median(squares[pairs]), jnp.finfo(x.dtype).tiny)


@jax.jit
def _mmd(x, y, bandwidth):
    width = _median_square(x, y) if bandwidth is None else bandwidth

    def total(a, b, *, is_same):
        def row(i):
            kernel = jnp.exp(-jnp.square(a[i] - b).sum(axis=-1) / width)
            # The diagonal is taken out of each row and not at the end, where it would cancel.
            return (
                jnp.where(jnp.arange(len(b)) == i, 0.0, kernel).sum() if is_same else kernel.sum()
            )

        pairs = len(a) * (len(b) - is_same)
        return _sum_of_rows(row, len(a), b.size) / pairs

    within = total(x, x, is_same=True) + total(y, y, is_same=True)
    return within - 2.0 * total(x, y, is_same=False)


class LogZInterval(NamedTuple):
    """An estimate of log Z and how far it may be off.

    Attributes:
      log_z: [] log of the mean of the estimates of Z.
      lower: [] end of the confidence interval.
      upper: [] the other end.
      standard_error: [] of ``log_z``, to first order in that of Z.
      effective_sample_size: [] ``(sum w)² / sum w²``; where it is small the interval is too
        narrow, because large weights that were not drawn are not known.
    """

    log_z: jax.Array
    lower: jax.Array
    upper: jax.Array
    standard_error: jax.Array
    effective_sample_size: jax.Array


def log_z_interval(log_weights: npt.ArrayLike, *, confidence: float = 0.95) -> LogZInterval:
    """Confidence interval of log Z from independent unbiased estimates of Z.

        Z = mean w,    standard error of log Z = sd(w) / (Z sqrt(B)),    log Z ± t · error

    with t of Student's law of B - 1 degrees of freedom.

    Args:
      log_weights: [B] logs of the estimates: either importance log weights of independent draws,
        ``-E(x) - log q(x)``, or the ``log_z`` of B independent runs (annealed importance sampling
        or sequential Monte Carlo, whose estimates of Z, and not of log Z, are unbiased). Weights
        of particles that were resampled are not independent: use runs. ``-inf`` is a weight of 0.
      confidence: in (0, 1), static.

    Returns:
      A ``LogZInterval``.

    Raises:
      ValueError: if there are fewer than two estimates, or ``confidence`` is out of range.

    >>> interval = log_z_interval([0.1, -0.1, 0.05, -0.05])
    >>> bool(interval.lower < 0.0 < interval.upper)
    True
    """
    log_weights = jnp.asarray(log_weights)
    if log_weights.ndim != 1 or len(log_weights) < 2:
        raise ValueError(f"log_weights has shape {log_weights.shape}; give at least two, [B].")
    if not 0.0 < confidence < 1.0:
        raise ValueError(f"confidence is {confidence}; it must lie between 0 and 1.")
    log_weights = log_weights.astype(jnp.promote_types(log_weights.dtype, jnp.float32))
    num = len(log_weights)
    log_z = jax.scipy.special.logsumexp(log_weights) - jnp.log(num)
    ratio = jnp.exp(log_weights - log_z)
    error = jnp.std(ratio, ddof=1) / jnp.sqrt(num)
    width = stdtrit(num - 1, 0.5 + 0.5 * confidence) * error
    return LogZInterval(
        log_z=log_z,
        lower=log_z - width,
        upper=log_z + width,
        standard_error=error,
        effective_sample_size=num**2 / jnp.square(ratio).sum(),
    )

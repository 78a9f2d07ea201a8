"""Convergence of chains: effective sample size, R-hat, autocorrelation, Monte Carlo error.

With ``n`` draws of each of ``m`` chains, ``s_t`` the mean over chains of the autocovariance at
lag t (divisor n), ``W = s_0 n / (n - 1)`` and ``B`` the variance of the chains' means:

    V = s_0 + B,    R-hat = sqrt(V / W),    rho_t = 1 - (W - s_t) / V,
    ESS = m n / tau,    tau = -1 + 2 sum_t rho_t    (Geyer's truncation, pairs made monotone)

Chains are split into halves first, so that a drift shows as a difference between chains, and where
a rule says so the draws are replaced by the normal scores of their ranks, which is good for laws
without moments too. The numbers are those of ArviZ.

Draws have the axes [N, C, ...] in every leaf, as ``sample`` returns them, and a result has the
axes [...]. Components are taken one after another where there are many draws, so that the memory
in use is a few copies of one component [N, C], not of everything.

Vehtari, Gelman, Simpson, Carpenter and Bürkner, "Rank-normalization, folding, and localization:
an improved R-hat for assessing convergence of MCMC", Bayesian Analysis 16 (2021).
Geyer, "Practical Markov chain Monte Carlo", Statistical Science 7 (1992).
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from ebjax.samplers.diagnostics.component import (
    ERROR_METHODS,
    ESS_METHODS,
    R_HAT_METHODS,
    autocorrelation_of,
)
from ebjax.types import PyTree, bind

__all__ = [
    "autocorrelation",
    "effective_sample_size",
    "integrated_autocorrelation_time",
    "map_jitted",
    "monte_carlo_error",
    "r_hat",
]

MIN_DRAWS = 4
# Draws worked on at a time: one component where N C is larger, many where it is smaller.
_DRAWS_AT_A_TIME = 2**21


def check_draws(draws: PyTree) -> None:
    """Raises ``ValueError`` unless every leaf is [N, C, ...], N at least 4, with common N and C."""
    shapes = [jnp.shape(leaf) for leaf in jax.tree.leaves(draws)]
    if not shapes or any(len(shape) < 2 for shape in shapes):
        raise ValueError(
            f"draws has leaves of shapes {shapes}; each must be [N, C, ...], samples before chains "
            "(give draws of one chain as x[:, None])."
        )
    if len({shape[:2] for shape in shapes}) > 1:
        raise ValueError(f"draws has leaves of shapes {shapes}; all must begin with the same N, C.")
    if shapes[0][0] < MIN_DRAWS or shapes[0][1] < 1:
        raise ValueError(
            f"draws has N = {shapes[0][0]} samples of C = {shapes[0][1]} chains; at least "
            f"{MIN_DRAWS} samples of 1 chain are needed."
        )


def map_components(function: Callable[[jax.Array], PyTree], draws: PyTree) -> PyTree:
    """``function`` ([N, C] -> arrays) of each component of each leaf; [...] axes come first."""

    def of_leaf(leaf):
        leaf = jnp.asarray(leaf)
        leaf = leaf.astype(jnp.promote_types(leaf.dtype, jnp.float32))
        num_draws, num_chains, *event = leaf.shape
        components = jnp.moveaxis(leaf.reshape(num_draws, num_chains, -1), -1, 0)
        batch_size = max(1, _DRAWS_AT_A_TIME // (num_draws * num_chains))
        if len(components) <= batch_size:
            results = jax.vmap(function)(components)
        else:
            results = jax.lax.map(function, components, batch_size=batch_size)
        return jax.tree.map(lambda r: r.reshape(*event, *r.shape[1:]), results)

    return jax.tree.map(of_leaf, draws)


def effective_sample_size(
    draws: PyTree, *, method: str = "bulk", probability: float | None = None
) -> PyTree:
    """Number of independent draws whose mean is as precise, of each component.

    Args:
      draws: pytree of [N, C, ...], N at least 4.
      method: of what the precision is meant (static):
        ``"bulk"`` the location: normal scores of ranks, split chains;
        ``"tail"`` the worse of the 5 % and 95 % quantiles;
        ``"mean"``, ``"sd"``, ``"median"``, or ``"quantile"`` with its ``probability``, each of
        split chains;
        ``"identity"`` the mean, of chains that are not split.
      probability: in (0, 1), for ``"quantile"`` (static).

    Returns:
      Pytree of [...]. At most N C log10(N C) (chains with negative correlation have more than
      N C). NaN where a draw is not finite. Draws that are all equal count as N C, as in ArviZ,
      though they say nothing; their R-hat is NaN.

    Raises:
      ValueError: naming the shape or option that is out of range.

    >>> import jax
    >>> x = jax.random.normal(jax.random.key(0), (500, 4))
    >>> bool(1_500 < effective_sample_size(x) < 2_500)
    True
    """
    check_draws(draws)
    if method not in ESS_METHODS:
        raise ValueError(f"method is {method!r}; it must be one of {sorted(ESS_METHODS)}.")
    _check_probability("effective_sample_size", method, probability)
    return map_jitted(draws, function=bind(_ess_of, method, probability))


def r_hat(draws: PyTree, *, method: str = "rank") -> PyTree:
    """Ratio of the spread of all draws to that within chains, of each component; 1 is good.

    Args:
      draws: pytree of [N, C, ...], N at least 4.
      method: (static) ``"rank"``, the larger one of ``"bulk"`` and ``"folded"`` (publications ask
        for less than 1.01); ``"bulk"`` of the normal scores of split chains; ``"folded"`` of those
        of the distances to the median, which sees different scales; ``"split"`` of the split
        chains as they are; ``"identity"`` of chains that are not split.

    Returns:
      Pytree of [...]. NaN where a draw is not finite or all are equal. One chain is judged by its
      halves (ArviZ declines).

    Raises:
      ValueError: naming the shape or option that is out of range.

    >>> import jax
    >>> x = jax.random.normal(jax.random.key(0), (500, 4))
    >>> bool(r_hat(x) < 1.01), bool(r_hat(x.at[:, 0].add(1.0)) > 1.1)
    (True, True)
    """
    check_draws(draws)
    if method not in R_HAT_METHODS:
        raise ValueError(f"method is {method!r}; it must be one of {sorted(R_HAT_METHODS)}.")
    return map_jitted(draws, function=R_HAT_METHODS[method])


def monte_carlo_error(
    draws: PyTree, *, method: str = "mean", probability: float | None = None
) -> PyTree:
    """Standard error of an estimate from the draws (MCSE), of each component.

    Args:
      draws: pytree of [N, C, ...], N at least 4.
      method: (static) ``"mean"``, ``"sd"``, ``"median"``, or ``"quantile"`` with its
        ``probability``.
      probability: in (0, 1), for ``"quantile"`` (static).

    Returns:
      Pytree of [...].

    Raises:
      ValueError: naming the shape or option that is out of range.

    >>> import jax
    >>> x = jax.random.normal(jax.random.key(0), (500, 4))
    >>> bool(abs(monte_carlo_error(x) - 2_000**-0.5) < 0.005)
    True
    """
    check_draws(draws)
    if method not in ERROR_METHODS:
        raise ValueError(f"method is {method!r}; it must be one of {sorted(ERROR_METHODS)}.")
    _check_probability("monte_carlo_error", method, probability)
    return map_jitted(draws, function=bind(_error_of, method, probability))


def autocorrelation(draws: PyTree) -> PyTree:
    """Autocorrelation of each chain about its own mean, by FFT.

        rho_t = sum_i (x_i - mean)(x_{i+t} - mean) / sum_i (x_i - mean)²

    Args:
      draws: pytree of [N, C, ...].

    Returns:
      Pytree of [N, C, ...]: lag t, chain, component. NaN for a chain that does not move.

    >>> import jax.numpy as jnp
    >>> autocorrelation(jnp.array([1.0, -1.0, 1.0, -1.0])[:, None])[:, 0].round(4).tolist()
    [1.0, -0.75, 0.5, -0.25]
    """
    check_draws(draws)
    lags = map_jitted(draws, function=autocorrelation_of)
    return jax.tree.map(lambda leaf: jnp.moveaxis(leaf, (-2, -1), (0, 1)), lags)


def integrated_autocorrelation_time(draws: PyTree) -> PyTree:
    """Steps worth one independent draw for the mean: ``tau = N C / ESS``, of each component.

    Args:
      draws: pytree of [N, C, ...], N at least 4.

    Returns:
      Pytree of [...]; 1 for independent draws, less for chains with negative correlation.
    """
    num_draws, num_chains = np.shape(jax.tree.leaves(draws)[0])[:2]
    sizes = effective_sample_size(draws, method="mean")
    return jax.tree.map(lambda ess: num_draws * num_chains / ess, sizes)


@functools.partial(jax.jit, static_argnames="function")
def map_jitted(draws: PyTree, *, function: Callable[[jax.Array], PyTree]) -> PyTree:
    """``map_components``, compiled once for each hashable ``function``."""
    return map_components(function, draws)


def _check_probability(name: str, method: str, probability: float | None) -> None:
    if (method == "quantile") != (probability is not None):
        raise ValueError(
            f"{name} got method {method!r} and probability {probability}; a probability goes with "
            "the method 'quantile' and no other."
        )
    if probability is not None and not 0.0 < probability < 1.0:
        raise ValueError(f"probability is {probability}; it must lie between 0 and 1.")


def _ess_of(method: str, probability: float | None, x: jax.Array) -> jax.Array:
    options = () if probability is None else (probability,)
    return ESS_METHODS[method](x, *options)


def _error_of(method: str, probability: float | None, x: jax.Array) -> jax.Array:
    options = () if probability is None else (probability,)
    return ERROR_METHODS[method](x, *options)

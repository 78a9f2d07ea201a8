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
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import scipy.fft

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
TAIL_PROBABILITIES = (0.05, 0.95)
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
    if method not in _ESS_METHODS:
        raise ValueError(f"method is {method!r}; it must be one of {sorted(_ESS_METHODS)}.")
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
    if method not in _R_HAT_METHODS:
        raise ValueError(f"method is {method!r}; it must be one of {sorted(_R_HAT_METHODS)}.")
    return map_jitted(draws, function=_R_HAT_METHODS[method])


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
    if method not in _ERROR_METHODS:
        raise ValueError(f"method is {method!r}; it must be one of {sorted(_ERROR_METHODS)}.")
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
    lags = map_jitted(draws, function=_autocorrelation_of)
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


# Below, x is one component [N, C].


def split_halves(x: jax.Array) -> jax.Array:
    """[N, C] -> [N // 2, 2 C]; the middle draw of an odd number is dropped."""
    half = x.shape[0] // 2
    return jnp.concatenate([x[:half], x[-half:]], axis=1)


def normal_scores(x: jax.Array) -> jax.Array:
    """``Phi^-1((rank - 3/8) / (size + 1/4))`` over all draws, equal ones with their mean rank."""
    flat = x.ravel()
    size = flat.size
    order = jnp.argsort(flat)
    values = flat[order]
    index = jnp.arange(size)
    differs = values[1:] != values[:-1]
    edge = jnp.ones(1, bool)
    first = jax.lax.cummax(jnp.where(jnp.concatenate([edge, differs]), index, 0))
    last = jnp.where(jnp.concatenate([differs, edge]), index, size - 1)
    last = jax.lax.cummin(last, reverse=True)
    # Twice the rank is a whole number. The smaller tail is taken, which float32 resolves where the
    # larger one would round to 1.
    twice_rank = jnp.zeros(size, first.dtype).at[order].set(first + last + 2)
    mirrored = 2 * (size + 1) - twice_rank
    tail = (0.5 * jnp.minimum(twice_rank, mirrored).astype(x.dtype) - 0.375) / (size + 0.25)
    score = jax.scipy.special.ndtri(tail) * jnp.where(twice_rank > mirrored, -1.0, 1.0)
    score = jnp.where(twice_rank == mirrored, 0.0, score).astype(x.dtype).reshape(x.shape)
    return jnp.where(jnp.isfinite(x).all(), score, jnp.nan)


def _fold(x: jax.Array) -> jax.Array:
    return jnp.abs(x - jnp.median(x))


def quantile(x: jax.Array, probability: float) -> jax.Array:
    """[] the quantile that interpolates between order statistics, the first one at probability 0.

    The place is computed on the host, in double precision whatever the draws have, so that it does
    not fall on the other side of an order statistic.
    """
    place = x.size * probability + (1.0 - probability)
    low = min(max(math.floor(place), 1), x.size - 1)
    weight = min(max(place - low, 0.0), 1.0)
    values = jnp.sort(x.ravel())
    return (1.0 - weight) * values[low - 1] + weight * values[low]


def _centred_spectrum(x: jax.Array) -> tuple[jax.Array, int]:
    """Power of each chain about its mean [frequencies, C], padded to ``length`` samples."""
    length = scipy.fft.next_fast_len(2 * x.shape[0], real=True)
    transformed = jnp.fft.rfft(x - x.mean(axis=0), n=length, axis=0)
    return jnp.square(transformed.real) + jnp.square(transformed.imag), length


def _autocorrelation_of(x: jax.Array) -> jax.Array:
    """[N, C] at each lag."""
    power, length = _centred_spectrum(x)
    covariance = jnp.fft.irfft(power, n=length, axis=0)[: x.shape[0]]
    return covariance / covariance[0]


def _mean_autocovariance(x: jax.Array) -> jax.Array:
    """[N] mean over chains; the mean is taken before the way back, so that is one transform."""
    power, length = _centred_spectrum(x)
    return jnp.fft.irfft(power.mean(axis=1), n=length)[: x.shape[0]] / x.shape[0]


def ess_of_chains(x: jax.Array) -> jax.Array:
    """[] effective size of [N, C], neither split nor ranked."""
    num_draws, num_chains = x.shape
    covariance = _mean_autocovariance(x)
    within = covariance[0] * num_draws / (num_draws - 1.0)
    total = covariance[0]
    if num_chains > 1:
        total = total + jnp.var(x.mean(axis=0), ddof=1)
    rho = (1.0 - (within - covariance) / total).at[0].set(1.0)
    # Pairs of lags (2k, 2k + 1): their sums are positive and fall for a reversible chain. Pairs
    # before the first that is not positive are used, and of that one its even lag if positive.
    max_pairs = max((num_draws - 3) // 2, 0)
    even, odd = rho[: 2 * max_pairs + 1 : 2], rho[1 : 2 * max_pairs + 2 : 2]
    pairs = even + odd
    is_used = jax.lax.cummin((pairs > 0.0).astype(jnp.int32)) == 1
    stop = jnp.minimum(is_used.sum(), max_pairs)
    decreasing = jnp.where(jnp.arange(max_pairs + 1) < stop, jax.lax.cummin(pairs), 0.0)
    rest = jnp.where((even[stop] > 0.0) | (pairs[stop] >= 0.0), even[stop], 0.0)
    size = num_draws * num_chains
    tau = jnp.maximum(-1.0 + 2.0 * decreasing.sum() + rest, 1.0 / math.log10(size))
    ess = jnp.where(jnp.isfinite(rho).all(), size / tau, jnp.nan)
    return jnp.where(jnp.max(x) == jnp.min(x), float(size), ess).astype(x.dtype)


def _is_below(x: jax.Array, probability: float) -> jax.Array:
    """[N, C] 1 where a draw is at most the quantile, 0 elsewhere, NaN if a draw is not finite."""
    below = (x <= quantile(x, probability)).astype(x.dtype)
    return jnp.where(jnp.isfinite(x).all(), below, jnp.nan)


def _ess_of_quantile(x: jax.Array, probability: float) -> jax.Array:
    return ess_of_chains(split_halves(_is_below(x, probability)))


def _ess_of_mean(x: jax.Array) -> jax.Array:
    return ess_of_chains(split_halves(x))


def tails(x: jax.Array) -> jax.Array:
    """[2, N, C] which draws are below the 5 % quantile, and which below the 95 % quantile."""
    return jnp.stack([_is_below(x, p) for p in TAIL_PROBABILITIES])


# Several arrays at once by `vmap`: the same work, and a half of the time to compile.


def _ess_of_tail(x: jax.Array) -> jax.Array:
    return jax.vmap(lambda below: ess_of_chains(split_halves(below)))(tails(x)).min()


_ESS_METHODS: dict[str, Callable[..., jax.Array]] = {
    "bulk": lambda x: ess_of_chains(normal_scores(split_halves(x))),
    "tail": _ess_of_tail,
    "mean": _ess_of_mean,
    "sd": lambda x: _ess_of_mean(jnp.square(x - x.mean())),
    "median": lambda x: _ess_of_quantile(x, 0.5),
    "quantile": _ess_of_quantile,
    "identity": ess_of_chains,
}


def _ess_of(method: str, probability: float | None, x: jax.Array) -> jax.Array:
    options = () if probability is None else (probability,)
    return _ESS_METHODS[method](x, *options)


def r_hat_of_chains(x: jax.Array) -> jax.Array:
    """[] R-hat of [N, C], neither split nor ranked."""
    num_draws = x.shape[0]
    within = jnp.var(x, axis=0, ddof=1).mean()
    between = num_draws * jnp.var(x.mean(axis=0), ddof=1)
    return jnp.sqrt((between / within + num_draws - 1) / num_draws)


def scores_and_folded(x: jax.Array) -> jax.Array:
    """[2, N // 2, 2 C] normal scores of the halves, and of their distances to the median."""
    halves = split_halves(x)
    return jax.vmap(normal_scores)(jnp.stack([halves, _fold(halves)]))


def _r_hat_of_ranks(x: jax.Array) -> jax.Array:
    return jax.vmap(r_hat_of_chains)(scores_and_folded(x)).max()


_R_HAT_METHODS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "rank": _r_hat_of_ranks,
    "bulk": lambda x: r_hat_of_chains(normal_scores(split_halves(x))),
    "folded": lambda x: r_hat_of_chains(normal_scores(_fold(split_halves(x)))),
    "split": lambda x: r_hat_of_chains(split_halves(x)),
    "identity": r_hat_of_chains,
}


def _error_of_mean(x: jax.Array) -> jax.Array:
    return jnp.std(x, ddof=1) / jnp.sqrt(_ess_of_mean(x))


def component_figures(x: jax.Array) -> dict[str, jax.Array]:
    """Each [], what a table shows of one component: the figures above, with work shared."""
    scores = scores_and_folded(x)
    below = jax.vmap(split_halves)(tails(x))
    chains = jnp.concatenate([scores[:1], split_halves(x)[None], below])
    bulk, mean, low, high = jax.vmap(ess_of_chains)(chains)
    deviation = jnp.std(x, ddof=1)
    return {
        "mean": x.mean(),
        "sd": deviation,
        "mcse": deviation / jnp.sqrt(mean),
        "ess_bulk": bulk,
        "ess_tail": jnp.minimum(low, high),
        "r_hat": jax.vmap(r_hat_of_chains)(scores).max(),
    }


def _error_of_sd(x: jax.Array) -> jax.Array:
    """By the delta method from the error of the mean square."""
    squares = jnp.square(x - x.mean())
    variance = squares.mean()
    of_variance = (jnp.square(squares).mean() - jnp.square(variance)) / _ess_of_mean(squares)
    return jnp.sqrt(of_variance / variance / 4.0)


def _beta_quantile(probability: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
    """[] by bisection; as many halvings as a double has bits, and then some."""

    def halve(_, ends):
        low, high = ends
        middle = 0.5 * (low + high)
        is_below = jax.scipy.special.betainc(a, b, middle) < probability
        return jnp.where(is_below, middle, low), jnp.where(is_below, high, middle)

    ends = (jnp.zeros_like(a), jnp.ones_like(a))
    return 0.5 * sum(jax.lax.fori_loop(0, 60, halve, ends))


def _error_of_quantile(x: jax.Array, probability: float) -> jax.Array:
    """Half the distance of the order statistics that are one standard deviation apart."""
    ess = _ess_of_quantile(x, probability)
    a, b = ess * probability + 1.0, ess * (1.0 - probability) + 1.0
    one_deviation = jnp.array([0.1586553, 0.8413447], x.dtype)
    places = jax.vmap(lambda p: _beta_quantile(p, a, b))(one_deviation) * x.size - 1.0
    low, high = places
    values = jnp.sort(x.ravel())
    low = values[jnp.floor(jnp.maximum(low, 0.0)).astype(jnp.int32)]
    high = values[jnp.ceil(jnp.minimum(high, x.size - 1.0)).astype(jnp.int32)]
    return jnp.where(jnp.isfinite(ess), 0.5 * (high - low), jnp.nan)


_ERROR_METHODS: dict[str, Callable[..., jax.Array]] = {
    "mean": _error_of_mean,
    "sd": _error_of_sd,
    "median": lambda x: _error_of_quantile(x, 0.5),
    "quantile": _error_of_quantile,
}


def _error_of(method: str, probability: float | None, x: jax.Array) -> jax.Array:
    options = () if probability is None else (probability,)
    return _ERROR_METHODS[method](x, *options)

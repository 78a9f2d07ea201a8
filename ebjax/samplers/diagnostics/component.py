"""Figures of one component, ``x`` [N, C]: what ``ebjax.samplers.diagnostics.convergence`` maps."""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import scipy.fft

__all__ = [
    "ERROR_METHODS",
    "ESS_METHODS",
    "R_HAT_METHODS",
    "autocorrelation_of",
    "component_figures",
]

TAIL_PROBABILITIES = (0.05, 0.95)


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


def autocorrelation_of(x: jax.Array) -> jax.Array:
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


ESS_METHODS: dict[str, Callable[..., jax.Array]] = {
    "bulk": lambda x: ess_of_chains(normal_scores(split_halves(x))),
    "tail": _ess_of_tail,
    "mean": _ess_of_mean,
    "sd": lambda x: _ess_of_mean(jnp.square(x - x.mean())),
    "median": lambda x: _ess_of_quantile(x, 0.5),
    "quantile": _ess_of_quantile,
    "identity": ess_of_chains,
}


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


R_HAT_METHODS: dict[str, Callable[[jax.Array], jax.Array]] = {
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


ERROR_METHODS: dict[str, Callable[..., jax.Array]] = {
    "mean": _error_of_mean,
    "sd": _error_of_sd,
    "median": lambda x: _error_of_quantile(x, 0.5),
    "quantile": _error_of_quantile,
}

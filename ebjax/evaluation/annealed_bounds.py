"""Bounds of log Z, and of held-out likelihood, from annealing in both directions.

    forward   x_0 ~ p_0, weights along β: 0 → 1:   E[w] = Z / Z_0,   E[log mean w] <= log Z / Z_0
    reverse   x ~ p,     weights along β: 1 → 0:   E[w] = Z_0 / Z,   E[-log mean w] >= log Z / Z_0

on the path E_β = (1 - β) E_0 + β E. Both are annealed importance sampling, the second with the ends
exchanged. The closer the bounds, the better both runs; a gap that does not close says that chains
do not reach what they must.

Started at any x instead of a draw of the model, the reverse run bounds the likelihood of x under
the law p_ann that the forward run draws from:

    E[-E(x) + log mean w(x) - log Z_0] <= log p_ann(x)

That is a statement about a law one can sample, whatever the state of the chains; p_ann goes to p
with more temperatures.

Neal, "Annealed importance sampling", Statistics and Computing 11 (2001). Grosse, Ghahramani and
Adams, "Sandwiching the marginal likelihood using bidirectional Monte Carlo", arXiv 1511.02543
(2015). Burda, Grosse and Salakhutdinov, "Accurate and conservative estimates of MRF log-likelihood
using reverse annealing", AISTATS 2015.

Shapes: N chains in G groups, T temperatures, M samples of the model.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
from scipy.special import stdtrit

from ebjax.evaluation.likelihood import log_likelihood
from ebjax.samplers.smc import ais_log_z, geometric_path
from ebjax.types import EnergyFn, Kernel, Params, Position, Target

__all__ = ["LogZBounds", "ais_bounds", "annealed_log_likelihood"]


class LogZBounds(NamedTuple):
    """Bounds of log Z.

    Attributes:
      lower: mean over the groups of log mean w; at most log Z in expectation.
      lower_standard_error: of ``lower``.
      upper: mean over the groups of -log mean w of the reverse runs; at least log Z in
        expectation if the samples are draws of the model. ``inf`` without samples.
      upper_standard_error: of ``upper``.
      interval: ``(low, high)``, each end beyond its bound by what it may be off by.
      log_z: log of the mean of all forward weights, whose expectation is Z; the estimate to quote.
      effective_sample_size: ``(Σ w)² / Σ w²`` of all forward weights.
    """

    lower: float
    lower_standard_error: float
    upper: float
    upper_standard_error: float
    interval: tuple[float, float]
    log_z: float
    effective_sample_size: float


def _ladder(inverse_temperatures: int | npt.ArrayLike) -> np.ndarray:
    """[T], from a number of them or as given."""
    if isinstance(inverse_temperatures, (int, np.integer)):
        if inverse_temperatures < 1:
            raise ValueError(
                f"inverse_temperatures is {inverse_temperatures}; give at least 1, or the ladder."
            )
        return np.linspace(0.0, 1.0, inverse_temperatures + 1)[1:]
    return np.asarray(inverse_temperatures, np.float64)


def _reversed_run(key, kernel, energy_fn, params, base, starts, ladder, step_size, **options):
    """From exp(-E) to the base: moves at β_T = 1, weight to β_{T-1}, ..., weight to β = 0.

    As the forward run in a mirror, so that its paths are those of the forward run.
    """
    path = geometric_path(energy_fn, base.energy)
    mirrored = np.concatenate([[0.0], 1.0 - ladder[-2::-1], [1.0]])
    if np.ndim(step_size):
        steps = jnp.asarray(step_size)
        step_size = jnp.concatenate([jnp.flip(steps), steps[:1]])
    return ais_log_z(
        key,
        kernel,
        path,
        (params, ()),
        starts,
        inverse_temperatures=mirrored,
        step_size=step_size,
        **options,
    )


def _mean_and_error(values: jax.Array) -> tuple[float, float]:
    logs = np.asarray(values, np.float64)
    return float(logs.mean()), float(logs.std(ddof=1) / np.sqrt(len(logs)))


def _check_base(base: Target) -> tuple[Callable[[jax.Array], Position], float]:
    """Its sampler and its log Z."""
    if base.sample is None or base.log_z is None:
        raise ValueError(
            "The base must have exact samples and a known log_z; normal_base, uniform_base and "
            "bernoulli_base do."
        )
    return base.sample, float(base.log_z)


def _size(samples: Position) -> int:
    return len(jax.tree.leaves(samples)[0])


def ais_bounds(
    key: jax.Array,
    energy_fn: EnergyFn,
    params: Params,
    base: Target,
    kernel: Kernel | Callable[..., Kernel],
    *,
    inverse_temperatures: int | npt.ArrayLike,
    num_chains: int = 1000,
    num_groups: int = 10,
    num_mcmc_steps: int = 1,
    step_size: npt.ArrayLike = 0.1,
    model_samples: Position | None = None,
    confidence: float = 0.95,
    num_devices: int = 1,
) -> LogZBounds:
    """Stochastic bounds of log Z by annealing from a base and, given samples, back to it.

    The upper bound rests on ``model_samples``. Started from a law q other than the model p it is

        E[-log w] = log Z/Z_0 + KL(reverse paths from q ‖ forward paths) - KL(q ‖ p)

    which may lie below log Z. For data in place of samples use ``annealed_log_likelihood``.

    Args:
      key: [] key.
      energy_fn: E.
      params: its parameters.
      base: p_0, with exact samples and log Z.
      kernel: leaves exp(-E_β) invariant at each β (a Metropolis test; ``langevin`` alone biases
        the bounds), or what makes one as ``kernel(step_size=h)``.
      inverse_temperatures: T for an even ladder, or the ladder [T], increasing to 1.
      num_chains: N forward chains, a multiple of ``num_groups``.
      num_groups: G >= 2. A bound is a mean over groups: chains in larger groups give a tighter
        bound, more groups a better error.
      num_mcmc_steps: Markov steps at each temperature.
      step_size: [] or [T], where ``kernel`` makes kernels.
      model_samples: pytree of [M, ...] independent draws of exp(-E); the first multiple of
        ``num_groups`` is used.
      confidence: of each end of the interval, in (0, 1).
      num_devices: local devices over which groups are spread.

    Returns:
      ``LogZBounds``.

    Raises:
      ValueError: if the base lacks samples or log Z, or an option is out of range.

    >>> from ebjax.evaluation import normal_base
    >>> from ebjax.samplers import random_walk
    >>> energy_fn = lambda mean, x: 2.0 * jnp.sum((x - mean) ** 2)  # log Z = log(π / 2) / 2
    >>> base = normal_base(np.array([[-1.0], [1.0]]))
    >>> bounds = ais_bounds(jax.random.key(1), energy_fn, 1.0, base, random_walk(step_size=0.5),
    ...                     inverse_temperatures=20)
    >>> bool(abs(bounds.log_z - np.log(np.pi / 2) / 2) < 0.1), bounds.upper
    (True, inf)
    """
    draw, base_log_z = _check_base(base)
    if num_groups < 2 or num_chains < num_groups or num_chains % num_groups:
        raise ValueError(
            f"num_chains is {num_chains} and num_groups {num_groups}; give at least 2 groups that "
            "divide the chains."
        )
    if not 0.0 < confidence < 1.0:
        raise ValueError(f"confidence is {confidence}; it must lie between 0 and 1.")
    if model_samples is not None:
        num_samples = _size(model_samples) // num_groups * num_groups
        if not num_samples:
            raise ValueError(
                f"model_samples has {_size(model_samples)} samples; {num_groups} groups need at "
                "least one each."
            )
        model_samples = jax.tree.map(lambda leaf: jnp.asarray(leaf)[:num_samples], model_samples)
    ladder = _ladder(inverse_temperatures)
    options: dict[str, Any] = {
        "num_mcmc_steps": num_mcmc_steps,
        "num_islands": num_groups,
        "num_devices": num_devices,
    }
    start_key, forward_key, reverse_key = jax.random.split(key, 3)
    starts = jax.jit(jax.vmap(draw))(jax.random.split(start_key, num_chains))
    forward = ais_log_z(
        forward_key,
        kernel,
        geometric_path(base.energy, energy_fn),
        ((), params),
        starts,
        inverse_temperatures=ladder,
        step_size=step_size,
        **options,
    )
    lower, lower_error = _mean_and_error(forward.island_log_z + base_log_z)
    upper, upper_error = np.inf, 0.0
    if model_samples is not None:
        reverse = _reversed_run(
            reverse_key,
            kernel,
            energy_fn,
            params,
            base,
            model_samples,
            ladder,
            step_size,
            **options,
        )
        upper, upper_error = _mean_and_error(base_log_z - reverse.island_log_z)
    quantile = stdtrit(num_groups - 1, confidence)
    weights = np.exp(np.asarray(forward.log_weights, np.float64))
    return LogZBounds(
        lower=lower,
        lower_standard_error=lower_error,
        upper=float(upper),
        upper_standard_error=float(upper_error),
        interval=(float(lower - quantile * lower_error), float(upper + quantile * upper_error)),
        log_z=float(forward.log_z) + base_log_z,
        effective_sample_size=float(weights.sum() ** 2 / np.square(weights).sum()),
    )


def annealed_log_likelihood(
    key: jax.Array,
    energy_fn: EnergyFn,
    params: Params,
    base: Target,
    kernel: Kernel | Callable[..., Kernel],
    examples: Position,
    *,
    inverse_temperatures: int | npt.ArrayLike,
    chains_per_example: int = 10,
    num_mcmc_steps: int = 1,
    step_size: npt.ArrayLike = 0.1,
) -> np.ndarray:
    """Conservative log-likelihood of data: stochastic lower bounds of log p_ann(x).

    Args:
      key: [] key.
      energy_fn: E.
      params: its parameters.
      base: p_0, with exact samples and log Z.
      kernel: as for ``ais_bounds``. Where it is not reversible p_ann is that of its time reversal.
      examples: pytree of [N, ...], held-out data.
      inverse_temperatures: T for an even ladder, or the ladder [T], increasing to 1.
      chains_per_example: K; the mean of exp(bound) is p_ann(x) for any K, the bound tighter for
        more.
      num_mcmc_steps: Markov steps at each temperature.
      step_size: [] or [T], where ``kernel`` makes kernels.

    Returns:
      [N] nats; quote the mean with its standard error over examples.

    Raises:
      ValueError: if the base lacks log Z, or an option is out of range.
    """
    _, base_log_z = _check_base(base)
    if chains_per_example < 1:
        raise ValueError(f"chains_per_example is {chains_per_example}; it must be at least 1.")
    starts = jax.tree.map(
        lambda leaf: jnp.repeat(jnp.asarray(leaf), chains_per_example, axis=0), examples
    )
    result = _reversed_run(
        key,
        kernel,
        energy_fn,
        params,
        base,
        starts,
        _ladder(inverse_temperatures),
        step_size,
        num_mcmc_steps=num_mcmc_steps,
        num_islands=_size(examples),
    )
    weights = np.asarray(result.island_log_z, np.float64)
    return log_likelihood(energy_fn, params, examples, base_log_z) + weights

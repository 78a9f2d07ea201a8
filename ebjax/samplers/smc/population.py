"""One population on its way along a path: what ``smc_sample`` runs on each island.

Written for one device's part of the particles, with collectives over ``axis_name`` where it needs
the others. All decisions (the next β, whether to resample, the step size) are made from gathered
weights and rates, so that they are the same on all devices and on any number of them.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ebjax.numerics import all_finite
from ebjax.samplers.smc.feynman_kac import (
    Population,
    gather,
    log_z_variance,
    resample,
    reweight,
    start,
)
from ebjax.samplers.smc.moves import (
    Problem,
    Settings,
    init_states,
    is_cached,
    mass_options,
    move,
    retemper,
)
from ebjax.samplers.smc.resampling import (
    RESAMPLERS,
    conditional_effective_sample_size,
    log_mean_exp,
)
from ebjax.types import EnergyFn, Params, Position

__all__ = ["PopulationResult", "TemperatureInfo", "run_population"]

_NUM_BISECTIONS = 40


class TemperatureInfo(NamedTuple):
    """Diagnosis of one temperature.

    Attributes:
      inverse_temperature: [] β.
      ess: [] effective sample size after weighting, before any resampling.
      conditional_ess: [] how well the law before covers this one, in [0, N]; N is equality.
      log_z: [] the estimate up to this temperature.
      acceptance_rate: [] mean over particles and Markov steps; NaN if the kernel has none.
      step_size: [] of the last Markov step; a ladder of them can be given to another run.
      is_resampled: [] bool.
      is_finite: [] bool, whether no weight was NaN or infinite and all particles are finite after
        they moved. Proposals that were not finite were rejected, and do not count.
    """

    inverse_temperature: jax.Array
    ess: jax.Array
    conditional_ess: jax.Array
    log_z: jax.Array
    acceptance_rate: jax.Array
    step_size: jax.Array
    is_resampled: jax.Array
    is_finite: jax.Array


class PopulationResult(NamedTuple):
    """What is equal on all devices after a run; see ``TemperedSamples``."""

    log_z: jax.Array
    log_z_variance: jax.Array
    info: TemperatureInfo
    num_temperatures: jax.Array
    num_evaluations: jax.Array


class _Carry(NamedTuple):
    """``variance``: sum over temperatures of that of the mean weight, for waste-free runs."""

    population: Population
    beta: jax.Array
    step_size: jax.Array
    variance: jax.Array
    num_evaluations: jax.Array


def run_population(
    key: jax.Array,
    kernel: Any,
    path: EnergyFn,
    params: Params,
    ladder: jax.Array,
    step_sizes: jax.Array,
    positions: Position,
    index: jax.Array,
    *,
    settings: Settings,
    axis_name: str | None,
) -> tuple[Position, jax.Array, PopulationResult]:
    """Runs the population from β = 0 to β = 1.

    Returns:
      ``(particles [N, ...], log_weights [N], result)``.
    """
    problem = Problem(key, kernel, path, params, index, settings, axis_name)
    # A Python number for β, which leaves the dtype of the energy to its other arguments.
    first = jax.tree.map(lambda leaf: leaf[0], positions)
    dtype = jax.eval_shape(lambda p, x: path((0.5, p), x), params, first).dtype
    ladder, step_sizes = ladder.astype(dtype), step_sizes.astype(dtype)
    beta = jnp.zeros((), dtype)
    # The same kernel makes all states, so the options that it starts with do not matter.
    states = init_states(problem, step_sizes[0], beta, positions)
    carry = _Carry(
        population=start(states, index, dtype),
        beta=beta,
        step_size=step_sizes[0],
        variance=jnp.zeros((), dtype),
        num_evaluations=jnp.ones((), dtype),
    )
    if settings.is_adaptive:
        carry, info, num_temperatures = _run_adaptive(problem, carry)
    else:

        def body(carry, inputs):
            t, beta, step_size = inputs
            if settings.target_acceptance is None:
                carry = carry._replace(step_size=step_size)
            return _advance(problem, carry, t, lambda *_: beta)

        times = jnp.arange(ladder.size)
        carry, info = jax.lax.scan(body, carry, (times, ladder, step_sizes))
        num_temperatures = jnp.array(ladder.size, jnp.int32)
    population = carry.population
    variance = carry.variance
    if not settings.waste_free:
        variance = log_z_variance(population, method=settings.resampling, axis_name=axis_name)
    result = PopulationResult(
        log_z=population.log_z,
        log_z_variance=variance,
        info=info,
        num_temperatures=num_temperatures,
        num_evaluations=carry.num_evaluations,
    )
    return population.particles.position, population.log_weights, result


def _run_adaptive(problem: Problem, carry: _Carry):
    """Steps of the largest β that the conditional effective sample size permits, up to β = 1."""
    num, dtype = problem.settings.max_num_temperatures, carry.beta.dtype
    nothing = jnp.full(num, jnp.nan, dtype)
    info = TemperatureInfo(
        inverse_temperature=jnp.ones(num, dtype),
        ess=nothing,
        conditional_ess=nothing,
        log_z=nothing,
        acceptance_rate=nothing,
        step_size=nothing,
        is_resampled=jnp.zeros(num, bool),
        is_finite=jnp.ones(num, bool),
    )

    def body(loop):
        t, carry, info = loop

        def choose(log_weights, increments_to):
            beta = _next_beta(problem, carry.beta, log_weights, increments_to)
            return jnp.where(t == num - 1, 1.0, beta).astype(dtype)

        carry, row = _advance(problem, carry, t, choose)
        return t + 1, carry, jax.tree.map(lambda all_rows, one: all_rows.at[t].set(one), info, row)

    def goes_on(loop):
        t, carry, _ = loop
        return (t < num) & (carry.beta < 1.0)

    num_temperatures, carry, info = jax.lax.while_loop(
        goes_on, body, (jnp.zeros((), jnp.int32), carry, info)
    )
    return carry, info, num_temperatures


def _next_beta(problem: Problem, beta: jax.Array, log_weights: jax.Array, increments_to):
    """The largest β' in (β, 1] where the conditional effective sample size is the one wanted.

    It is above the target at β and falls, so bisection keeps ``low`` above and ``high`` below it.
    The upper end is returned: it is larger than β even where no step, however small, keeps the
    target (a target law that is zero on many particles), and so the run goes on.
    """
    everyone = gather(log_weights, problem.axis_name)
    wanted = problem.settings.target_ess * everyone.size

    def is_close(other):
        increments = gather(increments_to(other), problem.axis_name)
        return conditional_effective_sample_size(everyone, increments) >= wanted

    def halve(_, interval):
        low, high = interval
        middle = 0.5 * (low + high)
        close = is_close(middle)
        return jnp.where(close, middle, low), jnp.where(close, high, middle)

    one = jnp.ones_like(beta)
    _, high = jax.lax.fori_loop(0, _NUM_BISECTIONS, halve, (beta, one))
    return jnp.where(is_close(one), one, high)


def _advance(problem: Problem, carry: _Carry, t: jax.Array, choose_beta):
    """One temperature: choose β, weight, resample, move at the new β."""
    settings, axis_name = problem.settings, problem.axis_name
    resample_key, move_key = jax.random.split(jax.random.fold_in(problem.key, t))
    population = carry.population
    increments_to, num_evaluations = _increments(problem, carry.beta, population.particles)
    beta = choose_beta(population.log_weights, increments_to)
    increments = increments_to(beta)
    log_weights, all_increments = gather((population.log_weights, increments), axis_name)
    conditional_ess = conditional_effective_sample_size(log_weights, all_increments)
    population, ess, is_finite = reweight(population, increments, axis_name=axis_name)
    options = mass_options(problem, population)
    variance = carry.variance
    if settings.waste_free:
        variance = variance + _between_chains(all_increments, settings.num_mcmc_steps)
        population, is_resampled = _resample_starts(resample_key, problem, population)
    else:
        population, is_resampled = resample(
            resample_key,
            population,
            ess,
            method=settings.resampling,
            ess_threshold=settings.ess_threshold,
            axis_name=axis_name,
        )
    states, more = retemper(problem, carry.step_size, beta, population.particles)
    num_evaluations += more
    states, step_size, moves = move(problem, move_key, beta, carry.step_size, options, states)
    if settings.waste_free:
        population = _all_points(problem, population)
    are_finite = jax.vmap(all_finite)(states.position)
    carry = _Carry(
        population=population._replace(particles=states),
        beta=beta,
        step_size=step_size,
        variance=variance,
        num_evaluations=carry.num_evaluations + num_evaluations + moves.num_evaluations,
    )
    info = TemperatureInfo(
        inverse_temperature=beta,
        ess=ess,
        conditional_ess=conditional_ess,
        log_z=population.log_z,
        acceptance_rate=moves.acceptance_rate,
        step_size=moves.last_step_size,
        is_resampled=is_resampled,
        is_finite=is_finite & jnp.all(gather(are_finite, axis_name)),
    )
    return carry, info


def _increments(problem: Problem, beta: jax.Array, states: Any):
    """The function β' -> E_β(x) - E_β'(x) [N], and how many evaluations one more call needs."""
    path, params = problem.path, problem.params
    if hasattr(path, "evaluate"):
        parts, cost = states.parts if hasattr(states, "parts") else None, 0.0
        if not is_cached(path, states):
            evaluate = lambda x: path.evaluate((beta, params), x, with_gradient=False)  # noqa: E731
            parts, cost = jax.vmap(evaluate)(states.position), 1.0

        def difference(parts, other):
            if hasattr(path, "difference"):
                return -path.difference((beta, params), (other, params), parts)
            before = path.assemble((beta, params), parts)[0]
            return before - path.assemble((other, params), parts)[0]

        return lambda other: jax.vmap(difference, (0, None))(parts, other), cost

    def energies(beta):
        return jax.vmap(lambda x: path((beta, params), x))(states.position)

    # Not counted: bisection's evaluations, where the ladder adapts along a path without parts.
    before = energies(beta)
    return lambda other: before - energies(other), 2.0


def _resample_starts(key: jax.Array, problem: Problem, population: Population):
    """Draws the N / P starts of waste-free chains of length P."""
    length = problem.settings.num_mcmc_steps
    log_weights, *everyone = gather(
        (population.log_weights, population.particles, population.eves), problem.axis_name
    )
    num_chains = log_weights.size // length
    ancestors = RESAMPLERS[problem.settings.resampling](key, log_weights, num_chains)
    ancestors = ancestors[problem.indices[::length] // length]
    particles, eves = jax.tree.map(lambda leaf: leaf[ancestors], everyone)
    population = population._replace(
        particles=particles, eves=eves, num_resamplings=population.num_resamplings + 1
    )
    return population, jnp.array(True)


def _all_points(problem: Problem, population: Population) -> Population:
    return population._replace(
        log_weights=jnp.zeros_like(population.log_weights),
        eves=jnp.repeat(population.eves, problem.settings.num_mcmc_steps),
    )


def _between_chains(log_increments: jax.Array, length: int) -> jax.Array:
    """[] relative variance of the mean weight from the means of chains of ``length`` points."""
    num_chains = log_increments.size // length
    if num_chains < 2:
        return jnp.full((), jnp.nan, log_increments.dtype)
    relative = jnp.exp(log_increments - log_mean_exp(log_increments))
    return jnp.var(relative.reshape(num_chains, length).mean(1), ddof=1) / num_chains

"""One population on its way along a path: what ``smc_sample`` runs on each island.

Written for one device's part of the particles, with collectives over ``axis_name`` where it needs
the others. All decisions (the next β, whether to resample, the step size) are made from gathered
weights and rates, so that they are the same on all devices and on any number of them.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

from ebjax.numerics import all_finite, neighbouring_keys
from ebjax.samplers.smc.feynman_kac import (
    Population,
    gather,
    log_z_variance,
    resample,
    reweight,
    start,
)
from ebjax.samplers.smc.resampling import (
    RESAMPLERS,
    conditional_effective_sample_size,
    log_mean_exp,
)
from ebjax.types import EnergyFn, Kernel, Params, Position

__all__ = ["PopulationResult", "Settings", "TemperatureInfo", "run_population"]

_NUM_BISECTIONS = 40
_ADAPTATION_GAIN = 1.0


class Settings(NamedTuple):
    """Static options of ``smc_sample``, under its names."""

    is_adaptive: bool
    makes_kernels: bool
    target_ess: float
    max_num_temperatures: int
    num_mcmc_steps: int
    target_acceptance: float | None
    preconditioning: str | None
    resampling: str
    ess_threshold: float
    waste_free: bool


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


class _Problem(NamedTuple):
    """What does not change during a run, with ``indices`` [N] the global ones of particles."""

    key: jax.Array
    kernel: Any
    path: Any  # an EnergyFn, perhaps with the methods of a path
    params: Params
    indices: jax.Array
    settings: Settings
    axis_name: str | None

    def make_kernel(self, step_size: jax.Array, **options: Any) -> Kernel:
        if self.settings.makes_kernels:
            return self.kernel(step_size=step_size, **options)
        return self.kernel


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
    problem = _Problem(key, kernel, path, params, index, settings, axis_name)
    # A Python number for β, which leaves the dtype of the energy to its other arguments.
    first = jax.tree.map(lambda leaf: leaf[0], positions)
    dtype = jax.eval_shape(lambda p, x: path((0.5, p), x), params, first).dtype
    ladder, step_sizes = ladder.astype(dtype), step_sizes.astype(dtype)
    beta = jnp.zeros((), dtype)
    # The same kernel makes all states, so the options that it starts with do not matter.
    states = _init(problem, step_sizes[0], beta, positions)
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


def _run_adaptive(problem: _Problem, carry: _Carry):
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


def _next_beta(problem: _Problem, beta: jax.Array, log_weights: jax.Array, increments_to):
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


def _advance(problem: _Problem, carry: _Carry, t: jax.Array, choose_beta):
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
    options = _mass(problem, population)
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
    states, more = _retemper(problem, carry.step_size, beta, population.particles)
    num_evaluations += more
    states, step_size, moves = _move(problem, move_key, beta, carry.step_size, options, states)
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


def _is_cached(path: Any, states: Any) -> bool:
    """Whether states keep what gives their energies and gradients at every β."""
    return hasattr(path, "evaluate") and hasattr(states, "parts") and hasattr(states, "energy")


def _init(problem: _Problem, step_size: jax.Array, beta: jax.Array, positions: Position):
    kernel = problem.make_kernel(step_size)
    params = (beta, problem.params)
    return jax.vmap(lambda x: kernel.init(problem.path, params, x))(positions)


def _increments(problem: _Problem, beta: jax.Array, states: Any):
    """The function β' -> E_β(x) - E_β'(x) [N], and how many evaluations one more call needs."""
    path, params = problem.path, problem.params
    if hasattr(path, "evaluate"):
        parts, cost = states.parts if hasattr(states, "parts") else None, 0.0
        if not _is_cached(path, states):
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


def _retemper(problem: _Problem, step_size: jax.Array, beta: jax.Array, states: Any):
    """States at the new β, and evaluations per particle that it took."""
    if not _is_cached(problem.path, states):
        cost = 1.0 if hasattr(states, "energy") else 0.0
        return _init(problem, step_size, beta, states.position), cost
    params = (beta, problem.params)
    energy, gradient = jax.vmap(lambda parts: problem.path.assemble(params, parts))(states.parts)
    states = states._replace(energy=energy)
    if hasattr(states, "gradient"):
        states = states._replace(gradient=gradient)
    return states, 0.0


class _Moves(NamedTuple):
    acceptance_rate: jax.Array
    last_step_size: jax.Array
    num_evaluations: jax.Array


def _move(problem: _Problem, key, beta, step_size, options, states):
    """Markov steps at β; with ``waste_free`` the states of all of them, starts included."""
    settings, dtype = problem.settings, beta.dtype
    index, num_moves = problem.indices, settings.num_mcmc_steps
    length = settings.num_mcmc_steps
    if settings.waste_free:
        index, num_moves = index[::length] // length, length - 1

    def body(carry, step):
        states, step_size = carry
        kernel = problem.make_kernel(step_size, **options)
        keys = neighbouring_keys(jax.random.fold_in(key, step), index)
        states, info = jax.vmap(
            lambda key, state: kernel.step(key, problem.path, (beta, problem.params), state)
        )(keys, states)
        acceptance = getattr(info, "acceptance_rate", jnp.full(index.shape, jnp.nan, dtype))
        count = kernel.num_evaluations
        count = info.num_evaluations if count is None else jnp.full(index.shape, count)
        rate, count = gather((acceptance.astype(dtype), count.astype(dtype)), problem.axis_name)
        moves = _Moves(rate.mean(), step_size, count.mean())
        if settings.target_acceptance is not None:
            # A rate of NaN would end all motion.
            error = jnp.where(
                jnp.isnan(moves.acceptance_rate),
                0.0,
                moves.acceptance_rate - settings.target_acceptance,
            )
            step_size = step_size * jnp.exp(_ADAPTATION_GAIN * error)
        return (states, step_size), (states if settings.waste_free else None, moves)

    if num_moves == 0:
        zero = jnp.zeros((), dtype)
        return states, step_size, _Moves(zero + jnp.nan, step_size, zero)
    (end, step_size), (points, moves) = jax.lax.scan(
        body, (states, step_size), jnp.arange(num_moves)
    )
    share = 1.0 / length if settings.waste_free else 1.0
    moves = _Moves(
        moves.acceptance_rate.mean(),
        moves.last_step_size[-1],
        moves.num_evaluations.sum() * share,
    )
    if settings.waste_free:
        # [points of a chain, chains] to chains one after the other, so that a device keeps its own.
        end = jax.tree.map(
            lambda first, others: (
                jnp.concatenate([first[None], others]).swapaxes(0, 1).reshape(-1, *first.shape[1:])
            ),
            states,
            points,
        )
    return end, step_size, moves


def _resample_starts(key: jax.Array, problem: _Problem, population: Population):
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


def _all_points(problem: _Problem, population: Population) -> Population:
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


def _mass(problem: _Problem, population: Population) -> dict[str, jax.Array]:
    """The inverse mass from the weighted particles, as an option of the kernel's maker."""
    kind, axis_name = problem.settings.preconditioning, problem.axis_name
    if kind is None:
        return {}
    log_weights = gather(population.log_weights, axis_name)
    peak = jnp.max(log_weights)
    total = jnp.sum(jnp.exp(log_weights - peak))
    weights = jnp.exp(population.log_weights - peak) / total
    flat = jax.vmap(lambda x: ravel_pytree(x)[0])(population.particles.position)

    def over_devices(leaf):
        return leaf if axis_name is None else jax.lax.psum(leaf, axis_name)

    centred = flat - over_devices(weights @ flat)
    if kind == "diagonal":
        variance = over_devices(weights @ jnp.square(centred))
        return {"inverse_mass": jnp.where(variance > 0.0, variance, 1.0)}
    covariance = over_devices((weights[:, None] * centred).T @ centred)
    # Shrunk towards its diagonal, so that it has full rank whatever the number of particles.
    dim = flat.shape[1]
    share = dim / (dim + log_weights.size)
    variance = jnp.diag(covariance)
    diagonal = jnp.diag(jnp.where(variance > 0.0, variance, 1.0))
    return {"inverse_mass": (1.0 - share) * covariance + share * diagonal}

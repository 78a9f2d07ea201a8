"""The Markov steps of a population at one temperature, and the kernel that takes them.

    log h <- log h + mean acceptance - target      after each step, where the step size adapts
    M⁻¹ = weighted covariance of the particles     where there is preconditioning

Written for one device's part of the particles, with collectives over ``axis_name``.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

from ebjax.numerics import neighbouring_keys
from ebjax.samplers.smc.feynman_kac import Population, gather
from ebjax.types import Kernel, Params, Position

__all__ = [
    "Moves",
    "Problem",
    "Settings",
    "init_states",
    "is_cached",
    "mass_options",
    "move",
    "retemper",
]

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


class Problem(NamedTuple):
    """What does not change during a run, with ``indices`` [N] the global ones of particles."""

    key: jax.Array
    kernel: Any
    path: Any  # an EnergyFn, perhaps with the methods of a path
    params: Params
    indices: jax.Array
    settings: Settings
    axis_name: str | None

    def make_kernel(self, step_size: jax.Array, **options: Any) -> Kernel:
        """The kernel with this step size, where it is one that is made."""
        if self.settings.makes_kernels:
            return self.kernel(step_size=step_size, **options)
        return self.kernel


def is_cached(path: Any, states: Any) -> bool:
    """Whether states keep what gives their energies and gradients at every β."""
    return hasattr(path, "evaluate") and hasattr(states, "parts") and hasattr(states, "energy")


def init_states(problem: Problem, step_size: jax.Array, beta: jax.Array, positions: Position):
    """The kernel's states [N, ...] at the positions, at β."""
    kernel = problem.make_kernel(step_size)
    params = (beta, problem.params)
    return jax.vmap(lambda x: kernel.init(problem.path, params, x))(positions)


def retemper(problem: Problem, step_size: jax.Array, beta: jax.Array, states: Any):
    """States at the new β, and evaluations per particle that it took."""
    if not is_cached(problem.path, states):
        cost = 1.0 if hasattr(states, "energy") else 0.0
        return init_states(problem, step_size, beta, states.position), cost
    params = (beta, problem.params)
    energy, gradient = jax.vmap(lambda parts: problem.path.assemble(params, parts))(states.parts)
    states = states._replace(energy=energy)
    if hasattr(states, "gradient"):
        states = states._replace(gradient=gradient)
    return states, 0.0


class Moves(NamedTuple):
    """Figures of the Markov steps at one temperature, over all particles, each []."""

    acceptance_rate: jax.Array
    last_step_size: jax.Array
    num_evaluations: jax.Array


def move(problem: Problem, key, beta, step_size, options, states):
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
        moves = Moves(rate.mean(), step_size, count.mean())
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
        return states, step_size, Moves(zero + jnp.nan, step_size, zero)
    (end, step_size), (points, moves) = jax.lax.scan(
        body, (states, step_size), jnp.arange(num_moves)
    )
    share = 1.0 / length if settings.waste_free else 1.0
    moves = Moves(
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


def mass_options(problem: Problem, population: Population) -> dict[str, jax.Array]:
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

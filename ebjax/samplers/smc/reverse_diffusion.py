"""Reverse diffusion with weights: noisy energies, added or otherwise composed, sampled exactly.

With energies U(x, σ) of laws that are ever less noisy, σ_0 > σ_1 > ... > σ_T, and v = σ² - σ'²:

    x_0 ~ N(m, s²),                      G_0 = exp(-U(x_0, σ_0)) / N(x_0; m, s²)
    x' ~ N(x - v ∇U(x, σ), v)            a step of the reverse diffusion
    G   = exp(U(x, σ) - U(x', σ') + ∇U·(x' - x) + v |∇U|² / 2)

The last line is π_{σ'}(x') N(x; x', v) / (π_σ(x) N(x'; x - v ∇U, v)): noise as the way back. So
the product of mean weights has the expectation Z of exp(-U(·, σ_T)) whatever U is between. Where
each U(·, σ) is the law of the data convolved with N(0, σ²) the weights are nearly constant. A sum,
mixture or power of such energies is no such law, and reverse diffusion with its slope alone draws
from the wrong one; the weights put that right. Markov steps at each level, which leave its law
invariant and so the weights alone, make new particles of those that resampling copied.

Thornton et al., "Composition and control with distilled energy diffusion models and sequential
Monte Carlo", AISTATS 2025. Du et al., "Reduce, reuse, recycle: compositional generation with
energy-based diffusion models and MCMC", ICML 2023 (the compositions, Markov steps).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

from ebjax.energies.compose import condition
from ebjax.samplers.evaluate import value_and_gradient
from ebjax.samplers.langevin import check_positive
from ebjax.samplers.mala import mala
from ebjax.samplers.run import run_chain
from ebjax.samplers.smc.feynman_kac import FeynmanKac, Population, StepInfo, feynman_kac
from ebjax.samplers.smc.path import normal_energy
from ebjax.types import EnergyFn, Kernel, Params

__all__ = [
    "DiffusionParticle",
    "ReverseDiffusion",
    "reverse_diffusion",
    "reverse_diffusion_sample",
    "reverse_diffusion_smc",
]


class DiffusionParticle(NamedTuple):
    """``position`` [...] and ``log_potential`` [], log G of the step that led there."""

    position: jax.Array
    log_potential: jax.Array


class ReverseDiffusion(NamedTuple):
    """A ``FeynmanKac`` model of ``DiffusionParticle`` and the ``num_steps`` that it takes."""

    model: FeynmanKac
    num_steps: int


def _descend(key, energy_fn, params, x, level, next_level):
    """One reverse step: ``(x', log G without -U(x', σ'))``."""
    variance = (level - next_level) * (level + next_level)
    energy, gradient, _ = value_and_gradient(condition(energy_fn, level), params, x)
    noise = jnp.sqrt(variance) * jax.random.normal(key, x.shape, x.dtype)
    move = noise - variance * gradient
    # g·(x' - x) + v|g|²/2 with x' - x = √v ξ - v g.
    return x + move, energy + jnp.sum(gradient * (noise - 0.5 * variance * gradient))


def _checked_levels(noise_levels: npt.ArrayLike) -> np.ndarray:
    levels = np.asarray(noise_levels, float)
    is_ladder = levels.ndim == 1 and levels.size > 0 and np.isfinite(levels).all()
    if not (is_ladder and levels[-1] > 0 and np.all(np.diff(levels) < 0)):
        raise ValueError(
            f"noise_levels is {levels.tolist()}; it must be a vector of positive numbers, the "
            "widest first, each below the one before."
        )
    return levels


def reverse_diffusion(
    energy_fn: EnergyFn,
    *,
    noise_levels: npt.ArrayLike,
    mean: npt.ArrayLike,
    scale: npt.ArrayLike,
    num_mcmc_steps: int = 2,
    step_fraction: float = 0.2,
    build_kernel: Callable[..., Kernel] = mala,
) -> ReverseDiffusion:
    """Builds the model, to be run by ``feynman_kac`` or one's own loop over its steps.

    Args:
      energy_fn: U, ``(params, x, level) -> []`` with ``level`` [] the σ, of arrays x [...].
      noise_levels: [T + 1] positive and falling. A step v = σ² - σ'² should be a small part of the
        variance at σ: a ratio of neighbours of 1.05 or so.
      mean: m, a number or an array of the shape of x: of the start.
      scale: s > 0, likewise. The start should be near the law at σ_0: for the product of n laws
        about σ_0 / sqrt(n), for the power β about σ_0 / sqrt(β). Where it is not, weights tell.
      num_mcmc_steps: Markov steps at each level, after resampling.
      step_fraction: the step size of these in units of σ².
      build_kernel: ``(step_size=...) -> Kernel``, given the traced step of a level; it must leave
        the law invariant (``mala``, ``hmc``), which ``langevin`` does not.

    Returns:
      The model and its number of steps. Evaluations of U per particle and step, of which all but
      one have the gradient: ``num_mcmc_steps`` times the kernel's, and 2 (3 with Markov steps).

    Raises:
      ValueError: naming the argument that is out of range.
    """
    levels = _checked_levels(noise_levels)
    check_positive("step_fraction", step_fraction)
    if num_mcmc_steps < 0:
        raise ValueError(f"num_mcmc_steps is {num_mcmc_steps}; it must be at least 0.")
    mean, scale = np.asarray(mean, float), np.asarray(scale, float)
    shape = np.broadcast_shapes(mean.shape, scale.shape)
    if not np.all(scale > 0):
        raise ValueError(f"scale is {scale.tolist()}; it must be positive.")
    # A last step that goes nowhere: Markov steps at the last level.
    ladder = np.append(levels, levels[-1]) if num_mcmc_steps else levels

    def at(t, x):
        return jnp.asarray(ladder, x.dtype)[t]

    def init(key, params):
        x = jnp.asarray(mean + np.zeros(shape)) + jnp.asarray(scale) * jax.random.normal(key, shape)
        energy = energy_fn(params, x, at(0, x))
        return DiffusionParticle(x, normal_energy((mean, scale), x) - energy)

    def move(key, params, t, particle):
        step_key, chain_key = jax.random.split(key)
        x = particle.position
        level, next_level = at(t - 1, x), at(t, x)
        if num_mcmc_steps:
            kernel = build_kernel(step_size=step_fraction * jnp.square(level))
            at_level = condition(energy_fn, level)
            state = kernel.init(at_level, params, x)
            state, _ = run_chain(chain_key, kernel, at_level, params, state, num_mcmc_steps)
            x = state.position
        x, log_potential = _descend(step_key, energy_fn, params, x, level, next_level)
        return DiffusionParticle(x, log_potential - energy_fn(params, x, next_level))

    def log_potential(params, t, previous, particle):
        del params, t, previous
        return particle.log_potential

    return ReverseDiffusion(FeynmanKac(init, move, log_potential), len(ladder) - 1)


def reverse_diffusion_smc(
    key: jax.Array,
    energy_fn: EnergyFn,
    params: Params,
    *,
    num_particles: int,
    noise_levels: npt.ArrayLike,
    mean: npt.ArrayLike,
    scale: npt.ArrayLike,
    num_mcmc_steps: int = 2,
    step_fraction: float = 0.2,
    build_kernel: Callable[..., Kernel] = mala,
    resampling: str = "systematic",
    ess_threshold: float = 0.5,
) -> tuple[Population, StepInfo]:
    """Draws from ``exp(-U(·, σ_T)) / Z`` and estimates log Z, on one device; pure.

    Args:
      key: [] key of the run.
      energy_fn: U, as of ``reverse_diffusion``.
      params: its parameters.
      num_particles: N.
      noise_levels: as of ``reverse_diffusion``, like the arguments that follow.
      mean: m.
      scale: s.
      num_mcmc_steps: Markov steps at each level.
      step_fraction: their step size in units of σ².
      build_kernel: their kernel.
      resampling: a name of ``RESAMPLERS``.
      ess_threshold: resample where the effective sample size falls below this fraction of N.

    Returns:
      ``(population, info)``. Draws are ``population.particles.position`` [N, ...] with
      ``population.log_weights`` [N]; ``population.log_z`` [] is the estimate. ``info.log_z`` [T +
      1] is that of every level (with Markov steps there is one more entry, of no step).

    Raises:
      ValueError: naming the argument that is out of range.

    The product of N(-1, 1) and N(1, 1), each convolved with noise, is N(0, 1/2) at no noise:

    >>> def noisy(mean, x, level):
    ...     variance = 1.0 + level**2
    ...     return 0.5 * jnp.sum((x - mean) ** 2) / variance + 0.5 * jnp.log(2 * jnp.pi * variance)
    >>> def product(params, x, level):
    ...     return noisy(-1.0, x, level) + noisy(1.0, x, level)
    >>> population, info = reverse_diffusion_smc(
    ...     jax.random.key(0), product, (), num_particles=2000, mean=np.zeros(1),
    ...     noise_levels=np.geomspace(5.0, 0.01, 60), scale=5.0 / 2**0.5)
    >>> exact = -1.0 - 0.5 * jnp.log(4 * jnp.pi)
    >>> bool(jnp.abs(population.log_z - exact) < 0.1)
    True
    """
    model, num_steps = reverse_diffusion(
        energy_fn,
        noise_levels=noise_levels,
        mean=mean,
        scale=scale,
        num_mcmc_steps=num_mcmc_steps,
        step_fraction=step_fraction,
        build_kernel=build_kernel,
    )
    return feynman_kac(
        key,
        model,
        params,
        num_particles=num_particles,
        num_steps=num_steps,
        method=resampling,
        ess_threshold=ess_threshold,
    )


def reverse_diffusion_sample(
    key: jax.Array,
    energy_fn: EnergyFn,
    params: Params,
    position: jax.Array,
    *,
    noise_levels: npt.ArrayLike,
) -> jax.Array:
    """One path of the reverse diffusion without weights: exact in the limit of small steps for the
    energies of one law convolved with noise, and wrong for a composition of such.

    Args:
      key: [] key of the path.
      energy_fn: U, as of ``reverse_diffusion``.
      params: its parameters.
      position: [...] the start, at the widest level.
      noise_levels: [T + 1] positive and falling.

    Returns:
      [...] the end, at the narrowest level.

    Raises:
      ValueError: if the levels are not a falling ladder.
    """
    levels = jnp.asarray(_checked_levels(noise_levels), position.dtype)

    def body(x, inputs):
        index, level, next_level = inputs
        step_key = jax.random.fold_in(key, index)
        return _descend(step_key, energy_fn, params, x, level, next_level)[0], None

    pairs = (jnp.arange(len(levels) - 1), levels[:-1], levels[1:])
    return jax.lax.scan(body, position, pairs)[0]

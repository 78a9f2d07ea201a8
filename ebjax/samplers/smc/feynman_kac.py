"""Sequential Monte Carlo in its general form: weighted particles that are drawn, moved, resampled.

    x_0 ~ M_0,   x_t ~ M_t(x_{t-1}, ·),   weight multiplied by G_t(x_{t-1}, x_t)

    Z_T = E[ Π_t G_t(x_{t-1}, x_t) ],   estimated without bias by the product of mean weights

Filters, annealed importance sampling and tempering are such models. The pieces (``start``,
``reweight``, ``resample``) are what a sampler of one's own is made of, also inside ``pmap`` or
``shard_map``: with ``axis_name`` each device holds a part of the particles, in order, and all of
them see all weights, so the estimate and the ancestors are those of one device.

Del Moral, "Feynman-Kac formulae", Springer 2004. Lee and Whiteley, "Variance estimation in the
particle filter", Biometrika 105 (2018).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ebjax.numerics import neighbouring_keys
from ebjax.samplers.smc.resampling import RESAMPLERS, effective_sample_size, log_mean_exp
from ebjax.types import Params, PyTree

__all__ = [
    "FeynmanKac",
    "Population",
    "StepInfo",
    "feynman_kac",
    "feynman_kac_step",
    "gather",
    "log_z_variance",
    "resample",
    "reweight",
    "start",
]


class FeynmanKac(NamedTuple):
    """A model, for one particle; ``params`` may be traced.

    Attributes:
      init: ``(key, params) -> particle``, a draw of M_0.
      move: ``(key, params, t, particle) -> particle``, a draw of M_t, t from 1.
      log_potential: ``(params, t, previous, particle) -> []``, log G_t; at t = 0 both are x_0.
    """

    init: Callable[[jax.Array, Params], PyTree]
    move: Callable[[jax.Array, Params, jax.Array, PyTree], PyTree]
    log_potential: Callable[[Params, jax.Array, PyTree, PyTree], jax.Array]


class Population(NamedTuple):
    """Weighted particles and the estimate of log Z that they carry.

    Attributes:
      particles: [N, ...] any pytree.
      log_weights: [N], of mean weight 1 (all -inf where the population died out).
      log_z: [] log of the estimate up to and with these weights.
      eves: [N] int32, which particle of the first generation each one descends from.
      num_resamplings: [] int32.
    """

    particles: PyTree
    log_weights: jax.Array
    log_z: jax.Array
    eves: jax.Array
    num_resamplings: jax.Array


class StepInfo(NamedTuple):
    """Diagnosis of one step.

    Attributes:
      ess: [] effective sample size after weighting, in [0, N].
      log_z: [] the estimate so far.
      is_resampled: [] bool, whether the particles were resampled before they moved.
      is_finite: [] bool, whether no log potential was NaN or +inf. A NaN counts as no weight.
    """

    ess: jax.Array
    log_z: jax.Array
    is_resampled: jax.Array
    is_finite: jax.Array


def gather(tree: PyTree, axis_name: str | None) -> PyTree:
    """The parts [N/devices, ...] of all devices, in order, as [N, ...]."""
    if axis_name is None:
        return tree
    return jax.tree.map(lambda leaf: jax.lax.all_gather(leaf, axis_name, tiled=True), tree)


def _own(tree: PyTree, size: int, axis_name: str | None) -> PyTree:
    """This device's part [size, ...] of [N, ...]."""
    if axis_name is None:
        return tree
    first = jax.lax.axis_index(axis_name) * size
    return jax.tree.map(lambda leaf: jax.lax.dynamic_slice_in_dim(leaf, first, size), tree)


def start(particles: PyTree, index: jax.Array, dtype: Any = jnp.float32) -> Population:
    """A population of equal weights.

    Args:
      particles: [N, ...] or this device's part of them.
      index: [N] int32, their global indices.
      dtype: that of the weights.
    """
    return Population(
        particles=particles,
        log_weights=jnp.zeros(index.shape, dtype),
        log_z=jnp.zeros((), dtype),
        eves=index.astype(jnp.int32),
        num_resamplings=jnp.zeros((), jnp.int32),
    )


def reweight(
    population: Population, log_increments: jax.Array, *, axis_name: str | None = None
) -> tuple[Population, jax.Array, jax.Array]:
    """Multiplies weights by ``exp(log_increments)`` [N] and log Z by what that does to their mean.

    Returns:
      ``(population, ess [], is_finite [])``; see ``StepInfo``.
    """
    dtype = population.log_weights.dtype
    log_increments = log_increments.astype(dtype)
    is_bad = jnp.isnan(log_increments) | (log_increments == jnp.inf)
    log_weights = population.log_weights + jnp.where(
        jnp.isnan(log_increments), -jnp.inf, log_increments
    )
    everyone, bad = gather((log_weights, is_bad), axis_name)
    log_mean = log_mean_exp(everyone)
    population = population._replace(
        log_weights=log_weights - jnp.where(log_mean == -jnp.inf, 0.0, log_mean),
        log_z=population.log_z + log_mean,
    )
    return population, effective_sample_size(everyone), ~jnp.any(bad)


def resample(
    key: jax.Array,
    population: Population,
    ess: jax.Array,
    *,
    method: str = "systematic",
    ess_threshold: float | jax.Array = 0.5,
    axis_name: str | None = None,
) -> tuple[Population, jax.Array]:
    """Resamples where ``ess < ess_threshold * N``; the weights are then equal.

    Args:
      key: [] key, the same on all devices.
      population: the particles.
      ess: [] their effective sample size.
      method: a name of ``RESAMPLERS``.
      ess_threshold: fraction of N; the Python numbers 1 and 0 are always and never.
      axis_name: the axis over which the particles are split.

    Returns:
      ``(population, is_resampled [])``.
    """

    def draw(population):
        log_weights, *everyone = gather(
            (population.log_weights, population.particles, population.eves), axis_name
        )
        ancestors = _own(RESAMPLERS[method](key, log_weights), population.eves.size, axis_name)
        particles, eves = jax.tree.map(lambda leaf: leaf[ancestors], everyone)
        return Population(
            particles=particles,
            # A dead population stays dead: log Z is -inf, whatever the weights are now.
            log_weights=jnp.zeros_like(population.log_weights),
            log_z=population.log_z,
            eves=eves,
            num_resamplings=population.num_resamplings + 1,
        )

    if isinstance(ess_threshold, (int, float)):
        if ess_threshold >= 1:
            return draw(population), jnp.array(True)
        if ess_threshold <= 0:
            return population, jnp.array(False)
    num_particles = gather(population.log_weights, axis_name).size
    is_low = ess < ess_threshold * num_particles
    # Every device sees the same effective size, so all of them enter the collective or none does.
    return jax.lax.cond(is_low, draw, lambda population: population, population), is_low


def log_z_variance(
    population: Population, *, method: str = "systematic", axis_name: str | None = None
) -> jax.Array:
    """[] estimate of the relative variance of Z, so of the variance of log Z, from one run.

    With S_i the share of the weight whose eve is particle i, and r multinomial resamplings,

        V = 1 - (N / (N - 1))^{r+1} (1 - Σ_i S_i²)

    (Lee and Whiteley's), unbiased for Var(Z)/Z² after multiplication by Z². It is the sample
    variance of the weights where nothing was resampled (r = 0). The other methods of resampling
    add hardly any noise of their own, so the factor of r, which takes that noise away, is left
    out for them. Adapting the potentials to the particles is not accounted for. It needs many
    lines of descent: with a few eves left it is a rough upper guess. Negative values, which the
    estimate can take, are returned as 0.
    """
    log_weights, eves = gather((population.log_weights, population.eves), axis_name)
    num_noisy = population.num_resamplings if method == "multinomial" else 0
    return jnp.maximum(_relative_variance(log_weights, eves, num_noisy), 0.0)


def _relative_variance(
    log_weights: jax.Array, eves: jax.Array, num_noisy: int | jax.Array
) -> jax.Array:
    """V with r = ``num_noisy``, of either sign; NaN for one particle."""
    if eves.size < 2:
        return jnp.full((), jnp.nan, log_weights.dtype)
    shares = jax.ops.segment_sum(jax.nn.softmax(log_weights), eves, eves.size)
    others = eves.size - 1.0
    # 1 - N / (N - 1) (1 - Σ S²), written so that nothing of size 1 cancels.
    variance = (eves.size * jnp.sum(jnp.square(shares)) - 1.0) / others
    return variance - jnp.expm1(num_noisy * jnp.log1p(1.0 / others)) * (1.0 - variance)


def feynman_kac_step(
    key: jax.Array,
    model: FeynmanKac,
    params: Params,
    t: jax.Array,
    population: Population,
    index: jax.Array,
    *,
    method: str = "systematic",
    ess_threshold: float | jax.Array = 0.5,
    axis_name: str | None = None,
) -> tuple[Population, StepInfo]:
    """Resamples if need be, moves by M_t, weights by G_t.

    Args:
      key: [] key of the step, the same on all devices.
      model: the model.
      params: its parameters.
      t: [] int32, from 1.
      population: what the step before returned.
      index: [N] int32, global indices of the particles, which choose their noise.
      method: a name of ``RESAMPLERS``.
      ess_threshold: as in ``resample``.
      axis_name: the axis over which the particles are split, if they are.
    """
    resample_key, move_key = jax.random.split(key)
    ess = effective_sample_size(gather(population.log_weights, axis_name))
    population, is_resampled = resample(
        resample_key,
        population,
        ess,
        method=method,
        ess_threshold=ess_threshold,
        axis_name=axis_name,
    )
    previous = population.particles
    keys = neighbouring_keys(move_key, index)
    particles = jax.vmap(model.move, (0, None, None, 0))(keys, params, t, previous)
    log_potentials = jax.vmap(model.log_potential, (None, None, 0, 0))(
        params, t, previous, particles
    )
    population = population._replace(particles=particles)
    population, ess, is_finite = reweight(population, log_potentials, axis_name=axis_name)
    return population, StepInfo(ess, population.log_z, is_resampled, is_finite)


def feynman_kac(
    key: jax.Array,
    model: FeynmanKac,
    params: Params,
    *,
    num_particles: int,
    num_steps: int,
    method: str = "systematic",
    ess_threshold: float | jax.Array = 0.5,
) -> tuple[Population, StepInfo]:
    """Runs the model to t = ``num_steps`` on one device, to embed in one's own ``jit``.

    Args:
      key: [] key of the run; step t uses ``fold_in(key, t)``.
      model: the model.
      params: its parameters.
      num_particles: N.
      num_steps: T, so the potentials G_0, ..., G_T count.
      method: a name of ``RESAMPLERS``.
      ess_threshold: as in ``resample``.

    Returns:
      ``(population, info)``, each field of the info [T + 1].

    Raises:
      ValueError: if a size is out of range or the method is not known.

    A random walk of two steps that is weighted by how near to 1 it ends:

    >>> model = FeynmanKac(
    ...     init=lambda key, params: jnp.zeros(()),
    ...     move=lambda key, params, t, x: x + jax.random.normal(key),
    ...     log_potential=lambda params, t, previous, x: -0.5 * (t == 2) * (x - 1.0) ** 2,
    ... )
    >>> population, info = feynman_kac(
    ...     jax.random.key(0), model, (), num_particles=10_000, num_steps=2)
    >>> exact = -0.5 * jnp.log(3.0) - 1 / 6
    >>> bool(jnp.abs(population.log_z - exact) < 0.05)
    True
    """
    for name, number, minimum in (("num_particles", num_particles, 1), ("num_steps", num_steps, 0)):
        if number < minimum:
            raise ValueError(f"{name} is {number}; it must be at least {minimum}.")
    check_method(method)
    index = jnp.arange(num_particles)
    keys = neighbouring_keys(jax.random.fold_in(key, 0), index)
    particles = jax.vmap(model.init, (0, None))(keys, params)
    log_potentials = jax.vmap(model.log_potential, (None, None, 0, 0))(
        params, jnp.zeros((), jnp.int32), particles, particles
    )
    population = start(particles, index, log_potentials.dtype)
    population, ess, is_finite = reweight(population, log_potentials)
    first = StepInfo(ess, population.log_z, jnp.array(False), is_finite)

    def body(population, t):
        return feynman_kac_step(
            jax.random.fold_in(key, t),
            model,
            params,
            t,
            population,
            index,
            method=method,
            ess_threshold=ess_threshold,
        )

    population, infos = jax.lax.scan(body, population, jnp.arange(1, num_steps + 1))
    return population, jax.tree.map(
        lambda one, many: jnp.concatenate([one[None], many]), first, infos
    )


def check_method(method: str) -> None:
    """Raises ``ValueError`` for a method of resampling that does not exist."""
    if method not in RESAMPLERS:
        raise ValueError(f"resampling is {method!r}; it must be one of {', '.join(RESAMPLERS)}.")

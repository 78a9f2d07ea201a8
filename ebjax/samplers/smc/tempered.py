"""Tempered sequential Monte Carlo: from a law that is easy to draw from to the one wanted.

    x_i ~ p_0;   for β_1 < β_2 < ... < β_T = 1:
      weight     w_i ← w_i exp(E_{β_{t-1}}(x_i) - E_{β_t}(x_i))
      resample   where the effective sample size is low
      move       x_i by Markov steps that leave p_{β_t}, the new law, invariant

    Z estimate = Π_t (mean weight),   E[Z estimate] = Z_1 / Z_0 exactly for a fixed ladder and fixed
    kernels. Without resampling it is annealed importance sampling; with one β, importance sampling.

What adapts to the particles (the ladder, the step size, the mass) leaves the estimate consistent,
with a bias of order 1/N. Run once more with what was found, fixed, for the exact property.

Del Moral, Doucet and Jasra, "Sequential Monte Carlo samplers", JRSS B 68 (2006). Neal, "Annealed
importance sampling", Statistics and Computing 11 (2001). Dau and Chopin, "Waste-free sequential
Monte Carlo", JRSS B 84 (2022).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

from ebjax.parallel import AXIS_NAME, spread
from ebjax.samplers.smc.feynman_kac import check_method
from ebjax.samplers.smc.moves import Settings
from ebjax.samplers.smc.population import TemperatureInfo, run_population
from ebjax.samplers.smc.resampling import log_mean_exp
from ebjax.types import EnergyFn, Kernel, Params, Position, join_arrays, split_arrays

__all__ = ["TemperedSamples", "ais_log_z", "smc_sample"]


class TemperedSamples(NamedTuple):
    """What ``smc_sample`` returns; K islands, T temperatures, N particles in all.

    Attributes:
      particles: [N, ...] weighted draws of the target.
      log_weights: [N], of mean weight 1.
      log_z: [] estimate of log(Z_1 / Z_0); of log Z_1 where the base is normalised.
      log_z_standard_error: [] its standard error: from the islands where there are two or more,
        else from the lines of descent of the one run (see ``log_z_variance``). It knows nothing of
        a mode that no particle has found. For a waste-free run it is from the spread between
        chains at each temperature, as if chains forgot where they started: where they cannot cross
        between modes it is too small, and islands are the way to see it.
      info: ``TemperatureInfo``, each field [T]; [K, T] where K > 1. Rows past
        ``num_temperatures`` are empty.
      num_temperatures: [] int32, or [K], temperatures used.
      num_evaluations: [] evaluations of the energy per particle, the mean over the islands.
      island_log_z: [K] the estimate of each island.
    """

    particles: Position
    log_weights: jax.Array
    log_z: jax.Array
    log_z_standard_error: jax.Array
    info: TemperatureInfo
    num_temperatures: jax.Array
    num_evaluations: jax.Array
    island_log_z: jax.Array


def smc_sample(
    key: jax.Array,
    kernel: Kernel | Callable[..., Kernel],
    energy_fn: EnergyFn,
    params: Params,
    initial_particles: Position,
    *,
    inverse_temperatures: npt.ArrayLike | None = None,
    target_ess: float = 0.9,
    max_num_temperatures: int = 200,
    num_mcmc_steps: int = 5,
    step_size: npt.ArrayLike = 0.1,
    target_acceptance: float | None = None,
    preconditioning: str | None = None,
    resampling: str = "systematic",
    ess_threshold: float = 0.5,
    waste_free: bool = False,
    num_islands: int = 1,
    num_devices: int = 1,
) -> TemperedSamples:
    """Draws from E_1 along a path from E_0 and estimates log(Z_1 / Z_0).

    Compiled once for each set of functions and static options; new keys, parameters, particles,
    ladders and step sizes do not compile again. It may be called inside ``jit`` and ``vmap``.

    Args:
      key: [] key of the run.
      kernel: a ``Kernel``, or what makes one when called as ``kernel(step_size=h)`` (with
        ``inverse_mass=...`` too where there is ``preconditioning``): ``mala``, or
        ``bind(hmc, num_steps=10)``.
      energy_fn: a path ``(β, params), x -> E_β(x)``, as ``geometric_path(base, target)``. Any
        other function of that form works, and is evaluated again for every new β.
      params: parameters of the path.
      initial_particles: [N, ...] exact draws of the law at β = 0.
      inverse_temperatures: [T] the ladder β_1 < ... < β_T = 1. ``None`` chooses each β while it
        runs, as the largest with a conditional effective sample size of ``target_ess`` N.
      target_ess: fraction of N in (0, 1); higher is more temperatures.
      max_num_temperatures: the last of so many goes to β = 1 whatever it costs; look at ``info``.
      num_mcmc_steps: Markov steps at each temperature; the length of a chain if ``waste_free``.
      step_size: [] or, with a ladder, [T]; used where ``kernel`` makes kernels.
      target_acceptance: after each Markov step, log h moves by the population's mean acceptance
        rate less this, and the step size is handed on to the next temperature. ``None`` keeps
        ``step_size``. About 0.6 for MALA, 0.7 to 0.8 for HMC.
      preconditioning: ``"diagonal"`` or ``"dense"`` gives the weighted (co)variance of the
        particles at the new temperature to ``kernel`` as ``inverse_mass``.
      resampling: a name of ``RESAMPLERS``.
      ess_threshold: resample where the effective sample size falls below this fraction of N;
        1 is always, 0 never (annealed importance sampling).
      waste_free: resample N / num_mcmc_steps particles at each temperature and keep every point of
        the chains that start there.
      num_islands: K separate populations of N / K, which share nothing. Their mean Z is the
        estimate, and its standard error comes from how they differ.
      num_devices: local devices to spread over; the islands if there are several, else the
        particles of the one population. The result is that of one device up to rounding.

    Returns:
      ``TemperedSamples``.

    Raises:
      ValueError: naming the argument that is out of range.

    >>> import jax, jax.numpy as jnp
    >>> from ebjax.samplers import mala
    >>> from ebjax.samplers.smc import geometric_path, normal_energy
    >>> def likelihood(params, x):  # prior N(0, 1) and one observation at 2, with unit noise
    ...     return normal_energy((0.0, 1.0), x) + normal_energy((params, 1.0), x)
    >>> path = geometric_path(normal_energy, likelihood)
    >>> start = jax.random.normal(jax.random.key(0), (2000, 1))
    >>> result = smc_sample(jax.random.key(1), mala, path, ((0.0, 1.0), 2.0), start,
    ...                     step_size=0.5, target_acceptance=0.6)
    >>> exact = -0.5 * jnp.log(2 * jnp.pi * 2.0) - 1.0
    >>> bool(jnp.abs(result.log_z - exact) < 4 * result.log_z_standard_error)
    True
    """
    num_particles = _num_particles(initial_particles)
    settings = Settings(
        is_adaptive=inverse_temperatures is None,
        makes_kernels=not isinstance(kernel, Kernel),
        target_ess=target_ess,
        max_num_temperatures=max_num_temperatures,
        num_mcmc_steps=num_mcmc_steps,
        target_acceptance=target_acceptance,
        preconditioning=preconditioning,
        resampling=resampling,
        ess_threshold=ess_threshold,
        waste_free=waste_free,
    )
    _check(settings, num_particles, num_islands, num_devices, inverse_temperatures)
    ladder = jnp.zeros(max_num_temperatures)
    if inverse_temperatures is not None:
        ladder = jnp.asarray(inverse_temperatures)
    arrays, rest = split_arrays(kernel)
    return _smc_sample(
        key,
        arrays,
        params,
        initial_particles,
        ladder,
        jnp.broadcast_to(jnp.asarray(step_size), ladder.shape),
        rest=rest,
        energy_fn=energy_fn,
        settings=settings,
        num_islands=num_islands,
        num_devices=num_devices,
    )


def ais_log_z(
    key: jax.Array,
    kernel: Kernel | Callable[..., Kernel],
    energy_fn: EnergyFn,
    params: Params,
    initial_particles: Position,
    *,
    inverse_temperatures: npt.ArrayLike,
    **options: Any,
) -> TemperedSamples:
    """Annealed importance sampling: ``smc_sample`` that never resamples.

    The chains are independent where nothing adapts, so the estimate is unbiased and its standard
    error that of a mean of N weights.
    """
    return smc_sample(
        key,
        kernel,
        energy_fn,
        params,
        initial_particles,
        inverse_temperatures=inverse_temperatures,
        ess_threshold=0.0,
        **options,
    )


def _num_particles(initial_particles: Position) -> int:
    leaves = jax.tree.leaves(initial_particles)
    if not leaves or any(jnp.ndim(leaf) == 0 for leaf in leaves):
        raise ValueError("initial_particles has no leading axis of particles; give it as [N, ...].")
    sizes = {len(leaf) for leaf in leaves}
    if len(sizes) > 1 or 0 in sizes:
        raise ValueError(
            f"initial_particles has {sorted(sizes)} particles in its leaves; all must have the "
            "same number, at least 1."
        )
    return sizes.pop()


def _check(settings, num_particles, num_islands, num_devices, inverse_temperatures) -> None:
    check_method(settings.resampling)
    for name, number in (
        ("num_islands", num_islands),
        ("num_devices", num_devices),
        ("num_mcmc_steps", settings.num_mcmc_steps),
        ("max_num_temperatures", settings.max_num_temperatures),
    ):
        if number < 1:
            raise ValueError(f"{name} is {number}; it must be at least 1.")
    if num_particles % num_islands:
        raise ValueError(f"num_islands is {num_islands}; it must divide {num_particles} particles.")
    share = num_islands if num_islands > 1 else num_particles
    if share % num_devices:
        what = "islands" if num_islands > 1 else "particles"
        raise ValueError(f"num_devices is {num_devices}; it must divide the {share} {what}.")
    size = num_particles // num_islands // (num_devices if num_islands == 1 else 1)
    if settings.waste_free and size % settings.num_mcmc_steps:
        raise ValueError(
            f"num_mcmc_steps is {settings.num_mcmc_steps}; for a waste-free run it must divide the "
            f"{size} particles of an island on one device."
        )
    if settings.is_adaptive and not 0.0 < settings.target_ess < 1.0:
        raise ValueError(f"target_ess is {settings.target_ess}; it must be between 0 and 1.")
    if not 0.0 <= settings.ess_threshold <= 1.0:
        raise ValueError(f"ess_threshold is {settings.ess_threshold}; it must be in [0, 1].")
    if settings.waste_free and settings.ess_threshold == 0.0:
        raise ValueError("ess_threshold is 0; a waste-free run resamples at every temperature.")
    if settings.preconditioning not in (None, "diagonal", "dense"):
        raise ValueError(
            f"preconditioning is {settings.preconditioning!r}; it must be None, 'diagonal' or "
            "'dense'."
        )
    needs_maker = settings.preconditioning is not None or settings.target_acceptance is not None
    if needs_maker and not settings.makes_kernels:
        raise ValueError(
            "kernel is a Kernel with options of its own; to adapt its step size or mass, give what "
            "makes it, such as mala or bind(hmc, num_steps=10)."
        )
    if inverse_temperatures is not None and not isinstance(inverse_temperatures, jax.core.Tracer):
        ladder = np.asarray(inverse_temperatures)
        increases = ladder.ndim == 1 and ladder.size and np.all(np.diff(ladder) >= 0.0)
        if not (increases and ladder[0] >= 0.0 and math.isclose(ladder[-1], 1.0, abs_tol=1e-6)):
            raise ValueError(
                f"inverse_temperatures is {ladder}; it must be [T], not negative, increasing, to 1."
            )


@functools.partial(
    jax.jit, static_argnames=("rest", "energy_fn", "settings", "num_islands", "num_devices")
)
def _smc_sample(
    key,
    arrays,
    params,
    initial_particles,
    ladder,
    step_sizes,
    *,
    rest,
    energy_fn,
    settings: Settings,
    num_islands: int,
    num_devices: int,
) -> TemperedSamples:
    num_particles = _num_particles(initial_particles)
    axis_name = AXIS_NAME if num_devices > 1 and num_islands == 1 else None

    def run_one(replicated, island, index, positions):
        key, arrays, *rest_of_arguments = replicated
        return run_population(
            jax.random.fold_in(key, island),
            join_arrays(arrays, rest),
            energy_fn,
            *rest_of_arguments,
            positions,
            index,
            settings=settings,
            axis_name=axis_name,
        )

    replicated = (key, arrays, params, ladder, step_sizes)
    if num_islands == 1:

        def run(replicated, split):
            particles, log_weights, other = run_one(replicated, 0, *split)
            # What is equal on all devices leaves them with an axis of its own.
            return particles, log_weights, jax.tree.map(lambda leaf: leaf[None], other)

        index = jnp.arange(num_particles)
        particles, log_weights, other = spread(run, num_devices)(
            replicated, (index, initial_particles)
        )
        other = jax.tree.map(lambda leaf: leaf[0], other)
        island_log_z, standard_error = other.log_z[None], jnp.sqrt(other.log_z_variance)
        log_z, num_evaluations = other.log_z, other.num_evaluations
    else:
        size = num_particles // num_islands

        def run(replicated, split):
            islands, positions = split
            return jax.vmap(run_one, (None, 0, None, 0))(
                replicated, islands, jnp.arange(size), positions
            )

        in_islands = jax.tree.map(
            lambda leaf: leaf.reshape(num_islands, size, *leaf.shape[1:]), initial_particles
        )
        particles, log_weights, other = spread(run, num_devices)(
            replicated, (jnp.arange(num_islands), in_islands)
        )
        island_log_z = other.log_z
        log_z = log_mean_exp(island_log_z)
        log_share = island_log_z - log_z
        standard_error = jnp.std(jnp.exp(log_share), ddof=1) / math.sqrt(num_islands)
        log_weights = (log_weights + log_share[:, None]).reshape(-1)
        particles = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), particles)
        num_evaluations = jnp.mean(other.num_evaluations)
    return TemperedSamples(
        particles=particles,
        log_weights=log_weights,
        log_z=log_z,
        log_z_standard_error=standard_error,
        info=other.info,
        num_temperatures=other.num_temperatures,
        num_evaluations=num_evaluations,
        island_log_z=island_log_z,
    )

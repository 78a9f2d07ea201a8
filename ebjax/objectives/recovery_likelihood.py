"""Diffusion recovery likelihood: an energy for each noise level, learned by short tethered chains.

Data are diffused in T steps, x_0 nearly clean and x_T nearly N(0, I):

    x_t = ᾱ_t x + σ̄_t ε,    x_{t+1} = a_t x_t + σ_t ε',    a_t = ᾱ_{t+1}/ᾱ_t,  σ_t² = 1 - a_t²

With ``y = a_t x_t``, so that ``x_{t+1} = y + σ_t ε'``, and E(y, t) the energy of the law of y, what
is learned is the conditional law of y given the noisier example,

    p(y | x_{t+1}) ∝ exp( -E(y, t) - |y - x_{t+1}|² / (2σ_t²) ),

whose tether leaves nearly one mode, so that K Langevin steps from x_{t+1} nearly sample it:

    loss = w_t ( E(y⁺, t) - E(y⁻, t) ),    y⁺ = a_t x_t,   y⁻ the end of the chain, a constant

    x' = x - h ∇E - (h/σ_t²)(x - x_{t+1}) + sqrt(2h) ξ,    h = s σ_t²

At the top level t = T - 1 there is nothing to recover: no tether, a_t = 1, and chains from noise.
Sampling goes from N(0, I) down the levels, with x_t = y/a_t the next level's noisier example.

Gao, Song, Poole, Wu and Kingma, "Learning energy-based models by diffusion recovery likelihood",
ICLR 2021. Schedule and pairs with shared noise: Zhu, Xie, Wu and Gao, "Learning energy-based models
by cooperative diffusion recovery likelihood", ICLR 2024.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

from ebjax.objectives.contrastive_divergence import contrastive_loss
from ebjax.objectives.recovery_schedule import RecoverySchedule, at_level, recovery_pair
from ebjax.samplers.evaluate import value_and_gradient
from ebjax.samplers.langevin import langevin
from ebjax.samplers.run import run_chain
from ebjax.types import EnergyFn, Kernel, Objective, Params, Position, bind

__all__ = [
    "energy_of_data",
    "recovery_chain",
    "recovery_likelihood",
    "recovery_sample",
    "scaled_by_step_size",
    "tethered",
]


def tethered(energy_fn: EnergyFn, schedule: RecoverySchedule) -> EnergyFn:
    """``(params, y, noisier, level) -> E(y, t) + |y - noisier|² / (2σ_t²)``, untethered at the top.

    The energy of the conditional law that is learned.

    Args:
      energy_fn: ``(params, y, level) -> []``.
      schedule: how data are diffused.
    """
    return bind(_tethered, energy_fn=energy_fn, schedule=schedule)


def _tethered(params, y, noisier, level, *, energy_fn, schedule):
    squares = jax.tree.map(lambda a, b: jnp.sum(jnp.square(a - b)), y, noisier)
    tether = at_level(schedule.tether, level, y)
    return energy_fn(params, y, level) + 0.5 * tether * sum(jax.tree.leaves(squares))


def scaled_by_step_size(
    energy_fn: EnergyFn, schedule: RecoverySchedule, *, step_fraction: npt.ArrayLike
) -> EnergyFn:
    """``E(y, t) = g(y, t) / (2 s σ_t²)``: a network g that gives the drift of one step.

    The published parameterisation: the variance of a step's noise is taken out of the network, so
    that a step moves by ``-½∇g`` at every level.

    Args:
      energy_fn: g, ``(params, y, level) -> []``.
      schedule: how data are diffused.
      step_fraction: s, the one of the chains.

    Returns:
      ``(params, y, level) -> []``.
    """
    variances = 2.0 * _step_sizes(schedule, step_fraction)
    return bind(_step_scaled, energy_fn=energy_fn, variances=variances)


def _step_scaled(params, y, level, *, energy_fn, variances):
    return energy_fn(params, y, level) / at_level(variances, level, y)


def _step_sizes(schedule: RecoverySchedule, step_fraction: npt.ArrayLike) -> np.ndarray:
    """[T] h = s σ_t²."""
    fraction = np.asarray(step_fraction, float)
    if fraction.shape not in ((), (schedule.num_levels,)) or not np.all(fraction > 0.0):
        raise ValueError(
            f"step_fraction is {fraction.tolist()}; give one positive number, or one for each of "
            f"the {schedule.num_levels} levels."
        )
    return fraction * schedule.step_noise**2


def energy_of_data(energy_fn: EnergyFn, schedule: RecoverySchedule, level: int = 0) -> EnergyFn:
    """``(params, x) -> E(ᾱ_t scale_t x, t)``: a level's energy in the units of the data.

    Its law is that of the data convolved with N(0, (σ̄_t/ᾱ_t)²); at level 0 nearly that of the data.

    >>> from ebjax.objectives.recovery_schedule import cosine_noise, recovery_schedule
    >>> schedule = recovery_schedule(cosine_noise())
    >>> energy_fn = energy_of_data(lambda params, y, level: jnp.sum(y) + level, schedule, 2)
    >>> round(float(energy_fn((), jnp.ones(1))), 3)  # ᾱ_3, one step noisier than level 2
    2.732
    """
    return bind(_energy_of_data, energy_fn=energy_fn, schedule=schedule, level=level)


def _energy_of_data(params, x, *, energy_fn, schedule, level):
    share = float(schedule.signal[level] * schedule.scale[level])
    return energy_fn(params, jax.tree.map(lambda leaf: share * leaf, x), jnp.asarray(level))


def recovery_chain(
    key: jax.Array,
    energy_fn: EnergyFn,
    params: Params,
    start: Position,
    noisier: Position,
    level: jax.Array,
    *,
    schedule: RecoverySchedule,
    num_steps: int,
    step_fraction: npt.ArrayLike,
    build_kernel: Callable[..., Kernel] = langevin,
) -> tuple[Position, Any]:
    """Runs one chain of the conditional law of a level: ``(end, info averaged over the steps)``.

    Args:
      key: [] key of this chain.
      energy_fn: ``(params, y, level) -> []``.
      params: its parameters.
      start: where the chain starts; the published choice is ``noisier`` itself.
      noisier: x_{t+1}.
      level: [] int, t.
      schedule: how data are diffused.
      num_steps: K.
      step_fraction: s, the step as a share of the tether's variance: ``h = s σ_t²``; one number,
        or one a level [T].
      build_kernel: ``(step_size=...) -> Kernel``, given the traced step of the level.
    """
    step_size = at_level(_step_sizes(schedule, step_fraction), level, start)
    kernel = build_kernel(step_size=step_size)
    conditional = bind(_given, energy_fn=tethered(energy_fn, schedule))
    given = (params, noisier, level)
    state = kernel.init(conditional, given, start)
    state, info = run_chain(key, kernel, conditional, given, state, num_steps)
    return state.position, info


def _given(given, y, *, energy_fn):
    params, noisier, level = given
    return energy_fn(params, y, noisier, level)


def _check(schedule: RecoverySchedule, num_steps: int, step_fraction: npt.ArrayLike) -> None:
    if not isinstance(schedule, RecoverySchedule):
        raise ValueError(
            f"schedule is {schedule!r}; it must be a RecoverySchedule, as recovery_schedule makes."
        )
    if num_steps < 1:
        raise ValueError(f"num_steps is {num_steps}; a chain takes at least 1 step on a level.")
    _step_sizes(schedule, step_fraction)


def recovery_likelihood(
    energy_fn: EnergyFn,
    schedule: RecoverySchedule,
    *,
    num_steps: int,
    step_fraction: npt.ArrayLike = 0.134,
    level_weights: npt.ArrayLike | None = None,
    shared_noise: bool = True,
    energy_regularizer: float = 0.0,
    build_kernel: Callable[..., Kernel] = langevin,
) -> Objective:
    """Builds the objective; each example draws one level, all alike likely.

    Args:
      energy_fn: the energy that is trained, ``(params, y, level) -> []`` with ``level`` [] int, the
        index t. It gets the same level for data and for samples.
      schedule: how data are diffused.
      num_steps: K, steps of a chain.
      step_fraction: s, ``h = s σ_t²``, or s [T] of the levels; with Langevin steps the variance of
        a tethered chain is too large, by about the share s/2. Data close to a surface have
        conditional laws much narrower than the tether: ``recovery_schedule.steps_of_narrow_data``.
      level_weights: w [T], all 1 by default, which is the likelihood. The published weights with
        ``scaled_by_step_size`` are ``2 s σ_0 σ_t``.
      shared_noise: see ``recovery_pair``.
      energy_regularizer: α >= 0, adds ``w α (E(y⁺)² + E(y⁻)²)``.
      build_kernel: ``(step_size=...) -> Kernel``: ``langevin``, ``mala`` (which leaves the
        conditional laws exactly invariant), or a ``functools.partial``.

    Returns:
      An ``Objective`` over batches of examples [B, ...], with nothing to carry. Metrics:
      ``energy_data``, ``energy_samples``, ``energy_gap`` (data minus samples; near 0, while a drift
      away from it says that chains are too short), ``sampler_gradient_norm`` and
      ``acceptance_rate`` where the kernel reports them, and ``chains_finite``.

    Raises:
      ValueError: naming the option that is out of range.
    """
    _check(schedule, num_steps, step_fraction)
    weights = np.ones(schedule.num_levels) if level_weights is None else np.asarray(level_weights)
    if weights.shape != (schedule.num_levels,) or not np.all(weights >= 0):
        raise ValueError(
            f"level_weights are {weights.tolist()}; give {schedule.num_levels} of them, "
            "none negative."
        )
    chain = bind(
        recovery_chain,
        schedule=schedule,
        num_steps=num_steps,
        step_fraction=step_fraction,
        build_kernel=build_kernel,
    )

    def init(key, params, batch):
        del key, params, batch
        return ()

    def draw(params, x, key):
        """A level, a data point of it and a sample of it."""
        level_key, pair_key, chain_key = jax.random.split(key, 3)
        level = jax.random.randint(level_key, (), 0, schedule.num_levels)
        positive, noisier = recovery_pair(pair_key, x, level, schedule, shared_noise=shared_noise)
        negative, info = chain(chain_key, energy_fn, params, noisier, noisier, level)
        return level, positive, negative, info

    def pair_loss(params, level, positive, negative):
        energies = [energy_fn(params, y, level) for y in (positive, negative)]
        loss = contrastive_loss(*energies, energy_regularizer=energy_regularizer)
        return at_level(weights, level, positive) * loss, *energies

    def loss(params, carry, keys, batch):
        frozen = jax.lax.stop_gradient(params)
        draws = jax.vmap(draw, (None, 0, 0))(frozen, batch, keys)
        level, positive, negative, info = jax.lax.stop_gradient(draws)
        losses, data, samples = jax.vmap(pair_loss, (None, 0, 0, 0))(
            params, level, positive, negative
        )
        metrics = {
            "energy_data": data.mean(),
            "energy_samples": samples.mean(),
            "energy_gap": data.mean() - samples.mean(),
            "chains_finite": info.is_finite.mean(),
        }
        reported = {"sampler_gradient_norm": "gradient_norm", "acceptance_rate": "acceptance_rate"}
        for name, field in reported.items():
            if hasattr(info, field):
                metrics[name] = getattr(info, field).mean()
        return losses.mean(), (carry, metrics)

    return Objective(init=init, loss=loss)


def recovery_sample(
    key: jax.Array,
    energy_fn: EnergyFn,
    params: Params,
    start: Position,
    *,
    schedule: RecoverySchedule,
    num_steps: int,
    step_fraction: npt.ArrayLike = 0.134,
    build_kernel: Callable[..., Kernel] = langevin,
    denoise: bool = False,
) -> tuple[Position, Any]:
    """Runs one chain from noise down all levels; pure, to embed in one's own ``jit`` and ``vmap``.

    Args:
      key: [] key of this chain.
      energy_fn: ``(params, y, level) -> []``.
      params: its parameters.
      start: a draw of N(0, I), shaped as one example.
      schedule: the one of training.
      num_steps: K, steps on each level.
      step_fraction: s, the one of training.
      build_kernel: ``(step_size=...) -> Kernel``.
      denoise: whether the noise of the cleanest level is taken away by ``x_0 - σ̄_0² ∇E`` (Tweedie).

    Returns:
      ``(x, info)``: an example in the units of the data, and the kernel's info [T], averaged over
      each level's steps, from the top level down.

    Raises:
      ValueError: naming the option that is out of range.

    >>> from ebjax.objectives.recovery_schedule import cosine_noise, recovery_schedule
    >>> schedule = recovery_schedule(cosine_noise())
    >>> def energy_fn(params, y, level):  # N(0, I) at all levels
    ...     return 0.5 * jnp.sum(y**2)
    >>> x, info = recovery_sample(
    ...     jax.random.key(0), energy_fn, (), jnp.zeros(2), schedule=schedule, num_steps=5)
    >>> x.shape, info.gradient_norm.shape
    ((2,), (6,))
    """
    _check(schedule, num_steps, step_fraction)

    def descend(noisier, level):
        y, info = recovery_chain(
            jax.random.fold_in(key, level),
            energy_fn,
            params,
            noisier,
            noisier,
            level,
            schedule=schedule,
            num_steps=num_steps,
            step_fraction=step_fraction,
            build_kernel=build_kernel,
        )
        return jax.tree.map(lambda leaf: leaf / at_level(schedule.scale, level, y), y), info

    x, info = jax.lax.scan(descend, start, jnp.arange(schedule.num_levels)[::-1])
    signal, noise = float(schedule.signal[0]), float(schedule.noise[0])
    if denoise:
        # The energy as a function of x_0 = y / scale_0.
        cleanest = bind(_of_level_zero, energy_fn=energy_fn, schedule=schedule)
        _, gradient, _ = value_and_gradient(cleanest, params, x)
        x = jax.tree.map(lambda leaf, g: leaf - noise**2 * g, x, gradient)
    return jax.tree.map(lambda leaf: leaf / signal, x), info


def _of_level_zero(params, x, *, energy_fn, schedule):
    share = float(schedule.scale[0])
    return energy_fn(params, jax.tree.map(lambda leaf: share * leaf, x), jnp.asarray(0))

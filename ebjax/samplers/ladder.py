"""The ladder of parallel tempering, tuned until all neighbours exchange equally often.

    Λ(β_i) = Σ_{j < i} r_j   from the rejection rates r_j of exchanges between β_j and β_{j+1}

The new rungs are where Λ grows by equal shares: that ladder has the most round trips, and their
number needs about 2Λ + 1 rungs to be near its limit.

Syed, Bouchard-Côté, Deligiannidis and Doucet, "Non-reversible parallel tempering: a scalable
highly parallel MCMC scheme", JRSS B 84 (2022).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy.typing as npt

from ebjax.numerics import neighbouring_keys
from ebjax.samplers.tempering import check_ladder, hashable, parallel_tempering
from ebjax.types import EnergyFn, Kernel, Params, Position, join_arrays, split_arrays

__all__ = ["TunedLadder", "tune_ladder"]


class TunedLadder(NamedTuple):
    """What ``tune_ladder`` returns.

    Attributes:
      inverse_temperatures: [R] the ladder with equal rejection rates between neighbours.
      step_sizes: [R] of the inner kernel at each β; the ones given, if nothing was to adapt.
      rejection_rates: [R - 1] mean rejection rates of exchanges in the last round, on the ladder
        of that round.
      barrier: [] their sum Λ, the communication barrier. Good ladders have R near 2Λ + 1.
      positions: [C, ...] of the cold replicas, to start from.
    """

    inverse_temperatures: jax.Array
    step_sizes: jax.Array | None
    rejection_rates: jax.Array
    barrier: jax.Array
    positions: Position


def tune_ladder(
    key: jax.Array,
    kernel: Kernel | Callable[..., Kernel],
    energy_fn: EnergyFn,
    params: Params,
    initial_positions: Position,
    *,
    inverse_temperatures: npt.ArrayLike,
    step_size: npt.ArrayLike | None = None,
    target_acceptance: float | None = None,
    num_rounds: int = 6,
    num_steps: int = 32,
    num_local_steps: int = 1,
    is_path: bool = False,
) -> TunedLadder:
    """Warm-up: moves the inner rungs of the ladder until all neighbours exchange equally often.

    Each round has twice as many steps as the one before. The first and last β stay.

    Args:
      key: [] key.
      kernel: as in ``parallel_tempering``.
      energy_fn: the energy, or with ``is_path`` the path.
      params: its parameters.
      initial_positions: [C, ...] where C independent groups of replicas start.
      inverse_temperatures: [R] the first ladder; a geometric one will do.
      step_size: [] or [R], where ``kernel`` makes kernels.
      target_acceptance: adapts the step size at each β to this acceptance rate, or does not.
      num_rounds: at least 1.
      num_steps: steps of the first round.
      num_local_steps: as in ``parallel_tempering``.
      is_path: as in ``parallel_tempering``.

    Raises:
      ValueError: naming the argument that is out of range.
    """
    for name, number in (("num_rounds", num_rounds), ("num_steps", num_steps)):
        if number < 1:
            raise ValueError(f"{name} is {number}; it must be at least 1.")
    check_ladder(hashable(inverse_temperatures))
    if target_acceptance is not None and step_size is None:
        raise ValueError("target_acceptance needs a step_size, and a kernel that is made with one.")
    ladder = jnp.asarray(inverse_temperatures, jnp.result_type(float))
    step_sizes = None
    if step_size is not None:
        step_sizes = jnp.broadcast_to(jnp.asarray(step_size, ladder.dtype), ladder.shape)
    arrays, rest = split_arrays(kernel)
    options = {
        "rest": rest,
        "energy_fn": energy_fn,
        "num_local_steps": num_local_steps,
        "is_path": is_path,
        "target_acceptance": target_acceptance,
    }
    states = _start_groups(arrays, params, initial_positions, ladder, step_sizes, **options)
    rates = jnp.zeros(ladder.size - 1, ladder.dtype)
    for round_index in range(num_rounds):
        round_key = jax.random.fold_in(key, round_index)
        states, ladder, step_sizes, rates = _tuning_round(
            round_key,
            arrays,
            params,
            states,
            ladder,
            step_sizes,
            num_steps=num_steps * 2**round_index,
            **options,
        )
    return TunedLadder(ladder, step_sizes, rates, rates.sum(), states.position)


_STATIC = ("rest", "energy_fn", "num_local_steps", "is_path", "target_acceptance")


@functools.partial(jax.jit, static_argnames=_STATIC)
def _start_groups(
    arrays,
    params,
    positions,
    ladder,
    step_size,
    *,
    rest,
    energy_fn,
    num_local_steps,
    is_path,
    target_acceptance,
):
    del target_acceptance
    kernel = parallel_tempering(
        join_arrays(arrays, rest),
        inverse_temperatures=ladder,
        step_size=step_size,
        num_local_steps=num_local_steps,
        is_path=is_path,
    )
    return jax.vmap(lambda x: kernel.init(energy_fn, params, x))(positions)


@functools.partial(jax.jit, static_argnames=_STATIC)
def _tuning_round(
    key,
    arrays,
    params,
    states,
    ladder,
    step_size,
    num_steps,
    *,
    rest,
    energy_fn,
    num_local_steps,
    is_path,
    target_acceptance,
):
    num_groups = states.step.size
    inner = join_arrays(arrays, rest)

    def advance(t, carry):
        states, step_size, total = carry
        kernel = parallel_tempering(
            inner,
            inverse_temperatures=ladder,
            step_size=step_size,
            num_local_steps=num_local_steps,
            is_path=is_path,
        )
        keys = neighbouring_keys(jax.random.fold_in(key, t), jnp.arange(num_groups))
        states, info = jax.vmap(lambda key, state: kernel.step(key, energy_fn, params, state))(
            keys, states
        )
        if target_acceptance is not None:
            error = info.replica_acceptance_rate.mean(axis=0) - target_acceptance
            error = jnp.where(jnp.isnan(error), 0.0, error)
            # Settles down within the round, so that few groups do as well as many.
            step_size = step_size * jnp.exp(error / jnp.sqrt(1.0 + 0.2 * t))
        rejections = 1.0 - info.swap_acceptance_rate.mean(axis=0)
        return states, step_size, total + rejections

    zero = jnp.zeros(ladder.size - 1, ladder.dtype)
    states, step_size, total = jax.lax.fori_loop(0, num_steps, advance, (states, step_size, zero))
    rates = total / num_steps
    return states, equalised(ladder, rates), step_size, rates


def equalised(ladder: jax.Array, rejection_rates: jax.Array) -> jax.Array:
    """[R] the rungs between which Λ grows by equal shares.

    Between the old rungs Λ is linear in log β, as it is for Gaussians; in β where the first is 0.
    """
    # The floor keeps Λ strictly increasing, and so the rungs apart.
    rates = jnp.maximum(rejection_rates, 1e-3)
    barrier = jnp.concatenate([jnp.zeros(1, rates.dtype), jnp.cumsum(rates)])
    heights = jnp.linspace(0.0, 1.0, ladder.size, dtype=rates.dtype) * barrier[-1]
    is_positive = ladder[0] > 0.0
    log_ladder = jnp.log(jnp.where(is_positive, ladder, 1.0))
    inner = jnp.where(
        is_positive,
        jnp.exp(jnp.interp(heights, barrier, log_ladder)),
        jnp.interp(heights, barrier, ladder),
    )
    return inner.at[0].set(ladder[0]).at[-1].set(ladder[-1])

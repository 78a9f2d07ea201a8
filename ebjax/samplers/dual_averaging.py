"""Step size by dual averaging: acceptance is driven to its target.

After step t with acceptance a_t, for a target d,

    e_t = (1 - 1/(t + t0)) e_{t-1} + (d - a_t) / (t + t0)        mean error
    log h_t = m - sqrt(t) / g e_t                                the step size to try next
    log h̄_t = t^-k log h_t + (1 - t^-k) log h̄_{t-1}              the step size to keep

with g = 0.05, t0 = 10, k = 0.75, and m the log of a step size to shrink to, on the large side as
steps that are too large cost less to find out.

Hoffman and Gelman, "The no-U-turn sampler", JMLR 15 (2014), section 3.2.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

__all__ = [
    "DualAveragingState",
    "dual_averaging_final",
    "dual_averaging_init",
    "dual_averaging_update",
    "search_step_size",
]


class DualAveragingState(NamedTuple):
    """Where the recursion stands; every field is [] (or has the axes of a batch).

    Attributes:
      log_step_size: to use in the next step.
      log_average: to keep at the end.
      mean_error: e.
      num_updates: t.
      log_center: m.
    """

    log_step_size: jax.Array
    log_average: jax.Array
    mean_error: jax.Array
    num_updates: jax.Array
    log_center: jax.Array


def dual_averaging_init(
    step_size: jax.Array, *, overshoot: float | jax.Array = 10.0
) -> DualAveragingState:
    """Starts at ``step_size`` [] > 0; ``m = log(overshoot * step_size)``."""
    log_step_size = jnp.log(jnp.asarray(step_size))
    zero = jnp.zeros_like(log_step_size)
    log_center = (log_step_size + jnp.log(overshoot)).astype(log_step_size.dtype)
    return DualAveragingState(log_step_size, log_step_size, zero, zero, log_center)


def dual_averaging_update(
    state: DualAveragingState,
    acceptance: jax.Array,
    *,
    target: float | jax.Array,
    scale: float | jax.Array = 0.05,
    stabiliser: float | jax.Array = 10.0,
    decay: float | jax.Array = 0.75,
) -> DualAveragingState:
    """One step of the recursion.

    Args:
      state: of the recursion.
      acceptance: [] in [0, 1], of the step just taken with ``exp(state.log_step_size)``; NaN
        counts as 0.
      target: d, in (0, 1).
      scale: g; smaller moves faster.
      stabiliser: t0; damps the first steps.
      decay: k, in (0.5, 1]; how fast early step sizes are forgotten.

    Returns:
      The new state.
    """
    acceptance = jnp.where(jnp.isnan(acceptance), 0.0, acceptance)
    count = state.num_updates + 1.0
    weight = 1.0 / (count + stabiliser)
    mean_error = (1.0 - weight) * state.mean_error + weight * (target - acceptance)
    log_step_size = state.log_center - jnp.sqrt(count) / scale * mean_error
    weight = count**-decay
    log_average = weight * log_step_size + (1.0 - weight) * state.log_average
    new = DualAveragingState(log_step_size, log_average, mean_error, count, state.log_center)
    return jax.tree.map(lambda a, b: a.astype(b.dtype), new, state)


def dual_averaging_final(state: DualAveragingState) -> jax.Array:
    """[] the step size to keep."""
    return jnp.exp(state.log_average)


def search_step_size(
    acceptance_fn: Callable[[jax.Array, jax.Array], tuple[jax.Array, jax.Array]],
    initial: jax.Array,
    *,
    target: float | jax.Array,
    max_trials: int = 40,
) -> tuple[jax.Array, jax.Array]:
    """A step size to start from: doubled or halved until acceptance crosses the target.

    Args:
      acceptance_fn: ``(trial [] int32, step size []) -> (acceptance [], cost [])``.
      initial: [] > 0, the first step size tried.
      target: of the acceptance, in (0, 1).
      max_trials: at most so many; flat energies accept everything.

    Returns:
      ``(step size [], total cost [])``. The step size is between the last two that were tried.

    >>> accept = lambda trial, step_size: (jnp.exp(-step_size), jnp.array(1))
    >>> step_size, cost = search_step_size(accept, jnp.array(8.0), target=0.8)
    >>> bool(0.7 < jnp.exp(-step_size) < 0.9), int(cost)
    (True, 7)
    """
    initial = jnp.asarray(initial)
    cost_type = jax.eval_shape(acceptance_fn, jnp.int32(0), initial)[1].dtype

    def is_going(loop):
        trial, _, _, is_crossed, _ = loop
        return ~is_crossed & (trial < max_trials)

    def attempt(loop):
        trial, step_size, direction, _, total = loop
        acceptance, cost = acceptance_fn(trial, step_size)
        wanted = jnp.where(acceptance > target, 1, -1).astype(jnp.int32)
        is_crossed = (trial > 0) & (wanted != direction)
        # At the crossing half a step back, into the bracket.
        exponent = jnp.where(is_crossed, 0.5, 1.0) * wanted
        step_size = step_size * jnp.exp2(exponent).astype(step_size.dtype)
        return trial + 1, step_size, wanted, is_crossed, total + cost

    start = (jnp.int32(0), initial, jnp.int32(0), jnp.array(False), jnp.zeros((), cost_type))
    _, step_size, _, _, total = jax.lax.while_loop(is_going, attempt, start)
    return step_size, total

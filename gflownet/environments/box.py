"""Box: walk over the unit square by arcs of one radius δ, stop anywhere.

From the corner 0 the first action draws a point of the quarter disc of radius δ; the others move by
exactly δ at an angle in [0, π/2] that stays in the square. A value is (ρ, u): a move by

    δ √ρ (cos(π u / 2), sin(π u / 2))

so that ρ is the share of the disc's area inside of the radius, and the first action has the
constant Jacobian δ² π / 4; ρ = 1 on arcs, of length δ π / 2 per unit of u. At x, u in [A, B] with

    A = (2/π) acos((1 - x_1) / δ) where x_1 > 1 - δ, or 0
    B = (2/π) asin((1 - x_2) / δ) where x_2 > 1 - δ, or 1

forwards, and the mirror image backwards. Within δ of the corner 1 there is nothing but the stop;
within δ of the corner 0 nothing but the source came before, for an arc never ends there.

Lahlou et al., "A theory of continuous generative flow networks", ICML 2023 (who draw √ρ).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from ebjax.types import Target
from gflownet.environments.bounded_targets import steps_target
from gflownet.types import Chart, ChartedObservation, Environment

__all__ = ["BoxState", "box"]

LEAVE, ARC, STOP = range(3)
_QUARTER = 0.5 * math.pi
# Kept from both ends of ρ, so that rounding moves no position across the borders of the disc.
_MARGIN = 1e-6


class BoxState(NamedTuple):
    """``position`` [2], ``left`` [] bool (the source) and ``stopped`` [] bool."""

    position: jax.Array
    left: jax.Array
    stopped: jax.Array


def box(target: Target | None = None, *, radius: float = 0.25) -> Environment:
    """Builds the environment.

    Args:
      target: a density on [0, 1]², ``steps_target(2)`` by default.
      radius: δ in (0, 1/2].

    Returns:
      An ``Environment`` with 3 actions (leave the source, arc, stop) and values in R².

    Raises:
      ValueError: naming the argument that is out of range.

    >>> box().max_length
    10
    """
    target = steps_target(2) if target is None else target
    if target.event_shape != (2,):
        raise ValueError(f"target has the shape {target.event_shape}; a box has (2,).")
    if not 0.0 < radius <= 0.5:
        raise ValueError(f"radius is {radius}; it must lie between 0 and 0.5.")

    def move(action):
        distance, angle = radius * jnp.sqrt(action.value[0]), _QUARTER * action.value[1]
        return distance * jnp.stack([jnp.cos(angle), jnp.sin(angle)])

    def initial(key):
        del key
        return BoxState(jnp.zeros(2), jnp.zeros((), bool), jnp.zeros((), bool))

    def step(state, action):
        is_stop = action.which == STOP
        position = jnp.where(is_stop, state.position, jnp.clip(state.position + move(action), 0, 1))
        return BoxState(position, jnp.ones((), bool), state.stopped | is_stop)

    def undo(state, action):
        is_stop, is_leave = action.which == STOP, action.which == LEAVE
        back = jnp.where(is_leave, 0.0, jnp.clip(state.position - move(action), 0, 1))
        position = jnp.where(is_stop, state.position, back)
        return BoxState(position, ~is_leave, state.stopped & ~is_stop)

    def is_far(x):
        return jnp.sum(jnp.square(x)) > radius**2

    def forward_mask(state):
        inside = state.left & ~state.stopped
        can_arc = inside & is_far(1.0 - state.position)
        return jnp.stack([~state.left, can_arc, inside])

    def backward_mask(state):
        inside = state.left & ~state.stopped
        far = is_far(state.position)
        return jnp.stack([inside & ~far, inside & far, state.stopped])

    def arcs(room):
        """[2] low and width of u where ``room`` [2] is left in each direction."""
        cosine, sine = jnp.clip(room / radius, 0.0, 1.0)
        low, high = jnp.arccos(cosine) / _QUARTER, jnp.arcsin(sine) / _QUARTER
        return low, jnp.maximum(high - low, 1e-6)

    def chart(leave_low, leave_width, leave_scale, room):
        low, width = arcs(room)
        zero, one = jnp.zeros_like(low), jnp.ones_like(low)
        return Chart(
            low=jnp.stack([leave_low, jnp.stack([one, low]), jnp.zeros(2)]),
            width=jnp.stack([leave_width, jnp.stack([zero, width]), jnp.zeros(2)]),
            log_scale=jnp.asarray([leave_scale, math.log(radius * _QUARTER), 0.0]),
        )

    def observe(state):
        x = state.position
        area = jnp.sum(jnp.square(x)) / radius**2
        leave_low, leave_width = jnp.array([_MARGIN, 0.0]), jnp.array([1.0 - 2.0 * _MARGIN, 1.0])
        origin = jnp.stack([area, jnp.arctan2(x[1], x[0]) / _QUARTER])
        return ChartedObservation(
            features=jnp.append(x, state.left),
            forward=chart(leave_low, leave_width, math.log(0.5 * radius**2 * _QUARTER), 1.0 - x),
            backward=chart(origin, jnp.zeros(2), 0.0, x),
        )

    return Environment(
        initial=initial,
        step=step,
        undo=undo,
        forward_mask=forward_mask,
        backward_mask=backward_mask,
        observe=observe,
        num_actions=3,
        # Each arc adds at least δ to the sum of the coordinates, which ends below 2.
        max_length=2 + math.floor(2.0 / radius + 1e-6),
        log_reward=lambda params, state: -target.energy(params, state.position),
        stop_action=STOP,
        log_z=target.log_z,
        value_dim=2,
    )

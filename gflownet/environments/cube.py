"""Cube: grow all coordinates of the unit cube together, by at least m each time, stop anywhere.

The first action draws the position itself; later ones add d_k in [m, 1 - x_k] to every coordinate:

    forwards     d = m + r (1 - x - m)      from x
    backwards    d = m + r (x' - m)         from x' = x + d

with r in [0, 1]. From a state in which some coordinate is above 1 - m there is nothing but the
stop; one in which some coordinate is below m came from the source. Elsewhere there is a choice, of
one more increment or the stop, and of an increment or the source. Coordinates that are not
``active`` stay 0 and have no part in any of this: a stack may switch them off.

Mila AI4Science et al., "Crystal-GFN: sampling crystals with desirable properties and constraints",
2023 (lattice parameters).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from ebjax.types import Target
from gflownet.environments.bounded_targets import steps_target
from gflownet.types import Chart, ChartedObservation, Environment

__all__ = ["CubeState", "cube"]

LEAVE, GROW, STOP = range(3)


class CubeState(NamedTuple):
    """``position`` [D], ``active`` [D] bool, ``left`` [] bool (the source), ``stopped`` [] bool."""

    position: jax.Array
    active: jax.Array
    left: jax.Array
    stopped: jax.Array


def cube(target: Target | None = None, *, min_increment: float = 0.1) -> Environment:
    """Builds the environment.

    Args:
      target: a density on [0, 1]^D, ``steps_target(2)`` by default. It sees 0 where a coordinate is
        not active.
      min_increment: m in (0, 1).

    Returns:
      An ``Environment`` with 3 actions (leave the source, grow, stop) and values in R^D. All
      coordinates are active at its source.

    Raises:
      ValueError: naming the argument that is out of range.

    >>> cube().max_length
    12
    """
    target = steps_target(2) if target is None else target
    if len(target.event_shape) != 1:
        raise ValueError(f"target has the shape {target.event_shape}; a cube has (D,).")
    if not 0.0 < min_increment < 1.0:
        raise ValueError(f"min_increment is {min_increment}; it must lie between 0 and 1.")
    (dim,) = target.event_shape

    def initial(key):
        del key
        none = jnp.zeros((), bool)
        return CubeState(jnp.zeros(dim), jnp.ones(dim, bool), none, none)

    def step(state, action):
        is_stop = action.which == STOP
        moved = jnp.clip(state.position + jnp.where(state.active, action.value, 0.0), 0.0, 1.0)
        return state._replace(
            position=jnp.where(is_stop, state.position, moved),
            left=jnp.ones((), bool),
            stopped=state.stopped | is_stop,
        )

    def undo(state, action):
        is_stop, is_leave = action.which == STOP, action.which == LEAVE
        back = jnp.where(state.active & ~is_leave, state.position - action.value, 0.0)
        return state._replace(
            position=jnp.where(is_stop, state.position, jnp.clip(back, 0.0, 1.0)),
            left=~is_leave,
            stopped=state.stopped & ~is_stop,
        )

    def has_room(state, room):
        """Whether all active coordinates, of which there are some, can change by m."""
        return (~state.active | (room >= min_increment)).all() & state.active.any()

    def forward_mask(state):
        inside = state.left & ~state.stopped
        can_grow = inside & has_room(state, 1.0 - state.position)
        return jnp.stack([~state.left, can_grow, inside])

    def backward_mask(state):
        inside = state.left & ~state.stopped
        return jnp.stack([inside, inside & has_room(state, state.position), state.stopped])

    def chart(state, leave_low, leave_width, room):
        width = jnp.maximum(room - min_increment, 1e-6)
        nothing = jnp.zeros(dim)
        return Chart(
            low=jnp.where(
                state.active,
                jnp.stack([leave_low, jnp.full(dim, min_increment), nothing]),
                0.0,
            ),
            width=jnp.where(state.active, jnp.stack([leave_width, width, nothing]), 0.0),
            log_scale=jnp.zeros(3),
        )

    def observe(state):
        x, zeros = state.position, jnp.zeros(dim)
        return ChartedObservation(
            features=jnp.concatenate([x, state.active, state.left[None]], dtype=x.dtype),
            forward=chart(state, zeros, jnp.ones(dim), 1.0 - x),
            backward=chart(state, x, zeros, x),
        )

    return Environment(
        initial=initial,
        step=step,
        undo=undo,
        forward_mask=forward_mask,
        backward_mask=backward_mask,
        observe=observe,
        num_actions=3,
        max_length=2 + math.floor(1.0 / min_increment + 1e-6),
        log_reward=lambda params, state: -target.energy(params, state.position),
        stop_action=STOP,
        log_z=target.log_z,
        value_dim=dim,
    )

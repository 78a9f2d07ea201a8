"""Torus: a fixed number of turns of D angles, all of them together.

A value is the turn of each angle in [0, 2π); the step index is a part of the state, and the state
after the last step is terminal. The source has all angles 0, so that undoing the first step has
probability 1.

Lahlou et al., "A theory of continuous generative flow networks", ICML 2023 (molecular torsions).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from ebjax.types import Target
from gflownet.environments.bounded_targets import torus_target
from gflownet.types import Chart, ChartedObservation, Environment

__all__ = ["TorusState", "torus"]

LEAVE, TURN = range(2)
_TURN = 2.0 * math.pi


class TorusState(NamedTuple):
    """``position`` [D] angles in [0, 2π) and ``num_turns`` [] int32."""

    position: jax.Array
    num_turns: jax.Array


def torus(target: Target | None = None, *, num_steps: int = 5) -> Environment:
    """Builds the environment.

    Args:
      target: a density of D angles, ``torus_target(2)`` by default.
      num_steps: T, at least 1.

    Returns:
      An ``Environment`` with 2 actions (the first step, the others) and values in R^D, for
      policies of the family ``"von_mises"``.

    Raises:
      ValueError: naming the argument that is out of range.
    """
    target = torus_target(2) if target is None else target
    if len(target.event_shape) != 1:
        raise ValueError(f"target has the shape {target.event_shape}; a torus has (D,).")
    if num_steps < 1:
        raise ValueError(f"num_steps is {num_steps}; it must be at least 1.")
    (dim,) = target.event_shape

    def step(state, action):
        return TorusState(jnp.mod(state.position + action.value, _TURN), state.num_turns + 1)

    def undo(state, action):
        back = jnp.mod(state.position - action.value, _TURN)
        position = jnp.where(action.which == LEAVE, 0.0, back)
        return TorusState(position, jnp.maximum(state.num_turns - 1, 0))

    def forward_mask(state):
        is_source = state.num_turns == 0
        return jnp.stack([is_source, ~is_source & (state.num_turns < num_steps)])

    def backward_mask(state):
        return jnp.stack([state.num_turns == 1, state.num_turns > 1])

    def observe(state):
        x, everything = state.position, jnp.full((2, dim), _TURN)
        zeros = jnp.zeros((2, dim))
        return ChartedObservation(
            features=jnp.concatenate(
                [jnp.sin(x), jnp.cos(x), jax.nn.one_hot(state.num_turns, num_steps + 1)]
            ),
            forward=Chart(zeros, everything, jnp.zeros(2)),
            backward=Chart(zeros.at[LEAVE].set(x), everything.at[LEAVE].set(0.0), jnp.zeros(2)),
        )

    return Environment(
        initial=lambda key: TorusState(jnp.zeros(dim), jnp.zeros((), jnp.int32)),
        step=step,
        undo=undo,
        forward_mask=forward_mask,
        backward_mask=backward_mask,
        observe=observe,
        num_actions=2,
        max_length=num_steps,
        log_reward=lambda params, state: -target.energy(params, state.position),
        log_z=target.log_z,
        value_dim=dim,
    )

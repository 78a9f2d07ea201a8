"""Hypergrid: walk from the corner of a D-dimensional grid of side H, stop anywhere.

    R(x) = R0 + R1 Π_d 1[1/4 < a_d] + R2 Π_d 1[3/10 < a_d < 4/10],    a_d = |x_d / (H-1) - 1/2|

Actions 0 to D-1 add 1 to a coordinate below H-1, action D stops; every cell is terminal. The
indicators are tables made with integers, since cells may lie exactly on an edge (with floats, H =
16 and H = 21 put cells on the wrong side). In closed form

    Z = R0 H^D + R1 n_outer^D + R2 n_ring^D

with n the number of coordinates for which each indicator holds.

Bengio et al., "Flow network based generative models for non-iterative diverse candidate
generation", NeurIPS 2021.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gflownet.types import Environment

__all__ = ["HypergridState", "hypergrid"]

_MAX_ENTRIES = 1_000_000


class HypergridState(NamedTuple):
    """``position`` [D] int32 and ``stopped`` [] bool."""

    position: jax.Array
    stopped: jax.Array


def reward_tables(side: int) -> tuple[np.ndarray, np.ndarray]:
    """[H] bool: whether a coordinate lies in the outer region, and in the ring."""
    # a = d / (2 (H - 1)) with the integer d = |2 x - (H - 1)|
    distance = np.abs(2 * np.arange(side) - (side - 1))
    outer = 2 * distance > side - 1
    ring = (6 * (side - 1) < 10 * distance) & (10 * distance < 8 * (side - 1))
    return outer, ring


def hypergrid(
    *,
    dim: int = 2,
    side: int = 8,
    reward_floor: float = 1e-3,
    reward_outer: float = 0.5,
    reward_ring: float = 2.0,
    max_enumerated: int = 1_000_000,
) -> Environment:
    """Builds the environment.

    Args:
      dim: D, at least 1.
      side: H, at least 2.
      reward_floor: R0 > 0, the reward everywhere.
      reward_outer: R1 >= 0, added where all coordinates are far from the middle.
      reward_ring: R2 >= 0, added in the 2^D modes.
      max_enumerated: ``enumerate`` is offered up to this number of states (2 H^D).

    Returns:
      An ``Environment`` with D + 1 actions, whose observation is the one-hot position [D * H].

    Raises:
      ValueError: naming the argument that is out of range.

    >>> round(hypergrid(dim=2, side=8).log_z, 6)
    2.776581
    """
    if dim < 1:
        raise ValueError(f"dim is {dim}; a grid has at least 1 dimension.")
    if side < 2:
        raise ValueError(f"side is {side}; a grid has at least 2 cells along a side.")
    if not reward_floor > 0:
        raise ValueError(f"reward_floor is {reward_floor}; it must be positive.")
    if reward_outer < 0 or reward_ring < 0:
        raise ValueError(
            f"reward_outer is {reward_outer} and reward_ring {reward_ring}; "
            "neither may be negative."
        )
    if dim * side > _MAX_ENTRIES:
        raise ValueError(
            f"dim is {dim} and side {side}; their product, the length of an observation, may be at "
            f"most {_MAX_ENTRIES}."
        )
    outer, ring = reward_tables(side)
    # In logarithms: H^D itself is beyond a float for D of some hundreds.
    log_terms = [
        math.log(reward) + dim * math.log(count)
        for reward, count in (
            (reward_floor, side),
            (reward_outer, int(outer.sum())),
            (reward_ring, int(ring.sum())),
        )
        if reward and count
    ]
    log_z = float(np.logaddexp.reduce(log_terms))
    stop = dim
    weights = side ** np.arange(dim)

    def initial(key):
        del key
        return HypergridState(jnp.zeros(dim, jnp.int32), jnp.zeros((), bool))

    def move(state, action, amount):
        shift = jnp.where(jnp.arange(dim) == action, amount, 0).astype(jnp.int32)
        return jnp.clip(state.position + shift, 0, side - 1)

    def step(state, action):
        return HypergridState(move(state, action, 1), state.stopped | (action == stop))

    def undo(state, action):
        return HypergridState(move(state, action, -1), state.stopped & (action != stop))

    def forward_mask(state):
        allowed = jnp.append(state.position < side - 1, True)
        return allowed & ~state.stopped

    def backward_mask(state):
        return jnp.append((state.position > 0) & ~state.stopped, state.stopped)

    def observe(state):
        return jax.nn.one_hot(state.position, side).reshape(-1)

    def log_reward(params, state):
        del params
        in_outer = jnp.asarray(outer)[state.position].all()
        in_ring = jnp.asarray(ring)[state.position].all()
        return jnp.log(reward_floor + reward_outer * in_outer + reward_ring * in_ring)

    def enumerate_states():
        cells = np.arange(side**dim)
        position = (cells[:, None] // weights % side).astype(np.int32)
        return HypergridState(
            position=np.concatenate([position, position]),
            stopped=np.repeat([False, True], side**dim),
        )

    def state_index(state):
        cell = jnp.sum(state.position * jnp.asarray(weights, jnp.int32), dtype=jnp.int32)
        return cell + jnp.where(state.stopped, side**dim, 0).astype(jnp.int32)

    is_small = 2 * side**dim <= max_enumerated
    return Environment(
        initial=initial,
        step=step,
        undo=undo,
        forward_mask=forward_mask,
        backward_mask=backward_mask,
        observe=observe,
        num_actions=dim + 1,
        max_length=dim * (side - 1) + 1,
        log_reward=log_reward,
        stop_action=stop,
        enumerate=enumerate_states if is_small else None,
        state_index=state_index if is_small else None,
        log_z=log_z,
    )

"""The loop behind rollouts: a batch of trajectories, one a lane, until the last has ended.

A ``while_loop`` over time steps of the whole batch stops as soon as all are done, so its cost
follows the longest trajectory of the batch and not the longest that there could be. An accelerator,
on which a step that nobody needs costs less than the question, asks every few steps.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from ebjax.parallel import on_accelerator
from ebjax.types import PyTree
from gflownet.distributions import MaskedCategorical
from gflownet.types import Environment, Memory, State

__all__ = ["Buffers", "Noise", "Step", "draw", "roll", "select"]


# On a CPU, once half of the lanes have nothing left to do, the others go on in a program of half
# the width. Each width is compiled by itself, which pays where some trajectories can be much longer
# than most.
MIN_LANES = 4
MAX_PHASES = 3
MIN_LENGTH = 32
# Outputs of layers that are kept are at most so many bytes, or else none are.
MAX_MEMORY_BYTES = 2**28
# On an accelerator, steps between two questions whether any lane goes on.
STEPS_A_LOOK = 16


class Step(NamedTuple):
    """What one trajectory does at one time step.

    Attributes:
      moves: [] bool, whether it takes an action.
      state: the next state.
      action: [] int32, or an ``Action``.
      here: [] log-probability of the action.
      last: [] log-probability of the action before, in the other direction.
      is_choice: [] bool, whether one of the two was one of several possible.
      log_flow: [] of the state that the step starts from, or ``None``.
      outputs: of the policy's layers there, as far as they are kept.
    """

    moves: jax.Array
    state: State
    action: PyTree
    here: jax.Array
    last: jax.Array
    is_choice: jax.Array
    log_flow: jax.Array | None
    outputs: tuple[jax.Array, ...] = ()


class Buffers(NamedTuple):
    """What a rollout writes, one row a time step; the fewer arrays, the less a step costs.

    Attributes:
      states: [T, B, ...] that the steps start from.
      actions: [T, B].
      flags: [T, B, 2] bool, whether the trajectory moves, and whether there was a choice.
      log_probs: [T, B, 2] of the action here, and of the one before in the other direction.
      log_flow: [T, B] or ``None``.
    """

    states: State
    actions: PyTree
    flags: jax.Array
    log_probs: jax.Array
    log_flow: jax.Array | None


class _Lanes(NamedTuple):
    """Trajectories on their way, one a lane.

    Attributes:
      trajectory: [B] which trajectory of the batch it is.
      state: [B, ...].
      action: [B] the last action.
      moved: [B] bool, whether there was a last action.
      goes_on: [B] bool, whether the next evaluation matters.
    """

    trajectory: jax.Array
    state: State
    action: PyTree
    moved: jax.Array
    goes_on: jax.Array


class Noise(NamedTuple):
    """What the action of a step is drawn from.

    Numbers are drawn for all steps at once: on a CPU a draw is a loop of many small kernels,
    whatever its size. Where nothing reads the one or the other, it is not computed.

    Attributes:
      key: for laws that need one.
      uniform: in [0, 1), what ``jax.random.uniform(key)`` gives, for actions by number.
    """

    key: jax.Array
    uniform: jax.Array


def draw(law, noise: Noise) -> PyTree:
    """An action of a law, from the noise of one trajectory at one step."""
    is_by_number = isinstance(law, MaskedCategorical)
    return law.invert(noise.uniform) if is_by_number else law.sample(noise.key)


def _write(buffers: PyTree, rows: PyTree, t: jax.Array) -> PyTree:
    """``rows`` [n, ...] at the rows from ``t`` on."""
    return jax.tree.map(
        lambda buffer, value: jax.lax.dynamic_update_slice_in_dim(
            buffer, value.astype(buffer.dtype), t, axis=0
        ),
        buffers,
        rows,
    )


def _draw_ahead(keys: jax.Array, num_steps: int) -> Noise:
    """[T, B] of all steps."""
    step_keys = jax.vmap(lambda key: jax.random.split(key, num_steps), out_axes=1)(keys)
    return Noise(step_keys, jax.vmap(jax.vmap(jax.random.uniform))(step_keys))


def _empty_buffers(environment: Environment, start: State, shape, log_flow) -> Buffers:
    """Zeros for ``shape`` = (T, B), with states as ``start`` and flows as ``log_flow``."""
    return Buffers(
        states=jax.tree.map(lambda leaf: jnp.zeros((shape[0], *leaf.shape), leaf.dtype), start),
        actions=environment.action(jnp.zeros(shape, jnp.int32)),
        flags=jnp.zeros((*shape, 2), bool),
        log_probs=jnp.zeros((*shape, 2)),
        log_flow=None if log_flow is None else jnp.zeros(shape, log_flow.dtype),
    )


def roll(keys, environment: Environment, start, transition, at_end=None):
    """Repeats ``transition`` over the batch until no trajectory moves.

    Args:
      keys: [B].
      environment: for its length.
      start: [B, ...] states.
      transition: ``(noise, state, last action, is first step) -> Step`` for one trajectory.
      at_end: the same of the last states, whose ``last``, ``is_choice`` and what else it gives
        belong to the row after the last step; ``None`` where nothing is asked of them.

    Returns:
      ``(final states, buffers, memory)``; row t of the buffers belongs to step t.
    """
    length, batch_size = environment.max_length, keys.shape[0]
    noise = _draw_ahead(keys, length + 1)
    num_looks = -(-(length + 1) // STEPS_A_LOOK) if on_accelerator() else length + 1
    steps_a_look = -(-(length + 1) // num_looks)
    rows = num_looks * steps_a_look  # the last may be of no step

    def take_step(noise, lanes, is_first, transition=transition):
        return jax.vmap(transition, (0, 0, 0, None))(noise, lanes.state, lanes.action, is_first)

    lanes = _Lanes(
        trajectory=jnp.arange(batch_size),
        state=start,
        action=environment.action(jnp.zeros(batch_size, jnp.int32)),
        moved=jnp.zeros(batch_size, bool),
        goes_on=jnp.ones(batch_size, bool),
    )
    first = jax.tree.map(lambda leaf: leaf[0], noise)
    shapes = jax.eval_shape(take_step, first, lanes, jnp.asarray(True))
    outputs = _room_for_outputs(shapes.outputs, rows + 1)
    buffers = _empty_buffers(environment, start, (rows, batch_size), shapes.log_flow)

    def advance(noise, first_row, loop):
        t, lanes, buffers, outputs = loop
        own = jax.tree.map(lambda leaf: leaf[jnp.minimum(t, length), : len(lanes.moved)], noise)
        step = take_step(own, lanes, t == 0)
        moves = step.moves
        row = Buffers(
            states=lanes.state,
            actions=step.action,
            flags=jnp.stack([moves, step.is_choice & (moves | lanes.moved)], axis=-1),
            log_probs=jnp.where(
                jnp.stack([moves, lanes.moved], axis=-1),
                jnp.stack([step.here, step.last], axis=-1),
                0.0,
            ),
            log_flow=step.log_flow,
        )
        buffers = _write(buffers, jax.tree.map(lambda leaf: leaf[None], row), t)
        # As many rows a step as there are lanes.
        outputs = _write(outputs, step.outputs[: len(outputs)], first_row + t * len(moves))
        states = select(moves, step.state, lanes.state)
        goes_on = moves if at_end is not None else moves & jax.vmap(can_move)(states)
        lanes = _Lanes(lanes.trajectory, states, step.action, moves, goes_on)
        return t + 1, lanes, buffers, outputs

    def can_move(state):
        return environment.forward_mask(state).any()

    t = num_rows = jnp.zeros((), jnp.int32)
    row = jnp.zeros((rows, batch_size), jnp.int32)  # of the outputs at a state
    sizes = _lane_counts(environment, batch_size)
    for size, next_size in zip(sizes, [*sizes[1:], 0], strict=True):
        # The lanes that go on come first; the others wait outside of the loop.
        if size < batch_size:
            order = jnp.argsort(~lanes.goes_on, stable=True)
            lanes = _take(lanes, order, axis=0)
            noise, buffers, row = _take((noise, buffers, row), order, axis=1)
        working, waiting = (
            _take(lanes, slice(size), axis=0),
            _take(lanes, slice(size, None), axis=0),
        )

        def has_work(loop, next_size=next_size):
            t, lanes, *_ = loop
            return (lanes.goes_on.sum() > next_size) & (t < length)

        first_row = num_rows - t * size

        def take_steps(loop, noise=noise, first_row=first_row):
            step = functools.partial(advance, noise, first_row)
            if steps_a_look == 1:
                return step(loop)
            return jax.lax.fori_loop(0, steps_a_look, lambda _, loop: step(loop), loop)

        loop = (t, working, buffers, outputs)
        end, working, buffers, outputs = jax.lax.while_loop(has_work, take_steps, loop)
        steps, lane = jnp.arange(rows)[:, None], jnp.arange(batch_size)
        is_new = (t <= steps) & (steps < end) & (lane < size)
        row = jnp.where(is_new, first_row + steps * size + lane, row)
        t, num_rows = end, num_rows + (end - t) * size
        lanes = jax.tree.map(lambda *parts: jnp.concatenate(parts), working, waiting)
    if len(sizes) > 1:
        back = jnp.argsort(lanes.trajectory)
        lanes = _take(lanes, back, axis=0)
        buffers, row = _take((buffers, row), back, axis=1)
    if at_end is not None:
        step_of = functools.partial(take_step, first, transition=at_end)
        buffers, outputs, row = _write_ends(step_of, lanes, buffers, outputs, row, num_rows)
    buffers, row = _take((buffers, row), slice(length + 1), axis=0)
    return lanes.state, buffers, Memory(outputs, row) if outputs else None


def _write_ends(step_of, lanes: _Lanes, buffers: Buffers, outputs, row, num_rows):
    """``(buffers, outputs, row)`` with what ``step_of(lanes, False)`` says of the last states.

    It stands in the row after the last step of each trajectory.
    """
    trajectory, end = lanes.trajectory, buffers.flags[..., 0].sum(axis=0)
    last_step = jnp.maximum(end - 1, 0), trajectory
    actions = jax.tree.map(lambda leaf: leaf[last_step], buffers.actions)
    step = step_of(lanes._replace(action=actions), jnp.asarray(False))
    moved, last = end > 0, step.last.astype(buffers.log_probs.dtype)
    at = end, trajectory
    buffers = buffers._replace(
        flags=buffers.flags.at[(*at, 1)].set(moved & step.is_choice),
        log_probs=buffers.log_probs.at[(*at, 1)].set(jnp.where(moved, last, 0.0)),
    )
    if buffers.log_flow is not None and step.log_flow is not None:
        buffers = buffers._replace(log_flow=buffers.log_flow.at[at].set(step.log_flow))
    if step.outputs:
        outputs = _write(outputs, step.outputs[: len(outputs)], num_rows)
        row = row.at[at].set(num_rows + trajectory)
    return buffers, outputs, row


def _take(tree: PyTree, index, *, axis: int) -> PyTree:
    return jax.tree.map(lambda leaf: leaf[(slice(None),) * axis + (index,)], tree)


def _room_for_outputs(outputs: PyTree, rows: int) -> tuple[jax.Array, ...]:
    """Zeros for ``rows`` times the outputs of all lanes, or none where that is too much."""
    size = rows * sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in outputs)
    if size > MAX_MEMORY_BYTES:
        return ()
    return tuple(jnp.zeros((rows * leaf.shape[0], *leaf.shape[1:]), leaf.dtype) for leaf in outputs)


def _lane_counts(environment: Environment, batch_size: int) -> list[int]:
    """How many trajectories are evaluated together: fewer once most have ended."""
    sizes = [batch_size]
    varies = environment.stop_action is not None and environment.max_length >= MIN_LENGTH
    if on_accelerator() or not varies:
        return sizes
    while sizes[-1] >= 2 * MIN_LANES and len(sizes) < MAX_PHASES:
        sizes.append(sizes[-1] // 2)
    return sizes


def select(mask: jax.Array, new: PyTree, old: PyTree) -> PyTree:
    """``new`` where ``mask`` holds, over its leading axes."""
    return jax.tree.map(
        lambda a, b: jnp.where(mask.reshape(mask.shape + (1,) * (a.ndim - mask.ndim)), a, b),
        new,
        old,
    )

"""Rollouts that end when the last trajectory does.

Sampling runs a ``while_loop`` over time steps of the whole batch. It stops as soon as all are done,
so its cost follows the longest trajectory of the batch and not the longest that there could be. An
accelerator, on which a step that nobody needs costs less than the question, asks every few steps.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from ebjax.parallel import on_accelerator
from ebjax.types import Params, PyTree
from gflownet.distributions import MaskedCategorical, is_uniform
from gflownet.policies.remembering import remembered
from gflownet.types import Environment, Memory, Policy, State, Trajectories

__all__ = ["backward_rollout", "forward_rollout"]


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


class _Step(NamedTuple):
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


class _Buffers(NamedTuple):
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


class _Noise(NamedTuple):
    """What the action of a step is drawn from.

    Numbers are drawn for all steps at once: on a CPU a draw is a loop of some eighty small kernels,
    whatever its size. Where nothing reads the one or the other, it is not computed.

    Attributes:
      key: for laws that need one.
      uniform: in [0, 1), what ``jax.random.uniform(key)`` gives, for actions by number.
    """

    key: jax.Array
    uniform: jax.Array


def _draw(law, noise: _Noise) -> PyTree:
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


def _roll(keys, environment: Environment, start, transition, at_end=None):
    """Repeats ``transition`` over the batch until no trajectory moves.

    Args:
      keys: [B].
      environment: for its length.
      start: [B, ...] states.
      transition: ``(noise, state, last action, is first step) -> _Step`` for one trajectory.
      at_end: the same of the last states, whose ``last``, ``is_choice`` and what else it gives
        belong to the row after the last step; ``None`` where nothing is asked of them.

    Returns:
      ``(final states, buffers, memory)``; row t of the buffers belongs to step t.
    """
    length, batch_size = environment.max_length, keys.shape[0]
    step_keys = jax.vmap(lambda key: jax.random.split(key, length + 1), out_axes=1)(keys)
    noise = _Noise(step_keys, jax.vmap(jax.vmap(jax.random.uniform))(step_keys))
    num_looks = -(-(length + 1) // STEPS_A_LOOK) if on_accelerator() else length + 1
    steps_a_look = -(-(length + 1) // num_looks)
    rows = num_looks * steps_a_look  # the last may be of no step
    shape = (rows, batch_size)

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
    flow = shapes.log_flow
    outputs = _room_for_outputs(shapes.outputs, rows + 1)
    buffers = _Buffers(
        states=jax.tree.map(lambda leaf: jnp.zeros((rows, *leaf.shape), leaf.dtype), start),
        actions=environment.action(jnp.zeros(shape, jnp.int32)),
        flags=jnp.zeros((*shape, 2), bool),
        log_probs=jnp.zeros((*shape, 2)),
        log_flow=None if flow is None else jnp.zeros(shape, flow.dtype),
    )

    def advance(noise, first_row, loop):
        t, lanes, buffers, outputs = loop
        own = jax.tree.map(lambda leaf: leaf[jnp.minimum(t, length), : len(lanes.moved)], noise)
        step = take_step(own, lanes, t == 0)
        moves = step.moves
        row = _Buffers(
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
        states = _select(moves, step.state, lanes.state)
        goes_on = moves if at_end is not None else moves & jax.vmap(can_move)(states)
        lanes = _Lanes(lanes.trajectory, states, step.action, moves, goes_on)
        return t + 1, lanes, buffers, outputs

    def can_move(state):
        return environment.forward_mask(state).any()

    t = num_rows = jnp.zeros((), jnp.int32)
    row = jnp.zeros(shape, jnp.int32)  # of the outputs at a state
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


def _write_ends(step_of, lanes: _Lanes, buffers: _Buffers, outputs, row, num_rows):
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


def _where_left(log_flow: jax.Array | None, is_left: jax.Array) -> jax.Array | None:
    return None if log_flow is None else jnp.where(is_left, log_flow, 0.0)


def _select(mask: jax.Array, new: PyTree, old: PyTree) -> PyTree:
    """``new`` where ``mask`` holds, over its leading axes."""
    return jax.tree.map(
        lambda a, b: jnp.where(mask.reshape(mask.shape + (1,) * (a.ndim - mask.ndim)), a, b),
        new,
        old,
    )


def forward_rollout(
    keys: jax.Array,
    environment: Environment,
    policy: Policy,
    params: Params,
    *,
    epsilon: jax.Array | float = 0.0,
    reward_params: Params = (),
    start: State | None = None,
    remember: bool = False,
) -> Trajectories:
    """Samples trajectories from the source by P_F, mixed with uniform exploration.

    Args:
      keys: [B] one key a trajectory.
      environment: the graph.
      policy: P_F and P_B.
      params: the policy's parameters.
      epsilon: [] share of uniform exploration in what is drawn; log-probabilities are always those
        of the policy itself.
      reward_params: the first argument of ``environment.log_reward``.
      start: [B, ...] sources, drawn from ``keys`` by default.
      remember: whether to keep what the policy's layers put out (``Trajectories.memory``), for a
        policy of which that can be kept.

    Returns:
      ``Trajectories``, no part of which carries gradient.
    """
    if start is None:
        start = jax.vmap(environment.initial)(keys)
    params, reward_params = jax.lax.stop_gradient((params, reward_params))

    def transition(noise, state, last_action, is_first, *, is_end=False):
        forward_mask = environment.forward_mask(state)
        inputs = (environment.observe(state), forward_mask, environment.backward_mask(state))
        outputs: tuple[jax.Array, ...] = ()
        if remember:
            output, outputs = remembered(policy.apply, params, *inputs)
        else:
            output = policy.apply(params, *inputs)
        moves = forward_mask.any()
        action = _select(
            moves, _draw(output.forward.explore(epsilon), noise), environment.action(0)
        )
        is_choice = (moves & ~output.forward.is_certain()) | (
            ~is_first & ~output.backward.is_certain()
        )
        return _Step(
            moves,
            environment.step(state, action),
            action,
            output.forward.log_prob(action),
            output.backward.log_prob(last_action),
            is_choice,
            None if is_end else output.log_flow,
            () if is_end and is_uniform(output.backward) else outputs,
        )

    # P_B of the last step is told by the state after it, unless it undoes a stop: then it is 1.
    at_end = functools.partial(transition, is_end=True)
    final, buffers, memory = _roll(
        keys,
        environment,
        start,
        transition,
        at_end if environment.stop_action is None else None,
    )
    # The loop may end before it would write the last state of the longest trajectories.
    valid, is_choice = buffers.flags[..., 0], buffers.flags[..., 1]
    length, trajectory = valid.sum(axis=0), jnp.arange(keys.shape[0])
    states = jax.tree.map(
        lambda leaf, end: leaf.at[length, trajectory].set(end), buffers.states, final
    )
    trajectories = Trajectories(
        states=states,
        actions=jax.tree.map(lambda leaf: leaf[:-1], buffers.actions),
        valid=valid[:-1],
        is_choice=is_choice,
        log_pf=buffers.log_probs[:-1, :, 0],
        log_pb=buffers.log_probs[1:, :, 1],
        terminal=final,
        log_reward=jax.vmap(environment.log_reward, (None, 0))(reward_params, final),
        log_flow=_where_left(buffers.log_flow, valid),
        memory=memory,
    )
    return jax.lax.stop_gradient(trajectories)


def backward_rollout(
    keys: jax.Array,
    environment: Environment,
    policy: Policy,
    params: Params,
    terminal: State,
    *,
    reward_params: Params = (),
) -> Trajectories:
    """Samples trajectories that end in given terminal states, by P_B from the end to the source.

    Args:
      keys: [B] one key a trajectory.
      environment: the graph.
      policy: P_F and P_B.
      params: the policy's parameters.
      terminal: [B, ...] terminal states.
      reward_params: the first argument of ``environment.log_reward``.

    Returns:
      ``Trajectories`` in forward order, no part of which carries gradient.
    """
    params, reward_params = jax.lax.stop_gradient((params, reward_params))

    def transition(noise, state, last_action, is_first):
        backward_mask = environment.backward_mask(state)
        output = policy.apply(
            params, environment.observe(state), environment.forward_mask(state), backward_mask
        )
        moves = backward_mask.any()
        action = _select(moves, _draw(output.backward, noise), environment.action(0))
        is_choice = (moves & ~output.backward.is_certain()) | (
            ~is_first & ~output.forward.is_certain()
        )
        return _Step(
            moves,
            environment.undo(state, action),
            action,
            output.backward.log_prob(action),
            output.forward.log_prob(last_action),
            is_choice,
            output.log_flow,
        )

    # The last evaluation, at the source, tells P_F of the first action.
    final, buffers, _ = _roll(keys, environment, terminal, transition, transition)
    length = buffers.flags[..., 0].sum(axis=0)
    here, last = buffers.log_probs[..., 0], buffers.log_probs[..., 1]
    rows = jnp.arange(environment.max_length + 1)[:, None]

    def reverse(leaf, shift):
        """Row t takes what was written at step ``length - shift - t``."""
        index = jnp.clip(length - shift - rows, 0, environment.max_length)
        return jnp.take_along_axis(leaf, index.reshape(index.shape + (1,) * (leaf.ndim - 2)), 0)

    valid = (rows < length)[:-1]
    log_flow = None if buffers.log_flow is None else reverse(buffers.log_flow, 0)
    states = jax.tree.map(lambda leaf, end: reverse(leaf, 0).at[0].set(end), buffers.states, final)
    actions = jax.tree.map(lambda leaf: reverse(leaf, 1)[:-1], buffers.actions)
    trajectories = Trajectories(
        states=states,
        actions=_select(valid, actions, environment.action(jnp.zeros_like(valid, jnp.int32))),
        valid=valid,
        is_choice=reverse(buffers.flags[..., 1], 0) & (rows <= length),
        log_pf=jnp.where(valid, reverse(last, 0)[:-1], 0.0),
        log_pb=jnp.where(valid, reverse(here, 1)[:-1], 0.0),
        terminal=terminal,
        log_reward=jax.vmap(environment.log_reward, (None, 0))(reward_params, terminal),
        log_flow=_where_left(log_flow, rows < length),
    )
    return jax.lax.stop_gradient(trajectories)

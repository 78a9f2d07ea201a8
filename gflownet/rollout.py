"""Trajectories by a policy: from the source on, and from given ends back to it."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from ebjax.types import Params
from gflownet.distributions import is_uniform
from gflownet.lanes import Step, draw, roll, select
from gflownet.policies.remembering import remembered
from gflownet.types import Environment, Policy, State, Trajectories

__all__ = ["backward_rollout", "forward_rollout"]


def _where_left(log_flow: jax.Array | None, is_left: jax.Array) -> jax.Array | None:
    return None if log_flow is None else jnp.where(is_left, log_flow, 0.0)


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
        action = select(moves, draw(output.forward.explore(epsilon), noise), environment.action(0))
        is_choice = (moves & ~output.forward.is_certain()) | (
            ~is_first & ~output.backward.is_certain()
        )
        return Step(
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
    final, buffers, memory = roll(
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
        action = select(moves, draw(output.backward, noise), environment.action(0))
        is_choice = (moves & ~output.backward.is_certain()) | (
            ~is_first & ~output.forward.is_certain()
        )
        return Step(
            moves,
            environment.undo(state, action),
            action,
            output.backward.log_prob(action),
            output.forward.log_prob(last_action),
            is_choice,
            output.log_flow,
        )

    # The last evaluation, at the source, tells P_F of the first action.
    final, buffers, _ = roll(keys, environment, terminal, transition, transition)
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
        actions=select(valid, actions, environment.action(jnp.zeros_like(valid, jnp.int32))),
        valid=valid,
        is_choice=reverse(buffers.flags[..., 1], 0) & (rows <= length),
        log_pf=jnp.where(valid, reverse(last, 0)[:-1], 0.0),
        log_pb=jnp.where(valid, reverse(here, 1)[:-1], 0.0),
        terminal=terminal,
        log_reward=jax.vmap(environment.log_reward, (None, 0))(reward_params, terminal),
        log_flow=_where_left(log_flow, rows < length),
    )
    return jax.lax.stop_gradient(trajectories)

"""Conditional flows: one policy for a family of rewards, a member drawn for each trajectory.

The condition c is a part of the state, drawn at the source and never changed, so that rollouts,
scores and objectives need not know of it. The flow of each c is a flow of its own:

    p(x | c) = R(x | c) / Z(c)

log Z is then a function of the source: objectives with a log F have it in F(s0), ``log_z`` of
trajectory balance reads ``state.condition``, and log-partition variance groups trajectories of one
condition (``group_size``).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ebjax.types import Params, PyTree
from gflownet.types import Environment, State

__all__ = ["ConditionalState", "at_condition", "conditional", "tempered_log_reward"]


class ConditionalState(NamedTuple):
    """``state`` of the environment below, and the ``condition`` of the trajectory."""

    state: Any
    condition: Any


def tempered_log_reward(log_reward: jax.Array, condition: jax.Array) -> jax.Array:
    """``β log R``, the condition being the inverse temperature β []."""
    return condition * log_reward


def conditional(
    environment: Environment,
    draw_condition: Callable[[jax.Array], PyTree],
    *,
    log_reward: Callable[[jax.Array, PyTree], jax.Array] = tempered_log_reward,
    conditional_log_reward: Callable[[Params, State, PyTree], jax.Array] | None = None,
) -> Environment:
    """An environment whose reward depends on a condition.

    Args:
      environment: the graph.
      draw_condition: ``key -> condition``, arrays (of any tree).
      log_reward: ``(log R(x), condition) -> log R(x | condition)``; tempering by default.
      conditional_log_reward: instead, ``(params, state, condition) -> log R``.

    Returns:
      An ``Environment`` over ``ConditionalState``, whose observation is the flat observation
      followed by the flat condition. It has an intermediate energy where ``environment`` has one
      and the reward is a function of the reward below; it is not enumerated (``at_condition`` is).
    """

    def of_state(fn):
        return lambda state, *rest: fn(state.state, *rest)

    def moved(fn):
        return lambda state, action: state._replace(state=fn(state.state, action))

    def initial(key):
        inner_key, condition_key = jax.random.split(key)
        return ConditionalState(environment.initial(inner_key), draw_condition(condition_key))

    def observe(state):
        leaves = jax.tree.leaves((environment.observe(state.state), state.condition))
        return jnp.concatenate([jnp.ravel(leaf).astype(jnp.result_type(float)) for leaf in leaves])

    def reward(params, state):
        if conditional_log_reward is not None:
            return conditional_log_reward(params, state.state, state.condition)
        return log_reward(environment.log_reward(params, state.state), state.condition)

    energy_fn = environment.intermediate_energy
    energy: Callable[[Params, State], jax.Array] | None = None
    if energy_fn is not None and conditional_log_reward is None:

        def energy(params, state):
            return -log_reward(-energy_fn(params, state.state), state.condition)

    return environment._replace(
        initial=initial,
        step=moved(environment.step),
        undo=moved(environment.undo),
        forward_mask=of_state(environment.forward_mask),
        backward_mask=of_state(environment.backward_mask),
        observe=observe,
        log_reward=reward,
        enumerate=None,
        state_index=None,
        log_z=None,
        intermediate_energy=energy,
    )


def at_condition(
    environment: Environment, conditional_environment: Environment, condition: PyTree
) -> Environment:
    """The conditional environment at one condition, enumerated, for its exact law.

    Args:
      environment: that ``conditional`` was given; it enumerates its states.
      conditional_environment: what it returned.
      condition: the condition.

    Raises:
      ValueError: if the environment does not enumerate its states.
    """
    all_states, state_index = environment.enumerate, environment.state_index
    if all_states is None or state_index is None:
        raise ValueError("The environment does not enumerate its states.")
    index = state_index

    def enumerate_states():
        states = all_states()
        size = len(jax.tree.leaves(states)[0])
        repeated = jax.tree.map(
            lambda leaf: jnp.broadcast_to(leaf, (size, *jnp.shape(leaf))), condition
        )
        return ConditionalState(states, repeated)

    return conditional_environment._replace(
        initial=lambda key: ConditionalState(environment.initial(key), condition),
        enumerate=enumerate_states,
        state_index=lambda state: index(state.state),
    )

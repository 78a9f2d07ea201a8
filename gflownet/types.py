"""Contracts of GFlowNets: the environment, the policy and what a rollout leaves.

A GFlowNet samples objects x with probability R(x) / Z by walking a pointed directed acyclic graph
from its source s0 to terminal states. ``log R(x) = -E(x) / temperature`` for an energy E.

One rule replaces all flags: *a state without allowed forward actions is terminal*, and a state
without allowed backward actions is the source. An environment with a stop action says which it is
and keeps in its state whether it has stopped; the only backward action of a stopped state undoes
the stop, so that log P_B of the stop is 0. The engine keeps which trajectories are done and which
steps are valid.

Shapes: ``T`` the largest number of actions of a trajectory, ``B`` trajectories, ``A`` actions,
``S`` enumerated states. Trajectories are time-major.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax

from ebjax.types import Params, PyTree

State = PyTree
Observation = PyTree

__all__ = [
    "Distribution",
    "Environment",
    "Observation",
    "Policy",
    "PolicyOutput",
    "State",
    "Trajectories",
]


class Environment(NamedTuple):
    """The graph of a GFlowNet, as functions of one state.

    One index space of ``num_actions`` actions serves both directions: action ``a`` leads from s to
    s', and undoing ``a`` leads from s' to s. Masks are ``True`` where allowed. Functions need to be
    right for allowed actions only; they must return the same shapes and dtypes for all.

    Attributes:
      initial: ``key -> state``, the source s0 (a key for environments that draw a problem first).
      step: ``(state, action) -> state``.
      undo: ``(state, action) -> state``.
      forward_mask: ``state -> [A] bool``.
      backward_mask: ``state -> [A] bool``.
      observe: ``state -> observation``, what networks see.
      num_actions: A.
      max_length: T, the most actions that a trajectory can take, a stop included.
      log_reward: ``(params, state) -> []``, log R of a terminal state; a learned energy fits, with
        ``params`` its parameters. It never receives gradient unless an objective asks.
      stop_action: the action that ends every trajectory, or ``None`` where states become terminal
        by themselves.
      enumerate: ``() -> states [S, ...]``, all states, for exact tests; where that is possible.
      state_index: ``state -> []`` int32, the place of a state in ``enumerate()``.
      log_z: log Σ_x R(x) in closed form, where there is one.
      intermediate_energy: ``(params, state) -> []``, an energy of every state that is -log R at
        terminal ones, for forward-looking objectives; where there is one.
    """

    initial: Callable[[jax.Array], State]
    step: Callable[[State, jax.Array], State]
    undo: Callable[[State, jax.Array], State]
    forward_mask: Callable[[State], jax.Array]
    backward_mask: Callable[[State], jax.Array]
    observe: Callable[[State], Observation]
    num_actions: int
    max_length: int
    log_reward: Callable[[Params, State], jax.Array]
    stop_action: int | None = None
    enumerate: Callable[[], State] | None = None
    state_index: Callable[[State], jax.Array] | None = None
    log_z: float | None = None
    intermediate_energy: Callable[[Params, State], jax.Array] | None = None


class Distribution(Protocol):
    """A law over actions of one state. Gradients flow through ``log_prob`` only."""

    def sample(self, key: jax.Array) -> jax.Array:
        """One action."""

    def log_prob(self, action: jax.Array) -> jax.Array:
        """[] log-probability (or density) of an action."""

    def is_certain(self) -> jax.Array:
        """[] bool: whether at most one action is possible, so that there is nothing to learn."""

    def explore(self, epsilon: jax.Array) -> Distribution:
        """The mixture with share ``epsilon`` of the uniform law over what is allowed."""


class PolicyOutput(NamedTuple):
    """What a policy says of one state.

    Attributes:
      forward: law of the action that leaves the state, P_F(. | s).
      backward: law of the action that led to it, P_B(. | s).
      log_flow: [] log F(s), or ``None`` where the policy has no such head.
    """

    forward: Distribution
    backward: Distribution
    log_flow: jax.Array | None = None


class Policy(NamedTuple):
    """Forward and backward policies, as a rule on a shared trunk.

    Attributes:
      init: ``(key, observation) -> params``.
      apply: ``(params, observation, forward_mask, backward_mask) -> PolicyOutput`` for one state.
        What a caller does not use is not computed.
    """

    init: Callable[[jax.Array, Observation], Params]
    apply: Callable[[Params, Observation, jax.Array, jax.Array], PolicyOutput]


class Trajectories(NamedTuple):
    """A batch of trajectories from the source to terminal states, in forward order.

    Attributes:
      states: [T + 1, B, ...]; what stands after the end of a trajectory means nothing.
      actions: [T, B].
      valid: [T, B] bool, whether the step belongs to the trajectory.
      is_choice: [T + 1, B] bool, whether the forward or the backward action of the trajectory at
        the state was one of several possible.
      log_pf: [T, B] log P_F of the actions under the policy that was given (never the exploring
        one), 0 where not valid. Values without gradient.
      log_pb: [T, B] log P_B, likewise.
      terminal: [B, ...] the last states.
      log_reward: [B].
      log_flow: [T + 1, B] log F of the states that were left, likewise; ``None`` where the policy
        has no such head.
    """

    states: Any
    actions: jax.Array
    valid: jax.Array
    is_choice: jax.Array
    log_pf: jax.Array
    log_pb: jax.Array
    terminal: Any
    log_reward: jax.Array
    log_flow: jax.Array | None = None

    @property
    def length(self) -> jax.Array:
        """[B] number of actions."""
        return self.valid.sum(axis=0)

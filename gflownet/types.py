"""Contracts of GFlowNets: the environment, the policy and what a rollout leaves.

A GFlowNet samples objects x with probability R(x) / Z by walking a pointed directed acyclic graph
from its source s0 to terminal states. ``log R(x) = -E(x) / temperature`` for an energy E.

One rule replaces all flags: *a state without allowed forward actions is terminal*, and a state
without allowed backward actions is the source. An environment with a stop action says which it is
and keeps in its state whether it has stopped; the only backward action of a stopped state undoes
the stop, so that log P_B of the stop is 0. The engine keeps which trajectories are done and which
steps are valid.

An action is an index (int32), or, where ``value_dim`` is not 0, an ``Action``: an index and a value
in R^D. The value is the same in both directions (what is added by ``step`` and taken away by
``undo``); P_F and P_B are then densities with respect to one reference measure on the transitions
of an index, which ``Chart`` describes, and residuals and importance weights hold as they stand.

Shapes: ``T`` the largest number of actions of a trajectory, ``B`` trajectories, ``A`` actions,
``S`` enumerated states, ``D`` coordinates of a value. Trajectories are time-major.

Lahlou et al., "A theory of continuous generative flow networks", ICML 2023.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp

from ebjax.types import Params, PyTree

State = PyTree
Observation = PyTree

__all__ = [
    "Action",
    "Chart",
    "ChartedObservation",
    "Distribution",
    "Environment",
    "Memory",
    "Observation",
    "Policy",
    "PolicyOutput",
    "State",
    "Trajectories",
]


class Action(NamedTuple):
    """``which`` action [] int32, and its ``value`` [D], 0 where it has no meaning."""

    which: jax.Array
    value: jax.Array


class Chart(NamedTuple):
    """Where the values of each action of a state lie, in one direction.

        value = low + width · r,    r in [0, 1]^D

    and the reference measure gives ``exp(log_scale)`` to a unit of value. What lies at a width of 0
    is determined by the state: it has probability 1, and no density. A law with density q(r) over
    the coordinates of positive width has

        log p(value) = log q(r) - Σ_{width > 0} log width - log_scale

    Attributes:
      low: [A, D].
      width: [A, D], not negative.
      log_scale: [A], 0 where all widths are 0.
    """

    low: jax.Array
    width: jax.Array
    log_scale: jax.Array


class ChartedObservation(NamedTuple):
    """What environments whose actions have values let policies see.

    Attributes:
      features: [F], for networks.
      forward: chart of the actions that leave the state.
      backward: chart of the actions that led to it.
    """

    features: jax.Array
    forward: Chart
    backward: Chart


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
      observe: ``state -> observation``, what networks see; a ``ChartedObservation`` where actions
        have values.
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
      value_dim: D, coordinates of an action's value. With 0 actions are indices, otherwise each
        ``action`` above is an ``Action``.
    """

    initial: Callable[[jax.Array], State]
    step: Callable[[State, PyTree], State]
    undo: Callable[[State, PyTree], State]
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
    value_dim: int = 0

    def action(self, index: int | jax.Array, value: jax.Array | float = 0.0) -> PyTree:
        """The action of an index, with a value (or all zeros) where actions have one."""
        index = jnp.asarray(index, jnp.int32)
        if self.value_dim == 0:
            return index
        value = jnp.asarray(value, jnp.result_type(float))
        return Action(index, jnp.broadcast_to(value, (*index.shape, self.value_dim)))


class Distribution(Protocol):
    """A law over actions of one state. Gradients flow through ``log_prob`` only."""

    def sample(self, key: jax.Array) -> PyTree:
        """One action."""

    def log_prob(self, action: PyTree) -> jax.Array:
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
      remembers: whether the outputs of its dense layers may be kept by a rollout for the gradient;
        ``gflownet.policies.remembering`` says of which functions.
    """

    init: Callable[[jax.Array, Observation], Params]
    apply: Callable[[Params, Observation, jax.Array, jax.Array], PolicyOutput]
    remembers: bool = False


class Memory(NamedTuple):
    """What the layers of a policy put out at the states of trajectories.

    Attributes:
      outputs: [N, ...] a layer, rows in the order in which they were computed.
      row: [T + 1, B] int32, where the state's is; of no meaning where it was not evaluated.
    """

    outputs: tuple[jax.Array, ...]
    row: jax.Array


class Trajectories(NamedTuple):
    """A batch of trajectories from the source to terminal states, in forward order.

    Attributes:
      states: [T + 1, B, ...]; what stands after the end of a trajectory means nothing.
      actions: [T, B], or an ``Action`` of [T, B] and [T, B, D].
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
      memory: what may be recalled at the states, or ``None``. It belongs to the batch as it was
        drawn: a part of the batch, or several together, have none.
    """

    states: Any
    actions: Any
    valid: jax.Array
    is_choice: jax.Array
    log_pf: jax.Array
    log_pb: jax.Array
    terminal: Any
    log_reward: jax.Array
    log_flow: jax.Array | None = None
    memory: Memory | None = None

    @property
    def length(self) -> jax.Array:
        """[B] number of actions."""
        return self.valid.sum(axis=0)

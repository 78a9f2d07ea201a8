"""Sequences of tokens, built by appending, at both ends, or place by place in any order.

    order            actions                                parents of a sequence
    append           token                                  one
    prepend_append   token at the end, token in front       without its first or its last token
    any_order        (place, token)                         one for each filled place

A sequence of full length is terminal. With ``min_length`` sequences of several lengths are
terminal, and an action that stops ends each. In front of and behind a run of one token the same
token makes the same sequence: the second way is not allowed, so that no two actions join the same
states.

The reward is any function of the tokens; ``table_log_reward`` looks it up, ``discrete_energy``
makes the environment of an energy of discrete variables, which any order of assignment reaches.

Malkin et al., "Trajectory balance: improved credit assignment in GFlowNets", NeurIPS 2022 (append).
Shen et al., "Towards understanding and improving GFlowNet training", ICML 2023 (both ends). Tiapkin
et al., "Generative flow networks as entropy-regularized RL", AISTATS 2024 (any order).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ebjax.types import EnergyFn, Params
from gflownet.types import Environment

__all__ = [
    "ORDERS",
    "SequenceState",
    "discrete_energy",
    "sequence_index",
    "sequences",
    "table_log_reward",
]

ORDERS = ("append", "prepend_append", "any_order")


class SequenceState(NamedTuple):
    """``tokens`` [L] int32, the vocabulary's size where there is none yet, and ``stopped`` []."""

    tokens: jax.Array
    stopped: jax.Array


def sequence_index(tokens: jax.Array, vocabulary: int) -> jax.Array:
    """[] int32 place of a full sequence in a table: its tokens as digits, the first one leading.

    >>> int(sequence_index(jnp.array([1, 0, 2]), 3))
    11
    """
    weights = vocabulary ** np.arange(tokens.shape[-1])[::-1]
    return tokens.astype(jnp.int32) @ jnp.asarray(weights, jnp.int32)


def table_log_reward(log_rewards: np.ndarray, vocabulary: int) -> Callable[[Params, Any], Any]:
    """``(params, tokens) -> []``, looked up at ``sequence_index``.

    Args:
      log_rewards: [V^L].
      vocabulary: V.
    """
    table = np.asarray(log_rewards)

    def log_reward(params, tokens):
        del params
        values = jnp.asarray(table, jnp.result_type(float))
        return values[sequence_index(tokens, vocabulary)]

    return log_reward


def sequences(
    log_reward: Callable[[Params, jax.Array], jax.Array],
    *,
    vocabulary: int,
    length: int,
    order: str = "append",
    min_length: int | None = None,
    observe_tokens: bool = False,
    log_z: float | None = None,
    intermediate_energy: Callable[[Params, jax.Array], jax.Array] | None = None,
    max_enumerated: int = 200_000,
) -> Environment:
    """Builds the environment.

    Args:
      log_reward: ``(params, tokens [L]) -> []``, log R of a terminal sequence. Where sequences may
        be shorter than L, places without a token hold V.
      vocabulary: V, at least 1.
      length: L, at least 1.
      order: where tokens go: "append", "prepend_append" or "any_order".
      min_length: from this length on a sequence may stop; ``None``: only full sequences, without a
        stop action. Not with "any_order".
      observe_tokens: the observation is ``tokens`` [L] int32 for a network with an embedding,
        instead of one-hot numbers [L (V + 1)].
      log_z: log Σ R, if it is known.
      intermediate_energy: ``(params, tokens) -> []``, 0 where there is no token.
      max_enumerated: ``enumerate`` is offered up to this number of states.

    Returns:
      An ``Environment`` with V, 2 V or L V actions, and one more to stop.

    Raises:
      ValueError: naming the argument that is out of range.

    >>> environment = sequences(
    ...     lambda params, tokens: tokens.sum().astype(float), vocabulary=4, length=3)
    >>> environment.num_actions, environment.max_length
    (4, 3)
    """
    if order not in ORDERS:
        raise ValueError(f"order is {order!r}; it must be one of {', '.join(ORDERS)}.")
    for name, value in (("vocabulary", vocabulary), ("length", length)):
        if value < 1:
            raise ValueError(f"{name} is {value}; it must be at least 1.")
    has_stop = min_length is not None
    if min_length is not None and not (order != "any_order" and 0 <= min_length <= length):
        raise ValueError(
            f"min_length is {min_length} with length {length} and order {order!r}; it must be from "
            "0 to length, and sequences in any order are always full."
        )
    empty = vocabulary
    moves = {"append": _append, "prepend_append": _both_ends, "any_order": _any_order}[order]
    num_moves, step_fn, undo_fn, forward_fn, backward_fn = moves(vocabulary, length)
    num_actions = num_moves + has_stop
    shortest = length if min_length is None else min_length

    def initial(key):
        del key
        return SequenceState(jnp.full(length, empty, jnp.int32), jnp.zeros((), bool))

    def step(state, action):
        is_stop = jnp.asarray(has_stop) & (action == num_moves)
        tokens = jnp.where(is_stop, state.tokens, step_fn(state.tokens, action))
        return SequenceState(tokens.astype(jnp.int32), state.stopped | is_stop)

    def undo(state, action):
        is_stop = jnp.asarray(has_stop) & (action == num_moves)
        tokens = jnp.where(is_stop, state.tokens, undo_fn(state.tokens, action))
        return SequenceState(tokens.astype(jnp.int32), state.stopped & ~is_stop)

    def with_stop(mask, stop):
        return jnp.append(mask, stop) if has_stop else mask

    def forward_mask(state):
        size = jnp.sum(state.tokens != empty)
        mask = forward_fn(state.tokens) & (size < length)
        return with_stop(mask, size >= shortest) & ~state.stopped

    def backward_mask(state):
        return with_stop(backward_fn(state.tokens) & ~state.stopped, state.stopped)

    def observe(state):
        if observe_tokens:
            return state.tokens
        return jax.nn.one_hot(state.tokens, vocabulary + 1).reshape(-1)

    count, enumerate_fn, index_fn = _enumeration(vocabulary, length, order)
    is_small = count * (1 + has_stop) <= max_enumerated

    def enumerate_states():
        tokens = enumerate_fn()
        if not has_stop:
            return SequenceState(tokens, np.zeros(len(tokens), bool))
        may_stop = tokens[(tokens != empty).sum(axis=1) >= shortest]
        stopped = np.repeat([False, True], [len(tokens), len(may_stop)])
        return SequenceState(np.concatenate([tokens, may_stop]), stopped)

    # Sequences are enumerated by length, so that those that may stop are the last.
    num_short = sum(vocabulary**size for size in range(shortest)) if has_stop else 0

    def state_index(state):
        return index_fn(state.tokens) + jnp.where(state.stopped, count - num_short, 0).astype(
            jnp.int32
        )

    return Environment(
        initial=initial,
        step=step,
        undo=undo,
        forward_mask=forward_mask,
        backward_mask=backward_mask,
        observe=observe,
        num_actions=num_actions,
        max_length=length + has_stop,
        log_reward=lambda params, state: log_reward(params, state.tokens),
        stop_action=num_moves if has_stop else None,
        enumerate=enumerate_states if is_small else None,
        state_index=state_index if is_small else None,
        log_z=log_z,
        intermediate_energy=(
            None
            if intermediate_energy is None
            else lambda params, state: intermediate_energy(params, state.tokens)
        ),
    )


def _append(vocabulary: int, length: int):
    """``(number of actions, step, undo, forward mask, backward mask)`` on tokens."""
    places, letters = np.arange(length), np.arange(vocabulary)

    def size(tokens):
        return jnp.sum(tokens != vocabulary)

    def step(tokens, action):
        return jnp.where(places == size(tokens), action, tokens)

    def undo(tokens, action):
        del action
        return jnp.where(places == size(tokens) - 1, vocabulary, tokens)

    def forward(tokens):
        del tokens
        return jnp.ones(vocabulary, bool)

    def backward(tokens):
        last = tokens[jnp.maximum(size(tokens) - 1, 0)]
        return (letters == last) & (size(tokens) > 0)

    return vocabulary, step, undo, forward, backward


def _both_ends(vocabulary: int, length: int):
    """Action a appends a, action V + a puts a in front."""
    _, append, remove, _, backward_append = _append(vocabulary, length)
    places, letters = np.arange(length), np.arange(vocabulary)

    def step(tokens, action):
        front = jnp.where(places == 0, action - vocabulary, jnp.roll(tokens, 1))
        return jnp.where(action < vocabulary, append(tokens, action), front)

    def undo(tokens, action):
        rest = jnp.where(places == length - 1, vocabulary, jnp.roll(tokens, -1))
        return jnp.where(action < vocabulary, remove(tokens, action), rest)

    def is_run(tokens, letter):
        """Whether there is no other token than this letter."""
        return ((tokens == vocabulary) | (tokens == letter)).all()

    def forward(tokens):
        same = jax.vmap(lambda letter: is_run(tokens, letter))(jnp.asarray(letters))
        return jnp.concatenate([jnp.ones(vocabulary, bool), ~same])

    def backward(tokens):
        front = (letters == tokens[0]) & ~is_run(tokens, tokens[0])
        return jnp.concatenate([backward_append(tokens), front])

    return 2 * vocabulary, step, undo, forward, backward


def _any_order(vocabulary: int, length: int):
    """Action ``place V + token`` writes a token to an empty place."""
    places, letters = np.arange(length), np.arange(vocabulary)

    def step(tokens, action):
        return jnp.where(places == action // vocabulary, action % vocabulary, tokens)

    def undo(tokens, action):
        return jnp.where(places == action // vocabulary, vocabulary, tokens)

    def forward(tokens):
        return jnp.repeat(tokens == vocabulary, vocabulary)

    def backward(tokens):
        return (tokens[:, None] == letters).reshape(-1)

    return length * vocabulary, step, undo, forward, backward


def _enumeration(vocabulary: int, length: int, order: str):
    """``(number of sequences, all of them, place of one)``, stopped ones apart."""
    return (_all_fillings if order == "any_order" else _all_prefixes)(vocabulary, length)


def _digits(count: int, base: int, size: int) -> np.ndarray:
    """[count, size] int32: 0, ..., count - 1 in base ``base``."""
    weights = base ** np.arange(size)[::-1]
    return (np.arange(count)[:, None] // weights % base).astype(np.int32)


def _all_fillings(vocabulary: int, length: int):
    """Any places may be empty: an empty place is one more token."""
    base = vocabulary + 1
    count = base**length
    return (
        count,
        lambda: _digits(count, base, length),
        lambda tokens: sequence_index(tokens, base),
    )


def _all_prefixes(vocabulary: int, length: int):
    """The last places are empty; shorter ones first."""
    starts = np.concatenate([[0], np.cumsum([vocabulary**size for size in range(length + 1)])])

    def everything():
        blocks = []
        for size in range(length + 1):
            block = np.full((vocabulary**size, length), vocabulary, np.int32)
            block[:, :size] = _digits(vocabulary**size, vocabulary, size)
            blocks.append(block)
        return np.concatenate(blocks)

    def place(tokens):
        size = jnp.sum(tokens != vocabulary)
        full = sequence_index(jnp.where(tokens == vocabulary, 0, tokens), vocabulary)
        shift = jnp.asarray(vocabulary ** np.arange(length, -1, -1), jnp.int32)[size]
        return full // shift + jnp.asarray(starts[:-1], jnp.int32)[size]

    return int(starts[-1]), everything, place


def discrete_energy(
    energy_fn: EnergyFn,
    *,
    num_variables: int,
    values: Sequence[float] = (0.0, 1.0),
    temperature: float = 1.0,
    energy_of_unknown: Callable[[Params, jax.Array, jax.Array], jax.Array] | None = None,
    max_enumerated: int = 200_000,
) -> Environment:
    """Any energy of discrete variables as the reward: ``log R(x) = -E(params, x) / temperature``.

    Variables are set one at a time in any order. Reward parameters are the energy's, so that an
    energy that is being trained fits.

    Args:
      energy_fn: ``(params, x [D]) -> []``.
      num_variables: D.
      values: what a variable can be, as the energy sees it: (0, 1) for bits, (-1, 1) for spins.
      temperature: T > 0.
      energy_of_unknown: ``(params, x [D], known [D] bool) -> []``, an energy of incomplete states
        that is 0 where nothing is known, for forward-looking objectives; what is unknown is 0 in x.
      max_enumerated: ``enumerate`` is offered up to this number of states, ``(V + 1)^D``.

    Raises:
      ValueError: naming the argument that is out of range.

    >>> spins = lambda coupling, x: -coupling * x[0] * x[1]
    >>> environment = discrete_energy(spins, num_variables=2, values=(-1.0, 1.0))
    >>> state = environment.step(environment.initial(jax.random.key(0)), 0)  # the first is -1
    >>> state = environment.step(state, 3)  # the second is 1
    >>> float(environment.log_reward(0.5, state))
    -0.5
    """
    if not temperature > 0.0:
        raise ValueError(f"temperature is {temperature}; it must be positive.")
    levels = np.asarray((*values, 0.0))

    def to_x(tokens):
        return jnp.asarray(levels, jnp.result_type(float))[tokens]

    def log_reward(params, tokens):
        return -energy_fn(params, to_x(tokens)) / temperature

    partial = None
    if energy_of_unknown is not None:

        def partial(params, tokens):
            known = tokens != len(values)
            return energy_of_unknown(params, to_x(tokens), known) / temperature

    return sequences(
        log_reward,
        vocabulary=len(values),
        length=num_variables,
        order="any_order",
        intermediate_energy=partial,
        max_enumerated=max_enumerated,
    )

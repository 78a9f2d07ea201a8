"""Environments made of others: one after the other, or one of several.

    stack     walks its parts in order; where one has ended, the next begins, perhaps under a
              constraint that the ended ones decide
    choice    first picks one of its parts, then walks it

Parts are environments of any kind, discrete or with values, and their actions lie side by side in
one index space; values have as many coordinates as the largest part needs. Nothing is stored but
the states of the parts: a part has begun if it can be undone, and has ended if nothing is allowed
in it, so that the last action of a part opens the next, and undoing it closes it again.

A constraint is a change of the source of a part: ``(ended parts' states, source) -> source``. It
says what the part's own masks read from its state, such as ``active`` of a cube, or ``allowed`` of
``restricted``. It is applied whenever the part is opened and taken back whenever it is closed, so
that both directions see the same constraint.

Mila AI4Science et al., "Crystal-GFN: sampling crystals with desirable properties and constraints",
2023.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ebjax.samplers.decision import select
from ebjax.types import Params
from gflownet.exact import enumerate_graph
from gflownet.types import Action, Chart, ChartedObservation, Environment, State

__all__ = ["ChoiceState", "RestrictedState", "choice", "enumerated", "restricted", "stack"]

Constraint = Callable[[tuple[State, ...], State], State]


class ChoiceState(NamedTuple):
    """``chosen`` [] int32, 0 before the choice and then 1 + the part, and all parts' states."""

    chosen: jax.Array
    parts: tuple[Any, ...]


class RestrictedState(NamedTuple):
    """``state`` of the environment below, and ``allowed`` [A] bool of the trajectory."""

    state: Any
    allowed: jax.Array


def _check_parts(parts: Sequence[Environment]) -> None:
    if not parts:
        raise ValueError("parts is empty; give at least one environment.")


def _sources(parts: Sequence[Environment]) -> tuple[State, ...]:
    """Their sources, which do not depend on a key."""
    return tuple(part.initial(jax.random.key(0)) for part in parts)


def _move(
    parts: Sequence[Environment],
    offsets: Sequence[int],
    states: Sequence[State],
    action: Any,
    active: Sequence[jax.Array],
    name: str,
) -> tuple[State, ...]:
    """The states after ``step`` or ``undo`` of the part that is active."""
    moved = []
    for part, offset, state, is_active in zip(parts, offsets, states, active, strict=True):
        index = action.which if isinstance(action, Action) else action
        index = jnp.clip(index - offset, 0, part.num_actions - 1).astype(jnp.int32)
        own: Any = index
        if part.value_dim:
            own = Action(index, action.value[: part.value_dim])
        new = getattr(part, name)(state, own)
        moved.append(select(is_active, new, state))
    return tuple(moved)


def _padded(charts: Sequence[Chart | None], sizes: Sequence[int], dim: int) -> Chart:
    """Charts side by side, widths 0 where a part has no such coordinate."""
    rows = []
    for chart, size in zip(charts, sizes, strict=True):
        if chart is None:
            nothing = jnp.zeros((size, dim))
            rows.append(Chart(nothing, nothing, jnp.zeros(size)))
        else:
            pad = ((0, 0), (0, dim - chart.low.shape[1]))
            rows.append(Chart(jnp.pad(chart.low, pad), jnp.pad(chart.width, pad), chart.log_scale))
    return jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *rows)


def _observe(
    parts: Sequence[Environment],
    states: Sequence[State],
    place: jax.Array,
    own_actions: int,
    dim: int,
) -> Any:
    """All parts' features after ``place`` [P]; ``own_actions`` indices come before the parts'."""
    observations = [part.observe(state) for part, state in zip(parts, states, strict=True)]
    leaves = [place]
    for observation in observations:
        seen = observation
        if isinstance(observation, ChartedObservation):
            seen = observation.features
        leaves += jax.tree.leaves(seen)
    dtype = jnp.result_type(float)
    features = jnp.concatenate([jnp.ravel(leaf).astype(dtype) for leaf in leaves])
    if dim == 0:
        return features
    sizes = [own_actions, *(part.num_actions for part in parts)]
    charts = [None, *(o if isinstance(o, ChartedObservation) else None for o in observations)]
    return ChartedObservation(
        features,
        _padded([c and c.forward for c in charts], sizes, dim),
        _padded([c and c.backward for c in charts], sizes, dim),
    )


def stack(
    parts: Sequence[Environment],
    *,
    constraints: Mapping[int, Constraint] | None = None,
    log_reward: Callable[[Params, tuple[State, ...]], jax.Array] | None = None,
) -> Environment:
    """Environments walked in order.

    Args:
      parts: whose sources do not depend on a key. Their actions are numbered on: those of part i
        come after all of the parts before it.
      constraints: by the place of a part, from 1 on: ``(states of the ended parts before it, its
        source) -> its source``. A part that its constraint leaves without actions is passed over.
      log_reward: ``(params, all parts' states) -> []``; by default the sum of the parts' own, each
        of which then gets the same ``params``.

    Returns:
      An ``Environment`` whose state is the tuple of the parts' states. It observes the open part,
      one-hot, and what the parts observe. See ``enumerated`` for its exact law.

    Raises:
      ValueError: without parts, or for a constraint of a part that there is not.
    """
    _check_parts(parts)
    parts, rules = tuple(parts), dict(constraints or {})
    for place in rules:
        if not 1 <= place < len(parts):
            raise ValueError(
                f"constraints has part {place}; it must be between 1 and {len(parts) - 1}."
            )
    sizes = [part.num_actions for part in parts]
    offsets = list(itertools.accumulate(sizes, initial=0))[:-1]
    dim = max(part.value_dim for part in parts)

    def is_open(states) -> list[jax.Array]:
        """Of each part whether it goes on: it is the first in which something is allowed."""
        waits, result = jnp.ones((), bool), []
        for part, state in zip(parts, states, strict=True):
            goes_on = part.forward_mask(state).any()
            result.append(waits & goes_on)
            waits &= ~goes_on
        return result

    def is_last(states) -> list[jax.Array]:
        """Of each part whether it is the last that has begun."""
        waits, result = jnp.ones((), bool), []
        for part, state in zip(reversed(parts), reversed(states), strict=True):
            has_begun = part.backward_mask(state).any()
            result.append(waits & has_begun)
            waits &= ~has_begun
        return result[::-1]

    def opened(states) -> tuple[State, ...]:
        """The states with the source of every part that has not begun as it must be."""
        result, before_ended = list(states), jnp.ones((), bool)
        sources = _sources(parts)
        for place, (part, state) in enumerate(zip(parts, states, strict=True)):
            if place in rules:
                constrained = rules[place](tuple(result[:place]), sources[place])
                source = select(before_ended, constrained, sources[place])
                has_begun = part.backward_mask(state).any()
                result[place] = select(has_begun, state, source)
            before_ended &= ~part.forward_mask(result[place]).any()
        return tuple(result)

    def joined_masks(name, states, active):
        masks = [getattr(part, name)(state) for part, state in zip(parts, states, strict=True)]
        return jnp.concatenate([mask & on for mask, on in zip(masks, active, strict=True)])

    def reward(params, states):
        if log_reward is not None:
            return log_reward(params, states)
        rewards = [p.log_reward(params, s) for p, s in zip(parts, states, strict=True)]
        return jnp.sum(jnp.stack(rewards))

    return Environment(
        initial=lambda key: opened(_sources(parts)),
        step=lambda s, a: opened(_move(parts, offsets, s, a, is_open(s), "step")),
        undo=lambda s, a: opened(_move(parts, offsets, s, a, is_last(s), "undo")),
        forward_mask=lambda states: joined_masks("forward_mask", states, is_open(states)),
        backward_mask=lambda states: joined_masks("backward_mask", states, is_last(states)),
        observe=lambda states: _observe(parts, states, jnp.stack(is_open(states)), 0, dim),
        num_actions=sum(sizes),
        max_length=sum(part.max_length for part in parts),
        log_reward=reward,
        value_dim=dim,
    )


def choice(
    parts: Sequence[Environment],
    *,
    log_reward: Callable[[Params, ChoiceState], jax.Array] | None = None,
) -> Environment:
    """One of several environments: the first action picks it.

    Args:
      parts: whose sources do not depend on a key. Action i picks part i; their own actions follow.
      log_reward: ``(params, state) -> []``; by default that of the part that was picked, so that
        Z is the sum of the parts' own.

    Returns:
      An ``Environment`` over ``ChoiceState``. It observes the choice, one-hot, and what the parts
      observe. See ``enumerated`` for its exact law.

    Raises:
      ValueError: without parts.
    """
    _check_parts(parts)
    parts = tuple(parts)
    count, sizes = len(parts), [part.num_actions for part in parts]
    offsets = list(itertools.accumulate(sizes, initial=count))[:-1]
    dim = max(part.value_dim for part in parts)

    def is_active(state) -> list[jax.Array]:
        return [state.chosen == i + 1 for i in range(count)]

    def index_of(action):
        return action.which if isinstance(action, Action) else action

    def step(state, action):
        moved = _move(parts, offsets, state.parts, action, is_active(state), "step")
        picked = jnp.where(state.chosen == 0, index_of(action) + 1, state.chosen)
        return ChoiceState(picked.astype(jnp.int32), moved)

    def undo(state, action):
        is_pick = index_of(action) < count
        active = [on & ~is_pick for on in is_active(state)]
        moved = _move(parts, offsets, state.parts, action, active, "undo")
        return ChoiceState(jnp.where(is_pick, 0, state.chosen).astype(jnp.int32), moved)

    def parts_mask(name, state):
        return [
            getattr(part, name)(own) & on
            for part, own, on in zip(parts, state.parts, is_active(state), strict=True)
        ]

    def forward_mask(state):
        picks = jnp.broadcast_to(state.chosen == 0, (count,))
        return jnp.concatenate([picks, *parts_mask("forward_mask", state)])

    def backward_mask(state):
        own = jnp.concatenate(parts_mask("backward_mask", state))
        picks = jnp.stack(is_active(state)) & ~own.any()
        return jnp.concatenate([picks, own])

    def reward(params, state):
        if log_reward is not None:
            return log_reward(params, state)
        rewards = [p.log_reward(params, s) for p, s in zip(parts, state.parts, strict=True)]
        return jnp.stack(rewards)[jnp.maximum(state.chosen - 1, 0)]

    return Environment(
        initial=lambda key: ChoiceState(jnp.zeros((), jnp.int32), _sources(parts)),
        step=step,
        undo=undo,
        forward_mask=forward_mask,
        backward_mask=backward_mask,
        observe=lambda state: _observe(parts, state.parts, jnp.stack(is_active(state)), count, dim),
        num_actions=count + sum(sizes),
        max_length=1 + max(part.max_length for part in parts),
        log_reward=reward,
        value_dim=dim,
    )


def restricted(environment: Environment) -> Environment:
    """The environment with a mask of allowed actions in its state, all of them at its source.

    It is for a constraint of a ``stack`` to say which remain: ``source._replace(allowed=mask)``.
    What they lead to must be able to end.

    Args:
      environment: the graph. Its source must not depend on a key.

    Returns:
      An ``Environment`` over ``RestrictedState``, which observes the mask as well.
    """

    def moved(fn):
        return lambda state, action: state._replace(state=fn(state.state, action))

    def observe(state):
        inner = environment.observe(state.state)
        seen = inner.features if isinstance(inner, ChartedObservation) else inner
        dtype = jnp.result_type(float)
        leaves = jax.tree.leaves((seen, state.allowed))
        features = jnp.concatenate([jnp.ravel(leaf).astype(dtype) for leaf in leaves])
        return inner._replace(features=features) if environment.value_dim else features

    def initial(key):
        return RestrictedState(environment.initial(key), jnp.ones(environment.num_actions, bool))

    return environment._replace(
        initial=initial,
        step=moved(environment.step),
        undo=moved(environment.undo),
        forward_mask=lambda state: environment.forward_mask(state.state) & state.allowed,
        backward_mask=lambda state: environment.backward_mask(state.state) & state.allowed,
        observe=observe,
        log_reward=lambda params, state: environment.log_reward(params, state.state),
        enumerate=None,
        state_index=None,
        log_z=None,
        intermediate_energy=None,
    )


def enumerated(environment: Environment, *, max_states: int = 20_000) -> Environment:
    """The environment with all its states listed, found by breadth-first search from the source.

    For the exact law of what has no enumeration of its own, such as a stack. A state is found again
    by a hash of its entries, which is free of collisions among the states listed; ``max_length``
    becomes that of the longest path that there is.

    Args:
      environment: discrete, its states made of integers and booleans.
      max_states: the most states that may be found.

    Raises:
      ValueError: if actions have values, a state holds other numbers, or there are more states.

    >>> from gflownet.environments import hypergrid
    >>> grid = hypergrid(dim=2, side=3)
    >>> len(enumerated(stack([grid, grid])).enumerate()[0].stopped)
    171
    """
    leaves = jax.tree.leaves(environment.initial(jax.random.key(0)))
    if environment.value_dim or any(np.dtype(leaf.dtype).kind not in "biu" for leaf in leaves):
        raise ValueError(
            f"environment has values of {environment.value_dim} coordinates and states of "
            f"{', '.join(sorted({str(leaf.dtype) for leaf in leaves}))}; only discrete ones are "
            "enumerated."
        )
    states, rows = _search(environment, max_states)
    weights, codes = _collision_free(rows)
    order = np.argsort(codes)
    sorted_codes, sorted_place = codes[order], order.astype(np.int32)

    def state_index(state):
        code = jnp.sum(_entries(state) * jnp.asarray(weights), dtype=jnp.uint32)
        place = jnp.searchsorted(jnp.asarray(sorted_codes), code)
        return jnp.asarray(sorted_place)[jnp.minimum(place, len(sorted_place) - 1)]

    listed = environment._replace(enumerate=lambda: states, state_index=state_index)
    return listed._replace(max_length=len(enumerate_graph(listed).levels) - 1)


def _search(environment: Environment, max_states: int) -> tuple[State, np.ndarray]:
    """All states [S, ...] that can be reached, and their entries [S, F]."""
    actions = jnp.arange(environment.num_actions, dtype=jnp.int32)

    @jax.jit
    @jax.vmap
    def expand(state):
        children = jax.vmap(environment.step, (None, 0))(state, actions)
        return environment.forward_mask(state), children, jax.vmap(_entries)(children)

    source = jax.tree.map(jnp.asarray, environment.initial(jax.random.key(0)))
    frontier = jax.tree.map(lambda leaf: np.asarray(leaf)[None], source)
    rows = np.asarray(_entries(source))[None]
    levels: list[tuple[State, np.ndarray]] = []
    seen: set[bytes] = set()
    while True:
        fresh = []
        for place, code in enumerate(map(bytes, rows)):
            if code not in seen:
                seen.add(code)
                fresh.append(place)
        if not fresh:
            break
        if len(seen) > max_states:
            raise ValueError(f"The environment has more than max_states = {max_states} states.")
        frontier, rows = jax.tree.map(lambda leaf, f=fresh: leaf[f], (frontier, rows))
        levels.append((frontier, rows))
        # Sizes are powers of two, so that few programs are compiled.
        size = 1 << (len(fresh) - 1).bit_length()
        padded = jax.tree.map(lambda leaf, n=size: np.resize(leaf, (n, *leaf.shape[1:])), frontier)
        mask, children, child_rows = jax.tree.map(np.asarray, expand(padded))
        mask = mask & (np.arange(size) < len(fresh))[:, None]
        frontier, rows = jax.tree.map(lambda leaf, m=mask: leaf[m], (children, child_rows))
    return jax.tree.map(lambda *parts: np.concatenate(parts), *levels)


def _entries(state: State) -> jax.Array:
    """[F] uint32, all entries of a state."""
    leaves = [jnp.ravel(leaf).astype(jnp.int32) for leaf in jax.tree.leaves(state)]
    return jax.lax.bitcast_convert_type(jnp.concatenate(leaves), jnp.uint32)


def _collision_free(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Weights [F] uint32 whose sums over the rows all differ, modulo 2^32, and the sums [S]."""
    rng = np.random.default_rng(0)
    while True:
        weights: Any = rng.integers(1, 2**32, rows.shape[1], dtype=np.uint32)
        codes: Any = np.sum(rows * weights, axis=1, dtype=np.uint32)
        if len(np.unique(codes)) == len(rows):
            return weights, codes

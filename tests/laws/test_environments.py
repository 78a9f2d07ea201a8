"""Laws of every environment that can be enumerated. A new environment is one row of ``SMALL`` or
of ``ENVIRONMENTS``.

Each law is a function that raises ``AssertionError``, so that planted bugs are shown to raise.
"""

from __future__ import annotations

import functools
import sys
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "gflownet"))

from small_environments import (
    DIAMOND_EDGES,
    DIAMOND_LOG_REWARD,
    SMALL,
    diamond,
    from_edges,
    sets,
    tabulate,
)

from gflownet.environments import hypergrid

ENVIRONMENTS = {
    **SMALL,
    "hypergrid_1x2": lambda: hypergrid(dim=1, side=2),
    "hypergrid_1x9": lambda: hypergrid(dim=1, side=9),
    "hypergrid_2x8": hypergrid,
    "hypergrid_4x3": lambda: hypergrid(dim=4, side=3),
    "sets_6_6": lambda: sets(6, 6),
}


class Everything(NamedTuple):
    """All functions at all states and actions, as numpy arrays; states are rows of numbers."""

    states: np.ndarray  # [S, F]
    forward: np.ndarray  # [S, A]
    backward: np.ndarray  # [S, A]
    index: np.ndarray  # [S]
    observation: np.ndarray  # [S, O]
    stepped: np.ndarray  # [S, A, F]
    stepped_index: np.ndarray  # [S, A]
    stepped_backward: np.ndarray  # [S, A, A]
    stepped_undone: np.ndarray  # [S, A, F]
    undone: np.ndarray  # [S, A, F]
    undone_forward: np.ndarray  # [S, A, A]
    undone_stepped: np.ndarray  # [S, A, F]


@functools.lru_cache(maxsize=64)
def everything(environment) -> Everything:
    e = environment

    def row(state):
        return jnp.concatenate(
            [jnp.ravel(leaf).astype(jnp.float32) for leaf in jax.tree.leaves(state)]
        )

    def at_action(state, action):
        stepped, undone = e.step(state, action), e.undo(state, action)
        return {
            "stepped": row(stepped),
            "stepped_index": e.state_index(stepped),
            "stepped_backward": e.backward_mask(stepped),
            "stepped_undone": row(e.undo(stepped, action)),
            "undone": row(undone),
            "undone_forward": e.forward_mask(undone),
            "undone_stepped": row(e.step(undone, action)),
        }

    @jax.jit
    @jax.vmap
    def at_state(state):
        actions = jnp.arange(e.num_actions, dtype=jnp.int32)
        return Everything(
            states=row(state),
            forward=e.forward_mask(state),
            backward=e.backward_mask(state),
            index=e.state_index(state),
            observation=row(e.observe(state)),
            **jax.vmap(at_action, (None, 0))(state, actions),
        )

    return jax.tree.map(np.asarray, at_state(jax.tree.map(jnp.asarray, e.enumerate())))


def check_masks(environment):
    """Masks are [A] bool at every state."""
    for mask in (everything(environment).forward, everything(environment).backward):
        assert mask.dtype == bool
        assert mask.shape[1:] == (environment.num_actions,)


def check_shapes(environment):
    """``step`` and ``undo`` keep structure, shapes and dtypes, also for forbidden actions."""
    initial = environment.initial(jax.random.key(1))
    like = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), initial)
    action = jnp.zeros((), jnp.int32)
    for out in (
        jax.tree.map(lambda leaf: jnp.asarray(leaf)[0], environment.enumerate()),
        jax.eval_shape(environment.step, initial, action),
        jax.eval_shape(environment.undo, initial, action),
    ):
        assert jax.tree.structure(out) == jax.tree.structure(like)
        for leaf, expected in zip(jax.tree.leaves(out), jax.tree.leaves(like), strict=True):
            assert (leaf.shape, leaf.dtype) == (expected.shape, expected.dtype)
    reward = jax.eval_shape(lambda s: environment.log_reward((), s), initial)
    assert reward.shape == ()
    assert jnp.issubdtype(reward.dtype, jnp.floating)


def _check_inverse(states, moved, allowed, mask_back, returned):
    actions = np.arange(allowed.shape[1])
    assert mask_back[:, actions, actions][allowed].all(), "the way back is not allowed"
    same = (returned == states[:, None]).all(-1)
    assert same[allowed].all(), "the way back leads elsewhere"
    assert not (moved == states[:, None]).all(-1)[allowed].any(), "an action that does nothing"


def check_step_then_undo(environment):
    """Undoing an allowed action is allowed, and gives the state before it."""
    e = everything(environment)
    _check_inverse(e.states, e.stepped, e.forward, e.stepped_backward, e.stepped_undone)


def check_undo_then_step(environment):
    """Doing again what was undone is allowed, and gives the state before."""
    e = everything(environment)
    _check_inverse(e.states, e.undone, e.backward, e.undone_forward, e.undone_stepped)


def check_index(environment):
    """``state_index`` is the inverse of ``enumerate``, for successors as well."""
    e = everything(environment)
    assert np.issubdtype(e.index.dtype, np.integer)
    np.testing.assert_array_equal(e.index, np.arange(len(e.index)))
    assert len(np.unique(e.states, axis=0)) == len(e.states)
    place = e.stepped_index[e.forward]
    assert ((place >= 0) & (place < len(e.states))).all(), "a successor is not enumerated"
    np.testing.assert_array_equal(e.stepped[e.forward], e.states[place])


def check_ends(environment):
    """Only the source has no parent; there are terminal states; their log rewards are finite."""
    tables = tabulate(environment)
    orphans = np.flatnonzero(~tables.backward.any(axis=1))
    np.testing.assert_array_equal(orphans, [tables.source])
    assert not tables.is_terminal[tables.source]
    assert tables.is_terminal.any()
    assert np.isfinite(tables.log_reward[tables.is_terminal]).all()


def check_paths(environment):
    """No cycle, every state can be reached, and the longest path has ``max_length`` actions."""
    tables = tabulate(environment)
    waiting = np.bincount(tables.children[tables.forward], minlength=len(tables.forward))
    longest = np.full(len(waiting), -1)
    longest[tables.source] = 0
    ready, done = [tables.source], 0
    assert waiting[tables.source] == 0, "the source has a predecessor"
    while ready:
        state = ready.pop()
        done += 1
        for child in tables.children[state][tables.forward[state]]:
            longest[child] = max(longest[child], longest[state] + 1)
            waiting[child] -= 1
            if waiting[child] == 0:
                ready.append(child)
    assert done == len(waiting), "a cycle, or states that cannot be reached"
    assert longest.max() == environment.max_length
    assert longest[tables.is_terminal].max() == environment.max_length


def check_stop(environment):
    """A stop ends: what it leads to is terminal, and undoing the stop is the only way back."""
    tables, stop = tabulate(environment), environment.stop_action
    if stop is None:
        return
    stopped = tables.children[:, stop][tables.forward[:, stop]]
    assert len(stopped) > 0
    assert tables.is_terminal[stopped].all()
    np.testing.assert_array_equal(np.sort(stopped), np.flatnonzero(tables.is_terminal))
    assert (tables.backward[stopped].sum(axis=1) == 1).all()
    assert tables.backward[stopped, stop].all()
    assert not tables.backward[~tables.is_terminal, stop].any()


def check_observations(environment):
    """Finite, of one shape, and different at states that offer a choice."""
    tables = tabulate(environment)
    seen = everything(environment).observation
    assert np.isfinite(seen).all()
    for mask in (tables.forward, tables.backward):
        with_choice = seen[mask.sum(axis=1) > 1]
        assert len(np.unique(with_choice, axis=0)) == len(with_choice)


def check_log_z(environment):
    """``log_z``, where given, is the log of the sum of the rewards (float32: 1e-5)."""
    if environment.log_z is not None:
        tables = tabulate(environment)
        log_z = np.logaddexp.reduce(tables.log_reward[tables.is_terminal].astype(np.float64))
        np.testing.assert_allclose(environment.log_z, log_z, atol=1e-5)


def check_intermediate_energy(environment):
    """0 at the source, and -log R at terminal states."""
    if environment.intermediate_energy is not None:
        tables = tabulate(environment)
        energy = jax.vmap(environment.intermediate_energy, (None, 0))((), tables.states)
        energy = np.asarray(energy)
        assert energy[tables.source] == 0.0
        end = tables.is_terminal
        np.testing.assert_allclose(energy[end], -tables.log_reward[end], atol=1e-5)


@functools.cache
def environment_of(name):
    return ENVIRONMENTS[name]()


LAWS = [
    check_masks,
    check_shapes,
    check_step_then_undo,
    check_undo_then_step,
    check_index,
    check_ends,
    check_paths,
    check_stop,
    check_observations,
    check_log_z,
    check_intermediate_energy,
]


@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.__name__)
@pytest.mark.parametrize("name", ENVIRONMENTS)
def test_law(name, law):
    law(environment_of(name))


def test_walks_end_within_max_length():
    # On an environment too large to enumerate, uniform walks end and never exceed max_length.
    environment = hypergrid(dim=12, side=6)
    assert environment.enumerate is None

    @jax.jit
    @jax.vmap
    def walk(key):
        def body(t, loop):
            state, length = loop
            mask = environment.forward_mask(state)
            # Stopping is left out while anything else is allowed: the longest walks.
            rest = mask.at[environment.stop_action].set(False)
            mask = jnp.where(rest.any(), rest, mask)
            action = jax.random.categorical(jax.random.fold_in(key, t), jnp.where(mask, 0.0, -1e9))
            moves = mask.any()
            new = environment.step(state, action.astype(jnp.int32))
            state = jax.tree.map(lambda a, b: jnp.where(moves, a, b), new, state)
            return state, length + moves

        start = environment.initial(key)
        return jax.lax.fori_loop(0, environment.max_length + 5, body, (start, 0))

    state, length = walk(jax.random.split(jax.random.key(0), 8))
    assert (length == environment.max_length).all()
    assert state.stopped.all()
    assert (state.position == 5).all()


# Planted bugs: each is caught by the law that it names.

GRID = hypergrid(dim=2, side=4)
SETS = sets()
CYCLE = [*DIAMOND_EDGES, (0, 3, 2)]
UNREACHABLE = from_edges([*DIAMOND_EDGES, (6, 1, 1)], [*DIAMOND_LOG_REWARD, 0.0], 4, 3)
BUGS = {
    "forward mask open at the border": (
        check_step_then_undo,
        GRID._replace(
            forward_mask=lambda s: jnp.append(s.position < 4, True) & ~s.stopped  # side is 4
        ),
    ),
    "backward mask open at the corner": (
        check_undo_then_step,
        GRID._replace(
            backward_mask=lambda s: jnp.append((s.position >= 0) & ~s.stopped, s.stopped)
        ),
    ),
    "backward mask of the parent": (
        check_step_then_undo,
        GRID._replace(backward_mask=lambda s: GRID.backward_mask(GRID.undo(s, 0))),
    ),
    "undo of the wrong coordinate": (
        check_step_then_undo,
        GRID._replace(undo=lambda s, a: GRID.undo(s, jnp.where(a < 2, 1 - a, a))),
    ),
    "undo of a stop forgets to restart": (
        check_step_then_undo,
        GRID._replace(undo=lambda s, a: GRID.undo(s, a)._replace(stopped=s.stopped)),
    ),
    "a cycle": (check_paths, from_edges(CYCLE, DIAMOND_LOG_REWARD, 4, 3)),
    "a state out of reach": (check_paths, UNREACHABLE),
    "a second source": (check_ends, UNREACHABLE),
    "max_length without the stop": (check_paths, GRID._replace(max_length=6)),
    "max_length too large": (check_paths, diamond()._replace(max_length=4)),
    "walking on after the stop": (
        check_stop,
        GRID._replace(forward_mask=lambda s: jnp.append(s.position < 3, ~s.stopped)),
    ),
    "several parents of a stop": (
        check_stop,
        GRID._replace(backward_mask=lambda s: jnp.append(s.position > 0, s.stopped)),
    ),
    "a step that changes dtype": (
        check_shapes,
        GRID._replace(
            step=lambda s, a: GRID.step(s, a)._replace(position=s.position.astype(float))
        ),
    ),
    "a mask of numbers": (
        check_masks,
        GRID._replace(forward_mask=lambda s: GRID.forward_mask(s).astype(jnp.int32)),
    ),
    "index of the reversed position": (
        check_index,
        GRID._replace(
            state_index=lambda s: GRID.state_index(s._replace(position=s.position[::-1]))
        ),
    ),
    "enumeration without the complete sets": (
        check_index,
        SETS._replace(enumerate=lambda: SETS.enumerate()[SETS.enumerate().sum(1) < 3]),
    ),
    "a reward of zero": (
        check_ends,
        SETS._replace(log_reward=lambda p, s: jnp.where(s[0] & s[1] & s[2], -jnp.inf, 0.0)),
    ),
    "states that look alike": (
        check_observations,
        GRID._replace(observe=lambda s: s.position.sum(keepdims=True)),
    ),
    "log Z of sets with repeats": (check_log_z, SETS._replace(log_z=SETS.log_z + 0.01)),
    "energy of the empty set": (
        check_intermediate_energy,
        SETS._replace(intermediate_energy=lambda p, s: 1.0 - SETS.log_reward(p, s)),
    ),
}


@pytest.mark.parametrize("bug", BUGS)
def test_planted_bug_is_caught(bug):
    law, environment = BUGS[bug]
    with pytest.raises(AssertionError):
        law(environment)

"""Whether an environment keeps its contract: ``check_environment`` says what is wrong with it.

    from gflownet.testing import check_environment
    check_environment(mine())

All states are looked at where the environment enumerates them, and otherwise those that uniform
random walks visit on the way to the end and back to the source. What is checked:

- masks are [A] bool, and functions keep structure, shapes and dtypes of a state;
- undoing an allowed action leads back, and so does doing again what was undone;
- every walk ends within ``max_length``, forwards and backwards, and backwards at the source;
- after a stop nothing is allowed, and only the stop can be undone;
- rewards of terminal states are finite numbers; the intermediate energy is 0 at the source and
  -log R at the end;
- observations are finite, and differ where a choice has to be made;
- where actions have values: charts are shaped as they must be, and hold the values of the way back;
- and with an enumeration: ``state_index`` is its inverse, only the source has no parent, every
  state can be reached, the longest path has ``max_length`` actions, and ``log_z`` is right.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ebjax.types import Params
from gflownet.types import Environment, State

__all__ = ["EnvironmentCheckError", "check_environment"]

_MAX_SHOWN = 300


class EnvironmentCheckError(AssertionError):
    """What an environment does that its contract forbids."""


class _Tables(NamedTuple):
    """All functions at some states (and all actions), as numpy arrays.

    Attributes:
      states: [S, ...].
      is_enumerated: whether these are all, in their order.
      forward: [S, A] masks.
      backward: [S, A].
      stepped: [S, A, ...] ``step(s, a)``.
      can_return: [S, A] whether ``backward_mask`` of that allows ``a``.
      returned: [S, A, ...] ``undo(step(s, a), a)``.
      undone: [S, A, ...] ``undo(s, a)``.
      can_repeat: [S, A].
      repeated: [S, A, ...] ``step(undo(s, a), a)``.
      child: [S, A] index of ``step(s, a)``, where states are enumerated.
      own_place: [S] index of the state itself.
      observation: [S, O].
      log_reward: [S].
      energy: [S] intermediate energy, zeros where there is none.
    """

    states: State
    is_enumerated: bool
    forward: np.ndarray
    backward: np.ndarray
    stepped: State
    can_return: np.ndarray
    returned: State
    undone: State
    can_repeat: np.ndarray
    repeated: State
    child: np.ndarray
    own_place: np.ndarray
    observation: np.ndarray
    log_reward: np.ndarray
    energy: np.ndarray

    @property
    def is_terminal(self) -> np.ndarray:
        """[S] bool."""
        return np.logical_not(self.forward.any(axis=1))

    @property
    def is_source(self) -> np.ndarray:
        """[S] bool: states without parents."""
        return np.logical_not(self.backward.any(axis=1))


def check_environment(
    environment: Environment,
    *,
    reward_params: Params = (),
    num_walks: int = 64,
    max_states: int = 5000,
    seed: int = 0,
) -> None:
    """Checks the contract of ``gflownet.types.Environment``.

    Args:
      environment: what is checked.
      reward_params: parameters of its reward.
      num_walks: random walks from the source to the end and back.
      max_states: up to this number all states are looked at where they are enumerated; of visited
        states at most so many.
      seed: of the walks.

    Raises:
      EnvironmentCheckError: naming the first rule that is broken, with the state and the action.

    >>> from gflownet.environments import hypergrid
    >>> check_environment(hypergrid(dim=2, side=4))
    >>> check_environment(hypergrid(dim=2, side=4)._replace(max_length=5))
    Traceback (most recent call last):
    ...
    gflownet.testing.EnvironmentCheckError: A walk goes on after max_length = 5 actions.
    """
    _check_shapes(environment, reward_params)
    if environment.value_dim:
        from gflownet.testing_values import check_valued_environment

        check_valued_environment(
            environment, reward_params=reward_params, num_walks=num_walks, seed=seed
        )
        return
    walks = _walk(environment, jax.random.key(seed), num_walks)
    tables = _tabulate(environment, reward_params, walks, max_states)
    # The causes before their consequences: a mask that is wrong lets walks go astray.
    _check_inverse(tables)
    _check_walks(environment, walks)
    _check_stop(environment, tables)
    _check_rewards(environment, tables)
    _check_observations(tables)
    if tables.is_enumerated:
        _check_enumeration(environment, tables)
        _check_paths(environment, tables)
        _check_log_z(environment, tables)


def _require(condition: Any, message: str) -> None:
    if not condition:
        raise EnvironmentCheckError(message)


def _row(tree: State, *place: Any) -> State:
    return jax.tree.map(lambda leaf: np.asarray(leaf)[place], tree)


def _show(state: State) -> str:
    """The state as plain lists, cut where it is long."""
    plain = jax.tree.map(lambda leaf: np.asarray(leaf).tolist(), state)
    text = str(plain)
    return text if len(text) <= _MAX_SHOWN else text[:_MAX_SHOWN] + "..."


def _same(left: State, right: State, num_axes: int) -> np.ndarray:
    """Whether states are equal, over their first ``num_axes`` axes."""
    equal = [
        np.asarray(a == b).reshape(*a.shape[:num_axes], -1).all(axis=-1)
        for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True)
    ]
    return np.logical_and.reduce(equal)


def _kind(state: State) -> Any:
    """The state with ``dtype[shape]`` for each array."""
    return jax.tree.map(lambda leaf: f"{leaf.dtype}{list(leaf.shape)}", state)


def _check_shapes(environment: Environment, reward_params: Params) -> None:
    initial = environment.initial(jax.random.key(0))
    like = _kind(jax.eval_shape(lambda: initial))
    action = environment.action(0)
    results = {
        "step": jax.eval_shape(environment.step, initial, action),
        "undo": jax.eval_shape(environment.undo, initial, action),
    }
    if environment.enumerate is not None:
        states = environment.enumerate()
        results["enumerate"] = jax.eval_shape(
            lambda: jax.tree.map(lambda leaf: jnp.asarray(leaf)[0], states)
        )
    for name, result in results.items():
        _require(
            _kind(result) == like, f"{name} makes a state {_kind(result)}; initial makes {like}."
        )
    for name in ("forward_mask", "backward_mask"):
        mask = jax.eval_shape(getattr(environment, name), initial)
        _require(
            mask.shape == (environment.num_actions,) and mask.dtype == bool,
            f"{name} is {mask.dtype}{list(mask.shape)}; it must be "
            f"bool[{environment.num_actions}], one for each of num_actions.",
        )
    reward = jax.eval_shape(lambda state: environment.log_reward(reward_params, state), initial)
    _require(
        reward.shape == () and jnp.issubdtype(reward.dtype, jnp.floating),
        f"log_reward is {reward.dtype}{list(reward.shape)}; it must be one floating-point number.",
    )
    _require(
        environment.forward_mask(initial).any(), "At the source, forward_mask allows no action."
    )


class _Walks(NamedTuple):
    """Uniform walks to the end and back.

    Attributes:
      start: [N, ...] the source.
      path: [T, N, ...] states on the way to the end, which is repeated.
      is_too_long: [N] whether something is allowed after T actions.
      source: [N, ...] where the walks back end.
      back: [T, N, ...] states on the way there.
      is_not_back: [N] whether something can be undone after T actions back.
    """

    start: State
    path: State
    is_too_long: np.ndarray
    source: State
    back: State
    is_not_back: np.ndarray


def _walk(environment: Environment, key: jax.Array, num_walks: int) -> _Walks:

    def walk(keys, start, mask_fn, move_fn):
        def body(carry, t):
            state = carry
            mask = jax.vmap(mask_fn)(state)
            step_keys = jax.vmap(jax.random.fold_in, (0, None))(keys, t)
            scores = jnp.where(mask, 0.0, -jnp.inf)
            gumbel = jax.vmap(lambda k: jax.random.gumbel(k, (environment.num_actions,)))(step_keys)
            action = jnp.argmax(scores + gumbel, axis=-1).astype(jnp.int32)
            moved = jax.vmap(move_fn)(state, action)
            goes_on = mask.any(axis=-1)
            state = jax.tree.map(
                lambda new, old: jnp.where(
                    goes_on.reshape(-1, *[1] * (new.ndim - 1)), new.astype(old.dtype), old
                ),
                moved,
                state,
            )
            return state, state

        end, path = jax.lax.scan(body, start, jnp.arange(environment.max_length))
        return end, path, jax.vmap(mask_fn)(end).any(axis=-1)

    @jax.jit
    def both(keys):
        start = jax.vmap(environment.initial)(keys)
        end, path, too_long = walk(keys, start, environment.forward_mask, environment.step)
        source, back, not_back = walk(keys, end, environment.backward_mask, environment.undo)
        return _Walks(start, path, too_long, source, back, not_back)

    return jax.tree.map(np.asarray, both(jax.random.split(key, num_walks)))


def _check_walks(environment: Environment, walks: _Walks) -> None:
    length = environment.max_length
    _require(not walks.is_too_long.any(), f"A walk goes on after max_length = {length} actions.")
    place = int(walks.is_not_back.argmax())
    _require(
        not walks.is_not_back.any(),
        f"A walk back goes on after max_length = {length} actions, at "
        f"{_show(_row(walks.source, place))}.",
    )
    is_back = _same(walks.source, walks.start, 1)
    place = int((~is_back).argmax())
    _require(
        is_back.all(),
        f"A walk back ends at {_show(_row(walks.source, place))}, where backward_mask allows "
        f"nothing; the source is {_show(_row(walks.start, place))}.",
    )


def _tabulate(
    environment: Environment, reward_params: Params, walks: _Walks, max_states: int
) -> _Tables:
    is_enumerated = False
    if environment.enumerate is not None and environment.state_index is not None:
        everything = jax.tree.map(np.asarray, environment.enumerate())
        if len(jax.tree.leaves(everything)[0]) <= max_states:
            states, is_enumerated = everything, True
    if not is_enumerated:
        states = jax.tree.map(
            lambda first, *rest: np.concatenate(
                [first, *(each.reshape(-1, *each.shape[2:]) for each in rest)]
            ),
            walks.start,
            walks.path,
            walks.back,
        )
        flat = np.concatenate(
            [np.asarray(leaf).reshape(len(leaf), -1) for leaf in jax.tree.leaves(states)], axis=1
        )
        _, first = np.unique(flat, axis=0, return_index=True)
        kept = np.random.default_rng(0).permutation(first)[:max_states]
        states = jax.tree.map(lambda leaf: leaf[kept], states)
    index_fn = environment.state_index if is_enumerated else None
    energy_fn = environment.intermediate_energy

    def at_action(state, action):
        stepped, undone = environment.step(state, action), environment.undo(state, action)
        return {
            "stepped": stepped,
            "can_return": environment.backward_mask(stepped)[action],
            "returned": environment.undo(stepped, action),
            "undone": undone,
            "can_repeat": environment.forward_mask(undone)[action],
            "repeated": environment.step(undone, action),
            "child": jnp.zeros((), jnp.int32) if index_fn is None else index_fn(stepped),
        }

    def at_state(state):
        actions = jnp.arange(environment.num_actions, dtype=jnp.int32)
        observation = jax.tree.leaves(environment.observe(state))
        return {
            **jax.vmap(at_action, (None, 0))(state, actions),
            "forward": environment.forward_mask(state),
            "backward": environment.backward_mask(state),
            "own_place": jnp.zeros((), jnp.int32) if index_fn is None else index_fn(state),
            "observation": jnp.concatenate(
                [jnp.ravel(leaf).astype(jnp.result_type(float)) for leaf in observation]
            ),
            "log_reward": environment.log_reward(reward_params, state),
            "energy": jnp.zeros(()) if energy_fn is None else energy_fn(reward_params, state),
        }

    @jax.jit
    def at_all(states):
        return jax.lax.map(at_state, states, batch_size=1024)

    values = jax.tree.map(np.asarray, at_all(jax.tree.map(jnp.asarray, states)))
    return _Tables(states=states, is_enumerated=is_enumerated, **values)


def _check_inverse(tables: _Tables) -> None:
    num_actions = tables.forward.shape[1]
    here = jax.tree.map(
        lambda leaf: np.broadcast_to(leaf[:, None], (len(leaf), num_actions, *leaf.shape[1:])),
        tables.states,
    )
    ways = (
        ("forward_mask", tables.forward, tables.stepped, tables.can_return, tables.returned),
        ("backward_mask", tables.backward, tables.undone, tables.can_repeat, tables.repeated),
    )
    for name, allowed, there, can_return, returned in ways:
        other = "backward_mask" if name == "forward_mask" else "forward_mask"
        problems = (
            (_same(there, here, 2), "which changes nothing"),
            (~can_return, f"but {other} there does not allow the way back"),
            (~_same(returned, here, 2), "but the way back does not lead here"),
        )
        for is_wrong, what in problems:
            wrong = np.argwhere(allowed & is_wrong)
            if len(wrong):
                state, action = map(int, wrong[0])
                raise EnvironmentCheckError(
                    f"{name} allows action {action} at {_show(_row(tables.states, state))}, "
                    f"{what}; it leads to {_show(_row(there, state, action))}."
                )


def _check_stop(environment: Environment, tables: _Tables) -> None:
    stop = environment.stop_action
    if stop is None:
        return
    ends, others = tables.is_terminal, ~tables.is_terminal
    for is_wrong, what in (
        (ends & ~tables.backward[:, stop], "is terminal, and undoing the stop is not allowed"),
        (ends & (tables.backward.sum(axis=1) != 1), "is terminal, and more than the stop leads to"),
        (others & tables.backward[:, stop], "is not terminal, and a stop can be undone"),
    ):
        if is_wrong.any():
            place = int(is_wrong.argmax())
            raise EnvironmentCheckError(f"{_show(_row(tables.states, place))} {what} there.")


def _check_rewards(environment: Environment, tables: _Tables) -> None:
    ends = tables.is_terminal
    _require(ends.any(), "No state is terminal.")
    is_wrong = ends & ~np.isfinite(tables.log_reward)
    place = int(is_wrong.argmax())
    _require(
        not is_wrong.any(),
        f"log_reward is {tables.log_reward[place]} at {_show(_row(tables.states, place))}; "
        "the reward of a terminal state is positive and finite.",
    )
    if environment.intermediate_energy is None:
        return
    expected = np.where(ends, -tables.log_reward, 0.0)
    is_known = ends | tables.is_source
    scale = 1e-5 * np.maximum(1.0, np.abs(expected))
    is_wrong = is_known & ~(np.abs(tables.energy - expected) <= scale)
    place = int(is_wrong.argmax())
    _require(
        not is_wrong.any(),
        f"intermediate_energy is {tables.energy[place]} at {_show(_row(tables.states, place))}; "
        f"it must be {expected[place]}, 0 at the source and -log R at the end.",
    )


def _check_observations(tables: _Tables) -> None:
    is_wrong = ~np.isfinite(tables.observation).all(axis=1)
    place = int(is_wrong.argmax())
    _require(
        not is_wrong.any(),
        f"The observation of {_show(_row(tables.states, place))} is not finite.",
    )
    for mask in (tables.forward, tables.backward):
        rows = np.flatnonzero(mask.sum(axis=1) > 1)
        _, first, which = np.unique(
            tables.observation[rows], axis=0, return_index=True, return_inverse=True
        )
        twins = np.flatnonzero(first[which.ravel()] != np.arange(len(rows)))
        if len(twins):
            one, other = rows[first[which.ravel()[twins[0]]]], rows[twins[0]]
            raise EnvironmentCheckError(
                f"{_show(_row(tables.states, one))} and {_show(_row(tables.states, other))} have "
                "the same observation, and each has a choice to make."
            )


def _check_enumeration(environment: Environment, tables: _Tables) -> None:
    size = len(tables.own_place)
    place = int((tables.own_place != np.arange(size)).argmax())
    _require(
        np.array_equal(tables.own_place, np.arange(size)),
        f"state_index of state {place} of enumerate() is {tables.own_place[place]}.",
    )
    flat = np.concatenate(
        [np.asarray(leaf).reshape(size, -1) for leaf in jax.tree.leaves(tables.states)], axis=1
    )
    _require(len(np.unique(flat, axis=0)) == size, "enumerate() gives a state twice.")
    inside = (tables.child >= 0) & (tables.child < size)
    listed = jax.tree.map(lambda leaf: leaf[np.where(inside, tables.child, 0)], tables.states)
    is_wrong = tables.forward & ~(inside & _same(tables.stepped, listed, 2))
    if is_wrong.any():
        state, action = map(int, np.argwhere(is_wrong)[0])
        raise EnvironmentCheckError(
            f"{_show(_row(tables.stepped, state, action))} is not where state_index says in "
            f"enumerate(); action {action} leads to it from {_show(_row(tables.states, state))}."
        )
    assert environment.state_index is not None
    source = int(environment.state_index(environment.initial(jax.random.key(0))))
    orphans = np.flatnonzero(tables.is_source)
    others = orphans[orphans != source]
    _require(
        len(others) == 0,
        f"{_show(_row(tables.states, *others[:1]))} has no parent; only the source may have none.",
    )


def _check_paths(environment: Environment, tables: _Tables) -> None:
    """Visits states after all their parents, with the length of the longest path to each."""
    waiting = np.bincount(tables.child[tables.forward], minlength=len(tables.forward))
    longest = np.zeros(len(waiting), int)
    ready, num_done = list(np.flatnonzero(tables.is_source)), 0
    while ready:
        state = ready.pop()
        num_done += 1
        for child in tables.child[state][tables.forward[state]]:
            longest[child] = max(longest[child], longest[state] + 1)
            waiting[child] -= 1
            if waiting[child] == 0:
                ready.append(child)
    left = np.flatnonzero(waiting > 0)
    _require(
        num_done == len(waiting),
        f"{_show(_row(tables.states, *left[:1]))} is on a cycle, or behind one.",
    )
    _require(
        longest.max() == environment.max_length,
        f"max_length is {environment.max_length}; the longest path has {longest.max()} actions.",
    )


def _check_log_z(environment: Environment, tables: _Tables) -> None:
    if environment.log_z is None:
        return
    exact = float(np.logaddexp.reduce(tables.log_reward[tables.is_terminal].astype(np.float64)))
    _require(
        abs(environment.log_z - exact) <= 1e-5 * max(1.0, abs(exact)),
        f"log_z is {environment.log_z}; the rewards of terminal states sum to exp({exact:.6f}).",
    )

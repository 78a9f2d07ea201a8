"""The checks of ``gflownet.testing`` for environments whose actions have values.

States cannot be listed, so walks are looked at: indices uniform over what is allowed, values
uniform in their charts. Positions are compared up to rounding, everything else exactly.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ebjax.types import Params
from gflownet.testing import EnvironmentCheckError, _require, _row, _show
from gflownet.types import ChartedObservation, Environment, State

__all__ = ["check_valued_environment"]

_ROUNDING = 1e-5


class _Steps(NamedTuple):
    """One direction of walks, [T, N, ...].

    Attributes:
      moves: whether something was allowed.
      state: where the step starts.
      action: what was drawn.
      chart: the charts of the state in this direction.
      moved: where it leads.
      can_return: whether the other mask there allows the index.
      returned: where the way back leads.
      back_chart: the charts there in the other direction.
    """

    moves: np.ndarray
    state: State
    action: Any
    chart: Any
    moved: State
    can_return: np.ndarray
    returned: State
    back_chart: Any


def check_valued_environment(
    environment: Environment,
    *,
    reward_params: Params = (),
    num_walks: int = 64,
    seed: int = 0,
) -> None:
    """Checks the contract of an environment with ``value_dim`` above 0.

    Args:
      environment: what is checked.
      reward_params: parameters of its reward.
      num_walks: random walks from the source to the end and back.
      seed: of the walks.

    Raises:
      EnvironmentCheckError: naming the first rule that is broken, with the state and the action.
    """
    _check_charts(environment)
    start, ahead, end, back, source, values = _walk(
        environment, reward_params, jax.random.key(seed), num_walks
    )
    for steps, name, other in (
        (ahead, "forward", "backward"),
        (back, "backward", "forward"),
    ):
        _check_steps(steps, name, other)
    length = environment.max_length
    _require(not values["too_long"].any(), f"A walk goes on after max_length = {length} actions.")
    _require(
        not values["not_back"].any(), f"A walk back goes on after max_length = {length} actions."
    )
    is_back = _near(source, start, 1)
    place = int((~is_back).argmax())
    _require(
        is_back.all(),
        f"A walk back ends at {_show(_row(source, place))}, where backward_mask allows nothing; "
        f"the source is {_show(_row(start, place))}.",
    )
    stop = environment.stop_action
    if stop is not None:
        undone = values["undone_last"]
        is_wrong = (undone.sum(axis=1) != 1) | ~undone[:, stop]
        place = int(is_wrong.argmax())
        _require(
            not is_wrong.any(),
            f"{_show(_row(end, place))} is terminal, and more or less than the stop leads there.",
        )
    is_wrong = ~np.isfinite(values["log_reward"])
    place = int(is_wrong.argmax())
    _require(
        not is_wrong.any(),
        f"log_reward is {values['log_reward'][place]} at {_show(_row(end, place))}; the reward of "
        "a terminal state is positive and finite.",
    )


def _check_charts(environment: Environment) -> None:
    observation = environment.observe(environment.initial(jax.random.key(0)))
    _require(
        isinstance(observation, ChartedObservation),
        f"observe makes a {type(observation).__name__}; where actions have values it must make a "
        "ChartedObservation.",
    )
    actions, dim = environment.num_actions, environment.value_dim
    expected = [(actions, dim), (actions, dim), (actions,)]
    for name in ("forward", "backward"):
        shapes = [leaf.shape for leaf in getattr(observation, name)]
        _require(
            shapes == expected,
            f"The arrays of the {name} chart are {shapes}; they must be {expected}.",
        )


def _walk(environment: Environment, reward_params: Params, key: jax.Array, num_walks: int):
    """Walks to the end and back, and what else is looked at, as numpy arrays."""

    def directions(is_forward):
        pair = (environment.forward_mask, environment.step)
        other = (environment.backward_mask, environment.undo)
        names = ("forward", "backward")
        return (*pair, *other, *names) if is_forward else (*other, *pair, *names[::-1])

    def take(key, state, is_forward):
        mask_fn, move_fn, back_mask_fn, back_fn, name, other = directions(is_forward)
        index_key, value_key = jax.random.split(key)
        mask, chart = mask_fn(state), getattr(environment.observe(state), name)
        index = jax.random.categorical(index_key, jnp.where(mask, 0.0, -jnp.inf))
        r = jax.random.uniform(value_key, (environment.value_dim,))
        action = environment.action(index, chart.low[index] + chart.width[index] * r)
        moved = move_fn(state, action)
        moved = jax.tree.map(lambda new, old: jnp.where(mask.any(), new, old), moved, state)
        return moved, _Steps(
            mask.any(),
            state,
            action,
            chart,
            moved,
            back_mask_fn(moved)[index],
            back_fn(moved, action),
            getattr(environment.observe(moved), other),
        )

    def walk(keys, start, is_forward):
        def body(state, t):
            step_keys = jax.vmap(jax.random.fold_in, (0, None))(keys, t)
            return jax.vmap(lambda k, s: take(k, s, is_forward))(step_keys, state)

        return jax.lax.scan(body, start, jnp.arange(environment.max_length))

    @jax.jit
    def both(keys):
        start = jax.vmap(environment.initial)(keys)
        end, ahead = walk(keys, start, True)
        source, back = walk(keys, end, False)
        values = {
            "too_long": jax.vmap(environment.forward_mask)(end).any(axis=-1),
            "not_back": jax.vmap(environment.backward_mask)(source).any(axis=-1),
            "undone_last": jax.vmap(environment.backward_mask)(end),
            "log_reward": jax.vmap(environment.log_reward, (None, 0))(reward_params, end),
        }
        return start, ahead, end, back, source, values

    return jax.tree.map(np.asarray, both(jax.random.split(key, num_walks)))


def _check_steps(steps: _Steps, name: str, other: str) -> None:
    """Each step can be taken back, by an action that the other direction could have drawn."""
    for chart, where in ((steps.chart, name), (steps.back_chart, other)):
        is_fixed = (chart.width == 0).all(axis=-1)
        for is_wrong, what in (
            (~np.isfinite(chart.low) | ~np.isfinite(chart.width), "is not finite"),
            (chart.width < 0, "has a negative width"),
            ((is_fixed & (chart.log_scale != 0))[..., None], "scales a value that is determined"),
        ):
            _require_nowhere(steps, is_wrong.any(axis=(-1, -2)), f"the {where} chart {what}", name)
    index = steps.action.which[..., None, None]
    low = np.take_along_axis(steps.back_chart.low, index, axis=-2)[..., 0, :]
    width = np.take_along_axis(steps.back_chart.width, index, axis=-2)[..., 0, :]
    offset = steps.action.value - low
    is_outside = ((offset < -_ROUNDING) | (offset > width + _ROUNDING)).any(axis=-1)
    returns = _near(steps.returned, steps.state, 2)
    for is_wrong, what in (
        (~steps.can_return, f"but {other}_mask there does not allow the way back"),
        (is_outside, f"but the {other} chart there does not hold the value"),
        (~returns, "but the way back does not lead here"),
    ):
        _require_nowhere(steps, is_wrong, what, name)


def _require_nowhere(steps: _Steps, is_wrong: np.ndarray, what: str, name: str) -> None:
    places = np.argwhere(steps.moves & is_wrong)
    if len(places):
        place = tuple(map(int, places[0]))
        raise EnvironmentCheckError(
            f"{name}_mask allows action {int(steps.action.which[place])} at "
            f"{_show(_row(steps.state, *place))}, {what}; it leads to "
            f"{_show(_row(steps.moved, *place))}.",
        )


def _near(left: State, right: State, num_axes: int) -> Any:
    """Whether states are equal, real numbers up to rounding, over their first axes."""

    def same(a: Any, b: Any) -> Any:
        is_real = np.issubdtype(a.dtype, np.floating)
        equal = np.abs(a - b) <= _ROUNDING if is_real else a == b
        return np.asarray(equal).reshape(*a.shape[:num_axes], -1).all(axis=-1)

    pairs = zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True)
    return np.stack([same(a, b) for a, b in pairs]).all(axis=0)

"""Population based training: members of one recipe whose settings change while they train.

A population of N members trains in one program, each with its own values of some settings. After
every round of updates

    rank        best figure first; a member that diverged is last
    exploit     each of the worst ⌈qN⌉ (at most N/2) takes state and settings of one of as many best
    explore     and changes the settings: each moves by a tenth of its range, up or down, or is
                drawn anew with probability 1/10

The state is copied whole (parameters, averages, the optimizer's moments, chains), but for the key,
so that a copy goes its own way. With several figures, members are ranked by non-dominated sorting,
and within a front by their distance from those that are ranked already, farthest first, in units of
the population's range of each figure.

Jaderberg et al., "Population based training of neural networks", 2017. Dushatskiy, Chebykin,
Alderliesten and Bosman, "Multi-objective population based training", ICML 2023.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ebjax.parallel import AXIS_NAME, data_parallel, side_by_side
from ebjax.training.config import TrainingConfig
from ebjax.training.loop import init_state
from ebjax.training.seeds import stacked_states, unstacked_states
from ebjax.training.update import make_update, make_update_many
from ebjax.types import Recipe, Run, TrainState

__all__ = [
    "Population",
    "Range",
    "hypervolume",
    "non_dominated",
    "rank_members",
    "train_population",
]

_MOVE = 0.1
_REDRAW_PROBABILITY = 0.1


class Range(NamedTuple):
    """Where a setting may be: from ``low`` to ``high``, ``is_log`` where its logarithm counts."""

    low: float
    high: float
    is_log: bool = False

    def check(self, name: str) -> None:
        """Raises ``ValueError`` if it is no range."""
        least = 0.0 if self.is_log else -math.inf
        if not least < self.low < self.high < math.inf:
            above = "above 0 and " if self.is_log else ""
            raise ValueError(f"{name} has the range {self}; it must be {above}from low to high.")

    def value(self, place: np.ndarray) -> np.ndarray:
        """The values at places in [0, 1].

        >>> Range(1.0, 100.0, is_log=True).value(np.array([0.0, 0.5])).round(6).tolist()
        [1.0, 10.0]
        """
        low, high = (math.log(end) if self.is_log else end for end in self[:2])
        values = low + np.asarray(place) * (high - low)
        return np.clip(np.exp(values) if self.is_log else values, self.low, self.high)

    def place(self, value: np.ndarray) -> np.ndarray:
        """The inverse of ``value``."""
        low, high = (math.log(end) if self.is_log else end for end in self[:2])
        values = np.log(value) if self.is_log else np.asarray(value)
        return (values - low) / (high - low)


class Population(NamedTuple):
    """Where a population is after a round.

    Attributes:
      step: updates of each member so far.
      settings: by name [N], those with which the round was trained.
      scores: [N, F] the figures after it, as they were asked for; NaN for members that diverged.
      parents: [N] whose state and settings each member goes on with: itself where nothing is
        copied.
      next_settings: by name [N], of the next round.
      states: N states on the host after the round and the copies.
    """

    step: int
    settings: dict[str, np.ndarray]
    scores: np.ndarray
    parents: np.ndarray
    next_settings: dict[str, np.ndarray]
    states: list[TrainState]


def non_dominated(scores: np.ndarray) -> np.ndarray:
    """[N] bool: the members that no other one is as good as in all figures and better in one.

    Args:
      scores: [N, F], lower is better; members with a NaN are dominated.

    >>> non_dominated(np.array([[1.0, 2.0], [2.0, 1.0], [2.0, 2.0]])).tolist()
    [True, True, False]
    """
    scores = np.where(np.isnan(scores).any(axis=1, keepdims=True), np.inf, scores)
    no_worse = (scores[:, None] <= scores[None]).all(axis=-1)
    better = (scores[:, None] < scores[None]).any(axis=-1)
    return ~(no_worse & better).any(axis=0) & np.isfinite(scores).all(axis=1)


def hypervolume(scores: np.ndarray, reference: Sequence[float]) -> float:
    """Area that members dominate up to a reference point, of two figures, lower is better.

    >>> hypervolume(np.array([[-1.0, -2.0], [-2.0, -1.0]]), (0.0, 0.0))
    3.0
    """
    points = scores[non_dominated(scores)]
    points = np.minimum(points, np.asarray(reference))
    area, edge = 0.0, float(reference[1])
    for first, second in points[np.argsort(points[:, 0])]:
        area += (reference[0] - first) * max(edge - second, 0.0)
        edge = min(edge, second)
    return float(area)


def rank_members(scores: np.ndarray) -> np.ndarray:
    """[N] members, best first.

    Args:
      scores: [N, F], lower is better, NaN is worst.

    >>> rank_members(np.array([[3.0], [np.nan], [1.0]])).tolist()
    [2, 0, 1]
    """
    scores = np.asarray(scores, np.float64)
    is_bad = np.isnan(scores).any(axis=1)
    if scores.shape[1] == 1:
        return np.argsort(np.where(is_bad, np.inf, scores[:, 0]), kind="stable")
    good = scores[~is_bad]
    width = np.ptp(good, axis=0) if len(good) else np.ones(scores.shape[1])
    scaled = scores / np.where(width > 0.0, width, 1.0)
    ranked: list[int] = []
    left = [int(i) for i in np.flatnonzero(~is_bad)]
    while left:
        front = [i for i, first in zip(left, non_dominated(scores[left]), strict=True) if first]
        left = [i for i in left if i not in front]
        while front:
            if ranked:
                gaps = np.linalg.norm(scaled[front][:, None] - scaled[ranked][None], axis=-1)
                chosen = int(np.argmax(gaps.min(axis=1)))
            else:
                chosen = int(np.argmin(scores[front][:, 0]))
            ranked.append(front.pop(chosen))
    return np.array([*ranked, *np.flatnonzero(is_bad)], int)


def _exploit(generator: np.random.Generator, order: np.ndarray, quantile: float) -> np.ndarray:
    """[N] parents: the worst take uniform draws of the best, the others stay themselves."""
    num = len(order)
    num_copied = min(math.ceil(quantile * num), num // 2)
    parents = np.arange(num)
    if num_copied:
        parents[order[-num_copied:]] = generator.choice(order[:num_copied], num_copied)
    return parents


def _explore(
    generator: np.random.Generator,
    settings: Mapping[str, np.ndarray],
    ranges: Mapping[str, Range],
    parents: np.ndarray,
) -> dict[str, np.ndarray]:
    """Settings of the next round; those of members that stay themselves do not change."""
    is_copied = parents != np.arange(len(parents))
    changed = {}
    for name, values in settings.items():
        taken = values[parents]
        signs = generator.choice([-_MOVE, _MOVE], len(parents))
        place = np.clip(ranges[name].place(taken) + signs, 0.0, 1.0)
        is_new = generator.random(len(parents)) < _REDRAW_PROBABILITY
        place = np.where(is_new, generator.random(len(parents)), place)
        changed[name] = np.where(is_copied, ranges[name].value(place), taken)
    return changed


def _with_settings(config: TrainingConfig, values: Mapping[str, Any]) -> TrainingConfig:
    """The config with traced values, which no check could look at."""
    varied = copy.copy(config)
    for name, value in values.items():
        object.__setattr__(varied, name, value)
    return varied


def _member_update(recipe: Recipe, config: TrainingConfig):
    """``(state, carry, ((arrays, num_updates), settings)) -> (state, carry, metrics)`` of one."""

    def update_many(state, carry, constant):
        common, settings = constant
        varied = _with_settings(config, settings)
        try:
            # What does not depend on the settings is computed now, as without a trace.
            with jax.ensure_compile_time_eval():
                run = recipe.build(varied)
            update = make_update(
                run.objective,
                run.optimizer,
                run.source,
                batch_size=config.batch_size,
                ema_decay=varied.ema_decay,
                rollback_factor=config.rollback_factor,
                axis_name=AXIS_NAME,
            )
            many = make_update_many(update, loss_limit=config.loss_limit or math.inf)
            return many(state, carry, common)
        except (jax.errors.ConcretizationTypeError, jax.errors.TracerArrayConversionError):
            raise ValueError(
                f"of {', '.join(settings)} at least one decides what is computed, not only with "
                "which numbers; members of a population cannot differ in it."
            ) from None

    return update_many


def train_population(
    recipe: Recipe,
    config: TrainingConfig,
    ranges: Mapping[str, Range],
    *,
    num_members: int,
    num_rounds: int,
    figures: Sequence[tuple[str, float]],
    quantile: float = 0.25,
    initial: Population | None = None,
    on_round: Callable[[int, Population], None] | None = None,
    should_stop: Callable[[], bool] = lambda: False,
) -> Population:
    """Trains a population on the first device.

    Args:
      recipe: with ``seed_is_key``; member i has the seed ``config.seed + i``.
      config: what all members have in common. ``num_steps`` updates of a member are ``num_rounds``
        rounds of equal length.
      ranges: settings that differ, by name: real numbers that enter what is computed as numbers.
      num_members: N, at least 2.
      num_rounds: at least 1, divides ``config.num_steps``.
      figures: what ranks, ``(name, sign)``: a figure of ``run.monitor`` or else of
        ``run.evaluate``, with sign 1 where lower is better and -1 where higher is.
      quantile: q, the share that is replaced, in [0, 0.5]; 0: none, each keeps its settings.
      initial: after a round of an earlier call with the same arguments, to go on from there.
      on_round: called with the number of the round, from 1, and the population after it.
      should_stop: asked after each round.

    Returns:
      The population after the last round, in which nothing is copied any more.

    Raises:
      ValueError: naming what is out of range, a figure that is not known, a setting that cannot
        differ, or if all members diverged.
    """
    _check(recipe, config, ranges, num_members, num_rounds, quantile)
    run = recipe.build(config)
    if run.source.load is not None:
        raise ValueError("source streams; a population needs data that fits in memory.")
    program = data_parallel(
        side_by_side(_member_update(recipe, config), (0, 0, ((None, None), 0))),
        devices=jax.devices()[:1],
        backend=config.backend,
    )
    seeds = [config.seed + i for i in range(num_members)]
    if initial is None:
        states = [init_state(run, dataclasses.replace(config, seed=seed)) for seed in seeds]
        settings = _first_settings(ranges, num_members, config.seed)
        first_round = 1
    else:
        states, settings = initial.states, initial.next_settings
        first_round = initial.step * num_rounds // config.num_steps + 1
    keys = [state.key for state in states]
    arrays = program.place_constant(run.source.arrays)
    num_updates = config.num_steps // num_rounds
    population = initial
    for number in range(first_round, num_rounds + 1):
        stacked = stacked_states(states)
        replicated, split = program.place(stacked._replace(carry=()), stacked.carry)
        placed = {name: jnp.asarray(values, float) for name, values in settings.items()}
        constant = ((arrays, jnp.asarray(num_updates, jnp.int32)), placed)
        replicated, split, metrics = program.step(
            replicated, split, program.place_constant(constant)
        )
        is_bad = np.asarray(metrics["bad_step"]).reshape(-1) >= 0
        state, carry = program.collect(replicated, split)
        states = unstacked_states(state._replace(carry=carry), num_members)
        step = number * num_updates
        scores = np.full((num_members, len(figures)), np.nan)
        for i in np.flatnonzero(~is_bad):
            key = jax.random.fold_in(jax.random.key(config.seed), step)
            scores[i] = _scores(run, key, states[i], [name for name, _ in figures])
        if np.isnan(scores).any(axis=1).all():
            raise ValueError(f"at step {step} no member of the population has finite figures.")
        generator = np.random.default_rng([config.seed, number])
        order = rank_members(scores * np.array([sign for _, sign in figures]))
        parents = np.arange(num_members)
        if number < num_rounds:
            parents = _exploit(generator, order, quantile)
        states = [
            states[parent]._replace(key=key) for parent, key in zip(parents, keys, strict=True)
        ]
        following = _explore(generator, settings, ranges, parents)
        population = Population(step, settings, scores, parents, following, states)
        settings = following
        if on_round is not None:
            on_round(number, population)
        if should_stop():
            break
    assert population is not None
    return population


def _check(recipe, config, ranges, num_members, num_rounds, quantile) -> None:
    if not recipe.seed_is_key:
        raise ValueError(
            "recipe uses config.seed for more than the run's key; its members would differ in "
            "their data."
        )
    if num_members < 2:
        raise ValueError(f"num_members is {num_members}; a population has at least 2.")
    if num_rounds < 1 or config.num_steps % num_rounds:
        raise ValueError(
            f"num_rounds is {num_rounds}; it must divide num_steps, {config.num_steps}."
        )
    if not 0.0 <= quantile <= 0.5:
        raise ValueError(f"quantile is {quantile}; it must be in [0, 0.5].")
    if not ranges:
        raise ValueError("ranges is empty; give at least one setting in which members differ.")
    for name, each in ranges.items():
        if not isinstance(getattr(config, name, None), float):
            raise ValueError(f"{name} is not a real number of the config; it cannot vary.")
        each.check(name)


def _first_settings(
    ranges: Mapping[str, Range], num_members: int, seed: int
) -> dict[str, np.ndarray]:
    """Each setting once in each N-th part of its range, in random order."""
    generator = np.random.default_rng([seed, 0])
    settings = {}
    for name, each in ranges.items():
        place = (generator.permutation(num_members) + generator.random(num_members)) / num_members
        settings[name] = each.value(place)
    return settings


def _scores(run: Run, key, state: TrainState, names: Sequence[str]) -> list[float]:
    found = dict(run.monitor(key, state)) if run.monitor is not None else {}
    if any(name not in found for name in names):
        found |= run.evaluate(key, state)
    unknown = [name for name in names if name not in found]
    if unknown:
        raise ValueError(f"there is no figure {unknown[0]!r}; there are {', '.join(found)}.")
    return [float(found[name]) for name in names]

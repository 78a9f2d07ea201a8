"""What the recipes of discrete flows share: drawing, the exact law, and how it is judged."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import numpy as np

from ebjax.types import Flow, Params, PyTree, Run, Source, TrainState
from gflownet import exact
from gflownet.evaluation import FlowBounds, evidence_bounds
from gflownet.recipes.learners import Learner
from gflownet.rollout import forward_rollout
from gflownet.types import Environment, State, Trajectories

__all__ = ["ExactLaws", "bounds_fn", "draw_fn", "draw_one_fn", "exact_laws_fn", "flow_run"]


def draw_fn(
    environment: Environment, learner: Learner
) -> Callable[[jax.Array, TrainState, int], Trajectories]:
    """``(key, state, num) -> Trajectories`` of the averaged policy, without exploration."""
    draw = jax.jit(
        lambda key, params, num: forward_rollout(
            jax.random.split(key, num), environment, learner.policy, params
        ),
        static_argnums=2,
    )
    return lambda key, state, num: draw(key, learner.policy_params(state.ema), num)


def draw_one_fn(
    environment: Environment,
    learner: Learner,
    read: Callable[[State], PyTree] = lambda state: state,
) -> Callable[[jax.Array, Params], PyTree]:
    """``(key, parameters of the policy) -> read(terminal state)``, one sample, pure."""

    def draw(key, params):
        drawn = forward_rollout(key[None], environment, learner.policy, params)
        return read(jax.tree.map(lambda leaf: leaf[0], drawn.terminal))

    return draw


def bounds_fn(
    environment: Environment, learner: Learner
) -> Callable[[jax.Array, TrainState, int], FlowBounds]:
    """``(key, state, num) -> FlowBounds`` of the averaged policy, from so many trajectories."""

    def bounds(key, state, num):
        params = learner.policy_params(state.ema)
        return evidence_bounds(key, environment, learner.policy, params, num_trajectories=num)

    return bounds


class ExactLaws(NamedTuple):
    """The law that the flow draws from beside the target.

    Attributes:
      states: [X, ...] the terminal states.
      learned: [X] probabilities.
      target: [X] R / Z.
      log_z: log Σ R.
    """

    states: Any
    learned: np.ndarray
    target: np.ndarray
    log_z: float

    def figures(self) -> dict[str, float]:
        """Distances of the two laws, and ``reward_ratio``, the mean reward over that of R / Z.

        >>> half = np.array([0.5, 0.5])
        >>> ExactLaws((), half, half, 0.0).figures()["reward_ratio"]
        1.0
        """
        return {
            "total_variation": exact.total_variation(self.learned, self.target),
            "jensen_shannon": exact.jensen_shannon(self.learned, self.target),
            "kullback_leibler": exact.kullback_leibler(self.learned, self.target),
            "reward_ratio": float(self.learned @ self.target / (self.target @ self.target)),
        }


def exact_laws_fn(
    environment: Environment,
    learner: Learner,
    variants: Callable[[exact.Graph], Iterable[exact.Graph]] = lambda graph: (graph,),
) -> Callable[[TrainState], ExactLaws] | None:
    """``state -> ExactLaws`` of the averaged policy; ``None`` where states are not enumerated.

    Args:
      environment: the graph.
      learner: how it is learned.
      variants: what the policy may see of the graph, each as likely: the law is the mean of theirs.
    """
    if environment.enumerate is None:
        return None

    @functools.cache
    def tables() -> exact.Graph:
        return exact.enumerate_graph(environment)

    def laws(state: TrainState) -> ExactLaws:
        graph = tables()
        params = learner.policy_params(state.ema)
        learned = np.mean(
            [
                np.asarray(
                    exact.terminal_distribution(environment, learner.policy, params, seen),
                    np.float64,
                )
                for seen in variants(graph)
            ],
            axis=0,
        )
        target, log_z = exact.target_distribution(environment, graph)
        states = jax.tree.map(lambda leaf: leaf[graph.terminal], graph.states)
        return ExactLaws(states, learned, np.asarray(target), log_z)

    return laws


def flow_run(environment: Environment, learner: Learner, **functions: Any) -> Run:
    """The run of a flow, which learns from the reward alone unless there is a ``source``.

    Args:
      environment: the graph.
      learner: how it is learned.
      **functions: further fields of ``Run``: ``sample``, ``evaluate``, ``figures`` and so on.
    """
    return Run(
        init=learner.init,
        objective=learner.objective,
        optimizer=learner.optimizer,
        flow=Flow(environment, learner.policy),
        learned_params=lambda state: learner.policy_params(state.ema),
        **{
            "source": Source((), lambda arrays, key, position: position),
            "progress": ("loss", learner.progress, "log_reward"),
            **functions,
        },
    )

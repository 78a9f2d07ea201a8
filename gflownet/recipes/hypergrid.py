"""A GFlowNet on the hypergrid, trained by any objective and judged by its exact law.

One config chooses the objective; settings that are left at -1 follow it.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from ebjax.training import check_at_least, setting
from ebjax.types import Recipe, Run, Source, TrainState
from gflownet import exact
from gflownet.conditional import at_condition
from gflownet.environments import HypergridState, hypergrid
from gflownet.evaluation import sampling_floor
from gflownet.recipes.flow_config import FlowConfig
from gflownet.recipes.judging import draw_fn, draw_one_fn, exact_laws_fn, flow_run
from gflownet.recipes.learners import LEARNERS, Learner
from gflownet.thompson import bootstrapped, thompson_policy, with_heads
from gflownet.types import Environment

__all__ = ["HypergridConfig", "recipe"]

# The others are expectations under one policy, or need observations that are one vector.
_WITH_HEADS = ("tb", "vargrad", "db", "subtb")


@dataclasses.dataclass(frozen=True, kw_only=True)
class HypergridConfig(FlowConfig):
    """Settings of the hypergrid run; -1 and 'auto' follow the objective."""

    dim: int = setting(2, "dimensions of the grid")
    side: int = setting(8, "cells along a side")
    reward_floor: float = setting(1e-3, "R0, the reward everywhere")
    reward_outer: float = setting(0.5, "R1, added far from the middle")
    reward_ring: float = setting(2.0, "R2, added in the modes")
    thompson_heads: int = setting(
        0,
        "heads of P_F, one of which draws a whole trajectory, which trains a random half of them; "
        "0: one policy",
    )
    thompson_prior: float = setting(
        1.0, "thompson: weight of the random function that tells heads apart"
    )

    def __post_init__(self) -> None:
        """Checks types and ranges."""
        super().__post_init__()
        check_at_least(self, 1, "dim")
        check_at_least(self, 2, "side")
        check_at_least(self, 0, "reward_outer", "reward_ring", "thompson_prior", "thompson_heads")
        if self.thompson_heads == 1:
            raise ValueError("thompson_heads is 1; it must be at least 2, or 0 for one policy.")
        if self.thompson_heads and self.objective not in _WITH_HEADS:
            raise ValueError(
                f"thompson_heads is {self.thompson_heads}; with objective {self.objective!r} it "
                f"must be 0 (heads learn by {', '.join(_WITH_HEADS)})."
            )
        if not self.reward_floor > 0:
            raise ValueError(f"reward_floor is {self.reward_floor}; it must be positive.")


def build(config: HypergridConfig) -> Run:
    """Makes the run of a config."""
    environment = hypergrid(
        dim=config.dim,
        side=config.side,
        reward_floor=config.reward_floor,
        reward_outer=config.reward_outer,
        reward_ring=config.reward_ring,
    )
    assert environment.log_z is not None
    exact_log_z = environment.log_z
    headed = environment
    if config.thompson_heads:
        headed = with_heads(environment, config.thompson_heads)
        learner = _learner_with_heads(config, headed)
        laws = _laws_of_heads(config.thompson_heads, environment, headed, learner)
    else:
        learner = LEARNERS[config.objective](config, environment)
        laws = exact_laws_fn(environment, learner)
    draw = draw_fn(headed, learner)

    def position(terminal) -> jax.Array:
        return (terminal.state if config.thompson_heads else terminal).position

    def sample(key, state: TrainState, num_samples: int):
        trajectories = draw(key, state, num_samples)
        return {
            "positions": np.asarray(position(trajectories.terminal)),
            "log_rewards": np.asarray(trajectories.log_reward),
            "lengths": np.asarray(trajectories.length),
        }

    def monitor(key, state: TrainState):
        if laws is None:
            return {"log_z_error": abs(float(learner.log_z(key, state.ema)) - exact_log_z)}
        return {"total_variation": laws(state).figures()["total_variation"]}

    def evaluate(key, state: TrainState):
        log_z = float(learner.log_z(key, state.ema))
        draws = sample(key, state, 2000)
        figures_ = {
            "log_z": log_z,
            "log_z_exact": exact_log_z,
            "log_z_error": abs(log_z - exact_log_z),
            "mean_length": float(draws["lengths"].mean()),
        }
        if laws is not None:
            found = laws(state)
            empirical = _empirical(draws["positions"], config.side)
            figures_ |= {
                **found.figures(),
                "total_variation_of_2000_samples": exact.total_variation(empirical, found.target),
                "total_variation_of_2000_perfect_samples": sampling_floor(
                    found.target, 2000, seed=config.seed
                ),
            }
        return figures_

    def figures(key, state: TrainState, samples):
        from gflownet.figures import grid_distributions

        if config.dim < 2:
            return {}
        empirical = _empirical(samples["positions"], config.side)
        panels = {f"{len(samples['positions']):,} samples": empirical}
        subtitle = ""
        if laws is not None:
            found = laws(state)
            panels = {"target R(x) / Z": found.target, "learned, exact": found.learned, **panels}
            subtitle = (
                f"total variation {found.figures()['total_variation']:.4f},  learned log Z "
                f"{float(learner.log_z(key, state.ema)):.4f},  exact {found.log_z:.4f}"
            )
        shape = (config.side,) * config.dim
        # Cells are numbered with the first coordinate fastest.
        marginals = {
            title: law.reshape(shape).sum(axis=tuple(range(config.dim - 2))).T
            for title, law in panels.items()
        }
        if config.dim > 2:
            subtitle += "   (marginals of two coordinates)"
        return {"distributions": grid_distributions(marginals, subtitle=subtitle)}

    return flow_run(
        headed,
        learner,
        source=_source(config, environment),
        sample=sample,
        evaluate=evaluate,
        figures=figures,
        monitor=monitor,
        monitor_name="log_z_error" if laws is None else "total_variation",
        progress=("loss", learner.progress, "log_reward", "trajectory_length"),
        draw=draw_one_fn(headed, learner, position),
    )


def _learner_with_heads(config: HypergridConfig, headed: Environment) -> Learner:
    num_heads = config.thompson_heads

    def make_policy(config, environment, *, with_flow):
        return thompson_policy(
            environment.num_actions,
            config.hidden_features,
            num_heads=num_heads,
            prior_scale=config.thompson_prior,
            backward=config.backward_policy,
            with_flow=with_flow,
        )

    return LEARNERS[config.objective](
        config, headed, make_policy, functools.partial(bootstrapped, num_heads=num_heads)
    )


def _laws_of_heads(num_heads: int, environment: Environment, headed: Environment, learner: Learner):
    """``state -> ExactLaws`` of a draw by a random head; ``None`` where nothing is enumerated."""
    if environment.enumerate is None:
        return None

    def as_each_head(graph: exact.Graph):
        for head in range(num_heads):
            condition = np.full_like(graph.states.condition, head)
            yield graph._replace(states=graph.states._replace(condition=condition))

    return exact_laws_fn(at_condition(environment, headed, jnp.int32(0)), learner, as_each_head)


def _source(config: HypergridConfig, environment: Environment) -> Source:
    """Nothing to learn from but the reward, or exact draws of the target."""
    if config.objective != "forward_kl":
        return Source((), lambda arrays, key, position: position)
    if environment.enumerate is None:
        raise ValueError(
            f"side is {config.side} and dim {config.dim}; objective 'forward_kl' learns from exact "
            "draws of the target, and that many cells are not enumerated."
        )
    states = jax.tree.map(lambda leaf: leaf[config.side**config.dim :], environment.enumerate())
    log_reward = jax.vmap(environment.log_reward, (None, 0))((), states)
    cumulative = np.cumsum(np.exp(np.asarray(log_reward, np.float64)))

    def example(arrays, key, position):
        cumulative, positions = arrays
        threshold = jax.random.uniform(jax.random.fold_in(key, position))
        cell = jnp.searchsorted(cumulative, threshold, side="right")
        return HypergridState(positions[jnp.minimum(cell, len(cumulative) - 1)], jnp.array(True))

    shares = (cumulative / cumulative[-1]).astype(np.float32)
    return Source((shares, states.position), example)


def _empirical(positions: np.ndarray, side: int) -> np.ndarray:
    """Share of the samples in each cell, in the order of the terminal states."""
    cells = positions @ (side ** np.arange(positions.shape[1]))
    counts = np.bincount(cells, minlength=side ** positions.shape[1])
    return counts / counts.sum()


recipe = Recipe(HypergridConfig, build, seed_is_key=True)

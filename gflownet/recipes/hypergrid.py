"""A GFlowNet on the hypergrid, trained by trajectory balance and judged by its exact law."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ebjax.training import (
    TrainingConfig,
    adam,
    by_group,
    check_at_least,
    check_between,
    learning_rate_schedule,
    setting,
)
from ebjax.types import Recipe, Run, Source, TrainState
from gflownet import exact
from gflownet.environments import hypergrid
from gflownet.objectives import trajectory_balance
from gflownet.policies import mlp_policy
from gflownet.rollout import forward_rollout

__all__ = ["HypergridConfig", "recipe"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class HypergridConfig(TrainingConfig):
    """Settings of the hypergrid run."""

    num_steps: int = setting(1000, "updates in all; may be raised later to go on with a run")
    batch_size: int = setting(16, "trajectories of one update, over all devices")
    log_every: int = setting(50, "steps between lines of metrics.jsonl")
    checkpoint_every: int = setting(250, "steps between checkpoints")
    steps_per_call: int = setting(50, "updates in one dispatch; metrics are means over these")
    num_devices: int = setting(1, "devices to use; 0 takes as many as divide batch_size")
    ema_decay: float = setting(0.99, "decay of the averaged parameters, used for sampling")
    dim: int = setting(2, "dimensions of the grid")
    side: int = setting(8, "cells along a side")
    reward_floor: float = setting(1e-3, "R0, the reward everywhere")
    reward_outer: float = setting(0.5, "R1, added far from the middle")
    reward_ring: float = setting(2.0, "R2, added in the modes")
    hidden_features: tuple[int, ...] = setting((256, 256), "widths of the policy's hidden layers")
    backward_policy: str = setting("learned", "P_B: 'learned' on the shared trunk, or 'uniform'")
    learning_rate: float = setting(1e-3, "learning rate of the policy (Adam)")
    learning_rate_decay_steps: int = setting(
        -1, "step at which the cosine decay ends; -1: num_steps, 0: no decay", follows="num_steps"
    )
    log_z_learning_rate: float = setting(
        0.1, "learning rate of log Z, about 100 times the policy's"
    )
    epsilon: float = setting(0.1, "share of uniform exploration at the start")
    epsilon_decay_steps: int = setting(500, "steps over which exploration falls to 0; 0 keeps it")
    chunk_size: int = setting(128, "states evaluated at a time in the gradient pass")

    def __post_init__(self) -> None:
        """Checks types and ranges."""
        super().__post_init__()
        check_at_least(self, 1, "dim", "chunk_size")
        check_at_least(self, 2, "side")
        check_at_least(self, 0, "reward_outer", "reward_ring", "learning_rate")
        check_at_least(self, 0, "learning_rate_decay_steps", "log_z_learning_rate")
        check_at_least(self, 0, "epsilon_decay_steps")
        check_between(self, 0, 1, "epsilon")
        if not self.reward_floor > 0:
            raise ValueError(f"reward_floor is {self.reward_floor}; it must be positive.")
        if self.backward_policy not in ("learned", "uniform"):
            raise ValueError(
                f"backward_policy is {self.backward_policy!r}; it must be 'learned' or 'uniform'."
            )
        if not self.hidden_features or min(self.hidden_features) < 1:
            raise ValueError(
                f"hidden_features is {self.hidden_features}; give at least one positive width."
            )


def build(config: HypergridConfig) -> Run:
    """Makes the run of a config."""
    environment = hypergrid(
        dim=config.dim,
        side=config.side,
        reward_floor=config.reward_floor,
        reward_outer=config.reward_outer,
        reward_ring=config.reward_ring,
    )
    policy = mlp_policy(
        environment.num_actions, config.hidden_features, backward=config.backward_policy
    )
    epsilon = optax.constant_schedule(config.epsilon)
    if config.epsilon_decay_steps:
        epsilon = optax.linear_schedule(config.epsilon, 0.0, config.epsilon_decay_steps)
    objective = trajectory_balance(
        environment, policy, epsilon=epsilon, chunk_size=config.chunk_size
    )

    def rate(peak):
        return learning_rate_schedule(peak, decay_steps=config.learning_rate_decay_steps)

    is_enumerable = environment.enumerate is not None
    assert environment.log_z is not None
    exact_log_z = environment.log_z

    @functools.cache
    def tables() -> exact.Graph:
        return exact.enumerate_graph(environment)

    def init(key):
        observation = environment.observe(environment.initial(key))
        return {"policy": policy.init(key, observation), "log_z": jnp.zeros(())}

    draw = jax.jit(
        lambda key, params, num: forward_rollout(
            jax.random.split(key, num), environment, policy, params
        ),
        static_argnums=2,
    )

    def sample(key, state: TrainState, num_samples: int):
        trajectories = draw(key, state.ema["policy"], num_samples)
        return {
            "positions": np.asarray(trajectories.terminal.position),
            "log_rewards": np.asarray(trajectories.log_reward),
            "lengths": np.asarray(trajectories.length),
        }

    def laws(state: TrainState):
        learned = exact.terminal_distribution(environment, policy, state.ema["policy"], tables())
        target, log_z = exact.target_distribution(environment, tables())
        return np.asarray(learned), target, log_z

    def monitor(key, state: TrainState):
        del key
        if not is_enumerable:
            return {"log_z_error": abs(float(state.ema["log_z"]) - exact_log_z)}
        learned, target, _ = laws(state)
        return {"total_variation": exact.total_variation(learned, target)}

    def evaluate(key, state: TrainState):
        log_z = float(state.ema["log_z"])
        draws = sample(key, state, 2000)
        figures_ = {
            "log_z": log_z,
            "log_z_exact": exact_log_z,
            "log_z_error": abs(log_z - exact_log_z),
            "mean_length": float(draws["lengths"].mean()),
        }
        if is_enumerable:
            learned, target, _ = laws(state)
            empirical = _empirical(draws["positions"], config.side)
            perfect = np.random.default_rng(config.seed).multinomial(2000, target / target.sum())
            figures_ |= {
                "total_variation": exact.total_variation(learned, target),
                "jensen_shannon": exact.jensen_shannon(learned, target),
                "kullback_leibler": exact.kullback_leibler(learned, target),
                "total_variation_of_2000_samples": exact.total_variation(empirical, target),
                "total_variation_of_2000_perfect_samples": exact.total_variation(
                    perfect / 2000, target
                ),
            }
        return figures_

    def figures(key, state: TrainState, samples):
        from gflownet.figures import grid_distributions

        del key
        if config.dim < 2:
            return {}
        empirical = _empirical(samples["positions"], config.side)
        panels = {f"{len(samples['positions']):,} samples": empirical}
        subtitle = ""
        if is_enumerable:
            learned, target, log_z = laws(state)
            panels = {"target R(x) / Z": target, "learned, exact": learned, **panels}
            subtitle = (
                f"total variation {exact.total_variation(learned, target):.4f},  "
                f"learned log Z {float(state.ema['log_z']):.4f},  exact {log_z:.4f}"
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

    return Run(
        init=init,
        objective=objective,
        optimizer=by_group(
            {
                "policy": adam(rate(config.learning_rate)),
                "log_z": adam(rate(config.log_z_learning_rate)),
            }
        ),
        source=Source((), lambda arrays, key, position: position),
        sample=sample,
        evaluate=evaluate,
        figures=figures,
        monitor=monitor,
        monitor_name="total_variation" if is_enumerable else "log_z_error",
        progress=("loss", "log_z", "log_reward", "trajectory_length"),
    )


def _empirical(positions: np.ndarray, side: int) -> np.ndarray:
    """Share of the samples in each cell, in the order of the terminal states."""
    cells = positions @ (side ** np.arange(positions.shape[1]))
    counts = np.bincount(cells, minlength=side ** positions.shape[1])
    return counts / counts.sum()


recipe = Recipe(HypergridConfig, build)

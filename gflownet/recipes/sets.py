"""Sets of items by any flow objective: credit for each item pays, and not only for the whole.

A set has an energy that is the sum of its items', so that log Z, and the probability of each item
to be in the set, are known exactly at any size. What is quoted is the gap between log Z and the
bound below it, and the error of the inclusion probabilities; the best rewards of a sample flatter a
sampler that is too greedy.

Pan, Malkin, Zhang and Bengio, "Better training of GFlowNets with local credit and incomplete
trajectories", ICML 2023. Jang, Kim and Ahn, "Learning energy decompositions for partial inference
of GFlowNets", ICLR 2024.
"""

from __future__ import annotations

import dataclasses

import jax
import numpy as np

from ebjax.training import setting
from ebjax.types import Recipe, Run, TrainState
from gflownet.environments.sets import SET_BENCHMARKS, inclusion_probabilities, sets
from gflownet.recipes.flow_config import FlowConfig
from gflownet.recipes.judging import bounds_fn, draw_fn, draw_one_fn, flow_run
from gflownet.recipes.learners import LEARNERS

__all__ = ["SetsConfig", "recipe"]

# "mdb" needs states that may stop, "forward_kl" a source of exact draws.
_EXCLUDED = ("mdb", "forward_kl")


@dataclasses.dataclass(frozen=True, kw_only=True)
class SetsConfig(FlowConfig):
    """Settings of a run on sets; -1 and 'auto' follow the objective."""

    size: str = setting("medium", f"which benchmark: {', '.join(SET_BENCHMARKS)}")
    objective: str = setting("fldb")
    estimates_log_z: bool = setting(True)
    num_steps: int = setting(900)
    chunk_size: int = setting(256)
    num_evaluated: int = setting(2000, "trajectories when the flow is judged")

    def __post_init__(self) -> None:
        """Checks types and ranges."""
        if self.size not in SET_BENCHMARKS:
            raise ValueError(
                f"size is {self.size!r}; it must be one of {', '.join(SET_BENCHMARKS)}."
            )
        if self.objective in _EXCLUDED:
            raise ValueError(
                f"objective is {self.objective!r}; sets, which stop at full size only and have no "
                f"exact draws to learn from, take any other than {' and '.join(_EXCLUDED)}."
            )
        super().__post_init__()
        if self.num_evaluated < 2:
            raise ValueError(f"num_evaluated is {self.num_evaluated}; it must be at least 2.")


def build(config: SetsConfig) -> Run:
    """Makes the run of a config."""
    num_items, num_chosen, energies = SET_BENCHMARKS[config.size]
    all_energies = np.repeat(energies, num_items // len(energies))
    environment = sets(all_energies, num_chosen)
    assert environment.log_z is not None
    exact_log_z = environment.log_z
    learner = LEARNERS[config.objective](config, environment)
    exact = inclusion_probabilities(all_energies, num_chosen)
    draw, bounds_of = draw_fn(environment, learner), bounds_fn(environment, learner)

    def sample(key, state: TrainState, num_samples: int):
        drawn = draw(key, state, num_samples)
        return {
            "sets": np.asarray(drawn.terminal),
            "log_rewards": np.asarray(drawn.log_reward),
        }

    def monitor(key, state: TrainState):
        return {"elbo_gap": exact_log_z - bounds_of(key, state, 500).elbo}

    def evaluate(key, state: TrainState):
        from gflownet.evaluation import top_rewards

        bound_key, draw_key = jax.random.split(key)
        bounds = bounds_of(bound_key, state, config.num_evaluated)
        drawn = sample(draw_key, state, config.num_evaluated)
        shares = drawn["sets"].mean(axis=0)
        best = top_rewards(drawn["sets"], drawn["log_rewards"], 100)
        return {
            "elbo_gap": exact_log_z - bounds.elbo,
            "log_z_error": bounds.log_z - exact_log_z,
            "log_z_standard_error": bounds.log_z_standard_error,
            "inclusion_error": float(np.abs(shares - exact).mean()),
            "largest_inclusion_error": float(np.abs(shares - exact).max()),
            "top_100_reward": float(best["reward"]),
            "top_100_diversity": float(best["diversity"]),
        }

    def figures(key, state: TrainState, samples):
        del key, state
        return {"inclusion": _inclusion(samples["sets"].mean(axis=0), exact, all_energies)}

    return flow_run(
        environment,
        learner,
        sample=sample,
        evaluate=evaluate,
        figures=figures,
        monitor=monitor,
        monitor_name="elbo_gap",
        draw=draw_one_fn(environment, learner),
    )


def _inclusion(shares: np.ndarray, exact: np.ndarray, energies: np.ndarray):
    """Share of the samples that hold an item, beside the exact probability, by its energy."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.6, 3.8), dpi=120, layout="constrained")
    axes = figure.subplots()
    order = np.argsort(energies)
    axes.plot(energies[order], exact[order], color="#555555", label="exact")
    axes.scatter(energies, shares, s=14, color="#2a6f97", label="samples of the flow")
    axes.set_xlabel("energy of an item")
    axes.set_ylabel("probability to be in the set")
    axes.set_ylim(-0.02, 1.02)
    axes.legend(frameon=False)
    return figure


recipe = Recipe(SetsConfig, build, seed_is_key=True)

"""The posterior over directed acyclic graphs given data, beside the exact one.

Up to five variables all graphs are listed (29,281), so that the law of the flow, its distance to
the posterior, and the probability of each edge under both are exact. The default data come from a
random linear-Gaussian network of five variables; ``data_path`` names others.

Deleu et al., "Bayesian structure learning with generative flow networks", UAI 2022.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import numpy as np

from ebjax.data import load_dataset
from ebjax.training import check_at_least, setting
from ebjax.types import Recipe, Run, TrainState
from gflownet.environments.dags import (
    bge_scores,
    dags,
    edge_marginals,
    linear_gaussian_data,
    linear_gaussian_scores,
)
from gflownet.recipes.flow_config import FlowConfig
from gflownet.recipes.judging import bounds_fn, draw_fn, draw_one_fn, exact_laws_fn, flow_run
from gflownet.recipes.learners import LEARNERS

__all__ = ["DagsConfig", "recipe"]

_SCORES: dict[str, Callable[..., np.ndarray]] = {
    "linear_gaussian": linear_gaussian_scores,
    "bge": bge_scores,
}
_NUM_EVALUATED = 2000
_LISTED = 5


@dataclasses.dataclass(frozen=True, kw_only=True)
class DagsConfig(FlowConfig):
    """Settings of a run on graphs; -1 and 'auto' follow the objective."""

    objective: str = setting("mdb")
    # Log R of graphs spans hundreds of nats, and log Z follows the policy to the best of them.
    log_z_learning_rate: float = setting(1.0)
    estimates_log_z: bool = setting(True)
    # For the same reason squares would be ruled by the worst graphs of a batch.
    residual_loss: str = setting("huber")
    data_path: str = setting(
        "", "numbers [N, d], at most 15 columns, as CSV, .npz or .npy; '': drawn"
    )
    data_key: str = setting("", "name of the array in an .npz file")
    score: str = setting("linear_gaussian", f"how graphs explain data: {', '.join(_SCORES)}")
    num_variables: int = setting(5, "drawn data: variables")
    num_samples: int = setting(100, "drawn data: rows")
    data_seed: int = setting(0, "drawn data: seed of the network and the rows")
    hidden_features: tuple[int, ...] = setting((128, 128))
    learning_rate: float = setting(3e-3)
    num_steps: int = setting(5000)
    batch_size: int = setting(64)
    epsilon: float = setting(0.5)
    epsilon_decay_steps: int = setting(4000)
    checkpoint_every: int = setting(1000)
    chunk_size: int = setting(256)

    def __post_init__(self) -> None:
        """Checks types and ranges."""
        if self.objective == "forward_kl":
            raise ValueError(
                "objective is 'forward_kl'; graphs come without exact draws to learn from, take "
                "any other."
            )
        if self.score not in _SCORES:
            raise ValueError(f"score is {self.score!r}; it must be one of {', '.join(_SCORES)}.")
        super().__post_init__()
        check_at_least(self, 2, "num_variables")
        check_at_least(self, 1, "num_samples")
        check_at_least(self, 0, "data_seed")
        if self.num_variables > 15:
            raise ValueError(f"num_variables is {self.num_variables}; it must be at most 15.")


def _data(config: DagsConfig) -> tuple[np.ndarray, np.ndarray | None]:
    """``(data [N, d], the network that made them [d, d])``, ``None`` for data from a file."""
    if not config.data_path:
        return linear_gaussian_data(
            config.data_seed, num_variables=config.num_variables, num_samples=config.num_samples
        )
    data = np.asarray(load_dataset(config.data_path, key=config.data_key or None).examples)
    if data.ndim != 2 or not 2 <= data.shape[1] <= 15:
        raise ValueError(
            f"{config.data_path}: has shape {data.shape}; it must be [N, d] with d from 2 to 15."
        )
    return data, None


def build(config: DagsConfig) -> Run:
    """Makes the run of a config."""
    data, network = _data(config)
    environment = dags(_SCORES[config.score](data))
    learner = LEARNERS[config.objective](config, environment)
    draw, bounds = draw_fn(environment, learner), bounds_fn(environment, learner)
    laws = exact_laws_fn(environment, learner) if data.shape[1] <= _LISTED else None

    def sample(key, state: TrainState, num_samples: int):
        drawn = draw(key, state, num_samples)
        return {
            "graphs": np.asarray(drawn.terminal.adjacency),
            "log_rewards": np.asarray(drawn.log_reward),
        }

    def monitor(key, state: TrainState):
        if laws is not None:
            return {"jensen_shannon": laws(state).figures()["jensen_shannon"]}
        return {"negative_elbo": -bounds(key, state, _NUM_EVALUATED).elbo}

    def marginals(key, state: TrainState) -> dict[str, np.ndarray]:
        """[d, d] probability of each edge by title, the exact one last."""
        if laws is None:
            return {"flow": sample(key, state, _NUM_EVALUATED)["graphs"].mean(axis=0)}
        found = laws(state)
        graphs = np.asarray(found.states.adjacency)
        return {
            "flow": edge_marginals(graphs, found.learned),
            "posterior": edge_marginals(graphs, found.target),
        }

    def evaluate(key, state: TrainState):
        bound_key, learned_key, edge_key = jax.random.split(key, 3)
        estimate = bounds(bound_key, state, _NUM_EVALUATED)
        figures_ = {
            "log_z": float(learner.log_z(learned_key, state.ema)),
            "elbo": estimate.elbo,
            "importance_log_z": estimate.log_z,
            "importance_log_z_standard_error": estimate.log_z_standard_error,
        }
        edges = marginals(edge_key, state)
        if laws is not None:
            found = laws(state)
            figures_ |= {
                "log_z_error": abs(figures_["log_z"] - found.log_z),
                "elbo_gap": found.log_z - estimate.elbo,
                **found.figures(),
                "largest_error_of_top_20": float(
                    np.abs(found.learned - found.target)[np.argsort(-found.target)[:20]].max()
                ),
                "edge_correlation": float(
                    np.corrcoef(edges["flow"].ravel(), edges["posterior"].ravel())[0, 1]
                ),
                "largest_edge_error": float(np.abs(edges["flow"] - edges["posterior"]).max()),
            }
        if network is not None:
            # Each edge that is wrong, missing or turned counts once.
            graphs = sample(edge_key, state, _NUM_EVALUATED)["graphs"]
            wrong = (graphs != network) | (graphs != network).transpose(0, 2, 1)
            figures_["expected_hamming_distance"] = float(wrong.sum(axis=(1, 2)).mean() / 2.0)
        return figures_

    def figures(key, state: TrainState, samples):
        del samples
        panels = marginals(key, state)
        if network is not None:
            panels["network of the data"] = network.astype(float)
        return {"edges": _edges(panels)}

    return flow_run(
        environment,
        learner,
        sample=sample,
        evaluate=evaluate,
        figures=figures,
        monitor=monitor,
        monitor_name="negative_elbo" if laws is None else "jensen_shannon",
        draw=draw_one_fn(environment, learner, lambda state: state.adjacency),
    )


def _edges(panels: dict[str, np.ndarray]):
    """Probabilities of edges as matrices side by side."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.2 * len(panels) + 0.6, 3.4), dpi=120, layout="constrained")
    axes_of = np.atleast_1d(figure.subplots(1, len(panels), sharey=True))
    for axes, (title, matrix) in zip(axes_of, panels.items(), strict=True):
        image = axes.imshow(matrix, cmap="magma_r", vmin=0.0, vmax=1.0)
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("to variable", fontsize=8)
        for (i, j), value in np.ndenumerate(matrix):
            if i != j and len(matrix) <= 8:
                color = "white" if value > 0.5 else "black"
                axes.text(j, i, f"{value:.2f}", ha="center", va="center", fontsize=7, color=color)
    axes_of[0].set_ylabel("from variable", fontsize=8)
    figure.colorbar(image, ax=list(axes_of), fraction=0.03, label="probability of the edge")
    return figure


recipe = Recipe(DagsConfig, build, seed_is_key=True)

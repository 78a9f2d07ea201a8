"""Large independent sets of graphs, by one flow for all of them.

    p(x | graph) ∝ exp(β |x|) over maximal independent sets

A message-passing policy is trained on random graphs of the RB model, or those of a file, and judged
on graphs that it never saw: the mean and the best size of 20 samples as shares of the largest size
there is (exact, by branch and bound), beside two greedy rules. The rule of the smallest degree is
hard to beat, and a flow that does no better has learned no more.

Zhang, Dai, Malkin, Courville, Bengio and Pan, "Let the flows tell: solving graph combinatorial
problems with GFlowNets", NeurIPS 2023.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from ebjax.data import load_dataset
from ebjax.training import check_at_least, setting
from ebjax.types import Recipe, Run, TrainState
from gflownet.environments.independent_sets import (
    IN,
    UNDECIDED,
    IndependentSetState,
    independence_number,
    independent_sets,
    random_clique_graph,
)
from gflownet.policies import vertex_policy
from gflownet.recipes.flow_config import FlowConfig
from gflownet.recipes.judging import flow_run
from gflownet.recipes.learners import LEARNERS
from gflownet.rollout import forward_rollout

__all__ = ["IndependentSetsConfig", "greedy_size", "recipe"]

# Those whose flow of the source is a function of the graph.
OBJECTIVES = ("db", "subtb", "fldb", "flsubtb")
_SAMPLES_OF_A_GRAPH = 20
_MAX_EXACT_VERTICES = 60


@dataclasses.dataclass(frozen=True, kw_only=True)
class IndependentSetsConfig(FlowConfig):
    """Settings of a run on independent sets; -1 and 'auto' follow the objective."""

    objective: str = setting("fldb", f"how the flow is learned: {', '.join(OBJECTIVES)}")
    data_path: str = setting("", "adjacencies [G, N, N] as .npz or .npy; '' draws random graphs")
    data_key: str = setting("", "name of the array in an .npz file")
    num_graphs: int = setting(200, "random graphs to train on")
    num_held_out: int = setting(50, "graphs to be judged on")
    num_cliques: int = setting(6, "random graphs: cliques")
    clique_size: int = setting(5, "random graphs: vertices of a clique")
    tightness: float = setting(0.3, "random graphs: share of pairs that joined cliques share")
    inverse_temperature: float = setting(5.0, "log R per vertex of the set")
    width: int = setting(32, "features of a vertex in the network")
    num_layers: int = setting(3, "rounds of messages")
    backward_policy: str = setting("uniform")
    learning_rate: float = setting(3e-3)
    num_steps: int = setting(4000)
    batch_size: int = setting(32)
    checkpoint_every: int = setting(1000)
    chunk_size: int = setting(64)

    def __post_init__(self) -> None:
        """Checks types and ranges."""
        if self.objective not in OBJECTIVES:
            raise ValueError(
                f"objective is {self.objective!r}; a flow of many graphs needs one of "
                f"{', '.join(OBJECTIVES)}."
            )
        super().__post_init__()
        check_at_least(self, 1, "num_graphs", "num_held_out", "clique_size", "width")
        check_at_least(self, 2, "num_cliques")
        check_at_least(self, 0, "num_layers")
        if not 0.0 < self.tightness < 1.0:
            raise ValueError(f"tightness is {self.tightness}; it must lie between 0 and 1.")
        if not self.inverse_temperature > 0.0:
            raise ValueError(
                f"inverse_temperature is {self.inverse_temperature}; it must be positive."
            )


def _graphs(config: IndependentSetsConfig) -> tuple[np.ndarray, np.ndarray]:
    """``(to train on [G, N, N], held out [M, N, N])``."""
    if not config.data_path:
        make = functools.partial(
            random_clique_graph,
            num_cliques=config.num_cliques,
            clique_size=config.clique_size,
            tightness=config.tightness,
        )
        graphs = np.stack([make(seed) for seed in range(config.num_graphs + config.num_held_out)])
    else:
        key = config.data_key or None
        graphs = np.asarray(load_dataset(config.data_path, key=key).examples) != 0
        if graphs.ndim != 3 or len(graphs) <= config.num_held_out:
            raise ValueError(
                f"{config.data_path}: has shape {graphs.shape}; give more than num_held_out "
                f"({config.num_held_out}) adjacencies, [G, N, N]."
            )
    return graphs[: -config.num_held_out], graphs[-config.num_held_out :]


def greedy_size(adjacency: np.ndarray, *, seed: int | None = None) -> int:
    """Size of the set that takes an undecided vertex again and again.

    Args:
      adjacency: [N, N] bool.
      seed: takes vertices in a random order; ``None``: the one with fewest undecided neighbours.

    >>> greedy_size(np.array([[0, 1, 1], [1, 0, 0], [1, 0, 0]], bool))  # a star
    2
    """
    undecided = np.ones(len(adjacency), bool)
    order = None if seed is None else np.random.default_rng(seed).permutation(len(adjacency))
    size = 0
    while undecided.any():
        if order is None:
            degrees = np.where(undecided, (adjacency & undecided).sum(axis=1), len(adjacency))
            vertex = int(np.argmin(degrees))
        else:
            vertex = int(order[undecided[order]][0])
        undecided &= ~adjacency[vertex]
        undecided[vertex] = False
        size += 1
    return size


def build(config: IndependentSetsConfig) -> Run:
    """Makes the run of a config."""
    training, held_out = _graphs(config)
    beta = config.inverse_temperature
    environment = independent_sets(training, inverse_temperature=beta)
    unseen = independent_sets(held_out, inverse_temperature=beta)

    def to_graph(state: IndependentSetState):
        return jax.nn.one_hot(state.status, UNDECIDED + 1), state.adjacency

    def make_policy(config, environment, *, with_flow):
        del environment
        return vertex_policy(
            to_graph,
            width=config.width,
            num_layers=config.num_layers,
            backward=config.backward_policy,
            with_flow=with_flow,
        )

    learner = LEARNERS[config.objective](config, environment, make_policy)

    @functools.partial(jax.jit, static_argnums=2)
    def draw(key, params, num_of_each):
        adjacency = jnp.repeat(jnp.asarray(held_out), num_of_each, axis=0)
        status = jnp.full(adjacency.shape[:2], UNDECIDED, jnp.int32)
        keys = jax.random.split(key, len(adjacency))
        start = IndependentSetState(status, adjacency)
        drawn = forward_rollout(keys, unseen, learner.policy, params, start=start)
        return drawn.terminal.status == IN

    def sizes(key, state: TrainState) -> np.ndarray:
        """[M, 20] sizes of sets of the unseen graphs."""
        inside = draw(key, learner.policy_params(state.ema), _SAMPLES_OF_A_GRAPH)
        return np.asarray(inside.sum(axis=1)).reshape(len(held_out), _SAMPLES_OF_A_GRAPH)

    @functools.cache
    def largest() -> np.ndarray | None:
        if held_out.shape[1] > _MAX_EXACT_VERTICES:
            return None
        return np.array([independence_number(graph) for graph in held_out])

    @functools.cache
    def baselines() -> dict[str, float]:
        random = [
            [greedy_size(graph, seed=seed) for seed in range(_SAMPLES_OF_A_GRAPH)]
            for graph in held_out
        ]
        smallest = [greedy_size(graph) for graph in held_out]
        return {
            "random_greedy_size": float(np.mean(random)),
            "random_greedy_best_of_20": float(np.max(random, axis=1).mean()),
            "degree_greedy_size": float(np.mean(smallest)),
        }

    def sample(key, state: TrainState, num_samples: int):
        each = -(-num_samples // len(held_out))
        inside = np.asarray(draw(key, learner.policy_params(state.ema), each))
        graph = np.repeat(np.arange(len(held_out)), each)
        # One set a graph first, so that few samples show many graphs.
        order = np.argsort(np.arange(len(inside)) % each, kind="stable")[:num_samples]
        return {
            "sets": inside[order],
            "adjacency": held_out[graph[order]],
            "sizes": inside[order].sum(axis=1),
        }

    def monitor(key, state: TrainState):
        return {"negative_size": -float(sizes(key, state).mean())}

    def evaluate(key, state: TrainState):
        found = sizes(key, state)
        figures_ = {
            "mean_size": float(found.mean()),
            "best_of_20": float(found.max(axis=1).mean()),
            **baselines(),
        }
        best = largest()
        if best is not None:
            figures_["largest_size"] = float(best.mean())
            figures_["share_of_largest"] = float((found / best[:, None]).mean())
            figures_["best_share_of_largest"] = float((found.max(axis=1) / best).mean())
        return figures_

    def figures(key, state: TrainState, samples):
        del key, state
        return {"sets": _sets(samples["adjacency"][:6], samples["sets"][:6])}

    return flow_run(
        environment,
        learner,
        sample=sample,
        evaluate=evaluate,
        figures=figures,
        monitor=monitor,
        monitor_name="negative_size",
        progress=("loss", "log_reward"),
    )


def _sets(adjacencies: np.ndarray, sets: np.ndarray):
    """Graphs on a circle with the vertices of the sets filled."""
    from matplotlib.figure import Figure

    columns = min(3, len(sets))
    rows = -(-len(sets) // columns)
    figure = Figure(figsize=(3.0 * columns, 3.1 * rows), dpi=120, layout="constrained")
    axes_of = np.atleast_1d(figure.subplots(rows, columns)).reshape(-1)
    for axes in axes_of:
        axes.set_axis_off()
    for axes, adjacency, inside in zip(axes_of, adjacencies, sets, strict=False):
        angle = 2.0 * np.pi * np.arange(len(inside)) / len(inside)
        x, y = np.cos(angle), np.sin(angle)
        for i, j in zip(*np.nonzero(np.triu(adjacency)), strict=True):
            axes.plot(x[[i, j]], y[[i, j]], color="#bbbbbb", lw=0.4, zorder=1)
        axes.scatter(x[~inside], y[~inside], s=14, color="white", edgecolor="#555555", zorder=2)
        axes.scatter(x[inside], y[inside], s=30, color="#2a6f97", zorder=3)
        axes.set_title(f"{int(inside.sum())} vertices", fontsize=9)
        axes.set_aspect("equal")
    return figure


recipe = Recipe(IndependentSetsConfig, build, seed_is_key=True)

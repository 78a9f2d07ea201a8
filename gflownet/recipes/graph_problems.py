"""Combinatorial problems on graphs, by one flow for all graphs.

    p(S | graph) ∝ exp(β value(S))

S is a maximal independent set, a maximal clique, a dominating set or a cut; a message-passing
policy is trained on random graphs, or those of a file, and judged on graphs that it never saw: the
mean and the best value of 20 samples as shares of the best there is (exact, by integer
programming), beside two greedy rules. Greedy choice is hard to beat, and a flow that does no better
has learned no more.

Independent sets and cliques are looked for in graphs of the RB model, dominating sets and cuts in
graphs that grew by preferential attachment.

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
from gflownet.environments.graph_problems import (
    GRAPH_PROBLEMS,
    VertexSetState,
    best_value,
    graph_problem,
)
from gflownet.environments.random_graphs import preferential_graph, random_clique_graph
from gflownet.policies import vertex_policy
from gflownet.recipes.flow_config import FlowConfig
from gflownet.recipes.judging import flow_run
from gflownet.recipes.learners import LEARNERS
from gflownet.rollout import forward_rollout

__all__ = ["GraphProblemsConfig", "greedy_sets", "recipe"]

# Those whose flow of the source is a function of the graph.
OBJECTIVES = ("db", "subtb", "fldb", "flsubtb")
_SAMPLES_OF_A_GRAPH = 20
_MAX_EXACT_VERTICES = 60
# Problem -> what it is looked for in, and nats a vertex or an edge.
_ON_CLIQUES = ("independent_set", "clique")
_INVERSE_TEMPERATURES = {
    "independent_set": 15.0,
    "clique": 15.0,
    "dominating_set": 15.0,
    "cut": 3.0,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class GraphProblemsConfig(FlowConfig):
    """Settings of a run on graphs; -1 and 'auto' follow the problem or the objective."""

    problem: str = setting("independent_set", f"what is looked for: {', '.join(GRAPH_PROBLEMS)}")
    objective: str = setting("flsubtb", f"how the flow is learned: {', '.join(OBJECTIVES)}")
    data_path: str = setting("", "adjacencies [G, N, N] as .npz or .npy; '' draws random graphs")
    data_key: str = setting("", "name of the array in an .npz file")
    num_graphs: int = setting(200, "random graphs to train on")
    num_held_out: int = setting(50, "graphs to be judged on")
    num_cliques: int = setting(6, "independent_set, clique: cliques of a random graph")
    clique_size: int = setting(5, "independent_set, clique: vertices of such a clique")
    tightness: float = setting(0.3, "independent_set, clique: share of pairs joined between two")
    num_vertices: int = setting(30, "dominating_set, cut: vertices of a random graph")
    num_neighbours: int = setting(4, "dominating_set, cut: vertices that a new one is joined to")
    inverse_temperature: float = setting(
        -1.0, "log R per unit of value, -1: 15, for cuts 3", follows="problem"
    )
    width: int = setting(32, "features of a vertex in the network")
    num_layers: int = setting(3, "rounds of messages")
    backward_policy: str = setting("uniform")
    learning_rate: float = setting(3e-3)
    num_steps: int = setting(4000)
    batch_size: int = setting(32)
    checkpoint_every: int = setting(1000)
    chunk_size: int = setting(64)

    def __post_init__(self) -> None:
        """Fills in what follows the problem, then checks types and ranges."""
        if self.problem not in GRAPH_PROBLEMS:
            raise ValueError(
                f"problem is {self.problem!r}; it must be one of {', '.join(GRAPH_PROBLEMS)}."
            )
        if self.objective not in OBJECTIVES:
            raise ValueError(
                f"objective is {self.objective!r}; a flow of many graphs needs one of "
                f"{', '.join(OBJECTIVES)}."
            )
        if self.inverse_temperature == -1:
            beta = _INVERSE_TEMPERATURES[self.problem]
            object.__setattr__(self, "inverse_temperature", beta)
        super().__post_init__()
        check_at_least(self, 1, "num_graphs", "num_held_out", "clique_size", "width")
        check_at_least(self, 1, "num_neighbours")
        check_at_least(self, 2, "num_cliques", "num_vertices")
        check_at_least(self, 0, "num_layers")
        if not 0.0 < self.tightness < 1.0:
            raise ValueError(f"tightness is {self.tightness}; it must lie between 0 and 1.")
        if not self.inverse_temperature > 0.0:
            raise ValueError(
                f"inverse_temperature is {self.inverse_temperature}; it must be positive, or -1."
            )


def _graphs(config: GraphProblemsConfig) -> tuple[np.ndarray, np.ndarray]:
    """``(to train on [G, N, N], held out [M, N, N])``."""
    if not config.data_path:
        if config.problem in _ON_CLIQUES:
            make = functools.partial(
                random_clique_graph,
                num_cliques=config.num_cliques,
                clique_size=config.clique_size,
                tightness=config.tightness,
            )
        else:
            make = functools.partial(
                preferential_graph,
                num_vertices=config.num_vertices,
                num_neighbours=config.num_neighbours,
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


@functools.partial(jax.jit, static_argnums=0)
def greedy_sets(problem: str, adjacency: jax.Array, keys: jax.Array | None = None) -> jax.Array:
    """[M, N] bool, sets that take one vertex after another, without looking ahead.

    Args:
      problem: a name of ``GRAPH_PROBLEMS``.
      adjacency: [M, N, N] bool.
      keys: [M], takes vertices at random; ``None``: the one that gains most, and among equals the
        one that leaves most vertices to choose from (of an independent set: the smallest degree).

    >>> star = jnp.array([[0, 1, 1], [1, 0, 0], [1, 0, 0]], bool)
    >>> greedy_sets("independent_set", star[None]).tolist()
    [[False, True, True]]
    """
    gain_of = GRAPH_PROBLEMS[problem].gain
    num_vertices = adjacency.shape[-1]

    def score(graph, inside, gain):
        grown = inside | jnp.eye(num_vertices, dtype=bool)
        left = jax.vmap(lambda s: jnp.sum(~s & (gain_of(graph, s) > 0)))(grown)
        return gain + left / (num_vertices + 1)

    def one(graph, key):
        def take(i, inside):
            gain = gain_of(graph, inside)
            if key is None:
                scores = score(graph, inside, gain)
            else:
                scores = jax.random.uniform(jax.random.fold_in(key, i), (num_vertices,))
            is_open = ~inside & (gain > 0)
            best = jnp.argmax(jnp.where(is_open, scores, -jnp.inf))
            return inside.at[best].set(inside[best] | is_open[best])

        return jax.lax.fori_loop(0, num_vertices, take, jnp.zeros(num_vertices, bool))

    if keys is None:
        return jax.vmap(lambda graph: one(graph, None))(adjacency)
    return jax.vmap(one)(adjacency, keys)


def _shares(values: np.ndarray, best: np.ndarray) -> np.ndarray:
    """How near values come to the best: 1 there, less elsewhere, also where both are negative."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(values == best, 1.0, np.where(best < 0, best / values, values / best))


def build(config: GraphProblemsConfig) -> Run:
    """Makes the run of a config."""
    training, held_out = _graphs(config)
    beta = config.inverse_temperature
    environment = graph_problem(config.problem, training, inverse_temperature=beta)
    # What a single graph could offer, all of its states, is not asked for.
    unseen = graph_problem(config.problem, held_out, inverse_temperature=beta, max_enumerated=0)
    value_fn = jax.jit(jax.vmap(GRAPH_PROBLEMS[config.problem].value))

    def make_policy(config, environment, *, with_flow):
        del environment
        return vertex_policy(
            lambda graph: graph,
            width=config.width,
            num_layers=config.num_layers,
            backward=config.backward_policy,
            with_flow=with_flow,
        )

    learner = LEARNERS[config.objective](config, environment, make_policy)

    @functools.partial(jax.jit, static_argnums=2)
    def draw(key, params, num_of_each):
        """``(sets, their values)``, those of a graph next to each other."""
        adjacency = jnp.repeat(jnp.asarray(held_out), num_of_each, axis=0)
        keys = jax.random.split(key, len(adjacency))
        start = VertexSetState(jnp.zeros(adjacency.shape[:2], bool), adjacency)
        inside = forward_rollout(keys, unseen, learner.policy, params, start=start).terminal.inside
        return inside, value_fn(adjacency, inside)

    def values_of_samples(key, state: TrainState) -> np.ndarray:
        """[M, 20] for the unseen graphs."""
        _, values = draw(key, learner.policy_params(state.ema), _SAMPLES_OF_A_GRAPH)
        return np.asarray(values).reshape(len(held_out), _SAMPLES_OF_A_GRAPH)

    @functools.cache
    def best() -> np.ndarray | None:
        if held_out.shape[1] > _MAX_EXACT_VERTICES:
            return None
        return np.array([best_value(config.problem, graph) for graph in held_out])

    @functools.cache
    def baselines() -> dict[str, float]:
        keys = jax.random.split(jax.random.key(0), len(held_out) * _SAMPLES_OF_A_GRAPH)
        graphs = jnp.repeat(jnp.asarray(held_out), _SAMPLES_OF_A_GRAPH, axis=0)
        random = value_fn(graphs, greedy_sets(config.problem, graphs, keys))
        random = np.asarray(random).reshape(len(held_out), _SAMPLES_OF_A_GRAPH)
        greedy = value_fn(held_out, greedy_sets(config.problem, jnp.asarray(held_out)))
        return {
            "random_order": float(random.mean()),
            "random_order_best_of_20": float(random.max(axis=1).mean()),
            "greedy": float(greedy.mean()),
        }

    def sample(key, state: TrainState, num_samples: int):
        each = -(-num_samples // len(held_out))
        inside, values = map(np.asarray, draw(key, learner.policy_params(state.ema), each))
        graph = np.repeat(np.arange(len(held_out)), each)
        # One set a graph first, so that few samples show many graphs.
        order = np.argsort(np.arange(len(inside)) % each, kind="stable")[:num_samples]
        return {
            "sets": inside[order],
            "adjacency": held_out[graph[order]],
            "values": values[order],
        }

    def monitor(key, state: TrainState):
        return {"negative_value": -float(values_of_samples(key, state).mean())}

    def evaluate(key, state: TrainState):
        found = values_of_samples(key, state)
        figures_ = {
            "mean_value": float(found.mean()),
            "best_of_20": float(found.max(axis=1).mean()),
            **baselines(),
        }
        if (optimum := best()) is not None:
            figures_["best_value"] = float(optimum.mean())
            figures_["share_of_best"] = float(_shares(found, optimum[:, None]).mean())
            figures_["best_of_20_share"] = float(_shares(found.max(axis=1), optimum).mean())
        return figures_

    def figures(key, state: TrainState, samples):
        del key, state
        shown = {name: drawn[:6] for name, drawn in samples.items()}
        return {"sets": _sets(config.problem, **shown)}

    return flow_run(
        environment,
        learner,
        sample=sample,
        evaluate=evaluate,
        figures=figures,
        monitor=monitor,
        monitor_name="negative_value",
        progress=("loss", "log_reward"),
    )


def _sets(problem: str, adjacency: np.ndarray, sets: np.ndarray, values: np.ndarray):
    """Graphs on a circle with the vertices of the sets filled; of cuts, the edges that they cut."""
    from matplotlib.figure import Figure

    columns = min(3, len(sets))
    rows = -(-len(sets) // columns)
    figure = Figure(figsize=(3.0 * columns, 3.1 * rows), dpi=120, layout="constrained")
    axes_of = np.atleast_1d(figure.subplots(rows, columns)).reshape(-1)
    for axes in axes_of:
        axes.set_axis_off()
    unit = "edges cut" if problem == "cut" else "vertices"
    for axes, graph, inside, value in zip(axes_of, adjacency, sets, values, strict=False):
        angle = 2.0 * np.pi * np.arange(len(inside)) / len(inside)
        x, y = np.cos(angle), np.sin(angle)
        for i, j in zip(*np.nonzero(np.triu(graph)), strict=True):
            is_chosen = inside[i] != inside[j] if problem == "cut" else inside[i] and inside[j]
            color, width = ("#2a6f97", 0.8) if is_chosen else ("#bbbbbb", 0.4)
            axes.plot(x[[i, j]], y[[i, j]], color=color, lw=width, zorder=1)
        axes.scatter(x[~inside], y[~inside], s=14, color="white", edgecolor="#555555", zorder=2)
        axes.scatter(x[inside], y[inside], s=30, color="#2a6f97", zorder=3)
        axes.set_title(f"{abs(int(value))} {unit}", fontsize=9)
        axes.set_aspect("equal")
    return figure


recipe = Recipe(GraphProblemsConfig, build, seed_is_key=True)

"""Combinatorial problems on graphs: sets of vertices that grow while a vertex gains something.

    log R(S) = β value(S)

    problem             value             gain of v, given S
    independent_set     |S|               1 - |N(v) ∩ S|
    clique              |S|               the same on the complement of the graph
    dominating_set      -|S|              vertices of N(v) ∪ {v} that no other of S dominates
    cut                 edges S to rest   |N(v) \\ S| - |N(v) ∩ S|

with N(v) the neighbours of v. Action v takes the vertex v outside of S if its gain is positive; a
set that no vertex can join is terminal: a maximal independent set or clique, a dominating set, a
cut that no single vertex can enlarge by joining S.

A gain never grows as S does. Hence v may have been the last one exactly if its gain given S without
v is positive: the rest can be built in the order that S was built in, where every vertex gained at
least as much. That is the rule for ways back.

The energy -β value of incomplete sets serves forward-looking objectives. The graph is part of the
state: ``initial`` draws one, so that one policy is trained on many.

Zhang, Dai, Malkin, Courville, Bengio and Pan, "Let the flows tell: solving graph combinatorial
problems with GFlowNets", NeurIPS 2023.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gflownet.types import Environment

__all__ = [
    "GRAPH_PROBLEMS",
    "GraphProblem",
    "VertexGraph",
    "VertexSetState",
    "best_value",
    "graph_problem",
]

_MAX_ENUMERATED_VERTICES = 20
# States whose masks are computed at a time, so that one program serves all levels.
_ENUMERATED_TOGETHER = 1024


class VertexSetState(NamedTuple):
    """``inside`` [N] bool, the set S, and the ``adjacency`` [N, N] bool of its graph."""

    inside: jax.Array
    adjacency: jax.Array


class VertexGraph(NamedTuple):
    """What a policy sees: ``features`` [N, F] of vertices, ``relations`` [R, N, N] between them.

    Relations are weights, 0 where a pair has nothing to say to each other any more. Those between
    vertices that share something count paths of two steps: messages along edges alone could not
    tell how many triangles a vertex is in.
    """

    features: jax.Array
    relations: jax.Array


class GraphProblem(NamedTuple):
    """A problem, as functions of the adjacency [N, N] bool and of the set S [N] bool.

    Attributes:
      gain: ``(adjacency, inside) -> [N]`` of each vertex v given S without v; must not grow as S
        does.
      value: ``(adjacency, inside) -> []``.
      relations: ``(adjacency, inside, is_open) -> [R, N, N]`` that a policy sees of what is left to
        decide; ``is_open`` [N] are the vertices that can join.
      program: ``adjacency -> (cost, rows, low, high)`` of the integer program whose smallest cost
        is minus the largest value: the first N variables are S, the others lie in [0, 1].
      longest: ``adjacency -> `` a bound of the number of vertices of a set.
    """

    gain: Callable[[jax.Array, jax.Array], jax.Array]
    value: Callable[[jax.Array, jax.Array], jax.Array]
    relations: Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
    program: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray, float, np.ndarray]]
    longest: Callable[[np.ndarray], int] = len


def graph_problem(
    problem: str | GraphProblem,
    adjacency: np.ndarray,
    *,
    inverse_temperature: float = 1.0,
    max_enumerated: int = 100_000,
) -> Environment:
    """Builds the environment.

    Args:
      problem: a name of ``GRAPH_PROBLEMS`` or a problem of your own.
      adjacency: [N, N] bool, symmetric, of one graph, or [G, N, N] of several, of which ``initial``
        draws one.
      inverse_temperature: β.
      max_enumerated: ``enumerate`` is offered up to this number of states, for one graph of at most
        20 vertices.

    Returns:
      An ``Environment`` with N actions, whose observation is a ``VertexGraph``.

    Raises:
      ValueError: naming the argument that is out of range.

    >>> path = np.array([[0, 1, 0], [1, 0, 1], [0, 1, 0]], bool)
    >>> round(graph_problem("independent_set", path).log_z, 4)  # the ends, or the middle: e² + e
    2.3133
    """
    problem = _find(problem)
    graphs = np.asarray(adjacency).astype(bool)
    if graphs.ndim == 2:
        graphs = graphs[None]
    is_graph = graphs.ndim == 3 and graphs.shape[1] == graphs.shape[2] and graphs.size > 0
    if (
        not is_graph
        or (graphs != graphs.transpose(0, 2, 1)).any()
        or graphs.diagonal(0, 1, 2).any()
    ):
        raise ValueError(
            f"adjacency has shape {np.shape(adjacency)}; it must be symmetric [N, N] or [G, N, N], "
            "with no vertex its own neighbour."
        )
    num_vertices = graphs.shape[1]

    def initial(key):
        inside = jnp.zeros(num_vertices, bool)
        if len(graphs) == 1:
            return VertexSetState(inside, jnp.asarray(graphs[0]))
        chosen = jax.random.randint(key, (), 0, len(graphs))
        return VertexSetState(inside, jnp.asarray(graphs)[chosen])

    def gains(state):
        return problem.gain(state.adjacency, state.inside) > 0

    def log_reward(params, state):
        del params
        value = problem.value(state.adjacency, state.inside)
        return inverse_temperature * value.astype(jnp.result_type(float))

    environment = Environment(
        initial=initial,
        step=lambda state, v: state._replace(inside=state.inside.at[v].set(True)),
        undo=lambda state, v: state._replace(inside=state.inside.at[v].set(False)),
        forward_mask=lambda state: ~state.inside & gains(state),
        backward_mask=lambda state: state.inside & gains(state),
        observe=lambda state: _observe(problem, state),
        num_actions=num_vertices,
        max_length=max(1, *(problem.longest(graph) for graph in graphs)),
        log_reward=log_reward,
        intermediate_energy=lambda params, state: -log_reward(params, state),
    )
    if len(graphs) > 1 or num_vertices > _MAX_ENUMERATED_VERTICES:
        return environment
    rows = _enumerate(environment, graphs[0], max_enumerated)
    return environment if rows is None else _enumerated(environment, graphs[0], rows)


def best_value(problem: str | GraphProblem, adjacency: np.ndarray) -> int:
    """The largest value of a set, exactly, by integer programming.

    Args:
      problem: as of ``graph_problem``.
      adjacency: [N, N] bool; cuts of more than some tens of vertices take long.

    Raises:
      RuntimeError: if the program of a problem of your own has no solution.

    >>> path = np.array([[0, 1, 0], [1, 0, 1], [0, 1, 0]], bool)
    >>> [best_value(problem, path) for problem in ("clique", "dominating_set", "cut")]
    [2, -1, 2]
    """
    from scipy.optimize import Bounds, LinearConstraint, milp

    adjacency = np.asarray(adjacency, bool)
    cost, rows, low, high = _find(problem).program(adjacency)
    found = milp(
        cost,
        constraints=LinearConstraint(rows, low, high) if len(rows) else (),
        integrality=np.arange(len(cost)) < len(adjacency),
        bounds=Bounds(0, 1),
    )
    if found.fun is None:
        raise RuntimeError(f"The integer program was not solved: {found.message}")
    return round(-found.fun)


def _find(problem: str | GraphProblem) -> GraphProblem:
    if isinstance(problem, GraphProblem):
        return problem
    if problem not in GRAPH_PROBLEMS:
        raise ValueError(f"problem is {problem!r}; it must be one of {', '.join(GRAPH_PROBLEMS)}.")
    return GRAPH_PROBLEMS[problem]


def _observe(problem: GraphProblem, state: VertexSetState) -> VertexGraph:
    gain = jnp.maximum(problem.gain(state.adjacency, state.inside), 0)
    is_open = ~state.inside & (gain > 0)
    relations = problem.relations(state.adjacency, state.inside, is_open)
    status = jnp.stack([state.inside, is_open, ~state.inside & ~is_open])
    amounts = jnp.log1p(jnp.concatenate([gain[None], relations.sum(axis=2)]))
    return VertexGraph(jnp.concatenate([status, amounts]).T, relations)


# The problems.


def _pairs(chosen: jax.Array) -> jax.Array:
    """[N, N] bool, of two different ones among ``chosen``."""
    return chosen[:, None] & chosen & ~jnp.eye(len(chosen), dtype=bool)


def _shared(relation: jax.Array, num_open: jax.Array) -> jax.Array:
    """For each pair, how many the two have in common, as a share of the open vertices."""
    return (relation @ relation.T) / jnp.maximum(num_open, 1)


def _independent_gain(adjacency, inside):
    return 1 - (adjacency & inside).sum(axis=1)


def _independent_relations(adjacency, inside, is_open):
    """Pairs that exclude each other, pairs that do not, and of these what else they leave open."""
    del inside
    pairs = _pairs(is_open)
    excluding = (pairs & adjacency).astype(float)
    compatible = (pairs & ~adjacency).astype(float)
    shared = compatible * _shared(compatible, is_open.sum())
    return jnp.stack([excluding, compatible, shared])


def _independent_program(adjacency):
    first, second = np.nonzero(np.triu(adjacency))
    rows = np.zeros((len(first), len(adjacency)))
    edges = np.arange(len(first))
    rows[edges, first] = rows[edges, second] = 1.0
    return -np.ones(len(adjacency)), rows, -np.inf, np.ones(len(first))


def _longest_independent(adjacency):
    """A greedy cover by cliques: a set has at most one vertex of each."""
    cliques: list[list[int]] = []
    for vertex in range(len(adjacency)):
        for clique in cliques:
            if adjacency[vertex, clique].all():
                clique.append(vertex)
                break
        else:
            cliques.append([vertex])
    return len(cliques)


def _size(adjacency, inside):
    del adjacency
    return inside.sum()


def _complement(adjacency):
    return ~(adjacency | np.eye(len(adjacency), dtype=bool))


def _dominating_gain(adjacency, inside):
    covers = adjacency | jnp.eye(len(inside), dtype=bool)
    by_others = (covers & inside).sum(axis=1)[None] - (covers & inside[:, None])
    return (covers & (by_others == 0)).sum(axis=1)


def _dominating_relations(adjacency, inside, is_open):
    """Open vertices to the ones that they would dominate, back, and how much two would share."""
    covers = adjacency | jnp.eye(len(inside), dtype=bool)
    is_left = ~(covers & inside).any(axis=1)
    would = (covers & is_open[:, None] & is_left).astype(float)
    shared = _pairs(is_open) * _shared(would, is_left.sum())
    return jnp.stack([would, would.T, shared])


def _dominating_program(adjacency):
    size = len(adjacency)
    return np.ones(size), adjacency + np.eye(size), 1.0, np.full(size, np.inf)


def _cut_gain(adjacency, inside):
    return (adjacency & ~inside).sum(axis=1) - (adjacency & inside).sum(axis=1)


def _cut_relations(adjacency, inside, is_open):
    """Edges between open vertices, and the neighbours that two of them have in common."""
    del inside
    pairs = _pairs(is_open)
    edges = (pairs & adjacency).astype(float)
    return jnp.stack([edges, pairs * _shared(edges, is_open.sum())])


def _cut_program(adjacency):
    """An edge counts at most x_u + x_v, and at most 2 - x_u - x_v."""
    size = len(adjacency)
    first, second = np.nonzero(np.triu(adjacency))
    edges = np.arange(len(first))
    rows = np.zeros((2, len(first), size + len(first)))
    rows[:, edges, size + edges] = 1.0
    rows[0, edges, first] = rows[0, edges, second] = -1.0
    rows[1, edges, first] = rows[1, edges, second] = 1.0
    cost = np.concatenate([np.zeros(size), -np.ones(len(first))])
    return cost, rows.reshape(-1, len(cost)), -np.inf, np.repeat([0.0, 2.0], len(first))


def _on_complement(problem: GraphProblem) -> GraphProblem:
    return GraphProblem(
        gain=lambda adjacency, inside: problem.gain(_complement(adjacency), inside),
        value=lambda adjacency, inside: problem.value(_complement(adjacency), inside),
        relations=lambda adjacency, *sets: problem.relations(_complement(adjacency), *sets),
        program=lambda adjacency: problem.program(_complement(adjacency)),
        longest=lambda adjacency: problem.longest(_complement(adjacency)),
    )


_INDEPENDENT_SET = GraphProblem(
    gain=_independent_gain,
    value=_size,
    relations=_independent_relations,
    program=_independent_program,
    longest=_longest_independent,
)

GRAPH_PROBLEMS = {
    "independent_set": _INDEPENDENT_SET,
    "clique": _on_complement(_INDEPENDENT_SET),
    "dominating_set": GraphProblem(
        gain=_dominating_gain,
        value=lambda adjacency, inside: -inside.sum(),
        relations=_dominating_relations,
        program=_dominating_program,
    ),
    "cut": GraphProblem(
        gain=_cut_gain,
        value=lambda adjacency, inside: (adjacency & inside & ~inside[:, None]).sum(),
        relations=_cut_relations,
        program=_cut_program,
    ),
}


# Enumeration.


def _enumerate(environment: Environment, graph: np.ndarray, most: int) -> np.ndarray | None:
    """[S, N] all sets that can be reached, or ``None`` where there are too many."""
    mask_fn = jax.jit(
        jax.vmap(
            lambda inside: environment.forward_mask(VertexSetState(inside, jnp.asarray(graph)))
        )
    )

    def masks(inside):
        found = []
        for first in range(0, len(inside), _ENUMERATED_TOGETHER):
            rows = inside[first : first + _ENUMERATED_TOGETHER]
            padded = np.pad(rows, ((0, _ENUMERATED_TOGETHER - len(rows)), (0, 0)))
            found.append(np.asarray(mask_fn(padded))[: len(rows)])
        return np.concatenate(found)

    levels = [np.zeros((1, len(graph)), bool)]
    while True:
        sets, joined = np.nonzero(masks(levels[-1]))
        if not len(sets):
            return np.concatenate(levels)
        grown = levels[-1][sets]
        grown[np.arange(len(grown)), joined] = True
        levels.append(np.unique(grown, axis=0))
        if sum(map(len, levels)) > most:
            return None


def _enumerated(environment: Environment, graph: np.ndarray, rows: np.ndarray) -> Environment:
    """With all states, the exact longest path and log Z."""
    place = np.full(2 ** len(graph), -1, np.int32)
    place[rows @ 2 ** np.arange(len(graph))] = np.arange(len(rows))
    states = VertexSetState._make((rows, np.repeat(graph[None], len(rows), axis=0)))

    def state_index(state):
        bits = state.inside @ (2 ** jnp.arange(len(graph), dtype=jnp.int32))
        return jnp.asarray(place)[bits]

    ends = ~np.asarray(jax.vmap(environment.forward_mask)(states)).any(axis=1)
    log_rewards = np.asarray(jax.vmap(environment.log_reward, (None, 0))((), states), np.float64)
    return environment._replace(
        max_length=int(rows.sum(axis=1).max()),
        enumerate=lambda: states,
        state_index=state_index,
        log_z=float(np.logaddexp.reduce(log_rewards[ends])),
    )

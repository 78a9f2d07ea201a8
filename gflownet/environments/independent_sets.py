"""Independent sets of a graph: take vertices one by one until none is left that could be taken.

    log R(x) = β |x|

A vertex is undecided, in the set, or out of it because a neighbour is in; action v takes the
undecided vertex v, which puts its undecided neighbours out. A state without undecided vertices, a
maximal independent set, is terminal. Each vertex of the set may have been the last, so that a set
has as many parents as vertices. The energy -β |x| of incomplete sets serves forward-looking
objectives.

The graph is part of the state: ``initial`` draws one, so that one policy is trained on many.

Zhang, Dai, Malkin, Courville, Bengio and Pan, "Let the flows tell: solving graph combinatorial
problems with GFlowNets", NeurIPS 2023.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gflownet.types import Environment

__all__ = [
    "IndependentSetState",
    "independence_number",
    "independent_sets",
    "random_clique_graph",
]

OUT, IN, UNDECIDED = 0, 1, 2


class IndependentSetState(NamedTuple):
    """``status`` [N] int32 (0 out, 1 in, 2 undecided) and ``adjacency`` [N, N] bool."""

    status: jax.Array
    adjacency: jax.Array


def random_clique_graph(
    seed: int, *, num_cliques: int, clique_size: int, tightness: float
) -> np.ndarray:
    """[N, N] bool adjacency of a graph of the RB model, N = num_cliques * clique_size.

    Vertices form n disjoint cliques of d. ``r n log n`` times two cliques are drawn, and a share p
    of the d² pairs between them is joined; r = -α / log(1 - p) with d = n^α, the edge of the range
    where some set takes one vertex of each clique.

    Args:
      seed: of the graph.
      num_cliques: n, at least 2.
      clique_size: d, at least 1.
      tightness: p, between 0 and 1.

    Xu and Li, "Exact phase transitions in random constraint satisfaction problems", JAIR 2000.
    """
    if num_cliques < 2 or clique_size < 1:
        raise ValueError(
            f"num_cliques is {num_cliques} and clique_size {clique_size}; at least 2 cliques of at "
            "least 1 vertex make a graph."
        )
    if not 0.0 < tightness < 1.0:
        raise ValueError(f"tightness is {tightness}; it must lie between 0 and 1.")
    rng = np.random.default_rng(seed)
    size = num_cliques * clique_size
    clique = np.arange(size) // clique_size
    adjacency = clique[:, None] == clique[None]
    exponent = np.log(clique_size) / np.log(num_cliques)
    density = -exponent / np.log(1.0 - tightness)
    num_pairs = max(1, round(tightness * clique_size**2))
    for _ in range(round(density * num_cliques * np.log(num_cliques))):
        first, second = rng.choice(num_cliques, size=2, replace=False)
        joined = rng.choice(clique_size**2, size=num_pairs, replace=False)
        rows = first * clique_size + joined // clique_size
        columns = second * clique_size + joined % clique_size
        adjacency[rows, columns] = adjacency[columns, rows] = True
    np.fill_diagonal(adjacency, False)
    return adjacency


def independence_number(adjacency: np.ndarray) -> int:
    """The size of the largest independent set, exactly, by branch and bound; for small graphs.

    >>> independence_number(np.array([[0, 1, 0], [1, 0, 1], [0, 1, 0]], bool))  # a path
    2
    """
    neighbours = [int(sum(1 << int(j) for j in np.flatnonzero(row))) for row in adjacency]

    def best(left: int) -> int:
        found = 0
        while left:
            vertices = [v for v in range(len(neighbours)) if left >> v & 1]
            degrees = [(neighbours[v] & left).bit_count() for v in vertices]
            smallest = int(np.argmin(degrees))
            if degrees[smallest] <= 1:
                # Some largest set has a vertex that has at most one neighbour left.
                found += 1
                left &= ~(neighbours[vertices[smallest]] | 1 << vertices[smallest])
                continue
            most = vertices[int(np.argmax(degrees))]
            with_it = 1 + best(left & ~(neighbours[most] | 1 << most))
            return found + max(with_it, best(left & ~(1 << most)))
        return found

    return best((1 << len(neighbours)) - 1)


def independent_sets(
    adjacency: np.ndarray,
    *,
    inverse_temperature: float = 1.0,
    max_enumerated: int = 100_000,
) -> Environment:
    """Builds the environment.

    Args:
      adjacency: [N, N] bool, symmetric, of one graph, or [G, N, N] of several, of which ``initial``
        draws one.
      inverse_temperature: β.
      max_enumerated: ``enumerate`` is offered up to this number of states, for one graph of at most
        20 vertices.

    Returns:
      An ``Environment`` with N actions, whose observation is the state.

    Raises:
      ValueError: naming the argument that is out of range.

    >>> path = np.array([[0, 1, 0], [1, 0, 1], [0, 1, 0]], bool)
    >>> round(independent_sets(path).log_z, 4)  # exp(2) + exp(1): the ends, or the middle
    2.3133
    """
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
    rows = _enumerate(graphs[0], max_enumerated) if len(graphs) == 1 else None

    def initial(key):
        status = jnp.full(num_vertices, UNDECIDED, jnp.int32)
        if len(graphs) == 1:
            return IndependentSetState(status, jnp.asarray(graphs[0]))
        chosen = jax.random.randint(key, (), 0, len(graphs))
        return IndependentSetState(status, jnp.asarray(graphs)[chosen])

    def step(state, action):
        status = jnp.where(state.adjacency[action] & (state.status == UNDECIDED), OUT, state.status)
        return state._replace(status=status.at[action].set(IN))

    def undo(state, action):
        inside = (state.status == IN) & (jnp.arange(num_vertices) != action)
        blocked = (state.adjacency & inside[:, None]).any(axis=0)
        status = jnp.where(inside, IN, jnp.where(blocked, OUT, UNDECIDED)).astype(jnp.int32)
        return state._replace(status=status)

    def size(state):
        return jnp.sum(state.status == IN).astype(jnp.result_type(float))

    place = None
    if rows is not None:
        place = np.full(2**num_vertices, -1, np.int32)
        place[(rows == IN) @ 2 ** np.arange(num_vertices)] = np.arange(len(rows))

    def enumerate_states():
        assert rows is not None
        return IndependentSetState(rows, np.repeat(graphs, len(rows), axis=0))

    def state_index(state):
        bits = (state.status == IN) @ (2 ** jnp.arange(num_vertices, dtype=jnp.int32))
        return jnp.asarray(place)[bits]

    log_z = None
    if rows is not None:
        ends = (rows != UNDECIDED).all(axis=1)
        log_z = float(np.logaddexp.reduce(inverse_temperature * (rows[ends] == IN).sum(axis=1)))
    return Environment(
        initial=initial,
        step=step,
        undo=undo,
        forward_mask=lambda state: state.status == UNDECIDED,
        backward_mask=lambda state: state.status == IN,
        observe=lambda state: state,
        num_actions=num_vertices,
        max_length=_longest(graphs),
        log_reward=lambda params, state: inverse_temperature * size(state),
        enumerate=None if rows is None else enumerate_states,
        state_index=None if rows is None else state_index,
        log_z=log_z,
        intermediate_energy=lambda params, state: -inverse_temperature * size(state),
    )


def _longest(graphs: np.ndarray) -> int:
    """The largest number of vertices of a set: exact for small graphs, a bound for others."""
    if graphs.shape[1] <= 40:
        return max(independence_number(graph) for graph in graphs)
    # A greedy cover by cliques: a set has at most one vertex of each.
    longest = 0
    for graph in graphs:
        cliques: list[list[int]] = []
        for vertex in range(len(graph)):
            for clique in cliques:
                if graph[vertex, clique].all():
                    clique.append(vertex)
                    break
            else:
                cliques.append([vertex])
        longest = max(longest, len(cliques))
    return longest


def _enumerate(graph: np.ndarray, most: int) -> np.ndarray | None:
    """[S, N] status of all states, or ``None`` where there are too many."""
    num_vertices = len(graph)
    if num_vertices > 20:
        return None
    found = [np.zeros(num_vertices, bool)]
    for vertex in range(num_vertices):
        found += [
            chosen | (np.arange(num_vertices) == vertex)
            for chosen in found
            if not (chosen & graph[vertex]).any()
        ]
        if len(found) > most:
            return None
    inside = np.array(found)
    blocked = (inside[:, :, None] & graph[None]).any(axis=1)
    return np.where(inside, IN, np.where(blocked, OUT, UNDECIDED)).astype(np.int32)

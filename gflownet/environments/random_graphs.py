"""Random graphs, as adjacencies [N, N] bool: symmetric, no vertex its own neighbour."""

from __future__ import annotations

import numpy as np

__all__ = ["preferential_graph", "random_clique_graph"]


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


def preferential_graph(seed: int, *, num_vertices: int, num_neighbours: int) -> np.ndarray:
    """[N, N] bool adjacency of a graph that grew by preferential attachment.

    After the first m vertices each new one is joined to m different ones that were there, drawn in
    proportion to their degrees (the first of all to the m first).

    Args:
      seed: of the graph.
      num_vertices: N, more than m.
      num_neighbours: m, at least 1.

    Barabási and Albert, "Emergence of scaling in random networks", Science 286 (1999).

    >>> graph = preferential_graph(0, num_vertices=10, num_neighbours=3)
    >>> graph.shape, int(graph.sum()) // 2
    ((10, 10), 21)
    """
    if not 1 <= num_neighbours < num_vertices:
        raise ValueError(
            f"num_neighbours is {num_neighbours}; it must be from 1 to one less than the "
            f"{num_vertices} vertices."
        )
    rng = np.random.default_rng(seed)
    adjacency = np.zeros((num_vertices, num_vertices), bool)
    adjacency[num_neighbours, :num_neighbours] = adjacency[:num_neighbours, num_neighbours] = True
    for vertex in range(num_neighbours + 1, num_vertices):
        degrees = adjacency[:vertex].sum(axis=1)
        chosen = rng.choice(vertex, num_neighbours, replace=False, p=degrees / degrees.sum())
        adjacency[vertex, chosen] = adjacency[chosen, vertex] = True
    return adjacency

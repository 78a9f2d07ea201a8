"""Environments: the graphs that GFlowNets walk."""

from gflownet.environments.bit_sequences import bit_sequences, hidden_modes, words_to_bits
from gflownet.environments.bounded_targets import corners_target, steps_target, torus_target
from gflownet.environments.box import BoxState, box
from gflownet.environments.composed import (
    ChoiceState,
    RestrictedState,
    choice,
    enumerated,
    restricted,
    stack,
)
from gflownet.environments.cube import CubeState, cube
from gflownet.environments.dags import (
    DagState,
    all_dags,
    bge_scores,
    dags,
    edge_marginals,
    linear_gaussian_data,
    linear_gaussian_scores,
)
from gflownet.environments.graph_problems import (
    GRAPH_PROBLEMS,
    GraphProblem,
    VertexGraph,
    VertexSetState,
    best_value,
    graph_problem,
)
from gflownet.environments.hypergrid import HypergridState, hypergrid
from gflownet.environments.phylogeny import ForestState, encode_sites, load_alignment, phylogeny
from gflownet.environments.random_graphs import preferential_graph, random_clique_graph
from gflownet.environments.sequence_tables import qm9_strings, table_sequences, tfbind8
from gflownet.environments.sequences import (
    SequenceState,
    discrete_energy,
    sequence_index,
    sequences,
    table_log_reward,
)
from gflownet.environments.sets import benchmark_sets, inclusion_probabilities, sets
from gflownet.environments.torus import TorusState, torus

__all__ = [
    "GRAPH_PROBLEMS",
    "BoxState",
    "ChoiceState",
    "CubeState",
    "DagState",
    "ForestState",
    "GraphProblem",
    "HypergridState",
    "RestrictedState",
    "SequenceState",
    "TorusState",
    "VertexGraph",
    "VertexSetState",
    "all_dags",
    "benchmark_sets",
    "best_value",
    "bge_scores",
    "bit_sequences",
    "box",
    "choice",
    "corners_target",
    "cube",
    "dags",
    "discrete_energy",
    "edge_marginals",
    "encode_sites",
    "enumerated",
    "graph_problem",
    "hidden_modes",
    "hypergrid",
    "inclusion_probabilities",
    "linear_gaussian_data",
    "linear_gaussian_scores",
    "load_alignment",
    "phylogeny",
    "preferential_graph",
    "qm9_strings",
    "random_clique_graph",
    "restricted",
    "sequence_index",
    "sequences",
    "sets",
    "stack",
    "steps_target",
    "table_log_reward",
    "table_sequences",
    "tfbind8",
    "torus",
    "torus_target",
    "words_to_bits",
]

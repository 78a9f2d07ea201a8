"""Environments: the graphs that GFlowNets walk."""

from gflownet.environments.bit_sequences import bit_sequences, hidden_modes, words_to_bits
from gflownet.environments.dags import (
    DagState,
    all_dags,
    bge_scores,
    dags,
    edge_marginals,
    linear_gaussian_data,
    linear_gaussian_scores,
)
from gflownet.environments.hypergrid import HypergridState, hypergrid
from gflownet.environments.independent_sets import (
    IndependentSetState,
    independence_number,
    independent_sets,
    random_clique_graph,
)
from gflownet.environments.phylogeny import ForestState, encode_sites, load_alignment, phylogeny
from gflownet.environments.sequence_tables import qm9_strings, table_sequences, tfbind8
from gflownet.environments.sequences import (
    SequenceState,
    discrete_energy,
    sequence_index,
    sequences,
    table_log_reward,
)
from gflownet.environments.sets import benchmark_sets, inclusion_probabilities, sets

__all__ = [
    "DagState",
    "ForestState",
    "HypergridState",
    "IndependentSetState",
    "SequenceState",
    "all_dags",
    "benchmark_sets",
    "bge_scores",
    "bit_sequences",
    "dags",
    "discrete_energy",
    "edge_marginals",
    "encode_sites",
    "hidden_modes",
    "hypergrid",
    "inclusion_probabilities",
    "independence_number",
    "independent_sets",
    "linear_gaussian_data",
    "linear_gaussian_scores",
    "load_alignment",
    "phylogeny",
    "qm9_strings",
    "random_clique_graph",
    "sequence_index",
    "sequences",
    "sets",
    "table_log_reward",
    "table_sequences",
    "tfbind8",
    "words_to_bits",
]

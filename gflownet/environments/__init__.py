"""Environments: the graphs that GFlowNets walk."""

from gflownet.environments.hypergrid import HypergridState, hypergrid

__all__ = ["HypergridState", "hypergrid"]

"""Policies: P_F and P_B of a state."""

from gflownet.policies.networks import mlp_policy
from gflownet.policies.tabular import tabular_policy

__all__ = ["mlp_policy", "tabular_policy"]

"""Policies: P_F and P_B of a state."""

from gflownet.policies.networks import mlp_policy
from gflownet.policies.separate import separate_backward
from gflownet.policies.tabular import tabular_policy

__all__ = ["mlp_policy", "separate_backward", "tabular_policy"]

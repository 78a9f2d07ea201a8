"""Policies: P_F and P_B of a state."""

from gflownet.policies.diffusion import DiffusionPolicy, diffusion_policy
from gflownet.policies.graphs import vertex_policy
from gflownet.policies.max_entropy import (
    fixed_backward,
    log_path_counts,
    max_entropy_backward,
)
from gflownet.policies.mixtures import MIXTURE_FAMILIES, mixture_policy
from gflownet.policies.networks import mlp_policy
from gflownet.policies.separate import separate_backward
from gflownet.policies.tabular import tabular_policy
from gflownet.policies.transformer import pair_policy, transformer_policy

__all__ = [
    "MIXTURE_FAMILIES",
    "DiffusionPolicy",
    "diffusion_policy",
    "fixed_backward",
    "log_path_counts",
    "max_entropy_backward",
    "mixture_policy",
    "mlp_policy",
    "pair_policy",
    "separate_backward",
    "tabular_policy",
    "transformer_policy",
    "vertex_policy",
]

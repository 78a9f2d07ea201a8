"""Objectives of GFlowNets."""

from gflownet.objectives.detailed_balance import detailed_balance, detailed_balance_residuals
from gflownet.objectives.energy_based_flow import (
    FlowNegatives,
    energy_based_flow,
    flow_negatives,
    rising_steps,
)
from gflownet.objectives.flow_matching import flow_matching, flow_matching_residuals
from gflownet.objectives.flow_objective import FlowBatch, flow_objective, terminal_flow
from gflownet.objectives.forward_looking import (
    forward_looking,
    forward_looking_detailed_balance,
    forward_looking_flow,
    forward_looking_subtrajectory_balance,
)
from gflownet.objectives.kullback_leibler import (
    forward_kullback_leibler,
    reverse_kullback_leibler,
    reverse_surrogate,
)
from gflownet.objectives.learned_energy_decomposition import (
    corrected_potential,
    decomposed_residuals,
    learned_energy_decomposition,
    potential_loss,
)
from gflownet.objectives.log_partition_variance import (
    log_partition_variance,
    log_partition_variance_residuals,
)
from gflownet.objectives.modified_detailed_balance import (
    modified_detailed_balance,
    modified_detailed_balance_residuals,
)
from gflownet.objectives.path_consistency import path_consistency, path_consistency_residuals
from gflownet.objectives.proposals import Proposals, diffusion_proposals, flow_proposals
from gflownet.objectives.relative_trajectory_balance import (
    relative_trajectory_balance,
    relative_trajectory_balance_residual,
)
from gflownet.objectives.residual_losses import (
    ResidualLoss,
    huber,
    linex,
    log_cosh,
    shifted_cosh,
    squared,
)
from gflownet.objectives.soft_q import soft_q_learning, soft_q_residuals
from gflownet.objectives.subtrajectory_balance import (
    subtrajectory_balance,
    subtrajectory_losses,
    subtrajectory_residuals,
    subtrajectory_weights,
)
from gflownet.objectives.target_network import TargetState, with_target
from gflownet.objectives.trajectory_balance import trajectory_balance, trajectory_balance_residual
from gflownet.objectives.trajectory_likelihood import backward_likelihood, trajectory_likelihood

__all__ = [
    "FlowBatch",
    "FlowNegatives",
    "Proposals",
    "ResidualLoss",
    "TargetState",
    "backward_likelihood",
    "corrected_potential",
    "decomposed_residuals",
    "detailed_balance",
    "detailed_balance_residuals",
    "diffusion_proposals",
    "energy_based_flow",
    "flow_matching",
    "flow_matching_residuals",
    "flow_negatives",
    "flow_objective",
    "flow_proposals",
    "forward_kullback_leibler",
    "forward_looking",
    "forward_looking_detailed_balance",
    "forward_looking_flow",
    "forward_looking_subtrajectory_balance",
    "huber",
    "learned_energy_decomposition",
    "linex",
    "log_cosh",
    "log_partition_variance",
    "log_partition_variance_residuals",
    "modified_detailed_balance",
    "modified_detailed_balance_residuals",
    "path_consistency",
    "path_consistency_residuals",
    "potential_loss",
    "relative_trajectory_balance",
    "relative_trajectory_balance_residual",
    "reverse_kullback_leibler",
    "reverse_surrogate",
    "rising_steps",
    "shifted_cosh",
    "soft_q_learning",
    "soft_q_residuals",
    "squared",
    "subtrajectory_balance",
    "subtrajectory_losses",
    "subtrajectory_residuals",
    "subtrajectory_weights",
    "terminal_flow",
    "trajectory_balance",
    "trajectory_balance_residual",
    "trajectory_likelihood",
    "with_target",
]

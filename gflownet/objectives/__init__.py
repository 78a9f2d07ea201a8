"""Objectives of GFlowNets."""

from gflownet.objectives.trajectory_balance import trajectory_balance, trajectory_balance_residual

__all__ = ["trajectory_balance", "trajectory_balance_residual"]

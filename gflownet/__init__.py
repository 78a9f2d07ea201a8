"""GFlowNets in JAX: environments, policies, objectives, rollouts and their exact laws."""

from gflownet import environments, exact, objectives, policies
from gflownet.distributions import MaskedCategorical
from gflownet.rollout import Scores, backward_rollout, forward_rollout, score
from gflownet.types import Environment, Policy, PolicyOutput, Trajectories

__all__ = [
    "Environment",
    "MaskedCategorical",
    "Policy",
    "PolicyOutput",
    "Scores",
    "Trajectories",
    "backward_rollout",
    "environments",
    "exact",
    "forward_rollout",
    "objectives",
    "policies",
    "score",
]

"""GFlowNets in JAX: environments, policies, objectives, rollouts and their exact laws."""

from gflownet import (
    conditional,
    environments,
    exact,
    exploration,
    local_search,
    objectives,
    policies,
    replay,
    sampling,
    thompson,
)
from gflownet.distributions import MaskedCategorical
from gflownet.loading import load
from gflownet.rollout import backward_rollout, forward_rollout
from gflownet.scoring import Scores, at_states, score
from gflownet.types import Environment, Policy, PolicyOutput, Trajectories

__all__ = [
    "Environment",
    "MaskedCategorical",
    "Policy",
    "PolicyOutput",
    "Scores",
    "Trajectories",
    "at_states",
    "backward_rollout",
    "conditional",
    "environments",
    "exact",
    "exploration",
    "forward_rollout",
    "load",
    "local_search",
    "objectives",
    "policies",
    "replay",
    "sampling",
    "score",
    "thompson",
]

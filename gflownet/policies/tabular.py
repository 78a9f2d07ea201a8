"""A table as a policy: a row of logits a state. Exact solutions of small problems fit in it."""

from __future__ import annotations

import jax.numpy as jnp

from gflownet.distributions import MaskedCategorical
from gflownet.types import Policy, PolicyOutput

__all__ = ["tabular_policy"]


def tabular_policy(num_states: int, num_actions: int) -> Policy:
    """Logits of both directions, and log flows, read from tables.

    The observation is the index of the state: use it with
    ``environment._replace(observe=environment.state_index)``.

    Args:
      num_states: S.
      num_actions: A.

    Returns:
      A ``Policy`` whose parameters are ``{"forward": [S, A], "backward": [S, A],
      "log_flow": [S]}``, initially 0.
    """

    def init(key, observation):
        del key, observation
        return {
            "forward": jnp.zeros((num_states, num_actions)),
            "backward": jnp.zeros((num_states, num_actions)),
            "log_flow": jnp.zeros(num_states),
        }

    def apply(params, observation, forward_mask, backward_mask):
        return PolicyOutput(
            forward=MaskedCategorical(params["forward"][observation], forward_mask),
            backward=MaskedCategorical(params["backward"][observation], backward_mask),
            log_flow=params["log_flow"][observation],
        )

    return Policy(init=init, apply=apply)

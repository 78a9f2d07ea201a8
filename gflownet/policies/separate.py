"""P_F and P_B with parameters of their own."""

from __future__ import annotations

import jax

from gflownet.types import Policy

__all__ = ["separate_backward"]


def separate_backward(forward: Policy, backward: Policy) -> Policy:
    """P_F and log F of one policy, P_B of another.

    Args:
      forward: its P_B is not used.
      backward: its P_F and log F are not used.

    Returns:
      A ``Policy`` whose parameters are ``{"forward": ..., "backward": ...}``.
    """

    def init(key, observation):
        forward_key, backward_key = jax.random.split(key)
        return {
            "forward": forward.init(forward_key, observation),
            "backward": backward.init(backward_key, observation),
        }

    def apply(params, observation, forward_mask, backward_mask):
        inputs = (observation, forward_mask, backward_mask)
        output = forward.apply(params["forward"], *inputs)
        return output._replace(backward=backward.apply(params["backward"], *inputs).backward)

    return Policy(init, apply, forward.remembers and backward.remembers)

"""Behaviour policies: other laws than P_F to draw trajectories by, while P_F is what is recorded.

    μ(a | s) ∝ P_F(a | s)^(1/T) exp(-b 1[a = stop])

T > 1 flattens the policy, b > 0 puts the stop off. The share ε of uniform actions comes on top of
that: ``(1 - ε) μ + ε uniform``. Residuals need no importance weights for any of it.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax.typing import ArrayLike

from gflownet.distributions import MaskedCategorical
from gflownet.types import Policy

__all__ = ["exploring_policy"]


def exploring_policy(
    policy: Policy,
    *,
    temperature: ArrayLike = 1.0,
    stop_bias: ArrayLike = 0.0,
    stop_action: int | None = None,
) -> Policy:
    """The same policy, drawn from at a temperature and with the stop put off.

    Log-probabilities, log flows and P_B stay those of ``policy``: only what a rollout draws
    forwards changes.

    Args:
      policy: P_F over discrete actions.
      temperature: [] T > 0.
      stop_bias: [] b, taken from the stop's logit after tempering.
      stop_action: the environment's.

    Raises:
      ValueError: for a temperature that is not positive, or a stop bias without a stop action.

    >>> from gflownet.policies import tabular_policy
    >>> policy = exploring_policy(
    ...     tabular_policy(1, 2), temperature=2.0, stop_bias=1.0, stop_action=1)
    >>> params = {"forward": jnp.array([[0.0, 2.0]]), "backward": jnp.zeros((1, 2)),
    ...           "log_flow": jnp.zeros(1)}
    >>> law = policy.apply(params, 0, jnp.ones(2, bool), jnp.zeros(2, bool)).forward
    >>> [round(float(p), 3) for p in law.probs()], round(float(jnp.exp(law.log_prob(1))), 3)
    ([0.5, 0.5], 0.881)
    """
    if isinstance(temperature, float | int) and not temperature > 0:
        raise ValueError(f"temperature is {temperature}; it must be positive.")
    if stop_action is None and not (isinstance(stop_bias, float | int) and stop_bias == 0):
        raise ValueError(
            f"stop_bias is {stop_bias}; it must be 0, for the environment has no stop action."
        )

    def apply(params, observation, forward_mask, backward_mask):
        output = policy.apply(params, observation, forward_mask, backward_mask)
        law = output.forward
        if not isinstance(law, MaskedCategorical):
            raise TypeError(
                f"policy has a P_F of type {type(law).__name__}; only a MaskedCategorical has "
                "logits to temper."
            )
        is_uniform = law.logits is None
        logits = jnp.zeros(law.mask.shape) if is_uniform else law.logits / temperature
        if stop_action is not None:
            logits = logits - jnp.where(jnp.arange(logits.shape[0]) == stop_action, stop_bias, 0.0)
        return output._replace(forward=law.behave(logits))

    return policy._replace(apply=apply)

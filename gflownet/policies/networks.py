"""Policies as networks: one trunk, a head a direction."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp

from gflownet.distributions import MaskedCategorical
from gflownet.types import Policy, PolicyOutput

__all__ = ["MLPHeads", "check_backward", "masked_output", "mlp_policy"]


def check_backward(backward: str) -> bool:
    """Whether P_B is learned; refuses what is neither ``"learned"`` nor ``"uniform"``."""
    if backward not in ("learned", "uniform"):
        raise ValueError(f"backward is {backward!r}; it must be 'learned' or 'uniform'.")
    return backward == "learned"


def masked_output(
    logits: jax.Array,
    log_flow: jax.Array | None,
    forward_mask: jax.Array,
    backward_mask: jax.Array,
) -> PolicyOutput:
    """The output of a network over discrete actions.

    Args:
      logits: [2, A] of P_F and P_B, or [1, A] of P_F where P_B is uniform.
      log_flow: [] or ``None``.
      forward_mask: [A] bool.
      backward_mask: [A] bool.
    """
    backward = logits[1] if len(logits) == 2 else None
    return PolicyOutput(
        forward=MaskedCategorical(logits[0], forward_mask),
        backward=MaskedCategorical(backward, backward_mask),
        log_flow=log_flow,
    )


class MLPHeads(nn.Module):
    """A perceptron on the flattened observation; its outputs [N] are heads, one after the other."""

    features: tuple[int, ...]
    num_outputs: int
    activation: Callable[[jax.Array], jax.Array]

    @nn.compact
    def __call__(self, x):
        """The outputs [N] of an observation."""
        x = jnp.ravel(x)
        for width in self.features:
            x = self.activation(nn.Dense(width)(x))
        return nn.Dense(self.num_outputs)(x)


def mlp_policy(
    num_actions: int,
    features: Sequence[int] = (256, 256),
    *,
    backward: str = "learned",
    with_flow: bool = False,
    activation: Callable[[jax.Array], jax.Array] = nn.leaky_relu,
) -> Policy:
    """A multilayer perceptron on the flattened observation, over discrete actions.

    Args:
      num_actions: A.
      features: widths of the hidden layers.
      backward: ``"learned"``, P_B from a second head on the same trunk, or ``"uniform"`` over the
        allowed backward actions.
      with_flow: whether one more output on the same trunk is log F.
      activation: elementwise.

    Raises:
      ValueError: for another ``backward``.
    """
    num_directions = 1 + check_backward(backward)
    num_logits = num_actions * num_directions
    module = MLPHeads(tuple(features), num_logits + with_flow, activation)

    def init(key, observation):
        return module.init(key, observation)["params"]

    def apply(params, observation, forward_mask, backward_mask):
        outputs = module.apply({"params": params}, observation)
        logits = outputs[:num_logits].reshape(num_directions, num_actions)
        log_flow = outputs[num_logits] if with_flow else None
        return masked_output(logits, log_flow, forward_mask, backward_mask)

    return Policy(init=init, apply=apply, remembers=True)

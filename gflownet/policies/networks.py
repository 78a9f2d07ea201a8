"""Policies as networks: one trunk, a head a direction."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp

from gflownet.distributions import MaskedCategorical
from gflownet.types import Policy, PolicyOutput

__all__ = ["mlp_policy"]


class _MLPHeads(nn.Module):
    features: tuple[int, ...]
    num_outputs: int
    activation: Callable[[jax.Array], jax.Array]

    @nn.compact
    def __call__(self, x):
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
    if backward not in ("learned", "uniform"):
        raise ValueError(f"backward is {backward!r}; it must be 'learned' or 'uniform'.")
    is_learned = backward == "learned"
    num_logits = num_actions * (2 if is_learned else 1)
    module = _MLPHeads(tuple(features), num_logits + with_flow, activation)

    def init(key, observation):
        return module.init(key, observation)["params"]

    def apply(params, observation, forward_mask, backward_mask):
        outputs = module.apply({"params": params}, observation)
        logits = outputs[:num_logits]
        backward_logits = logits[num_actions:] if is_learned else jnp.zeros(num_actions)
        return PolicyOutput(
            forward=MaskedCategorical(logits[:num_actions], forward_mask),
            backward=MaskedCategorical(backward_logits, backward_mask),
            log_flow=outputs[num_logits] if with_flow else None,
        )

    return Policy(init=init, apply=apply)

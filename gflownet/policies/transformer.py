"""Policies with attention: over the places of a sequence, and over the trees of a forest.

sequence   h_l = token_l + position_l, blocks;  logits per place from h_l, or of all from mean h
pairs      h_i = rows_i, blocks;  logit of joining i < j from h_i + h_j and h_i h_j, symmetric
"""

from __future__ import annotations

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from ebjax.energies.networks.attention import AttentionBlock, check_heads
from gflownet.policies.networks import check_backward, masked_output
from gflownet.types import Policy

__all__ = ["pair_policy", "transformer_policy"]


class _SequenceHeads(nn.Module):
    vocabulary: int
    num_actions: int
    per_place: bool
    num_directions: int
    with_flow: bool
    width: int
    num_layers: int
    num_heads: int
    inner_width: int
    activation: Callable[[jax.Array], jax.Array]

    @nn.compact
    def __call__(self, tokens):
        length = len(tokens)
        h = nn.Embed(self.vocabulary + 1, self.width)(tokens)
        h = h + self.param("positions", nn.initializers.normal(0.1), (length, self.width))
        for _ in range(self.num_layers):
            h = AttentionBlock(self.num_heads, self.activation, self.inner_width)(h)
        h = nn.LayerNorm()(h)
        mean = h.mean(axis=0)
        shape = (self.num_directions, -1)
        if not self.per_place:
            logits = nn.Dense(self.num_directions * self.num_actions)(mean).reshape(shape)
        else:
            at_places = nn.Dense(self.num_directions * self.vocabulary)(h)
            at_places = at_places.reshape(length, *shape).swapaxes(0, 1).reshape(shape)
            logits, num_others = at_places, self.num_actions - length * self.vocabulary
            if num_others:
                others = nn.Dense(self.num_directions * num_others)(mean).reshape(shape)
                logits = jnp.concatenate([at_places, others], axis=1)
        return logits, nn.Dense(1)(mean)[0] if self.with_flow else None


def transformer_policy(
    vocabulary: int,
    num_actions: int,
    *,
    per_place: bool = False,
    width: int = 64,
    num_layers: int = 3,
    num_heads: int = 8,
    inner_width: int = 64,
    backward: str = "learned",
    with_flow: bool = False,
    activation: Callable[[jax.Array], jax.Array] = nn.relu,
) -> Policy:
    """A transformer on the tokens of a sequence, for ``sequences(observe_tokens=True)``.

    Args:
      vocabulary: V; token V stands where there is none yet.
      num_actions: A.
      per_place: the first L V actions are "token v at place l", and their logits come from the
        place; otherwise all logits come from the mean over places.
      width: features of a place.
      num_layers: attention blocks.
      num_heads: of each; divides ``width``.
      inner_width: of each block's perceptron.
      backward: ``"learned"`` or ``"uniform"``, see ``mlp_policy``.
      with_flow: whether log F is another output.
      activation: elementwise, in the perceptrons.

    Raises:
      ValueError: naming the argument that is out of range.

    >>> policy = transformer_policy(4, 12, per_place=True, width=8, num_layers=1, num_heads=2)
    >>> tokens = jnp.array([4, 1, 4])
    >>> params = policy.init(jax.random.key(0), tokens)
    >>> policy.apply(params, tokens, jnp.ones(12, bool), jnp.ones(12, bool)).forward.logits.shape
    (12,)
    """
    check_heads(width, num_layers, num_heads)
    is_learned = check_backward(backward)
    module = _SequenceHeads(
        vocabulary,
        num_actions,
        per_place,
        1 + is_learned,
        with_flow,
        width,
        num_layers,
        num_heads,
        inner_width,
        activation,
    )

    def init(key, observation):
        _check_actions(observation)
        return module.init(key, observation)["params"]

    def _check_actions(tokens):
        if per_place and num_actions < len(tokens) * vocabulary:
            raise ValueError(
                f"num_actions is {num_actions}; {len(tokens)} places of {vocabulary} tokens need "
                f"at least {len(tokens) * vocabulary}."
            )

    def apply(params, observation, forward_mask, backward_mask):
        logits, log_flow = module.apply({"params": params}, observation)
        return masked_output(logits, log_flow, forward_mask, backward_mask)

    return Policy(init, apply)


class _PairHeads(nn.Module):
    num_directions: int
    with_flow: bool
    width: int
    num_layers: int
    num_heads: int
    activation: Callable[[jax.Array], jax.Array]

    @nn.compact
    def __call__(self, rows):
        is_there = rows[:, 0] > 0.0
        h = nn.Dense(self.width)(self.activation(nn.Dense(self.width)(rows)))
        for _ in range(self.num_layers):
            h = AttentionBlock(self.num_heads, self.activation)(h, is_there)
        h = jnp.where(is_there[:, None], nn.LayerNorm()(h), 0.0)
        mean = h.sum(axis=0) / jnp.maximum(is_there.sum(), 1)
        first, second = np.triu_indices(len(rows), 1)
        pairs = jnp.concatenate([h[first] + h[second], h[first] * h[second]], axis=1)
        pairs = self.activation(nn.Dense(self.width)(pairs) + nn.Dense(self.width)(mean))
        logits = nn.Dense(self.num_directions)(pairs).T
        # How full the forest is decides the flow, which the mean alone does not say.
        summary = jnp.append(mean, jnp.log1p(is_there.sum().astype(h.dtype)))
        inner = self.activation(nn.Dense(self.width)(summary))
        return logits, nn.Dense(1)(inner)[0] if self.with_flow else None


def pair_policy(
    *,
    width: int = 64,
    num_layers: int = 1,
    num_heads: int = 4,
    backward: str = "learned",
    with_flow: bool = False,
    activation: Callable[[jax.Array], jax.Array] = nn.leaky_relu,
) -> Policy:
    """A network for actions that join two of n slots, ``(0, 1), (0, 2), ...``, as in ``phylogeny``.

    Exchanging two slots exchanges their logits and changes nothing else.

    Args:
      width: features of a slot.
      num_layers: attention blocks over the slots; 0: slots meet in the pairs and the mean only.
      num_heads: of each; divides ``width``.
      backward: ``"learned"`` or ``"uniform"``, see ``mlp_policy``.
      with_flow: whether log F is another output.
      activation: elementwise.

    Returns:
      A ``Policy`` on observations [n, F] whose first column says whether a slot is filled.

    Raises:
      ValueError: naming the argument that is out of range.
    """
    check_heads(width, num_layers, num_heads)
    is_learned = check_backward(backward)
    module = _PairHeads(1 + is_learned, with_flow, width, num_layers, num_heads, activation)

    def apply(params, observation, forward_mask, backward_mask):
        logits, log_flow = module.apply({"params": params}, observation)
        return masked_output(logits, log_flow, forward_mask, backward_mask)

    return Policy(lambda key, observation: module.init(key, observation)["params"], apply)

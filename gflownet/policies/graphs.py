"""A policy that chooses a vertex of a graph, by message passing.

    h_v <- norm(h_v + W a(U h_v + Σ_r V_r Σ_u A_rvu h_u + M mean_u h_u))      L times
    logit of vertex v = w·h_v,    log F = ρ(mean h, max h)

Renaming the vertices renames the logits and changes nothing else; one set of parameters serves
graphs of any size. A relation r gives weights A_r to pairs of vertices. With the edges of a graph
as the only one, no number of rounds tells how many triangles a vertex is in; a relation that counts
paths does.

Zhang, Dai, Malkin, Courville, Bengio and Pan, "Let the flows tell: solving graph combinatorial
problems with GFlowNets", NeurIPS 2023. Xu, Hu, Leskovec and Jegelka, "How powerful are graph neural
networks?", ICLR 2019.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from gflownet.policies.networks import check_backward, masked_output
from gflownet.types import Policy

__all__ = ["vertex_policy"]


class _VertexHeads(nn.Module):
    num_directions: int
    with_flow: bool
    width: int
    num_layers: int
    activation: Callable[[jax.Array], jax.Array]

    @nn.compact
    def __call__(self, features, relations):
        size = len(features)
        edges = relations.astype(features.dtype).reshape(-1, size, size)
        h = nn.Dense(self.width)(features)
        for _ in range(self.num_layers):
            inner = nn.Dense(self.width)(h)
            messages = jnp.moveaxis(edges @ h, 0, 1).reshape(size, -1)
            inner += nn.Dense(self.width, use_bias=False)(messages)
            inner += nn.Dense(self.width, use_bias=False)(h.mean(axis=0))
            h = nn.LayerNorm()(h + nn.Dense(self.width)(self.activation(inner)))
        logits = nn.Dense(self.num_directions)(h).T
        # By index: the slope of ``max`` looks for entries that equal it, and may find none where
        # the compiler computes them anew and rounds otherwise.
        largest = jnp.take_along_axis(h, jnp.argmax(h, axis=0)[None], axis=0)[0]
        summary = jnp.concatenate([h.mean(axis=0), largest])
        inner = self.activation(nn.Dense(self.width)(summary))
        return logits, nn.Dense(1)(inner)[0] if self.with_flow else None


def vertex_policy(
    to_graph: Callable[[Any], tuple[jax.Array, jax.Array]],
    *,
    width: int = 64,
    num_layers: int = 4,
    backward: str = "learned",
    with_flow: bool = False,
    activation: Callable[[jax.Array], jax.Array] = nn.leaky_relu,
) -> Policy:
    """One action a vertex.

    Args:
      to_graph: ``observation -> (features [N, F] of the vertices, relations [R, N, N])``, or the
        adjacency [N, N] as the only relation.
      width: features of a vertex within the network.
      num_layers: L, rounds of messages.
      backward: ``"learned"`` or ``"uniform"``, see ``mlp_policy``.
      with_flow: whether log F is another output.
      activation: elementwise.

    Raises:
      ValueError: naming the argument that is out of range.

    >>> policy = vertex_policy(lambda graph: (jnp.ones((len(graph), 1)), graph), width=8)
    >>> path = jnp.array([[0, 1, 0], [1, 0, 1], [0, 1, 0]])
    >>> params = policy.init(jax.random.key(0), path)
    >>> logits = policy.apply(params, path, jnp.ones(3, bool), jnp.ones(3, bool)).forward.logits
    >>> bool(jnp.allclose(logits[0], logits[2])), logits.shape
    (True, (3,))
    """
    if width < 1 or num_layers < 0:
        raise ValueError(
            f"width is {width} and num_layers {num_layers}; at least 1 and 0 are needed."
        )
    is_learned = check_backward(backward)
    module = _VertexHeads(1 + is_learned, with_flow, width, num_layers, activation)

    def init(key, observation):
        return module.init(key, *to_graph(observation))["params"]

    def apply(params, observation, forward_mask, backward_mask):
        logits, log_flow = module.apply({"params": params}, *to_graph(observation))
        return masked_output(logits, log_flow, forward_mask, backward_mask)

    return Policy(init, apply)

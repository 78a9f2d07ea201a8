"""Energies of graphs by message passing, invariant to the order of the nodes.

    m_i = Σ_j Σ_r A_ijr a(U_r h_i + V_r h_j + c_r)
    h_i <- h_i + W a([h_i, m_i])                      L times
    E   = ρ(mean_i h_i, log(1 + n))

A_ijr is the weight of the edge of kind r from j to i; without kinds, A is [N, N]. Each layer is
affine in A, so a relaxed adjacency has a gradient, and gradient-informed discrete samplers apply.
For an undirected graph give a symmetric A.

Shapes: N nodes (padded), F features of a node, R kinds of edges.

Gilmer et al., "Neural message passing for quantum chemistry", ICML 2017. Schlichtkrull et al.,
"Modeling relational data with graph convolutional networks", ESWC 2018.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from ebjax.energies.adapters import from_linen
from ebjax.energies.networks.attention import masked_mean_and_count
from ebjax.energies.networks.multilayer import check_widths
from ebjax.types import Energy

__all__ = ["Graph", "graph_energy"]


class Graph(NamedTuple):
    """One graph.

    Attributes:
      nodes: [N, F] features of the nodes.
      adjacency: [N, N] or [N, N, R] weights of the edges from j (second axis) to i (first).
    """

    nodes: jax.Array
    adjacency: jax.Array


def _check_graph(x: Graph, mask) -> None:
    num_nodes = jnp.shape(x.nodes)[0] if jnp.ndim(x.nodes) == 2 else -1
    if num_nodes < 0:
        raise ValueError(f"nodes has shape {jnp.shape(x.nodes)}; give [nodes, features of each].")
    shape = jnp.shape(x.adjacency)
    if len(shape) not in (2, 3) or shape[:2] != (num_nodes, num_nodes):
        raise ValueError(
            f"adjacency has shape {shape}; the graph has {num_nodes} nodes, so give "
            f"[{num_nodes}, {num_nodes}] or [{num_nodes}, {num_nodes}, kinds of edges]."
        )
    if mask is not None and jnp.shape(mask) != (num_nodes,):
        raise ValueError(f"mask has shape {jnp.shape(mask)}; the graph has {num_nodes} nodes.")


class _GraphNetwork(nn.Module):
    width: int
    num_layers: int
    features: tuple[int, ...]
    activation: Callable[[jax.Array], jax.Array]

    @nn.compact
    def __call__(self, x, mask=None):
        _check_graph(x, mask)
        num_nodes = len(x.nodes)
        mask = jnp.ones(num_nodes, bool) if mask is None else jnp.asarray(mask, bool)
        # What stands in padded places may be NaN: it must not reach a sum, nor a gradient.
        nodes = jnp.where(mask[:, None], x.nodes, 0.0)
        edges = x.adjacency if jnp.ndim(x.adjacency) == 3 else x.adjacency[..., None]
        edges = jnp.where((mask[:, None] & mask[None, :])[..., None], edges, 0.0)
        num_kinds = edges.shape[-1]
        h = nn.Dense(self.width, name="nodes")(nodes)
        for layer in range(self.num_layers):
            shape = (num_nodes, num_kinds, self.width)
            wide = num_kinds * self.width
            receiver = nn.Dense(wide, name=f"receiver_{layer}")(h).reshape(shape)
            sender = nn.Dense(wide, use_bias=False, name=f"sender_{layer}")(h).reshape(shape)
            messages = self.activation(receiver[:, None] + sender[None, :])
            gathered = jnp.einsum("ijr,ijrf->if", edges, messages)
            inner = self.activation(jnp.concatenate([h, gathered], axis=-1))
            h = h + nn.Dense(self.width, name=f"update_{layer}")(inner)
        out = masked_mean_and_count(self.activation(h), mask)
        for width in self.features:
            out = self.activation(nn.Dense(width)(out))
        return nn.Dense(1)(out)[0]


def graph_energy(
    *,
    width: int = 32,
    num_layers: int = 3,
    features: Sequence[int] = (32,),
    activation: Callable[[jax.Array], jax.Array] = nn.silu,
) -> Energy:
    """An energy of a graph: ``apply(params, Graph(nodes, adjacency), mask)``.

    Nodes further apart than ``num_layers`` edges meet only in the mean.

    Args:
      width: features of a node.
      num_layers: L, rounds of messages.
      features: widths of the layers after the mean.
      activation: elementwise.

    Returns:
      An ``Energy`` whose context is ``mask`` [N] bool, ``True`` where there is a node (all by
      default): graphs of many sizes are padded to one. One set of params serves any N.

    Raises:
      ValueError: naming the argument that is out of range.

    >>> energy = graph_energy(width=8, num_layers=1, features=())
    >>> graph = Graph(nodes=jnp.ones((3, 1)), adjacency=jnp.eye(3)[::-1])
    >>> params = energy.init(jax.random.key(0), graph)
    >>> energy.apply(params, graph).shape
    ()
    """
    (width,) = check_widths("width", (width,))
    if num_layers < 0:
        raise ValueError(f"num_layers is {num_layers}; it must be at least 0.")
    features = check_widths("features", features)
    return from_linen(_GraphNetwork(width, num_layers, features, activation))

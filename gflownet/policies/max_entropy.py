"""Backward policies that are known: of maximum entropy where paths can be counted.

With n(s) the number of paths from the source to s,

    n(s') = Σ_{s -> s'} n(s),    P_B(s | s') = n(s) / n(s')

makes all paths to an object equally likely, so that of all flows to the same R / Z that of this P_B
has trajectories of the highest entropy. On sets, and wherever all parents have equal n, it is the
uniform P_B; on the hypergrid it undoes a step of coordinate d with probability x_d / Σ x.

Mohammadpour, Bengio, Frejinger and Bacon, "Maximum entropy GFlowNets with soft Q-learning", AISTATS
2024.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import jax
import numpy as np

from gflownet.distributions import MaskedCategorical
from gflownet.exact import Graph
from gflownet.types import Observation, Policy

__all__ = ["fixed_backward", "log_path_counts", "max_entropy_backward"]


def log_path_counts(graph: Graph) -> np.ndarray:
    """[S] log n(s), float64, rows in the order of ``graph.states``."""
    log_count = np.full(len(graph.parents), -np.inf)
    log_count[graph.source] = 0.0
    starts = np.concatenate([[0], np.cumsum(graph.levels)])
    for start, end in itertools.pairwise(starts[1:]):
        rows = slice(start, end)
        arriving = np.where(graph.backward_mask[rows], log_count[graph.parents[rows]], -np.inf)
        log_count[rows] = np.logaddexp.reduce(arriving, axis=1)
    return log_count


def max_entropy_backward(graph: Graph) -> np.ndarray:
    """[S, A] logits of P_B, rows in the order of ``graph.states``; 0 where not allowed.

    They are what ``exact.exact_flow`` takes as ``backward_logits``.

    >>> from gflownet import exact
    >>> from gflownet.environments import hypergrid
    >>> graph = exact.enumerate_graph(hypergrid(dim=2, side=4))
    >>> row = graph.states.position.tolist().index([3, 1])
    >>> odds = np.exp(max_entropy_backward(graph)[row])
    >>> (odds[:2] / odds[:2].sum()).round(3).tolist()
    [0.75, 0.25]
    """
    return np.where(graph.backward_mask, log_path_counts(graph)[graph.parents], 0.0)


def fixed_backward(policy: Policy, logits_fn: Callable[[Observation], jax.Array]) -> Policy:
    """The same policy with a P_B that is given, and not learned.

    Args:
      policy: P_F and log F; its P_B is not used.
      logits_fn: ``observation -> [A]`` logits of P_B over discrete actions.

    >>> import jax.numpy as jnp
    >>> from gflownet.policies import mlp_policy
    >>> dim, side = 2, 4
    >>> def hypergrid_logits(observation):
    ...     position = observation.reshape(dim, side) @ jnp.arange(side)
    ...     return jnp.append(jnp.log(jnp.maximum(position, 1)), 0.0)
    >>> policy = fixed_backward(mlp_policy(3, (8,), backward="uniform"), hypergrid_logits)
    """

    def apply(params, observation, forward_mask, backward_mask):
        output = policy.apply(params, observation, forward_mask, backward_mask)
        return output._replace(backward=MaskedCategorical(logits_fn(observation), backward_mask))

    return policy._replace(apply=apply)

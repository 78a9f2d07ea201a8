"""Exact laws of GFlowNets on environments that can be enumerated.

The probability that a trajectory visits a state is, over its parents,

    P(s') = Σ_{s -> s'} P(s) P_F(s' | s),    P(s0) = 1,

computed level by level (the level of a state is the length of the longest path to it), each level a
batch of gathers. At terminal states this is the law that the flow draws from. The other way round,
F(s) = Σ_{s -> s'} F(s') P_B(s | s') with F(x) = R(x) gives the exact flow of a backward policy.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ebjax.numerics import masked_log_softmax
from ebjax.types import Params
from gflownet.types import Environment, Policy, State

__all__ = [
    "Graph",
    "enumerate_graph",
    "exact_flow",
    "jensen_shannon",
    "kullback_leibler",
    "target_distribution",
    "terminal_distribution",
    "total_variation",
]


class Graph(NamedTuple):
    """An enumerated environment, states sorted by level.

    Attributes:
      states: [S, ...].
      forward_mask: [S, A] bool.
      backward_mask: [S, A] bool.
      parents: [S, A] int32, the state that action a leads from; itself where not allowed.
      children: [S, A] int32, the state that action a leads to; itself where not allowed.
      levels: number of states of each level, a tuple of ints.
      source: index of the source.
      terminal: [X] int32, indices of the terminal states in the order of ``enumerate()``.
    """

    states: State
    forward_mask: np.ndarray
    backward_mask: np.ndarray
    parents: np.ndarray
    children: np.ndarray
    levels: tuple[int, ...]
    source: int
    terminal: np.ndarray


def enumerate_graph(environment: Environment) -> Graph:
    """Tabulates an environment once, for all the functions of this module.

    Raises:
      ValueError: if the environment does not enumerate its states, has a cycle, or has a state
        that cannot be reached from its source.
    """
    all_states, state_index = _enumeration(environment)
    states = jax.tree.map(jnp.asarray, all_states())
    actions = jnp.arange(environment.num_actions)

    @jax.jit
    def tables(states):
        forward = jax.vmap(environment.forward_mask)(states)
        backward = jax.vmap(environment.backward_mask)(states)
        over_actions = lambda fn: jax.vmap(jax.vmap(fn, (None, 0)), (0, None))  # noqa: E731
        children = over_actions(lambda s, a: state_index(environment.step(s, a)))(states, actions)
        parents = over_actions(lambda s, a: state_index(environment.undo(s, a)))(states, actions)
        return forward, backward, children, parents, jax.vmap(state_index)(states)

    forward, backward, children, parents, index = map(np.asarray, tables(states))
    size = len(index)
    own = np.arange(size)
    if not np.array_equal(index, own):
        raise ValueError("state_index does not give the place of a state in enumerate().")
    children = np.where(forward, children, own[:, None])
    parents = np.where(backward, parents, own[:, None])
    sources = np.flatnonzero(~backward.any(axis=1))
    source = int(state_index(environment.initial(jax.random.key(0))))
    if not np.array_equal(sources, [source]):
        raise ValueError(
            f"{len(sources)} states have no parent (first: {sources[:3].tolist()}); only the "
            f"source, state {source}, may have none."
        )
    level = _levels(parents, backward)
    order = np.argsort(level, kind="stable")
    place = np.empty(size, np.int32)
    place[order] = own
    take = lambda leaf: jnp.asarray(leaf)[order]  # noqa: E731
    return Graph(
        states=jax.tree.map(take, states),
        forward_mask=forward[order],
        backward_mask=backward[order],
        parents=place[parents[order]].astype(np.int32),
        children=place[children[order]].astype(np.int32),
        levels=tuple(np.bincount(level).tolist()),
        source=int(place[source]),
        terminal=place[np.flatnonzero(~forward.any(axis=1))],
    )


def _enumeration(environment: Environment):
    """The two functions that enumeration needs, or an error that says so."""
    if environment.enumerate is None or environment.state_index is None:
        raise ValueError(
            "The environment does not enumerate its states (too many, or it has no enumerate and "
            "state_index), so its exact law cannot be computed."
        )
    return environment.enumerate, environment.state_index


def _levels(parents: np.ndarray, backward_mask: np.ndarray) -> np.ndarray:
    """[S] length of the longest path from the source to each state."""
    level = np.zeros(len(parents), np.int64)
    for _ in range(len(parents) + 1):
        longest = np.where(backward_mask, level[parents] + 1, 0).max(axis=1)
        if np.array_equal(longest, level):
            return level
        level = longest
    raise ValueError("The environment has a cycle: some state can be reached from itself.")


def _policy_tables(environment, policy, params, graph, batch_size):
    """log P_F and log P_B of all actions at all states, [S, A] each."""

    def tables(inputs):
        state, forward_mask, backward_mask = inputs
        output = policy.apply(params, environment.observe(state), forward_mask, backward_mask)
        return output.forward.log_probs(), output.backward.log_probs()

    inputs = (graph.states, jnp.asarray(graph.forward_mask), jnp.asarray(graph.backward_mask))
    return jax.lax.map(tables, inputs, batch_size=batch_size)


def terminal_distribution(
    environment: Environment,
    policy: Policy,
    params: Params,
    graph: Graph,
    *,
    batch_size: int = 4096,
) -> jax.Array:
    """The exact law over terminal states that P_F draws from.

    Args:
      environment: the graph as functions.
      policy: P_F over discrete actions.
      params: its parameters.
      graph: the graph as tables.
      batch_size: states that the policy evaluates at a time.

    Returns:
      [X] probabilities in the order of ``graph.terminal``; they sum to 1.
    """
    return _terminal_distribution(environment, policy, graph.levels, batch_size)(
        params, graph._replace(levels=())
    )


@functools.lru_cache(maxsize=8)
def _terminal_distribution(environment, policy, levels, batch_size):
    """The compiled recursion for one environment and policy."""

    @jax.jit
    def compute(params, graph: Graph):
        graph = jax.tree.map(jnp.asarray, graph)
        log_pf, _ = _policy_tables(environment, policy, params, graph, batch_size)
        # Probability of arriving by each action, read at the parents.
        by_action = jnp.exp(log_pf[graph.parents, jnp.arange(environment.num_actions)])
        arrive = jnp.where(graph.backward_mask, by_action, 0.0)
        visits = _by_level(
            levels,
            jnp.zeros(arrive.shape[0]).at[graph.source].set(1.0),
            lambda visits, rows: jnp.sum(visits[graph.parents[rows]] * arrive[rows], axis=-1),
        )
        return visits[graph.terminal]

    return compute


def _by_level(levels, values, compute):
    """Fills ``values`` level by level after the first; each level sees those before it."""
    starts = np.concatenate([[0], np.cumsum(levels)])
    width = max(levels)
    padded = jnp.concatenate([values, jnp.zeros(width)])

    def body(padded, bounds):
        start, size = bounds
        rows = jnp.minimum(start + jnp.arange(width), len(values) - 1)
        old = jax.lax.dynamic_slice(padded, (start,), (width,))
        new = jnp.where(jnp.arange(width) < size, compute(padded, rows), old)
        return jax.lax.dynamic_update_slice(padded, new, (start,)), None

    bounds = (jnp.asarray(starts[1:-1]), jnp.asarray(levels[1:]))
    padded, _ = jax.lax.scan(body, padded, bounds)
    return padded[: len(values)]


def target_distribution(
    environment: Environment, graph: Graph, reward_params: Params = ()
) -> tuple[np.ndarray, float]:
    """The law that the flow should draw from.

    Returns:
      ``(R(x) / Z [X], log Z)``, summed over ``graph.terminal`` in float64.
    """
    terminal = jax.tree.map(lambda leaf: leaf[graph.terminal], graph.states)
    log_reward = np.asarray(
        jax.vmap(environment.log_reward, (None, 0))(reward_params, terminal), np.float64
    )
    peak = log_reward.max()
    log_z = float(peak + np.log(np.exp(log_reward - peak).sum()))
    return np.exp(log_reward - log_z), log_z


def exact_flow(
    environment: Environment,
    graph: Graph,
    *,
    backward_logits: np.ndarray | None = None,
    reward_params: Params = (),
) -> tuple[dict[str, np.ndarray], float]:
    """The flow that a backward policy determines, by dynamic programming from the end.

    Args:
      environment: the graph as functions.
      graph: the graph as tables.
      backward_logits: [S, A] of P_B, rows in the order of ``graph.states``; uniform by default.
      reward_params: the reward's parameters.

    Returns:
      ``(tables, log Z)``: log P_F ("forward") and log P_B ("backward") [S, A], 0 where not allowed,
      and "log_flow" [S], all with rows in the order of ``environment.enumerate()``, so that they
      are parameters of ``gflownet.policies.tabular_policy``.
    """
    logits = np.zeros(graph.parents.shape) if backward_logits is None else backward_logits
    mask = jnp.asarray(graph.backward_mask)
    log_pb = np.asarray(masked_log_softmax(jnp.asarray(logits), mask), np.float64)
    log_reward = np.asarray(
        jax.vmap(environment.log_reward, (None, 0))(reward_params, graph.states), np.float64
    )
    is_terminal = np.logical_not(graph.forward_mask.any(axis=1))
    log_flow = np.where(is_terminal, log_reward, -np.inf)
    log_edge = np.full(graph.children.shape, -np.inf)
    starts = np.concatenate([[0], np.cumsum(graph.levels)])
    actions = np.arange(graph.children.shape[1])
    for start, end in zip(starts[-2::-1], starts[:0:-1], strict=True):
        rows = slice(start, end)
        children, allowed = graph.children[rows], graph.forward_mask[rows]
        edge = np.where(allowed, log_flow[children] + log_pb[children, actions], -np.inf)
        log_edge[rows] = edge
        inner = ~is_terminal[rows]
        log_flow[rows] = np.where(inner, np.logaddexp.reduce(edge, axis=1), log_flow[rows])
    log_pf = np.where(graph.forward_mask, log_edge - log_flow[:, None], 0.0)
    _, state_index = _enumeration(environment)
    index = np.asarray(jax.vmap(state_index)(graph.states))
    tables = {"forward": log_pf, "backward": np.where(graph.backward_mask, log_pb, 0.0)}
    tables["log_flow"] = log_flow
    ordered = {name: np.empty_like(table) for name, table in tables.items()}
    for name, table in tables.items():
        ordered[name][index] = table
    return ordered, float(log_flow[graph.source])


def total_variation(p: Any, q: Any) -> float:
    """``½ Σ |p - q|``, in [0, 1]."""
    return float(0.5 * np.abs(np.asarray(p, np.float64) - np.asarray(q, np.float64)).sum())


def kullback_leibler(p: Any, q: Any) -> float:
    """``Σ p log(p / q)`` in nats; infinite where q misses some of p."""
    p, q = np.asarray(p, np.float64), np.asarray(q, np.float64)
    support = p > 0
    with np.errstate(divide="ignore"):
        return float(np.sum(p[support] * (np.log(p[support]) - np.log(q[support]))))


def jensen_shannon(p: Any, q: Any) -> float:
    """``½ KL(p‖m) + ½ KL(q‖m)`` with ``m = ½ (p + q)``, in nats, in [0, log 2]."""
    middle = 0.5 * (np.asarray(p, np.float64) + np.asarray(q, np.float64))
    return 0.5 * kullback_leibler(p, middle) + 0.5 * kullback_leibler(q, middle)

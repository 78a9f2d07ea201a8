"""Environments and oracles of the GFlowNet tests: written plainly, apart from the library's code.

``tabulate`` turns an environment into numpy tables, ``plain_scores`` evaluates trajectories without
compaction, and its options plant the classic bugs.
"""

from __future__ import annotations

import functools
import itertools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gflownet import exact
from gflownet.environments import hypergrid
from gflownet.policies import tabular_policy
from gflownet.types import Environment

SET_ENERGIES = (-0.4, 0.9, 0.1, -1.1, 0.6, 0.3)


def sets(size: int = 5, chosen: int = 3) -> Environment:
    """Choose ``chosen`` of ``size`` items one by one; no stop action, several parents a state.

    ``R(x) = exp(-Σ energies of the chosen)``; the reward's parameters are the energies.
    """
    default = np.array(SET_ENERGIES[:size])
    subsets = [
        members
        for count in range(chosen + 1)
        for members in itertools.combinations(range(size), count)
    ]
    # Sets of several sizes are mixed, so that the enumeration is not in topological order.
    subsets = [subsets[i] for i in np.random.default_rng(0).permutation(len(subsets))]
    rows = np.array([[i in members for i in range(size)] for members in subsets])
    place = np.full(2**size, -1, np.int32)
    place[rows @ 2 ** np.arange(size)] = np.arange(len(rows))

    def log_reward(params, state):
        energies = jnp.asarray(default) if isinstance(params, tuple) else params
        return -jnp.sum(jnp.where(state, energies, 0.0))

    complete = [members for members in subsets if len(members) == chosen]
    return Environment(
        initial=lambda key: jnp.zeros(size, bool),
        step=lambda state, action: state | (jnp.arange(size) == action),
        undo=lambda state, action: state & (jnp.arange(size) != action),
        forward_mask=lambda state: ~state & (state.sum() < chosen),
        backward_mask=lambda state: state,
        observe=lambda state: state.astype(jnp.result_type(float)),
        num_actions=size,
        max_length=chosen,
        log_reward=log_reward,
        enumerate=lambda: rows,
        state_index=lambda state: jnp.asarray(place)[
            jnp.sum(state * 2 ** jnp.arange(size, dtype=jnp.int32), dtype=jnp.int32)
        ],
        log_z=math.log(sum(math.exp(-default[list(members)].sum()) for members in complete)),
        intermediate_energy=lambda params, state: -log_reward(params, state),
    )


def from_edges(
    edges: list[tuple[int, int, int]], log_reward: list[float], source: int, max_length: int
) -> Environment:
    """A graph from its ``(state, action, next state)``; no stop action. A state is its number."""
    size, num_actions = len(log_reward), 1 + max(action for _, action, _ in edges)
    children = np.tile(np.arange(size, dtype=np.int32)[:, None], num_actions)
    parents, forward = children.copy(), np.zeros(children.shape, bool)
    backward = forward.copy()
    for state, action, child in edges:
        assert not forward[state, action]
        assert not backward[child, action]
        children[state, action], forward[state, action] = child, True
        parents[child, action], backward[child, action] = state, True
    rewards = np.array(log_reward)
    return Environment(
        initial=lambda key: jnp.asarray(source, jnp.int32),
        step=lambda state, action: jnp.asarray(children)[state, action],
        undo=lambda state, action: jnp.asarray(parents)[state, action],
        forward_mask=lambda state: jnp.asarray(forward)[state],
        backward_mask=lambda state: jnp.asarray(backward)[state],
        observe=lambda state: jax.nn.one_hot(state, size),
        num_actions=num_actions,
        max_length=max_length,
        log_reward=lambda params, state: jnp.asarray(rewards)[state],
        enumerate=lambda: np.arange(size, dtype=np.int32),
        state_index=lambda state: state,
        log_z=float(np.logaddexp.reduce(rewards[~forward.any(axis=1)])),
    )


# From the source 4: three paths lead to the terminal state 1 (of 1 and of 3 actions), three to 3
# (of 2 and of 3 actions).
DIAMOND_EDGES = [
    (4, 0, 2),
    (4, 1, 5),
    (4, 2, 1),
    (2, 1, 0),
    (5, 0, 0),
    (5, 1, 3),
    (0, 0, 1),
    (0, 2, 3),
]
DIAMOND_LOG_REWARD = [0.7, 0.3, -0.4, -0.9, 0.2, 1.1]


def diamond() -> Environment:
    """A diamond with short cuts: paths of unequal number and length to two terminal states."""
    return from_edges(DIAMOND_EDGES, DIAMOND_LOG_REWARD, source=4, max_length=3)


SMALL = {
    "hypergrid_2x5": lambda: hypergrid(dim=2, side=5, reward_floor=0.1),
    "hypergrid_3x4": lambda: hypergrid(dim=3, side=4, reward_floor=0.01),
    "sets_5_3": sets,
    "diamond": diamond,
}


class Tables(NamedTuple):
    """An environment as numpy tables [S, A], rows in the order of ``enumerate()``."""

    states: object
    forward: np.ndarray
    backward: np.ndarray
    children: np.ndarray
    parents: np.ndarray
    source: int
    log_reward: np.ndarray

    @property
    def is_terminal(self) -> np.ndarray:
        return ~self.forward.any(axis=1)


@functools.lru_cache(maxsize=64)
def tabulate(environment: Environment) -> Tables:
    """Evaluates all functions at all states; where an action is not allowed, -1."""
    states = jax.tree.map(jnp.asarray, environment.enumerate())
    actions = jnp.arange(environment.num_actions, dtype=jnp.int32)

    @jax.jit
    @jax.vmap
    def row(state):
        index = lambda fn: jax.vmap(lambda a: environment.state_index(fn(state, a)))(actions)  # noqa: E731
        return (
            environment.forward_mask(state),
            environment.backward_mask(state),
            index(environment.step),
            index(environment.undo),
            environment.log_reward((), state),
        )

    forward, backward, children, parents, log_reward = map(np.asarray, row(states))
    return Tables(
        states=jax.tree.map(np.asarray, states),
        forward=forward,
        backward=backward,
        children=np.where(forward, children, -1),
        parents=np.where(backward, parents, -1),
        source=int(environment.state_index(environment.initial(jax.random.key(0)))),
        log_reward=log_reward,
    )


def masked_log_softmax(logits: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """In numpy and float64; -inf where forbidden."""
    with np.errstate(divide="ignore"):
        logits = np.where(mask, np.asarray(logits, np.float64), -np.inf)
    peak = np.where(mask.any(-1), logits.max(-1), 0.0)[..., None]
    total = np.exp(logits - peak).sum(-1, keepdims=True)
    return logits - peak - np.log(np.where(mask.any(-1, keepdims=True), total, 1.0))


def tabular(environment: Environment):
    """The environment observed by index, and a table as its policy."""
    size = len(jax.tree.leaves(environment.enumerate())[0])
    policy = tabular_policy(size, environment.num_actions)
    return environment._replace(observe=environment.state_index), policy


def random_tables(environment: Environment, seed: int, scale: float = 1.0) -> dict:
    """Parameters of a tabular policy, normal."""
    size = len(jax.tree.leaves(environment.enumerate())[0])
    rng = np.random.default_rng(seed)
    shape = (size, environment.num_actions)
    return {
        "forward": jnp.asarray(scale * rng.standard_normal(shape)),
        "backward": jnp.asarray(scale * rng.standard_normal(shape)),
        "log_flow": jnp.zeros(size),
    }


def exact_tables(environment: Environment, backward: str) -> tuple[dict, float]:
    """The exact flow of a uniform or a random backward policy, as parameters, and log Z."""
    graph = exact.enumerate_graph(environment)
    logits = None
    if backward == "random":
        logits = np.random.default_rng(7).standard_normal(graph.parents.shape)
    tables, log_z = exact.exact_flow(environment, graph, backward_logits=logits)
    return jax.tree.map(jnp.asarray, tables), log_z


def state_energies(environment: Environment) -> np.ndarray:
    """[S] an energy of every state: 0 at the source, -log R at terminal states, else anything.

    Where there is a stop, a state has the energy with which it would stop.
    """
    tables = tabulate.__wrapped__(environment)
    inner = np.random.default_rng(5).standard_normal(len(tables.log_reward))
    if environment.stop_action is not None:
        inner = -tables.log_reward
    energies = np.where(tables.is_terminal, -tables.log_reward, inner)
    energies[tables.source] = 0.0
    return energies


def exact_posterior(environment: Environment, inverse_temperature: float):
    """A random prior policy, log P_F of its posterior under R^β, and the log of its mean R^β.

    With h(s) the prior's mean of R^β over what follows s, the posterior is P_prior h(s') / h(s).
    """
    tables = tabulate.__wrapped__(environment)
    prior = random_tables(environment, 3)
    log_prior = masked_log_softmax(np.asarray(prior["forward"]), tables.forward)

    @functools.cache
    def log_mean(state: int) -> float:
        if tables.is_terminal[state]:
            return inverse_temperature * float(tables.log_reward[state])
        actions = np.flatnonzero(tables.forward[state])
        terms = [log_prior[state, a] + log_mean(tables.children[state, a]) for a in actions]
        return float(np.logaddexp.reduce(terms))

    forward = np.zeros(log_prior.shape)
    for state, action in zip(*np.nonzero(tables.forward), strict=True):
        ahead = log_mean(tables.children[state, action])
        forward[state, action] = log_prior[state, action] + ahead - log_mean(state)
    return prior, jnp.asarray(forward), log_mean(tables.source)


def plain_scores(
    environment,
    policy,
    params,
    trajectories,
    *,
    behaviour_epsilon: float | None = None,
    backward_mask_at: str = "child",
    drop_last: bool = False,
):
    """log P_F and log P_B [T, B] of all steps, one after the other, without compaction.

    The options plant bugs: scoring with the exploring policy, the mask of P_B at the parent, the
    last step of a trajectory left out.
    """

    def safe_log_prob(logits, mask, action):
        # Double where: an empty row gets a dummy action, and its value is dropped by the caller.
        mask = jnp.where(mask.any(), mask, jnp.arange(mask.shape[0]) == 0)
        return jax.nn.log_softmax(jnp.where(mask, logits, -1e9))[action]

    def one(state, action, is_valid):
        child = environment.step(state, action)

        def outputs(at):
            return policy.apply(
                params,
                environment.observe(at),
                environment.forward_mask(at),
                environment.backward_mask(at),
            )

        forward_mask = environment.forward_mask(state)
        log_pf = safe_log_prob(outputs(state).forward.logits, forward_mask, action)
        if behaviour_epsilon is not None:
            uniform = 1.0 / jnp.maximum(forward_mask.sum(), 1)
            log_pf = jnp.log(
                (1 - behaviour_epsilon) * jnp.exp(log_pf) + behaviour_epsilon * uniform
            )
        masked_at = child if backward_mask_at == "child" else state
        log_pb = safe_log_prob(
            outputs(child).backward.logits, environment.backward_mask(masked_at), action
        )
        return jnp.where(is_valid, log_pf, 0.0), jnp.where(is_valid, log_pb, 0.0)

    valid = trajectories.valid
    if drop_last:
        valid = valid & (jnp.arange(valid.shape[0])[:, None] < trajectories.length - 1)
    states = jax.tree.map(lambda leaf: leaf[:-1], trajectories.states)
    return jax.vmap(jax.vmap(one))(states, trajectories.actions, valid)

"""All trajectories of a small graph as one batch, and exact expectations over them."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from small_environments import masked_log_softmax, plain_scores, tabular, tabulate

from gflownet.types import Environment, Trajectories


@functools.cache
def paths(environment: Environment) -> list[list[tuple[int, int]]]:
    """Of every trajectory its (state, action) pairs, the end with action -1."""
    tables = tabulate.__wrapped__(environment)

    def from_state(state):
        if tables.is_terminal[state]:
            return [[(state, -1)]]
        return [
            [(state, int(a)), *rest]
            for a in np.flatnonzero(tables.forward[state])
            for rest in from_state(int(tables.children[state, a]))
        ]

    return from_state(tables.source)


@functools.cache
def all_trajectories(environment: Environment) -> Trajectories:
    """They as a batch, one of each; nothing is recorded, and all states count as choices.

    Call it once outside of compiled functions, for it runs some.
    """
    tables, every = tabulate.__wrapped__(environment), paths(environment)
    length, batch = environment.max_length, len(every)
    states = np.zeros((length + 1, batch), np.int32)
    actions, valid = np.zeros((length, batch), np.int32), np.zeros((length, batch), bool)
    for b, path in enumerate(every):
        for t, (state, action) in enumerate(path):
            states[t, b] = state
            if action >= 0:
                actions[t, b], valid[t, b] = action, True
    ends = np.array([path[-1][0] for path in every])
    is_visited = np.concatenate([np.ones((1, batch), bool), valid])
    zeros = jnp.zeros((length, batch))
    take = lambda index: jax.tree.map(lambda leaf: jnp.asarray(leaf)[index], tables.states)  # noqa: E731
    return Trajectories(
        states=take(states),
        actions=jnp.asarray(actions),
        valid=jnp.asarray(valid),
        is_choice=jnp.asarray(is_visited),
        log_pf=zeros,
        log_pb=zeros,
        terminal=take(ends),
        log_reward=jnp.asarray(tables.log_reward)[ends],
    )


def path_log_probabilities(environment: Environment, tables: dict):
    """log P_F and log P_B of every trajectory, [B] each, differentiable in the tables."""
    environment, policy = tabular(environment)
    t = all_trajectories(environment)
    log_pf, log_pb = plain_scores(environment, policy, tables, t)
    return log_pf.sum(axis=0), log_pb.sum(axis=0)


def terminal_law(environment: Environment, forward: np.ndarray) -> dict[int, float]:
    """Probability of each terminal state under logits [S, A] of P_F."""
    tables = tabulate.__wrapped__(environment)
    log_pf = masked_log_softmax(np.asarray(forward), tables.forward)
    law: dict[int, float] = {}
    for path in paths(environment):
        mass = np.exp(sum(log_pf[state, action] for state, action in path[:-1]))
        law[path[-1][0]] = law.get(path[-1][0], 0.0) + float(mass)
    return law

"""Replay: objects that were found, trained on again along new backward trajectories.

A buffer keeps terminal states x and log R(x), all distinct, and no trajectory: what is replayed is
τ ~ P_B(. | x) under the present parameters, so that nothing of it is stale. Of the N objects that
it holds, one is drawn with probability

    fifo          1 / N
    prioritized   ½ / N₊ where R >= q, plus ½ / N₋ where R <= q       q: 90th percentile of R
    ranked        ∝ 1 / (k N + rank)                                  k = 0.01, the best has rank 0

N₊ and N₋ being how many fulfil it. A full buffer gives up its oldest ("fifo") or its worst object
("prioritized", "ranked"), which the new one must be better than. An object is refused where one at
least as good lies within a distance, and takes the place of worse ones there; at distance 0 that
keeps objects distinct, beyond it diverse.

Shen et al., "Towards understanding and improving GFlowNet training", ICML 2023 (prioritized);
Sendera et al., "Improved off-policy training of diffusion samplers", NeurIPS 2024 (ranked); Mistal,
Hernandez-Garcia, Volokhova et al., "Crystal-GFN", 2023 (diverse).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from gflownet.sampling import (
    TrajectorySampler,
    backward_to_known,
    forward_metrics,
    join_trajectories,
    split_slots,
    split_trajectories,
)
from gflownet.types import Environment, Policy, State

__all__ = [
    "REPLAY_RULES",
    "ReplayBuffer",
    "empty_buffer",
    "replay_probabilities",
    "replay_sampler",
    "state_distance",
    "store",
]

REPLAY_RULES = ("fifo", "prioritized", "ranked")
_TOP = 10  # one of so many is among the best
_RANK_FLOOR = 1e-2


class ReplayBuffer(NamedTuple):
    """Places for C objects.

    Attributes:
      states: [C, ...] terminal states.
      log_reward: [C], -inf where nothing is stored.
      order: [C] int32, the higher the later it was stored; -1 where nothing is stored.
    """

    states: State
    log_reward: jax.Array
    order: jax.Array


def empty_buffer(state: State, capacity: int) -> ReplayBuffer:
    """A buffer for states like the given one."""
    return ReplayBuffer(
        states=jax.tree.map(lambda leaf: jnp.zeros((capacity, *leaf.shape), leaf.dtype), state),
        log_reward=jnp.full(capacity, -jnp.inf),
        order=jnp.full(capacity, -1, jnp.int32),
    )


def state_distance(left: State, right: State) -> jax.Array:
    """[] Σ |left - right| over all numbers of a state: of bits or tokens 0 and 1 the Hamming one.

    >>> float(state_distance({"a": jnp.array([1, 2])}, {"a": jnp.array([1, 5])}))
    3.0
    """
    return jax.tree.reduce(
        jnp.add,
        jax.tree.map(
            lambda a, b: jnp.abs(a.astype(jnp.float32) - b.astype(jnp.float32)).sum(), left, right
        ),
    )


def store(
    buffer: ReplayBuffer,
    state: State,
    log_reward: jax.Array,
    *,
    rule: str,
    distance: Callable[[State, State], jax.Array] = state_distance,
    min_distance: float = 0.0,
) -> ReplayBuffer:
    """Puts one object into a buffer, or leaves it.

    Args:
      buffer: of C places.
      state: the object x.
      log_reward: [] log R(x).
      rule: which object a full buffer gives up.
      distance: ``(state, state) -> []``.
      min_distance: x is refused where one that is at least as good lies within this distance.

    >>> buffer = empty_buffer(jnp.array(0), 2)
    >>> for x in (3, 5, 5, 4):
    ...     buffer = store(buffer, jnp.array(x), jnp.array(float(x)), rule="ranked")
    >>> buffer.states.tolist()
    [4, 5]
    """
    log_reward = log_reward.astype(buffer.log_reward.dtype)
    is_filled = buffer.order >= 0
    is_near = is_filled & (jax.vmap(distance, (0, None))(buffer.states, state) <= min_distance)
    is_as_good = buffer.log_reward >= log_reward
    is_refused = (is_near & is_as_good).any()
    is_superseded = is_near & ~is_refused
    order = jnp.where(is_superseded, -1, buffer.order)
    rewards = jnp.where(is_superseded, -jnp.inf, buffer.log_reward)
    if rule == "fifo":
        place = jnp.argmin(order)
    else:
        # Empty places first, and then the worst.
        place = jnp.argmin(jnp.where(order < 0, -jnp.inf, rewards))
        is_refused |= (order[place] >= 0) & is_as_good[place]

    def put(leaf, value):
        return jnp.where(is_refused, leaf, leaf.at[place].set(value))

    return ReplayBuffer(
        states=jax.tree.map(put, buffer.states, state),
        log_reward=put(rewards, log_reward),
        order=put(order, order.max() + 1),
    )


def replay_probabilities(buffer: ReplayBuffer, rule: str) -> jax.Array:
    """[C] with which probability each place of a buffer is drawn; 0 where nothing is stored.

    >>> buffer = ReplayBuffer((), jnp.array([0.0, 1.0, 0.0, -jnp.inf]), jnp.array([0, 1, 2, -1]))
    >>> replay_probabilities(buffer, "prioritized").tolist()
    [0.25, 0.5, 0.25, 0.0]
    """
    is_filled = buffer.order >= 0
    count = is_filled.sum()
    if rule == "fifo":
        weights = is_filled.astype(buffer.log_reward.dtype)
    elif rule == "prioritized":
        # The 90th percentile lies at or between two of the stored values.
        descending = -jnp.sort(-buffer.log_reward)
        last = jnp.maximum(count, 1) - 1
        is_high = is_filled & (buffer.log_reward >= descending[last // _TOP])
        is_low = is_filled & (buffer.log_reward <= descending[-(-last // _TOP)])
        weights = is_high / jnp.maximum(is_high.sum(), 1) + is_low / jnp.maximum(is_low.sum(), 1)
    else:
        place = jnp.argsort(-buffer.log_reward, stable=True)
        rank = jnp.zeros_like(place).at[place].set(jnp.arange(len(place)))
        weights = jnp.where(is_filled, 1.0 / (_RANK_FLOOR * jnp.maximum(count, 1) + rank), 0.0)
    return weights / jnp.maximum(weights.sum(), jnp.finfo(weights.dtype).tiny)


class _Replay(NamedTuple):
    """What a replay sampler carries: a buffer a group of slots, and what the new ones carry."""

    buffer: ReplayBuffer
    new: Any


def replay_sampler(
    environment: Environment,
    policy: Policy,
    new: TrajectorySampler,
    *,
    num_new: int,
    num_replayed: int,
    capacity: int,
    rule: str = "fifo",
    distance: Callable[[State, State], jax.Array] = state_distance,
    min_distance: float = 0.0,
) -> TrajectorySampler:
    """Some trajectories of a batch new, the others backward ones from objects found before.

    Each ``num_new + num_replayed`` consecutive slots share a buffer. ``num_new`` of them are given
    by ``new``; their objects are stored, and then those of the other slots drawn, so that the
    buffer is not empty even at the first update. Trajectories of a data set come in by
    ``mixed_sampler``, with ``backward_sampler``.

    Args:
      environment: the graph; its reward is not evaluated for what is replayed, so it must not
        change in time.
      policy: P_F and P_B.
      new: where new trajectories come from: ``forward_sampler`` or ``local_search_sampler``.
      num_new: trajectories of ``new`` in a group of slots, at least 1.
      num_replayed: the others of the group, at least 1. The group's size must divide the slots of
        a device.
      capacity: C, most objects that a buffer holds.
      rule: how objects are drawn and given up: "fifo", "prioritized" or "ranked".
      distance: ``(state, state) -> []`` between terminal states.
      min_distance: a new object is refused where one that is at least as good lies within this
        distance; 0 refuses only what is stored already.

    Returns:
      A ``TrajectorySampler`` whose carry holds one buffer a group. Metrics: those of ``new``;
      ``log_reward`` and ``elbo`` of the new trajectories, ``replayed_log_reward``,
      ``buffer_size``, and ``reward_calls``, the evaluations of the reward per slot and update.

    Raises:
      ValueError: naming the option that is out of range.
    """
    for name, value in (("num_new", num_new), ("num_replayed", num_replayed)):
        if value < 1:
            raise ValueError(f"{name} is {value}; it must be at least 1.")
    if capacity < 1:
        raise ValueError(f"capacity is {capacity}; a buffer holds at least 1 object.")
    if rule not in REPLAY_RULES:
        raise ValueError(f"rule is {rule!r}; it must be one of {', '.join(REPLAY_RULES)}.")
    if not min_distance >= 0:
        raise ValueError(f"min_distance is {min_distance}; it must be at least 0.")
    counts = (num_new, num_replayed)

    def init(key, params, batch):
        new_batch, _ = split_slots(batch, counts)
        num_groups = len(jax.tree.leaves(batch)[0]) // sum(counts)
        buffer = empty_buffer(environment.initial(key), capacity)
        return _Replay(
            jax.tree.map(lambda leaf: jnp.repeat(leaf[None], num_groups, axis=0), buffer),
            new.init(key, params, new_batch),
        )

    def grouped(tree, count):
        return jax.tree.map(lambda leaf: leaf.reshape(-1, count, *leaf.shape[1:]), tree)

    def store_all(buffer, states, log_rewards):
        def one(buffer, found):
            return (
                store(buffer, *found, rule=rule, distance=distance, min_distance=min_distance),
                None,
            )

        return jax.lax.scan(one, buffer, (states, log_rewards))[0]

    def draw(buffer, keys):
        log_probs = jnp.log(replay_probabilities(buffer, rule))
        places = jax.vmap(jax.random.categorical, (0, None))(keys, log_probs)
        return jax.tree.map(lambda leaf: leaf[places], (buffer.states, buffer.log_reward))

    def sample(params, carry, keys, batch):
        new_keys, keys = split_slots(keys, counts)
        found, new_carry, metrics = new.sample(
            params, carry.new, new_keys, split_slots(batch, counts)[0]
        )
        buffer = jax.vmap(store_all)(
            carry.buffer, *grouped((found.terminal, found.log_reward), num_new)
        )
        draw_keys, rollout_keys = jax.vmap(jax.random.split, out_axes=1)(keys)
        objects, log_reward = jax.tree.map(
            lambda leaf: leaf.reshape(-1, *leaf.shape[2:]),
            jax.vmap(draw)(buffer, grouped(draw_keys, num_replayed)),
        )
        replayed = backward_to_known(
            rollout_keys, environment, policy, params["policy"], objects, log_reward
        )
        calls = metrics.get("reward_calls", jnp.ones(())) * num_new / sum(counts)
        metrics = {
            **forward_metrics(found),
            **metrics,
            "replayed_log_reward": log_reward.mean(),
            "buffer_size": (buffer.order >= 0).sum(axis=1).mean(dtype=jnp.float32),
            "reward_calls": calls,
        }
        trajectories = join_trajectories([found, replayed], counts)
        return trajectories, _Replay(buffer, new_carry), metrics

    def feedback(carry, trajectories, losses):
        assert new.feedback is not None
        own, _ = split_trajectories(trajectories, counts)
        return carry._replace(new=new.feedback(carry.new, own, split_slots(losses, counts)[0]))

    return TrajectorySampler(
        init,
        sample,
        is_on_policy=new.is_on_policy,
        feedback=None if new.feedback is None else feedback,
    )

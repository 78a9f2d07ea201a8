"""Where the trajectories of an update come from, apart from what is learned from them.

An objective takes a ``TrajectorySampler``; the default rolls the policy out, exploring by a share
of uniform actions. No objective needs importance weights for trajectories of another origin: its
residual is zero on every trajectory at the exact flow (the Kullback-Leibler objectives are the
exception and say so).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from ebjax.types import Params, PyTree
from gflownet.rollout import backward_rollout, forward_rollout
from gflownet.types import Environment, Policy, State, Trajectories

__all__ = [
    "TrajectorySampler",
    "backward_sampler",
    "forward_sampler",
    "given_trajectories",
    "mixed_sampler",
]


class TrajectorySampler(NamedTuple):
    """A source of trajectories, one for each example slot.

    ``params`` is the whole parameter dict of the objective; the policy's own are
    ``params["policy"]``. ``carry`` is as in ``ebjax.types.Objective``: what persists between
    updates (counters, replay), leading axis the example slot.

    Attributes:
      init: ``(key, params, batch) -> carry``.
      sample: ``(params, carry, keys, batch) -> (Trajectories, carry, metrics)`` for the slots that
        a device holds; ``keys`` [B].
      is_on_policy: whether log-probabilities and flows that the trajectories record are those of
        ``params["policy"]`` itself, so that they need not be computed again. ``False`` for stored
        trajectories and those of another policy.
      feedback: ``(carry, trajectories, losses [B]) -> carry``, where the sampler learns from the
        losses of the trajectories that it gave (priorities, say).
    """

    init: Callable[[jax.Array, Params, PyTree], PyTree]
    sample: Callable[
        [Params, PyTree, jax.Array, PyTree], tuple[Trajectories, PyTree, dict[str, jax.Array]]
    ]
    is_on_policy: bool = True
    feedback: Callable[[PyTree, Trajectories, jax.Array], PyTree] | None = None


def forward_sampler(
    environment: Environment,
    policy: Policy,
    *,
    epsilon: Callable[[jax.Array], jax.Array] | float = 0.0,
    reward_params: Params = (),
    group_size: int = 1,
) -> TrajectorySampler:
    """New trajectories by P_F, mixed with uniform exploration.

    Args:
      environment: the graph and its reward.
      policy: P_F and P_B.
      epsilon: share of uniform exploration, a number or a schedule of the update count.
      reward_params: the reward's parameters.
      group_size: so many consecutive trajectories start from the same source; what
        ``environment.initial`` draws (a condition, a problem) is then common to them.

    Returns:
      A ``TrajectorySampler`` whose carry counts the updates of each slot. Metric: ``epsilon``.
    """

    def init(key, params, batch):
        del key, params
        return jnp.zeros(len(jax.tree.leaves(batch)[0]), jnp.int32)

    def sample(params, carry, keys, batch):
        del batch
        # A schedule may end a rounding error below 0.
        share = jnp.maximum(epsilon(carry[0]) if callable(epsilon) else epsilon, 0.0)
        start = None
        if group_size > 1:
            _check_divides("group_size", group_size, keys.shape[0])
            sources = jax.vmap(environment.initial)(keys[::group_size])
            start = jax.tree.map(lambda leaf: jnp.repeat(leaf, group_size, axis=0), sources)
        trajectories = forward_rollout(
            keys,
            environment,
            policy,
            params["policy"],
            epsilon=share,
            reward_params=reward_params,
            start=start,
        )
        return trajectories, carry + 1, {"epsilon": share}

    return TrajectorySampler(init, sample)


def _check_divides(name: str, size: int, batch_size: int) -> None:
    if batch_size % size:
        raise ValueError(
            f"{name} is {size}, which does not divide the {batch_size} trajectories of a device."
        )


def backward_sampler(
    environment: Environment,
    policy: Policy,
    terminal: Callable[[jax.Array, PyTree], State] = lambda key, example: example,
    *,
    reward_params: Params = (),
) -> TrajectorySampler:
    """Trajectories that end in given objects, by P_B from the end to the source.

    Args:
      environment: the graph and its reward.
      policy: P_F and P_B.
      terminal: ``(key, example) -> state``, the terminal state of a slot; by default the example of
        the batch is that state.
      reward_params: the reward's parameters.

    Returns:
      A ``TrajectorySampler`` that carries nothing.
    """

    def sample(params, carry, keys, batch):
        terminal_keys, rollout_keys = jax.vmap(jax.random.split, out_axes=1)(keys)
        ends = jax.vmap(terminal)(terminal_keys, batch)
        trajectories = backward_rollout(
            rollout_keys,
            environment,
            policy,
            params["policy"],
            ends,
            reward_params=reward_params,
        )
        return trajectories, carry, {}

    return TrajectorySampler(lambda key, params, batch: (), sample)


def given_trajectories(*, is_on_policy: bool = False) -> TrajectorySampler:
    """The batch itself is a ``Trajectories``, from whoever calls the objective.

    Args:
      is_on_policy: whether what they record was computed with the policy's present parameters.
    """

    def sample(params, carry, keys, batch):
        del params, keys
        return batch, carry, {}

    return TrajectorySampler(lambda key, params, batch: (), sample, is_on_policy)


def mixed_sampler(parts: Sequence[tuple[TrajectorySampler, int]]) -> TrajectorySampler:
    """Several samplers in one batch: of each ``Σ counts`` consecutive slots, ``count`` a sampler.

    Args:
      parts: pairs of a sampler and its count, at least 1; ``[(forward, 3), (replay, 1)]`` draws
        every fourth trajectory from ``replay``. The counts' sum must divide the slots of a device.

    Returns:
      A ``TrajectorySampler`` whose carry is a tuple of the samplers' own. Where metrics of two
      samplers have one name, the first sampler's stands.

    Raises:
      ValueError: for a count below 1.
    """
    for _, count in parts:
        if count < 1:
            raise ValueError(f"count is {count}; each sampler gives at least 1 trajectory.")
    period = sum(count for _, count in parts)
    bounds = [sum(count for _, count in parts[:i]) for i in range(len(parts) + 1)]

    def split(tree, axis=0):
        """The slots of each sampler."""

        def part(leaf, start, end):
            shape = leaf.shape
            leaf = leaf.reshape(*shape[:axis], -1, period, *shape[axis + 1 :])
            leaf = jax.lax.slice_in_dim(leaf, start, end, axis=axis + 1)
            return leaf.reshape(*shape[:axis], -1, *shape[axis + 1 :])

        return [
            jax.tree.map(lambda leaf, s=start, e=end: part(leaf, s, e), tree)
            for start, end in itertools.pairwise(bounds)
        ]

    def join(trees, axis):
        """The other way."""

        def joined(*leaves):
            shape = leaves[0].shape
            blocks = [
                leaf.reshape(*shape[:axis], -1, count, *shape[axis + 1 :])
                for leaf, (_, count) in zip(leaves, parts, strict=True)
            ]
            whole = jnp.concatenate(blocks, axis=axis + 1)
            return whole.reshape(*shape[:axis], -1, *shape[axis + 1 :])

        return jax.tree.map(joined, *trees)

    def init(key, params, batch):
        _check_divides("the sum of counts", period, len(jax.tree.leaves(batch)[0]))
        keys = jax.random.split(key, len(parts))
        return tuple(
            sampler.init(own_key, params, slots)
            for (sampler, _), own_key, slots in zip(parts, keys, split(batch), strict=True)
        )

    def sample(params, carry, keys, batch):
        _check_divides("the sum of counts", period, keys.shape[0])
        drawn, carries, metrics = [], [], {}
        slots = zip(parts, carry, split(keys), split(batch), strict=True)
        for (sampler, _), own_carry, own_keys, own_batch in slots:
            trajectories, own_carry, own = sampler.sample(params, own_carry, own_keys, own_batch)
            drawn.append(trajectories)
            carries.append(own_carry)
            metrics = {**own, **metrics}
        return _join_trajectories(join, drawn), tuple(carries), metrics

    def feedback(carry, trajectories, losses):
        own = _split_trajectories(split, trajectories)
        return tuple(
            own_carry
            if sampler.feedback is None
            else sampler.feedback(own_carry, own_trajectories, own_losses)
            for (sampler, _), own_carry, own_trajectories, own_losses in zip(
                parts, carry, own, split(losses), strict=True
            )
        )

    return TrajectorySampler(
        init,
        sample,
        is_on_policy=all(sampler.is_on_policy for sampler, _ in parts),
        feedback=feedback,
    )


# The trajectory axis of the fields of Trajectories: time-major ones have it second.
_BATCH_FIRST = ("terminal", "log_reward")


def _join_trajectories(join, drawn: list[Trajectories]) -> Trajectories:
    fields = {}
    for name in Trajectories._fields:
        values = [getattr(trajectories, name) for trajectories in drawn]
        fields[name] = join(values, 0 if name in _BATCH_FIRST else 1)
    return Trajectories(**fields)


def _split_trajectories(split, trajectories: Trajectories) -> list[Trajectories]:
    fields = {
        name: split(getattr(trajectories, name), 0 if name in _BATCH_FIRST else 1)
        for name in Trajectories._fields
    }
    count = len(fields["valid"])
    return [
        Trajectories(**{name: parts[i] for name, parts in fields.items()}) for i in range(count)
    ]

"""Where the trajectories of an update come from, apart from what is learned from them.

An objective takes a ``TrajectorySampler``; the default rolls the policy out, exploring by a share
of uniform actions. Others replay what was found (``gflownet.replay``), search near it
(``gflownet.local_search``) or end in given objects, and ``mixed_sampler`` puts them together.

No objective needs importance weights for trajectories of another origin: its residual is zero on
every trajectory at the exact flow (the Kullback-Leibler objectives are the exception and say so).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from ebjax.parallel import is_side_by_side
from ebjax.types import Params, PyTree
from gflownet.exploration import exploring_policy
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


Schedule = Callable[[jax.Array], jax.Array]


def forward_sampler(
    environment: Environment,
    policy: Policy,
    *,
    epsilon: Schedule | float = 0.0,
    temperature: Schedule | float = 1.0,
    stop_bias: Schedule | float = 0.0,
    reward_params: Params = (),
    group_size: int = 1,
    remember: bool = True,
) -> TrajectorySampler:
    """New trajectories by P_F, tempered and mixed with uniform exploration.

    Args:
      environment: the graph and its reward.
      policy: P_F and P_B.
      epsilon: share of uniform exploration, a number or a schedule of the update count.
      temperature: T > 0 of the behaviour policy P_F^(1/T), likewise (see ``exploring_policy``).
      stop_bias: what is taken from the logit of the stop, likewise.
      reward_params: the reward's parameters.
      group_size: so many consecutive trajectories start from the same source; what
        ``environment.initial`` draws (a condition, a problem) is then common to them.
      remember: whether outputs of layers are kept for the gradient, where the policy's may be and
        updates are not those of several runs side by side.

    Returns:
      A ``TrajectorySampler`` whose carry counts the updates of each slot. Metric: ``epsilon``.

    Raises:
      ValueError: for a temperature that is not positive, or a stop bias without a stop action.
    """

    def behaviour(count):
        """The policy to draw by, at an update."""
        if temperature == 1.0 and stop_bias == 0.0:
            return policy
        return exploring_policy(
            policy,
            temperature=temperature(count) if callable(temperature) else temperature,
            stop_bias=stop_bias(count) if callable(stop_bias) else stop_bias,
            stop_action=environment.stop_action,
        )

    behaviour(jnp.zeros((), jnp.int32))  # raises what is wrong before anything is drawn

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
            behaviour(carry[0]),
            params["policy"],
            epsilon=share,
            reward_params=reward_params,
            start=start,
            remember=remember and policy.remembers and not is_side_by_side(),
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
    counts = [count for _, count in parts]

    def init(key, params, batch):
        keys = jax.random.split(key, len(parts))
        return tuple(
            sampler.init(own_key, params, slots)
            for (sampler, _), own_key, slots in zip(
                parts, keys, split_slots(batch, counts), strict=True
            )
        )

    def sample(params, carry, keys, batch):
        drawn, carries, metrics = [], [], {}
        slots = zip(
            parts, carry, split_slots(keys, counts), split_slots(batch, counts), strict=True
        )
        for (sampler, _), own_carry, own_keys, own_batch in slots:
            trajectories, own_carry, own = sampler.sample(params, own_carry, own_keys, own_batch)
            drawn.append(trajectories)
            carries.append(own_carry)
            metrics = {**own, **metrics}
        return join_trajectories(drawn, counts), tuple(carries), metrics

    def feedback(carry, trajectories, losses):
        own = split_trajectories(trajectories, counts)
        return tuple(
            own_carry
            if sampler.feedback is None
            else sampler.feedback(own_carry, own_trajectories, own_losses)
            for (sampler, _), own_carry, own_trajectories, own_losses in zip(
                parts, carry, own, split_slots(losses, counts), strict=True
            )
        )

    return TrajectorySampler(
        init,
        sample,
        is_on_policy=all(sampler.is_on_policy for sampler, _ in parts),
        feedback=feedback,
    )


# Batches of several origins: of each ``Σ counts`` consecutive slots, ``count`` belong to each.


def split_slots(tree: PyTree, counts: Sequence[int], axis: int = 0) -> list[PyTree]:
    """The slots of each origin.

    Args:
      tree: [..., B, ...].
      counts: slots of each origin in a group of ``Σ counts`` consecutive ones.
      axis: where B stands.

    Raises:
      ValueError: if the counts' sum does not divide B.

    >>> [part.tolist() for part in split_slots(jnp.arange(6), (2, 1))]
    [[0, 1, 3, 4], [2, 5]]
    """
    period = sum(counts)
    bounds = [0, *itertools.accumulate(counts)]

    def part(leaf, start, end):
        shape = leaf.shape
        _check_divides("the sum of counts", period, shape[axis])
        leaf = leaf.reshape(*shape[:axis], -1, period, *shape[axis + 1 :])
        leaf = jax.lax.slice_in_dim(leaf, start, end, axis=axis + 1)
        return leaf.reshape(*shape[:axis], -1, *shape[axis + 1 :])

    return [
        jax.tree.map(lambda leaf, s=start, e=end: part(leaf, s, e), tree)
        for start, end in itertools.pairwise(bounds)
    ]


def join_slots(parts: Sequence[PyTree], counts: Sequence[int], axis: int = 0) -> PyTree:
    """The other way.

    >>> join_slots([jnp.array([0, 1, 3, 4]), jnp.array([2, 5])], (2, 1)).tolist()
    [0, 1, 2, 3, 4, 5]
    """

    def joined(*leaves):
        shape = leaves[0].shape
        blocks = [
            leaf.reshape(*shape[:axis], -1, count, *shape[axis + 1 :])
            for leaf, count in zip(leaves, counts, strict=True)
        ]
        whole = jnp.concatenate(blocks, axis=axis + 1)
        return whole.reshape(*shape[:axis], -1, *shape[axis + 1 :])

    return jax.tree.map(joined, *parts)


# The trajectory axis of the fields of Trajectories: time-major ones have it second. What can be
# recalled has none, and is left out.
_BATCH_FIRST = ("terminal", "log_reward")
_FIELDS = tuple(name for name in Trajectories._fields if name != "memory")


def map_trajectories(fn: Callable[[jax.Array, int], jax.Array], trajectories: Trajectories):
    """``fn(array, axis)`` of every array, with the axis on which the trajectories stand."""
    return Trajectories(
        **{
            name: jax.tree.map(
                lambda leaf, axis=0 if name in _BATCH_FIRST else 1: fn(leaf, axis),
                getattr(trajectories, name),
            )
            for name in _FIELDS
        }
    )


def split_trajectories(trajectories: Trajectories, counts: Sequence[int]) -> list[Trajectories]:
    """``split_slots`` of trajectories."""
    fields = {
        name: split_slots(getattr(trajectories, name), counts, 0 if name in _BATCH_FIRST else 1)
        for name in _FIELDS
    }
    return [
        Trajectories(**{name: parts[i] for name, parts in fields.items()})
        for i in range(len(counts))
    ]


def join_trajectories(parts: Sequence[Trajectories], counts: Sequence[int]) -> Trajectories:
    """``join_slots`` of trajectories."""
    return Trajectories(
        **{
            name: join_slots(
                [getattr(part, name) for part in parts], counts, 0 if name in _BATCH_FIRST else 1
            )
            for name in _FIELDS
        }
    )


def backward_to_known(
    keys: jax.Array,
    environment: Environment,
    policy: Policy,
    params: Params,
    terminal: State,
    log_reward: jax.Array,
) -> Trajectories:
    """``backward_rollout`` from objects whose rewards are known, and not evaluated again."""
    free = environment._replace(log_reward=lambda params, state: jnp.zeros(()))
    trajectories = backward_rollout(keys, free, policy, params, terminal)
    return trajectories._replace(log_reward=jax.lax.stop_gradient(log_reward))


def forward_metrics(trajectories: Trajectories) -> dict[str, jax.Array]:
    """``log_reward`` and ``elbo`` of new trajectories alone, for samplers that give others too."""
    log_ratio = jnp.sum(trajectories.log_pf - trajectories.log_pb, axis=0)
    return {
        "elbo": jnp.mean(trajectories.log_reward - log_ratio),
        "log_reward": trajectories.log_reward.mean(),
    }

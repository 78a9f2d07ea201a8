"""Local search: objects are taken apart by K backward steps and built up again by the policy.

A proposal goes down from x to a state s by P_B, and up from s to a terminal x' by P_F:

    q(x -> x') = ℓ(j) Π P_B(down) Π P_F(up)        j: steps down

along its two legs. The way back goes down the upper leg and up the lower one,

    q(x' -> x) = ℓ(j') Π P_B(up, reversed) Π P_F(down, reversed)        j': steps up

and accepting x' with probability min(1, R(x') q(x' -> x) / (R(x) q(x -> x'))) leaves R / Z
invariant, whatever the policy is. The number of steps down is K, or uniform on 1, ..., K; at the
source it ends early. With K fixed, ℓ is 1 for j = K (at the source for j <= K) and 0 otherwise, so
that where objects have several lengths x' may be out of reach of the way back, and K must vary.

Kim et al., "Local search GFlowNets", ICLR 2024; Zhang et al., "Generative flow networks for
discrete probabilistic modeling", ICML 2022 (back-and-forth).
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from ebjax.samplers.decision import metropolis, select
from ebjax.types import Params
from gflownet.rollout import backward_rollout, forward_rollout
from gflownet.sampling import (
    TrajectorySampler,
    backward_to_known,
    forward_metrics,
    join_trajectories,
    split_slots,
    split_trajectories,
)
from gflownet.types import Environment, Policy, State

__all__ = ["ACCEPTANCE_RULES", "Proposal", "back_and_forth", "local_search_sampler"]

ACCEPTANCE_RULES = ("better", "metropolis")


class Proposal(NamedTuple):
    """Where moves from terminal states lead.

    Attributes:
      state: [B, ...] terminal states x'.
      log_ratio: [B] log q(x' -> x) - log q(x -> x'), -inf where there is no way back.
      log_reward: [B] log R(x').
    """

    state: State
    log_ratio: jax.Array
    log_reward: jax.Array


class _Budgeted(NamedTuple):
    """``state`` and how many ``steps`` may still be undone."""

    state: State
    steps: jax.Array


def _with_budget(environment: Environment) -> Environment:
    """The same graph, in which a state of which no more may be undone counts as the source."""
    return environment._replace(
        undo=lambda s, action: _Budgeted(environment.undo(s.state, action), s.steps - 1),
        forward_mask=lambda s: environment.forward_mask(s.state),
        backward_mask=lambda s: environment.backward_mask(s.state) & (s.steps > 0),
        observe=lambda s: environment.observe(s.state),
        log_reward=lambda params, s: jnp.zeros(()),
    )


def _log_length(
    steps: jax.Array, at_source: jax.Array, num_steps: jax.Array, is_random: bool
) -> jax.Array:
    """log ℓ: that a leg which may go on has so many steps down, or one that ends at the source."""
    if is_random:
        # The number drawn is ``steps``, or at the source that or any larger one.
        number = jnp.where(at_source, num_steps - steps + 1, 1)
        is_possible = steps <= num_steps
        return jnp.where(is_possible, jnp.log(jnp.maximum(number, 1) / num_steps), -jnp.inf)
    is_possible = (steps == num_steps) | (at_source & (steps < num_steps))
    return jnp.where(is_possible, 0.0, -jnp.inf)


def back_and_forth(
    keys: jax.Array,
    environment: Environment,
    policy: Policy,
    params: Params,
    terminal: State,
    *,
    num_steps: jax.Array | int,
    random_length: bool = False,
    reward_params: Params = (),
) -> Proposal:
    """One move from each terminal state: some steps back by P_B, then forward to an end by P_F.

    Args:
      keys: [B] one key a move.
      environment: the graph and its reward.
      policy: P_F and P_B.
      params: the policy's parameters.
      terminal: [B, ...] terminal states x.
      num_steps: [] K >= 1, steps back; may be traced (a schedule).
      random_length: whether the number of steps back is uniform on 1, ..., K instead, which graphs
        need whose objects have several lengths.
      reward_params: the first argument of ``environment.log_reward``.

    Returns:
      A ``Proposal``, without gradient. For a Metropolis test accept it with probability
      ``min(1, exp(log R(x') - log R(x) + log_ratio))``.
    """
    number_keys, down_keys, up_keys = jax.vmap(lambda k: jax.random.split(k, 3), out_axes=1)(keys)
    num_steps = jnp.asarray(num_steps, jnp.int32)
    steps = jnp.broadcast_to(num_steps, keys.shape)
    if random_length:
        steps = jax.vmap(lambda k: jax.random.randint(k, (), 1, num_steps + 1))(number_keys)
    down = backward_rollout(
        down_keys, _with_budget(environment), policy, params, _Budgeted(terminal, steps)
    )
    bottom = jax.tree.map(lambda leaf: leaf[0], down.states.state)
    up = forward_rollout(
        up_keys, environment, policy, params, reward_params=reward_params, start=bottom
    )
    at_source = ~jax.vmap(environment.backward_mask)(bottom).any(axis=1)

    def log_length(leg):
        return _log_length(leg.length, at_source, num_steps, random_length)

    there = log_length(down) + (down.log_pb.sum(axis=0) + up.log_pf.sum(axis=0))
    back = log_length(up) + (up.log_pb.sum(axis=0) + down.log_pf.sum(axis=0))
    return Proposal(up.terminal, back - there, up.log_reward)


def local_search_sampler(
    environment: Environment,
    policy: Policy,
    new: TrajectorySampler,
    *,
    num_steps: int,
    num_revisions: int,
    accept: str = "better",
    trained: str = "all",
    random_length: bool | None = None,
    reward_params: Params = (),
) -> TrajectorySampler:
    """New trajectories, and chains of revisions that start from their ends.

    A chain makes I back-and-forth moves. What is trained on is, for each object chosen, a new
    backward trajectory τ ~ P_B(. | x):

    - ``trained="all"``: of each I + 1 consecutive slots the first is given by ``new``, and the
      others are its I proposals, accepted or not. One reward a slot is evaluated.
    - ``trained="final"``: each slot is given by ``new`` and trains on where its chain ends. I + 1
      rewards a slot are evaluated.

    Args:
      environment: the graph and its reward.
      policy: P_F and P_B.
      new: where chains start, usually ``forward_sampler``.
      num_steps: K, steps of a move back, at least 1: half of a trajectory where all have one
        length; few where paths may stop anywhere, which a policy does at first.
      num_revisions: I, moves of a chain, at least 1.
      accept: "better" accepts x' if R(x') > R(x); "metropolis" leaves R / Z invariant.
      trained: "all" or "final". With "all", I + 1 must divide the slots of a device.
      random_length: whether a move takes 1 to K steps back instead of K; by default where the
        environment has a stop action, so that objects have several lengths.
      reward_params: the reward's parameters.

    Returns:
      A ``TrajectorySampler`` whose carry is that of ``new``. Metrics: those of ``new``;
      ``log_reward`` and ``elbo`` of the new trajectories, ``revised_log_reward`` (of the chains'
      ends), ``acceptance_rate``, and ``reward_calls``, the evaluations of the reward per slot.

    Raises:
      ValueError: naming the option that is out of range.
    """
    for name, value in (("num_steps", num_steps), ("num_revisions", num_revisions)):
        if value < 1:
            raise ValueError(f"{name} is {value}; it must be at least 1.")
    for name, chosen, known in (
        ("accept", accept, ACCEPTANCE_RULES),
        ("trained", trained, ("all", "final")),
    ):
        if chosen not in known:
            raise ValueError(f"{name} is {chosen!r}; it must be one of {', '.join(known)}.")
    if random_length is None:
        random_length = environment.stop_action is not None
    is_random = random_length
    counts = (1, num_revisions) if trained == "all" else None

    def revise(params, chain, keys):
        """One move of all chains."""
        state, log_reward = chain
        move_keys, accept_keys = jax.vmap(jax.random.split, out_axes=1)(keys)
        proposal = back_and_forth(
            move_keys,
            environment,
            policy,
            params,
            state,
            num_steps=num_steps,
            random_length=is_random,
            reward_params=reward_params,
        )
        gain = proposal.log_reward - log_reward
        if accept == "better":
            accepted = gain > 0
        else:
            uniform = jax.vmap(jax.random.uniform)(accept_keys)
            accepted, _ = metropolis(uniform, gain + proposal.log_ratio)
        proposed = (proposal.state, proposal.log_reward)
        return jax.vmap(select)(accepted, proposed, chain), (proposed, accepted)

    def init(key, params, batch):
        return new.init(key, params, batch if counts is None else split_slots(batch, counts)[0])

    def sample(params, carry, keys, batch):
        if counts is None:
            pairs = jax.vmap(lambda k: jax.random.split(k, num_revisions + 2), out_axes=1)(keys)
            keys, rollout_keys, move_keys = pairs[0], pairs[1], pairs[2:]
        else:
            keys, others = split_slots(keys, counts)
            rollout_keys, others = jax.vmap(jax.random.split, out_axes=1)(others)
            move_keys = others.reshape(-1, num_revisions).T
            batch = split_slots(batch, counts)[0]
        found, carry, metrics = new.sample(params, carry, keys, batch)
        chain, (proposed, accepted) = jax.lax.scan(
            lambda chain, keys: revise(params["policy"], chain, keys),
            (found.terminal, found.log_reward),
            move_keys,
        )
        objects, log_reward = chain
        if counts is not None:
            # [I, M, ...] becomes the other slots of the M groups.
            objects, log_reward = jax.tree.map(
                lambda leaf: jnp.swapaxes(leaf, 0, 1).reshape(-1, *leaf.shape[2:]), proposed
            )
        trajectories = backward_to_known(
            rollout_keys, environment, policy, params["policy"], objects, log_reward
        )
        calls = metrics.get("reward_calls", jnp.ones(()))
        calls = calls + num_revisions if counts is None else (calls + num_revisions) / sum(counts)
        metrics = {
            **forward_metrics(found),
            **metrics,
            "revised_log_reward": chain[1].mean(),
            "acceptance_rate": accepted.mean(dtype=jnp.float32),
            "reward_calls": calls,
        }
        if counts is not None:
            trajectories = join_trajectories([found, trajectories], counts)
        return trajectories, carry, metrics

    def feedback(carry, trajectories, losses):
        assert new.feedback is not None
        assert counts is not None
        own, _ = split_trajectories(trajectories, counts)
        return new.feedback(carry, own, split_slots(losses, counts)[0])

    return TrajectorySampler(
        init,
        sample,
        is_on_policy=new.is_on_policy or counts is None,
        feedback=None if new.feedback is None or counts is None else feedback,
    )

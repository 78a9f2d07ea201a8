"""Thompson sampling: a flow with K heads for P_F, one of which draws a whole trajectory.

    k ~ uniform on the heads,   τ ~ P_F^k,   τ trains m heads chosen at random

Heads see different halves (m = K / 2) of what was drawn, and each has a random function of its own
added that is never trained, so that they agree where there were many trajectories and differ where
there were none: what one head holds to be worth a visit is visited. P_B, log F and log Z are common
to all. The head is the condition of a conditional flow, so that rollouts and objectives need not
know of it; a draw of the flow is one of a random head.

    environment = with_heads(environment, 10)
    policy = thompson_policy(environment.num_actions, num_heads=10)
    sampler = bootstrapped(forward_sampler(environment, policy), num_heads=10)
    objective = trajectory_balance(environment, policy, sampler=sampler)

Rector-Brooks et al., "Thompson sampling for improved exploration in GFlowNets", ICML 2023 workshop.
Osband, Aslanides and Cassirer, "Randomized prior functions for deep reinforcement learning",
NeurIPS 2018 (what is never trained).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from gflownet.conditional import conditional
from gflownet.policies.networks import MLPHeads, check_backward, masked_output
from gflownet.sampling import TrajectorySampler, map_trajectories
from gflownet.types import Environment, Policy

__all__ = ["HeadedObservation", "bootstrapped", "thompson_policy", "with_heads"]


class HeadedObservation(NamedTuple):
    """The ``observation`` of the environment below, and the ``head`` [] int32."""

    observation: Any
    head: jax.Array


def _check_heads(num_heads: int) -> None:
    if num_heads < 2:
        raise ValueError(f"num_heads is {num_heads}; Thompson sampling takes at least 2.")


def with_heads(environment: Environment, num_heads: int) -> Environment:
    """The environment with a head in its state, drawn at the source and of no effect on rewards.

    Args:
      environment: the graph.
      num_heads: K, at least 2.

    Returns:
      An ``Environment`` over ``ConditionalState`` whose observation is a ``HeadedObservation``. The
      law of one head is that of ``at_condition`` at the head.

    Raises:
      ValueError: for fewer than 2 heads.
    """
    _check_heads(num_heads)
    headed = conditional(
        environment,
        lambda key: jax.random.randint(key, (), 0, num_heads),
        log_reward=lambda log_reward, head: log_reward,
    )
    return headed._replace(
        observe=lambda state: HeadedObservation(environment.observe(state.state), state.condition)
    )


def thompson_policy(
    num_actions: int,
    features: Sequence[int] = (256, 256),
    *,
    num_heads: int,
    prior_scale: float = 1.0,
    backward: str = "learned",
    with_flow: bool = False,
) -> Policy:
    """A multilayer perceptron with K heads for P_F on one trunk, over ``HeadedObservation``.

    Args:
      num_actions: A.
      features: widths of the hidden layers.
      num_heads: K, at least 2.
      prior_scale: weight of the random function that is added to the logits of each head.
      backward: as of ``mlp_policy``, common to all heads.
      with_flow: whether one more output on the trunk is log F, common to all heads.

    Returns:
      A ``Policy`` whose parameters are ``{"trained": ..., "prior": ...}``; the latter get no
      gradient.

    Raises:
      ValueError: for an option out of range.
    """
    _check_heads(num_heads)
    if prior_scale < 0.0:
        raise ValueError(f"prior_scale is {prior_scale}; it must be at least 0.")
    num_forward = num_heads * num_actions
    num_backward = num_actions * check_backward(backward)
    trained = MLPHeads(tuple(features), num_forward + num_backward + with_flow, nn.leaky_relu)
    prior = MLPHeads(tuple(features), num_forward, nn.leaky_relu)

    def init(key, observation):
        trained_key, prior_key = jax.random.split(key)
        return {
            "trained": trained.init(trained_key, observation.observation)["params"],
            "prior": prior.init(prior_key, observation.observation)["params"],
        }

    def apply(params, observation, forward_mask, backward_mask):
        outputs = trained.apply({"params": params["trained"]}, observation.observation)
        fixed = jax.lax.stop_gradient(
            prior.apply({"params": params["prior"]}, observation.observation)
        )
        heads = (outputs[:num_forward] + prior_scale * fixed).reshape(num_heads, num_actions)
        logits = heads[observation.head][None]
        if num_backward:
            own = outputs[num_forward : num_forward + num_backward]
            logits = jnp.concatenate([logits, own[None]])
        log_flow = outputs[-1] if with_flow else None
        return masked_output(logits, log_flow, forward_mask, backward_mask)

    return Policy(init=init, apply=apply)


def bootstrapped(
    sampler: TrajectorySampler, *, num_heads: int, num_trained: int | None = None
) -> TrajectorySampler:
    """Gives each trajectory of a sampler to ``num_trained`` different heads, chosen at random.

    Args:
      sampler: of an environment ``with_heads``.
      num_heads: K.
      num_trained: m, how many heads a trajectory trains, in 1, ..., K; half of them by default.

    Returns:
      A ``TrajectorySampler`` of ``num_trained`` trajectories a slot, which cost no further rewards.

    Raises:
      ValueError: for a number out of range.
    """
    _check_heads(num_heads)
    most = num_heads // 2 if num_trained is None else num_trained
    if not 1 <= most <= num_heads:
        raise ValueError(f"num_trained is {num_trained}; it must be from 1 to {num_heads}.")

    def sample(params, carry, keys, batch):
        split = jax.vmap(jax.random.split, out_axes=1)
        sample_keys, head_keys = split(keys)
        trajectories, carry, metrics = sampler.sample(params, carry, sample_keys, batch)
        heads = jax.vmap(lambda key: jax.random.permutation(key, num_heads)[:most])(head_keys)
        heads = heads.reshape(-1).astype(trajectories.terminal.condition.dtype)
        given = map_trajectories(lambda leaf, axis: jnp.repeat(leaf, most, axis), trajectories)
        states = given.states._replace(
            condition=jnp.broadcast_to(heads, given.states.condition.shape)
        )
        terminal = given.terminal._replace(condition=heads)
        return given._replace(states=states, terminal=terminal), carry, metrics

    def feedback(carry, trajectories, losses):
        assert sampler.feedback is not None
        first = map_trajectories(
            lambda leaf, axis: jax.lax.slice_in_dim(
                leaf, 0, leaf.shape[axis], stride=most, axis=axis
            ),
            trajectories,
        )
        return sampler.feedback(carry, first, losses.reshape(-1, most).mean(axis=1))

    return TrajectorySampler(
        sampler.init,
        sample,
        is_on_policy=False,
        feedback=None if sampler.feedback is None else feedback,
    )

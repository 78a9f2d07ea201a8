"""Trajectory likelihood maximisation (TLM): P_B learns from the trajectories of P_F.

    backward policy    - mean over trajectories of 1/T Σ_t log P_B(s_t | s_{t+1})
    forward policy     any flow objective, with P_B of a target network and no gradient to it

Both in one step: the parameters of P_B are apart from those of P_F, so that neither loss moves the
other's. For a fixed P_B the flow's objective is a soft reinforcement-learning problem; this moves
P_B towards the one under which that problem's value is highest.

Gritsaev, Morozov, Samsonov, Tiapkin and Naumov, "Optimizing backward policies in GFlowNets via
trajectory likelihood maximization", ICLR 2025.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from ebjax.types import Objective, Params
from gflownet.distributions import MaskedCategorical
from gflownet.sampling import TrajectorySampler, forward_sampler, given_trajectories
from gflownet.scoring import score
from gflownet.types import Environment, Policy, PolicyOutput

__all__ = ["backward_likelihood", "trajectory_likelihood"]


def backward_likelihood(log_pb: jax.Array, valid: jax.Array) -> jax.Array:
    """``-1/T Σ_t log P_B`` of one trajectory.

    Args:
      log_pb: [T].
      valid: [T] bool.

    Returns:
      [] the loss.

    >>> valid = jnp.array([True, True, False])
    >>> float(backward_likelihood(jnp.array([-1.0, -2.0, 9.0]), valid))
    1.5
    """
    return -jnp.sum(jnp.where(valid, log_pb, 0.0)) / jnp.maximum(valid.sum(), 1)


def trajectory_likelihood(
    environment: Environment,
    policy: Policy,
    build: Callable[..., Objective],
    *,
    epsilon: Callable[[jax.Array], jax.Array] | float = 0.0,
    reward_params: Params = (),
    sampler: TrajectorySampler | None = None,
    chunk_size: int = 64,
) -> Objective:
    """Builds the objective.

    Args:
      environment: the graph and its reward.
      policy: made by ``separate_backward``, whose parameters are ``{"forward": ..., "backward":
        ...}``.
      build: ``(environment, policy, sampler=..., chunk_size=...) -> Objective``, the forward
        policy's, with its own options bound; without target networks of its own.
      epsilon: share of uniform exploration, a number or a schedule of the update count.
      reward_params: the reward's parameters.
      sampler: where trajectories come from instead; it then stands for the two options above.
      chunk_size: states evaluated at a time in the gradient pass.

    Returns:
      An ``Objective`` whose parameters are those of ``build``'s and ``"target"``, a target network
      of the whole policy, of which P_B is used (see ``with_target``). Metrics: those of
      ``build``'s, and ``backward_loss``.
    """

    def apply_frozen(params, observation, forward_mask, backward_mask):
        """P_F of the policy and P_B of its target network, without gradient."""
        joined = {
            "forward": params["policy"]["forward"],
            "backward": jax.lax.stop_gradient(params["target"]["backward"]),
        }
        return policy.apply(joined, observation, forward_mask, backward_mask)

    def apply_backward(params, observation, forward_mask, backward_mask):
        """P_B alone: what P_F says is not computed."""
        output = policy.apply(params, observation, forward_mask, backward_mask)
        nothing = MaskedCategorical(None, forward_mask)
        return PolicyOutput(nothing, output.backward)

    frozen = policy._replace(apply=apply_frozen)
    only_backward = policy._replace(apply=apply_backward)
    outer = sampler or forward_sampler(
        environment, frozen, epsilon=epsilon, reward_params=reward_params
    )
    given = given_trajectories(is_on_policy=outer.is_on_policy)
    # The carry of the inner objective hands its losses back.
    given = given._replace(feedback=lambda carry, trajectories, losses: losses)
    inner = build(environment, frozen, sampler=given, chunk_size=chunk_size)

    def with_both(params):
        return {**params, "policy": {"policy": params["policy"], "target": params["target"]}}

    def loss(params, carry, keys, batch):
        trajectories, carry, metrics = outer.sample(with_both(params), carry, keys, batch)
        value, (losses, own) = inner.loss(with_both(params), (), keys, trajectories)
        if outer.feedback is not None:
            carry = outer.feedback(carry, trajectories, losses)
        learned = {**jax.lax.stop_gradient(params["policy"])}
        learned["backward"] = params["policy"]["backward"]
        log_pb = score(
            environment,
            only_backward,
            learned,
            trajectories,
            is_on_policy=False,
            chunk_size=chunk_size,
        ).log_pb
        backward_loss = jax.vmap(backward_likelihood, 1)(log_pb, trajectories.valid).mean()
        return value + backward_loss, (carry, {**metrics, **own, "backward_loss": backward_loss})

    def init(key, params, batch):
        return outer.init(key, with_both(params), batch)

    return Objective(init=init, loss=loss)

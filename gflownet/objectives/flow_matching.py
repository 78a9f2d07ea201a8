"""Flow matching (FM): what flows into a state flows out of it.

    δ(s') = log(ε + Σ_{s -> s'} F(s) P_F(s' | s)) - log(ε + F(s')),    F(x) = R(x) at the end

for the visited states but the source. The flow through an edge is learned as F(s) P_F(s' | s), so
that what leaves s is F(s) exactly. *All* parents of a visited state are evaluated, which the other
objectives need not do; P_B is not used. ε > 0, of the size of the smallest reward, keeps states of
almost no flow from mattering as much as the others.

Bengio et al., "Flow network based generative models for non-iterative diverse candidate
generation", NeurIPS 2021.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import chex
import jax
import jax.numpy as jnp

from ebjax.types import Objective, Params
from gflownet.compaction import compact_map
from gflownet.objectives.flow_objective import flow_objective, over_transitions, state_flows
from gflownet.objectives.residual_losses import ResidualLoss, squared
from gflownet.sampling import TrajectorySampler, forward_sampler
from gflownet.types import Environment, Policy, Trajectories

__all__ = ["flow_matching", "flow_matching_residuals"]


def flow_matching_residuals(
    log_edge_flow: jax.Array,
    is_parent: jax.Array,
    log_flow: jax.Array,
    valid: jax.Array,
    *,
    floor: float = 0.0,
) -> jax.Array:
    """δ of the states of one trajectory after its source.

    Args:
      log_edge_flow: [T, A] log F(s) P_F(s' | s) of the edges into the state that each step enters.
      is_parent: [T, A] bool, which of these edges exist.
      log_flow: [T + 1] of the states, log R at the end.
      valid: [T] bool.
      floor: ε >= 0.

    Returns:
      [T] residuals, 0 where not valid.

    >>> edges = jnp.log(jnp.array([[1.0, 2.0], [5.0, 7.0]]))
    >>> is_parent, valid = jnp.array([[True, True], [True, False]]), jnp.array([True, True])
    >>> log_flow = jnp.log(jnp.array([9.0, 3.0, 5.0]))
    >>> flow_matching_residuals(edges, is_parent, log_flow, valid).round(5).tolist()
    [0.0, 0.0]
    """
    chex.assert_rank([log_edge_flow, log_flow], [2, 1])
    chex.assert_equal_shape([log_edge_flow, is_parent])
    is_parent = is_parent & valid[:, None]
    # A row without parents gets one, and its value is dropped.
    some = is_parent | ~valid[:, None]
    log_inflow = jax.nn.logsumexp(log_edge_flow, axis=1, where=some)
    log_outflow = log_flow[1:]
    if floor:
        log_floor = math.log(floor)
        log_inflow = jnp.logaddexp(log_inflow, log_floor)
        log_outflow = jnp.logaddexp(log_outflow, log_floor)
    return jnp.where(valid, log_inflow - log_outflow, 0.0)


def flow_matching(
    environment: Environment,
    policy: Policy,
    *,
    floor: float = 0.0,
    terminal_weight: float = 1.0,
    epsilon: Callable[[jax.Array], jax.Array] | float = 0.0,
    reward_params: Params = (),
    sampler: TrajectorySampler | None = None,
    residual_loss: ResidualLoss = squared,
    axis_name: str | None = None,
    chunk_size: int = 64,
) -> Objective:
    """Builds the objective.

    Args:
      environment: the graph and its reward.
      policy: P_F and log F.
      floor: ε >= 0, the flow that is added to both sides.
      terminal_weight: factor of the loss of terminal states, where the reward comes in.
      epsilon: share of uniform exploration, a number or a schedule of the update count.
      reward_params: the reward's parameters.
      sampler: where trajectories come from instead; it then stands for the two options above.
      residual_loss: loss of δ.
      axis_name: the mapped axis over which devices share the batch.
      chunk_size: states evaluated at a time in the gradient pass.

    Returns:
      An ``Objective`` whose parameters are ``{"policy": ...}``; the loss is the mean over visited
      states but the source. Metrics: ``log_z`` (log F of the source) and those of
      ``flow_objective``.

    Raises:
      ValueError: for an option out of range.
    """
    if not floor >= 0:
        raise ValueError(f"floor is {floor}; it must be at least 0.")
    if not terminal_weight > 0:
        raise ValueError(f"terminal_weight is {terminal_weight}; it must be positive.")

    def losses(batch):
        t, scores = batch.trajectories, batch.scores
        log_flow = state_flows(t, scores.log_flow)
        edges, is_parent = _edges_into(
            environment, policy, batch.params["policy"], t, scores.log_pf.dtype, chunk_size
        )
        residuals = jax.vmap(
            lambda *arrays: flow_matching_residuals(*arrays, floor=floor), 1, out_axes=1
        )(edges, is_parent, log_flow, t.valid)
        is_last = jnp.arange(t.valid.shape[0])[:, None] == t.length - 1
        weighted = jnp.where(is_last, terminal_weight, 1.0) * residual_loss(residuals)
        means = over_transitions(weighted, t.valid, axis_name)
        return means, {"log_z": log_flow[0].mean()}

    sampler = sampler or forward_sampler(
        environment, policy, epsilon=epsilon, reward_params=reward_params
    )
    return flow_objective(
        environment, policy, losses, sampler, with_flow=True, chunk_size=chunk_size
    )


def _edges_into(
    environment: Environment,
    policy: Policy,
    params: Params,
    trajectories: Trajectories,
    dtype,
    chunk_size: int,
) -> tuple[jax.Array, jax.Array]:
    """log F(s) P_F(s' | s) of all edges into the entered states, and which exist: [T, B, A]."""
    entered = jax.tree.map(lambda leaf: leaf[1:], trajectories.states)
    masks = jax.vmap(jax.vmap(environment.backward_mask))(entered)
    is_parent = masks & trajectories.valid[:, :, None]
    actions = jnp.broadcast_to(jnp.arange(environment.num_actions), is_parent.shape)
    states = jax.tree.map(
        lambda leaf: jnp.repeat(leaf.reshape(-1, *leaf.shape[2:]), environment.num_actions, axis=0),
        entered,
    )

    def log_edge_flow(params, item):
        state, action = item
        parent = environment.undo(state, action)
        output = policy.apply(
            params,
            environment.observe(parent),
            environment.forward_mask(parent),
            environment.backward_mask(parent),
        )
        return output.log_flow + output.forward.log_prob(action)

    edges = compact_map(
        log_edge_flow,
        params,
        (states, actions.reshape(-1)),
        is_parent.reshape(-1),
        like=dtype.type(0),
        chunk_size=chunk_size,
    )
    return edges.reshape(is_parent.shape), is_parent

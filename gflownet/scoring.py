"""What a policy says of trajectories, with gradient, at the states really visited.

Scoring gathers the visited states of all trajectories into chunks of a fixed size and runs over as
many chunks as there are; a batch whose trajectories are short costs little, and one compiled
program serves all lengths. States of which nothing is asked (no choice to score, no flow) are not
evaluated. Where trajectories were drawn under the same parameters, what they recorded are the
values, and only the gradient is computed, from what the layers put out then if that was kept.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from ebjax.types import Params, PyTree
from gflownet.compaction import compact_map
from gflownet.distributions import is_uniform
from gflownet.policies.remembering import recalled
from gflownet.types import Environment, Policy, PolicyOutput, State, Trajectories

__all__ = ["Scores", "at_states", "score"]


class Scores(NamedTuple):
    """What the policy says of trajectories, with gradient to its parameters.

    Attributes:
      log_pf: [T, B], 0 where not valid.
      log_pb: [T, B], 0 where not valid.
      log_flow: [T + 1, B] log F of the states that are left, 0 elsewhere; ``None`` if not asked.
      log_stop: [T + 1, B] log P_F(stop | s) of these states, likewise.
    """

    log_pf: jax.Array
    log_pb: jax.Array
    log_flow: jax.Array | None = None
    log_stop: jax.Array | None = None


def at_states(
    fn: Callable[[Params, State], jax.Array],
    params: Params,
    states: State,
    needed: jax.Array,
    *,
    chunk_size: int = 64,
) -> jax.Array:
    """``fn(params, state)`` at the needed states and 0 at the others, without gradient.

    Args:
      fn: ``(params, state) -> []``, an energy or a reward, say.
      params: its first argument.
      states: [..., ...].
      needed: [...] bool.
      chunk_size: states evaluated at a time.

    Returns:
      [...] values.
    """
    flat = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[needed.ndim :]), states)
    params = jax.lax.stop_gradient(params)
    one = jax.tree.map(lambda leaf: leaf[0], flat)
    shape = jax.eval_shape(fn, params, one)
    values = compact_map(
        fn,
        params,
        flat,
        needed.reshape(-1),
        like=jnp.zeros((), shape.dtype),
        chunk_size=chunk_size,
    )
    return jax.lax.stop_gradient(values).reshape(needed.shape)


def score(
    environment: Environment,
    policy: Policy,
    params: Params,
    trajectories: Trajectories,
    *,
    is_on_policy: bool,
    with_flow: bool = False,
    with_stop: bool = False,
    chunk_size: int = 64,
) -> Scores:
    """Log-probabilities of the trajectories' actions under ``params``, with gradient to them.

    Args:
      environment: the graph.
      policy: P_F and P_B, and log F if asked.
      params: the policy's parameters.
      trajectories: from anywhere.
      is_on_policy: whether the trajectories were drawn with these very ``params`` (exploration does
        not matter), so that what they recorded are the values.
      with_flow: whether log F is wanted too, from the same evaluation.
      with_stop: whether log P_F(stop | s) is wanted too; it is not recorded, so that values are
        computed whatever ``is_on_policy`` says.
      chunk_size: states evaluated at a time.

    Returns:
      ``Scores``.

    Raises:
      ValueError: if the policy has no log F, or the environment no stop action, that is asked for.
    """
    if with_stop and environment.stop_action is None:
        raise ValueError("The environment has no stop action, which this objective needs.")
    states = trajectories.states
    none = jnp.zeros_like(trajectories.valid[:1])
    no_action = environment.action(jnp.zeros_like(none, jnp.int32))
    is_left = jnp.concatenate([trajectories.valid, none])
    items = {
        "state": states,
        "forward_action": _concatenate(trajectories.actions, no_action),
        "backward_action": _concatenate(no_action, trajectories.actions),
        "is_left": is_left,
        "is_entered": jnp.concatenate([none, trajectories.valid]),
    }
    items = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), items)
    shape = trajectories.is_choice.shape

    def score_state(params, item, *memory):
        state = item["state"]
        apply = functools.partial(recalled, policy.apply, *memory) if memory else policy.apply
        output = apply(
            params,
            environment.observe(state),
            environment.forward_mask(state),
            environment.backward_mask(state),
        )
        log_pf = output.forward.log_prob(item["forward_action"])
        log_pb = output.backward.log_prob(item["backward_action"])
        values = [
            jnp.where(item["is_left"], log_pf, 0.0),
            jnp.where(item["is_entered"], log_pb, 0.0),
        ]
        if with_flow:
            values.append(jnp.where(item["is_left"], _log_flow(output), 0.0))
        if with_stop:
            log_stop = output.forward.log_prob(environment.action(environment.stop_action))
            values.append(jnp.where(item["is_left"], log_stop, 0.0))
        return tuple(values)

    recorded, memory = None, None
    if is_on_policy and not with_stop:
        zeros = jnp.zeros_like(trajectories.log_pf[:1])
        values = [
            jnp.concatenate([trajectories.log_pf, zeros]),
            jnp.concatenate([zeros, trajectories.log_pb]),
        ]
        if with_flow:
            values.append(_log_flow(trajectories))
        recorded = tuple(value.reshape(-1) for value in values)
        if trajectories.memory is not None:
            memory = trajectories.memory.outputs, trajectories.memory.row.reshape(-1)
    needed = trajectories.is_choice | is_left if with_flow or with_stop else trajectories.is_choice
    if recorded is not None and not _learns_backward(environment, policy, params, states):
        needed = needed & is_left  # of an end only P_B is asked, whose value is known
    dtypes = [trajectories.log_pf.dtype, trajectories.log_pb.dtype]
    dtypes += [trajectories.log_pf.dtype] * (with_flow + with_stop)
    log_pf, log_pb, *others = compact_map(
        score_state,
        params,
        items,
        needed.reshape(-1),
        recorded=recorded,
        memory=memory,
        like=tuple(dtype.type(0) for dtype in dtypes),
        chunk_size=chunk_size,
    )
    log_flow = others.pop(0).reshape(shape) if with_flow else None
    log_stop = others.pop(0).reshape(shape) if with_stop else None
    return Scores(log_pf.reshape(shape)[:-1], log_pb.reshape(shape)[1:], log_flow, log_stop)


def _learns_backward(
    environment: Environment, policy: Policy, params: Params, states: State
) -> bool:
    """Whether P_B depends on ``params``, as far as its type says: a uniform law does not."""

    def backward(params, state):
        masks = environment.forward_mask(state), environment.backward_mask(state)
        return policy.apply(params, environment.observe(state), *masks).backward

    one = jax.tree.map(lambda leaf: leaf[0, 0], states)
    return not is_uniform(jax.eval_shape(backward, params, one))


def _concatenate(first: PyTree, second: PyTree) -> PyTree:
    return jax.tree.map(lambda *leaves: jnp.concatenate(leaves), first, second)


def _log_flow(output: PolicyOutput | Trajectories) -> jax.Array:
    if output.log_flow is None:
        raise ValueError("The policy has no log flow, which this objective needs (with_flow).")
    return output.log_flow

"""EB-GFN: an energy learns from a flow's negatives, and the flow from the energy, in one update.

    negatives    x -> x' by K steps back and forward, accepted with min(1, R(x') q(x' -> x) /
                 (R(x) q(x -> x'))), else x' = x
    energy       mean E(x) - mean E(x') + penalties                                  to the energy
    flow         mean (log Z + Σ log P_F - Σ log P_B + E(x_T))² over trajectories    to the flow
                 of P_F from the source and of P_B from the data

The two losses are added and have no parameter in common: E is a constant in the flow's loss, and
the negatives are constants in the energy's. The law exp(-E) / Z is invariant under the move
whatever the flow is, so that a poor flow slows learning and does not bias it where data and law
agree; before that the negatives lag as those of contrastive divergence do. At the exact flow and
with K the length of a trajectory they are exact draws, and the gradient of the energy is that of
the likelihood.

The energy is E(params["energy"], x) = -log R, the reward of the environment, whose parameters it
has; ``gflownet.environments.discrete_energy`` makes that of any energy of discrete variables.

Zhang, Malkin, Liu, Volokhova, Courville and Bengio, "Generative flow networks for discrete
probabilistic modeling", ICML 2022.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from ebjax.objectives.contrastive_divergence import contrastive_loss
from ebjax.objectives.regularizers import Regularizer, mean_penalty
from ebjax.samplers.decision import metropolis, select
from ebjax.types import Objective, Params, PyTree
from gflownet.local_search import back_and_forth
from gflownet.objectives.residual_losses import ResidualLoss, squared
from gflownet.objectives.trajectory_balance import trajectory_balance
from gflownet.sampling import backward_sampler, forward_sampler, mixed_sampler
from gflownet.types import Environment, Policy, State

__all__ = ["FlowNegatives", "energy_based_flow", "flow_negatives", "rising_steps"]


class FlowNegatives(NamedTuple):
    """Where one move from each terminal state ends.

    Attributes:
      state: [B, ...] terminal states x', those of the start where the move was rejected.
      is_accepted: [B] bool.
      acceptance_rate: [B] the probability with which it was.
    """

    state: State
    is_accepted: jax.Array
    acceptance_rate: jax.Array


def flow_negatives(
    keys: jax.Array,
    environment: Environment,
    policy: Policy,
    params: Params,
    terminal: State,
    *,
    num_steps: jax.Array | int,
    reward_params: Params = (),
) -> FlowNegatives:
    """One Metropolis step from each terminal state, proposed by the flow; R / Z is invariant.

    Args:
      keys: [B] one key a move.
      environment: the graph and its reward.
      policy: P_F and P_B.
      params: the policy's parameters.
      terminal: [B, ...] terminal states x.
      num_steps: [] K >= 1, steps back; may be traced. Where objects have several lengths, the
        number of steps is uniform on 1, ..., K.
      reward_params: the first argument of ``environment.log_reward``.

    Returns:
      ``FlowNegatives``, without gradient. Two evaluations of the reward a move.
    """
    move_keys, accept_keys = jax.vmap(jax.random.split, out_axes=1)(keys)
    reward_params = jax.lax.stop_gradient(reward_params)
    proposal = back_and_forth(
        move_keys,
        environment,
        policy,
        params,
        terminal,
        num_steps=num_steps,
        random_length=environment.stop_action is not None,
        reward_params=reward_params,
    )
    log_reward = jax.vmap(environment.log_reward, (None, 0))(reward_params, terminal)
    is_accepted, rate = metropolis(
        jax.vmap(jax.random.uniform)(accept_keys),
        proposal.log_reward - log_reward + proposal.log_ratio,
    )
    state = jax.vmap(select)(is_accepted, proposal.state, terminal)
    return FlowNegatives(state, is_accepted, rate)


def rising_steps(most: int, num_updates: int) -> Callable[[jax.Array], jax.Array]:
    """Schedule of K: from 1 at the first update to ``most`` after ``num_updates``, then so.

    Args:
      most: the length of a trajectory, at least 1.
      num_updates: over how many updates K rises; 0 or 1: none, K is ``most`` from the start.

    Raises:
      ValueError: naming the argument that is out of range.

    >>> schedule = rising_steps(4, 8)
    >>> [int(schedule(jnp.asarray(count))) for count in (0, 2, 3, 5, 7, 1000)]
    [1, 1, 2, 3, 4, 4]
    """
    if most < 1:
        raise ValueError(f"most is {most}; a move takes at least 1 step back.")
    if num_updates < 0:
        raise ValueError(f"num_updates is {num_updates}; it must be at least 0.")

    def schedule(count):
        # In floating point, as ``most * count`` may pass 2^31.
        share = jnp.minimum((count + 1) / max(num_updates, 1), 1.0)
        return jnp.maximum(jnp.floor(most * share + 1e-4), 1).astype(jnp.int32)

    return schedule


def energy_based_flow(
    environment: Environment,
    policy: Policy,
    *,
    num_steps: Callable[[jax.Array], jax.Array] | int | None = None,
    terminal: Callable[[PyTree], State] = lambda example: example,
    counts: tuple[int, int] = (1, 1),
    epsilon: Callable[[jax.Array], jax.Array] | float = 0.0,
    residual_loss: ResidualLoss = squared,
    regularizers: Sequence[Regularizer] = (),
    chunk_size: int = 64,
) -> Objective:
    """Builds the objective: a batch of data in, the losses of energy and flow out.

    Args:
      environment: the graph, whose log R is -E and has the parameters of the energy.
      policy: P_F and P_B. A learned P_B makes local moves likelier to be accepted.
      num_steps: K of the moves that make negatives, a number or a schedule of the update count;
        ``None``: the length of a trajectory, so that x' is drawn anew.
      terminal: ``example -> state``, the terminal state of an example; by default the same.
      counts: of so many consecutive slots together, how many trajectories of the flow's loss are
        drawn by P_F and how many end in data. The sum must divide the slots of a device.
      epsilon: share of uniform exploration of the former, a number or a schedule.
      residual_loss: loss of a residual of trajectory balance.
      regularizers: penalties of the energy, ``(energy_fn, params, state) -> []``, each the sum of
        its means over data and over negatives.
      chunk_size: states evaluated at a time in the gradient pass.

    Returns:
      An ``Objective`` whose parameters are ``{"energy": ..., "policy": ..., "log_z": ...}`` and
      whose carry is ``(updates of each slot [B], carry of the trajectories)``. Metrics:
      ``energy_loss`` and ``flow_loss``, whose sum is the loss; ``energy_data``,
      ``energy_samples``, ``energy_gap`` (data minus negatives, about 0 at the end), ``log_z``,
      ``acceptance_rate``, ``share_moved`` (of negatives that are not their data), ``steps_back``
      (K), and ``penalty`` where there is one. An update evaluates the energy 3 times a slot beside
      the two evaluations of its own loss: once for the flow's loss, twice for the move.

    Raises:
      ValueError: naming the option that is out of range.

    >>> from gflownet.environments import discrete_energy
    >>> from gflownet.policies import mlp_policy
    >>> environment = discrete_energy(lambda bias, x: -jnp.sum(bias * x), num_variables=3)
    >>> policy = mlp_policy(environment.num_actions, (8,), backward="learned")
    >>> objective = energy_based_flow(environment, policy, num_steps=rising_steps(3, 100))
    """
    if isinstance(num_steps, int) and num_steps < 1:
        raise ValueError(f"num_steps is {num_steps}; a move takes at least 1 step back.")
    steps_of = environment.max_length if num_steps is None else num_steps
    regularizers = tuple(regularizers)

    def energy_fn(params, state):
        return -environment.log_reward(params, state)

    def flow(energy_params):
        """Trajectory balance for the law of an energy."""
        sampler = mixed_sampler(
            [
                (
                    forward_sampler(
                        environment, policy, epsilon=epsilon, reward_params=energy_params
                    ),
                    counts[0],
                ),
                (backward_sampler(environment, policy, reward_params=energy_params), counts[1]),
            ]
        )
        return trajectory_balance(
            environment,
            policy,
            sampler=sampler,
            residual_loss=residual_loss,
            chunk_size=chunk_size,
        )

    def init(key, params, batch):
        data = jax.vmap(terminal)(batch)
        count = jnp.zeros(len(jax.tree.leaves(data)[0]), jnp.int32)
        return count, flow(params["energy"]).init(key, params, data)

    def loss(params, carry, keys, batch):
        count, flow_carry = carry
        move_keys, flow_keys = jax.vmap(jax.random.split, out_axes=1)(keys)
        data = jax.vmap(terminal)(batch)
        frozen = jax.lax.stop_gradient(params["energy"])
        flow_loss, (flow_carry, flow_metrics) = flow(frozen).loss(
            params, flow_carry, flow_keys, data
        )
        steps = steps_of(count[0]) if callable(steps_of) else jnp.asarray(steps_of)
        negatives = flow_negatives(
            move_keys,
            environment,
            policy,
            params["policy"],
            data,
            num_steps=steps,
            reward_params=frozen,
        )
        energy_loss, metrics = _energy_loss(
            regularizers, energy_fn, params["energy"], data, negatives.state
        )
        metrics |= {
            "energy_loss": energy_loss,
            "flow_loss": flow_loss,
            "log_z": flow_metrics["log_z"],
            "acceptance_rate": negatives.acceptance_rate.mean(),
            "share_moved": _differs(negatives.state, data).mean(dtype=flow_loss.dtype),
            "steps_back": steps.astype(flow_loss.dtype),
        }
        return energy_loss + flow_loss, ((count + 1, flow_carry), metrics)

    return Objective(init=init, loss=loss)


def _energy_loss(regularizers, energy_fn, params, data, negatives):
    """The energy's part of the loss, and its metrics."""
    both = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), data, negatives)
    positive, negative = jnp.split(jax.vmap(energy_fn, (None, 0))(params, both), 2)
    value = contrastive_loss(positive, negative).mean()
    metrics = {
        "energy_data": positive.mean(),
        "energy_samples": negative.mean(),
        "energy_gap": positive.mean() - negative.mean(),
    }
    if regularizers:
        # The mean over data and negatives is half the sum of their means.
        metrics["penalty"] = 2.0 * mean_penalty(regularizers, energy_fn, params, both)
        value = value + metrics["penalty"]
    return value, metrics


def _differs(new: State, old: State) -> jax.Array:
    """[B] bool, whether any leaf of a state differs."""
    leaves = zip(jax.tree.leaves(new), jax.tree.leaves(old), strict=True)
    return jnp.stack([(a != b).reshape(len(a), -1).any(axis=1) for a, b in leaves if a.size]).any(
        axis=0
    )

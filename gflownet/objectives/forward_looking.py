"""Forward-looking flows: what is known of the reward on the way is not learned again.

    F(s) = F̃(s) e^{-E(s)},    F̃(x) = 1 at terminal states, where E(x) = -log R(x)

with an energy E of every state. The residuals of detailed and of subtrajectory balance stay as they
are; for detailed balance

    δ = log F̃(s) + log P_F(s' | s) - log F̃(s') - log P_B(s | s') + E(s') - E(s)

Only F̃ and the policies are learned. F̃(x) is 1 and not a network's output: were it free, every
reward R(x) g(x) would have a flow of zero loss.

Pan et al., "Better training of GFlowNets with local credit and incomplete trajectories", ICML 2023.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from ebjax.types import Objective, Params
from gflownet.objectives.detailed_balance import FlowFn, detailed_balance
from gflownet.objectives.flow_objective import terminal_flow
from gflownet.objectives.subtrajectory_balance import subtrajectory_balance
from gflownet.scoring import at_states
from gflownet.types import Environment, Policy

__all__ = [
    "forward_looking",
    "forward_looking_detailed_balance",
    "forward_looking_flow",
    "forward_looking_subtrajectory_balance",
]


def forward_looking_flow(
    log_flow: jax.Array, energy: jax.Array, log_reward: jax.Array, valid: jax.Array
) -> jax.Array:
    """log F along one trajectory from log F̃ and the energies.

    Args:
      log_flow: [T + 1] log F̃ of the states that are left.
      energy: [T + 1] E of these states.
      log_reward: [] log R of the terminal state.
      valid: [T] bool.

    Returns:
      [T + 1]; 0 after the end.

    >>> log_flow, energy = jnp.array([3.0, 2.0, 9.0]), jnp.array([0.0, 0.5, 9.0])
    >>> forward_looking_flow(log_flow, energy, jnp.array(1.0), jnp.array([True, True])).tolist()
    [3.0, 1.5, 1.0]
    """
    return terminal_flow(log_flow - energy, log_reward, valid)


def forward_looking(
    environment: Environment, *, reward_params: Params = (), chunk_size: int = 64
) -> FlowFn:
    """The ``flow_fn`` that takes the policy's log F for log F̃.

    Args:
      environment: with ``intermediate_energy``, which gets no gradient.
      reward_params: its first argument.
      chunk_size: states evaluated at a time.

    Raises:
      ValueError: if the environment has no energy of intermediate states.
    """
    energy_fn = environment.intermediate_energy
    if energy_fn is None:
        raise ValueError(
            "The environment has no intermediate_energy, which forward-looking flows need; give it "
            "one by environment._replace(intermediate_energy=...)."
        )

    def flow_fn(trajectories, log_flow):
        none = jnp.zeros_like(trajectories.valid[:1])
        is_left = jnp.concatenate([trajectories.valid, none])
        energy = at_states(
            energy_fn, reward_params, trajectories.states, is_left, chunk_size=chunk_size
        )
        return jax.vmap(forward_looking_flow, (1, 1, 0, 1), out_axes=1)(
            log_flow, energy, trajectories.log_reward, trajectories.valid
        )

    return flow_fn


def forward_looking_detailed_balance(
    environment: Environment, policy: Policy, **options
) -> Objective:
    """``detailed_balance`` with a forward-looking flow; ``options`` are the same.

    ``reward_params`` are the parameters of the reward and of the energies of states.
    """
    return detailed_balance(environment, policy, **_looking_forward(environment, options))


def forward_looking_subtrajectory_balance(
    environment: Environment, policy: Policy, **options
) -> Objective:
    """``subtrajectory_balance`` with a forward-looking flow; ``options`` are the same.

    ``reward_params`` are the parameters of the reward and of the energies of states.
    """
    return subtrajectory_balance(environment, policy, **_looking_forward(environment, options))


def _looking_forward(environment: Environment, options: dict[str, Any]) -> dict[str, Any]:
    """The options with the flow that they ask for."""
    shared = {name: options[name] for name in ("reward_params", "chunk_size") if name in options}
    return {**options, "flow_fn": forward_looking(environment, **shared)}

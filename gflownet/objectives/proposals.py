"""Flows as proposals of ``ebjax.objectives.cooperative``: draws of a flow begin a Markov chain,
and the flow learns where the chain went.

What a flow is taught is the likelihood of paths to the refined x, an upper bound of -log q(x):

    graph       -Σ_t log P_F(s_{t+1} | s_t)       on a path drawn by P_B back from x
    diffusion   -log dP_F / dW                    on a Brownian bridge back from x

with W the walk without drift, and P_B and the bridge constants. Both are least, over all P_F, where
paths of P_F have the law of refined x followed back; then q is the law of x.

Xie, Lu, Gao, Zhu and Wu, "Cooperative training of descriptor and generator networks", IEEE PAMI 42
(2020). Malkin et al., "GFlowNets and variational inference", ICLR 2023 (the likelihood of paths).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ebjax.types import Params, Position
from gflownet.diffusion import DiffusionProcess, backward_path, controls_of, forward_path
from gflownet.policies.diffusion import DiffusionPolicy
from gflownet.rollout import backward_rollout, forward_rollout
from gflownet.types import Environment, Policy, State

__all__ = ["Proposals", "diffusion_proposals", "flow_proposals"]


class Proposals(NamedTuple):
    """What ``cooperative`` asks of a sampler, in its order.

    Attributes:
      propose: ``(params, key) -> x``, one draw.
      loss: ``(params, key, proposal, refined) -> []``, whose gradient teaches the refined one.
    """

    propose: Callable[[Params, jax.Array], Position]
    loss: Callable[[Params, jax.Array, Position, Position], jax.Array]


def flow_proposals(
    environment: Environment,
    policy: Policy,
    *,
    example_of: Callable[[State], Position],
    state_of: Callable[[Position], State],
    reward_params: Params = (),
) -> Proposals:
    """A GFlowNet on a graph, whose objects a chain refines as examples x.

    Args:
      environment: the graph. Its reward is not asked for its value, but must take
        ``reward_params``.
      policy: P_F and P_B.
      example_of: a terminal state as an example, in the form that energy and kernel take.
      state_of: the terminal state of an example.
      reward_params: the reward's parameters.

    Returns:
      ``Proposals`` on the policy's parameters; ``cooperative(energy_fn, *proposals, kernel, ...)``.

    >>> from ebjax.objectives import cooperative
    >>> from ebjax.samplers import gibbs
    >>> from gflownet.environments import discrete_energy
    >>> from gflownet.policies import mlp_policy
    >>> spins = lambda coupling, x: -coupling * x[0] * x[1]
    >>> environment = discrete_energy(spins, num_variables=2, values=(0.0, 1.0))
    >>> terminal = environment.initial(jax.random.key(0))
    >>> proposals = flow_proposals(
    ...     environment, mlp_policy(environment.num_actions, (8,)),
    ...     example_of=lambda state: state.tokens.astype(float),
    ...     state_of=lambda x: terminal._replace(tokens=x.astype(jnp.int32)),
    ...     reward_params=0.0)
    >>> objective = cooperative(spins, *proposals, gibbs(), num_steps=1)
    """

    def propose(params, key):
        drawn = forward_rollout(key[None], environment, policy, params, reward_params=reward_params)
        return example_of(jax.tree.map(lambda leaf: leaf[0], drawn.terminal))

    def loss(params, key, proposal, refined):
        del proposal
        terminal = jax.tree.map(lambda leaf: leaf[None], state_of(refined))
        # Another key than that of the proposal's own path.
        path = backward_rollout(
            jax.random.fold_in(key, 1)[None],
            environment,
            policy,
            params,
            terminal,
            reward_params=reward_params,
        )
        one = jax.tree.map(lambda leaf: leaf[:, 0], (path.states, path.actions, path.valid))
        states, actions, valid = one

        # Not ``score``: there is one path, and nothing to leave out.
        def log_pf(state, action):
            output = policy.apply(
                params,
                environment.observe(state),
                environment.forward_mask(state),
                environment.backward_mask(state),
            )
            return output.forward.log_prob(action)

        before = jax.tree.map(lambda leaf: leaf[:-1], states)
        return -jnp.sum(jnp.where(valid, jax.vmap(log_pf)(before, actions), 0.0))

    return Proposals(propose, loss)


def diffusion_proposals(policy: DiffusionPolicy, process: DiffusionProcess, dim: int) -> Proposals:
    """A diffusion sampler whose draws [D] a chain refines.

    Args:
      policy: the drift, one that does not follow the slope of an energy.
      process: steps and variance of the walk.
      dim: D.

    Returns:
      ``Proposals`` on the policy's parameters.

    Raises:
      ValueError: if the process is out of range or the drift follows a slope.
    """
    process.check()
    if policy.uses_slope:
        raise ValueError("The policy follows the slope of an energy, of which proposals have none.")

    def drift_of(params) -> Any:
        return lambda x, time: policy.drift(params, x, time, None)

    def propose(params, key):
        return forward_path(key, process, drift_of(params), dim)[0][-1]

    def loss(params, key, proposal, refined):
        del proposal
        bridge = backward_path(jax.random.fold_in(key, 1), process, refined)
        return -controls_of(process, drift_of(params), bridge).sum()

    return Proposals(propose, loss)

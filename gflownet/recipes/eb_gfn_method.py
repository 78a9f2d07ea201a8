"""What the recipes of EB-GFN share: an energy of bits, and where its negatives come from.

    flow                     3 a slot: a trajectory of the flow's loss, both ends of a move
    gibbs                    chain_steps + 1: single sites, drawn from their conditional laws
    gibbs_with_gradients     chain_steps + 1, with gradient: single sites where it pays

The numbers are evaluations of the energy in one update, beside those of its own loss. The flow's
target is the energy of the moment; the chains persist.

The flow sets bits one at a time, in one of three orders:

    any_order       P_F chooses the place and the bit, P_B the place that is emptied (published)
    random_order    every order is as likely as the next: P_F chooses the bit, places are uniform
    append          from the first to the last: one path leads to each x
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from ebjax.objectives.contrastive_divergence import persistent_contrastive_divergence
from ebjax.objectives.regularizers import Regularizer
from ebjax.samplers import gibbs, gibbs_with_gradients
from ebjax.training import ScheduleConfig, adam, by_group, check_at_least, check_widths, setting
from ebjax.types import Energy, EnergyFn, Flow, Kernel, Objective, Params
from gflownet.environments.sequences import SequenceState, sequences
from gflownet.evaluation import FlowBounds, evidence_bounds, log_probabilities
from gflownet.objectives.energy_based_flow import energy_based_flow, rising_steps
from gflownet.policies import mlp_policy
from gflownet.rollout import forward_rollout
from gflownet.types import Policy

__all__ = ["EnergyAndFlowConfig", "FlowOfBits", "Method", "make_method", "random_bits"]

_CHAINS: dict[str, Callable[..., Kernel]] = {
    "gibbs": gibbs,
    "gibbs_with_gradients": gibbs_with_gradients,
}
_NEGATIVES = ("flow", *_CHAINS)
_ORDERS = ("any_order", "random_order", "append")


@dataclasses.dataclass(frozen=True, kw_only=True)
class EnergyAndFlowConfig(ScheduleConfig):
    """Settings of an energy of bits and of its negatives."""

    negatives: str = setting("flow", f"where negatives come from: {', '.join(_NEGATIVES)}")
    order: str = setting("any_order", f"flow: in which bits are set: {', '.join(_ORDERS)}")
    policy_learning_rate: float = setting(1e-3, "flow: of the policy")
    log_z_learning_rate: float = setting(0.1, "flow: of log Z")
    rising_updates: int = setting(
        500, "flow: updates over which a move grows from 1 step back to all; 0: all at once"
    )
    hidden_features: tuple[int, ...] = setting((128, 128), "flow: widths of the policy's layers")
    chunk_size: int = setting(512, "flow: states evaluated at a time in the gradient pass")
    chain_steps: int = setting(2, "gibbs, gibbs_with_gradients: steps of a chain in one update")
    num_steps: int = setting(2000)
    batch_size: int = setting(128)
    steps_per_call: int = setting(50)
    checkpoint_every: int = setting(500)
    num_devices: int = setting(1)
    ema_decay: float = setting(0.99)
    num_evaluated: int = setting(2000, "trajectories when the flow is judged")

    def __post_init__(self) -> None:
        """Checks types and ranges."""
        super().__post_init__()
        if self.negatives not in _NEGATIVES:
            raise ValueError(
                f"negatives is {self.negatives!r}; it must be one of {', '.join(_NEGATIVES)}."
            )
        if self.order not in _ORDERS:
            raise ValueError(f"order is {self.order!r}; it must be one of {', '.join(_ORDERS)}.")
        if self.negatives == "flow" and self.batch_size % 2:
            raise ValueError(
                f"batch_size is {self.batch_size}; with negatives 'flow' it must be even, as half "
                "of the trajectories end in data."
            )
        check_at_least(self, 1, "chunk_size", "chain_steps")
        check_at_least(self, 2, "num_evaluated")
        check_at_least(self, 0, "policy_learning_rate", "log_z_learning_rate", "rising_updates")
        check_widths(self, "hidden_features")


class FlowOfBits(NamedTuple):
    """A flow that sets D bits. Parameters are those of the whole method.

    Attributes:
      flow: the graph, whose log R is -E, and the policy.
      draw: ``(key, params) -> x [D]`` in {0, 1}, one sample.
      bounds: ``(key, params, num_trajectories) -> FlowBounds`` of log Z.
      log_probabilities: ``(key, params, x [N, D], num_samples) -> [N]`` log of an unbiased estimate
        of the probability that x is drawn.
    """

    flow: Flow
    draw: Callable[[jax.Array, Params], jax.Array]
    bounds: Callable[[jax.Array, Params, int], FlowBounds]
    log_probabilities: Callable[..., jax.Array]


class Method(NamedTuple):
    """How an energy of bits is learned.

    Attributes:
      init: ``key -> {"energy": ...}``, with ``"policy"`` and ``"log_z"`` where there is a flow.
      objective: over batches of x [B, D].
      optimizer: Adam, each part at its own rate.
      energy: ``(params, x) -> []``.
      progress: the metrics that a person watches.
      flow: of which negatives are drawn; ``None`` where chains are.
    """

    init: Callable[[jax.Array], Params]
    objective: Objective
    optimizer: optax.GradientTransformation
    energy: EnergyFn
    progress: tuple[str, ...]
    flow: FlowOfBits | None


def random_bits(key: jax.Array, num_bits: int) -> jax.Array:
    """[D] float32 in {0, 1}, where chains start."""
    return jax.random.bernoulli(key, 0.5, (num_bits,)).astype(jnp.float32)


def _as_state(x: jax.Array) -> SequenceState:
    """The terminal state(s) of bits [..., D]."""
    return SequenceState(x.astype(jnp.int32), jnp.zeros(x.shape[:-1], bool))


def make_method(
    config: EnergyAndFlowConfig,
    energy: Energy,
    num_bits: int,
    *,
    regularizers: Sequence[Regularizer] = (),
) -> Method:
    """The parts of a run that learns ``energy`` from bits.

    Args:
      config: the settings.
      energy: of x [D] in {0, 1}.
      num_bits: D.
      regularizers: penalties of the energy, ``(energy_fn, params of the energy, x) -> []``.
    """
    uses_flow = config.negatives == "flow"
    environment = sequences(
        lambda params, tokens: -energy.apply(params, tokens.astype(jnp.float32)),
        vocabulary=2,
        length=num_bits,
        order="append" if config.order == "append" else "any_order",
    )
    backward = "learned" if config.order == "any_order" else "uniform"
    policy = mlp_policy(environment.num_actions, config.hidden_features, backward=backward)
    if config.order == "random_order":
        policy = _with_uniform_places(policy)

    def energy_fn(params: Params, x: jax.Array) -> jax.Array:
        return energy.apply(params["energy"], x)

    def init(key: jax.Array):
        params = {"energy": energy.init(jax.random.fold_in(key, 1), jnp.zeros(num_bits))}
        if uses_flow:
            observation = environment.observe(environment.initial(key))
            # Energies are near 0 at first.
            log_z = jnp.asarray(num_bits * math.log(2.0), jnp.float32)
            params |= {"policy": policy.init(key, observation), "log_z": log_z}
        return params

    rates = {"energy": config.learning_rate}
    if uses_flow:
        rates |= {"policy": config.policy_learning_rate, "log_z": config.log_z_learning_rate}
        objective = energy_based_flow(
            environment,
            policy,
            num_steps=rising_steps(num_bits, config.rising_updates),
            terminal=_as_state,
            regularizers=regularizers,
            chunk_size=config.chunk_size,
        )
    else:
        objective = persistent_contrastive_divergence(
            energy_fn,
            _CHAINS[config.negatives](),
            lambda key: random_bits(key, num_bits),
            num_steps=config.chain_steps,
            rebirth_probability=0.0,
            regularizers=tuple(_of_energy(penalty) for penalty in regularizers),
        )
    return Method(
        init=init,
        objective=objective,
        optimizer=by_group({name: adam(config.schedule(rate)) for name, rate in rates.items()}),
        energy=energy_fn,
        progress=("energy_gap", *(("flow_loss", "log_z", "acceptance_rate") if uses_flow else ())),
        flow=_flow_of_bits(environment, policy) if uses_flow else None,
    )


def _with_uniform_places(policy: Policy) -> Policy:
    """The policy that chooses among the empty places evenly, and the bit by its two logits."""

    def apply(params, *arguments):
        output = policy.apply(params, *arguments)
        logits = jax.nn.log_softmax(output.forward.logits.reshape(-1, 2)).reshape(-1)
        return output._replace(forward=output.forward._replace(logits=logits))

    return policy._replace(apply=apply)


def _of_energy(penalty):
    """The penalty for ``params["energy"]``."""
    return lambda energy_fn, params, x: penalty(energy_fn, params["energy"], x)


def _flow_of_bits(environment, policy) -> FlowOfBits:
    def draw(key, params):
        rolled = forward_rollout(
            key[None], environment, policy, params["policy"], reward_params=params["energy"]
        )
        return rolled.terminal.tokens[0].astype(jnp.float32)

    def bounds(key, params, num_trajectories):
        return evidence_bounds(
            key,
            environment,
            policy,
            params["policy"],
            num_trajectories=num_trajectories,
            reward_params=params["energy"],
        )

    def log_p(key, params, x, num_samples):
        return log_probabilities(
            key,
            environment,
            policy,
            params["policy"],
            _as_state(jnp.asarray(x)),
            num_samples=num_samples,
            reward_params=params["energy"],
        )

    flow = Flow(
        environment._replace(
            log_reward=lambda params, state: environment.log_reward(params["energy"], state)
        ),
        policy._replace(
            apply=lambda params, *arguments: policy.apply(params["policy"], *arguments)
        ),
    )
    return FlowOfBits(flow, draw, bounds, log_p)

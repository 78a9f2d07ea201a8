"""Policies over actions with values: a network that gives mixtures of Beta or von Mises laws.

Lahlou et al., "A theory of continuous generative flow networks", ICML 2023.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp

from gflownet.distributions import MaskedCategorical
from gflownet.distributions_continuous import BetaMixture, ChartedLaw, UnitLaw, VonMisesMixture
from gflownet.policies.networks import MLPHeads, check_backward
from gflownet.types import Policy, PolicyOutput

__all__ = ["MIXTURE_FAMILIES", "mixture_policy"]

MIXTURE_FAMILIES = ("beta", "von_mises")


def _beta_mixture(outputs: jax.Array) -> BetaMixture:
    """The outputs [3, D, K] as a mixture; at 0 the laws are Beta(1.7, 1.7)."""
    logits, alpha, beta = outputs
    return BetaMixture(logits, 1.0 + nn.softplus(alpha), 1.0 + nn.softplus(beta))


def _von_mises_mixture(outputs: jax.Array) -> VonMisesMixture:
    """The outputs [3, D, K] as a mixture; at 0 its means are spread over the circle."""
    logits, mean, concentration = outputs
    spread = 2.0 * math.pi * jnp.arange(logits.shape[-1]) / logits.shape[-1]
    return VonMisesMixture(logits, mean + spread, 1e-3 + nn.softplus(concentration))


def mixture_policy(
    num_actions: int,
    value_dim: int,
    features: Sequence[int] = (256, 256),
    *,
    family: str = "beta",
    num_components: int = 4,
    backward: str = "learned",
    with_flow: bool = False,
    activation: Callable[[jax.Array], jax.Array] = nn.leaky_relu,
) -> Policy:
    """A multilayer perceptron on the features, over indices and values in the charts of a state.

    All indices share the law of r in [0, 1]^D; the chart of each makes it a law of values. Beta
    laws have concentrations above 1 and von Mises laws above 0.001.

    Args:
      num_actions: A.
      value_dim: D, at least 1.
      features: widths of the hidden layers.
      family: ``"beta"``, or ``"von_mises"`` for angles.
      num_components: K, Beta or von Mises laws of a coordinate.
      backward: ``"learned"``, P_B from a second head on the same trunk, or ``"uniform"`` over the
        allowed backward indices and their charts.
      with_flow: whether one more output on the same trunk is log F.
      activation: elementwise.

    Returns:
      A ``Policy`` for environments that observe a ``ChartedObservation``.

    Raises:
      ValueError: naming the argument that is out of range.
    """
    is_learned = check_backward(backward)
    if family not in MIXTURE_FAMILIES:
        raise ValueError(f"family is {family!r}; it must be one of {', '.join(MIXTURE_FAMILIES)}.")
    for name, value in (("value_dim", value_dim), ("num_components", num_components)):
        if value < 1:
            raise ValueError(f"{name} is {value}; it must be at least 1.")
    mixture_shape = (3, value_dim, num_components)
    per_direction = num_actions + math.prod(mixture_shape)
    num_directions = 2 if is_learned else 1
    module = MLPHeads(tuple(features), num_directions * per_direction + with_flow, activation)

    def laws(outputs) -> tuple[jax.Array, UnitLaw]:
        numbers = outputs[num_actions:].reshape(mixture_shape)
        unit = _beta_mixture(numbers) if family == "beta" else _von_mises_mixture(numbers)
        return outputs[:num_actions], unit

    def uniform() -> tuple[jax.Array, UnitLaw]:
        shape = (value_dim, 1)
        flat = BetaMixture(jnp.zeros(shape), jnp.ones(shape), jnp.ones(shape))
        if family == "von_mises":
            return jnp.zeros(num_actions), VonMisesMixture(*[jnp.zeros(shape)] * 3)
        return jnp.zeros(num_actions), flat

    def init(key, observation):
        return module.init(key, observation.features)["params"]

    def apply(params, observation, forward_mask, backward_mask):
        outputs = module.apply({"params": params}, observation.features)
        logits, unit = laws(outputs[:per_direction])
        forward = ChartedLaw(MaskedCategorical(logits, forward_mask), unit, observation.forward)
        if is_learned:
            logits, unit = laws(outputs[per_direction : 2 * per_direction])
        else:
            logits, unit = uniform()
        return PolicyOutput(
            forward=forward,
            backward=ChartedLaw(
                MaskedCategorical(logits, backward_mask), unit, observation.backward
            ),
            log_flow=outputs[-1] if with_flow else None,
        )

    return Policy(init=init, apply=apply)

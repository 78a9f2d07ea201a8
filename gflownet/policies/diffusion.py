"""Networks of position and time: the drift of a diffusion sampler, and the flow of its states.

Zhang and Chen, "Path integral sampler", ICLR 2022; Sendera et al., "Improved off-policy training of
diffusion samplers", NeurIPS 2024.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from ebjax.types import Params

__all__ = ["DiffusionFlow", "DiffusionPolicy", "diffusion_flow", "diffusion_policy"]

_LARGEST_SLOPE = 100.0


class DiffusionPolicy(NamedTuple):
    """The drift.

    Attributes:
      init: ``key -> params``.
      drift: ``(params, x [D], time [], slope [D] or None) -> [D]``, with ``slope`` the gradient of
        log R at x where ``uses_slope``.
      uses_slope: whether the gradient of the energy is wanted.
    """

    init: Callable[[jax.Array], Params]
    drift: Callable[..., jax.Array]
    uses_slope: bool


class DiffusionFlow(NamedTuple):
    """log F of a state less the log-density of the walk without drift.

    Attributes:
      init: ``key -> params``.
      log_flow: ``(params, x [D], time []) -> []``.
    """

    init: Callable[[jax.Array], Params]
    log_flow: Callable[[Params, jax.Array, jax.Array], jax.Array]


class _Network(nn.Module):
    """Features of position and time, summed; then dense layers, the last of them zero."""

    num_outputs: int
    features: int
    num_layers: int
    uses_slope: bool

    @nn.compact
    def __call__(self, x, time, slope):
        frequencies = np.linspace(0.1, 100.0, self.features)
        phases = self.param("phases", nn.initializers.normal(1.0), (self.features,))
        angles = time * frequencies.astype(np.float32) + phases
        waves = jnp.concatenate([jnp.sin(angles), jnp.cos(angles)])
        time_features = nn.Dense(self.features)(nn.gelu(nn.Dense(self.features)(waves)))
        hidden = nn.gelu(nn.Dense(self.features)(x) + time_features)
        for _ in range(self.num_layers):
            hidden = nn.gelu(nn.Dense(self.features)(hidden))
        out = nn.Dense(self.num_outputs, kernel_init=nn.initializers.zeros_init())(hidden)
        if self.uses_slope:
            scale = nn.Dense(self.features)(waves)
            scale = nn.Dense(
                1,
                kernel_init=nn.initializers.zeros_init(),
                bias_init=nn.initializers.constant(0.01),
            )(nn.gelu(scale))
            out = out + scale * jnp.clip(slope, -_LARGEST_SLOPE, _LARGEST_SLOPE)
        return out


def diffusion_policy(
    dim: int, *, features: int = 64, num_layers: int = 2, uses_slope: bool = False
) -> DiffusionPolicy:
    """A network of position and time; at its start it does not move (or follows 0.01 slope).

    Args:
      dim: D.
      features: width of its layers.
      num_layers: hidden layers after the sum of features.
      uses_slope: adds ``c(t) ∇ log R(x)``, each component of the gradient clipped to 100.

    >>> policy = diffusion_policy(2)
    >>> policy.drift(policy.init(jax.random.key(0)), jnp.ones(2), jnp.array(0.5), None).tolist()
    [0.0, 0.0]
    """
    _check_sizes(dim, features)
    module = _Network(dim, features, num_layers, uses_slope)
    zero = jnp.zeros(dim)

    def drift(params, x, time, slope) -> jax.Array:
        out: Any = module.apply({"params": params}, x, time, slope)
        return out

    return DiffusionPolicy(
        init=lambda key: module.init(key, zero, jnp.zeros(()), zero)["params"],
        drift=drift,
        uses_slope=uses_slope,
    )


def diffusion_flow(dim: int, *, features: int = 64, num_layers: int = 2) -> DiffusionFlow:
    """A network of position and time with one output, 0 at its start.

    Args:
      dim: D.
      features: width of its layers.
      num_layers: hidden layers after the sum of features.

    >>> flow = diffusion_flow(2)
    >>> float(flow.log_flow(flow.init(jax.random.key(0)), jnp.ones(2), jnp.array(0.5)))
    0.0
    """
    _check_sizes(dim, features)
    module = _Network(1, features, num_layers, uses_slope=False)

    def log_flow(params, x, time) -> jax.Array:
        out: Any = module.apply({"params": params}, x, time, None)
        return out[0]

    return DiffusionFlow(
        init=lambda key: module.init(key, jnp.zeros(dim), jnp.zeros(()), None)["params"],
        log_flow=log_flow,
    )


def _check_sizes(dim: int, features: int) -> None:
    for name, value in (("dim", dim), ("features", features)):
        if value < 1:
            raise ValueError(f"{name} is {value}; it must be at least 1.")

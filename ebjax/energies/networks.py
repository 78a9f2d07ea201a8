"""Networks as energies: one example in, one scalar out. No layer mixes examples.

Smooth activations (SiLU) by default: samplers follow the gradient in x, which must not be
piecewise constant.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from ebjax.types import Energy, bind

__all__ = ["convolutional_energy", "from_linen", "mlp_energy"]


def from_linen(module: nn.Module) -> Energy:
    """An energy from any linen module that maps one example (and context) to one number.

    The module's output is squeezed to a scalar; more than one number is an error.
    """
    return Energy(bind(_init_module, module=module), bind(_apply_module, module=module))


def _init_module(key, x, *context, module: nn.Module):
    return module.init(key, x, *context)["params"]


def _apply_module(params, x, *context, module: nn.Module):
    out: Any = module.apply({"params": params}, x, *context)
    if jnp.size(out) != 1:
        raise ValueError(
            f"{type(module).__name__} returned shape {jnp.shape(out)} for one example; "
            "an energy returns one number."
        )
    return jnp.reshape(out, ())


class _MLP(nn.Module):
    features: tuple[int, ...]
    activation: Callable[[jax.Array], jax.Array]

    @nn.compact
    def __call__(self, x):
        x = jnp.ravel(x)
        for width in self.features:
            x = self.activation(nn.Dense(width)(x))
        return nn.Dense(1)(x)[0]


def mlp_energy(
    features: Sequence[int] = (128, 128),
    *,
    activation: Callable[[jax.Array], jax.Array] = nn.silu,
) -> Energy:
    """A multilayer perceptron on the flattened example.

    Args:
      features: widths of the hidden layers.
      activation: elementwise.

    >>> import jax, jax.numpy as jnp
    >>> energy = mlp_energy((16,))
    >>> params = energy.init(jax.random.key(0), jnp.zeros(2))
    >>> energy.apply(params, jnp.ones(2)).shape
    ()
    """
    return from_linen(_MLP(tuple(features), activation))


class _Convolutional(nn.Module):
    features: tuple[int, ...]
    dense_features: int
    activation: Callable[[jax.Array], jax.Array]

    @nn.compact
    def __call__(self, x):
        for layer, width in enumerate(self.features):
            # The first layer keeps the resolution, each later one halves it.
            strides = (1, 1) if layer == 0 else (2, 2)
            x = self.activation(nn.Conv(width, (3, 3), strides)(x))
        x = jnp.ravel(x)
        if self.dense_features:
            x = self.activation(nn.Dense(self.dense_features)(x))
        return nn.Dense(1)(x)[0]


def convolutional_energy(
    features: Sequence[int] = (64, 128, 256),
    *,
    dense_features: int = 256,
    activation: Callable[[jax.Array], jax.Array] = nn.silu,
) -> Energy:
    """A convolutional network on one image [height, width, channels], without normalisation.

    3x3 convolutions; the first at full resolution, each later one at half of the last; then a
    dense layer on the flattened map. Batch normalisation is left out on purpose: the energy of an
    image must not depend on the others in its batch.

    Args:
      features: channels of the convolutions.
      dense_features: width of the dense layer, 0 for none.
      activation: elementwise.
    """
    return from_linen(_Convolutional(tuple(features), dense_features, activation))

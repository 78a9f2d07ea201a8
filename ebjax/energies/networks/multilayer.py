"""Multilayer perceptrons as energies of vectors, tables and small images.

    E(x) = w' a(W_L ... a(W_1 u + b_1) ...) + b,    u = (x - m) / s, optionally with sin, cos (Ω u)

Smooth activations (SiLU) by default: samplers follow the gradient in x, which must not be
piecewise constant. The law of a standardised energy needs no Jacobian: m and s are constants.

Shapes: ``x`` is one example of any shape, flattened to D numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

from ebjax.energies.adapters import from_linen
from ebjax.energies.joint import Classifier, classifier_from_linen
from ebjax.types import Energy

__all__ = [
    "check_widths",
    "mlp_classifier",
    "mlp_energy",
]


def check_widths(name: str, widths: Sequence[int], *, minimum: int = 0) -> tuple[int, ...]:
    """``widths`` as a tuple of positive integers, at least ``minimum`` of them.

    Raises:
      ValueError: naming the argument.
    """
    widths = tuple(int(width) for width in widths)
    if len(widths) < minimum or any(width < 1 for width in widths):
        number = f"at least {minimum} " if minimum else ""
        raise ValueError(f"{name} is {widths}; give {number}positive widths.")
    return widths


class _MLP(nn.Module):
    features: tuple[int, ...]
    activation: Callable[[jax.Array], jax.Array]
    num_outputs: int = 1
    center: tuple[float, ...] = ()
    scale: tuple[float, ...] = ()
    num_frequencies: int = 0
    frequency_scale: float = 1.0

    @nn.compact
    def __call__(self, x):
        x = jnp.ravel(x)
        for name, values in (("center", self.center), ("scale", self.scale)):
            if len(values) not in (0, 1, x.size):
                raise ValueError(
                    f"{name} has {len(values)} numbers; an example has {x.size}, so give one for "
                    "each or one for all."
                )
        if self.center:
            x = x - jnp.asarray(self.center, x.dtype)
        if self.scale:
            x = x / jnp.asarray(self.scale, x.dtype)
        if self.num_frequencies:
            normal = nn.initializers.normal(self.frequency_scale)
            angles = nn.Dense(self.num_frequencies, kernel_init=normal, name="frequencies")(x)
            x = jnp.concatenate([x, jnp.sin(angles), jnp.cos(angles)])
        for width in self.features:
            x = self.activation(nn.Dense(width)(x))
        return nn.Dense(self.num_outputs)(x)


def _as_tuple(name: str, values: npt.ArrayLike | None) -> tuple[float, ...]:
    if values is None:
        return ()
    array = np.ravel(np.asarray(values, float))
    if not np.isfinite(array).all() or (name == "scale" and (array <= 0).any()):
        kind = "positive" if name == "scale" else "finite"
        raise ValueError(f"{name} is {values}; its entries must be {kind} numbers.")
    return tuple(array.tolist())


def _make_mlp(features, activation, num_outputs, center, scale, **frequencies) -> _MLP:
    center, scale = _as_tuple("center", center), _as_tuple("scale", scale)
    features = check_widths("features", features)
    return _MLP(features, activation, num_outputs, center, scale, **frequencies)


def mlp_energy(
    features: Sequence[int] = (128, 128),
    *,
    activation: Callable[[jax.Array], jax.Array] = nn.silu,
    center: npt.ArrayLike | None = None,
    scale: npt.ArrayLike | None = None,
    num_frequencies: int = 0,
    frequency_scale: float = 1.0,
) -> Energy:
    """A multilayer perceptron on the flattened example.

    The defaults suit points in the plane and tables of standardised columns. Columns in their own
    units need ``center`` and ``scale``; laws with fine structure (a checkerboard, two spirals)
    are learned faster with ``num_frequencies`` of 64 or so.

    Args:
      features: widths of the hidden layers.
      activation: elementwise.
      center: m, the mean of the data, one number for each entry of an example or one for all.
      scale: s > 0, its standard deviation, likewise.
      num_frequencies: sines and cosines of that many learned projections of u enter beside u.
      frequency_scale: their initial standard deviation, in radians a unit of u.

    Raises:
      ValueError: naming the argument that is out of range.

    >>> import jax, jax.numpy as jnp
    >>> energy = mlp_energy((16,))
    >>> params = energy.init(jax.random.key(0), jnp.zeros(2))
    >>> energy.apply(params, jnp.ones(2)).shape
    ()
    """
    if num_frequencies < 0:
        raise ValueError(f"num_frequencies is {num_frequencies}; it must be at least 0.")
    module = _make_mlp(
        features,
        activation,
        1,
        center,
        scale,
        num_frequencies=num_frequencies,
        frequency_scale=frequency_scale,
    )
    return from_linen(module)


def mlp_classifier(
    num_classes: int,
    features: Sequence[int] = (128, 128),
    *,
    activation: Callable[[jax.Array], jax.Array] = nn.silu,
    center: npt.ArrayLike | None = None,
    scale: npt.ArrayLike | None = None,
) -> Classifier:
    """A multilayer perceptron with one logit a class; ``joint_energy`` reads energies off it.

    Args:
      num_classes: K, at least 2.
      features: widths of the hidden layers.
      activation: elementwise.
      center: as of ``mlp_energy``.
      scale: as of ``mlp_energy``.

    >>> classifier = mlp_classifier(3, (16,))
    >>> params = classifier.init(jax.random.key(0), jnp.zeros(2))
    >>> classifier.apply(params, jnp.ones(2)).shape
    (3,)
    """
    module = _make_mlp(features, activation, num_classes, center, scale)
    return classifier_from_linen(module, num_classes)

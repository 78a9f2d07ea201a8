"""Energies of an example and its class, E(x, y).

    modulated     h_l = a((1 + γ_l(y)) (W_l h_{l-1} + b_l) + δ_l(y)),  E = w' h_L + b
    projected     E = ψ(h_L) - e_y · h_L

The first lets the class change every layer; the second (a projection) is a class-free energy and a
linear classifier on the same features, so that all K energies cost one pass. A classifier read as
an energy, E(x, y) = -f_y(x), is ``ebjax.energies.joint.class_energy``.

Perez et al., "FiLM: visual reasoning with a general conditioning layer", AAAI 2018. Miyato and
Koyama, "cGANs with projection discriminator", ICLR 2018.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp

from ebjax.energies.adapters import from_linen
from ebjax.energies.networks.multilayer import check_widths
from ebjax.types import Energy

__all__ = ["class_conditional_energy"]

_KINDS = ("modulated", "projected")


def _class_weights(label, num_classes: int, dtype) -> jax.Array:
    """[K] the one-hot vector of an integer label, or weights of the classes as they are."""
    label = jnp.asarray(label)
    if label.ndim == 0 and jnp.issubdtype(label.dtype, jnp.integer):
        return jax.nn.one_hot(label, num_classes, dtype=dtype)
    if label.shape != (num_classes,):
        raise ValueError(
            f"label has shape {label.shape} and dtype {label.dtype}; give one integer, or the "
            f"weights of the {num_classes} classes."
        )
    return label.astype(dtype)


class _ClassConditional(nn.Module):
    num_classes: int
    features: tuple[int, ...]
    activation: Callable[[jax.Array], jax.Array]
    kind: str

    @nn.compact
    def __call__(self, x, label=0):
        x = jnp.ravel(x)
        weights = _class_weights(label, self.num_classes, x.dtype)
        small = nn.initializers.normal(0.1)

        def embed(width, name):
            return nn.Dense(width, use_bias=False, kernel_init=small, name=name)(weights)

        for layer, width in enumerate(self.features):
            x = nn.Dense(width)(x)
            if self.kind == "modulated":
                x = (1.0 + embed(width, f"gain_{layer}")) * x + embed(width, f"shift_{layer}")
            x = self.activation(x)
        energy = nn.Dense(1)(x)[0]
        if self.kind == "projected":
            energy = energy - embed(x.size, "embedding") @ x
        return energy


def class_conditional_energy(
    num_classes: int,
    features: Sequence[int] = (128, 128),
    *,
    kind: str = "modulated",
    activation: Callable[[jax.Array], jax.Array] = nn.silu,
) -> Energy:
    """A multilayer perceptron on the flattened example and its class: ``apply(params, x, label)``.

    Args:
      num_classes: K, at least 2.
      features: widths of the hidden layers, at least one.
      kind: ``"modulated"`` or ``"projected"``, see the head of this file.
      activation: elementwise.

    Returns:
      An ``Energy`` whose context is the label: an integer, or weights [K] of the classes (a
      relaxed or a soft label). ``ebjax.energies.condition(energy.apply, label)`` binds it. A label
      outside of 0, ..., K - 1 has no embedding: it is the energy without a class.

    Raises:
      ValueError: naming the argument that is out of range.

    >>> energy = class_conditional_energy(3, (16,))
    >>> params = energy.init(jax.random.key(0), jnp.zeros(2))
    >>> len({float(energy.apply(params, jnp.ones(2), label)) for label in range(3)})
    3
    """
    if num_classes < 2:
        raise ValueError(f"num_classes is {num_classes}; it must be at least 2.")
    if kind not in _KINDS:
        raise ValueError(f"kind is {kind!r}; it must be one of {', '.join(_KINDS)}.")
    features = check_widths("features", features, minimum=1)
    return from_linen(_ClassConditional(num_classes, features, activation, kind))

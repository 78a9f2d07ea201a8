"""A classifier read as an energy-based model of inputs and classes.

    p(x, y) = exp f_y(x) / Z           E(x, y) = -f_y(x)
    E(x)    = -log Σ_k exp f_k(x)      p(y | x) = softmax f(x)
    F_T(x)  = -T log Σ_k exp(f_k(x) / T),    -max_k f_k - T log K <= F_T <= -max_k f_k

Adding a constant c to all logits changes no p(y | x) and lowers the energy by c: what a classifier
trained on labels alone leaves undetermined, and what the energy model learns.

Shapes: K classes, logits f(x) [K].

Grathwohl et al., "Your classifier is secretly an energy based model and you should treat it like
one", ICLR 2020. Liu et al., "Energy-based out-of-distribution detection", NeurIPS 2020.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp

from ebjax.types import EnergyFn, Params, Position, bind

if TYPE_CHECKING:
    import flax.linen as nn

__all__ = [
    "Classifier",
    "class_energy",
    "classifier_from_linen",
    "free_energy",
    "joint_energy",
]

LogitsFn = Callable[..., jax.Array]


class Classifier(NamedTuple):
    """A network with one number a class.

    Attributes:
      init: ``(key, x) -> params``, given one example ``x`` (its values do not matter).
      apply: ``(params, x) -> [K]`` logits.
    """

    init: Callable[[jax.Array, Position], Params]
    apply: LogitsFn


def classifier_from_linen(module: nn.Module, num_classes: int) -> Classifier:
    """A classifier from any linen module that maps one example to ``num_classes`` numbers.

    Raises:
      ValueError: if ``num_classes`` is below 2; in ``apply``, if the module returns another shape.
    """
    if num_classes < 2:
        raise ValueError(f"num_classes is {num_classes}; it must be at least 2.")
    return Classifier(
        bind(_init_module, module=module),
        bind(_apply_module, module=module, num_classes=num_classes),
    )


def _init_module(key, x, *, module):
    return module.init(key, x)["params"]


def _apply_module(params, x, *, module, num_classes):
    logits: Any = module.apply({"params": params}, x)
    if jnp.shape(logits) != (num_classes,):
        raise ValueError(
            f"{type(module).__name__} returned shape {jnp.shape(logits)} for one example; a "
            f"classifier of {num_classes} classes returns ({num_classes},)."
        )
    return logits


def free_energy(logits: jax.Array, temperature: float | jax.Array = 1.0) -> jax.Array:
    """``F_T = -T log Σ_k exp(f_k / T)``: low where the network gives much evidence of any class.

    As T → 0 it tends to -max f, as T → ∞ to -mean f - T log K.

    Args:
      logits: [..., K] f, before any softmax (of log-probabilities it is 0 at T = 1).
      temperature: T > 0.

    Returns:
      [...] energies; its negative ranks inputs from foreign to familiar.

    >>> float(free_energy(jnp.array([1.0, 1.0])))
    -1.6931471824645996
    """
    return -temperature * jax.nn.logsumexp(logits / temperature, axis=-1)


def joint_energy(logits_fn: LogitsFn, *, temperature: float = 1.0) -> EnergyFn:
    """``E(x) = -log Σ_k exp f_k(x)``, the energy of the input with the class summed out.

    Args:
      logits_fn: ``(params, x, *context) -> [K]``.
      temperature: T > 0 of the free energy; 1 is the marginal of p(x, y).

    Raises:
      ValueError: if the temperature is not positive.

    >>> energy_fn = joint_energy(lambda params, x: params * x)
    >>> float(energy_fn(jnp.zeros(2), 5.0))
    -0.6931471824645996
    """
    if not temperature > 0.0:
        raise ValueError(f"temperature is {temperature}; it must be positive.")
    return bind(_joint, logits_fn=logits_fn, temperature=temperature)


def _joint(params, x, *context, logits_fn, temperature):
    return free_energy(logits_fn(params, x, *context), temperature)


def class_energy(logits_fn: LogitsFn) -> EnergyFn:
    """``E(x, y) = -f_y(x)``, the class being the context: ``(params, x, label) -> []``.

    ``ebjax.energies.condition(class_energy(logits_fn), label)`` is the energy of one class, from
    which class-conditional samples are drawn. Sum of exp(-E(x, y)) over y is exp(-E(x)).

    Args:
      logits_fn: ``(params, x) -> [K]``.

    >>> float(class_energy(lambda params, x: params * x)(jnp.array([1.0, 2.0]), 3.0, 1))
    -6.0
    """
    return bind(_class, logits_fn=logits_fn)


def _class(params, x, label, *, logits_fn):
    return -jnp.take(logits_fn(params, x), label, axis=-1)

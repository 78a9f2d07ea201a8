"""Evaluates an energy at one position, for kernels whose state keeps the result.

An energy function may have two attributes more, which the bridges of ``ebjax.samplers.smc`` have:

    evaluate(params, x, with_gradient) -> parts      everything of E at x but the coefficients
    assemble(params, parts) -> (energy, gradient)    E and its gradient under these parameters

A kernel keeps ``parts`` in its state, so that the same state is good under other coefficients
(another temperature) without a new evaluation of the energies. A plain energy has no parts: ``()``.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ebjax.types import EnergyFn, Params, Position

__all__ = ["GradientState", "init_with_gradient", "value", "value_and_gradient"]


class GradientState(NamedTuple):
    """A point with what the next step needs of it, so that a step costs one gradient.

    The state of MALA, HMC and NUTS.

    Attributes:
      position: the chain's point, any pytree of arrays.
      energy: [] E at the point.
      gradient: ∇E at the point, as ``position``.
      parts: what the energy function wants kept, as above.
    """

    position: Position
    energy: jax.Array
    gradient: Position
    parts: Any = ()


def init_with_gradient(energy_fn: EnergyFn, params: Params, position: Position) -> GradientState:
    """The state at ``position``; one evaluation."""
    return GradientState(position, *value_and_gradient(energy_fn, params, position))


def value_and_gradient(
    energy_fn: EnergyFn, params: Params, position: Position
) -> tuple[jax.Array, Position, Any]:
    """``(energy [], gradient as position, parts)`` at ``position``.

    Raises:
      ValueError: if the energy is not a scalar.
    """
    if hasattr(energy_fn, "evaluate"):
        in_parts: Any = energy_fn
        parts = in_parts.evaluate(params, position, with_gradient=True)
        return *in_parts.assemble(params, parts), parts
    energy, gradient = jax.value_and_grad(lambda x: _scalar(energy_fn(params, x)), allow_int=False)(
        position
    )
    return energy, gradient, ()


def value(energy_fn: EnergyFn, params: Params, position: Position) -> tuple[jax.Array, Any]:
    """``(energy [], parts)`` at ``position``, without the gradient.

    Raises:
      ValueError: if the energy is not a scalar.
    """
    if hasattr(energy_fn, "evaluate"):
        in_parts: Any = energy_fn
        parts = in_parts.evaluate(params, position, with_gradient=False)
        return in_parts.assemble(params, parts)[0], parts
    return _scalar(energy_fn(params, position)), ()


def _scalar(energy: jax.Array) -> jax.Array:
    if jnp.shape(energy) != ():
        raise ValueError(
            f"The energy of one position has the shape {jnp.shape(energy)}; it must be a scalar. "
            "An energy function takes one example: sum over its axes, and leave batches to vmap."
        )
    return energy

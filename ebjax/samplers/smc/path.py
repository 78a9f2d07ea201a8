"""Bridges: families of energies between one that is easy to draw from and one that is wanted.

    geometric   E_β = (1 - β) E_0 + β E_1,   p_β ∝ p_0^{1 - β} p_1^β
    power       E_β = β E

A path is an energy function whose parameters are ``(β, params)``. Any function of that form is
one. The two here also keep the energies and gradients at the ends apart (see
``ebjax.samplers.evaluate``), so that a point evaluated at one β is known at all others.

Their methods beside the call, with ``params = (β, ...)`` wherever it stands:

    evaluate(params, x, with_gradient) -> parts
    assemble(params, parts) -> (energy [], gradient)
    difference(params, other_params, parts) -> []     E_other(x) - E(x), without cancellation
"""

from __future__ import annotations

import dataclasses
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from ebjax.samplers.evaluate import value, value_and_gradient
from ebjax.types import EnergyFn, Params, Position

__all__ = [
    "GeometricPath",
    "PathParts",
    "PowerPath",
    "geometric_path",
    "normal_energy",
    "power_path",
]


class PathParts(NamedTuple):
    """Energies [] and gradients at the ends; a gradient is ``None`` where it was not asked for."""

    base_energy: jax.Array
    base_gradient: Position
    target_energy: jax.Array
    target_gradient: Position


def _times(factor: jax.Array, energy: jax.Array) -> jax.Array:
    """``factor * energy`` in the energy's dtype, and 0 for no share of an infinite energy."""
    factor = jnp.asarray(factor).astype(energy.dtype)
    is_zero = factor == 0.0
    return jnp.where(is_zero, 0.0, factor * jnp.where(is_zero, 0.0, energy))


@dataclasses.dataclass(frozen=True)
class GeometricPath:
    """See ``geometric_path``."""

    base_energy: EnergyFn
    target_energy: EnergyFn

    def __call__(self, params: Params, x: Position) -> jax.Array:
        """The energy at β."""
        beta, (base_params, target_params) = params
        base = self.base_energy(base_params, x)
        return _times(1.0 - beta, base) + _times(beta, self.target_energy(target_params, x))

    def evaluate(self, params: Params, x: Position, with_gradient: bool) -> PathParts:
        """Energies, and gradients if wanted, at both ends."""
        _, (base_params, target_params) = params
        if with_gradient:
            base, base_gradient, _ = value_and_gradient(self.base_energy, base_params, x)
            target, target_gradient, _ = value_and_gradient(self.target_energy, target_params, x)
            return PathParts(base, base_gradient, target, target_gradient)
        base, target = (
            value(self.base_energy, base_params, x)[0],
            value(self.target_energy, target_params, x)[0],
        )
        return PathParts(base, None, target, None)

    def assemble(self, params: Params, parts: PathParts) -> tuple[jax.Array, Position]:
        """Energy and gradient at β; no gradient where the parts have none."""
        beta, _ = params

        def mix(base, target):
            return _times(1.0 - beta, base) + _times(beta, target)

        gradient = jax.tree.map(mix, parts.base_gradient, parts.target_gradient)
        return mix(parts.base_energy, parts.target_energy), gradient

    def difference(self, params: Params, other_params: Params, parts: PathParts) -> jax.Array:
        """``(β' - β) (E_1 - E_0)``."""
        return _times(other_params[0] - params[0], parts.target_energy - parts.base_energy)


@dataclasses.dataclass(frozen=True)
class PowerPath:
    """See ``power_path``."""

    energy: EnergyFn

    def __call__(self, params: Params, x: Position) -> jax.Array:
        """The energy at β."""
        beta, energy_params = params
        return _times(beta, self.energy(energy_params, x))

    def evaluate(self, params: Params, x: Position, with_gradient: bool) -> tuple:
        """Energy, and gradient if wanted, at β = 1."""
        _, energy_params = params
        if with_gradient:
            return value_and_gradient(self.energy, energy_params, x)[:2]
        return value(self.energy, energy_params, x)[0], None

    def assemble(self, params: Params, parts: tuple) -> tuple[jax.Array, Position]:
        """Energy and gradient at β; no gradient where the parts have none."""
        beta, _ = params
        energy, gradient = parts
        return _times(beta, energy), jax.tree.map(lambda leaf: _times(beta, leaf), gradient)

    def difference(self, params: Params, other_params: Params, parts: tuple) -> jax.Array:
        """``(β' - β) E``."""
        return _times(other_params[0] - params[0], parts[0])


def geometric_path(base_energy: EnergyFn, target_energy: EnergyFn) -> GeometricPath:
    """``E_β(x) = (1 - β) E_0(x) + β E_1(x)``, with params ``(β, (base_params, target_params))``.

    At β = 0 the target may be infinite and at β = 1 the base; their share is then none, not NaN.

    Returns:
      The path, equal to another one of the same functions.

    >>> base = lambda params, x: 0.5 * jnp.sum(x**2)
    >>> target = lambda params, x: 0.5 * jnp.sum((x - params) ** 2)
    >>> path = geometric_path(base, target)
    >>> float(path((0.25, ((), 4.0)), jnp.zeros(1)))
    2.0
    >>> path == geometric_path(base, target)
    True
    """
    return GeometricPath(base_energy, target_energy)


def power_path(energy: EnergyFn) -> PowerPath:
    """``E_β(x) = β E(x)``, with params ``(β, params)``: temperature 1/β, for parallel tempering.

    >>> path = power_path(lambda params, x: jnp.sum(x**2))
    >>> float(path((0.5, ()), jnp.ones(4)))
    2.0
    """
    return PowerPath(energy)


def normal_energy(params: Params, x: Position) -> jax.Array:
    """``Σ (x - m)² / 2s² + log s + log(2π)/2``: independent normals, normalised, so log Z = 0.

    The base of a path. A base with log Z = 0 makes the estimate of a sampler that of the target.

    Args:
      params: ``(m, s)``, mean and standard deviation, numbers or arrays of the shape of ``x``.
      x: an array.
    """
    mean, scale = (jnp.asarray(leaf).astype(x.dtype) for leaf in params)
    log_scale = jnp.broadcast_to(jnp.log(scale), x.shape)
    return jnp.sum(0.5 * jnp.square((x - mean) / scale) + log_scale) + x.size * (
        0.5 * math.log(2.0 * math.pi)
    )

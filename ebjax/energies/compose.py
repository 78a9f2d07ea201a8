"""Energies made of energies: sum, mixture, tempering, negation, conditioning.

Each takes energy functions ``(params, x, *context) -> []`` and returns one. Where several are
composed, ``params`` of the result is the tuple of theirs, in order, and all get the same context.

    sum          E = Σ_i w_i E_i            law ∝ Π_i p_i^{w_i}    (product of experts)
    mixture      E = -log Σ_i w_i e^{-E_i}  law ∝ Σ_i w_i Z_i p_i  (a true mixture if log Z_i = 0)
    temper       E = E_1 / τ                law ∝ p_1^{1/τ}
    negate       E = -E_1                   law ∝ 1 / p_1          (combine it with others)
    condition    E = E_1(·, context)        law of x given the context

Du and Mordatch, "Compositional visual generation with energy based models", NeurIPS 2020.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from ebjax.types import EnergyFn, bind

__all__ = ["condition", "mixture", "negate", "sum_of", "temper"]


def _check(energy_fns: Sequence[EnergyFn], weights: Sequence[float] | None) -> tuple[float, ...]:
    if not energy_fns:
        raise ValueError("No energy functions were given; give at least one.")
    if weights is None:
        return (1.0,) * len(energy_fns)
    if len(weights) != len(energy_fns):
        raise ValueError(
            f"There are {len(weights)} weights for {len(energy_fns)} energy functions; "
            "give one weight for each."
        )
    return tuple(weights)


def sum_of(*energy_fns: EnergyFn, weights: Sequence[float] | None = None) -> EnergyFn:
    """``E(x) = Σ_i w_i E_i(x)``: all of them at once, a product of experts.

    Args:
      *energy_fns: the E_i.
      weights: the w_i, all 1 by default.

    Raises:
      ValueError: if there is no energy, or not one weight for each.

    >>> energy_fn = sum_of(lambda p, x: p * x, lambda p, x: p + x, weights=(1.0, 2.0))
    >>> energy_fn((3.0, 5.0), 1.0)
    15.0
    """
    return bind(_sum, energy_fns=tuple(energy_fns), weights=_check(energy_fns, weights))


def _sum(params, x, *context, energy_fns, weights):
    energies = [
        weight * energy_fn(p, x, *context)
        for weight, energy_fn, p in zip(weights, energy_fns, params, strict=True)
    ]
    return sum(energies[1:], energies[0])


def mixture(*energy_fns: EnergyFn, weights: Sequence[float] | None = None) -> EnergyFn:
    """``E(x) = -log Σ_i w_i exp(-E_i(x))``: any of them.

    The share of component i in the law is proportional to ``w_i Z_i``; to mix the laws in the
    proportions ``w``, give normalised energies (E_i + log Z_i).

    Args:
      *energy_fns: the E_i.
      weights: the w_i > 0, all 1 by default.

    Raises:
      ValueError: if there is no energy, not one weight for each, or a weight that is not positive.
    """
    weights = _check(energy_fns, weights)
    if any(weight <= 0 for weight in weights):
        raise ValueError(f"The weights are {weights}; all must be positive.")
    return bind(_mixture, energy_fns=tuple(energy_fns), weights=weights)


def _mixture(params, x, *context, energy_fns, weights):
    energies = jnp.stack(
        [energy_fn(p, x, *context) for energy_fn, p in zip(energy_fns, params, strict=True)]
    )
    return -jax.nn.logsumexp(jnp.log(jnp.asarray(weights, energies.dtype)) - energies)


def temper(energy_fn: EnergyFn, temperature: float | jax.Array) -> EnergyFn:
    """``E(x) / τ``; τ > 1 flattens the law, τ < 1 sharpens it. τ may be traced."""
    return bind(_temper, energy_fn=energy_fn, temperature=temperature)


def _temper(params, x, *context, energy_fn, temperature):
    return energy_fn(params, x, *context) / temperature


def negate(energy_fn: EnergyFn) -> EnergyFn:
    """``-E(x)``: unlikely where ``E`` is likely. By itself it has no finite normaliser in R^D."""
    return bind(_negate, energy_fn=energy_fn)


def _negate(params, x, *context, energy_fn):
    return -energy_fn(params, x, *context)


def condition(energy_fn: EnergyFn, *context: Any) -> EnergyFn:
    """``x -> E(params, x, *context)`` with the context bound: the law of x given it.

    >>> condition(lambda p, x, y: p * x + y, 7.0)(2.0, 3.0)
    13.0
    """
    return bind(_condition, energy_fn=energy_fn, bound_context=context)


def _condition(params, x, *context, energy_fn, bound_context):
    return energy_fn(params, x, *bound_context, *context)

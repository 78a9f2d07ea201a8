"""Hamiltonian dynamics: what HMC and NUTS share.

    H(x, ξ) = E(x) + ξ'ξ / 2,    x' = F ξ,    ξ' = -F' ∇E(x),    F F' = M⁻¹

The momentum is kept whitened, ξ = F' p, where p ~ N(0, M) is the usual one: ξ ~ N(0, I), the
kinetic energy p' M⁻¹ p / 2 is ξ'ξ / 2, and so is every other inner product p' M⁻¹ q. The dynamics
are the same, and no step solves with F or multiplies by M.

One leapfrog (velocity Verlet) step of size h, which may be negative, is

    ξ ← ξ - h/2 F'∇E(x);    x ← x + h F ξ;    ξ ← ξ - h/2 F'∇E(x)

It is reversible, conserves volume, and errs in H by O(h²) over a fixed time.

Neal, "MCMC using Hamiltonian dynamics", Handbook of Markov Chain Monte Carlo, 2011.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ebjax.samplers.evaluate import GradientState, init_with_gradient
from ebjax.samplers.metric import Metric, scaled_gradient, scaled_noise
from ebjax.types import EnergyFn, Params, Position

__all__ = [
    "Phase",
    "any_chain",
    "check_step_size",
    "drift",
    "inner_products",
    "kick",
    "leapfrog",
]


class Phase(NamedTuple):
    """A point of phase space, each field as the position.

    Attributes:
      position: x.
      momentum: ξ, whitened.
      force: F'∇E(x), the gradient in the same coordinates as ξ.
    """

    position: Position
    momentum: Position
    force: Position


def check_step_size(step_size: Any) -> None:
    """Raises ``ValueError`` for a number that is no step size; arrays are not looked at."""
    if isinstance(step_size, (int, float, np.number)) and not 0.0 < step_size < float("inf"):
        raise ValueError(f"step_size is {step_size}; it must be positive and finite.")


def inner_products(*pairs: tuple[Position, Position]) -> list[jax.Array]:
    """[] ``inner_product`` of each pair, in one pass over the components, which are read once."""

    def of_leaf(*vectors):
        products = [a * b for a, b in zip(vectors[::2], vectors[1::2], strict=True)]
        zeros = tuple(jnp.zeros((), product.dtype) for product in products)
        axes = tuple(range(products[0].ndim))
        add = lambda x, y: tuple(a + b for a, b in zip(x, y, strict=True))  # noqa: E731
        return jnp.stack(jax.lax.reduce(tuple(products), zeros, add, axes))

    leaves = jax.tree.leaves(jax.tree.map(of_leaf, *(vector for pair in pairs for vector in pair)))
    return list(jnp.sum(jnp.stack(leaves), axis=0)) if len(leaves) > 1 else list(leaves[0])


def kick(momentum: Position, force: Position, step: jax.Array) -> Position:
    """``ξ - step F'∇E``."""
    return jax.tree.map(lambda xi, f: xi - jnp.asarray(step, xi.dtype) * f, momentum, force)


def drift(metric: Metric, position: Position, momentum: Position, step: jax.Array) -> Position:
    """``x + step F ξ``."""
    return jax.tree.map(
        lambda x, v: x + jnp.asarray(step, x.dtype) * v, position, scaled_noise(metric, momentum)
    )


def leapfrog(
    energy_fn: EnergyFn, params: Params, metric: Metric, phase: Phase, step: jax.Array
) -> tuple[Phase, GradientState]:
    """One step of size ``step`` (negative: backward in time) and the state at its end."""
    momentum = kick(phase.momentum, phase.force, 0.5 * step)
    state = init_with_gradient(energy_fn, params, drift(metric, phase.position, momentum, step))
    force = scaled_gradient(metric, state.gradient)
    return Phase(state.position, kick(momentum, force, 0.5 * step), force), state


@jax.custom_batching.custom_vmap
def any_chain(flag: jax.Array) -> jax.Array:
    """``flag`` [] of one chain; under ``vmap``, whether it is set in any chain, not batched.

    As the condition of a ``while_loop`` it keeps the chains of a ``vmap`` in step: counters of the
    loop stay scalars, so that what depends on them is a slice and not a gather, and nothing of the
    carry is selected between old and new unless the body does so.
    """
    return flag


@any_chain.def_vmap
def _any_chain_of_many(axis_size, is_batched, flag):
    del axis_size
    return any_chain(flag.any(axis=0) if is_batched[0] else flag), False

"""The term that contrastive divergence leaves out: the ends of chains depend on the parameters.

With q_θ the law of a chain's end, KL(q_θ ‖ p_θ) is what a finite chain falls short by. As a
function of q_θ alone, the energy that judges it being frozen, it is up to a constant

    E_{x ~ q_θ} E_{sg θ}(x) - H(q_θ)
    term = w mean E_{sg θ}(x(θ)) - v mean log min_j |x_i(θ) - x_j|

x(θ) is the end of a chain whose last steps are differentiated through. The term is added as a
penalty: it moves the parameters so that the chain's steps lead to low energy, where without it the
energy may build slopes that samples fall down and data do not see. (In the derivative of Hinton's
difference of divergences it has the opposite sign; that is not what is done, here or there.) H is
estimated by nearest neighbours, up to constants and the factor D, and keeps samples apart.

For samplers without a Metropolis test, whose steps are smooth functions of the parameters. With a
step size of zero the end does not depend on the parameters, and the term has no gradient.

Du, Li, Tenenbaum and Mordatch, "Improved contrastive divergence training of energy-based models",
ICML 2021. Kozachenko and Leonenko, "Sample estimate of the entropy of a random vector", Problems of
Information Transmission 23 (1987).
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ebjax.numerics import full_precision_matmul
from ebjax.objectives.persistent_chains import Negative
from ebjax.types import EnergyFn, Params, Position

__all__ = ["ChainDivergence", "chain_divergence", "log_nearest_distance"]

# Squared distances below it do not repel: two chains at the same point have no direction.
_SMALLEST_SQUARE = 1e-12


class ChainDivergence(NamedTuple):
    """Options of the term.

    Attributes:
      weight: w >= 0 of the energy of the ends.
      entropy_weight: v >= 0 of the entropy.
      num_steps: L >= 1, how many of the last transitions are differentiated through.

    >>> ChainDivergence(entropy_weight=0.3).num_steps
    1
    """

    weight: float = 1.0
    entropy_weight: float = 0.0
    num_steps: int = 1

    def check(self) -> None:
        """Raises ``ValueError`` naming the option that is out of range."""
        for name in ("weight", "entropy_weight"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0.0):
                raise ValueError(f"{name} is {value}; it must be a finite number of at least 0.")
        if self.num_steps < 1:
            raise ValueError(f"num_steps is {self.num_steps}; differentiate at least 1 step.")


def log_nearest_distance(points: jax.Array, others: jax.Array, index: jax.Array) -> jax.Array:
    """[N] log of the distance to the nearest of the other points.

    Args:
      points: [N, D], which receive gradient.
      others: [M, D], constants, among them the points themselves.
      index: [N] int32, which of the others each point is.

    >>> points = jnp.array([[0.0], [1.0], [3.0]])
    >>> jnp.exp(log_nearest_distance(points, points, jnp.arange(3))).round(4).tolist()
    [1.0, 1.0, 2.0]
    """
    others = jax.lax.stop_gradient(others)
    constant = jax.lax.stop_gradient(points)
    # Products instead of differences: [N, M] numbers and not [N, M, D].
    squares = (
        jnp.sum(jnp.square(constant), -1)[:, None]
        - 2.0 * full_precision_matmul(constant, others.T)
        + jnp.sum(jnp.square(others), -1)
    )
    is_self = index[:, None] == jnp.arange(len(others))
    nearest = jnp.argmin(jnp.where(is_self, jnp.inf, squares), axis=1)
    square = jnp.sum(jnp.square(points - others[nearest]), -1)
    return 0.5 * jnp.log(jnp.maximum(square, _SMALLEST_SQUARE))


def chain_divergence(
    options: ChainDivergence,
    energy_fn: EnergyFn,
    params: Params,
    ends: Negative,
    *,
    axis_name: str | None = None,
) -> jax.Array:
    """[] the term, mean over the local ends.

    Args:
      options: its weights.
      energy_fn: the energy.
      params: its parameters; constants here.
      ends: [B, ...] ends of chains as functions of the parameters, with their contexts.
      axis_name: the axis of the devices, so that neighbours are looked for on all of them.
    """
    frozen = jax.lax.stop_gradient(params)
    if jax.tree.leaves(ends.context):
        energies = jax.vmap(energy_fn, (None, 0, 0))(frozen, ends.position, ends.context)
    else:
        energies = jax.vmap(energy_fn, (None, 0))(frozen, ends.position)
    term = options.weight * energies.mean()
    if options.entropy_weight:
        points = _flat(ends.position)
        others, index = jax.lax.stop_gradient(points), jnp.arange(len(points))
        if axis_name is not None:
            index = index + jax.lax.axis_index(axis_name) * len(points)
            others = jax.lax.all_gather(others, axis_name, tiled=True)
        term -= options.entropy_weight * log_nearest_distance(points, others, index).mean()
    return term


def _flat(position: Position) -> jax.Array:
    """[B, D]"""
    leaves: list[Any] = jax.tree.leaves(position)
    return jnp.concatenate([leaf.reshape(len(leaf), -1) for leaf in leaves], axis=1)

"""Minimum probability flow learning of a discrete energy.

    loss(x) = Σ_i Σ_s exp(-Δ_is(x) / 2),    Δ_is(x) = E(x with site i in another state) - E(x)

Start the master equation whose rates between neighbours are sqrt(p(y) / p(x)), which has p for its
stationary law, at the data: the loss is the rate at which probability flows away. At the law of the
data nothing flows in sum, and the expected loss is smallest there. It is convex in the parameters
of an exponential family. Neighbours are all points that differ in one site.

The exponential is unbounded: far from the data's law a few examples carry the loss.

Sohl-Dickstein, Battaglino and DeWeese, "Minimum probability flow learning", ICML 2011.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from ebjax.objectives.pseudolikelihood import flip_objective
from ebjax.types import EnergyFn, Objective

__all__ = ["minimum_probability_flow", "minimum_probability_flow_loss"]


def minimum_probability_flow_loss(differences: jax.Array) -> jax.Array:
    """``Σ exp(-Δ/2)`` of one example from its differences [N, S] (see ``flip_differences``).

    >>> round(float(minimum_probability_flow_loss(jnp.array([[0.0], [2.0]]))), 4)
    1.3679
    """
    return jnp.sum(jnp.exp(-0.5 * differences))


def minimum_probability_flow(
    energy_fn: EnergyFn,
    *,
    num_categories: int | None = None,
    is_multilinear: bool = False,
    num_sites: int | None = None,
) -> Objective:
    """Minimum probability flow over one-flip neighbours.

    Options and metrics as in ``ebjax.objectives.pseudolikelihood.flip_objective``.

    >>> objective = minimum_probability_flow(lambda params, x: params * x.sum())
    >>> keys, spins = jax.random.split(jax.random.key(0), 2), jnp.ones((2, 3))
    >>> float(objective.loss(0.0, (), keys, spins)[0])
    3.0
    """
    return flip_objective(
        minimum_probability_flow_loss,
        energy_fn,
        num_categories=num_categories,
        is_multilinear=is_multilinear,
        num_sites=num_sites,
    )

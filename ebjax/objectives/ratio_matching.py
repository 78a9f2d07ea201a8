"""Ratio matching and its generalisation: score matching where there is no gradient in x.

    r_is = p(x with site i in its s-th other state) / p(x) = exp(-Δ_is)

    ratio matching          loss(x) = Σ_i Σ_s g(1 / r_is)²,    g(u) = 1 / (1 + u)
    marginalisation         loss(x) = Σ_i [ 1 / p(x_i | rest)² - 2 Σ_k 1 / p(k | rest) ]

Ratio matching asks that g of the model's ratio be g of the data's, for each pair of neighbours; as
g(u) + g(1/u) = 1, the data's ratios drop out but for a constant. g is bounded, and so is the loss.
The second form is generalised score matching, E |Lp/p - Lq/q|², with the operator L that sums a
site out; its terms are not bounded, and improbable sites weigh heavily. Both expected losses are
smallest at the law of the data.

Hyvärinen, "Some extensions of score matching", Computational Statistics and Data Analysis 51
(2007). Lyu, "Interpretation and generalization of score matching", UAI 2009.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from ebjax.objectives.pseudolikelihood import flip_objective
from ebjax.types import EnergyFn, Objective

__all__ = ["marginalization_loss", "ratio_matching", "ratio_matching_loss"]


def ratio_matching_loss(differences: jax.Array) -> jax.Array:
    """``Σ g(exp(Δ))²`` of one example from its differences [N, S] (see ``flip_differences``).

    >>> float(ratio_matching_loss(jnp.zeros((4, 1))))
    1.0
    """
    return jnp.sum(jnp.square(jax.nn.sigmoid(-differences)))


def marginalization_loss(differences: jax.Array) -> jax.Array:
    """``Σ_i [1 / p(x_i|rest)² - 2 Σ_k 1 / p(k|rest)]`` from differences [N, S].

    With 1 / p(x_i | rest) = 1 + Σ_s r_s =: q and 1 / p(s | rest) = q / r_s.

    >>> float(marginalization_loss(jnp.zeros((1, 1))))  # 2² - 2 (2 + 2)
    -4.0
    """
    inverse = 1.0 + jnp.sum(jnp.exp(-differences), axis=-1)
    over_states = 1.0 + jnp.sum(jnp.exp(differences), axis=-1)
    return jnp.sum(jnp.square(inverse) - 2.0 * inverse * over_states)


_FORMS = {"ratio": ratio_matching_loss, "marginalization": marginalization_loss}


def ratio_matching(
    energy_fn: EnergyFn,
    *,
    form: str = "ratio",
    num_categories: int | None = None,
    is_multilinear: bool = False,
    num_sites: int | None = None,
) -> Objective:
    """Ratio matching over one-flip neighbours.

    Args:
      energy_fn: the energy that is trained.
      form: ``"ratio"`` or ``"marginalization"`` (see the head of this file).
      num_categories: this and the rest as in ``ebjax.objectives.pseudolikelihood.flip_objective``.
      is_multilinear: likewise.
      num_sites: likewise.

    Raises:
      ValueError: if ``form`` is neither.

    >>> objective = ratio_matching(lambda params, x: params * x.sum())
    >>> keys, spins = jax.random.split(jax.random.key(0), 2), jnp.ones((2, 4))
    >>> float(objective.loss(0.0, (), keys, spins)[0])
    1.0
    """
    if form not in _FORMS:
        raise ValueError(f"form is {form!r}; it must be one of {', '.join(_FORMS)}.")
    return flip_objective(
        _FORMS[form],
        energy_fn,
        num_categories=num_categories,
        is_multilinear=is_multilinear,
        num_sites=num_sites,
    )

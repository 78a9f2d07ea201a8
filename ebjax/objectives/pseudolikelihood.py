"""Pseudolikelihood, and the changes of energy by single flips that all discrete objectives read.

    Δ_is(x) = E(x with site i in its s-th other state) - E(x)
    p(x_i | rest) = 1 / (1 + Σ_s exp(-Δ_is))
    loss(x) = -Σ_i log p(x_i | rest) = Σ_i log(1 + Σ_s exp(-Δ_is))

No log Z is needed: the conditional law of one site compares points that differ there only. The
expected loss is smallest at the law of the data, since then each conditional law is right.

Binary sites are 0 or 1 and have S = 1 other state; one-hot sites of K categories have S = K - 1,
the s-th one s + 1 categories further on, cyclically. Where the energy is affine in each variable
(Ising, Potts, the joint energy of a Boltzmann machine), all Δ follow from one gradient: binary
Δ_i = (1 - 2 x_i) ∂E/∂x_i, which for Ising is 2 s_i times the local field Σ_j J_ij s_j + h_i.

Shapes: D sites, S other states of one, N sites that are read.

Besag, "Statistical analysis of non-lattice data", The Statistician 24 (1975).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from ebjax.types import EnergyFn, Objective, Params

__all__ = ["flip_differences", "flip_objective", "pseudolikelihood", "pseudolikelihood_loss"]


def flip_differences(
    energy_fn: EnergyFn,
    params: Params,
    x: jax.Array,
    *,
    num_categories: int | None = None,
    is_multilinear: bool = False,
    sites: jax.Array | None = None,
) -> jax.Array:
    """Changes of the energy when one site takes another state, for each site and state.

    Args:
      energy_fn: the energy, of one example.
      params: its parameters.
      x: binary in {0, 1} of any shape, or one-hot [..., K].
      num_categories: ``None`` for binary sites, or K.
      is_multilinear: whether the energy is affine in each variable, read as a function of real
        numbers; then one gradient stands for all D S evaluations. Not checked.
      sites: [N] integers, which sites of the raveled array; ``None`` for all.

    Returns:
      Δ [N, S].

    Raises:
      ValueError: if the last axis of ``x`` is not that of the categories.

    >>> from ebjax.energies.lattice import IsingParams, ising_energy
    >>> apply = ising_energy([(0, 1)]).apply
    >>> params = IsingParams(jnp.array([1.0]), jnp.array([0.5, 0.0]))
    >>> flip_differences(apply, params, jnp.array([1.0, 0.0])).tolist()
    [[-1.0], [-2.0]]
    >>> flip_differences(apply, params, jnp.array([1.0, 0.0]), is_multilinear=True).tolist()
    [[-1.0], [-2.0]]
    """
    flat = _by_sites(x, num_categories)
    rows = flat if sites is None else flat[sites]
    # [N, S, ...]: the other states of each site.
    if num_categories is None:
        others = 1.0 - rows[:, None]
    else:
        others = jnp.stack([jnp.roll(rows, s, axis=-1) for s in range(1, num_categories)], axis=1)
    if is_multilinear:
        slope = _by_sites(jax.grad(energy_fn, 1)(params, x), num_categories)
        slope = (slope if sites is None else slope[sites])[:, None]
        change = slope * (others - rows[:, None])
        return change if num_categories is None else change.sum(axis=-1)
    index = jnp.arange(len(flat)) if sites is None else sites

    def energy_at(site, other):
        return energy_fn(params, flat.at[site].set(other).reshape(x.shape))

    energies = jax.vmap(jax.vmap(energy_at, (None, 0)))(index, others)
    return energies - energy_fn(params, x)


def _by_sites(x: jax.Array, num_categories: int | None) -> jax.Array:
    """[D] binary or [D, K] one-hot."""
    if num_categories is None:
        return x.reshape(-1)
    if num_categories < 2:
        raise ValueError(f"num_categories is {num_categories}; it must be None or at least 2.")
    if not x.ndim or x.shape[-1] != num_categories:
        raise ValueError(
            f"x has shape {x.shape}; one-hot sites of {num_categories} categories have the shape "
            f"[..., {num_categories}]."
        )
    return x.reshape(-1, num_categories)


def pseudolikelihood_loss(differences: jax.Array) -> jax.Array:
    """``-Σ_i log p(x_i | rest)`` of one example from its differences [N, S].

    >>> round(float(pseudolikelihood_loss(jnp.zeros((3, 1)))), 4)  # three fair coins
    2.0794
    """
    stay = jnp.zeros((*differences.shape[:-1], 1), differences.dtype)
    return jnp.sum(jax.nn.logsumexp(jnp.concatenate([stay, -differences], axis=-1), axis=-1))


def flip_objective(
    loss_of_differences: Callable[[jax.Array], jax.Array],
    energy_fn: EnergyFn,
    *,
    num_categories: int | None = None,
    is_multilinear: bool = False,
    num_sites: int | None = None,
) -> Objective:
    """An objective from any loss that reads single flips and is a sum over sites.

    Args:
      loss_of_differences: Δ [N, S] -> [], a sum over sites.
      energy_fn: the energy that is trained.
      num_categories: ``None`` for binary examples, or K for one-hot ones.
      is_multilinear: see ``flip_differences``.
      num_sites: read that many sites of each example, drawn anew in each update without
        replacement, and scale the sum up: the same loss on average for a share of the cost.
        ``None`` reads all. With ``is_multilinear`` it saves next to nothing.

    Returns:
      An ``Objective`` over batches of examples, without carry. Metrics: ``difference`` (mean Δ; at
      an energy that knows the data, flips cost energy) and ``downhill`` (the share of flips that
      lower the energy).

    Raises:
      ValueError: if ``num_sites`` is not positive, or more than an example has.
    """
    if num_sites is not None and num_sites < 1:
        raise ValueError(f"num_sites is {num_sites}; it must be None or at least 1.")

    def loss_of_one(params, key, x):
        total = math.prod(x.shape if num_categories is None else x.shape[:-1])
        sites, scale = None, 1.0
        if num_sites is not None:
            if num_sites > total:
                raise ValueError(f"num_sites is {num_sites}; an example has {total} sites.")
            sites, scale = jax.random.permutation(key, total)[:num_sites], total / num_sites
        differences = flip_differences(
            energy_fn,
            params,
            x,
            num_categories=num_categories,
            is_multilinear=is_multilinear,
            sites=sites,
        )
        value = scale * loss_of_differences(differences)
        metrics = {"difference": differences.mean(), "downhill": jnp.mean(differences < 0.0)}
        return value, metrics

    def loss(params, carry, keys, batch):
        losses, metrics = jax.vmap(loss_of_one, (None, 0, 0))(params, keys, batch)
        return losses.mean(), (carry, jax.tree.map(jnp.mean, metrics))

    return Objective(init=lambda key, params, batch: (), loss=loss)


def pseudolikelihood(
    energy_fn: EnergyFn,
    *,
    num_categories: int | None = None,
    is_multilinear: bool = False,
    num_sites: int | None = None,
) -> Objective:
    """Maximum pseudolikelihood of a discrete energy.

    Options and metrics as in ``flip_objective``; the loss is in nats an example.

    >>> from ebjax.energies.lattice import IsingParams, ising_lattice_energy
    >>> objective = pseudolikelihood(ising_lattice_energy().apply, is_multilinear=True)
    >>> params = IsingParams(jnp.array(0.0), jnp.array(0.0))
    >>> keys, spins = jax.random.split(jax.random.key(0), 2), jnp.zeros((2, 4, 4))
    >>> round(float(objective.loss(params, (), keys, spins)[0]), 4)  # 16 log 2
    11.0904
    """
    return flip_objective(
        pseudolikelihood_loss,
        energy_fn,
        num_categories=num_categories,
        is_multilinear=is_multilinear,
        num_sites=num_sites,
    )

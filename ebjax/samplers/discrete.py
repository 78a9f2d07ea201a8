"""Discrete variables as floating arrays: sites, single-site moves, random choices, acceptance.

    binary        x_i ∈ {0, 1}, arrays of any shape             one move a site, x_i → 1 - x_i
    categorical   x_i one-hot in R^K, arrays of shape [..., K]  K - 1 moves a site, x_i → e_k

A position is a pytree of such arrays; raveled it has N sites. Gradient-informed kernels weigh a
move by the first-order change of the energy, Δ = ∇_i E(x) · (new - old), through a balancing
function g with g(t) = t g(1/t),

    log weight = log g(exp(-Δ / τ)),    g(t) = √t, t / (1 + t), min(1, t) or max(1, t)

Zanella, "Informed proposals for local MCMC in discrete spaces", JASA 2020.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

from ebjax.numerics import all_finite, random_normal_and_uniform
from ebjax.samplers.decision import metropolis, select
from ebjax.samplers.evaluate import value_and_gradient
from ebjax.types import EnergyFn, Params, Position

__all__ = [
    "BALANCING",
    "DiscreteInfo",
    "DiscreteState",
    "accept_or_stay",
    "apply_move",
    "as_sites",
    "check_balancing",
    "check_num_categories",
    "check_positive",
    "choose",
    "choose_category",
    "energy_changes",
    "init_with_gradient",
    "move_log_weights",
    "uniforms",
]

BALANCING: dict[str, Callable[[jax.Array], jax.Array]] = {
    "sqrt": lambda log_t: 0.5 * log_t,
    "barker": jax.nn.log_sigmoid,
    "min": lambda log_t: jnp.minimum(log_t, 0.0),
    "max": lambda log_t: jnp.maximum(log_t, 0.0),
}


class DiscreteState(NamedTuple):
    """A point with what the next gradient-informed step needs of it.

    Attributes:
      position: the chain's point, binary or one-hot.
      energy: [] E at the point.
      gradient: ∇E at the point, as ``position``.
      parts: what the energy function wants kept (see ``ebjax.samplers.evaluate``).
    """

    position: Position
    energy: jax.Array
    gradient: Position
    parts: Any = ()


class DiscreteInfo(NamedTuple):
    """Diagnosis of one step.

    Attributes:
      energy: [] energy after the step.
      acceptance_rate: [] probability with which the proposal was accepted.
      is_accepted: [] bool.
      num_changed: [] int32, sites that differ from those before the step.
      is_finite: [] bool, whether the proposal's energy and gradient were finite and its acceptance
        could be computed. If not, it is rejected.
    """

    energy: jax.Array
    acceptance_rate: jax.Array
    is_accepted: jax.Array
    num_changed: jax.Array
    is_finite: jax.Array


def check_num_categories(num_categories: int | None) -> None:
    """Raises ValueError unless it is ``None`` (binary) or an integer of at least 2."""
    if num_categories is None:
        return
    if not isinstance(num_categories, int | np.integer) or num_categories < 2:
        raise ValueError(
            f"num_categories is {num_categories!r}; it must be None for binary variables or an "
            "integer of at least 2 for one-hot ones."
        )


def check_positive(**options: Any) -> None:
    """Raises ValueError for an option that is a Python number and not positive."""
    for name, value in options.items():
        if isinstance(value, int | float) and not value > 0:
            raise ValueError(f"{name} is {value}; it must be positive.")


def check_balancing(balancing: str) -> None:
    """Raises ValueError for an unknown balancing function."""
    if balancing not in BALANCING:
        raise ValueError(f"balancing is {balancing!r}; it must be one of {sorted(BALANCING)}.")


def as_sites(
    tree: Position, num_categories: int | None
) -> tuple[jax.Array, Callable[[jax.Array], Position]]:
    """``(sites, restore)``: [N] or [N, K] with all leaves, and the way back.

    Raises:
      ValueError: if a categorical leaf has not K entries along its last axis.
    """
    if num_categories is not None:
        for leaf in jax.tree.leaves(tree):
            if jnp.ndim(leaf) == 0 or jnp.shape(leaf)[-1] != num_categories:
                raise ValueError(
                    f"a position has shape {jnp.shape(leaf)}; one-hot variables with "
                    f"num_categories={num_categories} have shape [..., {num_categories}]."
                )
    flat, unravel = ravel_pytree(tree)
    if num_categories is None:
        return flat, lambda sites: unravel(sites.astype(flat.dtype))
    return (
        flat.reshape(-1, num_categories),
        lambda sites: unravel(sites.reshape(-1).astype(flat.dtype)),
    )


def uniforms(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    """Uniform on (0, 1), never an end, from one draw; consumes the key."""
    _, uniform = random_normal_and_uniform(key, jnp.zeros(0, dtype), math.prod(shape))
    return uniform.reshape(shape)


def init_with_gradient(energy_fn: EnergyFn, params: Params, position: Position) -> DiscreteState:
    """The state of a gradient-informed kernel at ``position``."""
    return DiscreteState(position, *value_and_gradient(energy_fn, params, position))


def energy_changes(sites: jax.Array, gradient: jax.Array, num_categories: int | None) -> jax.Array:
    """Δ of every move to first order: [N] of the flips, or [N, K] with 0 at the present value."""
    if num_categories is None:
        return (1.0 - 2.0 * sites) * gradient
    return gradient - jnp.sum(gradient * sites, axis=-1, keepdims=True)


def move_log_weights(
    state: DiscreteState, *, num_categories: int | None, temperature: Any, balancing: str
) -> jax.Array:
    """``log g(exp(-Δ/τ))`` of every move: [N], or [N, K] with -inf where nothing would move."""
    sites = as_sites(state.position, num_categories)[0]
    gradient = as_sites(state.gradient, num_categories)[0]
    changes = energy_changes(sites, gradient, num_categories)
    log_weights = BALANCING[balancing](-changes / temperature)
    return log_weights if num_categories is None else jnp.where(sites > 0.5, -jnp.inf, log_weights)


def apply_move(
    sites: jax.Array, move: jax.Array, num_categories: int | None
) -> tuple[jax.Array, jax.Array]:
    """Makes one move, an index into the raveled ``move_log_weights``.

    Returns:
      ``(sites, reverse)``: the new sites, and the index of the move that undoes it.
    """
    if num_categories is None:
        return sites.at[move].set(1.0 - sites[move]), move
    site, category = move // num_categories, move % num_categories
    old = jnp.argmax(sites[site]).astype(move.dtype)
    new = jax.nn.one_hot(category, num_categories, dtype=sites.dtype)
    return sites.at[site].set(new), site * num_categories + old


def choose(uniform: jax.Array, log_weights: jax.Array) -> jax.Array:
    """An index drawn with probability proportional to ``exp(log_weights)``, by inversion.

    In two stages, a row of about √M entries and one entry of it: two short cumulative sums and two
    uniforms in place of one noise for each entry. Entries of weight zero are never drawn.

    Args:
      uniform: [2] on (0, 1).
      log_weights: [M], raveled if it has more axes.

    Returns:
      [] int32; arbitrary if the weights are NaN or all zero.
    """
    flat = log_weights.reshape(-1)
    width = math.isqrt(max(flat.size - 1, 0)) + 1
    height = -(-flat.size // width)
    padding = width * height - flat.size
    flat = jnp.pad(flat, (0, padding), constant_values=-jnp.inf)
    weights = jnp.exp(flat - jnp.max(flat)).reshape(height, width)
    row = _invert(uniform[0], jnp.sum(weights, axis=-1))
    column = _invert(uniform[1], weights[row])
    return row * width + column


def _invert(uniform: jax.Array, weights: jax.Array) -> jax.Array:
    cumulative = jnp.where(weights > 0.0, jnp.cumsum(weights), 0.0)
    return jnp.argmax(cumulative >= uniform * jnp.max(cumulative)).astype(jnp.int32)


def choose_category(uniform: jax.Array, logits: jax.Array) -> jax.Array:
    """One-hot draws [..., K] from softmax(logits) by inversion; ``uniform`` [...]."""
    weights = jnp.exp(logits - jnp.max(logits, axis=-1, keepdims=True))
    cumulative = jnp.cumsum(weights, axis=-1)
    mark = uniform[..., None] * cumulative[..., -1:]
    index = jnp.sum(cumulative[..., :-1] < mark, axis=-1)
    return jax.nn.one_hot(index, logits.shape[-1], dtype=logits.dtype)


def accept_or_stay(
    uniform: jax.Array,
    log_acceptance: jax.Array,
    state: DiscreteState,
    proposal: DiscreteState,
    num_categories: int | None,
) -> tuple[DiscreteState, DiscreteInfo]:
    """The Metropolis-Hastings decision; a proposal that is not finite is rejected."""
    is_finite = all_finite((proposal.energy, proposal.gradient)) & ~jnp.isnan(log_acceptance)
    log_acceptance = jnp.where(is_finite, log_acceptance, -jnp.inf)
    is_accepted, acceptance_rate = metropolis(uniform, log_acceptance)
    new = select(is_accepted, proposal, state)
    info = DiscreteInfo(
        energy=new.energy,
        acceptance_rate=acceptance_rate,
        is_accepted=is_accepted,
        num_changed=count_changed(state.position, new.position, num_categories),
        is_finite=is_finite,
    )
    return new, info


def count_changed(old: Position, new: Position, num_categories: int | None) -> jax.Array:
    """[] int32: at how many sites two positions differ."""
    first, second = (as_sites(tree, num_categories)[0] for tree in (old, new))
    differs = first != second
    if num_categories is not None:
        differs = differs.any(axis=-1)
    return jnp.sum(differs, dtype=jnp.int32)

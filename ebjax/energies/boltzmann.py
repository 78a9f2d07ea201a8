"""Boltzmann machines and small discrete laws that can be enumerated.

    RBM joint        E(v, h) = -b·v - c·h - v' W h             v ∈ {0,1}^V, h ∈ {0,1}^H
    RBM marginal     F(v) = -log Σ_h exp(-E(v, h)) = -b·v - Σ_j log(1 + exp(c_j + (v' W)_j))
    table            E(x) = -Σ_k logits[k_1, ..., k_n] Π_i x_i[k_i]

All are written so that they can be differentiated at the discrete points. The joint energy and the
table are affine in each variable, as block Gibbs sampling needs; the free energy is not.

Hinton, "Training products of experts by minimizing contrastive divergence", Neural Computation 14
(2002).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

from ebjax.types import Energy, EnergyFn, Moments, Params, Target

__all__ = [
    "Enumeration",
    "Layers",
    "RBMParams",
    "enumerate_law",
    "enumerate_states",
    "logit_table",
    "rbm",
    "rbm_free_energy",
    "rbm_joint",
    "rbm_joint_energy",
    "rbm_log_z",
    "rbm_target",
    "target_from_table",
]

MAX_STATES = 2**20
_MAX_TABLE = 2**16


class Enumeration(NamedTuple):
    """A discrete law in full.

    Attributes:
      states: [S, ...] every state.
      log_probs: [S] log p of each.
      log_z: [] log Σ exp(-E).
    """

    states: jax.Array
    log_probs: jax.Array
    log_z: jax.Array


def _check_number_of_states(num_sites: int, num_values: int) -> int:
    if num_sites * math.log2(num_values) > math.log2(MAX_STATES):
        raise ValueError(
            f"{num_values}^{num_sites} states are too many to enumerate; at most {MAX_STATES} are."
        )
    return num_values**num_sites


def enumerate_states(shape: tuple[int, ...], num_categories: int | None = None) -> np.ndarray:
    """Every state of an array of variables, the last one changing fastest.

    Args:
      shape: of the variables, without the axis of one-hot vectors.
      num_categories: ``None`` for binary variables, or K for one-hot ones.

    Returns:
      [S, *shape] or [S, *shape, K] float32.

    Raises:
      ValueError: if there are more than 2^20.

    >>> enumerate_states((2,)).tolist()
    [[0.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 1.0]]
    """
    num_sites = math.prod(shape)
    num_values = num_categories or 2
    num_states = _check_number_of_states(num_sites, num_values)
    powers = num_values ** np.arange(num_sites)[::-1]
    digits = np.arange(num_states)[:, None] // powers % num_values
    digits = digits.reshape(num_states, *shape)
    if num_categories is None:
        return digits.astype(np.float32)
    return np.eye(num_categories, dtype=np.float32)[digits]


def enumerate_law(
    energy_fn: EnergyFn,
    params: Params,
    shape: tuple[int, ...],
    num_categories: int | None = None,
    *,
    batch_size: int = 2**14,
) -> Enumeration:
    """The law of any energy by evaluating all states, ``batch_size`` at a time.

    Raises:
      ValueError: if there are more than 2^20.

    >>> law = enumerate_law(lambda params, x: -params * x[0], jnp.log(3.0), (1,))
    >>> [round(float(p), 3) for p in jnp.exp(law.log_probs)], round(float(law.log_z), 3)
    ([0.25, 0.75], 1.386)
    """
    states = jnp.asarray(enumerate_states(shape, num_categories), float)
    energies = jax.lax.map(lambda x: energy_fn(params, x), states, batch_size=batch_size)
    log_z = jax.nn.logsumexp(-energies)
    return Enumeration(states, -energies - log_z, log_z)


def logit_table(logits: npt.ArrayLike, *, is_binary: bool = False) -> Target:
    """The law p(k_1, ..., k_n) ∝ exp(logits[k_1, ..., k_n]) over n variables of K values.

    Between the discrete points the energy is the multilinear extension of the table. An array of
    one axis is the law of a single variable.

    Args:
      logits: [K] * n, finite.
      is_binary: positions are [n] in {0, 1} (K = 2), and not one-hot [n, K].

    Returns:
      A ``Target`` with log Z, exact samples and moments (of the raveled position).

    Raises:
      ValueError: if the axes differ in length, or if a logit is not finite.

    >>> target = logit_table([0.0, jnp.log(2.0), 0.0])
    >>> float(target.energy((), jnp.array([[0.0, 1.0, 0.0]])))
    -0.6931471824645996
    """
    table = np.asarray(logits, float)
    num_values = table.shape[0] if table.ndim else 0
    if num_values < 2 or table.shape != (num_values,) * table.ndim:
        raise ValueError(
            f"logits has shape {table.shape}; all axes must have the same length, K >= 2."
        )
    if is_binary and num_values != 2:
        raise ValueError(f"logits has {num_values} values; binary variables have 2.")
    if not np.isfinite(table).all():
        raise ValueError("logits has entries that are not finite.")

    def energy(params, x):
        del params
        rows = jnp.stack([1.0 - x, x], axis=-1) if is_binary else x
        value = jnp.asarray(table, x.dtype)
        for row in rows:
            value = jnp.tensordot(row, value, (0, 0), precision="highest")
        return -value

    shape = (table.ndim,)
    num_categories = None if is_binary else num_values
    return target_from_table(energy, -table.reshape(-1), enumerate_states(shape, num_categories))


def target_from_table(energy: EnergyFn, energies: np.ndarray, states: np.ndarray) -> Target:
    """A target of which all energies [S] and states [S, ...] are known, in float64."""
    peak = -energies.min()
    weights = np.exp(-energies - peak)
    log_z = float(peak + np.log(weights.sum()))
    probs = weights / weights.sum()
    flat = states.reshape(len(states), -1)
    mean = probs @ flat
    covariance = (flat - mean).T @ (probs[:, None] * (flat - mean))

    def sample(key):
        index = jax.random.categorical(key, jnp.asarray(-energies - log_z, float))
        return jnp.asarray(states, float)[index]

    moments = Moments(jnp.asarray(mean), jnp.asarray(covariance))
    return Target(energy, states.shape[1:], log_z, sample, moments)


class RBMParams(NamedTuple):
    """``weights`` W [V, H], ``visible_bias`` b [V] and ``hidden_bias`` c [H]."""

    weights: jax.Array
    visible_bias: jax.Array
    hidden_bias: jax.Array


class Layers(NamedTuple):
    """A state of both layers: ``visible`` [V] and ``hidden`` [H], in {0, 1}."""

    visible: jax.Array
    hidden: jax.Array


def rbm_joint_energy(params: RBMParams, x: Layers) -> jax.Array:
    """[] ``E(v, h)``."""
    return (
        -x.visible @ params.visible_bias
        - x.hidden @ params.hidden_bias
        - (x.visible @ params.weights) @ x.hidden
    )


def rbm_free_energy(params: RBMParams, x: jax.Array) -> jax.Array:
    """[] ``F(v)``, for ``x`` = v [V]."""
    return -x @ params.visible_bias - jnp.sum(
        jax.nn.softplus(params.hidden_bias + x @ params.weights)
    )


def _init_rbm(key: jax.Array, num_visible: int, num_hidden: int, scale: float) -> RBMParams:
    weights = scale * jax.random.normal(key, (num_visible, num_hidden))
    return RBMParams(weights, jnp.zeros(num_visible), jnp.zeros(num_hidden))


def rbm(num_hidden: int, *, scale: float = 0.01) -> Energy:
    """The marginal law of the visible layer, x [V], with the free energy F.

    Args:
      num_hidden: H.
      scale: standard deviation of the initial weights; the biases start at 0.

    >>> energy = rbm(5)
    >>> params = energy.init(jax.random.key(0), jnp.zeros(3))
    >>> params.weights.shape, energy.apply(params, jnp.ones(3)).shape
    ((3, 5), ())
    """
    if num_hidden < 1:
        raise ValueError(f"num_hidden is {num_hidden}; it must be at least 1.")
    return Energy(lambda key, x: _init_rbm(key, x.size, num_hidden, scale), rbm_free_energy)


def rbm_joint(*, scale: float = 0.01) -> Energy:
    """The joint law of both layers, x = ``Layers(visible [V], hidden [H])``."""
    return Energy(
        lambda key, x: _init_rbm(key, x.visible.size, x.hidden.size, scale), rbm_joint_energy
    )


def rbm_log_z(params: RBMParams, *, batch_size: int = 2**12) -> jax.Array:
    """[] exact log Z, by summing over the states of the smaller layer. Differentiable.

    Args:
      params: the machine.
      batch_size: states at a time.

    Raises:
      ValueError: if the smaller layer has more than 20 units.

    >>> params = RBMParams(jnp.zeros((3, 5)), jnp.zeros(3), jnp.zeros(5))
    >>> bool(jnp.isclose(rbm_log_z(params), 8 * jnp.log(2.0)))
    True
    """
    params = _smaller_first(params)
    states = jnp.asarray(enumerate_states(params.visible_bias.shape), params.weights.dtype)
    free = jax.lax.map(lambda v: rbm_free_energy(params, v), states, batch_size=batch_size)
    return jax.nn.logsumexp(-free)


def _smaller_first(params: RBMParams) -> RBMParams:
    """The same machine with the smaller layer called visible."""
    num_visible, num_hidden = params.weights.shape
    if num_visible <= num_hidden:
        return params
    return RBMParams(params.weights.T, params.hidden_bias, params.visible_bias)


def rbm_target(params: RBMParams) -> Target:
    """The marginal law of the visible layer of a given machine, with what can be had exactly.

    Samples draw the smaller layer from its enumerated marginal and the other one given it, where
    the smaller layer has at most 16 units; log Z where it has at most 20.
    """
    smaller = _smaller_first(params)
    num_smaller = smaller.visible_bias.size
    is_visible_smaller = smaller is params
    log_z, sample = None, None
    if num_smaller <= math.log2(MAX_STATES):
        log_z = float(rbm_log_z(params))
    if num_smaller <= math.log2(_MAX_TABLE):
        law = enumerate_law(rbm_free_energy, smaller, (num_smaller,))

        def sample(key):
            table_key, bit_key = jax.random.split(key)
            state = law.states[jax.random.categorical(table_key, law.log_probs)]
            if is_visible_smaller:
                return state
            logits = params.visible_bias + params.weights @ state
            uniform = jax.random.uniform(bit_key, logits.shape, logits.dtype)
            return (uniform < jax.nn.sigmoid(logits)).astype(logits.dtype)

    def energy(_, x):
        return rbm_free_energy(params, x)

    return Target(energy, params.visible_bias.shape, log_z, sample)

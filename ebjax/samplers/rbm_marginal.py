"""Gibbs sampling of the visible layer of a restricted Boltzmann machine, and its log Z.

    one step       h ~ p_θ(h | v),   v' ~ p_θ(v' | h)          leaves exp(-F_θ(v)) invariant
    path           θ_β = (β W, (1 - β) b_0 + β b, β c),        E_β(v) = F of θ_β at v
    at β = 0       independent pixels of log-odds b_0,        log Z_0 = Σ log(1 + e^b_0) + H log 2

The hidden layer is drawn within a step and not kept, so positions are those of the free energy
``ebjax.energies.boltzmann.rbm_free_energy``: the same chain as ``rbm_gibbs`` on both layers, seen
at the visible one. Annealing along the path sums the hidden layer out of every weight, which joint
weights do not.

Shapes: V visible and H hidden units, N chains, T temperatures.

The path may also be walked back, from an example to independent pixels: a lower bound of the
example's likelihood that no unreached mode can flatter (``rbm_annealed_log_likelihood``).

Salakhutdinov and Murray, "On the quantitative analysis of deep belief networks", ICML 2008. Burda,
Grosse and Salakhutdinov, "Accurate and conservative estimates of MRF log-likelihood using reverse
annealing", AISTATS 2015.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

from ebjax.energies.boltzmann import RBMParams, rbm_free_energy
from ebjax.samplers.discrete import uniforms
from ebjax.samplers.smc import TemperedSamples, ais_log_z
from ebjax.types import EnergyFn, Kernel, Params, bind

__all__ = [
    "RBMMarginalInfo",
    "RBMMarginalState",
    "rbm_annealed_log_likelihood",
    "rbm_annealed_log_z",
    "rbm_marginal_gibbs",
]


class RBMMarginalState(NamedTuple):
    """``position``: [V] the visible layer, in {0, 1}."""

    position: jax.Array


class RBMMarginalInfo(NamedTuple):
    """``is_finite``: [] bool, whether all log-odds of the step were finite."""

    is_finite: jax.Array


def _itself(params: Params) -> RBMParams:
    return params


def rbm_marginal_gibbs(*, machine: Callable[[Params], RBMParams] = _itself) -> Kernel:
    """Gibbs sampling of the visible layer: the hidden one given it, then it given the hidden one.

    The conditional laws are read off the parameters and not off the energy function, which must be
    the free energy of the same machine and is never evaluated.

    Args:
      machine: from the ``params`` of the chain to the machine whose law they stand for.

    Returns:
      A ``Kernel`` on positions [V] with ``RBMMarginalState`` and ``RBMMarginalInfo``.

    >>> params = RBMParams(jnp.zeros((2, 3)), jnp.array([200.0, -200.0]), jnp.zeros(3))
    >>> kernel = rbm_marginal_gibbs()
    >>> state = kernel.init(rbm_free_energy, params, jnp.zeros(2))
    >>> kernel.step(jax.random.key(0), rbm_free_energy, params, state)[0].position.tolist()
    [1.0, 0.0]
    """
    return Kernel(bind(_init), bind(_step, machine=machine), 1)


def _init(energy_fn: EnergyFn, params: Params, position: jax.Array) -> RBMMarginalState:
    del energy_fn, params  # the next step needs nothing but the position
    return RBMMarginalState(position)


def _step(
    key: jax.Array, energy_fn: EnergyFn, params: Params, state: RBMMarginalState, *, machine
) -> tuple[RBMMarginalState, RBMMarginalInfo]:
    del energy_fn
    weights, visible_bias, hidden_bias = machine(params)
    visible = state.position
    dtype = visible.dtype
    # One draw for both layers.
    uniform = uniforms(key, (visible_bias.size + hidden_bias.size,), dtype)
    uniform_visible, uniform_hidden = jnp.split(uniform, [visible_bias.size])
    hidden_logits = hidden_bias + visible @ weights
    hidden = (uniform_hidden < jax.nn.sigmoid(hidden_logits)).astype(dtype)
    visible_logits = visible_bias + weights @ hidden
    visible = (uniform_visible < jax.nn.sigmoid(visible_logits)).astype(dtype)
    is_finite = jnp.isfinite(hidden_logits).all() & jnp.isfinite(visible_logits).all()
    return RBMMarginalState(visible), RBMMarginalInfo(is_finite)


def _tempered(params: Any) -> RBMParams:
    """The machine at β from ``(β, (base bias, machine))``."""
    beta, (base_bias, machine) = params
    beta = jnp.asarray(beta).astype(machine.weights.dtype)
    return RBMParams(
        beta * machine.weights,
        (1.0 - beta) * base_bias + beta * machine.visible_bias,
        beta * machine.hidden_bias,
    )


def _tempered_free_energy(params: Any, x: jax.Array) -> jax.Array:
    return rbm_free_energy(_tempered(params), x)


def _backwards(params: Any) -> Any:
    """The parameters of the path for a run that counts from the machine to the base."""
    beta, ends = params
    return 1.0 - jnp.asarray(beta), ends


def _backwards_machine(params: Any) -> RBMParams:
    return _tempered(_backwards(params))


def _backwards_free_energy(params: Any, x: jax.Array) -> jax.Array:
    return rbm_free_energy(_backwards_machine(params), x)


def _base_log_z(params: RBMParams, base_bias: jax.Array) -> jax.Array:
    return jnp.sum(jax.nn.softplus(base_bias)) + params.hidden_bias.size * jnp.log(2.0)


def _checked(params: RBMParams, base_bias, inverse_temperatures) -> tuple[jax.Array, np.ndarray]:
    """The base bias as an array, and the ladder [T]."""
    base_bias = jnp.asarray(base_bias, params.weights.dtype)
    if base_bias.shape != params.visible_bias.shape:
        raise ValueError(
            f"base_bias has shape {base_bias.shape}; the machine has visible units of the shape "
            f"{params.visible_bias.shape}."
        )
    if not isinstance(inverse_temperatures, int):
        return base_bias, np.asarray(inverse_temperatures, float)
    if inverse_temperatures < 1:
        raise ValueError(
            f"inverse_temperatures is {inverse_temperatures}; give at least 1, or the ladder."
        )
    return base_bias, np.linspace(0.0, 1.0, inverse_temperatures + 1)[1:]


def rbm_annealed_log_z(
    key: jax.Array,
    params: RBMParams,
    base_bias: npt.ArrayLike,
    *,
    num_chains: int = 500,
    inverse_temperatures: int | npt.ArrayLike = 1000,
    **options: Any,
) -> TemperedSamples:
    """log Z of a machine by annealed importance sampling from independent pixels.

    E[Z estimate] = Z, so the estimate of log Z lies below it on average, by about half of the
    square of its standard error: likelihoods made of it flatter the machine by as much, and by more
    where all chains miss a mode that carries mass.

    Args:
      key: [] key.
      params: the machine.
      base_bias: b_0 [V], the log-odds of the pixels at β = 0; those of the data's means are the
        usual choice.
      num_chains: N.
      inverse_temperatures: T, for an even ladder, or the ladder [T], increasing to 1.
      **options: of ``ebjax.samplers.smc.ais_log_z``: ``num_mcmc_steps`` (1 unless given),
        ``num_islands``, ``num_devices``.

    Returns:
      ``TemperedSamples`` with weighted draws of the visible layer, the estimate ``log_z`` and its
      standard error.

    Raises:
      ValueError: if ``base_bias`` has not one entry a visible unit, or an option is out of range.

    >>> params = RBMParams(jnp.zeros((3, 5)), jnp.zeros(3), jnp.zeros(5))
    >>> result = rbm_annealed_log_z(
    ...     jax.random.key(0), params, jnp.zeros(3), num_chains=2, inverse_temperatures=2
    ... )
    >>> bool(jnp.isclose(result.log_z, 8 * jnp.log(2.0)))
    True
    """
    base_bias, ladder = _checked(params, base_bias, inverse_temperatures)
    if num_chains < 1:
        raise ValueError(f"num_chains is {num_chains}; it must be at least 1.")
    start_key, key = jax.random.split(key)
    shape = (num_chains, base_bias.size)
    start = jax.random.bernoulli(start_key, jax.nn.sigmoid(base_bias), shape)
    result = ais_log_z(
        key,
        rbm_marginal_gibbs(machine=_tempered),
        _tempered_free_energy,
        (base_bias, params),
        start.astype(base_bias.dtype),
        inverse_temperatures=ladder,
        **{"num_mcmc_steps": 1, **options},
    )
    base_log_z = _base_log_z(params, base_bias)
    return result._replace(
        log_z=result.log_z + base_log_z, island_log_z=result.island_log_z + base_log_z
    )


def rbm_annealed_log_likelihood(
    key: jax.Array,
    params: RBMParams,
    base_bias: npt.ArrayLike,
    examples: jax.Array,
    *,
    chains_per_example: int = 1,
    inverse_temperatures: int | npt.ArrayLike = 1000,
    **options: Any,
) -> jax.Array:
    """Conservative log-likelihood: lower bounds, on average, of log p_ann(x).

    p_ann is the law of the ends of the chains of ``rbm_annealed_log_z``, which tends to that of the
    machine with more temperatures. With w the weights of chains that start at x and end as
    independent pixels,

        E[-F(x) + log mean w - log Z_0] <= log p_ann(x)

    Args:
      key: [] key.
      params: the machine.
      base_bias: b_0 [V], as above.
      examples: [N, V], in {0, 1}.
      chains_per_example: K; more make the bound tighter.
      inverse_temperatures: T, for an even ladder, or the ladder [T], increasing to 1.
      **options: as above, but for ``num_islands``.

    Returns:
      [N] nats. Quote the mean with its standard error over examples.

    Raises:
      ValueError: if ``base_bias`` has not one entry a visible unit, or an option is out of range.
    """
    base_bias, ladder = _checked(params, base_bias, inverse_temperatures)
    if chains_per_example < 1:
        raise ValueError(f"chains_per_example is {chains_per_example}; it must be at least 1.")
    examples = jnp.asarray(examples, base_bias.dtype)
    result = ais_log_z(
        key,
        rbm_marginal_gibbs(machine=_backwards_machine),
        _backwards_free_energy,
        (base_bias, params),
        jnp.repeat(examples, chains_per_example, axis=0),
        # Moves at 1 come first and weights to 0 last: the forward run in a mirror.
        inverse_temperatures=np.concatenate([[0.0], 1.0 - ladder[-2::-1], [1.0]]),
        **{"num_mcmc_steps": 1, **options, "num_islands": len(examples)},
    )
    free_energies = jax.lax.map(lambda x: rbm_free_energy(params, x), examples, batch_size=1000)
    return result.island_log_z - free_energies - _base_log_z(params, base_bias)

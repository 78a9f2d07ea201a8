"""Energies with latent variables: E(x, z) with z summed, integrated or minimised out.

    F_β(x) = -(1/β) log Σ_z w_z exp(-β E(x, z))        F_∞(x) = min_z E(x, z)
    ∂F_β/∂θ = Σ_z p(z | x) ∂E/∂θ,  p(z | x) ∝ w_z exp(-β E)
    ∂F_∞/∂θ = ∂E/∂θ at z*                              (envelope: no gradient through z*)
    F_∞ - (1/β) log S <= F_β <= F_∞                    for S values of z with w = 1
    F_β <= E_q[E] - H(q)/β                             for any q(z), with equality at p(z | x)

The sum is a sum, not a mean: with w = 1 a variable that E ignores lowers F_β by (log S)/β. With the
nodes and weights of a quadrature it is ∫ exp(-β E) dz. k-means is E = |x - W_z|² with F_∞, a
Gaussian mixture the same with F_β.

An energy with a latent variable is ``(params, x, z, *context) -> []``; what comes out is an
``EnergyFn`` ``(params, x, *context) -> []``. Shapes: S values of z, leaves [S, ...].

LeCun et al., "A tutorial on energy-based learning", 2006. Dawid and LeCun, "Introduction to latent
variable energy-based models", 2023.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ebjax.types import EnergyFn, Params, Position, PyTree, bind

__all__ = [
    "Nodes",
    "infer_latent",
    "interval_nodes",
    "latent_posterior",
    "marginalize",
    "minimize_latent",
    "minimize_over",
    "variational_free_energy",
]

LatentEnergyFn = Callable[..., jax.Array]


class Nodes(NamedTuple):
    """Values of a latent variable that stand for all of them.

    Attributes:
      latents: [S, ...] a pytree.
      log_weights: [S] logs of their weights; 0 for the states of a discrete variable.
    """

    latents: PyTree
    log_weights: jax.Array


def _as_nodes(latents: PyTree | Nodes) -> Nodes:
    nodes = latents
    if not isinstance(latents, Nodes):
        leaves = jax.tree.leaves(latents)
        if not leaves or any(np.ndim(leaf) == 0 for leaf in leaves):
            raise ValueError("latents has no leading axis of values; give it as [S, ...].")
        nodes = Nodes(latents, jnp.zeros(len(leaves[0])))
    sizes = {len(leaf) for leaf in jax.tree.leaves(nodes)}
    if len(sizes) != 1 or sizes == {0}:
        raise ValueError(
            f"latents and weights have {sorted(sizes)} values; all must have the same number, at "
            "least 1."
        )
    return nodes


def interval_nodes(
    low: float, high: float, *, num_points: int = 64, num_dimensions: int = 1
) -> Nodes:
    """Gauss-Legendre nodes of the box [low, high]^d, for continuous z of few dimensions.

    Exact for polynomials of degree 2 num_points - 1 in each dimension.

    Args:
      low: where each dimension starts.
      high: where it ends.
      num_points: nodes in each dimension; ``num_points ** num_dimensions`` in all, at most 2^20.
      num_dimensions: d.

    Returns:
      ``Nodes`` with latents [S, d] and the logs of their volumes.

    Raises:
      ValueError: naming the argument that is out of range.

    >>> nodes = interval_nodes(0.0, 2.0, num_points=5)
    >>> round(float(jnp.sum(jnp.exp(nodes.log_weights) * nodes.latents[:, 0] ** 3)), 5)
    4.0
    """
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise ValueError(f"low and high are {low} and {high}; give two numbers in order.")
    if num_points < 1 or num_dimensions < 1 or num_points**num_dimensions > 2**20:
        raise ValueError(
            f"num_points is {num_points} in {num_dimensions} dimensions; give from 1 to 2^20 "
            "points in all."
        )
    points, weights = np.polynomial.legendre.leggauss(num_points)
    points = low + (high - low) * (points + 1.0) / 2.0
    log_weights = np.log(weights * (high - low) / 2.0)
    latents = np.array(list(itertools.product(points, repeat=num_dimensions)))
    total = functools.reduce(np.add.outer, [log_weights] * num_dimensions)
    return Nodes(jnp.asarray(latents, float), jnp.asarray(total.ravel(), float))


def _energies(energy_fn, params, x, context, nodes: Nodes) -> jax.Array:
    return jax.vmap(lambda z: energy_fn(params, x, z, *context))(nodes.latents)


def _check_inverse_temperature(value: Any) -> None:
    if isinstance(value, int | float) and not (math.isfinite(value) and value > 0):
        raise ValueError(f"inverse_temperature is {value}; it must be positive and finite.")


def marginalize(
    energy_fn: LatentEnergyFn,
    latents: PyTree | Nodes,
    *,
    inverse_temperature: float | jax.Array = 1.0,
) -> EnergyFn:
    """``F_β(x) = -(1/β) log Σ_z w_z exp(-β E(x, z))``, z summed or integrated out.

    Differentiable to any order in params and x; its gradient is the mean of ∂E over p(z | x).

    Args:
      energy_fn: ``(params, x, z, *context) -> []``.
      latents: [S, ...] all states of z with weight 1, or ``Nodes`` (``interval_nodes``).
      inverse_temperature: β > 0; may be traced.

    Raises:
      ValueError: if there is no value of z, or β is not positive.

    >>> components = marginalize(lambda means, x, z: 0.5 * (x - means[z]) ** 2, jnp.arange(2))
    >>> round(float(components(jnp.zeros(2), 2.0)), 4)
    1.3069
    """
    _check_inverse_temperature(inverse_temperature)
    return bind(
        _marginal,
        energy_fn=energy_fn,
        nodes=_as_nodes(latents),
        inverse_temperature=inverse_temperature,
    )


def _marginal(params, x, *context, energy_fn, nodes, inverse_temperature):
    beta = inverse_temperature
    energies = _energies(energy_fn, params, x, context, nodes)
    weights = nodes.log_weights.astype(energies.dtype)
    # Around the lowest energy, so that a large β keeps its digits.
    lowest = jax.lax.stop_gradient(energies.min())
    lowest = jnp.where(jnp.isfinite(lowest), lowest, 0.0)
    return lowest - jax.nn.logsumexp(weights - beta * (energies - lowest)) / beta


def latent_posterior(
    energy_fn: LatentEnergyFn,
    latents: PyTree | Nodes,
    params: Params,
    x: Position,
    *context: Any,
    inverse_temperature: float | jax.Array = 1.0,
) -> jax.Array:
    """[S] ``p(z | x) ∝ w_z exp(-β E(x, z))``, the share of each value of z.

    >>> energy_fn = lambda means, x, z: 0.5 * (x - means[z]) ** 2
    >>> means = jnp.array([-1.0, 1.0])
    >>> latent_posterior(energy_fn, jnp.arange(2), means, 0.0).tolist()
    [0.5, 0.5]
    """
    nodes = _as_nodes(latents)
    energies = _energies(energy_fn, params, x, context, nodes)
    log_weights = nodes.log_weights.astype(energies.dtype)
    return jax.nn.softmax(log_weights - inverse_temperature * energies)


def variational_free_energy(
    energies: jax.Array, probs: jax.Array, *, inverse_temperature: float | jax.Array = 1.0
) -> jax.Array:
    """[] ``E_q[E] - H(q)/β`` of a law q over S states, at least F_β.

    Args:
      energies: [S] E(x, z).
      probs: [S] q, sums to 1.
      inverse_temperature: β > 0.

    >>> float(variational_free_energy(jnp.array([1.0, 3.0]), jnp.array([1.0, 0.0])))
    1.0
    """
    entropy = -jnp.sum(jax.scipy.special.xlogy(probs, probs))
    return jnp.sum(probs * energies) - entropy / inverse_temperature


def minimize_over(energy_fn: LatentEnergyFn, candidates: PyTree) -> EnergyFn:
    """``F_∞(x) = min_z E(x, z)`` over given values of z.

    The gradient is that of E at the z that wins, which exists wherever one wins alone.

    Args:
      energy_fn: ``(params, x, z, *context) -> []``.
      candidates: [S, ...] the values.

    >>> nearest = minimize_over(lambda means, x, z: (x - means[z]) ** 2, jnp.arange(2))
    >>> jax.grad(nearest)(jnp.array([0.0, 10.0]), 3.0).tolist()
    [-6.0, 0.0]
    """
    return bind(_minimum, energy_fn=energy_fn, nodes=_as_nodes(candidates))


def _minimum(params, x, *context, energy_fn, nodes):
    frozen = jax.lax.stop_gradient((params, x, context))
    best = jnp.argmin(_energies(energy_fn, frozen[0], frozen[1], frozen[2], nodes))
    return energy_fn(params, x, jax.tree.map(lambda leaf: leaf[best], nodes.latents), *context)


def infer_latent(
    energy_fn: LatentEnergyFn,
    params: Params,
    x: Position,
    start: Position,
    *context: Any,
    num_steps: int,
    step_size: float | jax.Array,
    proximal: Callable[[Position, Any], Position] | None = None,
) -> Position:
    """``z*``: ``num_steps`` of ``z <- prox_h(z - h ∂E/∂z)`` from ``start``.

    Args:
      energy_fn: ``(params, x, z, *context) -> []``, differentiable in z.
      params: its parameters.
      x: the example.
      start: where z starts.
      *context: of the energy.
      num_steps: static, at least 1.
      step_size: h > 0; below 2 over the largest curvature in z it descends.
      proximal: ``(z, h) -> z``, for a part of the objective that ``energy_fn`` leaves out because
        it has kinks: soft thresholding by λ h for λ |z|_1 (sparse coding, ISTA).

    Raises:
      ValueError: if ``num_steps`` is below 1.

    >>> energy_fn = lambda params, x, z: (x - params * z) ** 2
    >>> round(float(infer_latent(energy_fn, 2.0, 3.0, 0.0, num_steps=50, step_size=0.1)), 4)
    1.5
    """
    if num_steps < 1:
        raise ValueError(f"num_steps is {num_steps}; it must be at least 1.")
    slope = jax.grad(energy_fn, argnums=2)

    def step(_, z):
        moved = jax.tree.map(lambda a, g: a - step_size * g, z, slope(params, x, z, *context))
        return moved if proximal is None else proximal(moved, step_size)

    return jax.lax.fori_loop(0, num_steps, step, start)


def minimize_latent(
    energy_fn: LatentEnergyFn,
    initial_latent: Callable[..., Position] | Position,
    *,
    num_steps: int,
    step_size: float | jax.Array,
    proximal: Callable[[Position, Any], Position] | None = None,
    penalty: Callable[[Position], jax.Array] | None = None,
) -> EnergyFn:
    """``F_∞(x) = min_z E(x, z)`` by descent in z, with the gradient of the envelope.

    The value is E(x, z*) at the z* that descent finds. The gradient in params and x is ∂E at z*,
    which is that of the minimum where ∂E/∂z = 0 there; the descent is not differentiated. Second
    derivatives leave out how z* moves.

    Args:
      energy_fn: ``(params, x, z, *context) -> []``.
      initial_latent: where z starts, or ``(params, x, *context) -> z`` (an encoder).
      num_steps: static, at least 1.
      step_size: h > 0.
      proximal: as of ``infer_latent``.
      penalty: ``z -> []``, the part that ``proximal`` stands for; it is added to the value.

    >>> residual = minimize_latent(
    ...     lambda w, x, z: jnp.sum((x - w * z) ** 2), 0.0, num_steps=100, step_size=0.05)
    >>> round(float(residual(jnp.array([1.0, 1.0]), jnp.array([3.0, 1.0]))), 4)
    2.0
    """
    if num_steps < 1:
        raise ValueError(f"num_steps is {num_steps}; it must be at least 1.")
    return bind(
        _minimum_by_descent,
        energy_fn=energy_fn,
        initial_latent=initial_latent,
        options=_Descent(num_steps, step_size, proximal),
        penalty=penalty,
    )


class _Descent(NamedTuple):
    num_steps: int
    step_size: Any
    proximal: Any


def _minimum_by_descent(params, x, *context, energy_fn, initial_latent, options, penalty):
    frozen, x_frozen, context_frozen = jax.lax.stop_gradient((params, x, context))
    start = initial_latent
    if callable(initial_latent):
        start = initial_latent(frozen, x_frozen, *context_frozen)
    start = jax.tree.map(lambda leaf: jnp.asarray(leaf, float), start)
    best = infer_latent(energy_fn, frozen, x_frozen, start, *context_frozen, **options._asdict())
    best = jax.lax.stop_gradient(best)
    energy = energy_fn(params, x, best, *context)
    return energy if penalty is None else energy + penalty(best)

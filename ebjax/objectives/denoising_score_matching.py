"""Denoising score matching: the energy's gradient is fitted to the noise that was put on data.

    x̃ = x + σ ξ,   ξ ~ N(0, I):      loss = ½|∇E(x̃) - ξ/σ|²

The minimum over all energies is at ``∇E = -∇log p_σ``, p_σ the data's law convolved with N(0, σ²):
the score of x̃ given x is -ξ/σ, and its mean given x̃ is the score of p_σ. So the model learns the
law of the noisy data. No second derivative in x is needed.

At many levels at once the energy E(x, σ) takes the level too, each example draws a level of the
ladder, and the loss is weighted by σ², which makes all levels alike in size:

    σ² · ½|∇E(x̃, σ) - ξ/σ|² = ½|σ ∇E(x̃, σ) - ξ|²

``ebjax.samplers.annealed_langevin`` samples such an energy down the same ladder.

Vincent, "A connection between score matching and denoising autoencoders", Neural Computation 23
(2011). Song and Ermon, "Generative modeling by estimating gradients of the data distribution",
NeurIPS 2019, and "Improved techniques for training score-based generative models", NeurIPS 2020.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

from ebjax.numerics import random_normal_like
from ebjax.types import EnergyFn, Objective, Params, Position, bind

__all__ = [
    "annealed_denoising_score_matching",
    "denoising_score_matching",
    "denoising_score_matching_loss",
    "geometric_noise_levels",
    "scaled_by_noise_level",
]


def geometric_noise_levels(widest: float, narrowest: float, num_levels: int) -> np.ndarray:
    """``σ_1 > ... > σ_L`` with a constant ratio.

    Neighbours should overlap: in D dimensions noisy data lie about a sphere of radius σ sqrt(D), of
    thickness σ/sqrt(2), so a ratio near ``1 + 1/sqrt(D)``. The widest is about the largest
    distance between data, the narrowest the blur that is tolerated.

    Args:
      widest: σ_1.
      narrowest: σ_L > 0, below ``widest`` unless there is one level.
      num_levels: L, at least 1; one level is ``narrowest``.

    Returns:
      [L] float64.

    Raises:
      ValueError: naming the argument that is out of range.

    >>> geometric_noise_levels(4.0, 1.0, 3).tolist()
    [4.0, 2.0, 1.0]
    """
    if num_levels < 1:
        raise ValueError(f"num_levels is {num_levels}; a ladder has at least 1 level.")
    if not narrowest > 0:
        raise ValueError(f"narrowest is {narrowest}; a noise level is positive.")
    if num_levels == 1:
        return np.array([float(narrowest)])
    if not widest > narrowest:
        raise ValueError(f"widest is {widest}; it must be above narrowest, {narrowest}.")
    levels = np.geomspace(widest, narrowest, num_levels)
    levels[[0, -1]] = widest, narrowest
    return levels


def scaled_by_noise_level(energy_fn: EnergyFn) -> EnergyFn:
    """``E(x, σ) = E(x)/σ``: an energy without a level made into one with it.

    The norm of the score of noisy data goes as 1/σ, so one network can serve all levels, roughly:
    the laws of different levels then differ by a temperature only.

    Args:
      energy_fn: ``(params, x) -> []``.

    Returns:
      ``(params, x, level) -> []``.

    >>> scaled_by_noise_level(lambda params, x: params * x)(3.0, 2.0, 0.5)
    12.0
    """
    return bind(_scaled, energy_fn=energy_fn)


def _scaled(params, x, level, *context, energy_fn):
    return energy_fn(params, x, *context) / level


def denoising_score_matching_loss(
    energy_fn: EnergyFn,
    params: Params,
    x: Position,
    key: jax.Array,
    noise_level: float | jax.Array,
    *context: Any,
) -> jax.Array:
    """``½|∇E(x + σξ) - ξ/σ|²`` of one example and one draw of noise.

    Args:
      energy_fn: the energy, ``(params, x, *context) -> []``.
      params: its parameters.
      x: [...] one clean example, any array or pytree.
      key: [] key of the noise.
      noise_level: σ > 0, in units of x. Give it again as ``context`` if the energy takes it.
      *context: passed on to the energy.

    Returns:
      [] the loss.

    >>> energy_fn = lambda precision, x: 0.5 * precision * jnp.sum(x**2)
    >>> key, level = jax.random.key(0), 0.5
    >>> x = jnp.zeros(3)  # x̃ = σξ, and the score of one point's noise is -ξ/σ
    >>> float(denoising_score_matching_loss(energy_fn, 1 / level**2, x, key, level))
    0.0
    """
    residual, _ = _residual_and_noise(energy_fn, params, x, key, noise_level, *context)
    return 0.5 * _square(residual) / jnp.square(noise_level)


def _residual_and_noise(energy_fn, params, x, key, noise_level, *context):
    """``(σ∇E(x + σξ) - ξ, ξ)``, both as x: all powers of σ that grow as it vanishes taken out."""
    noise = random_normal_like(key, x)
    noisy = jax.tree.map(lambda leaf, xi: leaf + (noise_level * xi).astype(xi.dtype), x, noise)
    gradient = jax.grad(lambda point: energy_fn(params, point, *context))(noisy)
    residual = jax.tree.map(lambda g, xi: noise_level * g - xi, gradient, noise)
    return residual, noise


def _square(tree):
    return sum(jnp.sum(jnp.square(leaf)) for leaf in jax.tree.leaves(tree))


def denoising_score_matching(energy_fn: EnergyFn, *, noise_level: float) -> Objective:
    """Builds the objective at one noise level.

    What it learns is the law of ``x + σξ``: for Gaussian data N(m, S) that is N(m, S + σ² I). As
    σ → 0 the law of the data comes nearer and the variance of the gradient grows as 1/σ².

    Args:
      energy_fn: the energy that is trained, ``(params, x) -> []``.
      noise_level: σ > 0, in units of the data.

    Returns:
      An ``Objective`` over batches of examples [B, ...], with nothing to carry; the loss is
      ½|∇E - ξ/σ|². Metrics: ``square_gradient``, the mean of |∇E|² at the noisy data, and
      ``unexplained_noise``, |σ∇E - ξ|² by the mean of |ξ|²: 1 for a flat energy, less for a learned
      one, and never 0, since the noise of an example is not known.

    Raises:
      ValueError: if σ is not positive.
    """
    if not (math.isfinite(noise_level) and noise_level > 0):
        raise ValueError(f"noise_level is {noise_level}; it must be positive.")

    def example(params, x, key):
        residual, noise = _residual_and_noise(energy_fn, params, x, key, noise_level)
        return residual, noise, jnp.square(1.0 / noise_level), noise_level

    return _build(example)


def annealed_denoising_score_matching(
    energy_fn: EnergyFn, *, noise_levels: npt.ArrayLike, weight_power: float = 2.0
) -> Objective:
    """Builds the objective over a ladder of noise levels.

    Each example draws one level, all alike likely. The weight σ² makes the expected size of the
    loss the same at all levels; with weight 1 the narrowest levels outweigh the others.

    Args:
      energy_fn: the energy that is trained, ``(params, x, level) -> []`` with ``level`` [] the σ:
        what ``annealed_langevin`` samples. ``scaled_by_noise_level`` makes one of a plain energy.
      noise_levels: [L] positive, in units of the data; ``geometric_noise_levels`` makes a ladder.
      weight_power: p of the weight σ^p.

    Returns:
      An ``Objective`` over batches of examples [B, ...], with nothing to carry; the loss is
      σ^p ½|∇E(x̃, σ) - ξ/σ|². Metrics: ``unexplained_noise`` as of ``denoising_score_matching``, and
      ``square_gradient``, here the mean of |σ∇E|².

    Raises:
      ValueError: if the levels are not a vector of positive numbers.
    """
    levels = np.asarray(noise_levels, float)
    if levels.ndim != 1 or levels.size == 0:
        raise ValueError(
            f"noise_levels has shape {levels.shape}; it must be a vector of at least one."
        )
    if not (np.all(np.isfinite(levels)) and levels.min() > 0):
        raise ValueError(f"noise_levels are {levels.tolist()}; all must be positive.")

    def example(params, x, key):
        level_key, noise_key = jax.random.split(key)
        dtype = jnp.result_type(*jax.tree.leaves(x))
        index = jax.random.randint(level_key, (), 0, len(levels))
        level = jnp.asarray(levels, dtype)[index]
        residual, noise = _residual_and_noise(energy_fn, params, x, noise_key, level, level)
        return residual, noise, jnp.power(level, weight_power - 2.0), 1.0

    return _build(example)


def _build(example_fn) -> Objective:
    """The objective of ``(params, x, key) -> (σ∇E - ξ, ξ, weight, unit)``.

    The loss is ``weight ½|σ∇E - ξ|²``, and gradients are reported by ``unit``.
    """

    def init(key, params, batch):
        del key, params, batch
        return ()

    def terms(params, x, key):
        residual, noise, weight, unit = example_fn(params, x, key)
        gradient = jax.tree.map(lambda r, xi: (r + xi) / unit, residual, noise)
        size = sum(leaf.size for leaf in jax.tree.leaves(noise))
        square = _square(residual)
        return 0.5 * weight * square, square / size, _square(gradient)

    def loss(params, carry, keys, batch):
        losses, unexplained, square_gradient = jax.vmap(terms, (None, 0, 0))(params, batch, keys)
        metrics = {
            "unexplained_noise": unexplained.mean(),
            "square_gradient": square_gradient.mean(),
        }
        return losses.mean(), (carry, metrics)

    return Objective(init=init, loss=loss)

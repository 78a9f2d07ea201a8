"""Laws to anneal from: normalised (log Z = 0), sampled exactly, of any event shape.

    normal      E(x) = Σ (x - m)² / 2s² + log s + log(2π)/2
    uniform     E(x) = Σ log(high - low) within the box
    bernoulli   E(x) = -Σ x log q + (1 - x) log(1 - q)

The nearer a base is to the model the fewer temperatures a path from it needs; the means and spreads
of the data are the usual choice (Salakhutdinov and Murray, "On the quantitative analysis of deep
belief networks", ICML 2008).
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

from ebjax.evaluation.checks import flat_examples
from ebjax.samplers.smc import normal_energy
from ebjax.types import Target

__all__ = ["bernoulli_base", "normal_base", "uniform_base"]


def normal_base(examples: npt.ArrayLike, *, widening: float = 1.0) -> Target:
    """Independent normals with the mean and spread of each component of the examples.

    Args:
      examples: [N, ...].
      widening: factor on the standard deviations. Components that hardly vary get a hundredth of
        the mean spread.

    Returns:
      A ``Target`` with log Z = 0.

    Raises:
      ValueError: if there are fewer than two examples, one is not finite, none vary, or
        ``widening`` is not positive.

    >>> base = normal_base(np.array([[0.0], [2.0]]))
    >>> round(float(base.energy((), jnp.ones(1))), 4)  # at the mean, standard deviation 1
    0.9189
    """
    flat = flat_examples("examples", examples)
    shape = np.shape(examples)[1:]
    spread = flat.std(axis=0)
    if not widening > 0.0 or not spread.mean() > 0.0:
        raise ValueError(
            f"widening is {widening} and the mean spread of the examples {spread.mean()}; both "
            "must be positive."
        )
    scale = (widening * np.maximum(spread, 0.01 * spread.mean())).reshape(shape)
    mean = flat.mean(axis=0).reshape(shape)

    def energy(params, x):
        del params
        return normal_energy((mean, scale), x)

    def sample(key):
        noise = jax.random.normal(key, shape)
        return jnp.asarray(mean, noise.dtype) + jnp.asarray(scale, noise.dtype) * noise

    return Target(energy, shape, 0.0, sample)


def uniform_base(shape: tuple[int, ...], low: float, high: float) -> Target:
    """The uniform law on the box [low, high]^shape; for models that live on that box.

    The energy is the same constant outside: the kernel must keep to the box, as ``folded`` does.

    Raises:
      ValueError: if ``low`` is not below ``high``.

    >>> float(uniform_base((4,), 0.0, 1.0).energy((), jnp.zeros(4)))
    0.0
    """
    if not low < high:
        raise ValueError(f"low is {low} and high is {high}; low must be below high.")
    constant = math.prod(shape) * math.log(high - low)

    def energy(params, x):
        del params
        return jnp.zeros_like(x).sum() + constant

    def sample(key):
        return jax.random.uniform(key, shape, minval=low, maxval=high)

    return Target(energy, shape, 0.0, sample)


def bernoulli_base(examples: npt.ArrayLike, *, smoothing: float = 1.0) -> Target:
    """Independent bits, each 1 as often as in the examples.

    Args:
      examples: [N, ...] in {0, 1}.
      smoothing: counts of each value added to those seen, positive.

    Returns:
      A ``Target`` on {0, 1}^shape (its energy is affine in x) with log Z = 0.

    Raises:
      ValueError: if an example is not binary or ``smoothing`` not positive.

    >>> base = bernoulli_base(np.array([[1.0], [1.0]]), smoothing=1.0)
    >>> round(float(jnp.exp(-base.energy((), jnp.ones(1)))), 4)
    0.75
    """
    flat = flat_examples("examples", examples, 1)
    if not np.isin(flat, (0.0, 1.0)).all():
        raise ValueError("examples has entries other than 0 and 1.")
    if not smoothing > 0.0:
        raise ValueError(f"smoothing is {smoothing}; it must be positive.")
    shape = np.shape(examples)[1:]
    rate = ((flat.sum(axis=0) + smoothing) / (len(flat) + 2.0 * smoothing)).reshape(shape)
    log_odds, constant = np.log(rate) - np.log1p(-rate), -np.log1p(-rate).sum()

    def energy(params, x):
        del params
        return constant - jnp.sum(x * jnp.asarray(log_odds, x.dtype))

    def sample(key):
        uniform = jax.random.uniform(key, shape)
        return (uniform < rate).astype(uniform.dtype)

    return Target(energy, shape, 0.0, sample)

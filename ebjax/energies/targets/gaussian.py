"""Gaussians, mixtures of Gaussians, and the posterior of a Gaussian under Gaussian noise."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

from ebjax.energies.targets.posterior import Posterior, make_posterior
from ebjax.energies.targets.reductions import half_quadratic_form, matrix_product, repeated, total
from ebjax.types import Moments, Target

__all__ = [
    "conjugate_gaussian",
    "diagonal_gaussian",
    "eight_gaussians",
    "forty_gaussians",
    "gaussian",
    "gaussian_mixture",
    "ill_conditioned_gaussian",
    "isotropic_gaussian",
    "nine_gaussians",
    "twenty_five_gaussians",
]

_LOG_2PI = math.log(2.0 * math.pi)
_MAX_UNROLLED_DIM = 8


def _distrax():
    import distrax  # seconds to import, so not before someone asks for a target

    return distrax


def _check_positive(name: str, value: float) -> None:
    if not value > 0:
        raise ValueError(f"{name} is {value}; it must be positive.")


def gaussian(mean: npt.ArrayLike, covariance: npt.ArrayLike) -> Target:
    """``E(x) = (x - m)' S^{-1} (x - m) / 2``, with ``log Z = (D log 2π + log det S) / 2``.

    Args:
      mean: m [D].
      covariance: S [D, D], symmetric and positive definite.

    Raises:
      ValueError: if the shapes do not fit or S is not symmetric and positive definite.
    """
    mean = np.asarray(mean, float)
    covariance = np.asarray(covariance, float)
    if mean.ndim != 1 or covariance.shape != (mean.size, mean.size):
        raise ValueError(
            f"mean has shape {mean.shape} and covariance {covariance.shape}; "
            "they must be [D] and [D, D]."
        )
    if not np.allclose(covariance, covariance.T):
        raise ValueError(f"covariance is not symmetric: {covariance.tolist()}.")
    sign, log_determinant = np.linalg.slogdet(covariance)
    if sign <= 0 or np.linalg.eigvalsh(covariance).min() <= 0:
        raise ValueError("covariance is not positive definite.")
    precision = np.linalg.inv(covariance)
    form = half_quadratic_form(0.5 * (precision + precision.T))
    law = _distrax().MultivariateNormalFullCovariance(jnp.asarray(mean), jnp.asarray(covariance))

    def energy(params, x):
        del params
        return form(x - jnp.asarray(mean, x.dtype))

    def sample(key):
        with jax.default_matmul_precision("highest"):
            return law.sample(seed=key)

    return Target(
        energy=energy,
        event_shape=mean.shape,
        log_z=float(0.5 * (mean.size * _LOG_2PI + log_determinant)),
        sample=sample,
        moments=Moments(jnp.asarray(mean), jnp.asarray(covariance)),
        modes=jnp.asarray(mean)[None],
    )


def diagonal_gaussian(
    mean: npt.ArrayLike, variances: npt.ArrayLike, *, is_normalised: bool = False
) -> Target:
    """``E(x) = Σ_d (x_d - m_d)² / (2 v_d)``, with ``log Z = Σ_d log(2π v_d) / 2``.

    Args:
      mean: m [D].
      variances: v [D], positive.
      is_normalised: whether log Z is added to the energy, so that that of the target is 0.

    Raises:
      ValueError: if the shapes do not fit or a variance is not positive.
    """
    mean, variances = np.asarray(mean, float), np.asarray(variances, float)
    if mean.ndim != 1 or mean.shape != variances.shape or not np.all(variances > 0):
        raise ValueError(
            f"mean has shape {mean.shape} and variances {variances.shape}; both must be [D], "
            "and the variances positive."
        )
    log_z = float(0.5 * np.sum(_LOG_2PI + np.log(variances)))

    def energy(params, x):
        del params
        centred = x - jnp.asarray(mean, x.dtype)
        value = total(jnp.asarray(0.5 / variances, x.dtype) * centred * centred)
        return value + log_z if is_normalised else value

    def sample(key):
        return jnp.asarray(mean) + jnp.sqrt(jnp.asarray(variances)) * jax.random.normal(
            key, mean.shape
        )

    return Target(
        energy=energy,
        event_shape=mean.shape,
        log_z=0.0 if is_normalised else log_z,
        sample=sample,
        moments=Moments(jnp.asarray(mean), jnp.diag(jnp.asarray(variances))),
        modes=jnp.asarray(mean)[None],
    )


def isotropic_gaussian(dim: int, standard_deviation: float = 1.0) -> Target:
    """``E(x) = |x|² / (2σ²)`` in D dimensions, ``log Z = D log(2πσ²) / 2``.

    >>> round(isotropic_gaussian(2).log_z, 4)
    1.8379
    """
    _check_positive("dim", dim)
    _check_positive("standard_deviation", standard_deviation)
    variances = np.full(dim, float(standard_deviation) ** 2)
    return diagonal_gaussian(np.zeros(dim), variances)


def ill_conditioned_gaussian(
    dim: int = 100, condition_number: float = 1e4, seed: int | None = None
) -> Target:
    """A centred Gaussian whose variances are log-spaced from κ^-½ to κ^½.

    By default 100 variances from 0.01 to 100, as in Hoffman et al., "NeuTra-lizing bad geometry
    in Hamiltonian Monte Carlo using neural transport", 2019.

    Args:
      dim: D, at least 2.
      condition_number: κ >= 1, the ratio of the extreme variances.
      seed: ``None`` for axis-parallel (the energy then costs D), else the seed of a random
        rotation (it costs D²).

    Raises:
      ValueError: if an argument is out of its range.
    """
    if dim < 2 or not condition_number >= 1:
        raise ValueError(
            f"dim is {dim} and condition_number {condition_number}; "
            "they must be at least 2 and at least 1."
        )
    half = 0.5 * math.log10(condition_number)
    variances = np.logspace(-half, half, dim)
    target = diagonal_gaussian(np.zeros(dim), variances)
    if seed is None:
        return target
    rotation, triangle = np.linalg.qr(np.random.default_rng(seed).normal(size=(dim, dim)))
    rotation = rotation * np.sign(np.diag(triangle))  # now uniform over the rotations
    form = half_quadratic_form((rotation / variances) @ rotation.T)
    root = rotation * np.sqrt(variances)

    def energy(params, x):
        del params
        return form(x)

    return target._replace(
        energy=energy,
        sample=lambda key: matrix_product(root, jax.random.normal(key, (dim,))),
        moments=Moments(jnp.zeros(dim), jnp.asarray((rotation * variances) @ rotation.T)),
    )


def _mixture_energy(means: np.ndarray, variance: float, log_constants: np.ndarray) -> Callable:
    dim = means.shape[1]

    def energy(params, x):
        del params
        centres = jnp.asarray(means, x.dtype)
        if dim <= _MAX_UNROLLED_DIM:
            # Sums over a short last axis do not vectorise; a sum of [K] arrays does.
            columns = (repeated(x[d], len(means)) - centres[:, d] for d in range(dim))
            squares = sum(jnp.square(column) for column in columns)
        else:
            squares = jnp.sum(jnp.square(x - centres), axis=-1)
        exponents = jnp.asarray(log_constants, x.dtype) - squares / (2.0 * variance)
        return -jax.nn.logsumexp(exponents)

    return energy


def gaussian_mixture(
    means: np.ndarray | jax.Array,
    standard_deviation: float,
    weights: Sequence[float] | None = None,
) -> Target:
    """``E(x) = -log Σ_k w_k N(x; m_k, σ² I)``, normalised, so ``log Z = 0``.

    Args:
      means: m [K, D].
      standard_deviation: σ > 0, shared.
      weights: w [K], positive; equal by default. They are normalised.

    Raises:
      ValueError: if the shapes do not fit, or σ or a weight is not positive.
    """
    means = np.asarray(means, float)
    if means.ndim != 2:
        raise ValueError(f"means has shape {means.shape}; it must be [K, D].")
    _check_positive("standard_deviation", standard_deviation)
    num_modes, dim = means.shape
    probs = np.full(num_modes, 1.0) if weights is None else np.asarray(weights, float)
    if probs.shape != (num_modes,) or probs.min() <= 0:
        raise ValueError(f"weights are {weights}; there must be {num_modes} positive ones.")
    probs = probs / probs.sum()
    variance = float(standard_deviation) ** 2
    log_constants = np.log(probs) - 0.5 * dim * (_LOG_2PI + math.log(variance))
    edges = np.cumsum(probs)[:-1]

    def sample(key):
        component_key, noise_key = jax.random.split(key)
        component = jnp.sum(jax.random.uniform(component_key) > jnp.asarray(edges))
        noise = jax.random.normal(noise_key, (dim,))
        return jnp.asarray(means)[component] + standard_deviation * noise

    mean = probs @ means
    spread = (means - mean).T @ (probs[:, None] * (means - mean))
    return Target(
        energy=_mixture_energy(means, variance, log_constants),
        event_shape=(dim,),
        log_z=0.0,
        sample=sample,
        moments=Moments(jnp.asarray(mean), jnp.asarray(spread + variance * np.eye(dim))),
        modes=jnp.asarray(means),
    )


def eight_gaussians(radius: float = 2.0, standard_deviation: float = 0.2) -> Target:
    """Eight equal Gaussians on a circle in 2-D."""
    angles = 2.0 * np.pi * np.arange(8) / 8
    means = radius * np.stack([np.cos(angles), np.sin(angles)], axis=-1)
    return gaussian_mixture(means, standard_deviation)


def nine_gaussians() -> Target:
    """Nine equal Gaussians on the grid {-5, 0, 5}² with variance 0.3.

    Zhang and Chen, "Path integral sampler: a stochastic control approach for sampling", ICLR 2022;
    the 2-D mixture of the tables on diffusion samplers.
    """
    return _square_of_gaussians([-5.0, 0.0, 5.0])


def twenty_five_gaussians() -> Target:
    """Twenty-five equal Gaussians on the grid {-10, -5, 0, 5, 10}² with variance 0.3.

    Sendera et al., "Improved off-policy training of diffusion samplers", NeurIPS 2024.
    """
    return _square_of_gaussians([-10.0, -5.0, 0.0, 5.0, 10.0])


def _square_of_gaussians(axis: list[float]) -> Target:
    means = np.stack(np.meshgrid(axis, axis, indexing="ij"), axis=-1).reshape(-1, 2)
    return gaussian_mixture(means, math.sqrt(0.3))


def forty_gaussians(seed: int = 0) -> Target:
    """Forty equal Gaussians in 2-D, means uniform in [-40, 40]², standard deviation log(1 + e).

    Midgley et al., "Flow annealed importance sampling bootstrap", ICLR 2023, with means drawn by
    NumPy's ``default_rng(seed)``.
    """
    means = np.random.default_rng(seed).uniform(-40.0, 40.0, (40, 2))
    return gaussian_mixture(means, math.log(1.0 + math.e))


def conjugate_gaussian(
    dim: int = 10, noise: float = 0.5, observation: npt.ArrayLike | None = None, seed: int = 0
) -> Posterior:
    """``x ~ N(0, I)``, ``y | x ~ N(x, σ² I)``: prior, likelihood and evidence are all Gaussian.

        log Z = log N(y; 0, (1 + σ²) I),    x | y ~ N(y / (1 + σ²), σ² / (1 + σ²) I)

    Args:
      dim: D.
      noise: σ > 0.
      observation: y [D]; drawn from the model with ``seed`` by default.
      seed: of NumPy's ``default_rng``.

    Raises:
      ValueError: if σ is not positive or y has not D components.

    >>> model = conjugate_gaussian(dim=2, noise=1.0, observation=[1.0, -1.0])
    >>> round(model.log_z, 4)
    -3.031
    """
    _check_positive("noise", noise)
    marginal = 1.0 + noise**2
    if observation is None:
        observation = math.sqrt(marginal) * np.random.default_rng(seed).normal(size=dim)
    y = np.asarray(observation, float)
    if y.shape != (dim,):
        raise ValueError(f"observation has shape {y.shape}; it must be [{dim}].")
    # As a function of x the likelihood is a normalised Gaussian about y.
    likelihood = diagonal_gaussian(y, np.full(dim, noise**2), is_normalised=True)
    posterior = diagonal_gaussian(y / marginal, np.full(dim, noise**2 / marginal))
    return make_posterior(
        diagonal_gaussian(np.zeros(dim), np.ones(dim), is_normalised=True),
        likelihood.energy,
        log_z=float(-0.5 * (dim * (_LOG_2PI + math.log(marginal)) + np.sum(y**2) / marginal)),
        sample=posterior.sample,
        moments=posterior.moments,
        modes=posterior.modes,
    )

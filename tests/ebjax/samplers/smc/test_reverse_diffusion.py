"""Weighted reverse diffusion on products of Gaussians, where Z and moments are known."""

import importlib
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ebjax.energies import sum_of
from ebjax.samplers.smc import (
    reverse_diffusion,
    reverse_diffusion_sample,
    reverse_diffusion_smc,
)

module = importlib.import_module("ebjax.samplers.smc.reverse_diffusion")

LEVELS = np.array([3.0, 2.0, 1.2, 0.6])
FINE = np.geomspace(4.0, 0.05, 80)


def noisy(mean, x, level):
    """N(mean, 1) convolved with noise, normalised."""
    variance = 1.0 + jnp.square(level)
    return 0.5 * jnp.sum(jnp.square(x - mean) / variance + jnp.log(2.0 * jnp.pi * variance))


product = sum_of(noisy, noisy)
MEANS = (-0.5, 1.0)


def exact_log_z(level):
    """Of N(a, v) N(b, v)."""
    variance = 1.0 + level**2
    return -((MEANS[0] - MEANS[1]) ** 2) / (4.0 * variance) - 0.5 * np.log(4.0 * np.pi * variance)


def mean_ratio(num_mcmc_steps, ess_threshold=0.5, num_runs=20_000):
    """Mean of Ẑ / Z over runs of 3 particles on a coarse ladder, and its standard error."""

    def one(key):
        population, _ = reverse_diffusion_smc(
            key,
            product,
            MEANS,
            num_particles=3,
            noise_levels=LEVELS,
            mean=np.zeros(1),
            scale=2.5,
            num_mcmc_steps=num_mcmc_steps,
            ess_threshold=ess_threshold,
        )
        return jnp.exp(population.log_z - exact_log_z(LEVELS[-1]))

    ratios = np.asarray(jax.jit(jax.vmap(one))(jax.random.split(jax.random.key(0), num_runs)))
    return ratios.mean(), ratios.std() / num_runs**0.5


@pytest.mark.parametrize(("num_mcmc_steps", "ess_threshold"), [(0, 0.0), (0, 0.5), (2, 0.5)])
def test_z_is_unbiased_on_a_coarse_ladder(x64, num_mcmc_steps, ess_threshold):
    mean, error = mean_ratio(num_mcmc_steps, ess_threshold)
    assert error < 0.02
    assert abs(mean - 1.0) < 4.0 * error


def test_weights_of_energies_alone_are_seen(x64, monkeypatch):
    """Planted: the ratio of the kernels is left out."""
    descend = module._descend

    def without_ratio(key, energy_fn, params, x, level, next_level):
        return descend(key, energy_fn, params, x, level, next_level)[0], energy_fn(params, x, level)

    monkeypatch.setattr(module, "_descend", without_ratio)
    mean, error = mean_ratio(0)
    assert abs(mean - 1.0) > 6.0 * error


def test_every_level_has_its_estimate_and_draws_have_the_moments():
    population, info = jax.jit(
        lambda key: reverse_diffusion_smc(
            key,
            product,
            MEANS,
            num_particles=8000,
            noise_levels=FINE,
            mean=np.zeros(1),
            scale=4.0 / 2**0.5,
        )
    )(jax.random.key(1))
    assert info.log_z.shape == (len(FINE) + 1,)
    np.testing.assert_allclose(info.log_z[:-1], exact_log_z(FINE), atol=0.06)
    weights = np.exp(np.asarray(population.log_weights, np.float64))
    weights /= weights.sum()
    x = np.asarray(population.particles.position)[:, 0]
    variance = 0.5 * (1.0 + FINE[-1] ** 2)
    assert abs(weights @ x - 0.25) < 0.05
    assert abs(weights @ np.square(x - weights @ x) / variance - 1.0) < 0.1


def test_one_law_has_nearly_constant_weights():
    """The finer the ladder, the nearer is its reverse diffusion to exact."""
    sizes = []
    for num_levels in (20, 80):
        _, info = reverse_diffusion_smc(
            jax.random.key(0),
            noisy,
            0.3,
            num_particles=2000,
            noise_levels=np.geomspace(4.0, 0.05, num_levels),
            mean=np.full(1, 0.3),
            scale=17.0**0.5,
            num_mcmc_steps=0,
            ess_threshold=0.0,
        )
        np.testing.assert_allclose(info.ess[0], 2000.0, rtol=1e-3)
        sizes.append(float(info.ess[-1]) / 2000.0)
    assert sizes[1] > 0.9
    assert 1.0 - sizes[1] < 0.5 * (1.0 - sizes[0])


def test_without_weights_the_variance_is_that_of_the_walk_and_not_of_the_law():
    means, num = (0.0, 0.0), 40_000
    start_key, walk_key = jax.random.split(jax.random.key(0))
    starts = 2.0 * jax.random.normal(start_key, (num, 1))
    ends = jax.vmap(
        lambda key, x: reverse_diffusion_sample(key, product, means, x, noise_levels=FINE)
    )(jax.random.split(walk_key, num), starts)
    variance = 4.0
    for level, after in itertools.pairwise(FINE):
        step = level**2 - after**2
        variance = variance * (1.0 - 2.0 * step / (1.0 + level**2)) ** 2 + step
    error = (2.0 / num) ** 0.5
    measured = float(jnp.var(ends))
    assert abs(measured / variance - 1.0) < 4.0 * error
    assert abs(measured / (0.5 * (1.0 + FINE[-1] ** 2)) - 1.0) > 20.0 * error


def test_shapes_are_any():
    smc = reverse_diffusion(
        product, noise_levels=LEVELS, mean=np.zeros((2, 3)), scale=2.0, num_mcmc_steps=1
    )
    particle = smc.model.init(jax.random.key(0), MEANS)
    assert particle.position.shape == (2, 3)
    for t in range(1, smc.num_steps + 1):
        particle = smc.model.move(jax.random.key(t), MEANS, jnp.int32(t), particle)
    assert particle.position.shape == (2, 3)
    assert particle.log_potential.shape == ()
    assert smc.num_steps == len(LEVELS)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"noise_levels": [1.0, 2.0]}, "noise_levels"),
        ({"noise_levels": [1.0, 0.0]}, "noise_levels"),
        ({"scale": -1.0}, "scale"),
        ({"num_mcmc_steps": -1}, "num_mcmc_steps"),
        ({"step_fraction": 0.0}, "step_fraction"),
    ],
)
def test_wrong_options_are_named(options, words):
    given = {"noise_levels": LEVELS, "mean": 0.0, "scale": 1.0, **options}
    with pytest.raises(ValueError, match=words):
        reverse_diffusion(product, **given)

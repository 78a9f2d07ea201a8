"""ULA against the law of the discretised chain, and what its options do."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ebjax.samplers import langevin, sample

MEAN = jnp.array([1.5, -0.7])
PRECISION = jnp.array([0.5, 2.0])
NUM_CHAINS = 20_000


def gaussian_energy(params, x):
    mean, precision = params
    return 0.5 * jnp.sum(precision * jnp.square(x - mean))


def stationary_variance(step_size, noise_scale):
    """s² / (1 - (1 - hλ)²): the law of x' = x - hλ(x - m) + s ξ."""
    return noise_scale**2 / (1.0 - (1.0 - step_size * PRECISION) ** 2)


def z_scores(kernel, variance):
    """Standard scores of mean and variance over independent chains, 400 steps from a far start.

    The start is forgotten as |1 - hλ|^400 < 1e-30, so the ends are independent draws of the
    stationary Gaussian: Var(mean) = v/C and Var(sample variance) = 2v²/C.
    """
    draws = sample(
        jax.random.key(0),
        kernel,
        gaussian_energy,
        (MEAN, PRECISION),
        jnp.full((NUM_CHAINS, 2), 3.0),
        num_samples=1,
        num_burn_in=399,
    )
    ends = np.asarray(draws.positions[0], np.float64)
    z_mean = (ends.mean(0) - MEAN) / np.sqrt(variance / NUM_CHAINS)
    z_variance = (((ends - MEAN) ** 2).mean(0) / variance - 1.0) * np.sqrt(NUM_CHAINS / 2.0)
    return np.abs(np.concatenate([z_mean, z_variance]))


LAWS = {
    "unit": ({"step_size": 0.4}, np.sqrt(2 * 0.4)),
    "hot": ({"step_size": 0.4, "temperature": 2.5}, np.sqrt(2 * 0.4 * 2.5)),
    "own_noise": ({"step_size": 0.4, "noise_scale": 0.3}, 0.3),
    # The noise is set apart: the temperature has no say.
    "own_noise_hot": ({"step_size": 0.4, "temperature": 9.0, "noise_scale": 0.3}, 0.3),
}


@pytest.mark.parametrize("name", LAWS)
def test_law_of_the_discretised_chain(name):
    options, noise_scale = LAWS[name]
    variance = stationary_variance(options["step_size"], noise_scale)
    assert np.all(z_scores(langevin(**options), variance) < 5.0)


def test_the_check_sees_noise_without_its_factor_of_two():
    variance = stationary_variance(0.4, np.sqrt(2 * 0.4))
    planted = langevin(step_size=0.4, noise_scale=np.sqrt(0.4).item())
    assert np.all(z_scores(planted, variance)[2:] > 5.0)


def test_the_check_tells_the_discretised_law_from_the_continuous_one():
    assert np.all(z_scores(langevin(step_size=0.4), 1.0 / PRECISION)[2:] > 5.0)


def one_step(kernel, energy_fn, position, params=()):
    state = kernel.init(energy_fn, params, position)
    return kernel.step(jax.random.key(0), energy_fn, params, state)


def steep(params, x):
    return 50.0 * jnp.sum(jnp.square(x))


def test_temperature_zero_descends_the_gradient():
    position = jnp.array([0.3, -0.001, 2.0])
    state, info = one_step(langevin(step_size=0.002, temperature=0.0), steep, position)
    np.testing.assert_allclose(state.position, position - 0.002 * 100.0 * position, rtol=1e-6)
    np.testing.assert_allclose(info.energy, steep((), position), rtol=1e-6)


def test_gradient_clip_acts_on_each_component():
    position = jnp.array([0.3, -0.001, -2.0])
    kernel = langevin(step_size=0.1, temperature=0.0, gradient_clip=0.5)
    state, info = one_step(kernel, steep, position)
    expected = position - 0.1 * jnp.array([0.5, -0.1, -0.5])
    np.testing.assert_allclose(state.position, expected, rtol=1e-5)
    # The norm is reported as it was, so that clipping can be noticed.
    np.testing.assert_allclose(info.gradient_norm, jnp.linalg.norm(100 * position), rtol=1e-6)


def test_bounds_clip_the_position_and_nothing_else():
    position = jnp.array([0.95, 0.0, -0.95])
    free, _ = one_step(langevin(step_size=0.5), gaussian_energy, position, (0.0, 1.0))
    bounded = langevin(step_size=0.5, bounds=(-0.5, 0.8))
    boxed, _ = one_step(bounded, gaussian_energy, position, (0.0, 1.0))
    np.testing.assert_array_equal(boxed.position, jnp.clip(free.position, -0.5, 0.8))
    assert np.any(boxed.position != free.position)


def test_is_finite_covers_the_new_position():
    """Energy 0 and an infinite gradient: the step itself is what overflows."""
    energy_fn = lambda params, x: jnp.sum(jnp.sqrt(x))  # noqa: E731
    state, info = one_step(langevin(step_size=0.1), energy_fn, jnp.zeros(2))
    assert np.isfinite(info.energy)
    assert not np.isfinite(state.position).any()
    assert not info.is_finite


def test_step_size_may_be_traced():
    """An annealed step size is one program."""
    position = jnp.array([0.4, 1.0])

    @jax.jit
    def moved(step_size):
        kernel = langevin(step_size=step_size, temperature=0.0)
        return one_step(kernel, steep, position)[0].position

    for step_size in (0.001, 0.004):
        np.testing.assert_allclose(moved(step_size), position * (1 - 100 * step_size), rtol=1e-5)
    assert moved._cache_size() == 1

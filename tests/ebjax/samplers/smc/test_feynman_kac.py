"""The general form on a chain of two states, where Z is a product of matrices."""

import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ebjax.samplers.smc import RESAMPLERS, FeynmanKac, feynman_kac, log_z_variance

module = importlib.import_module("ebjax.samplers.smc.feynman_kac")

INITIAL = np.array([0.7, 0.3])
TRANSITION = np.array([[0.8, 0.2], [0.3, 0.7]])
# log G_t(previous, current): not symmetric in anything.
POTENTIAL = [
    [[1.0, 1.0], [0.4, 0.4]],
    [[0.2, 2.0], [1.5, 0.6]],
    [[3.0, 0.1], [0.5, 1.0]],
    [[0.7, 1.9], [0.2, 1.1]],
]
LOG_POTENTIAL = np.log(POTENTIAL)
NUM_STEPS, NUM_PARTICLES, NUM_RUNS = 3, 4, 50_000


def exact_z():
    # At t = 0 both arguments are x_0.
    mass = INITIAL * np.exp(np.diag(LOG_POTENTIAL[0]))
    for t in range(1, NUM_STEPS + 1):
        mass = mass @ (TRANSITION * np.exp(LOG_POTENTIAL[t]))
    return mass.sum()


MODEL = FeynmanKac(
    init=lambda key, params: jax.random.bernoulli(key, INITIAL[1]).astype(jnp.int32),
    move=lambda key, params, t, x: jax.random.bernoulli(key, jnp.asarray(TRANSITION)[x, 1]).astype(
        jnp.int32
    ),
    log_potential=lambda params, t, previous, x: jnp.asarray(LOG_POTENTIAL)[t, previous, x],
)


def many_runs(method, ess_threshold, seed=0, num_particles=NUM_PARTICLES):
    def one(key):
        population, _ = feynman_kac(
            key,
            MODEL,
            (),
            num_particles=num_particles,
            num_steps=NUM_STEPS,
            method=method,
            ess_threshold=ess_threshold,
        )
        raw = module._relative_variance(
            population.log_weights, population.eves, population.num_resamplings
        )
        clipped = log_z_variance(population, method=method)
        return jnp.exp(population.log_z), raw, clipped, population

    return jax.jit(jax.vmap(one))(jax.random.split(jax.random.key(seed), NUM_RUNS))


def z_score(z):
    z = np.asarray(z, np.float64)
    return (z.mean() - exact_z()) / (z.std() / np.sqrt(z.size))


@pytest.mark.parametrize("ess_threshold", [0.8, 1.0])
@pytest.mark.parametrize("method", RESAMPLERS)
def test_z_is_unbiased(method, ess_threshold):
    assert abs(z_score(many_runs(method, ess_threshold)[0])) < 5.0


def test_the_check_sees_weights_that_are_not_reset(monkeypatch):
    real = module.resample

    def broken(key, population, *args, **options):
        new, is_resampled = real(key, population, *args, **options)
        return new._replace(log_weights=population.log_weights), is_resampled

    monkeypatch.setattr(module, "resample", broken)
    assert abs(z_score(many_runs("systematic", 1.0)[0])) > 5.0


def test_the_check_sees_ancestors_that_are_not_weighted(monkeypatch):
    even = lambda key, log_weights: jnp.arange(log_weights.size) // 2  # noqa: E731
    monkeypatch.setitem(RESAMPLERS, "systematic", even)
    assert abs(z_score(many_runs("systematic", 1.0)[0])) > 5.0


@pytest.mark.parametrize("ess_threshold", [0.0, 1.0])
def test_the_variance_estimate_is_unbiased(ess_threshold):
    """E[Z² V] = Var(Z) exactly, for multinomial resampling at every step and for none."""
    z, raw, clipped, _ = many_runs("multinomial", ess_threshold)
    z, raw = np.asarray(z, np.float64), np.asarray(raw, np.float64)
    squares = (z - exact_z()) ** 2
    error = z**2 * raw - squares
    assert abs(error.mean() / (error.std() / np.sqrt(z.size))) < 5.0
    assert np.all(np.asarray(clipped) >= 0.0)
    # Without the factor of r it is too large, by much more than the noise.
    if ess_threshold:
        short = z**2 * np.array(jax.vmap(module._relative_variance, (0, 0, None))(*_last(z), 0))
        assert (short - squares).mean() / ((short - squares).std() / np.sqrt(z.size)) > 5.0


def _last(z):
    population = many_runs("multinomial", 1.0)[3]
    return population.log_weights, population.eves


def test_without_resampling_it_is_the_sample_variance(x64):
    log_weights = jnp.array([0.3, -1.0, 2.0, 0.0])
    weights = np.exp(log_weights)
    exact = weights.var(ddof=1) / 4 / weights.mean() ** 2
    value = module._relative_variance(log_weights, jnp.arange(4), 0)
    np.testing.assert_allclose(value, exact, rtol=1e-12)


def test_a_population_that_dies_says_so():
    model = MODEL._replace(
        log_potential=lambda params, t, previous, x: jnp.where(t == 2, -jnp.inf, 0.0)
    )
    population, info = feynman_kac(jax.random.key(0), model, (), num_particles=8, num_steps=3)
    assert population.log_z == -jnp.inf
    assert info.ess.tolist()[:3] == [8.0, 8.0, 0.0]
    assert np.all(info.is_finite)
    assert not np.any(np.isnan(population.log_weights))


def test_a_weight_that_is_nan_is_flagged():
    model = MODEL._replace(
        log_potential=lambda params, t, previous, x: jnp.where((t == 2) & (x == 0), jnp.nan, 0.0)
    )
    population, info = feynman_kac(jax.random.key(0), model, (), num_particles=64, num_steps=3)
    assert info.is_finite.tolist() == [True, True, False, True]
    assert np.isfinite(population.log_z)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"num_particles": 0}, "num_particles is 0"),
        ({"num_steps": -1}, "num_steps is -1"),
        ({"method": "uniform"}, "'uniform'"),
    ],
)
def test_wrong_calls(options, match):
    options = {"num_particles": 4, "num_steps": 1, **options}
    with pytest.raises(ValueError, match=match):
        feynman_kac(jax.random.key(0), MODEL, (), **options)

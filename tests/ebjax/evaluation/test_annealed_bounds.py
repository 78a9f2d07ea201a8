"""Bounds hold where log Z is known, close with more temperatures, and p_ann is that of matrices."""

import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ebjax.energies.boltzmann import RBMParams, rbm_free_energy, rbm_target
from ebjax.evaluation import (
    ais_bounds,
    annealed_log_likelihood,
    bernoulli_base,
    normal_base,
    uniform_base,
)
from ebjax.samplers import gibbs, mala, random_walk
from ebjax.types import Target

module = importlib.import_module("ebjax.evaluation.annealed_bounds")

MEAN, SPREAD, SHIFT = jnp.array([1.0, -0.5, 0.3]), jnp.array([0.3, 0.8, 0.5]), -2.0
GAUSSIAN_LOG_Z = float(jnp.sum(jnp.log(SPREAD * jnp.sqrt(2.0 * jnp.pi)))) - SHIFT
BASE = normal_base(np.array([[-1.0] * 3, [1.0] * 3]))
NUM, GROUPS = 400, 40


def gaussian_energy(params, x):
    del params
    return 0.5 * jnp.sum(jnp.square((x - MEAN) / SPREAD)) + SHIFT


def gaussian_draws(num=NUM):
    return MEAN + SPREAD * jax.random.normal(jax.random.key(7), (num, 3))


# As many steps in both, so that both run the same compiled program.
COARSE = np.repeat([1.0 / 3.0, 2.0 / 3.0, 1.0], 8)
FINE = np.linspace(0.0, 1.0, 25)[1:]


def gaussian_bounds(ladder, model_samples=None):
    """MALA with steps as long as the law at each temperature is wide."""
    return ais_bounds(
        jax.random.key(0),
        gaussian_energy,
        (),
        BASE,
        mala,
        inverse_temperatures=ladder,
        num_chains=NUM,
        num_groups=GROUPS,
        step_size=jnp.asarray(1.0 / (1.0 + 3.0 * ladder)),
        model_samples=gaussian_draws() if model_samples is None else model_samples,
    )


def holds(bounds, log_z):
    """Whether neither bound is on the wrong side by more than 5 standard errors."""
    return (
        bounds.lower < log_z + 5.0 * bounds.lower_standard_error
        and bounds.upper > log_z - 5.0 * bounds.upper_standard_error
    )


def gap(bounds):
    return bounds.upper - bounds.lower


def test_the_sandwich_of_a_gaussian():
    coarse, fine = gaussian_bounds(COARSE), gaussian_bounds(FINE)
    assert holds(coarse, GAUSSIAN_LOG_Z)
    assert holds(fine, GAUSSIAN_LOG_Z)
    assert 0.0 < gap(fine) < 0.5 * gap(coarse)
    error = np.hypot(fine.lower_standard_error, fine.upper_standard_error)
    assert gap(fine) < 0.5
    assert abs(fine.log_z - GAUSSIAN_LOG_Z) < 5.0 * error
    assert fine.interval[0] < fine.lower < fine.upper < fine.interval[1]
    assert NUM / 10 < fine.effective_sample_size <= NUM


def test_the_check_sees_samples_that_are_not_the_models():
    """Planted: a law four times as wide, so that KL(q ‖ p) pulls the bound down."""
    wide = MEAN + 4.0 * (gaussian_draws() - MEAN)
    assert not holds(one_step(wide), GAUSSIAN_LOG_Z)
    assert holds(one_step(gaussian_draws()), GAUSSIAN_LOG_Z)


def one_step(samples=None, base=BASE):
    return ais_bounds(
        jax.random.key(0),
        gaussian_energy,
        (),
        base,
        random_walk(step_size=0.2),
        inverse_temperatures=1,
        num_chains=NUM,
        num_groups=GROUPS,
        model_samples=samples,
    )


def test_the_check_sees_the_wrong_direction(monkeypatch):
    """Planted: the path taken from the wrong end."""
    right = module.geometric_path
    monkeypatch.setattr(module, "geometric_path", lambda base, energy: right(energy, base))
    assert not holds(one_step(gaussian_draws()), GAUSSIAN_LOG_Z)


def test_the_bases_own_constant_is_counted():
    shifted = BASE._replace(log_z=1.5, energy=lambda params, x: BASE.energy(params, x) - 1.5)
    plain, other = one_step(), one_step(base=shifted)
    assert plain.upper == np.inf
    assert other.lower == pytest.approx(plain.lower, abs=1e-3)
    assert other.log_z == pytest.approx(plain.log_z, abs=1e-3)


def machine(num_visible, num_hidden, scale, seed=0):
    rng = np.random.default_rng(seed)
    weights = scale * rng.normal(size=(num_visible, num_hidden))
    biases = rng.normal(size=num_visible), rng.normal(size=num_hidden)
    return RBMParams(*(jnp.asarray(array, jnp.float32) for array in (weights, *biases)))


def test_the_sandwich_of_a_boltzmann_machine():
    params = machine(6, 4, 3.0)
    target = rbm_target(params)
    samples = jax.vmap(target.sample)(jax.random.split(jax.random.key(0), NUM))
    even = bernoulli_base(np.array([[0.0] * 6, [1.0] * 6]))
    kernel = gibbs(num_updates=3)
    coarse, fine = (
        ais_bounds(
            jax.random.key(1),
            rbm_free_energy,
            params,
            even,
            kernel,
            inverse_temperatures=ladder,
            num_chains=NUM,
            num_groups=GROUPS,
            model_samples=samples,
        )
        for ladder in (COARSE, FINE)
    )
    assert holds(coarse, target.log_z)
    assert holds(fine, target.log_z)
    assert gap(fine) < 0.5 * gap(coarse)


LADDER = np.array([0.3, 0.7, 1.0])


def annealing_law(params, base_probs, states, ladder):
    """p_ann by transition matrices: a random-site Gibbs step at each temperature."""
    energies = np.asarray(jax.vmap(lambda x: rbm_free_energy(params, x))(states), np.float64)
    law = base_probs
    for beta in ladder:
        log_p = (1.0 - beta) * np.log(base_probs) - beta * energies
        p = np.exp(log_p - log_p.max())
        matrix = np.zeros((8, 8))
        for i in range(8):
            for site in range(3):
                j = i ^ (4 >> site)
                matrix[i, j] += p[j] / (p[i] + p[j]) / 3.0
                matrix[i, i] += p[i] / (p[i] + p[j]) / 3.0
        law = law @ matrix
    return law


def test_the_likelihood_of_the_annealing_law():
    """E exp(bound) is p_ann(x) for each x, and the bounds lie below its log."""
    params = machine(3, 2, 2.0)
    states = np.array([[i >> 2 & 1, i >> 1 & 1, i & 1] for i in range(8)], np.float32)
    base = bernoulli_base(np.array([[1, 1, 0], [1, 0, 0.0]]))
    base_probs = np.exp([-float(base.energy((), jnp.asarray(x))) for x in states])
    assert base_probs.sum() == pytest.approx(1.0, abs=1e-5)
    copies = 500
    bounds = annealed_log_likelihood(
        jax.random.key(0),
        rbm_free_energy,
        params,
        base,
        gibbs(),
        np.repeat(states, copies, axis=0),
        inverse_temperatures=LADDER,
        chains_per_example=4,
    ).reshape(8, copies)
    exact = annealing_law(params, base_probs, states, LADDER)
    assert exact.sum() == pytest.approx(1.0, abs=1e-6)
    means = np.exp(bounds).mean(axis=1)
    errors = np.exp(bounds).std(axis=1) / np.sqrt(copies)
    assert np.abs(means - exact).max() < 0.1  # nothing is infinite
    assert np.all(np.abs(means - exact) < 5.0 * errors)
    log_errors = bounds.std(axis=1) / np.sqrt(copies)
    assert np.all(bounds.mean(axis=1) < np.log(exact) + 5.0 * log_errors)
    # Planted: the ladder in the wrong order, and one move less, are other laws.
    for wrong in (LADDER[::-1], LADDER[:-1]):
        other = annealing_law(params, base_probs, states, wrong)
        assert np.any(np.abs(means - other) > 5.0 * errors)


def test_bases_are_normalised_and_sampled_as_they_say():
    rng = np.random.default_rng(0)
    base = normal_base(rng.normal(size=(50, 2, 2)) * [[1.0, 2.0], [3.0, 0.0]], widening=1.5)
    draws = np.asarray(jax.vmap(base.sample)(jax.random.split(jax.random.key(0), 4000)))
    assert draws.shape[1:] == base.event_shape == (2, 2)
    z = draws.reshape(4000, -1)
    energies = np.asarray(jax.vmap(lambda x: base.energy((), x))(draws))
    # The mean energy of a normalised law is its entropy.
    entropy = np.sum(np.log(z.std(axis=0))) + 2.0 * np.log(2.0 * np.pi * np.e)
    assert energies.mean() == pytest.approx(entropy, abs=5.0 * np.sqrt(2.0 / 4000) * 2)
    box = uniform_base((3,), -1.0, 3.0)
    assert float(box.energy((), jnp.zeros(3))) == pytest.approx(3.0 * np.log(4.0))
    inside = np.asarray(jax.vmap(box.sample)(jax.random.split(jax.random.key(0), 1000)))
    assert -1.0 <= inside.min() < -0.9
    assert 2.9 < inside.max() < 3.0
    bits = bernoulli_base(np.array([[1.0, 0.0]] * 8 + [[0.0, 0.0]] * 2))
    draws = np.asarray(jax.vmap(bits.sample)(jax.random.split(jax.random.key(0), 4000)))
    assert np.all(np.abs(draws.mean(axis=0) - [9 / 12, 1 / 12]) < 5.0 * 0.5 / np.sqrt(4000))


def call(**options):
    return ais_bounds(
        jax.random.key(0),
        gaussian_energy,
        (),
        options.pop("base", BASE),
        mala,
        **{"inverse_temperatures": 2, **options},
    )


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda: call(base=Target(gaussian_energy, (3,))), "base must have exact samples"),
        (lambda: call(num_groups=1), "at least 2 groups"),
        (lambda: call(num_chains=25), "num_chains is 25"),
        (lambda: call(confidence=95), "confidence is 95"),
        (lambda: call(inverse_temperatures=0), "inverse_temperatures is 0"),
        (lambda: call(model_samples=np.zeros((3, 3))), "model_samples has 3"),
        (lambda: uniform_base((2,), 1.0, 1.0), "low must be below"),
        (lambda: normal_base(np.ones((5, 2))), "must be positive"),
        (lambda: bernoulli_base(np.full((5, 2), 0.5)), "other than 0 and 1"),
    ],
)
def test_wrong_calls_are_named(wrong, message):
    with pytest.raises(ValueError, match=message):
        wrong()

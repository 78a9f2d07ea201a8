"""Log-likelihoods from enumeration, transfer matrices and closed forms; bits; overfitting."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ebjax.energies.boltzmann import enumerate_states
from ebjax.energies.exact_lattice import strip_log_z
from ebjax.energies.lattice import ising_lattice
from ebjax.evaluation import (
    bits_per_dimension,
    enumerated_log_likelihood,
    held_out_energy_gap,
    log_likelihood,
)


def quadratic_form(params, x):
    x = x.reshape(-1)
    return x @ params @ x


@pytest.mark.parametrize("num_categories", [None, 3])
def test_enumeration_gives_a_law(x64, num_categories):
    states = enumerate_states((2, 2) if num_categories is None else (3,), num_categories)
    size = states[0].size
    params = np.random.default_rng(0).normal(size=(size, size))
    logs = enumerated_log_likelihood(quadratic_form, params, states, num_categories)
    energies = np.array([s.reshape(-1) @ params @ s.reshape(-1) for s in states])
    assert np.exp(logs).sum() == pytest.approx(1.0, abs=1e-12)
    np.testing.assert_allclose(logs, -energies - np.log(np.exp(-energies).sum()), atol=1e-10)
    # With the sign of the energy turned it would be another law.
    assert np.abs(logs - (energies - np.log(np.exp(energies).sum()))).max() > 0.1


def test_transfer_matrix_and_enumeration_agree(x64):
    target = ising_lattice((3, 4), coupling=0.4, field=0.2)
    states = enumerate_states((3, 4)).astype(float)
    bond = 0.4 * np.array([[1.0, -1.0], [-1.0, 1.0]])
    log_z = strip_log_z((3, 4), bond, 0.2 * np.array([-1.0, 1.0]), True)
    logs = log_likelihood(target.energy, (), states, log_z)
    assert np.exp(logs).sum() == pytest.approx(1.0, abs=1e-10)


def test_bits_of_levels(x64):
    """A law over 4 levels as a density, constant on each: the bits are its entropy, exactly."""
    probs = np.array([0.5, 0.25, 0.125, 0.125])
    rng = np.random.default_rng(0)
    levels = np.repeat(np.arange(4), [8, 4, 2, 2])

    def energy_fn(params, x):
        level = jnp.floor((x[0] - params[0]) / params[1]).astype(int)
        return -jnp.log(3.0 * jnp.asarray(probs))[level]

    for low, width in ((0.0, 0.25), (-1.0, 0.5)):
        examples = low + width * (levels + rng.random(16))[:, None]
        energies = jax.vmap(energy_fn, (None, 0))((low, width), jnp.asarray(examples))
        log_z = np.log(3.0 * width)
        assert bits_per_dimension(energies, log_z, 1, level_width=width) == pytest.approx(1.75)
        density = bits_per_dimension(energies, log_z, 1)
        assert density == pytest.approx(1.75 + np.log2(width))


def test_the_gap_is_the_difference_of_likelihoods():
    """A Gaussian fitted to ten points in four dimensions: the expected gap is known."""
    rng = np.random.default_rng(0)
    num, dim, gaps, auroc = 10, 4, [], []
    for _ in range(400):
        training, held_out = rng.normal(size=(2, num, dim))
        mean = training.mean(axis=0)
        energy = lambda x: 0.5 * np.square(x - mean).sum(axis=1)  # noqa: B023, E731
        figures = held_out_energy_gap(energy(training), energy(held_out))
        gaps.append(figures["energy_gap"])
        auroc.append(figures["energy_gap_auroc"])
    # E |x - m|² is D (1 - 1/n) on the training points and D (1 + 1/n) on others.
    exact, error = dim / num, np.std(gaps) / np.sqrt(400)
    assert abs(np.mean(gaps) - exact) < 5.0 * error
    assert np.mean(gaps) > 5.0 * error  # a gap of the wrong sign or none is seen
    assert np.mean(auroc) - 0.5 > 5.0 * np.std(auroc) / np.sqrt(400)


def test_the_gap_of_one_law_is_zero_within_its_error():
    rng = np.random.default_rng(0)
    figures = [
        held_out_energy_gap(rng.gamma(2.0, size=30), rng.gamma(2.0, size=50)) for _ in range(400)
    ]
    z = np.array([f["energy_gap"] / f["energy_gap_standard_error"] for f in figures])
    assert abs(z.mean()) < 5.0 / np.sqrt(400)
    assert abs(z.std() - 1.0) < 0.2


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: log_likelihood(quadratic_form, (), np.ones((2, 1)), np.inf), "log_z is inf"),
        (lambda: enumerated_log_likelihood(quadratic_form, (), np.full((2, 2), 0.5)), "0 and 1"),
        (lambda: enumerated_log_likelihood(quadratic_form, (), np.ones((2, 2)), 2), "one-hot"),
        (lambda: bits_per_dimension([0.0], 0.0, 0), "num_dimensions is 0"),
        (lambda: bits_per_dimension([0.0], 0.0, 1, level_width=0.0), "level_width is 0"),
        (lambda: bits_per_dimension([np.nan], 0.0, 1), "energies has 1 of 1"),
        (lambda: held_out_energy_gap([0.0], [1.0, 2.0]), "energies_training has shape"),
    ],
)
def test_wrong_calls_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()

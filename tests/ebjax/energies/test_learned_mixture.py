"""The learned mixture knows its own law: quadrature, draws, gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ebjax.energies.learned_mixture import LearnedMixtureParams, learned_gaussian_mixture

MIXTURE = learned_gaussian_mixture(3, standard_deviation=0.7)
PARAMS = LearnedMixtureParams(np.array([[-2.0], [0.5], [3.0]]), np.array([0.4, -0.8]))


def moments_by_quadrature(energies, x):
    density = np.exp(-energies)
    total = np.trapezoid(density, x)
    return np.log(total), np.trapezoid(x * density, x) / total


def test_log_z_and_shares(x64):
    x = np.linspace(-12.0, 12.0, 6001)
    energies = jax.vmap(MIXTURE.apply, (None, 0))(PARAMS, x[:, None])
    log_z, mean = moments_by_quadrature(energies, x)
    assert MIXTURE.log_z(PARAMS) == pytest.approx(log_z, abs=1e-10)
    assert MIXTURE.shares(PARAMS) @ PARAMS.means[:, 0] == pytest.approx(mean, abs=1e-10)
    # The control: forgetting the width moves log Z by log 0.7.
    wide = learned_gaussian_mixture(3).log_z(PARAMS)
    assert wide - log_z == pytest.approx(-np.log(0.7))


def test_draws_have_the_law():
    num = 20_000
    draws = jax.vmap(MIXTURE.sample, (0, None))(jax.random.split(jax.random.key(0), num), PARAMS)
    shares, means = np.asarray(MIXTURE.shares(PARAMS)), PARAMS.means[:, 0]
    mean = shares @ means
    variance = 0.49 + shares @ (means - mean) ** 2
    assert abs(draws.mean() - mean) < 5.0 * np.sqrt(variance / num)
    right = np.mean(np.asarray(draws) > 1.8)
    cdf = 0.5 * jax.scipy.special.erfc((1.8 - means) / 0.7 / np.sqrt(2.0))
    expected = float(shares @ cdf)
    assert abs(right - expected) < 5.0 * np.sqrt(expected * (1 - expected) / num)


def test_init():
    params = MIXTURE.init(jax.random.key(0), jnp.zeros(5))
    assert params.means.shape == (3, 5)
    assert params.log_weights.shape == (2,)
    np.testing.assert_allclose(MIXTURE.shares(params), 1 / 3, rtol=1e-6)
    assert 0.0 < np.abs(params.means).max() < 1.0


@pytest.mark.parametrize(
    ("count", "options", "name"),
    [(0, {}, "num_components"), (2, {"standard_deviation": 0.0}, "standard_deviation")],
)
def test_errors_name_the_value(count, options, name):
    with pytest.raises(ValueError, match=f"{name} is 0"):
        learned_gaussian_mixture(count, **options)

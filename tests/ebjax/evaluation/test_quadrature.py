"""Quadrature against closed forms of Gaussians, in double precision."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ebjax.energies import targets
from ebjax.evaluation import grid_figures, grid_law
from ebjax.types import Target

BOX = {"bounds": (-12.0, 12.0), "num_points": 201}
LAWS = [
    (np.array([0.3, -0.5]), np.array([[1.0, 0.4], [0.4, 0.8]])),
    (np.array([-0.4, 0.2]), np.array([[1.5, -0.3], [-0.3, 1.2]])),
]


def quadratic(params, x):
    mean, precision = params
    return 0.5 * (x - mean) @ precision @ (x - mean)


def gaussian(index, shift=0.0, **options):
    mean, covariance = LAWS[index]
    return grid_law(quadratic, (mean + shift, np.linalg.inv(covariance)), **{**BOX, **options})


def kl_of_gaussians(first, second):
    (mean_1, cov_1), (mean_2, cov_2) = first, second
    precision, difference = np.linalg.inv(cov_2), mean_2 - mean_1
    determinants = np.log(np.linalg.det(cov_2) / np.linalg.det(cov_1))
    square = difference @ precision @ difference
    return 0.5 * (np.trace(precision @ cov_1) + square - len(mean_1) + determinants)


def log_z_of_gaussian(covariance):
    return 0.5 * np.log(np.linalg.det(2.0 * np.pi * covariance))


def test_log_z_and_density(x64):
    law = gaussian(0)
    exact = log_z_of_gaussian(LAWS[0][1])
    assert law.log_z == pytest.approx(exact, abs=1e-10)
    assert law.log_z_error < 1e-8
    assert law.boundary_mass < 1e-12
    i, j = 60, 133
    energy = quadratic(
        (LAWS[0][0], np.linalg.inv(LAWS[0][1])), np.array([law.axes[0][i], law.axes[1][j]])
    )
    assert law.log_density[i, j] == pytest.approx(-energy - exact, abs=1e-10)
    assert np.sum(np.exp(law.log_weights + law.log_density)) == pytest.approx(1.0, abs=1e-12)


def test_divergences_are_those_of_gaussians(x64):
    model, reference = gaussian(0), gaussian(1)
    figures = grid_figures(model, reference)
    reverse, forward = kl_of_gaussians(*LAWS), kl_of_gaussians(*LAWS[::-1])
    assert figures["kl_model_reference"] == pytest.approx(reverse, abs=1e-9)
    assert figures["kl_reference_model"] == pytest.approx(forward, abs=1e-9)
    assert abs(forward - reverse) > 0.1  # the two directions can be told apart here
    assert figures["kl_error"] < 1e-6
    for name, (_, covariance) in zip(("model", "reference"), LAWS, strict=True):
        entropy = 1.0 + log_z_of_gaussian(covariance)
        assert figures[f"entropy_{name}"] == pytest.approx(entropy, abs=1e-9)


def test_an_unweighted_sum_would_be_seen(x64):
    """Planted: log Z from points without their weights."""
    law = gaussian(0)
    naive = np.log(np.exp(-law.energies).sum())
    assert abs(naive - log_z_of_gaussian(LAWS[0][1])) > 1.0


def test_total_variation_of_two_shifted_normals(x64):
    energy_fn = lambda mean, x: 0.5 * jnp.sum((x - mean) ** 2)  # noqa: E731
    options = {"bounds": [(-9.0, 9.0)], "num_points": 4001}
    laws = [grid_law(energy_fn, mean, **options) for mean in (-0.5, 0.5)]
    assert laws[0].axes[0].shape == (4001,)
    exact = 2.0 * float(jax.scipy.stats.norm.cdf(0.5)) - 1.0
    assert grid_figures(*laws)["total_variation"] == pytest.approx(exact, abs=1e-5)


def test_a_target_is_put_on_the_same_grid(x64):
    mean, covariance = LAWS[1]
    figures = grid_figures(gaussian(0), targets.gaussian(mean, covariance))
    exact = kl_of_gaussians(*LAWS[::-1])
    assert figures["kl_reference_model"] == pytest.approx(exact, abs=1e-6)


def test_equal_laws_are_at_zero_whatever_the_constant(x64):
    model = gaussian(0)
    shifted = grid_law(
        lambda p, x: 1e3 + quadratic(p, x), (LAWS[0][0], np.linalg.inv(LAWS[0][1])), **BOX
    )
    assert shifted.log_z == pytest.approx(model.log_z - 1e3, abs=1e-9)
    figures = grid_figures(model, shifted)
    for name in ("kl_model_reference", "kl_reference_model", "total_variation"):
        assert figures[name] == pytest.approx(0.0, abs=1e-9)


def test_supports_that_differ(x64):
    """Uniform on half of the box, within a uniform on all: one direction is infinite."""
    half = grid_law(
        lambda p, x: jnp.where(x[0] <= 0.5, 0.0, jnp.inf), (), bounds=[(0.0, 1.0)], num_points=2001
    )
    whole = Target(lambda p, x: jnp.zeros(()), (1,))
    figures = grid_figures(half, whole)
    assert figures["kl_reference_model"] == np.inf
    assert figures["kl_model_reference"] == pytest.approx(np.log(2.0), abs=1e-3)
    assert figures["total_variation"] == pytest.approx(0.5, abs=1e-3)
    assert figures["entropy_model"] == pytest.approx(-np.log(2.0), abs=1e-3)


def test_the_errors_tell_a_coarse_grid_and_a_small_box(x64):
    coarse = gaussian(0, num_points=15)
    assert coarse.log_z_error > 0.1
    assert abs(coarse.log_z - log_z_of_gaussian(LAWS[0][1])) < coarse.log_z_error
    assert gaussian(0, bounds=(-2.0, 2.0)).boundary_mass > 1e-3


def test_an_even_number_of_points_is_raised():
    law = grid_law(
        quadratic, (np.zeros(2), np.eye(2)), bounds=[(-5.0, 5.0), (-6.0, 6.0)], num_points=50
    )
    assert [len(axis) for axis in law.axes] == [51, 51]
    assert law.axes[1][0] == -6.0
    assert law.log_z == pytest.approx(np.log(2.0 * np.pi), abs=1e-4)


FLAT = lambda p, x: jnp.zeros(())  # noqa: E731


@pytest.mark.parametrize(
    ("energy_fn", "options", "message"),
    [
        (FLAT, {"bounds": 3.0}, "bounds is 3.0"),
        (FLAT, {"bounds": (1.0, -1.0)}, "lower end first"),
        (FLAT, {"bounds": [(0.0, 1.0, 2.0)]}, "a pair for each"),
        (FLAT, {"bounds": (0.0, 1.0), "num_points": 3}, "num_points is 3"),
        (FLAT, {"bounds": [(0.0, 1.0)] * 6}, "too many"),
        (lambda p, x: x, {"bounds": (0.0, 1.0), "num_points": 5}, "must give a scalar"),
        (lambda p, x: x[0] / 0.0 * 0.0, {"bounds": (0.0, 1.0), "num_points": 5}, "25 of 25"),
        (lambda p, x: x[0] + jnp.inf, {"bounds": (0.0, 1.0), "num_points": 5}, "finite at 0"),
    ],
)
def test_wrong_calls_are_named(energy_fn, options, message):
    with pytest.raises(ValueError, match=message):
        grid_law(energy_fn, (), **options)


def test_grids_must_agree():
    with pytest.raises(ValueError, match="grids differ"):
        grid_figures(gaussian(0), gaussian(0, num_points=51))

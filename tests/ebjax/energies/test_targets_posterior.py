"""Posteriors: prior and likelihood against the whole, evidence, data, and Laplace's method."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ebjax.energies import targets

POSTERIORS = {
    "conjugate_gaussian": lambda: targets.conjugate_gaussian(3, 0.8),
    "eight_schools": targets.eight_schools,
    "eight_schools_centred": lambda: targets.eight_schools(is_centred=True),
    "logistic_regression": lambda: targets.logistic_regression("wine"),
    "log_gaussian_cox": lambda: targets.log_gaussian_cox(4, seed=1),
    "log_gaussian_cox_whitened": lambda: targets.log_gaussian_cox(4, seed=1, is_whitened=True),
    "log_gaussian_cox_fitted": lambda: targets.log_gaussian_cox(4, seed=1, is_fitted=True),
}

EVIDENCE = {"breast_cancer": -55.225, "wine": -27.327}  # as the docstring says


@pytest.mark.parametrize("name", POSTERIORS)
def test_the_posterior_is_prior_times_likelihood(name, x64):
    posterior = POSTERIORS[name]()
    assert posterior.prior.log_z == 0.0
    assert posterior.prior.event_shape == posterior.event_shape
    x = posterior.prior.sample(jax.random.key(0))
    assert x.shape == posterior.event_shape
    parts = posterior.prior.energy((), x) + posterior.likelihood((), x)
    np.testing.assert_allclose(posterior.energy((), x), parts, rtol=1e-12)


def z_scores(values, truth):
    return np.abs(values.mean(0) - truth) / (values.std(0) / np.sqrt(len(values)))


def log_mean_exp(log_weights):
    """With its standard error, by the delta method."""
    peak = log_weights.max()
    weights = np.exp(np.asarray(log_weights - peak))
    error = weights.std() / weights.mean() / np.sqrt(len(weights))
    return peak + np.log(weights.mean()), error


@pytest.mark.parametrize("name", ["conjugate_gaussian", "eight_schools"])
def test_evidence_is_the_mean_likelihood_under_the_prior(name, x64):
    posterior = POSTERIORS[name]()
    keys = jax.random.split(jax.random.key(0), 100_000)
    draws = jax.jit(jax.vmap(posterior.prior.sample))(keys)
    log_weights = -jax.jit(jax.vmap(posterior.likelihood, (None, 0)))((), draws)
    estimate, error = log_mean_exp(log_weights)
    assert abs(estimate - posterior.log_z) < 5.0 * error
    assert abs(estimate - (posterior.log_z + 0.1)) > 5.0 * error  # a tenth of a nat would show


def test_the_conjugate_posterior_is_the_joint_over_the_evidence(x64):
    posterior = targets.conjugate_gaussian(3, 0.7, observation=[1.0, -2.0, 0.5])
    law = targets.gaussian(posterior.moments.mean, posterior.moments.covariance)
    x = jax.random.normal(jax.random.key(0), (3,))
    log_density = -posterior.energy((), x) - posterior.log_z
    np.testing.assert_allclose(log_density, -law.energy((), x) - law.log_z, rtol=1e-10)


def test_eight_schools_has_the_published_posterior():
    """Means of the reference draws of posteriordb, to their digits."""
    posterior = targets.eight_schools(is_centred=True)
    mean = np.asarray(posterior.moments.mean)
    np.testing.assert_allclose(mean[0], 4.4, atol=0.1)
    np.testing.assert_allclose(mean[2:5], [6.2, 4.9, 3.9], atol=0.1)
    draws = jax.jit(jax.vmap(posterior.sample))(jax.random.split(jax.random.key(0), 20_000))
    np.testing.assert_allclose(np.exp(draws[:, 1]).mean(), 3.6, atol=0.1)


def test_both_forms_of_the_eight_schools_are_one_law(x64):
    """E of θ = μ + τ z is E of z plus the log Jacobian 8 log τ."""
    centred, other = targets.eight_schools(is_centred=True), targets.eight_schools()
    x = other.sample(jax.random.key(0))
    theta = jnp.concatenate([x[:2], x[0] + jnp.exp(x[1]) * x[2:]])
    np.testing.assert_allclose(centred.energy((), theta), other.energy((), x) + 8.0 * x[1])


def test_logistic_regression_is_the_textbook_likelihood(x64):
    from sklearn.datasets import load_breast_cancer

    features, labels = load_breast_cancer(return_X_y=True)
    posterior = targets.logistic_regression(prior_scale=2.0)
    assert posterior.event_shape == (31,)
    w = 0.3 * np.random.default_rng(0).normal(size=31)
    scores = w[0] + (features - features.mean(0)) / features.std(0) @ w[1:]
    probability = 1.0 / (1.0 + np.exp(-scores))
    expected = -np.log(np.where(labels == 1, probability, 1.0 - probability)).sum()
    np.testing.assert_allclose(posterior.likelihood((), jnp.asarray(w)), expected, rtol=1e-9)
    prior = 0.5 * np.sum(w**2) / 4.0 + 15.5 * np.log(2.0 * np.pi * 4.0)
    np.testing.assert_allclose(posterior.prior.energy((), jnp.asarray(w)), prior)


def test_curvature_of_the_regression_at_zero_weights(x64):
    """X'X/4, where forms through |x| have a hole in their second derivative."""
    features = np.random.default_rng(0).normal(size=(40, 2))
    labels = np.arange(40) % 2
    posterior = targets.logistic_regression((features, labels))
    design = np.concatenate(
        [np.ones((40, 1)), (features - features.mean(0)) / features.std(0)], axis=1
    )
    expected = 0.25 * design.T @ design + np.eye(3)
    hessian = jax.hessian(posterior.energy, 1)((), jnp.zeros(3))
    np.testing.assert_allclose(hessian, expected, atol=1e-9)


def test_one_cell_of_the_cox_process_by_quadrature(x64):
    """log Z of all parametrisations on a grid of one cell."""
    mean, scale = np.log(126.0) - 0.5 * 1.91, np.sqrt(1.91)
    z = np.linspace(-12.0, 12.0, 20_001)
    x = mean + scale * z
    terms = np.exp(-0.5 * z**2 + 90.0 * x - np.exp(x) - 300.0)
    expected = np.log(terms.sum() * (z[1] - z[0])) - 0.5 * np.log(2.0 * np.pi) + 300.0
    for options, points, scale_of_points in (
        ({}, x, scale),
        ({"is_whitened": True}, z, 1.0),
        ({"is_fitted": True}, z, 1.0),
    ):
        posterior = targets.log_gaussian_cox(1, counts=[[90]], **options)
        energies = jax.vmap(posterior.energy, (None, 0))((), jnp.asarray(points)[:, None])
        step = scale_of_points * (z[1] - z[0])
        log_z = float(jax.nn.logsumexp(-energies)) + np.log(step)
        np.testing.assert_allclose(log_z, expected, rtol=1e-10)
        start = posterior.prior.modes[0]
        fitted = targets.laplace_approximation(posterior.energy, (), start)
        assert 1e-6 < abs(fitted.log_z - expected) < 0.01  # an approximation, and a good one


def test_whitening_is_a_change_of_variables(x64):
    plain = targets.log_gaussian_cox(6, seed=2)
    white = targets.log_gaussian_cox(6, seed=2, is_whitened=True)
    root = np.linalg.cholesky(plain.prior.moments.covariance)
    mean = plain.prior.moments.mean
    for key in jax.random.split(jax.random.key(0), 3):
        z = jax.random.normal(key, (36,))
        log_jacobian = np.log(np.diag(root)).sum()
        there = plain.energy((), mean + root @ z) - log_jacobian
        np.testing.assert_allclose(white.energy((), z), there, rtol=1e-10)
    fitted = targets.log_gaussian_cox(6, seed=2, is_fitted=True)
    # Laplace's estimate does not depend on coordinates.
    log_zs = [
        targets.laplace_approximation(target.energy, (), target.prior.modes[0]).log_z
        for target in (plain, white, fitted)
    ]
    np.testing.assert_allclose(log_zs, log_zs[0], atol=1e-8)


def test_no_gaussian_is_nearer_to_the_cox_posterior(x64):
    """KL(q | p) is stationary in q = N(m, S): E_q[∇E] = 0 and E_q[∇²E] = S^{-1}."""
    posterior = targets.log_gaussian_cox(4, seed=1, is_fitted=True)
    noise = np.random.default_rng(0).normal(size=(20_000, 16))

    @jax.jit
    @jax.vmap
    def derivatives(u):
        gradient = jax.grad(posterior.energy, 1)
        return gradient((), u), jax.jacfwd(gradient, 1)((), u)

    def worst(mean, scale):
        gradient, hessian = map(np.asarray, derivatives(mean + scale * noise))
        scores = z_scores(gradient, 0.0), z_scores(hessian, np.eye(16) / scale**2)
        return max(score.max() for score in scores)

    assert worst(0.0, 1.0) < 5.0
    assert worst(0.1, 1.0) > 5.0
    assert worst(0.0, 1.1) > 5.0


def test_the_cox_covariance_is_that_of_the_papers():
    covariance = targets.log_gaussian_cox(10).prior.moments.covariance
    np.testing.assert_allclose(np.diag(covariance), 1.91, rtol=1e-6)
    # Cells 0 and 12 are (0, 0) and (1, 2): sqrt(5) cells of a tenth apart.
    np.testing.assert_allclose(covariance[0, 12], 1.91 * np.exp(-33 * np.sqrt(5) / 10), rtol=1e-5)


def test_a_seed_gives_the_same_data():
    x = jnp.zeros(25) + 4.0
    energies = [float(targets.log_gaussian_cox(5, seed=s).energy((), x)) for s in (3, 3, 4)]
    assert energies[0] == energies[1] != energies[2]
    log_zs = [targets.conjugate_gaussian(seed=s).log_z for s in (3, 3, 4)]
    assert log_zs[0] == log_zs[1] != log_zs[2]


def test_counts_of_points():
    points = np.random.default_rng(0).uniform(size=(126, 2))
    counts = targets.count_points(np.concatenate([points, [[1.0, 1.0]]]), 5)
    assert counts.sum() == 127
    row, column = np.floor(5 * points[0]).astype(int)
    in_cell = np.all(np.floor(5 * points) == (row, column), axis=1).sum()
    assert counts[row, column] == in_cell + ((row, column) == (4, 4))
    posterior = targets.log_gaussian_cox(5, counts=counts)
    assert posterior.event_shape == (25,)


def test_laplace_finds_the_mode_of_the_side_it_starts_on(x64):
    target = targets.double_well()
    for side, mode in ((-0.05, target.modes[0]), (0.6, target.modes[1])):
        # Both starts lie where the energy is concave, so that a plain step would go up.
        fitted = targets.laplace_approximation(target.energy, (), jnp.array([side, 1.0]))
        np.testing.assert_allclose(fitted.modes[0], mode, atol=1e-6)
        np.testing.assert_allclose(
            fitted.energy((), fitted.modes[0]), target.energy((), mode), atol=1e-9
        )
        curvature = 12.0 * mode[0] ** 2 - 12.0
        np.testing.assert_allclose(fitted.moments.covariance[0, 0], 1.0 / curvature, rtol=1e-5)


def test_laplace_says_when_there_is_no_mode():
    with pytest.raises(ValueError, match="no mode in 5 steps"):
        targets.laplace_approximation(lambda p, x: jnp.sum(x), (), jnp.zeros(2), max_steps=5)


@pytest.mark.parametrize("data", ["wine", pytest.param("breast_cancer", marks=pytest.mark.slow)])
def test_evidence_of_the_regressions_is_the_documented_one(data):
    """Importance sampling from Laplace's Gaussian, with its standard error."""
    posterior = targets.logistic_regression(data)
    fitted = targets.laplace_approximation(posterior.energy, (), jnp.zeros(posterior.event_shape))
    draws = jax.jit(jax.vmap(fitted.sample))(jax.random.split(jax.random.key(0), 100_000))
    log_weight = jax.jit(jax.vmap(lambda x: fitted.energy((), x) - posterior.energy((), x)))
    estimate, error = log_mean_exp(log_weight(draws))
    estimate += fitted.log_z
    assert error < 0.1
    assert abs(estimate - EVIDENCE[data]) < 5.0 * error
    assert abs(fitted.log_z - EVIDENCE[data]) > 5.0 * error  # Laplace's own estimate is too low

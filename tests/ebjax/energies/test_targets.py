"""Known laws: log Z by quadrature, samples against moments and energies, modes, errors."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ebjax.energies import targets

COVARIANCE = [[1.3, 0.6], [0.6, 0.8]]
MEANS = np.array([[0.0, 1.0], [2.5, -0.5], [-2.0, -1.0]])

# name -> how to build it in 2-D, half-width of the box that holds its mass
TARGETS = {
    "gaussian": (lambda: targets.gaussian([0.5, -1.0], COVARIANCE), 14.0),
    "gaussian_mixture": (lambda: targets.gaussian_mixture(MEANS, 0.6, [1.0, 2.0, 5.0]), 10.0),
    "eight_gaussians": (targets.eight_gaussians, 5.0),
    "forty_gaussians": (targets.forty_gaussians, 60.0),
    "funnel": (lambda: targets.funnel(dim=2, scale=1.0), 200.0),
    "banana": (lambda: targets.banana(curvature=0.3, scale=1.2), 40.0),
    "double_well": (targets.double_well, 9.0),
    "isotropic_gaussian": (lambda: targets.isotropic_gaussian(2, 0.7), 9.0),
    "ill_conditioned": (lambda: targets.ill_conditioned_gaussian(2, 25.0), 24.0),
    "ill_conditioned_rotated": (lambda: targets.ill_conditioned_gaussian(2, 25.0, seed=3), 24.0),
    "nine_gaussians": (targets.nine_gaussians, 12.0),
    "twenty_five_gaussians": (targets.twenty_five_gaussians, 17.0),
    "conjugate_gaussian": (lambda: targets.conjugate_gaussian(2, 0.8), 9.0),
    "rosenbrock": (lambda: targets.rosenbrock(2, 0.4, 2.0), 80.0),
    "two_moons": (targets.two_moons, 7.0),
    "ring": (targets.ring, 7.0),
    "rings": (lambda: targets.rings((0.5, 1.2), 0.1), 3.0),
    "pinwheel": (targets.pinwheel, 4.0),
}
each_target = pytest.mark.parametrize("name", TARGETS)


@functools.cache
def quadrature(name):
    """Points [N, 2] and log weights [N] with Σ w f = ∫ f, by the trapezoid rule in u, x = sinh u.

    On smooth integrands that vanish at the ends the rule converges faster than any power; the
    stretch resolves the funnel's neck and reaches its mouth with the same points.
    """
    assert jax.config.jax_enable_x64
    build, half_width = TARGETS[name]
    u = np.linspace(-np.arcsinh(half_width), np.arcsinh(half_width), 601)
    x, log_w = np.sinh(u), np.log(np.cosh(u) * (u[1] - u[0]))
    points = np.stack(np.meshgrid(x, x, indexing="ij"), -1).reshape(-1, 2)
    return build(), jnp.asarray(points), (log_w[:, None] + log_w[None]).ravel()


def energies_of(target, points):
    return np.asarray(jax.jit(jax.vmap(target.energy, (None, 0)))((), points))


@functools.cache
def draws_of(name, num=20_000):
    assert jax.config.jax_enable_x64
    sample = jax.jit(jax.vmap(TARGETS[name][0]().sample))
    return np.asarray(sample(jax.random.split(jax.random.key(0), num)))


@each_target
def test_log_z_and_moments_by_quadrature(name, x64):
    target, points, log_w = quadrature(name)
    energies = energies_of(target, points)
    assert energies.dtype == jnp.float64
    terms = np.exp(log_w - energies)
    log_z = np.log(terms.sum())
    np.testing.assert_allclose(log_z, target.log_z, atol=1e-7)
    assert abs(log_z - (target.log_z + np.log(2.0))) > 0.1  # and a factor of 2 would show
    law = terms / terms.sum()
    mean = law @ np.asarray(points)
    centred = np.asarray(points) - mean
    covariance = (centred * law[:, None]).T @ centred
    np.testing.assert_allclose(mean, target.moments.mean, atol=1e-5)
    np.testing.assert_allclose(covariance, target.moments.covariance, rtol=1e-5, atol=1e-5)


def moment_z_scores(target, draws):
    """Independent draws: SE from the stated variance, and from the draws for second moments."""
    centred = np.asarray(draws, np.float64) - np.asarray(target.moments.mean)
    variance, num = np.diag(target.moments.covariance), len(draws)
    products = centred[:, :, None] * centred[:, None, :]
    z_mean = centred.mean(0) / np.sqrt(variance / num)
    error = products.mean(0) - np.asarray(target.moments.covariance)
    z_covariance = error / np.sqrt(products.var(0) / num)
    return np.abs(np.concatenate([z_mean, z_covariance.ravel()]))


@each_target
def test_samples_have_the_moments(name, x64):
    target = TARGETS[name][0]()
    draws = draws_of(name)
    assert draws.shape == (20_000, *target.event_shape)
    assert moment_z_scores(target, draws).max() < 5.0
    assert moment_z_scores(target, 1.08 * draws).max() > 5.0  # the control: 8 % too wide


@each_target
def test_samples_have_the_energy(name, x64):
    """E under the law, a moment that sees shape: mean over draws against quadrature."""
    target, points, log_w = quadrature(name)
    energies = energies_of(target, points)
    law = np.exp(log_w - energies - target.log_z)
    entropy = np.sum(law * np.where(law > 0, energies, 0.0))
    draws = draws_of(name)
    drawn = energies_of(target, draws)
    standard_error = drawn.std() / np.sqrt(len(drawn))
    assert abs(drawn.mean() - entropy) < 5.0 * standard_error
    wide = energies_of(target, 1.1 * draws)
    assert abs(wide.mean() - entropy) > 5.0 * standard_error


def test_energies_are_those_of_distrax(x64):
    import distrax  # as slow to import as it is, only here

    mixture = distrax.MixtureSameFamily(
        distrax.Categorical(probs=jnp.array([1.0, 2.0, 5.0]) / 8.0),
        distrax.MultivariateNormalDiag(jnp.asarray(MEANS), jnp.full((3, 2), 0.6)),
    )
    gaussian = distrax.MultivariateNormalFullCovariance(
        jnp.array([0.5, -1.0]), jnp.array(COVARIANCE)
    )
    points = 2.0 * jax.random.normal(jax.random.key(0), (50, 2))
    for name, law in (("gaussian", gaussian), ("gaussian_mixture", mixture)):
        target = TARGETS[name][0]()
        ours = -energies_of(target, points) - target.log_z
        np.testing.assert_allclose(ours, law.log_prob(points), rtol=1e-9, atol=1e-9)


def test_the_funnel_is_a_product_of_normals(x64):
    target = targets.funnel()
    points = jax.random.normal(jax.random.key(0), (50, *target.event_shape))
    log_normal = jax.scipy.stats.norm.logpdf
    expected = log_normal(points[:, 0], 0.0, 3.0) + log_normal(
        points[:, 1:], 0.0, jnp.exp(0.5 * points[:, :1])
    ).sum(-1)
    np.testing.assert_allclose(-energies_of(target, points), expected)
    np.testing.assert_allclose(np.diag(target.moments.covariance)[1:], np.exp(4.5))


def test_rings_are_circles_with_round_noise(x64):
    """The density as the mean of Gaussians along each circle, written as it is said."""
    radii, deviation = (0.75, 1.5, 3.0), 0.2
    target = targets.rings(radii, deviation)
    points = 2.0 * jax.random.normal(jax.random.key(0), (50, 2))
    angle = 2.0 * np.pi * np.arange(400) / 400
    circle = np.stack([np.cos(angle), np.sin(angle)], -1)
    centres = np.concatenate([radius * circle for radius in radii])
    square = np.square(np.asarray(points)[:, None] - centres).sum(-1)
    log_density = -0.5 * square / deviation**2 - np.log(2.0 * np.pi * deviation**2)
    expected = jax.nn.logsumexp(log_density, axis=1) - np.log(len(centres))
    np.testing.assert_allclose(-energies_of(target, points), expected, rtol=1e-9)
    radius = np.linalg.norm(points, axis=1)[:, None]
    plain = -0.5 * np.square((radius - np.array(radii)) / deviation)  # the control: no Bessel
    plain = jax.nn.logsumexp(plain, axis=1)
    assert np.ptp(plain - expected) > 0.1


def test_the_pinwheel_winds_one_way(x64):
    """Mirrored draws have the same radii and moments, and are seen in the mean energy."""
    target, points, log_w = quadrature("pinwheel")
    energies = energies_of(target, points)
    entropy = np.sum(np.exp(log_w - energies) * np.minimum(energies, 1e3))
    draws = draws_of("pinwheel")
    mirrored = energies_of(target, draws * np.array([1.0, -1.0]))
    assert abs(mirrored.mean() - entropy) > 5.0 * mirrored.std() / np.sqrt(len(draws))


def turned(angle, f):
    cosine, sine = jnp.cos(angle), jnp.sin(angle)
    return jnp.stack([cosine * f[0] - sine * f[1], sine * f[0] + cosine * f[1]])


def test_winding_by_the_radius_keeps_area(x64):
    """So the density of the wound point is that of the features; by f_0 it would not be."""
    features = jax.random.normal(jax.random.key(0), (20, 2))
    volume = lambda wind: jax.vmap(lambda f: jnp.linalg.det(jax.jacfwd(wind)(f)))(features)  # noqa: E731
    by_radius = lambda f: turned(0.25 * jnp.exp(jnp.linalg.norm(f)), f)  # noqa: E731
    by_feature = lambda f: turned(0.25 * jnp.exp(f[0]), f)  # noqa: E731
    np.testing.assert_allclose(volume(by_radius), 1.0, rtol=1e-10)
    stated = 1.0 - 0.25 * jnp.exp(features[:, 0]) * features[:, 1]
    np.testing.assert_allclose(volume(by_feature), stated, rtol=1e-10)

    def error(wind):
        energies = energies_of(targets.pinwheel(), jax.vmap(wind)(features))
        arms = jax.vmap(lambda k: turned(0.4 * jnp.pi * k, features.T).T)(jnp.arange(5.0))
        scaled = (arms - np.array([1.0, 0.0])) / np.array([0.3, 0.1])
        log_p = jax.nn.logsumexp(-0.5 * jnp.sum(scaled**2, -1), axis=0)
        return np.abs(energies + log_p - np.log(5 * 2 * np.pi * 0.03)).max()

    assert error(by_radius) < 1e-9
    assert error(by_feature) > 1.0


@each_target
def test_modes_are_stationary_and_lowest_nearby(name, x64):
    """Means of a mixture are its modes up to the pull of the other components."""
    target = TARGETS[name][0]()
    if target.modes is None:
        assert name in ("ring", "rings")
        return
    gradient = jax.jit(jax.vmap(jax.grad(target.energy, 1), (None, 0)))((), target.modes)
    tolerance = {"gaussian_mixture": 2e-2, "forty_gaussians": 0.5}.get(name, 1e-6)
    assert np.abs(gradient).max() < tolerance
    here = energies_of(target, target.modes)
    for shift in np.concatenate([np.eye(2), -np.eye(2)]):
        there = energies_of(target, target.modes + 0.5 * shift)
        assert name == "forty_gaussians" or np.all(there > here)


def test_double_well_has_two_minima_and_the_tilted_side_is_deeper():
    target = targets.double_well(tilt=0.5)
    assert target.modes.shape == (2, 2)
    left, right = energies_of(target, target.modes)
    assert right < left
    assert target.moments.mean[0] > 0


@pytest.mark.parametrize("x64_mode", [False, True])
@each_target
def test_dtype_follows_the_position(name, x64_mode):
    with jax.enable_x64(x64_mode):
        target = TARGETS[name][0]()
        x = jax.ShapeDtypeStruct((2,), jnp.float32)
        energy, gradient = jax.eval_shape(jax.value_and_grad(target.energy, 1), (), x)
        assert (energy.dtype, gradient.dtype) == (jnp.float32, jnp.float32)
        assert energy.shape == ()


ERRORS = {
    "ranks": (lambda: targets.gaussian([[0.0]], [[1.0]]), "mean has shape"),
    "sizes": (lambda: targets.gaussian([0.0, 0.0], [[1.0]]), "covariance"),
    "indefinite": (lambda: targets.gaussian([0.0] * 2, [[1, 2], [2, 1]]), "positive definite"),
    "negative": (lambda: targets.gaussian([0.0] * 2, [[-1, 0], [0, -1]]), "positive definite"),
    "asymmetric": (lambda: targets.gaussian([0.0] * 2, [[1, 0.9], [0, 1]]), "symmetric"),
    "means": (lambda: targets.gaussian_mixture([1.0, 2.0], 1.0), r"\[K, D\]"),
    "weights": (lambda: targets.gaussian_mixture(MEANS, 1.0, [1.0]), "3 positive"),
    "zero weight": (lambda: targets.gaussian_mixture(MEANS, 1.0, [1.0, 0.0, 1.0]), "positive"),
    "deviation": (lambda: targets.gaussian_mixture(MEANS, -0.5), "-0.5"),
    "funnel": (lambda: targets.funnel(dim=1), "dim is 1"),
    "odd wells": (lambda: targets.many_well(3), "dim is 3"),
    "condition": (lambda: targets.ill_conditioned_gaussian(5, 0.5), "0.5"),
    "variance": (lambda: targets.diagonal_gaussian([0.0], [0.0]), "positive"),
    "noise": (lambda: targets.conjugate_gaussian(noise=0.0), "noise is 0.0"),
    "observation": (lambda: targets.conjugate_gaussian(3, observation=[1.0]), r"\(1,\)"),
    "rosenbrock": (lambda: targets.rosenbrock(2, a=-1.0), "-1.0"),
    "ring": (lambda: targets.ring(radius=0.0), "radius is 0.0"),
    "rings": (lambda: targets.rings((1.0, -2.0)), "-2.0"),
    "no rings": (lambda: targets.rings(()), r"radii are \(\)"),
    "arms": (lambda: targets.pinwheel(2), "num_arms is 2"),
    "arm": (lambda: targets.pinwheel(tangential_deviation=0.0), "0.0"),
    "moons": (lambda: targets.two_moons(horizontal_deviation=-2.0), "-2.0"),
    "checkerboard": (lambda: targets.checkerboard(1), "num_cells is 1"),
    "one particle": (lambda: targets.lennard_jones(1), "num_particles is 1"),
    "depth": (lambda: targets.lennard_jones(depth=0.0), "depth is 0.0"),
    "grid": (lambda: targets.log_gaussian_cox(0), "grid_size is 0"),
    "counts": (lambda: targets.log_gaussian_cox(3, counts=np.zeros((2, 3))), r"\(2, 3\)"),
    "points": (lambda: targets.count_points([0.1, 0.2], 4), r"\(2,\)"),
    "outside": (lambda: targets.count_points([[0.1, 1.2]], 4), "unit square"),
    "data": (lambda: targets.logistic_regression("iris"), "iris"),
    "rows": (lambda: targets.logistic_regression((np.eye(3), [0, 1])), r"\(2,\)"),
    "labels": (lambda: targets.logistic_regression((np.eye(2), [1, 2])), "0 and 1"),
    "constant": (lambda: targets.logistic_regression((np.ones((2, 1)), [0, 1])), "constant"),
    "prior": (lambda: targets.logistic_regression("wine", prior_scale=0.0), "0.0"),
    "start": (lambda: targets.laplace_approximation(abs, (), jnp.ones((1, 1))), r"\(1, 1\)"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors_name_the_value(name):
    build, message = ERRORS[name]
    with pytest.raises(ValueError, match=message):
        build()

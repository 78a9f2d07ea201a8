"""Targets beyond quadrature: identities under the exact law, closed forms, invariances."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params

from ebjax.energies import targets
from ebjax.energies.targets.reductions import half_quadratic_form, repeated, total

SAMPLED = {
    "gaussian_mixture": lambda: targets.gaussian_mixture(2.0 * np.eye(9), 0.5),
    "ill_conditioned": targets.ill_conditioned_gaussian,
    "ill_conditioned_rotated": lambda: targets.ill_conditioned_gaussian(30, seed=0),
    "funnel": targets.funnel,
    "many_well": targets.many_well,
    "rosenbrock": lambda: targets.rosenbrock(5),
    "rings": targets.rings,
    "pinwheel": targets.pinwheel,
    "eight_schools": targets.eight_schools,
    "eight_schools_centred": lambda: targets.eight_schools(is_centred=True),
    "cox_prior": lambda: targets.log_gaussian_cox(4).prior,
}
UNSAMPLED = {
    "logistic_regression": targets.logistic_regression,
    "log_gaussian_cox": lambda: targets.log_gaussian_cox(5),
    "log_gaussian_cox_whitened": lambda: targets.log_gaussian_cox(5, is_whitened=True),
    "log_gaussian_cox_fitted": lambda: targets.log_gaussian_cox(5, is_fitted=True),
    "lennard_jones": lambda: targets.lennard_jones(4),
}


def draws_of(target, num=20_000):
    keys = jax.random.split(jax.random.key(0), num)
    return np.asarray(jax.jit(jax.vmap(target.sample))(keys))


def z_scores(values, truth):
    values = np.asarray(values, np.float64)
    return np.abs(values.mean(0) - truth) / (values.std(0) / np.sqrt(len(values)))


@pytest.mark.parametrize("name", SAMPLED)
def test_samples_satisfy_the_identities_of_stein(name, x64):
    """E[∇E] = 0, E[x_d ∂E/∂x_d] = 1: integration by parts under the law exp(-E)."""
    target = SAMPLED[name]()
    draws = draws_of(target)
    gradient = jax.jit(jax.vmap(jax.grad(target.energy, 1), (None, 0)))

    def worst(draws):
        g = np.asarray(gradient((), draws))
        parts = draws * g
        whole = z_scores(parts.sum(1), parts.shape[1])
        return max(z_scores(g, 0.0).max(), z_scores(parts, 1.0).max(), whole)

    assert worst(draws) < 5.0
    assert worst(1.05 * draws) > 5.0  # the control: 5 % too wide
    if target.moments is not None:
        centred = np.asarray(draws) - np.asarray(target.moments.mean)
        scores = z_scores(centred, 0.0)
        spread = z_scores(centred**2, np.diag(target.moments.covariance))
        # The funnel's squares have no variance to speak of, only the first is tested.
        assert scores.max() < 5.0
        assert (spread[:1] if name == "funnel" else spread).max() < 5.0


def test_many_well_has_the_published_log_z():
    target = targets.many_well()
    np.testing.assert_allclose(target.log_z, 164.69568, atol=5e-6)
    assert target.modes is None
    assert targets.many_well(8).modes.shape == (16, 8)


def test_many_well_is_a_sum_of_double_wells(x64):
    many, one = targets.many_well(6, tilt=0.7), targets.double_well(tilt=0.7)
    x = jax.random.normal(jax.random.key(0), (6,))
    parts = [one.energy((), x[i : i + 2]) for i in (0, 2, 4)]
    np.testing.assert_allclose(many.energy((), x), sum(parts), rtol=1e-12)
    np.testing.assert_allclose(many.log_z, 3 * one.log_z)
    gradient = jax.vmap(jax.grad(many.energy, 1), (None, 0))((), many.modes)
    assert np.abs(gradient).max() < 1e-9


def plain_form(precision):
    return lambda c: 0.5 * c @ jnp.asarray(precision) @ c


def test_the_quadratic_form_is_exact_to_second_order(x64):
    root = np.random.default_rng(0).normal(size=(5, 5))
    precision = root @ root.T
    ours, plain = half_quadratic_form(precision), plain_form(precision)
    c = np.random.default_rng(1).normal(size=5)
    for derivative in (lambda f: f, jax.grad, jax.hessian, lambda f: jax.jacfwd(jax.jacfwd(f))):
        values = jax.jit(derivative(ours))(c), jax.jit(derivative(plain))(c)
        np.testing.assert_allclose(*values, rtol=1e-10)

    def stopped(c):  # first order alone, as a stopped gradient would have it
        product = jax.lax.stop_gradient(jnp.asarray(precision) @ c)
        return c @ product

    np.testing.assert_allclose(jax.grad(stopped)(c), jax.grad(plain)(c))
    assert np.abs(jax.hessian(stopped)(c) - precision).max() > 0.1  # the control


def num_products(energy, dim):
    jaxpr = jax.make_jaxpr(jax.value_and_grad(energy))(jnp.ones(dim))
    return str(jaxpr).count("dot_general")


def test_the_gaussian_takes_one_product_with_its_precision():
    precision = np.eye(20) + 0.1
    assert num_products(half_quadratic_form(precision), 20) == 1
    assert num_products(lambda c: 0.5 * jnp.sum(c * (precision @ c)), 20) == 2  # the control


def test_sums_are_sums(x64):
    terms = jax.random.normal(jax.random.key(0), (50,))
    np.testing.assert_allclose(total(terms), terms.sum())


def test_repeated_numbers_have_the_derivatives_of_a_broadcast(x64):
    weights = np.random.default_rng(0).normal(size=6)

    def energy(copy):
        return lambda x: jnp.sum(weights * jnp.sin(copy(x[0]) + weights) * copy(x[1]) ** 2)

    ours = energy(lambda x: repeated(x, 6))
    plain = energy(lambda x: jnp.broadcast_to(x, (6,)))
    x = jnp.array([0.3, -1.2])
    for derivative in (
        lambda f: f,
        jax.grad,
        jax.jacfwd,
        jax.hessian,
        lambda f: jax.grad(lambda x: jnp.sum(jax.grad(f)(x) ** 2)),
    ):
        np.testing.assert_allclose(jax.jit(derivative(ours))(x), derivative(plain)(x), rtol=1e-12)


def test_the_gradient_of_a_mixture_sums_components_by_products():
    """But for the two sums of a log-sum-exp, which has nothing to do with the dimensions."""
    means = np.random.default_rng(0).normal(size=(7, 2))
    energy = targets.gaussian_mixture(means, 0.5).energy

    def sizes(jaxpr, name):
        for equation in jaxpr.eqns:
            if equation.primitive.name == name:
                yield max(variable.aval.size for variable in equation.invars)
            for inner in jaxprs_in_params(equation.params):
                yield from sizes(inner, name)

    jaxpr = jax.make_jaxpr(jax.grad(lambda x: energy((), x)))(jnp.ones(2)).jaxpr
    assert list(sizes(jaxpr, "reduce_sum")).count(7) == 2
    assert list(sizes(jaxpr, "dot_general")) == [7, 7]


def test_rotations_keep_the_variances():
    plain = targets.ill_conditioned_gaussian(40)
    rotated = targets.ill_conditioned_gaussian(40, seed=5)
    again = targets.ill_conditioned_gaussian(40, seed=5)
    np.testing.assert_array_equal(rotated.moments.covariance, again.moments.covariance)
    np.testing.assert_allclose(
        np.linalg.eigvalsh(rotated.moments.covariance), np.logspace(-2, 2, 40), rtol=1e-3
    )
    assert rotated.log_z == plain.log_z


@pytest.mark.parametrize("name", {**SAMPLED, **UNSAMPLED})
def test_energies_and_gradients_are_finite_far_out(name):
    """In float32, at the origin too."""
    target = {**SAMPLED, **UNSAMPLED}[name]()
    directions = jax.random.normal(jax.random.key(0), (3, *target.event_shape))
    points = jnp.concatenate([scale * directions for scale in (0.0, 1.0, 10.0)])
    points = points[3:] if name == "lennard_jones" else points  # infinite all at one place
    energies, gradients = jax.jit(jax.vmap(jax.value_and_grad(target.energy, 1), (None, 0)))(
        (), points
    )
    assert jnp.isfinite(energies).all()
    assert jnp.isfinite(gradients).all()
    assert (energies.dtype, gradients.dtype) == (jnp.float32, jnp.float32)


@pytest.mark.parametrize("name", UNSAMPLED)
def test_gradients_are_those_of_finite_differences(name, x64):
    """Where no exact draws are there to test them, as Stein's identities do."""
    target = UNSAMPLED[name]()
    x, direction = 0.5 + 0.5 * np.random.default_rng(0).normal(size=(2, *target.event_shape))
    evaluate = jax.jit(jax.value_and_grad(target.energy, 1))
    slope = (evaluate((), x + 1e-6 * direction)[0] - evaluate((), x - 1e-6 * direction)[0]) / 2e-6
    np.testing.assert_allclose(evaluate((), x)[1] @ direction, slope, rtol=1e-4)


def test_curvature_at_the_symmetric_point_of_the_moons(x64):
    """Forms through |x0| have no second derivative there; this one has."""
    target = targets.two_moons()
    x = jnp.array([0.0, 1.5])
    gradient = jax.jit(jax.grad(target.energy, 1))
    step = np.array([1e-6, 0.0])
    expected = (gradient((), x + step) - gradient((), x - step))[0] / 2e-6
    np.testing.assert_allclose(
        jax.jit(jax.hessian(target.energy, 1))((), x)[0, 0], expected, rtol=1e-6
    )


def test_checkerboard():
    target = targets.checkerboard()
    draws = draws_of(target, 4_000)
    energies = jax.jit(jax.vmap(target.energy, (None, 0)))
    draws = np.asarray(draws)
    assert (energies((), draws) == 0.0).all()
    assert jnp.isposinf(energies((), draws + np.array([2.0, 0.0], np.float32))).all()
    centred = draws - np.asarray(target.moments.mean)
    assert z_scores(centred, 0.0).max() < 5.0
    products = centred[:, :, None] * centred[:, None, :]
    assert z_scores(products, target.moments.covariance).max() < 5.0
    axis = (np.arange(200) + 0.5) * 0.05 - 5.0
    grid = np.stack(np.meshgrid(axis, axis), -1).reshape(-1, 2)
    area = np.exp(-energies((), grid)).sum() * 0.05**2
    np.testing.assert_allclose(np.log(area), target.log_z, rtol=1e-5)
    energy, gradient = jax.value_and_grad(target.energy, 1)((), jnp.array([9.0, 0.0]))
    assert jnp.isposinf(energy)
    assert (gradient == 0.0).all()


def icosahedron():
    golden = (1.0 + np.sqrt(5.0)) / 2.0
    faces = [np.roll([0.0, s, t * golden], k) for k in range(3) for s in (1, -1) for t in (1, -1)]
    return np.concatenate([np.zeros((1, 3)), faces])


def test_the_icosahedron_has_the_known_energy_of_thirteen_particles(x64):
    """-44.326801: the global minimum of 13 particles of unit depth (Cambridge cluster database)."""
    target = targets.lennard_jones(13, depth=1.0, oscillator=1e-12)
    scales = np.linspace(0.45, 0.55, 10_001)
    shape = icosahedron().ravel()
    energies = jax.jit(jax.vmap(lambda s: target.energy((), s * shape)))(scales)
    np.testing.assert_allclose(energies.min(), -44.326801, atol=1e-6)
    gradient = jax.grad(target.energy, 1)((), scales[energies.argmin()] * shape)
    assert np.abs(gradient).max() < 1e-2
    doubled = targets.lennard_jones(13, oscillator=1e-12).energy((), 0.5 * shape)
    np.testing.assert_allclose(doubled, 2.0 * target.energy((), 0.5 * shape))


def test_particles_may_be_turned_and_exchanged(x64):
    target = targets.lennard_jones(5, depth=1.3, distance=0.8, oscillator=0.7)
    x = np.random.default_rng(1).normal(size=(5, 3))
    energy = jax.jit(lambda x: target.energy((), x))
    here = energy(x.ravel())
    turn = np.linalg.qr(np.random.default_rng(0).normal(size=(3, 3)))[0]
    np.testing.assert_allclose(energy((x @ turn).ravel()), here, rtol=1e-12)
    np.testing.assert_allclose(energy(x[::-1].ravel()), here, rtol=1e-12)
    # The centre is an independent Gaussian of precision n k.
    centre, shift = x.mean(0), np.array([0.3, -1.0, 2.0])
    moved = energy((x + shift).ravel())
    expected = 0.5 * 5 * 0.7 * (np.sum((centre + shift) ** 2) - np.sum(centre**2))
    np.testing.assert_allclose(moved - here, expected, rtol=1e-9)
    assert abs(energy((x * 1.1).ravel()) - here) > 0.1  # the control


def test_two_particles_by_hand(x64):
    target = targets.lennard_jones(2, depth=3.0, distance=1.5, oscillator=0.5)
    x = jnp.array([1.0, 0.0, 0.0, -1.0, 0.0, 0.0])
    ratio = (1.5 / 2.0) ** 6
    np.testing.assert_allclose(target.energy((), x), 3.0 * (ratio**2 - 2.0 * ratio) + 0.5)

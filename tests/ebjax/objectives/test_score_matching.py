"""Score matching: its gradient is that of the Fisher divergence, in each of its forms."""

import functools
import importlib
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ebjax.energies import mlp_energy
from ebjax.objectives.score_matching import (
    draw_slices,
    finite_difference_score_matching,
    finite_difference_score_matching_loss,
    score_matching,
    score_matching_loss,
    sliced_score_matching,
    sliced_score_matching_loss,
)

module = importlib.import_module("ebjax.objectives.score_matching")

DIM = 3
SIGNS = np.array(list(itertools.product([-1.0, 1.0], repeat=DIM)))
NETWORK = mlp_energy((8,))


def gaussian_energy(params, x):
    centred = x - params["mean"]
    return 0.5 * centred @ params["precision"] @ centred


def gaussian_setting():
    """Parameters away from the optimum, and data that are no Gaussian sample but have moments."""
    rng = np.random.default_rng(0)
    root = rng.normal(size=(DIM, DIM))
    params = {
        "mean": jnp.asarray(rng.normal(size=DIM)),
        "precision": jnp.asarray(root @ root.T + np.eye(DIM)),
    }
    return params, jnp.asarray(rng.exponential(size=(6, DIM)) @ rng.normal(size=(DIM, DIM)))


def optimum(data, noise_variance=0.0):
    covariance = np.cov(data.T, bias=True) + noise_variance * np.eye(DIM)
    return {"mean": jnp.mean(data, 0), "precision": jnp.asarray(np.linalg.inv(covariance))}


def fisher_gradient(params, data, noise_variance=0.0):
    """Of ``½ E|∇E + ∇log p|²`` for Gaussian p with the moments of the (noisy) data, in closed form.

    With A the precision, d = m - E x and M = E (x - m)(x - m)':  A² d  and  (A M + M A)/2 - I.
    """
    mean, precision, data = (np.asarray(a) for a in (params["mean"], params["precision"], data))
    centred = data - mean
    second = centred.T @ centred / len(data) + noise_variance * np.eye(DIM)
    return {
        "mean": precision @ precision @ (mean - data.mean(0)),
        "precision": 0.5 * (precision @ second + second @ precision) - np.eye(DIM),
    }


def gradient_of(objective, params, data):
    keys = jax.random.split(jax.random.key(3), len(data))
    run = jax.jit(jax.grad(objective.loss, has_aux=True))
    return run(params, objective.init(None, params, data), keys, data)[0]


def difference(first, second):
    return max(np.abs(np.asarray(first[name]) - np.asarray(second[name])).max() for name in second)


def all_signs(key, num_slices, dim, slices, dtype):
    """Every sign vector once, in place of random ones: the exact mean over slices."""
    assert (num_slices, dim, slices) == (len(SIGNS), DIM, "rademacher")
    return jnp.asarray(SIGNS, dtype)


OBJECTIVES = {
    "implicit": lambda: score_matching(gaussian_energy),
    "sliced": lambda: sliced_score_matching(
        gaussian_energy, num_slices=len(SIGNS), variance_reduced=False
    ),
    "variance_reduced": lambda: sliced_score_matching(gaussian_energy, num_slices=len(SIGNS)),
    # Central differences of a quadratic are exact whatever the step.
    "finite_difference": lambda: finite_difference_score_matching(
        gaussian_energy, num_slices=len(SIGNS), epsilon=0.3
    ),
}
TERMS = {
    "implicit": "_implicit_terms",
    "sliced": "_sliced_terms",
    "finite_difference": "_finite_difference_terms",
}
BUGS = {
    "the half is dropped": lambda half_square, laplacian: (2.0 * half_square, laplacian),
    "the sign of the trace": lambda half_square, laplacian: (half_square, -laplacian),
    "the trace is halved": lambda half_square, laplacian: (half_square, 0.5 * laplacian),
}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_gradient_is_that_of_the_fisher_divergence(name, monkeypatch, x64):
    monkeypatch.setattr(module, "draw_slices", all_signs)
    params, data = gaussian_setting()
    gradient = gradient_of(OBJECTIVES[name](), params, data)
    assert difference(gradient, fisher_gradient(params, data)) < 1e-10
    at_optimum = gradient_of(OBJECTIVES[name](), optimum(data), data)
    assert difference(at_optimum, jax.tree.map(jnp.zeros_like, at_optimum)) < 1e-10


@pytest.mark.parametrize("bug", BUGS)
@pytest.mark.parametrize("name", TERMS)
def test_the_check_sees_wrong_terms(name, bug, monkeypatch, x64):
    monkeypatch.setattr(module, "draw_slices", all_signs)
    right = getattr(module, TERMS[name])
    wrong = lambda *args, **options: BUGS[bug](*right(*args, **options))  # noqa: E731
    monkeypatch.setattr(module, TERMS[name], wrong)
    params, data = gaussian_setting()
    gradient = gradient_of(OBJECTIVES[name](), params, data)
    assert difference(gradient, fisher_gradient(params, data)) > 0.1


def test_the_loss_is_the_fisher_divergence_up_to_a_constant(x64):
    """By quadrature in 1-D, for a law and a model that are not Gaussian."""
    x = jnp.linspace(-5.0, 5.0, 2001)
    log_p = -(x**4) / 4 + x**2 / 2 + 0.5 * x
    density = jnp.exp(log_p) / jnp.exp(log_p).sum()
    score = -(x**3) + x + 0.5

    def energy_fn(params, x):
        return params[0] * x**4 + params[1] * jnp.sin(2.0 * x) + params[2] * x

    @functools.partial(jax.jit, static_argnums=1)
    def constant(params, sign=1.0):
        losses = jax.vmap(lambda point: score_matching_loss(energy_fn, params, point))(x)
        slopes = jax.vmap(jax.grad(energy_fn, 1), (None, 0))(params, x)
        return density @ losses - density @ (0.5 * jnp.square(slopes + sign * score))

    points = jax.random.normal(jax.random.key(0), (4, 3))
    constants = np.array([constant(p) for p in points])
    np.testing.assert_allclose(constants, -0.5 * density @ jnp.square(score), rtol=1e-6)
    assert np.ptp([constant(p, -1.0) for p in points]) > 0.1  # the model's score is -∇E


@pytest.mark.parametrize("shape", [(), (4,), (2, 2)])
def test_the_laplacian_is_the_trace_of_the_hessian(shape, x64):
    params = jax.jit(NETWORK.init)(jax.random.key(0), jnp.zeros(shape))
    x = jax.random.normal(jax.random.key(1), shape)
    energy_fn = lambda flat: NETWORK.apply(params, flat.reshape(shape))  # noqa: E731
    derivatives = jax.jit(lambda flat: (jax.grad(energy_fn)(flat), jax.hessian(energy_fn)(flat)))
    gradient, hessian = derivatives(x.ravel())
    loss = jax.jit(lambda x: score_matching_loss(NETWORK.apply, params, x))(x)
    np.testing.assert_allclose(loss, 0.5 * gradient @ gradient - jnp.trace(hessian), rtol=1e-9)


def test_examples_may_be_pytrees_and_energies_take_context(x64):
    energy_fn = lambda params, x, c: params * c * jnp.sum(x["a"] ** 2) + x["b"] ** 4  # noqa: E731
    x = {"a": jnp.ones((2,)), "b": jnp.array(0.5)}
    loss = score_matching_loss(energy_fn, 3.0, x, 2.0)
    # ∇ = (12, 12, 4 b³),  Δ = 12 + 12 + 12 b²
    np.testing.assert_allclose(loss, 0.5 * (144 + 144 + 0.25) - (24 + 3))


def network_setting(dim=DIM):
    params = jax.jit(NETWORK.init)(jax.random.key(0), jnp.zeros(dim))
    params = jax.tree.map(lambda leaf: 2.0 * leaf.astype(float), params)
    return params, jax.random.normal(jax.random.key(1), (dim,))


def sliced_losses(num, dim=DIM, **options):
    params, x = network_setting(dim)
    keys = jax.random.split(jax.random.key(2), num)
    loss = lambda key: sliced_score_matching_loss(NETWORK.apply, params, x, key, **options)  # noqa: E731
    exact = score_matching_loss(NETWORK.apply, params, x)
    return np.asarray(jax.jit(jax.vmap(loss))(keys)), float(exact)


@pytest.mark.parametrize("slices", ["gaussian", "sphere", "rademacher"])
def test_slices_are_right_on_average(slices, x64):
    """Within five standard errors, and the variance-reduced form is the less noisy one."""
    spread = {}
    for variance_reduced in (False, True):
        losses, exact = sliced_losses(20_000, slices=slices, variance_reduced=variance_reduced)
        spread[variance_reduced] = losses.std()
        assert abs(losses.mean() - exact) < 5.0 * losses.std() / np.sqrt(len(losses))
    assert spread[True] < spread[False]


def test_the_average_sees_slices_on_the_unit_sphere(monkeypatch, x64):
    unit = lambda *args: draw_slices(*args) / np.sqrt(DIM)  # noqa: E731
    monkeypatch.setattr(module, "draw_slices", unit)
    losses, exact = sliced_losses(20_000, slices="sphere", variance_reduced=False)
    assert abs(losses.mean() - exact) > 5.0 * losses.std() / np.sqrt(len(losses))


@pytest.mark.parametrize("slices", ["rademacher", "sphere"])
@pytest.mark.parametrize("variance_reduced", [False, True])
def test_in_one_dimension_slices_are_exact(slices, variance_reduced, x64):
    losses, exact = sliced_losses(5, 1, slices=slices, variance_reduced=variance_reduced)
    np.testing.assert_allclose(losses, exact, rtol=1e-10)


def test_more_slices_average(x64):
    few, _ = sliced_losses(4000, slices="gaussian")
    many, _ = sliced_losses(4000, slices="gaussian", num_slices=4)
    # Variances of 4,000 draws; the ratio of standard deviations is 2, known to some per cent.
    assert 1.7 < few.std() / many.std() < 2.3


@pytest.mark.parametrize("slices", module.SLICES)
def test_slices_have_unit_covariance(slices):
    directions = np.asarray(draw_slices(jax.random.key(0), 40_000, DIM, slices))
    second = directions.T @ directions / len(directions)
    # An entry is a mean of products, each of variance 3 at most.
    assert np.abs(second - np.eye(DIM)).max() < 5.0 * np.sqrt(3.0 / len(directions))
    if slices == "sphere":
        np.testing.assert_allclose(np.square(directions).sum(1), DIM, rtol=1e-5)
    if slices == "rademacher":
        np.testing.assert_array_equal(np.abs(directions), 1.0)


def errors_of_differences():
    params, x = network_setting()
    key = jax.random.key(4)
    exact = sliced_score_matching_loss(NETWORK.apply, params, x, key, variance_reduced=False)
    run = jax.jit(
        lambda epsilon: finite_difference_score_matching_loss(
            NETWORK.apply, params, x, key, epsilon=epsilon
        )
    )
    return np.array([abs(run(epsilon) - exact) for epsilon in (2e-3, 1e-3, 5e-4)])


def test_differences_err_by_the_square_of_the_step(x64):
    errors = errors_of_differences()
    np.testing.assert_allclose(errors[:-1] / errors[1:], 4.0, rtol=0.05)


def test_the_order_check_sees_one_sided_differences(monkeypatch, x64):
    right = module._finite_difference_terms

    def one_sided(energy_fn, params, x, key, *, epsilon, num_slices, slices):
        _, curvature = right(
            energy_fn, params, x, key, epsilon=epsilon, num_slices=num_slices, slices=slices
        )
        steps = epsilon * draw_slices(key, num_slices, x.size, slices, x.dtype)
        rise = jax.vmap(lambda v: energy_fn(params, x + v) - energy_fn(params, x))(steps)
        return 0.5 * jnp.square(rise / epsilon).mean(), curvature

    monkeypatch.setattr(module, "_finite_difference_terms", one_sided)
    errors = errors_of_differences()
    assert np.all(errors[:-1] / errors[1:] < 3.0)


def test_metrics_say_when_the_model_is_right(x64):
    """There the mean of |∇E|² is that of ΔE, and the loss minus half of each."""
    _, data = gaussian_setting()
    objective, keys = score_matching(gaussian_energy), jax.random.split(jax.random.key(0), 6)
    loss, (carry, metrics) = objective.loss(optimum(data), (), keys, data)
    assert carry == ()
    np.testing.assert_allclose(metrics["square_gradient"], metrics["laplacian"], rtol=1e-9)
    np.testing.assert_allclose(loss, -0.5 * metrics["laplacian"], rtol=1e-9)


ERRORS = {
    "num_slices is 0": lambda: sliced_score_matching(gaussian_energy, num_slices=0),
    "slices is 'axes'": lambda: sliced_score_matching(gaussian_energy, slices="axes"),
    "epsilon is 0.0": lambda: finite_difference_score_matching(gaussian_energy, epsilon=0.0),
    "epsilon is nan": lambda: finite_difference_score_matching(
        gaussian_energy, epsilon=float("nan")
    ),
}


@pytest.mark.parametrize("sentence", ERRORS)
def test_errors_name_the_value(sentence):
    with pytest.raises(ValueError, match=sentence):
        ERRORS[sentence]()

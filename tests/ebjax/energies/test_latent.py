"""Latent variables summed, integrated and minimised out, against closed forms."""

import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ebjax.energies.latent import (
    Nodes,
    infer_latent,
    interval_nodes,
    latent_posterior,
    marginalize,
    minimize_latent,
    minimize_over,
    variational_free_energy,
)

module = importlib.import_module("ebjax.energies.latent")

NUM_STATES = 5
STATES = jnp.arange(NUM_STATES)


def squared_distance(means, x, z):
    """k-means and Gaussian mixtures: E = |x - W_z|²."""
    return jnp.sum((x - means[z]) ** 2)


def points():
    generator = np.random.default_rng(0)
    return jnp.asarray(generator.normal(size=(NUM_STATES, 2))), jnp.asarray(generator.normal(2))


def free_energies(means, x, beta):
    return marginalize(squared_distance, STATES, inverse_temperature=beta)(means, x)


@pytest.mark.parametrize("beta", [0.1, 1.0, 10.0, 1e3, 1e6])
def test_bounds_and_limit_of_the_free_energy(x64, beta):
    means, x = points()
    lowest = minimize_over(squared_distance, STATES)(means, x)
    free = free_energies(means, x, beta)
    slack = np.log(NUM_STATES) / beta
    assert lowest - slack - 1e-12 <= free <= lowest + 1e-12
    # A mean over z instead of the sum would break the upper bound.
    assert free + slack > lowest + 1e-9
    if beta >= 1e3:
        assert abs(free - lowest) < 1e-3


def test_the_sum_is_that_of_the_formula(x64):
    means, x = points()
    energies = np.sum((np.asarray(x) - np.asarray(means)) ** 2, axis=1)
    for beta in (0.3, 2.0):
        expected = -np.log(np.exp(-beta * energies).sum()) / beta
        assert abs(free_energies(means, x, beta) - expected) < 1e-12
        posterior = latent_posterior(squared_distance, STATES, means, x, inverse_temperature=beta)
        np.testing.assert_allclose(
            posterior, np.exp(-beta * (energies - expected)), rtol=1e-12, atol=1e-15
        )


def test_the_gradient_is_the_mean_over_the_posterior(x64):
    means, x = points()
    beta = 1.7
    gradient = jax.grad(free_energies)(means, x, beta)
    posterior = latent_posterior(squared_distance, STATES, means, x, inverse_temperature=beta)
    each = jax.vmap(lambda z: jax.grad(squared_distance)(means, x, z))(STATES)
    np.testing.assert_allclose(gradient, jnp.tensordot(posterior, each, 1), atol=1e-12)


def test_energies_of_states_that_are_forbidden():
    """Infinite energies weigh nothing, and their gradient is 0; if all are, so is the result."""
    energy_fn = lambda params, x, z: jnp.where(z < 2, params * x, jnp.inf)  # noqa: E731
    free = marginalize(energy_fn, STATES)
    np.testing.assert_allclose(free(1.5, 2.0), 3.0 - np.log(2.0), rtol=1e-6)
    assert jax.grad(free)(1.5, 2.0) == 2.0
    assert marginalize(lambda p, x, z: jnp.inf + 0.0 * z, STATES)(1.5, 2.0) == jnp.inf


def test_the_variational_bound(x64):
    means, x = points()
    beta = 2.0
    energies = jnp.sum((x - means) ** 2, axis=1)
    exact = free_energies(means, x, beta)
    laws = jax.random.dirichlet(jax.random.key(0), jnp.ones(NUM_STATES), (50,))
    bound = lambda q: variational_free_energy(energies, q, inverse_temperature=beta)  # noqa: E731
    assert np.all(np.asarray(jax.vmap(bound)(laws)) > exact)
    posterior = latent_posterior(squared_distance, STATES, means, x, inverse_temperature=beta)
    assert abs(bound(posterior) - exact) < 1e-12
    assert np.isfinite(bound(jnp.eye(NUM_STATES)[0]))  # 0 log 0 = 0


def gaussian_pair(params, x, z):
    """x | z ~ N(w z, 1) and z ~ N(0, 1), normalised: F_1 = -log N(x; 0, 1 + |w|²)."""
    half = 0.5 * (jnp.sum((x - params * z) ** 2) + jnp.sum(z**2))
    return half + 0.5 * (x.size + z.size) * jnp.log(2 * jnp.pi)


def test_quadrature_of_a_continuous_latent(x64):
    weights, x = jnp.array([1.3, -0.4]), jnp.array([0.7, 2.0])
    covariance = np.eye(2) + np.outer(weights, weights)
    solved = np.linalg.solve(covariance, np.asarray(x))
    log_det = np.linalg.slogdet(covariance)[1]
    exact = 0.5 * (x @ solved + log_det + 2 * np.log(2 * np.pi))
    free = marginalize(gaussian_pair, interval_nodes(-9.0, 9.0, num_points=60))
    assert abs(free(weights, x) - exact) < 1e-9
    np.testing.assert_allclose(jax.grad(free, 1)(weights, x), solved, atol=1e-8)
    # The control: a sum over the nodes that forgets their volume.
    nodes = interval_nodes(-9.0, 9.0, num_points=60)
    assert abs(marginalize(gaussian_pair, nodes.latents)(weights, x) - exact) > 0.1


def test_quadrature_in_two_dimensions(x64):
    nodes = interval_nodes(-1.0, 3.0, num_points=6, num_dimensions=2)
    volume = jnp.exp(nodes.log_weights)
    assert abs(volume.sum() - 16.0) < 1e-12
    mean = volume @ (nodes.latents[:, 0] ** 4 * nodes.latents[:, 1])
    exact = (3.0**5 + 1.0) / 5.0 * (9.0 - 1.0) / 2.0
    assert abs(mean - exact) < 1e-10


def codes(params, x, z):
    """Not convex in the params: a curved decoder."""
    return jnp.sum((x - jnp.sin(params @ z)) ** 2) + 0.5 * jnp.sum(z**2)


def envelope_error(num_steps=2000):
    """The gradient in params and x, against central differences of the minimum itself."""
    params = jnp.asarray(np.random.default_rng(0).normal(size=(3, 2)))
    x = jnp.array([0.2, -0.5, 0.4])
    energy_fn = minimize_latent(codes, jnp.zeros(2), num_steps=num_steps, step_size=0.02)
    slopes = jax.jit(jax.grad(energy_fn, (0, 1)))(params, x)
    apply, errors = jax.jit(energy_fn), []
    for argument, slope in enumerate(slopes):
        for index in np.ndindex(slope.shape):
            sides = []
            for sign in (1.0, -1.0):
                moved = [params, x]
                moved[argument] = moved[argument].at[index].add(sign * 1e-5)
                sides.append(apply(*moved))
            errors.append(abs((sides[0] - sides[1]) / 2e-5 - slope[index]))
    return max(map(float, errors))


def test_the_envelope_gradient_is_that_of_the_minimum(x64):
    assert envelope_error() < 1e-8


def test_the_check_sees_a_descent_that_has_not_arrived(x64):
    """Before z* is reached, the envelope is not the gradient of the value: the check tells."""
    assert envelope_error(num_steps=3) > 1e-4


def test_the_check_sees_a_wrong_envelope(x64, monkeypatch):
    """The energy at a z that belongs to other params."""
    infer = module.infer_latent
    monkeypatch.setattr(
        module, "infer_latent", lambda f, params, *args, **kw: infer(f, 1.1 * params, *args, **kw)
    )
    assert envelope_error() > 1e-4


def test_the_descent_is_not_differentiated(x64):
    """No gradient through z*: the derivative of E at a fixed z, step size and steps being equal."""
    params, x = jnp.ones((3, 2)), jnp.array([0.2, -0.5, 0.4])
    options = {"num_steps": 3, "step_size": 0.02}
    start = jnp.array([0.5, -0.1])
    slope = jax.grad(minimize_latent(codes, start, **options))(params, x)
    best = infer_latent(codes, params, x, start, **options)
    np.testing.assert_allclose(slope, jax.grad(codes)(params, x, best), atol=1e-14)
    through = jax.grad(lambda p: codes(p, x, infer_latent(codes, p, x, start, **options)))(params)
    assert np.abs(through - slope).max() > 1e-3


def test_an_encoder_starts_the_descent(x64):
    params, x = jnp.ones((3, 2)), jnp.array([0.2, -0.5, 0.4])
    encoder = lambda params, x: 100.0 * params[:2, 0] * x[0]  # noqa: E731
    energy_fn = minimize_latent(codes, encoder, num_steps=1, step_size=0.0)
    assert energy_fn(params, x) == codes(params, x, jnp.array([20.0, 20.0]))


def test_sparse_coding_by_soft_thresholds(x64):
    """With orthonormal columns, the minimum is the threshold of the projections."""
    basis = jnp.asarray(np.linalg.qr(np.random.default_rng(0).normal(size=(6, 3)))[0])
    x, strength = jnp.asarray(np.random.default_rng(1).normal(size=6)), 0.8
    smooth = lambda w, x, z: jnp.sum((x - w @ z) ** 2)  # noqa: E731

    def shrink(z, step_size):
        return jnp.sign(z) * jnp.maximum(jnp.abs(z) - strength * step_size, 0.0)

    projections = basis.T @ x
    best = jnp.sign(projections) * jnp.maximum(jnp.abs(projections) - strength / 2, 0.0)
    assert 0 < np.sum(np.asarray(best) == 0.0) < 3
    options = {"num_steps": 100, "step_size": 0.3, "proximal": shrink}
    found = infer_latent(smooth, basis, x, jnp.zeros(3), **options)
    np.testing.assert_allclose(found, best, atol=1e-12)
    penalty = lambda z: strength * jnp.sum(jnp.abs(z))  # noqa: E731
    value = minimize_latent(smooth, jnp.zeros(3), **options, penalty=penalty)(basis, x)
    assert abs(value - (smooth(basis, x, best) + penalty(best))) < 1e-12


def k_means_energy(examples, start, num_steps, winner=minimize_over):
    """Alternating minimisation written with F_∞: Newton steps with its gradient.

    The mean energy is a quadratic in W while the winners stay, with curvature 2 n_k / N.
    """
    energy_fn = winner(squared_distance, jnp.arange(len(start)))

    @jax.jit
    def step(means):
        mean_energy = lambda m: jax.vmap(energy_fn, (None, 0))(m, examples).mean()  # noqa: E731
        energy, slope = jax.value_and_grad(mean_energy)(means)
        distances = jnp.sum((examples[:, None] - means) ** 2, axis=-1)
        counts = jnp.bincount(distances.argmin(axis=1), length=len(start))
        return means - slope * (len(examples) / (2.0 * counts))[:, None], energy

    means = start
    for _ in range(num_steps):
        means, energy = step(means)
    return float(energy)


def k_means_gap(**options):
    from sklearn.cluster import KMeans
    from sklearn.datasets import load_wine

    examples = load_wine().data
    examples = (examples - examples.mean(axis=0)) / examples.std(axis=0)
    start = examples[[0, 70, 150]]
    reference = KMeans(3, init=start, n_init=1, tol=0.0, max_iter=300).fit(examples)
    energy = k_means_energy(jnp.asarray(examples), jnp.asarray(start), 40, **options)
    return abs(energy - reference.inertia_ / len(examples))


def test_k_means_is_an_energy_with_a_latent_variable(x64):
    assert k_means_gap() < 1e-10


def test_the_check_sees_soft_assignments(x64):
    assert k_means_gap(winner=marginalize) > 1e-2


def test_batches_and_traces():
    means, x = jax.random.normal(jax.random.key(0), (NUM_STATES, 2)), jnp.ones((4, 2))
    for energy_fn in (
        marginalize(squared_distance, STATES),
        minimize_over(squared_distance, STATES),
        minimize_latent(
            lambda w, x, z: jnp.sum((x - w[0] * z) ** 2), 0.0, num_steps=3, step_size=0.1
        ),
    ):
        together = jax.jit(jax.vmap(energy_fn, (None, 0)))(means, x * jnp.arange(4.0)[:, None])
        alone = [energy_fn(means, x[0] * i) for i in range(4)]
        np.testing.assert_allclose(together, alone, rtol=1e-5)
        assert together.dtype == jnp.float32


def test_context_is_passed_on():
    energy_fn = lambda params, x, z, c: params * x + z * c  # noqa: E731
    assert minimize_over(energy_fn, jnp.array([-1.0, 1.0]))(2.0, 3.0, 5.0) == 1.0
    free = marginalize(energy_fn, jnp.array([0.0]))
    assert free(2.0, 3.0, 5.0) == 6.0


ERRORS = {
    "inverse_temperature is 0": lambda: marginalize(
        squared_distance, STATES, inverse_temperature=0
    ),
    "latents has no leading axis": lambda: marginalize(squared_distance, 3.0),
    "latents and weights have [2, 3] values": lambda: minimize_over(
        squared_distance, Nodes(jnp.zeros(2), jnp.zeros(3))
    ),
    "low and high are 1.0 and 1.0": lambda: interval_nodes(1.0, 1.0),
    "num_points is 2000 in 2 dimensions": lambda: interval_nodes(
        0.0, 1.0, num_points=2000, num_dimensions=2
    ),
    "num_steps is 0": lambda: minimize_latent(codes, 0.0, num_steps=0, step_size=0.1),
}


@pytest.mark.parametrize("message", ERRORS)
def test_errors_name_the_value(message):
    with pytest.raises(ValueError) as raised:
        ERRORS[message]()
    assert message in str(raised.value)

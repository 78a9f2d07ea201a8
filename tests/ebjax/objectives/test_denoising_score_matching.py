"""Denoising score matching learns the law of noisy data, at one level and along a ladder."""

import functools
import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ebjax.objectives.denoising_score_matching import (
    annealed_denoising_score_matching,
    denoising_score_matching,
    denoising_score_matching_loss,
    geometric_noise_levels,
    scaled_by_noise_level,
)
from ebjax.objectives.score_matching import score_matching_loss
from ebjax.samplers import mala
from ebjax.samplers.annealed import annealed_langevin

module = importlib.import_module("ebjax.objectives.denoising_score_matching")

DIM, SIGMA = 2, 0.6
# Points with mean 0 and covariance 1: means of quadratics over them are those over N(0, I).
NOISE = np.sqrt(DIM) * np.concatenate([np.eye(DIM), -np.eye(DIM)])


def gaussian_energy(params, x):
    centred = x - params["mean"]
    return 0.5 * centred @ params["precision"] @ centred


def all_noise(monkeypatch, data):
    """Each example once with each noise of ``NOISE``: the exact mean over noise."""
    point_of = lambda key, x: jnp.asarray(NOISE, x.dtype)[jax.random.key_data(key)[1]]  # noqa: E731
    monkeypatch.setattr(module, "random_normal_like", point_of)
    index = np.tile(np.arange(len(NOISE), dtype=np.uint32), len(data))
    keys = jax.random.wrap_key_data(jnp.stack([jnp.zeros_like(index), jnp.asarray(index)], 1))
    return keys, jnp.repeat(data, len(NOISE), axis=0)


def setting():
    rng = np.random.default_rng(0)
    params = {
        "mean": jnp.asarray(rng.normal(size=DIM)),
        "precision": jnp.array([[1.4, 0.5], [0.5, 0.9]]),
    }
    return params, jnp.asarray(rng.exponential(size=(6, DIM)) @ rng.normal(size=(DIM, DIM)))


def exact_gradient(params, data, noise_variance):
    """Of the Fisher divergence to a Gaussian with the moments of data and noise.

    With A the precision, d = m - E x and M = E (x - m)(x - m)' + σ² I: A² d and (A M + M A)/2 - I.
    """
    mean, precision, data = (np.asarray(a) for a in (params["mean"], params["precision"], data))
    centred = data - mean
    second = centred.T @ centred / len(data) + noise_variance * np.eye(DIM)
    return {
        "mean": precision @ precision @ (mean - data.mean(0)),
        "precision": 0.5 * (precision @ second + second @ precision) - np.eye(DIM),
    }


def gradient_difference(monkeypatch):
    """The objective's gradient against the exact one, and its size at N(m, S + σ² I)."""
    params, data = setting()
    keys, batch = all_noise(monkeypatch, data)
    objective = denoising_score_matching(gaussian_energy, noise_level=SIGMA)
    run = jax.jit(jax.grad(objective.loss, has_aux=True))
    gradient, _ = run(params, (), keys, batch)
    exact = exact_gradient(params, data, SIGMA**2)
    covariance = np.cov(data.T, bias=True) + SIGMA**2 * np.eye(DIM)
    best = {"mean": data.mean(0), "precision": jnp.asarray(np.linalg.inv(covariance))}
    at_best, _ = run(best, (), keys, batch)
    differences = [np.abs(np.asarray(gradient[k]) - exact[k]).max() for k in exact]
    return max(differences), max(np.abs(leaf).max() for leaf in jax.tree.leaves(at_best))


def test_the_gradient_is_that_of_the_fisher_divergence_to_the_noisy_law(monkeypatch, x64):
    assert max(gradient_difference(monkeypatch)) < 1e-10


def wrong_noise(kind):
    right = module._residual_and_noise

    def wrong(energy_fn, params, x, key, noise_level, *context):
        residual, noise = right(energy_fn, params, x, key, noise_level, *context)
        if kind == "noise not divided by its variance":  # -σξ for the score of x̃ given x
            return residual + noise - noise_level**2 * noise, noise
        return residual + 2.0 * noise, noise  # the other sign

    return wrong


@pytest.mark.parametrize("kind", ["noise not divided by its variance", "sign of the noise"])
def test_the_check_sees_wrong_noise(kind, monkeypatch, x64):
    monkeypatch.setattr(module, "_residual_and_noise", wrong_noise(kind))
    assert min(gradient_difference(monkeypatch)) > 0.05


def test_it_is_implicit_score_matching_of_the_noisy_law(monkeypatch, x64):
    """By quadrature in 1-D, for an energy that is not Gaussian, about one point of data."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(60)
    weights = weights / weights.sum()
    energy_fn = lambda params, x: params[0] * x**4 + params[1] * jnp.sin(x)  # noqa: E731
    point, key, handed = jnp.array(0.3), jax.random.key(0), []
    monkeypatch.setattr(module, "random_normal_like", lambda key, x: handed[-1])

    @jax.jit
    @jax.vmap
    def difference(params):
        def at(node):
            handed.append(node)
            loss = denoising_score_matching_loss(energy_fn, params, point, key, SIGMA)
            return loss - score_matching_loss(energy_fn, params, point + SIGMA * node)

        return weights @ jax.vmap(at)(jnp.asarray(nodes))

    constants = difference(jnp.array([[0.2, 1.0], [0.5, -2.0], [0.05, 0.3]]))
    np.testing.assert_allclose(constants, 0.5 / SIGMA**2, rtol=1e-9)


def test_it_draws_standard_normal_noise():
    """Unpatched: the gradient of a scale is unbiased, within five standard errors."""
    num, precision = 40_000, 1.3
    energy_fn = lambda p, x: 0.5 * p * jnp.sum(x**2)  # noqa: E731
    slope = jax.grad(denoising_score_matching_loss, argnums=1)
    keys = jax.random.split(jax.random.key(0), num)
    one = lambda key: slope(energy_fn, precision, jnp.ones(DIM), key, SIGMA)  # noqa: E731
    slopes = np.asarray(jax.jit(jax.vmap(one))(keys))
    expected = precision * (DIM + DIM * SIGMA**2) - DIM
    assert abs(slopes.mean() - expected) < 5.0 * slopes.std() / np.sqrt(num)
    assert abs(slopes.mean() - (precision * DIM - DIM)) > 5.0 * slopes.std() / np.sqrt(num)


LEVELS = geometric_noise_levels(5.0, 0.3, 6)
MEAN, WIDTH = 1.5, 0.7


def table_energy(params, x, level):
    """A precision a level; the mean is known."""
    index = jnp.argmin(jnp.abs(jnp.asarray(LEVELS) - level))
    return 0.5 * params[index] * jnp.sum((x - MEAN) ** 2)


@functools.partial(jax.jit, static_argnums=(1, 2))
def ladder_gradient(params, num, power):
    """Mean and standard error of the gradient over ``num`` data, [L] each."""
    objective = annealed_denoising_score_matching(
        table_energy, noise_levels=LEVELS, weight_power=power
    )
    data = MEAN + WIDTH * jax.random.normal(jax.random.key(1), (num, 1))

    def one(x, key):
        return jax.grad(lambda p: objective.loss(p, (), key[None], x[None])[0])(params)

    gradients = jax.vmap(one)(data, jax.random.split(jax.random.key(2), num))
    return gradients.mean(0), gradients.std(0) / np.sqrt(num)


@pytest.mark.parametrize("power", [2.0, 0.0])
def test_each_level_is_drawn_alike_and_weighted(power, x64):
    """Level l has the gradient σ^p (p_l (S + σ²) - 1)/L, in closed form."""
    params = jnp.linspace(0.1, 1.0, len(LEVELS))
    mean, error = ladder_gradient(params, 50_000, power)
    variance = WIDTH**2 + LEVELS**2
    expected = LEVELS**power * (params * variance - 1.0) / len(LEVELS)
    assert np.all(np.abs(mean - expected) < 5.0 * error)
    other = LEVELS ** (1.0 - power) * (params * variance - 1.0) / len(LEVELS)
    assert np.any(np.abs(mean - other) > 5.0 * error)


def test_what_it_learns_is_what_annealed_langevin_samples(x64):
    """The gradient is affine in the table, so two values give the optimum; its chains are right."""
    num = 40_000
    at_zero, _ = ladder_gradient(jnp.zeros(len(LEVELS)), num, 2.0)
    at_one, _ = ladder_gradient(jnp.ones(len(LEVELS)), num, 2.0)
    learned = at_zero / (at_zero - at_one)
    exact = 1.0 / (WIDTH**2 + LEVELS**2)
    # 1/p is a mean of (x̃ - m)² by one of ξ², over num/L draws: a relative error near 2 sqrt(L/num).
    np.testing.assert_allclose(learned, exact, rtol=10.0 * np.sqrt(len(LEVELS) / num))
    num_chains = 4000
    start = LEVELS[0] * jax.random.normal(jax.random.key(3), (num_chains, 1))
    run = lambda key, x: annealed_langevin(  # noqa: E731
        key,
        table_energy,
        learned,
        x,
        noise_levels=LEVELS,
        num_steps=20,
        step_size=0.5 * LEVELS[-1] ** 2,
        build_kernel=mala,
    )
    ends, _ = jax.jit(jax.vmap(run))(jax.random.split(jax.random.key(4), num_chains), start)
    variance = WIDTH**2 + LEVELS[-1] ** 2
    z_mean = (ends.mean() - MEAN) / np.sqrt(variance / num_chains)
    z_variance = (ends.var() * float(learned[-1]) - 1.0) * np.sqrt(num_chains / 2.0)
    assert abs(z_mean) < 5.0
    assert abs(z_variance) < 5.0


def test_an_energy_divided_by_its_level(x64):
    """E/σ is exact where E is the same at all levels up to σ: here precision p/σ for all."""
    plain = lambda params, x: 0.5 * params * jnp.sum(x**2)  # noqa: E731
    objective = annealed_denoising_score_matching(
        scaled_by_noise_level(plain), noise_levels=[0.5, 2.0]
    )
    x, keys = jnp.zeros((1000, 1)), jax.random.split(jax.random.key(0), 1000)
    loss, (_, metrics) = jax.jit(objective.loss)(2.0, (), keys, x)
    # ½|σ² p/σ ξ - ξ|² with p = 2: (σ p - 1)² ξ²/2, so 0 at σ = 1/2 and 9/2 ξ² at σ = 2.
    np.testing.assert_allclose(metrics["unexplained_noise"], 2.0 * loss, rtol=1e-9)
    assert abs(float(loss) - 2.25) < 5.0 * 4.5 * np.sqrt(3.0 / 1000)


def test_examples_may_be_pytrees_and_metrics_are_scalars():
    energy_fn = lambda params, x: params * jnp.sum(x["a"] ** 2) + x["b"] ** 2  # noqa: E731
    batch = {"a": jnp.ones((4, 3)), "b": jnp.zeros(4)}
    objective = denoising_score_matching(energy_fn, noise_level=0.1)
    keys = jax.random.split(jax.random.key(0), 4)
    run = jax.jit(objective.loss)
    loss, (carry, metrics) = run(0.5, objective.init(None, 0.5, batch), keys, batch)
    assert loss.shape == ()
    assert carry == ()
    assert metrics["square_gradient"] > 0.0
    # A flat energy explains nothing.
    flat = denoising_score_matching(lambda params, x: 0.0 * params * x["b"], noise_level=0.1)
    _, (_, metrics) = jax.jit(flat.loss)(0.5, (), keys, batch)
    noise = metrics["unexplained_noise"]
    assert abs(float(noise) - 1.0) < 5.0 * np.sqrt(2.0 / 16)


def test_the_ladder_is_geometric():
    np.testing.assert_allclose(LEVELS[1:] / LEVELS[:-1], (0.3 / 5.0) ** 0.2)
    assert (LEVELS[0], LEVELS[-1]) == (5.0, 0.3)
    assert geometric_noise_levels(7.0, 0.2, 1).tolist() == [0.2]


ERRORS = {
    "noise_level is -1.0": lambda: denoising_score_matching(gaussian_energy, noise_level=-1.0),
    "noise_levels are": lambda: annealed_denoising_score_matching(
        table_energy, noise_levels=[1.0, 0.0]
    ),
    "noise_levels has shape": lambda: annealed_denoising_score_matching(
        table_energy, noise_levels=1.0
    ),
    "num_levels is 0": lambda: geometric_noise_levels(1.0, 0.1, 0),
    "widest is 0.1": lambda: geometric_noise_levels(0.1, 0.2, 3),
    "narrowest is 0.0": lambda: geometric_noise_levels(0.1, 0.0, 3),
}


@pytest.mark.parametrize("sentence", ERRORS)
def test_errors_name_the_value(sentence):
    with pytest.raises(ValueError, match=sentence):
        ERRORS[sentence]()

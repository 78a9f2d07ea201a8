"""NCE finds the law and its log Z, at every ν, and leaves its noise alone."""

import functools
import importlib
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ebjax.energies import targets
from ebjax.energies.boltzmann import enumerate_law
from ebjax.objectives.noise_contrastive import (
    NoiseLaw,
    frozen_flow,
    log_ratio,
    noise_contrastive,
    noise_contrastive_loss,
    noise_law,
)
from ebjax.objectives.regularizers import energy_magnitude
from ebjax.types import Target

module = importlib.import_module("ebjax.objectives.noise_contrastive")

TRUE = {"energy": {"mean": 0.4, "log_precision": 0.6}, "log_z": 0.5 * (math.log(2 * math.pi) - 0.6)}
NOISE = targets.gaussian(jnp.zeros(1), 2.0 * jnp.eye(1))


def energy_fn(params, x):
    return 0.5 * jnp.exp(params["log_precision"]) * jnp.square(x[0] - params["mean"])


def as_arrays(params):
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, float), params)


@functools.cache
def grid():
    points = np.linspace(-14.0, 14.0, 301)
    return points, points[1] - points[0]


def infinite_data(loss_fn, ratio):
    """The loss with both expectations by quadrature, over all pairs of a data and a noise point."""
    points, step = grid()
    x = jnp.asarray(points)[:, None]
    law = noise_law(NOISE)
    log_noise = jax.vmap(law.log_prob)(x)
    truth = as_arrays(TRUE)
    log_data = -jax.vmap(energy_fn, (None, 0))(truth["energy"], x) - truth["log_z"]
    weights = jnp.exp(log_data)[:, None] * jnp.exp(log_noise) * step**2

    def value(params):
        ratios = jax.vmap(lambda q, x: log_ratio(energy_fn, params, q, x))(log_noise, x)
        pair = lambda d, n: loss_fn(d, n[None], ratio=ratio)  # noqa: E731
        losses = jax.vmap(jax.vmap(pair, (None, 0)), (0, None))(ratios, ratios)
        return jnp.sum(weights * losses)

    return jax.jit(value)


def steepest(gradient):
    return max(np.abs(leaf).max() for leaf in jax.tree.leaves(gradient))


@pytest.mark.parametrize("ratio", [0.5, 1.0, 8.0])
def test_the_truth_is_stationary_at_every_ratio(x64, ratio):
    value = infinite_data(noise_contrastive_loss, ratio)
    assert steepest(jax.grad(value)(as_arrays(TRUE))) < 1e-12


def forgotten_log_ratio(data, noise, *, ratio):
    return jax.nn.softplus(-data) + ratio * jax.nn.softplus(noise).mean()


def wrong_sign(data, noise, *, ratio):
    return noise_contrastive_loss(-data, -noise, ratio=ratio)


def forgotten_weight(data, noise, *, ratio):
    offset = math.log(ratio)
    return jax.nn.softplus(offset - data) + jax.nn.softplus(noise - offset).mean()


BUGS = [forgotten_log_ratio, wrong_sign, forgotten_weight]


@pytest.mark.parametrize("bug", BUGS)
def test_the_check_sees(x64, bug):
    assert steepest(jax.grad(infinite_data(bug, 3.0))(as_arrays(TRUE))) > 1e-2


def test_log_z_is_found_with_the_law(x64):
    value = infinite_data(noise_contrastive_loss, 2.0)
    flat, unravel = jax.flatten_util.ravel_pytree(as_arrays(TRUE))
    objective = lambda theta: value(unravel(theta))  # noqa: E731
    derivatives = jax.jit(lambda theta: (jax.grad(objective)(theta), jax.hessian(objective)(theta)))
    theta = flat + jnp.array([0.3, -0.2, 0.4])
    for _ in range(12):
        slope, curvature = derivatives(theta)
        theta = theta - jnp.linalg.solve(curvature, slope)
    np.testing.assert_allclose(theta, flat, atol=1e-9)


def test_many_noise_points_give_the_gradient_of_maximum_likelihood(x64):
    """With log Z exact, the gradient tends to E_data ∇E - E_p ∇E as 1/ν."""
    mean, log_precision = 0.1, 0.3
    params = as_arrays(
        {
            "energy": {"mean": mean, "log_precision": log_precision},
            "log_z": 0.5 * (math.log(2 * math.pi) - log_precision),
        }
    )
    precision, true_precision = math.exp(log_precision), math.exp(0.6)
    shift = 0.4 - mean
    exact = (-precision * shift, 0.5 * precision * (1 / true_precision + shift**2) - 0.5)
    errors = []
    for ratio in (1e2, 1e4):
        gradient = jax.grad(infinite_data(noise_contrastive_loss, ratio))(params)["energy"]
        got = np.array([gradient["mean"], gradient["log_precision"]])
        errors.append(np.abs(got - exact).max())
    assert errors[1] < 1e-3
    assert 30 < errors[0] / errors[1] < 300


@pytest.mark.parametrize("ratio", [0.5, 4.0])
def test_equal_laws_cost_what_guessing_costs(x64, ratio):
    loss = noise_contrastive_loss(jnp.array(0.0), jnp.zeros(3), ratio=ratio)
    np.testing.assert_allclose(loss, np.log1p(ratio) + ratio * np.log1p(1 / ratio))


def table_slope(loss_fn):
    """Of the exact expected loss at the truth, for a law of 3 bits against one of biased coins."""
    logits = jnp.asarray(np.random.default_rng(0).normal(size=8))
    index = lambda x: (x @ jnp.array([4.0, 2.0, 1.0])).astype(int)  # noqa: E731
    table = lambda params, x: -params[index(x)]  # noqa: E731
    law = enumerate_law(table, logits, (3,))
    log_noise = jnp.log(jnp.where(law.states == 1.0, 0.3, 0.7)).sum(-1)
    weights = jnp.exp(law.log_probs)[:, None] * jnp.exp(log_noise)

    def value(params):
        ratios = jax.vmap(lambda q, x: log_ratio(table, params, q, x))(log_noise, law.states)
        pair = lambda d, n: loss_fn(d, n[None], ratio=5.0)  # noqa: E731
        return jnp.sum(weights * jax.vmap(jax.vmap(pair, (None, 0)), (0, None))(ratios, ratios))

    return steepest(jax.jit(jax.grad(value))({"energy": logits, "log_z": law.log_z}))


def test_the_truth_is_stationary_on_an_enumerable_law(x64):
    assert table_slope(noise_contrastive_loss) < 1e-12


@pytest.mark.parametrize("bug", BUGS)
def test_the_enumeration_sees(x64, bug):
    assert table_slope(bug) > 1e-2


def data_batch(num):
    noise = jax.random.normal(jax.random.key(1), (num, 1))
    return TRUE["energy"]["mean"] + math.exp(-0.3) * noise


def gradient_z_scores(num=20_000, **options):
    """The objective's gradient away from the truth against quadrature, in standard errors."""
    objective = noise_contrastive(energy_fn, NOISE, num_noise=2, **options)
    params = as_arrays({"energy": {"mean": 0.0, "log_precision": 0.2}, "log_z": 0.5})
    one = lambda key, x: jax.grad(objective.loss, has_aux=True)(params, (), key[None], x[None])[0]  # noqa: E731
    gradients = jax.jit(jax.vmap(one))(
        jax.random.split(jax.random.key(2), num), data_batch(num).astype(float)
    )
    exact = jax.grad(infinite_data(noise_contrastive_loss, options.get("ratio", 2.0)))(params)
    z = jax.tree.map(lambda g, e: (g.mean() - e) / (g.std() / math.sqrt(num)), gradients, exact)
    return np.abs(jax.tree.leaves(z)).max()


@pytest.mark.parametrize("options", [{}, {"ratio": 5.0}], ids=["default", "ratio"])
def test_the_objective_samples_the_expected_loss(x64, options):
    assert gradient_z_scores(**options) < 5.0


def test_the_objective_check_sees_a_forgotten_ratio(x64, monkeypatch):
    monkeypatch.setattr(module, "noise_contrastive_loss", forgotten_log_ratio)
    assert gradient_z_scores() > 5.0


def test_estimates_from_samples_are_within_their_error(x64):
    """Newton on a fixed sample; covariance H^-1 V H^-1 / N from the per-example gradients."""
    num = 4000
    objective = noise_contrastive(energy_fn, NOISE, num_noise=2)
    batch, keys = data_batch(num).astype(float), jax.random.split(jax.random.key(3), num)
    truth, unravel = jax.flatten_util.ravel_pytree(as_arrays(TRUE))

    def value(theta, keys, batch):
        return objective.loss(unravel(theta), (), keys, batch)[0]

    @jax.jit
    def derivatives(theta):
        one = lambda key, x: jax.grad(value)(theta, key[None], x[None])  # noqa: E731
        scores = jax.vmap(one)(keys, batch)
        return scores, jax.hessian(value)(theta, keys, batch)

    theta = truth
    for _ in range(6):
        scores, curvature = derivatives(theta)
        theta = theta - jnp.linalg.solve(curvature, scores.mean(0))
    scores, curvature = derivatives(theta)
    assert np.abs(scores.mean(0)).max() < 1e-9
    inverse = np.linalg.inv(curvature)
    covariance = inverse @ np.cov(scores.T) @ inverse / num
    assert np.abs((theta - truth) / np.sqrt(np.diag(covariance))).max() < 5.0
    assert np.sqrt(np.diag(covariance)).max() < 0.1


def noise_gradient():
    """Of the loss in the parameters of the noise, which are constants to it."""
    distrax = pytest.importorskip("distrax")
    keys = jax.random.split(jax.random.key(0), 8)

    def loss(scale):
        noise = distrax.MultivariateNormalDiag(jnp.zeros(1), scale * jnp.ones(1))
        objective = noise_contrastive(energy_fn, noise)
        return objective.loss(as_arrays(TRUE), (), keys, data_batch(8))[0]

    return float(jax.grad(loss)(1.5))


def test_fixed_noise_gets_no_gradient():
    assert noise_gradient() == 0.0


def test_the_noise_check_sees_a_leak(monkeypatch):
    monkeypatch.setattr(jax.lax, "stop_gradient", lambda tree: tree)
    assert abs(noise_gradient()) > 1e-3


def test_metrics_and_penalties(x64):
    """At the truth with the noise for data, the classifier knows nothing."""
    params = as_arrays({"energy": {"mean": 0.0, "log_precision": -math.log(2.0)}, "log_z": 0.0})
    params["log_z"] = 0.5 * jnp.log(4 * jnp.pi)
    plain, penalised = (
        noise_contrastive(energy_fn, NOISE, num_noise=3, regularizers=regularizers)
        for regularizers in ((), (energy_magnitude(0.1),))
    )
    batch, keys = data_batch(6).astype(float), jax.random.split(jax.random.key(0), 6)
    loss, (carry, metrics) = plain.loss(params, plain.init(keys[0], params, batch), keys, batch)
    assert carry == ()
    np.testing.assert_allclose(loss, math.log(4.0) + 3.0 * math.log(4 / 3))
    np.testing.assert_allclose(metrics["accuracy"], 0.75)
    np.testing.assert_allclose(metrics["log_ratio_data"], 0.0, atol=1e-6)
    np.testing.assert_allclose(metrics["log_ratio_noise"], 0.0, atol=1e-6)
    with_it, (_, metrics) = penalised.loss(params, (), keys, batch)
    np.testing.assert_allclose(with_it - loss, metrics["penalty"])
    assert metrics["penalty"] > 0.0


def test_every_kind_of_noise_has_the_same_density():
    distrax = pytest.importorskip("distrax")
    mean, scale = jnp.array([0.5, -1.0]), jnp.array([1.0, 2.0])
    point, key = jnp.array([0.2, 0.3]), jax.random.key(0)
    exact = -0.5 * np.sum(np.square((point - mean) / scale)) - np.log(2 * np.pi) - np.log(2.0)
    flow = module.NoiseLaw(  # stands for a flow: functions of (params, ...)
        lambda params, key: mean + params * jax.random.normal(key, (2,)),
        lambda params, x: distrax.MultivariateNormalDiag(mean, params).log_prob(x),
    )
    laws = [
        targets.gaussian(mean, jnp.diag(scale**2)),
        distrax.MultivariateNormalDiag(mean, scale),
        distrax.Independent(distrax.Normal(mean, scale), 1),
        frozen_flow(flow, scale),
    ]
    for law in map(noise_law, laws):
        assert isinstance(law, NoiseLaw)
        np.testing.assert_allclose(law.log_prob(point), exact, rtol=1e-5)
        assert law.sample(key).shape == (2,)


def test_errors_name_the_value():
    distrax = pytest.importorskip("distrax")
    with pytest.raises(ValueError, match="num_noise is 0"):
        noise_contrastive(energy_fn, NOISE, num_noise=0)
    with pytest.raises(ValueError, match=r"ratio is -1\.0"):
        noise_contrastive(energy_fn, NOISE, ratio=-1.0)
    with pytest.raises(ValueError, match="noise is a Target whose log_z is None"):
        noise_law(NOISE._replace(log_z=None))
    with pytest.raises(ValueError, match="noise is a Target whose sample is None"):
        noise_law(Target(NOISE.energy, (1,), 0.0))
    with pytest.raises(ValueError, match="noise is a float"):
        noise_law(3.0)
    with pytest.raises(ValueError, match=r"shape \(2,\) for one example"):
        noise_law(distrax.Normal(jnp.zeros(2), 1.0)).log_prob(jnp.zeros(2))

"""Adapters: against the libraries themselves where they are installed, and stand-ins elsewhere."""

import builtins
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ebjax.samplers import adapters, mala, sample


def quadratic(params, x):
    return 0.5 * jnp.sum((x - params) ** 2)


def test_a_log_density_changes_its_sign():
    energy_fn = adapters.from_log_prob(lambda x: -3.0 * x)
    assert energy_fn("ignored", jnp.float32(2.0)) == 6.0
    with_params = adapters.from_log_prob(lambda params, x: params * x, has_params=True)
    assert with_params(2.0, jnp.arange(3.0)) == -6.0

    def log_prob(x):
        return -x

    assert adapters.from_log_prob(log_prob) == adapters.from_log_prob(log_prob)


def test_distrax_laws_are_energies(x64):
    distrax = pytest.importorskip("distrax")
    law = distrax.MultivariateNormalDiag(jnp.array([1.0, -1.0]), jnp.array([0.5, 2.0]))
    energy_fn = adapters.from_distribution(law)
    x = jnp.array([0.3, 0.7])
    np.testing.assert_allclose(energy_fn((), x), -law.log_prob(x))
    batch = distrax.Normal(jnp.zeros(3), jnp.array([1.0, 2.0, 3.0]))
    at = jnp.array([0.1, 0.2, 0.3])
    np.testing.assert_allclose(adapters.from_distribution(batch)((), at), -batch.log_prob(at).sum())


def test_a_learned_law_has_a_gradient_in_its_parameters(x64):
    distrax = pytest.importorskip("distrax")
    energy_fn = adapters.from_distribution(lambda p: distrax.Normal(p["mean"], p["scale"]))
    gradient = jax.grad(energy_fn)({"mean": 1.0, "scale": 2.0}, jnp.array(3.0))
    np.testing.assert_allclose(gradient["mean"], -2.0 / 4.0)
    np.testing.assert_allclose(gradient["scale"], 1.0 / 2.0 - 4.0 / 8.0)


def test_what_is_no_law_is_refused():
    with pytest.raises(TypeError, match="int"):
        adapters.from_distribution(3)


def test_numpyro_distributions_are_energies():
    distributions = pytest.importorskip("numpyro.distributions")
    law = distributions.Gamma(2.0, 3.0)
    energy_fn = adapters.from_distribution(law)
    np.testing.assert_allclose(energy_fn((), jnp.array(0.7)), -law.log_prob(0.7))


def numpyro_model():
    numpyro = pytest.importorskip("numpyro")
    distributions = numpyro.distributions

    def model(y):
        mean = numpyro.sample("mean", distributions.Normal(0.0, 2.0))
        scale = numpyro.sample("scale", distributions.HalfNormal(1.5))
        numpyro.deterministic("double", 2.0 * mean)
        with numpyro.plate("cases", len(y)):
            numpyro.sample("y", distributions.Normal(mean, scale), obs=y)

    return model


def test_a_numpyro_model_is_its_joint_density_with_the_jacobian(x64):
    y = np.array([1.0, 2.5, 1.7])
    energy_fn, position, constrain = adapters.from_numpyro(numpyro_model(), jnp.asarray(y))
    assert set(position) == {"mean", "scale"}
    mean, log_scale = 0.4, -0.3
    scale = np.exp(log_scale)
    expected = (
        0.5 * (mean / 2.0) ** 2
        + np.log(2.0)
        + 0.5 * (scale / 1.5) ** 2
        + np.log(1.5)
        - np.log(2.0)
        - log_scale
        + np.sum(0.5 * ((y - mean) / scale) ** 2 + log_scale)
        + 2.5 * np.log(2.0 * np.pi)
    )
    x = {"mean": jnp.array(mean), "scale": jnp.array(log_scale)}
    np.testing.assert_allclose(energy_fn((), x), expected, rtol=1e-10)
    assert abs(energy_fn((), x) - (expected + log_scale)) > 0.1  # the Jacobian is in it
    sites = constrain(x)
    np.testing.assert_allclose(sites["scale"], scale)
    np.testing.assert_allclose(sites["double"], 2.0 * mean)


def test_a_numpyro_model_is_sampled_to_its_posterior():
    """Against a grid over both parameters."""
    y = np.array([1.0, 2.5, 1.7])
    keys = jax.random.split(jax.random.key(0), 200)
    energy_fn, positions, _ = adapters.from_numpyro(numpyro_model(), jnp.asarray(y), key=keys)
    assert positions["mean"].shape == (200,)
    assert len(np.unique(positions["mean"])) == 200
    # Where the scale is tiny the step would be too long to be accepted, ever.
    positions = {"mean": positions["mean"], "scale": jnp.abs(positions["scale"])}
    draws = sample(
        jax.random.key(1), mala(step_size=0.05), energy_fn, (), positions,
        num_samples=200, thinning=5, num_burn_in=200,
    )  # fmt: skip
    axis = np.linspace(-6.0, 6.0, 301)
    grid = np.stack(np.meshgrid(axis, axis, indexing="ij"), -1).reshape(-1, 2)
    energies = jax.vmap(lambda x: energy_fn((), {"mean": x[0], "scale": x[1]}))(grid)
    weights = np.asarray(jax.nn.softmax(-energies), np.float64)
    for index, site in enumerate(("mean", "scale")):
        by_chain = np.asarray(draws.positions[site]).mean(0)  # chains are independent
        error = by_chain.std() / np.sqrt(len(by_chain))
        assert abs(by_chain.mean() - weights @ grid[:, index]) < 5.0 * error
        assert abs(by_chain.mean() - weights @ grid[:, index] - 0.1) > 5.0 * error


def test_without_numpyro_the_error_says_what_to_install(monkeypatch):
    original = builtins.__import__

    def absent(name, *args, **kwargs):
        if name.startswith("numpyro"):
            raise ImportError(name)
        return original(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", absent)
    with pytest.raises(ImportError, match="pip install numpyro"):
        adapters.from_numpyro(lambda: None)


def test_a_model_without_latent_sites_is_refused():
    numpyro = pytest.importorskip("numpyro")

    def model():
        numpyro.sample("y", numpyro.distributions.Normal(0.0, 1.0), obs=1.0)

    with pytest.raises(ValueError, match="no continuous latent site"):
        adapters.from_numpyro(model)


def test_to_blackjax_takes_the_same_steps():
    kernel = mala(step_size=0.4)
    algorithm = adapters.to_blackjax(kernel, quadratic, 2.0)
    state = algorithm.init(jnp.zeros(3), jax.random.key(9))
    for step in range(3):
        key = jax.random.key(step)
        expected, _ = kernel.step(key, quadratic, 2.0, state)
        state, info = algorithm.step(key, state)
        np.testing.assert_array_equal(state.position, expected.position)
    assert info.is_finite


def test_blackjax_runs_a_kernel_of_ours():
    blackjax = pytest.importorskip("blackjax")
    algorithm = adapters.to_blackjax(mala(step_size=0.5), quadratic, 1.5)
    assert algorithm._fields == blackjax.base.SamplingAlgorithm._fields
    run = blackjax.util.run_inference_algorithm
    last, (states, info) = run(jax.random.key(0), algorithm, 4_000, initial_position=jnp.zeros(2))
    assert last.position.shape == (2,)
    assert info.acceptance_rate.mean() > 0.7
    batches = np.asarray(states.position)[400:].reshape(36, 100, 2).mean(1)
    error = batches.std(0) / np.sqrt(len(batches))
    assert (np.abs(batches.mean(0) - 1.5) < 5.0 * error).all()
    assert (np.abs(batches.mean(0) + 1.5) > 5.0 * error).all()  # the sign of the energy shows


class WalkState(NamedTuple):
    position: jax.Array
    logdensity: jax.Array


class WalkInfo(NamedTuple):
    acceptance_rate: jax.Array
    is_accepted: jax.Array
    num_tries: int


class Walk(NamedTuple):
    """A random walk in the manner of blackjax, so that the adapter is tested without it."""

    init: object
    step: object


def walk(log_density):
    def init(position):
        return WalkState(position, log_density(position))

    def step(key, state):
        noise_key, accept_key = jax.random.split(key)
        end = init(state.position + jax.random.normal(noise_key, state.position.shape))
        rate = jnp.minimum(1.0, jnp.exp(end.logdensity - state.logdensity))
        is_accepted = jax.random.uniform(accept_key) < rate
        state = jax.tree.map(lambda a, b: jnp.where(is_accepted, a, b), end, state)
        return state, WalkInfo(rate, is_accepted, 1)

    return Walk(init, step)


def check_draws(kernel, num_burn_in=100):
    """Draws of N(2, 1) with the parameter traced; chains are independent."""
    start = jnp.zeros((500, 2))
    draws = sample(
        jax.random.key(0), kernel, quadratic, 2.0, start, num_samples=100, num_burn_in=num_burn_in
    )
    by_chain = np.asarray(draws.positions).mean(0).ravel()
    error = by_chain.std() / np.sqrt(len(by_chain))
    assert abs(by_chain.mean() - 2.0) < 5.0 * error
    assert abs(by_chain.mean() + 2.0) > 5.0 * error
    squares = ((np.asarray(draws.positions) - 2.0) ** 2).mean(0).ravel()
    assert abs(squares.mean() - 1.0) < 5.0 * squares.std() / np.sqrt(len(squares))
    assert (np.asarray(draws.info.is_finite) == 1.0).all()
    return draws


def test_an_algorithm_in_the_manner_of_blackjax_is_a_kernel():
    kernel = adapters.from_blackjax(walk, num_evaluations=1)
    assert kernel.num_evaluations == 1
    assert kernel == adapters.from_blackjax(walk, num_evaluations=1)
    check_draws(kernel)
    state = kernel.init(quadratic, 2.0, jnp.zeros(2))
    state, info = kernel.step(jax.random.key(0), quadratic, 2.0, state)
    np.testing.assert_allclose(info.energy, quadratic(2.0, state.position), rtol=1e-6)
    assert info.num_evaluations.dtype == jnp.int32
    bad = state._replace(position=state.position * jnp.nan)
    assert not kernel.step(jax.random.key(0), quadratic, 2.0, bad)[1].is_finite


def test_an_algorithm_that_does_not_count_is_named():
    kernel = adapters.from_blackjax(walk)
    state = kernel.init(quadratic, 2.0, jnp.zeros(2))
    with pytest.raises(ValueError, match="WalkInfo does not count"):
        kernel.step(jax.random.key(0), quadratic, 2.0, state)


NUTS = {"step_size": 0.8, "inverse_mass_matrix": np.ones(2)}
ALGORITHMS = {
    "nuts": (NUTS, None),
    "hmc": (NUTS | {"num_integration_steps": 3}, None),
    "mala": ({"step_size": 0.4}, 1),
}


@pytest.mark.parametrize("name", ALGORITHMS)
def test_blackjax_algorithms_are_kernels(name):
    blackjax = pytest.importorskip("blackjax")
    options, num_evaluations = ALGORITHMS[name]

    def build(log_density):
        return getattr(blackjax, name)(log_density, **options)

    draws = check_draws(adapters.from_blackjax(build, num_evaluations=num_evaluations))
    mean_count = np.asarray(draws.info.num_evaluations).mean()
    assert mean_count == {"hmc": 3, "mala": 1}.get(name, mean_count) >= 1

"""Tempered SMC: closed forms, exact unbiasedness on three states, devices, planted bugs."""

import functools
import importlib
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ebjax.samplers import langevin, mala
from ebjax.samplers.evaluate import value
from ebjax.samplers.smc import ais_log_z, geometric_path, normal_energy, smc_sample
from ebjax.types import Kernel, bind

population_module = importlib.import_module("ebjax.samplers.smc.population")

LADDER = (0.1, 0.3, 0.6, 1.0)
DIM = 10
OBSERVED = np.linspace(-2.0, 2.0, DIM)


def posterior(params, x):
    return normal_energy((0.0, 1.0), x) + normal_energy((params, 0.5), x)


def conjugate_path():
    """Prior N(0, I) and one observation with standard deviation 1/2 of each coordinate."""
    return geometric_path(normal_energy, posterior), ((0.0, 1.0), jnp.asarray(OBSERVED))


def log_importance(path, params, beta, x):
    """Log-weights of draws of the prior for the law at β."""
    difference = lambda x: path((0.0, params), x) - path((beta, params), x)  # noqa: E731
    return np.asarray(jax.jit(jax.vmap(difference))(x))


# Runs of this shape and these options share their programs over the tests.
SMALL, SMALL_KERNEL = 80, mala(step_size=0.1)


CONJUGATE_LOG_Z = float(np.sum(-0.5 * OBSERVED**2 / 1.25 - 0.5 * np.log(2 * np.pi * 1.25)))


def prior_draws(num=2000, seed=0):
    return jax.random.normal(jax.random.key(seed), (num, DIM))


class DiscreteState(NamedTuple):
    position: jax.Array
    energy: jax.Array
    parts: Any


class DiscreteInfo(NamedTuple):
    acceptance_rate: jax.Array
    is_finite: jax.Array


def _discrete_init(energy_fn, params, position):
    return DiscreteState(position, *value(energy_fn, params, position))


def _discrete_step(key, energy_fn, params, state):
    """Metropolis with a uniform proposal on three states."""
    proposal_key, accept_key = jax.random.split(key)
    proposal = _discrete_init(energy_fn, params, jax.random.randint(proposal_key, (), 0, 3))
    rate = jnp.exp(jnp.minimum(state.energy - proposal.energy, 0.0))
    is_accepted = jax.random.uniform(accept_key) < rate
    new = jax.tree.map(lambda a, b: jnp.where(is_accepted, a, b), proposal, state)
    return new, DiscreteInfo(rate, jnp.array(True))


DISCRETE_KERNEL = Kernel(bind(_discrete_init), bind(_discrete_step))
DISCRETE_ENERGY = np.array([0.5, -1.5, 2.0])


def discrete_path():
    # New functions at every call, so that a patched module is traced anew.
    return geometric_path(
        lambda params, x: jnp.log(3.0),
        lambda params, x: jnp.asarray(DISCRETE_ENERGY, jnp.float32)[x],
    )


def discrete_z_score(size=4, num=20_000, **options):
    """Deviation of the mean Z of many small populations, in standard errors."""
    particles = jax.random.randint(jax.random.key(1), (num * size,), 0, 3)
    options = {"inverse_temperatures": LADDER, "num_mcmc_steps": 2, **options}
    result = smc_sample(
        jax.random.key(2),
        DISCRETE_KERNEL,
        discrete_path(),
        ((), ()),
        particles,
        num_islands=num,
        **options,
    )
    z = np.exp(np.asarray(result.island_log_z, np.float64))
    return (z.mean() - np.exp(-DISCRETE_ENERGY).sum()) / (z.std() / np.sqrt(num)), result


@functools.cache
def unbroken_z_score(**options):
    """Once for all tests that plant nothing."""
    return discrete_z_score(**options)


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"ess_threshold": 0.0}, marks=pytest.mark.slow),
        {"ess_threshold": 0.7},
        pytest.param({"ess_threshold": 1.0}, marks=pytest.mark.slow),
        pytest.param({"ess_threshold": 1.0, "resampling": "multinomial"}, marks=pytest.mark.slow),
        {"waste_free": True},
    ],
    ids=str,
)
def test_z_is_unbiased_on_three_states(options):
    score, result = unbroken_z_score(**options)
    assert abs(score) < 5.0
    # The reported error is that of the mean of Z: a z-score of log Z agrees with that of Z.
    log_z = np.log(np.exp(-DISCRETE_ENERGY).sum())
    assert abs((result.log_z - log_z) / result.log_z_standard_error - score) < 0.3 + 0.1 * abs(
        score
    )


def test_weighted_particles_follow_the_target():
    _, result = unbroken_z_score(ess_threshold=0.7)
    weights = np.asarray(jax.nn.softmax(result.log_weights), np.float64)
    exact = np.exp(-DISCRETE_ENERGY) / np.exp(-DISCRETE_ENERGY).sum()
    for state in range(3):
        # Ratio estimate over islands, which are independent.
        island = weights.reshape(20_000, 4)
        hit = island * (np.asarray(result.particles).reshape(20_000, 4) == state)
        residual = hit.sum(1) - exact[state] * island.sum(1)
        assert abs(residual.sum() / np.sqrt((residual**2).sum())) < 5.0


def _not_reset(monkeypatch):
    real = population_module.resample

    def broken(key, population, *args, **options):
        new, is_resampled = real(key, population, *args, **options)
        return new._replace(log_weights=population.log_weights), is_resampled

    monkeypatch.setattr(population_module, "resample", broken)


def _moved_at_the_base(monkeypatch):
    real_move, real_retemper = population_module.move, population_module.retemper
    monkeypatch.setattr(
        population_module,
        "move",
        lambda problem, key, beta, *args: real_move(problem, key, 0.0 * beta, *args),
    )
    monkeypatch.setattr(
        population_module,
        "retemper",
        lambda problem, step_size, beta, states: real_retemper(
            problem, step_size, 0.0 * beta, states
        ),
    )


def _not_retempered(monkeypatch):
    monkeypatch.setattr(
        population_module, "retemper", lambda problem, step_size, beta, states: (states, 0.0)
    )


@pytest.mark.parametrize(
    "plant", [_not_reset, _moved_at_the_base, pytest.param(_not_retempered, marks=pytest.mark.slow)]
)
def test_the_check_sees_planted_bugs(monkeypatch, plant):
    plant(monkeypatch)
    assert abs(discrete_z_score(ess_threshold=1.0)[0]) > 5.0


CONJUGATE_RUNS = {
    # The adaptive waste-free run is the one by default; ladders are there in all other tests.
    "ladder": {"inverse_temperatures": (np.arange(1, 17) / 16) ** 2},
    "adaptive": {"target_ess": 0.8},
    "dense": {"target_ess": 0.8, "preconditioning": "dense"},
    "waste_free": {"target_ess": 0.8, "waste_free": True, "num_mcmc_steps": 20},
    "islands": {"target_ess": 0.8, "num_islands": 8},
}


def preconditioned(step_size, inverse_mass=None):
    from ebjax.samplers.hmc import hmc

    return hmc(step_size=step_size, num_steps=3, inverse_mass=inverse_mass)


def slow(name, slow_names):
    return pytest.param(name, marks=pytest.mark.slow) if name in slow_names else name


@pytest.mark.parametrize(
    "name", [slow(name, ("ladder", "adaptive", "dense", "islands")) for name in CONJUGATE_RUNS]
)
def test_log_z_of_a_conjugate_gaussian(name):
    path, params = conjugate_path()
    kernel = preconditioned if name == "dense" else mala
    result = smc_sample(
        jax.random.key(3),
        kernel,
        path,
        params,
        prior_draws(),
        **{
            "num_mcmc_steps": 10,
            "step_size": 0.3,
            "target_acceptance": 0.7,
            **CONJUGATE_RUNS[name],
        },
    )
    error = result.log_z - CONJUGATE_LOG_Z
    assert 0.0 < result.log_z_standard_error < 0.15
    assert abs(error) < 5.0 * result.log_z_standard_error
    weights = jax.nn.softmax(result.log_weights)
    mean = weights @ result.particles
    # Posterior N(y / 1.25, 0.2); about 2,000 draws that are not quite independent.
    np.testing.assert_allclose(mean, OBSERVED / 1.25, atol=0.1)
    assert abs(jnp.exp(result.log_weights).mean() - 1.0) < 1e-3
    assert np.all(result.info.is_finite)
    last = result.num_temperatures.max() - 1
    rate = np.ravel(result.info.acceptance_rate[..., last])
    assert np.nanmax(np.abs(rate - 0.7)) < 0.15


def test_the_first_temperature_is_importance_sampling(x64):
    """What comes after it at the same β changes nothing."""
    path, params = conjugate_path()
    x = prior_draws(SMALL)
    exact = np.logaddexp.reduce(log_importance(path, params, 1.0, x)) - np.log(SMALL)
    for options in ({}, {"ess_threshold": 0.0}, {"waste_free": True}):
        result = smc_sample(
            jax.random.key(0),
            SMALL_KERNEL,
            path,
            params,
            x,
            inverse_temperatures=[1.0] * len(LADDER),
            **options,
        )
        assert abs(result.log_z - exact) < 1e-12


def test_annealed_importance_sampling_never_resamples(x64):
    path, params = conjugate_path()
    arguments = (jax.random.key(0), SMALL_KERNEL, path, params, prior_draws(SMALL))
    result = ais_log_z(*arguments, inverse_temperatures=LADDER)
    assert not np.any(result.info.is_resampled)
    weights = np.exp(result.log_weights)
    standard_error = weights.std(ddof=1) / weights.mean() / np.sqrt(SMALL)
    np.testing.assert_allclose(result.log_z_standard_error, standard_error, rtol=1e-10)


@pytest.mark.slow
def test_a_threshold_that_is_never_reached_is_annealed_importance_sampling(x64):
    path, params = conjugate_path()
    arguments = (jax.random.key(0), SMALL_KERNEL, path, params, prior_draws(SMALL))
    runs = (
        smc_sample(*arguments, inverse_temperatures=LADDER, ess_threshold=threshold)
        for threshold in (0.0, 1e-9)
    )
    chex.assert_trees_all_close(*runs, rtol=1e-12)


def first_step_cess(monkeypatch, sign):
    """Conditional effective size at the first β that a run chooses, worked out from the draws."""
    if sign < 0:
        real = population_module.conditional_effective_sample_size
        monkeypatch.setattr(
            population_module,
            "conditional_effective_sample_size",
            lambda log_weights, increments: real(log_weights, -increments),
        )
    skewed = lambda params, x: jnp.sum(jnp.exp(2.0 * x) - x)  # noqa: E731
    path, params, x = geometric_path(normal_energy, skewed), ((0.0, 1.0), ()), prior_draws(500)
    result = smc_sample(jax.random.key(0), mala(step_size=0.01), path, params, x, target_ess=0.6)
    beta = result.info.inverse_temperature[0]
    log_u = log_importance(path, params, beta, x)
    u = np.exp(log_u - log_u.max())
    return u.sum() ** 2 / (u**2).sum() / 500, result


def test_the_ladder_keeps_the_conditional_effective_size(monkeypatch, x64):
    share, result = first_step_cess(monkeypatch, 1.0)
    assert abs(share - 0.6) < 1e-6
    num = int(result.num_temperatures)
    assert num > 3
    np.testing.assert_allclose(result.info.conditional_ess[: num - 1], 300.0, rtol=1e-6)
    assert result.info.conditional_ess[num - 1] >= 300.0
    betas = np.asarray(result.info.inverse_temperature)
    assert np.all(np.diff(betas[:num]) > 0.0)
    assert np.all(betas[num - 1 :] == 1.0)


def test_the_check_sees_the_wrong_sign(monkeypatch, x64):
    assert abs(first_step_cess(monkeypatch, -1.0)[0] - 0.6) > 0.05


def test_a_target_without_mass_on_most_draws_is_reached():
    """A wall: no step, however small, keeps the effective size, and the run goes on."""
    half = lambda params, x: jnp.where(x > 1.0, 0.0, jnp.inf) + normal_energy((0.0, 1.0), x)  # noqa: E731
    x = jax.random.normal(jax.random.key(0), (4000,))
    result = smc_sample(
        jax.random.key(0),
        mala(step_size=0.1),
        geometric_path(normal_energy, half),
        ((0.0, 1.0), ()),
        x,
    )
    exact = np.log(0.15865525)
    assert abs(result.log_z - exact) < 5.0 * result.log_z_standard_error
    assert result.num_temperatures <= 3
    assert np.all(result.particles > 1.0)


def test_the_last_temperature_permitted_reaches_the_target():
    path, params = conjugate_path()
    result = smc_sample(
        jax.random.key(0),
        mala(step_size=0.1),
        path,
        params,
        prior_draws(100),
        max_num_temperatures=3,
        target_ess=0.99,
    )
    assert result.num_temperatures == 3
    assert result.info.inverse_temperature[-1] == 1.0
    assert result.info.conditional_ess[-1] < 50.0


DEVICE_RUNS = {
    "ladder": {"inverse_temperatures": LADDER},
    "adaptive": {
        "target_ess": 0.7,
        "preconditioning": "diagonal",
        "target_acceptance": 0.6,
        "num_mcmc_steps": 2,
    },
    "waste_free": {"inverse_temperatures": LADDER, "waste_free": True},
    "islands": {"inverse_temperatures": LADDER, "num_islands": 8},
}


@pytest.mark.parametrize("name", [slow(name, ("waste_free", "islands")) for name in DEVICE_RUNS])
def test_devices_do_not_matter(name, x64):
    path, params = conjugate_path()
    kernel = preconditioned if name == "adaptive" else SMALL_KERNEL

    def run(num_devices):
        return smc_sample(
            jax.random.key(5),
            kernel,
            path,
            params,
            prior_draws(SMALL),
            num_devices=num_devices,
            **DEVICE_RUNS[name],
        )

    # Not waste-free on 8, where a device would have two chains of 5.
    num_devices = {"ladder": 2, "waste_free": 4}.get(name, 8)
    chex.assert_trees_all_close(run(1), run(num_devices), rtol=1e-7, atol=1e-9)


WITHOUT_PARTS = {
    "ladder": (SMALL_KERNEL, {"inverse_temperatures": LADDER}),
    "adaptive": (SMALL_KERNEL, {"target_ess": 0.7}),
    "langevin": (langevin(step_size=0.1), {"inverse_temperatures": LADDER}),
}


@pytest.mark.parametrize("name", [slow(name, ("adaptive", "langevin")) for name in WITHOUT_PARTS])
def test_a_path_without_parts_gives_the_same(name, x64):
    path, params = conjugate_path()
    kernel, options = WITHOUT_PARTS[name]
    with_parts, without = (
        smc_sample(jax.random.key(0), kernel, energy_fn, params, prior_draws(SMALL), **options)
        for energy_fn in (path, lambda params, x: path(params, x))
    )
    chex.assert_trees_all_close(
        with_parts._replace(num_evaluations=0),
        without._replace(num_evaluations=0),
        rtol=1e-7,
    )


def test_evaluations_are_counted(x64):
    path, params = conjugate_path()
    for waste_free, expected in ((False, 1 + 4 * 5), (True, 1 + 4 * 4 / 5)):
        result = smc_sample(
            jax.random.key(0),
            SMALL_KERNEL,
            path,
            params,
            prior_draws(SMALL),
            inverse_temperatures=LADDER,
            waste_free=waste_free,
        )
        assert abs(result.num_evaluations - expected) < 1e-4


def test_a_second_run_does_not_trace_again():
    num_traces = 0

    def counted(params, x):
        nonlocal num_traces
        num_traces += 1
        return normal_energy((params, 0.5), x)

    def run(seed, observed, step_size):
        return smc_sample(
            jax.random.key(seed),
            mala,
            geometric_path(normal_energy, counted),
            ((0.0, 1.0), observed),
            prior_draws(20, seed),
            inverse_temperatures=np.array(LADDER) ** (1.0 + seed),
            step_size=step_size,
        ).log_z

    first = run(0, jnp.zeros(DIM), 0.1)
    traced = num_traces
    second = run(1, jnp.ones(DIM), 0.2)
    assert num_traces == traced
    assert first != second


def test_it_is_embedded_in_jit_and_grad(x64):
    """The gradient of log Z by a parameter of the base, through importance sampling."""
    path, params = conjugate_path()
    x = prior_draws(30)

    def log_z(observed):
        return smc_sample(
            jax.random.key(0),
            mala(step_size=0.1),
            path,
            (params[0], observed),
            x,
            inverse_temperatures=[1.0],
            ess_threshold=0.0,
        ).log_z

    def exact(observed):
        log_weights = jax.vmap(
            lambda x: path((0.0, (params[0], observed)), x) - path((1.0, (params[0], observed)), x)
        )(x)
        return jax.nn.logsumexp(log_weights)

    gradient = jax.jit(jax.grad(log_z))(params[1])
    np.testing.assert_allclose(gradient, jax.jit(jax.grad(exact))(params[1]), rtol=1e-9)


def test_float32_stays_float32(x64):
    path, params = conjugate_path()
    run = functools.partial(
        smc_sample, kernel=mala, energy_fn=path, inverse_temperatures=LADDER, target_acceptance=0.6
    )
    params = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), params)
    result = jax.eval_shape(
        lambda key, params, x: run(key, params=params, initial_particles=x),
        jax.random.key(0),
        params,
        prior_draws(40).astype(jnp.float32),
    )
    for leaf in (result.particles, result.log_weights, result.log_z, result.info.step_size):
        assert leaf.dtype == jnp.float32


def test_nan_is_flagged():
    path = geometric_path(normal_energy, lambda params, x: jnp.where(x > 1.0, jnp.nan, 0.5 * x**2))
    x = jax.random.normal(jax.random.key(0), (200,))
    result = smc_sample(
        jax.random.key(0),
        mala(step_size=0.1),
        path,
        ((0.0, 1.0), ()),
        x,
        inverse_temperatures=LADDER,
    )
    assert not result.info.is_finite[0]


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"inverse_temperatures": [0.5, 0.9]}, "inverse_temperatures"),
        ({"inverse_temperatures": [0.5, 0.4, 1.0]}, "inverse_temperatures"),
        ({"target_ess": 1.0}, "target_ess is 1.0"),
        ({"ess_threshold": 1.5}, "ess_threshold is 1.5"),
        ({"resampling": "uniform"}, "'uniform'"),
        ({"num_mcmc_steps": 0}, "num_mcmc_steps is 0"),
        ({"num_mcmc_steps": 3, "waste_free": True}, "num_mcmc_steps is 3"),
        ({"waste_free": True, "ess_threshold": 0.0}, "ess_threshold is 0"),
        ({"num_islands": 3}, "num_islands is 3"),
        ({"num_devices": 3}, "num_devices is 3"),
        ({"num_islands": 2, "num_devices": 4}, "num_devices is 4"),
        ({"preconditioning": "full"}, "'full'"),
        ({"target_acceptance": 0.6}, "kernel is a Kernel"),
    ],
    ids=str,
)
def test_wrong_calls(options, match):
    path, params = conjugate_path()
    with pytest.raises(ValueError, match=match):
        smc_sample(jax.random.key(0), mala(step_size=0.1), path, params, prior_draws(40), **options)

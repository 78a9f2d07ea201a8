"""ULA and SGLD against the laws of their discretised chains, and what their options do."""

import importlib
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.linalg

from ebjax.samplers import sample
from ebjax.samplers.langevin import Dataset, langevin, polynomial_decay, posterior_energy, sgld

# The package exports the function of the same name, which hides the module.
langevin_module = importlib.import_module("ebjax.samplers.langevin")

MEAN = jnp.array([1.5, -0.7])
PRECISION = jnp.array([0.5, 2.0])
NUM_CHAINS = 20_000


def gaussian_energy(params, x):
    mean, precision = params
    return 0.5 * jnp.sum(precision * jnp.square(x - mean))


def stationary_variance(step_size, noise_scale):
    """s² / (1 - (1 - hλ)²): the law of x' = x - hλ(x - m) + s ξ."""
    return noise_scale**2 / (1.0 - (1.0 - step_size * PRECISION) ** 2)


def z_scores(kernel, variance):
    """Standard scores of mean and variance over independent chains, 400 steps from a far start.

    The start is forgotten as |1 - hλ|^400 < 1e-30, so the ends are independent draws of the
    stationary Gaussian: Var(mean) = v/C and Var(sample variance) = 2v²/C.
    """
    draws = sample(
        jax.random.key(0),
        kernel,
        gaussian_energy,
        (MEAN, PRECISION),
        jnp.full((NUM_CHAINS, 2), 3.0),
        num_samples=1,
        num_burn_in=399,
    )
    ends = np.asarray(draws.positions[0], np.float64)
    z_mean = (ends.mean(0) - MEAN) / np.sqrt(variance / NUM_CHAINS)
    z_variance = (((ends - MEAN) ** 2).mean(0) / variance - 1.0) * np.sqrt(NUM_CHAINS / 2.0)
    return np.abs(np.concatenate([z_mean, z_variance]))


LAWS = {
    "unit": ({"step_size": 0.4}, np.sqrt(2 * 0.4)),
    "hot": ({"step_size": 0.4, "temperature": 2.5}, np.sqrt(2 * 0.4 * 2.5)),
    "own_noise": ({"step_size": 0.4, "noise_scale": 0.3}, 0.3),
    # The noise is set apart: the temperature has no say.
    "own_noise_hot": ({"step_size": 0.4, "temperature": 9.0, "noise_scale": 0.3}, 0.3),
}


@pytest.mark.parametrize("name", LAWS)
def test_law_of_the_discretised_chain(name):
    options, noise_scale = LAWS[name]
    variance = stationary_variance(options["step_size"], noise_scale)
    assert np.all(z_scores(langevin(**options), variance) < 5.0)


def test_the_check_sees_noise_without_its_factor_of_two():
    variance = stationary_variance(0.4, np.sqrt(2 * 0.4))
    planted = langevin(step_size=0.4, noise_scale=np.sqrt(0.4).item())
    assert np.all(z_scores(planted, variance)[2:] > 5.0)


def test_the_check_tells_the_discretised_law_from_the_continuous_one():
    assert np.all(z_scores(langevin(step_size=0.4), 1.0 / PRECISION)[2:] > 5.0)


def one_step(kernel, energy_fn, position, params=()):
    state = kernel.init(energy_fn, params, position)
    return kernel.step(jax.random.key(0), energy_fn, params, state)


def steep(params, x):
    return 50.0 * jnp.sum(jnp.square(x))


def test_temperature_zero_descends_the_gradient():
    position = jnp.array([0.3, -0.001, 2.0])
    state, info = one_step(langevin(step_size=0.002, temperature=0.0), steep, position)
    np.testing.assert_allclose(state.position, position - 0.002 * 100.0 * position, rtol=1e-6)
    np.testing.assert_allclose(info.energy, steep((), position), rtol=1e-6)


def test_gradient_clip_acts_on_each_component():
    position = jnp.array([0.3, -0.001, -2.0])
    kernel = langevin(step_size=0.1, temperature=0.0, gradient_clip=0.5)
    state, info = one_step(kernel, steep, position)
    expected = position - 0.1 * jnp.array([0.5, -0.1, -0.5])
    np.testing.assert_allclose(state.position, expected, rtol=1e-5)
    # The norm is reported as it was, so that clipping can be noticed.
    np.testing.assert_allclose(info.gradient_norm, jnp.linalg.norm(100 * position), rtol=1e-6)


def test_bounds_clip_the_position_and_nothing_else():
    position = jnp.array([0.95, 0.0, -0.95])
    free, _ = one_step(langevin(step_size=0.5), gaussian_energy, position, (0.0, 1.0))
    bounded = langevin(step_size=0.5, bounds=(-0.5, 0.8))
    boxed, _ = one_step(bounded, gaussian_energy, position, (0.0, 1.0))
    np.testing.assert_array_equal(boxed.position, jnp.clip(free.position, -0.5, 0.8))
    assert np.any(boxed.position != free.position)


def test_is_finite_covers_the_new_position():
    """Energy 0 and an infinite gradient: the step itself is what overflows."""
    energy_fn = lambda params, x: jnp.sum(jnp.sqrt(x))  # noqa: E731
    state, info = one_step(langevin(step_size=0.1), energy_fn, jnp.zeros(2))
    assert np.isfinite(info.energy)
    assert not np.isfinite(state.position).any()
    assert not info.is_finite


def test_step_size_may_be_traced():
    """An annealed step size is one program."""
    position = jnp.array([0.4, 1.0])

    @jax.jit
    def moved(step_size):
        kernel = langevin(step_size=step_size, temperature=0.0)
        return one_step(kernel, steep, position)[0].position

    for step_size in (0.001, 0.004):
        np.testing.assert_allclose(moved(step_size), position * (1 - 100 * step_size), rtol=1e-5)
    assert moved._cache_size() == 1


# Preconditioning: the step of a Gaussian is affine, and is read off exactly.

COUPLED = np.array([[2.0, 0.6], [0.6, 0.5]])
METRICS = {
    "identity": None,
    "diagonal": np.array([0.3, 2.0]),
    "dense": np.array([[0.4, -0.5], [-0.5, 1.9]]),
}


def affine_step(monkeypatch, inverse_mass, *, step_size=0.3, temperature=1.7):
    """``(A, B)`` of x' = A x + B ξ, from the library's step with its noise given."""
    kernel = langevin(step_size=step_size, temperature=temperature, inverse_mass=inverse_mass)
    as_tree = lambda x: {"a": x[:1], "b": x[1]}  # noqa: E731
    energy_fn = lambda _, x: 0.5 * (v := jnp.append(x["a"], x["b"])) @ COUPLED @ v  # noqa: E731

    def end(x, xi):
        with monkeypatch.context() as patch:
            patch.setattr(langevin_module, "random_normal_like", lambda key, tree: as_tree(xi))
            state = kernel.init(energy_fn, (), as_tree(x))
            position = kernel.step(jax.random.key(0), energy_fn, (), state)[0].position
        return jnp.append(position["a"], position["b"])

    return jax.jit(jax.jacobian(end, (0, 1)))(jnp.array([0.4, -1.0]), jnp.zeros(2))


@pytest.mark.parametrize("name", METRICS)
def test_preconditioned_drift_and_noise(monkeypatch, x64, name):
    inverse_mass = np.eye(2) if METRICS[name] is None else METRICS[name]
    inverse_mass = np.diag(inverse_mass) if inverse_mass.ndim == 1 else inverse_mass
    drift, noise = affine_step(monkeypatch, METRICS[name])
    np.testing.assert_allclose(drift, np.eye(2) - 0.3 * inverse_mass @ COUPLED, atol=1e-14)
    np.testing.assert_allclose(noise @ noise.T, 2 * 0.3 * 1.7 * inverse_mass, atol=1e-14)


def stationary_error(monkeypatch, inverse_mass, step_size):
    drift, noise = affine_step(monkeypatch, inverse_mass, step_size=step_size, temperature=1.0)
    drift, noise = np.asarray(drift), np.asarray(noise)
    covariance = scipy.linalg.solve_discrete_lyapunov(drift, noise @ noise.T)
    return np.abs(covariance - np.linalg.inv(COUPLED)).max()


@pytest.mark.parametrize("name", METRICS)
def test_the_law_is_right_to_first_order_under_any_metric(monkeypatch, x64, name):
    coarse, fine = (stationary_error(monkeypatch, METRICS[name], h) for h in (0.02, 0.01))
    assert abs(np.log2(coarse / fine) - 1.0) < 0.05


def test_noise_with_a_wrong_root_has_another_law(monkeypatch, x64):
    monkeypatch.setattr(langevin_module, "scaled_noise", langevin_module.velocity)
    coarse, fine = (stationary_error(monkeypatch, METRICS["dense"], h) for h in (0.02, 0.01))
    assert fine > 0.1
    assert coarse / fine < 1.1


# Schedules.


def test_polynomial_decay():
    schedule = polynomial_decay(0.3, offset=7.0, power=0.6)
    a = 0.3 * 7.0**0.6
    np.testing.assert_allclose(schedule(jnp.arange(5)), a * (7.0 + np.arange(5)) ** -0.6, rtol=1e-6)
    assert schedule == polynomial_decay(0.3, offset=7.0, power=0.6)


@pytest.mark.parametrize(
    "schedule",
    [
        polynomial_decay(0.1, offset=2.0),
        optax.cosine_decay_schedule(0.1, 5),
        lambda t: 0.1 / (t + 1),
    ],
    ids=["polynomial", "optax", "function"],
)
def test_a_schedule_is_followed_from_step_to_step(schedule):
    kernel = langevin(step_size=schedule, temperature=0.0)
    state = kernel.init(gaussian_energy, (0.0, 1.0), jnp.ones(2))
    step = lambda state, key: kernel.step(key, gaussian_energy, (0.0, 1.0), state)  # noqa: E731
    state, _ = jax.lax.scan(step, state, jax.random.split(jax.random.key(0), 4))
    expected = np.prod([1.0 - float(schedule(jnp.int32(t))) for t in range(4)])
    np.testing.assert_allclose(state.position, expected, rtol=1e-5)
    assert state.count == 4


def test_the_noise_follows_the_schedule_too():
    kernel = langevin(step_size=lambda count: jnp.where(count == 0, 0.04, 0.01))
    flat = lambda params, x: 0.0 * jnp.sum(x)  # noqa: E731
    state = kernel.init(flat, (), jnp.zeros(50_000))
    for step_size in (0.04, 0.01):
        before = state.position
        state, _ = kernel.step(jax.random.key(1), flat, (), state)
        squares = np.asarray(state.position - before, np.float64) ** 2 / (2.0 * step_size)
        assert abs(squares.mean() - 1.0) * np.sqrt(50_000 / 2.0) < 5.0


def test_without_a_schedule_there_is_no_counter():
    state = langevin(step_size=0.1).init(gaussian_energy, (0.0, 1.0), jnp.ones(2))
    assert len(jax.tree.leaves(state)) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"step_size": 0.0}, "step_size is 0.0"),
        ({"step_size": float("nan")}, "step_size is nan"),
        ({"step_size": 0.1, "temperature": -1}, "temperature is -1"),
        ({"step_size": 0.1, "noise_scale": -0.5}, "noise_scale is -0.5"),
        ({"step_size": 0.1, "inverse_mass": np.ones((2, 3))}, r"shape \(2, 3\)"),
    ],
)
def test_options_out_of_range_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        langevin(**options)


# Minibatches. Data with precisions of their own, so that the gradient's noise depends on x.

DATA = {"y": np.array([0.5, -1.0, 3.0, 1.2, 4.0]), "precision": np.array([1.0, 0.3, 2.0, 0.7, 0.2])}
NUM_DATA, BATCH_SIZE = 5, 2
PRIOR_PRECISION = 0.8


def posterior():
    return posterior_energy(
        lambda params, x: 0.5 * params * x**2,
        lambda params, x, datum: 0.5 * datum["precision"] * (x - datum["y"]) ** 2,
    )


def all_minibatches(replace):
    """Every ordered minibatch; all are equally likely."""
    if replace:
        return np.array(list(itertools.product(range(NUM_DATA), repeat=BATCH_SIZE)))
    return np.array(list(itertools.permutations(range(NUM_DATA), BATCH_SIZE)))


@pytest.mark.parametrize("replace", [True, False])
def test_the_gradient_of_a_minibatch_is_right_on_average(x64, replace):
    energy_fn = posterior()
    dataset = Dataset(jax.tree.map(jnp.asarray, DATA))
    gradient = jax.grad(lambda x, data: energy_fn((PRIOR_PRECISION, data), x))
    x = jnp.array(0.7)
    batches = [
        gradient(x, langevin_module.take_examples(dataset, i)) for i in all_minibatches(replace)
    ]
    np.testing.assert_allclose(np.mean(batches), gradient(x, dataset), rtol=1e-13)
    unscaled = [
        gradient(x, langevin_module.take_examples(dataset, i)._replace(scale=1.0))
        for i in all_minibatches(replace)
    ]
    assert abs(np.mean(unscaled) - gradient(x, dataset)) > 0.1


@pytest.mark.parametrize("replace", [True, False])
def test_all_minibatches_are_equally_likely(monkeypatch, replace):
    """Over 10,000 steps; a chi-squared statistic over the ordered pairs that may come."""
    seen = lambda params, x: jnp.dot(params[1].examples["y"], jnp.array([1.0, 10.0]))  # noqa: E731
    kernel = sgld(step_size=0.1, batch_size=BATCH_SIZE, replace=replace)
    params = ((), Dataset({"y": jnp.arange(5.0)}))
    state = kernel.init(seen, params, jnp.array(0.0))
    keys = jax.random.split(jax.random.key(0), 10_000)
    info = jax.vmap(lambda key: kernel.step(key, seen, params, state)[1])(keys)
    codes = all_minibatches(replace) @ np.array([1, 10])
    counts = np.array([(np.round(info.energy) == code).sum() for code in codes])
    assert counts.sum() == 10_000
    degrees, expected = len(codes) - 1, 10_000 / len(codes)
    statistic = ((counts - expected) ** 2 / expected).sum()
    assert (statistic - degrees) / np.sqrt(2.0 * degrees) < 5.0


def sgld_law(step_size, replace):
    """Stationary mean and second moment of x' = (1 - hA) x + h b + sqrt(2h) ξ, (A, b) at random."""
    index = all_minibatches(replace)
    scale = NUM_DATA / BATCH_SIZE
    a = PRIOR_PRECISION + scale * DATA["precision"][index].sum(1)
    b = scale * (DATA["precision"] * DATA["y"])[index].sum(1)
    mean = b.mean() / a.mean()
    rest = 2.0 * step_size * np.mean((1.0 - step_size * a) * b) * mean
    rest += step_size**2 * np.mean(b**2) + 2.0 * step_size
    return mean, rest / (1.0 - np.mean((1.0 - step_size * a) ** 2))


def sgld_z_scores(kernel, law):
    draws = sample(
        jax.random.key(0),
        kernel,
        posterior(),
        (PRIOR_PRECISION, Dataset(jax.tree.map(jnp.float32, DATA))),
        jnp.full((NUM_CHAINS,), 1.0),
        num_samples=1,
        num_burn_in=60,
    )
    ends = np.asarray(draws.positions[0], np.float64)
    return [
        abs(values.mean() - expected) / values.std() * np.sqrt(NUM_CHAINS)
        for values, expected in zip((ends, ends**2), law, strict=True)
    ]


@pytest.mark.parametrize("replace", [True, False])
def test_law_of_sgld(replace):
    kernel = sgld(step_size=0.12, batch_size=BATCH_SIZE, replace=replace)
    assert max(sgld_z_scores(kernel, sgld_law(0.12, replace))) < 5.0
    # The check tells one way to draw from the other, and either from all data.
    assert max(sgld_z_scores(kernel, sgld_law(0.12, not replace))) > 5.0
    assert max(sgld_z_scores(langevin(step_size=0.12), sgld_law(0.12, replace))) > 5.0


def test_all_data_without_replacement_is_langevin():
    """The order of the sum apart."""
    params = (PRIOR_PRECISION, Dataset(jax.tree.map(jnp.float32, DATA)))
    options = {"step_size": 0.06, "temperature": 0.0}
    full = sgld(batch_size=NUM_DATA, replace=False, **options)
    state, _ = one_step(full, posterior(), jnp.array(1.0), params)
    plain, _ = one_step(langevin(**options), posterior(), jnp.array(1.0), params)
    np.testing.assert_allclose(state.position, plain.position, rtol=1e-5)


def test_a_batch_size_out_of_range_is_named():
    with pytest.raises(ValueError, match="batch_size is 0"):
        sgld(step_size=0.1, batch_size=0)
    kernel = sgld(step_size=0.1, batch_size=6, replace=False)
    with pytest.raises(ValueError, match="batch_size is 6"):
        one_step(kernel, posterior(), jnp.array(1.0), (1.0, Dataset(DATA)))

"""Recovery likelihood on Gaussians, where chains, gradients and optimum have closed forms."""

import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ebjax.objectives.recovery_likelihood import (
    energy_of_data,
    recovery_chain,
    recovery_likelihood,
    recovery_sample,
    scaled_by_step_size,
    tethered,
)
from ebjax.objectives.recovery_schedule import (
    cosine_noise,
    recovery_pair,
    recovery_schedule,
    steps_of_narrow_data,
)
from ebjax.samplers import langevin, mala

module = importlib.import_module("ebjax.objectives.recovery_likelihood")

MEAN, VARIANCE = 0.7, 0.25  # of the data, in one dimension
SCHEDULE = recovery_schedule(cosine_noise(6))
NUM_LEVELS, TOP = 6, 5
NUM_STEPS, STEP_FRACTION = 4, 0.3


def quadratic(params, y, level):
    """A Gaussian a level: precision p, and q = precision times mean."""
    return 0.5 * params["p"][level] * jnp.square(y) - params["q"][level] * y


def exact_params(schedule=SCHEDULE):
    """Of the laws of y: N(a ᾱ m, a² (ᾱ² S + σ̄²)), with a = 1 at the top."""
    a = np.append(schedule.step_signal[:-1], 1.0)
    signal, noise = schedule.signal[:-1], schedule.noise[:-1]
    precision = 1.0 / (a**2 * (signal**2 * VARIANCE + noise**2))
    return {"p": jnp.asarray(precision), "q": jnp.asarray(precision * a * signal * MEAN)}


def off_params():
    exact = exact_params()
    return {"p": 0.6 * exact["p"] + 0.3, "q": 1.2 * exact["q"] - 0.2}


def draw_data(key, num):
    return MEAN + np.sqrt(VARIANCE) * jax.random.normal(key, (num,))


# The schedule.


def test_published_schedules():
    """Squares of σ_t of the cosine schedule, and σ_t of the linear one merged at six places."""
    squares = [0.0636, 0.1798, 0.3031, 0.4507, 0.6522, 0.9407]
    np.testing.assert_allclose(SCHEDULE.step_noise**2, squares, atol=6e-5)
    signal = np.cumprod(1.0 - np.linspace(1e-4, 0.02, 1000))[[0, 100, 200, 300, 400, 500, 999]]
    linear = recovery_schedule(np.sqrt(1.0 - signal))
    np.testing.assert_allclose(linear.noise[0], 0.01)
    expected = [0.3237, 0.5165, 0.6322, 0.7132, 0.7734, 0.9997]
    np.testing.assert_allclose(linear.step_noise, expected, atol=1e-4)


def test_exact_precisions_are_those_known():
    """For N(0.7, 0.25) on the cosine schedule: forgetting a factor a would change all of them."""
    np.testing.assert_allclose(exact_params()["p"], [4.27, 4.09, 3.38, 3.04, 3.69, 1.08], atol=6e-3)


@pytest.mark.parametrize("shared_noise", [False, True])
@pytest.mark.parametrize("level", [0, 3, TOP])
def test_pairs_have_the_laws_of_their_levels(level, shared_noise, x64):
    num = 40_000
    keys = jax.random.split(jax.random.key(0), num)
    draw = lambda key, x: recovery_pair(key, x, level, SCHEDULE, shared_noise=shared_noise)  # noqa: E731
    y, noisier = jax.jit(jax.vmap(draw))(keys, draw_data(jax.random.key(1), num))
    signal, noise = SCHEDULE.signal[level + 1], SCHEDULE.noise[level + 1]
    exact = exact_params()
    laws = [
        (y, exact["q"][level] / exact["p"][level], 1.0 / exact["p"][level]),
        (noisier, signal * MEAN, signal**2 * VARIANCE + noise**2),
    ]
    share = SCHEDULE.scale[level]
    change = signal - share * SCHEDULE.signal[level], noise - share * SCHEDULE.noise[level]
    if shared_noise:  # not the pair of a Markov chain, whose differences vary more
        difference = change[0] ** 2 * VARIANCE + change[1] ** 2
        assert difference < 0.95 * SCHEDULE.step_noise[level] ** 2
        laws.append((noisier - y, change[0] * MEAN, difference))
    elif level < TOP:
        laws.append((noisier - y, 0.0, SCHEDULE.step_noise[level] ** 2))
    for values, mean, variance in laws:
        assert abs(values.mean() - mean) < 5.0 * np.sqrt(variance / num)
        assert abs(values.var() / variance - 1.0) < 5.0 * np.sqrt(2.0 / num)


# The chain.


def chain_law(start_mean, start_variance, p, q, level, schedule, *, tether=None):
    """Mean and variance of y after the chain from y = x_{t+1}, of that mean and variance.

    y' = (1 - h (p + τ)) y + h (q + τ x) + sqrt(2h) ξ is affine: y_K = A x + B + noise of
    variance C.
    """
    variance = schedule.step_noise[level] ** 2
    h = STEP_FRACTION * variance
    if tether is None:
        tether = 0.0 if level == schedule.num_levels - 1 else 1.0 / variance
    a, b, c = 1.0, 0.0, 0.0
    keep = 1.0 - h * (p + tether)
    for _ in range(NUM_STEPS):
        a, b, c = keep * a + h * tether, keep * b + h * q, keep**2 * c + 2.0 * h
    return a * start_mean + b, a**2 * start_variance + c


def chain_z_scores(level, params, law, *, build_kernel=langevin, schedule=SCHEDULE):
    num, at = 20_000, 1.3
    run = lambda key: recovery_chain(  # noqa: E731
        key,
        quadratic,
        params,
        jnp.asarray(at),
        jnp.asarray(at),
        level,
        schedule=schedule,
        num_steps=NUM_STEPS,
        step_fraction=STEP_FRACTION,
        build_kernel=build_kernel,
    )
    ends, info = jax.jit(jax.vmap(run))(jax.random.split(jax.random.key(0), num))
    assert np.all(info.is_finite == 1.0)
    mean, variance = law(at)
    z_mean = (ends.mean() - mean) / np.sqrt(variance / num)
    z_variance = (ends.var() / variance - 1.0) * np.sqrt(num / 2.0)
    return max(abs(float(z_mean)), abs(float(z_variance)))


FLAT = {"p": jnp.zeros(NUM_LEVELS), "q": jnp.zeros(NUM_LEVELS)}


@pytest.mark.parametrize("level", [0, 3])
def test_without_an_energy_the_tether_alone_is_sampled(level, x64):
    """K steps with s = 0.3 from x_{t+1}: its variance is in closed form, and near σ²."""
    law = lambda at: chain_law(at, 0.0, 0.0, 0.0, level, SCHEDULE)  # noqa: E731
    assert chain_z_scores(level, FLAT, law) < 5.0
    for bug in (0.5, 2.0):  # a tether of half or twice the strength
        wrong = SCHEDULE._replace(tether=bug * SCHEDULE.tether)
        assert chain_z_scores(level, FLAT, law, schedule=wrong) > 5.0

    def without_the_root(*, step_size):
        return langevin(step_size=step_size, noise_scale=2.0 * step_size)

    assert chain_z_scores(level, FLAT, law, build_kernel=without_the_root) > 5.0
    assert abs(law(1.3)[1] / SCHEDULE.step_noise[level] ** 2 - 1.0) < 0.2


def test_at_the_top_there_is_no_tether(x64):
    params = exact_params()
    p, q = float(params["p"][TOP]), float(params["q"][TOP])
    law = lambda at: chain_law(at, 0.0, p, q, TOP, SCHEDULE)  # noqa: E731
    assert chain_z_scores(TOP, params, law) < 5.0
    tied = SCHEDULE._replace(tether=1.0 / SCHEDULE.step_noise**2)
    assert chain_z_scores(TOP, params, law, schedule=tied) > 5.0
    energies = [tethered(quadratic, SCHEDULE)(params, 0.3, far, TOP) for far in (0.0, 9.0)]
    assert energies[0] == energies[1] == quadratic(params, 0.3, TOP)


# The gradient.


def expected_gradient(params, weights, schedule=SCHEDULE):
    """Of the loss, level drawn uniformly: ½(E y⁺² - E y⁻²) and -(E y⁺ - E y⁻), by moments alone."""
    exact, slopes = exact_params(), {"p": [], "q": []}
    for level in range(NUM_LEVELS):
        signal, noise = schedule.signal[level + 1], schedule.noise[level + 1]
        mean, variance = chain_law(
            signal * MEAN,
            signal**2 * VARIANCE + noise**2,
            float(params["p"][level]),
            float(params["q"][level]),
            level,
            schedule,
        )
        data_variance = 1.0 / float(exact["p"][level])
        data_mean = float(exact["q"][level]) * data_variance
        share = weights[level] / NUM_LEVELS
        slopes["p"].append(0.5 * share * (data_mean**2 + data_variance - mean**2 - variance))
        slopes["q"].append(share * (mean - data_mean))
    return {name: np.array(values) for name, values in slopes.items()}


def gradient_z_scores(*, schedule=SCHEDULE, num=60_000, weights=None, **options):
    """The objective's gradient against the exact one, in standard errors over examples."""
    weights = np.linspace(0.5, 2.0, NUM_LEVELS) if weights is None else weights
    objective = recovery_likelihood(
        quadratic,
        schedule,
        num_steps=NUM_STEPS,
        step_fraction=STEP_FRACTION,
        level_weights=weights,
        **options,
    )
    params = off_params()

    def one(x, key):
        return jax.grad(lambda p: objective.loss(p, (), key[None], x[None])[0])(params)

    data = draw_data(jax.random.key(1), num)
    slopes = jax.jit(jax.vmap(one))(data, jax.random.split(jax.random.key(2), num))
    expected = expected_gradient(params, weights)
    z = [
        (np.asarray(slopes[k]).mean(0) - expected[k]) / (np.asarray(slopes[k]).std(0) / num**0.5)
        for k in expected
    ]
    return np.abs(np.stack(z)).max()


@pytest.mark.parametrize("shared_noise", [False, True])
def test_the_gradient_is_exact(shared_noise, x64):
    """Both kinds of pairs give the same one: the chain reads the law of x_{t+1} alone."""
    assert gradient_z_scores(shared_noise=shared_noise) < 5.0


WRONG_SCHEDULES = {
    "y without its factor a": lambda s: s._replace(scale=np.ones(NUM_LEVELS)),
    "a at the top too": lambda s: s._replace(scale=s.step_signal),
    "tether at the top too": lambda s: s._replace(tether=1.0 / s.step_noise**2),
    "tether without the half": lambda s: s._replace(tether=2.0 * s.tether),
}


@pytest.mark.parametrize("bug", WRONG_SCHEDULES)
def test_the_gradient_sees_a_wrong_schedule(bug, x64):
    assert gradient_z_scores(schedule=WRONG_SCHEDULES[bug](SCHEDULE)) > 5.0


def leak(monkeypatch):
    monkeypatch.setattr(jax.lax, "stop_gradient", lambda tree: tree)


def swap(monkeypatch):
    monkeypatch.setattr(module, "contrastive_loss", lambda p, n, *, energy_regularizer: n - p)


def other_level(monkeypatch):
    """Pairs of the next level for samples of this one."""
    shifted = lambda key, x, level, schedule, **options: recovery_pair(  # noqa: E731
        key, x, jnp.minimum(level + 1, TOP), schedule, **options
    )
    monkeypatch.setattr(module, "recovery_pair", shifted)


@pytest.mark.parametrize("bug", [leak, swap, other_level])
def test_the_gradient_sees_a_bug(bug, monkeypatch, x64):
    bug(monkeypatch)
    assert gradient_z_scores() > 5.0


def test_data_and_samples_get_the_same_level():
    """An energy of the level alone has no gap at all."""
    by_level = lambda params, y, level: params * level + 0.0 * y  # noqa: E731
    objective = recovery_likelihood(by_level, SCHEDULE, num_steps=1)
    keys = jax.random.split(jax.random.key(0), 64)
    loss, (_, metrics) = objective.loss(2.0, (), keys, draw_data(jax.random.key(1), 64))
    assert loss == 0.0
    assert metrics["energy_gap"] == 0.0
    assert 0.0 < metrics["energy_data"] < 2.0 * TOP


def test_it_learns_the_law_of_each_level(x64):
    """From one Gaussian for all levels, with kernels that leave the conditional laws invariant."""
    num = 512
    objective = recovery_likelihood(
        quadratic, SCHEDULE, num_steps=12, step_fraction=0.5, build_kernel=mala
    )

    # Natural gradient for a diagonal of curvatures, of the conditional laws at the optimum.
    exact = exact_params()
    narrow = 1.0 / (exact["p"] + SCHEDULE.tether)
    mean = exact["q"] / exact["p"]
    rates = {"p": 2.0 / (narrow**2 + 2.0 * narrow * mean**2), "q": 1.0 / narrow}

    def update(state, t):
        params, average = state
        key, data_key = jax.random.split(jax.random.fold_in(jax.random.key(0), t))
        data = draw_data(data_key, num)
        gradient = jax.grad(objective.loss, has_aux=True)(
            params, (), jax.random.split(key, num), data
        )[0]
        rate = 1.5 / (1.0 + 0.02 * t)
        params = jax.tree.map(lambda p, g, r: p - rate * r * g, params, gradient, rates)
        return (params, jax.tree.map(lambda a, p: a + 0.01 * (p - a), average, params)), None

    start = {"p": jnp.full(NUM_LEVELS, 2.0), "q": jnp.full(NUM_LEVELS, 0.5)}
    run = jax.jit(lambda: jax.lax.scan(update, (start, start), jnp.arange(800))[0])
    (params, average) = run()
    del params
    np.testing.assert_allclose(average["p"], exact["p"], rtol=0.1)
    np.testing.assert_allclose(average["q"] / average["p"], mean, atol=0.03)


# Sampling.

COARSE = recovery_schedule([0.4, 0.7, 0.9, 0.999])


def draw_samples(*, schedule=COARSE, denoise=False):
    run = lambda key, x: recovery_sample(  # noqa: E731
        key,
        quadratic,
        exact_params(COARSE),
        x,
        schedule=schedule,
        num_steps=25,
        step_fraction=0.4,
        build_kernel=mala,
        denoise=denoise,
    )
    start = jax.random.normal(jax.random.key(0), (8_000,))
    x, info = jax.jit(jax.vmap(run))(jax.random.split(jax.random.key(1), len(start)), start)
    assert info.is_finite.shape == (len(start), 3)
    return x


def samples_z_score(x, variance):
    z_mean = (x.mean() - MEAN) / np.sqrt(variance / len(x))
    z_variance = (x.var() / variance - 1.0) * np.sqrt(len(x) / 2.0)
    return max(abs(float(z_mean)), abs(float(z_variance)))


def test_samples_have_the_law_of_the_data(x64):
    """That of data with the noise of the cleanest level, or without it in the mean."""
    ratio = (COARSE.noise[0] / COARSE.signal[0]) ** 2
    noisy, clean = VARIANCE + ratio, VARIANCE**2 / (VARIANCE + ratio)
    drawn = draw_samples()
    assert samples_z_score(drawn, noisy) < 5.0
    assert samples_z_score(drawn, clean) > 5.0
    assert samples_z_score(draw_samples(denoise=True), clean) < 5.0
    # Down the levels without dividing y by a.
    undivided = draw_samples(schedule=COARSE._replace(scale=np.ones(3)))
    assert samples_z_score(undivided, noisy) > 5.0


def test_steps_of_narrow_data_are_shares_of_the_narrowest_law(x64):
    """Of the conditional law of y where data have no variance."""
    share = 0.3
    steps = steps_of_narrow_data(SCHEDULE, share) * SCHEDULE.step_noise**2
    precision = 1.0 / (SCHEDULE.scale * SCHEDULE.noise[:-1]) ** 2
    params = {"p": jnp.asarray(precision), "q": jnp.zeros(NUM_LEVELS)}
    for level, step in enumerate(steps):
        curvature = jax.hessian(tethered(quadratic, SCHEDULE), 1)(params, 0.1, 0.7, level)
        np.testing.assert_allclose(step * curvature, share, rtol=1e-9)


@pytest.mark.parametrize("level", [0, TOP])
def test_a_level_in_the_units_of_the_data(level, x64):
    energy_fn = energy_of_data(quadratic, SCHEDULE, level)
    precision = jax.hessian(energy_fn, 1)(exact_params(), jnp.array(0.0))
    noise = SCHEDULE.noise[level] / SCHEDULE.signal[level]
    np.testing.assert_allclose(precision, 1.0 / (VARIANCE + noise**2), rtol=1e-9)
    slope = jax.grad(energy_fn, 1)(exact_params(), jnp.array(MEAN))
    np.testing.assert_allclose(slope, 0.0, atol=1e-9)


def test_a_network_that_gives_the_drift_of_a_step(x64):
    """A step moves by half the network's slope at every level, whatever h is."""
    fractions = np.linspace(0.1, 0.6, NUM_LEVELS)
    energy_fn = scaled_by_step_size(quadratic, SCHEDULE, step_fraction=fractions)
    for level in range(NUM_LEVELS):
        step = fractions[level] * SCHEDULE.step_noise[level] ** 2
        drift = step * jax.grad(energy_fn, 1)(off_params(), jnp.array(0.4), level)
        expected = 0.5 * jax.grad(quadratic, 1)(off_params(), jnp.array(0.4), level)
        np.testing.assert_allclose(drift, expected, rtol=1e-9)


def test_examples_may_be_pytrees():
    energy_fn = lambda params, y, level: params * jnp.sum(y["a"] ** 2) + y["b"] ** 2  # noqa: E731
    batch = {"a": jnp.ones((4, 3)), "b": jnp.zeros(4)}
    objective = recovery_likelihood(energy_fn, SCHEDULE, num_steps=2, energy_regularizer=0.1)
    keys = jax.random.split(jax.random.key(0), 4)
    loss, (carry, metrics) = jax.eval_shape(objective.loss, 0.5, (), keys, batch)
    assert loss.shape == ()
    assert carry == ()
    assert set(metrics) >= {"energy_gap", "chains_finite", "sampler_gradient_norm"}
    one = jax.tree.map(lambda leaf: leaf[0], batch)
    x, _ = jax.eval_shape(
        lambda key, x: recovery_sample(
            key, energy_fn, 0.5, x, schedule=SCHEDULE, num_steps=2, denoise=True
        ),
        keys[0],
        one,
    )
    assert jax.tree.map(jnp.shape, x) == jax.tree.map(jnp.shape, one)


ERRORS = {
    "num_steps is 0": lambda: recovery_likelihood(quadratic, SCHEDULE, num_steps=0),
    "step_fraction is 0.0": lambda: recovery_likelihood(
        quadratic, SCHEDULE, num_steps=1, step_fraction=0.0
    ),
    "level_weights are": lambda: recovery_likelihood(
        quadratic, SCHEDULE, num_steps=1, level_weights=[1.0]
    ),
    "step_fraction is \\[0.1, 0.2\\]; give one positive number": lambda: recovery_likelihood(
        quadratic, SCHEDULE, num_steps=1, step_fraction=[0.1, 0.2]
    ),
    "share is 0.0": lambda: steps_of_narrow_data(SCHEDULE, 0.0),
    "cleanest level has no noise": lambda: steps_of_narrow_data(recovery_schedule([0.0, 1.0]), 0.1),
    "schedule is 3": lambda: recovery_likelihood(quadratic, 3, num_steps=1),
    "noise has shape": lambda: recovery_schedule([0.5]),
    "noise is": lambda: recovery_schedule([0.5, 0.4, 0.9]),
    "num_levels is 0": lambda: cosine_noise(0),
    "largest_log_snr is -6": lambda: cosine_noise(largest_log_snr=-6),
}


@pytest.mark.parametrize("sentence", ERRORS)
def test_errors_name_the_value(sentence):
    with pytest.raises(ValueError, match=sentence):
        ERRORS[sentence]()

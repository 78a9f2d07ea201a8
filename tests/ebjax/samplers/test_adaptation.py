"""Adaptation: recursions against their definitions, metrics and step sizes against known laws."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ebjax.energies import targets
from ebjax.samplers import adaptation, dual_averaging, sample, welford
from ebjax.samplers.adaptation import warmup
from ebjax.samplers.discrete_langevin import discrete_langevin
from ebjax.samplers.hmc import hmc
from ebjax.samplers.mala import mala
from ebjax.samplers.windows import default_windows, warmup_windows
from ebjax.types import bind

# Running moments


def moments_of(points, sizes, *, is_dense):
    """From pieces of ``points`` [B, D] of these sizes, every second one merged from a state."""
    state = welford.welford_init(points.shape[1], is_dense=is_dense, dtype=points.dtype)
    pieces = jnp.split(points, np.cumsum(sizes)[:-1])
    for i, piece in enumerate(pieces):
        if i % 2:
            empty = welford.welford_init(points.shape[1], is_dense=is_dense, dtype=points.dtype)
            state = welford.welford_merge(state, welford.welford_update(empty, piece))
        else:
            state = welford.welford_update(state, piece)
    return state


@pytest.mark.parametrize("is_dense", [False, True])
def test_running_moments_are_those_of_numpy(x64, is_dense):
    # Far from the origin, where a difference of sums of squares would lose ten digits.
    points = 1e5 + jax.random.gamma(jax.random.key(0), 2.0, (100, 3)) * jnp.array([1.0, 0.1, 9.0])
    state = moments_of(points, [1, 30, 7, 60, 2], is_dense=is_dense)
    expected = np.cov(points.T)
    expected = expected if is_dense else np.diag(expected)
    assert state.num_points == 100
    np.testing.assert_allclose(state.mean, points.mean(0), rtol=1e-14)
    # Points at 1e5 are known to 1e-11 and so are the squares of their differences.
    np.testing.assert_allclose(welford.welford_final(state), expected, atol=1e-10)
    near = moments_of(points - 1e5, [1, 30, 7, 60, 2], is_dense=is_dense)
    np.testing.assert_allclose(welford.welford_final(near), expected, atol=1e-12 * 100)


def test_a_merge_without_the_means_is_seen(monkeypatch, x64):
    points = jax.random.normal(jax.random.key(0), (20, 3)) + jnp.arange(20)[:, None]

    def broken(first, second):
        return jax.tree.map(jnp.add, first, second)

    monkeypatch.setattr(welford, "welford_merge", broken)
    state = moments_of(points, [5, 15], is_dense=False)
    assert np.max(np.abs(welford.welford_final(state) - np.var(points, axis=0, ddof=1))) > 1.0


def test_empty_moments():
    empty = welford.welford_init(2)
    merged = welford.welford_merge(empty, empty)
    assert merged.num_points == 0
    assert np.all(np.isnan(welford.welford_final(merged)))
    one = welford.welford_update(empty, jnp.ones((1, 2)))
    assert np.all(np.isnan(welford.welford_final(one)))


@pytest.mark.parametrize("is_dense", [False, True])
def test_shrinkage(x64, is_dense):
    points = jax.random.normal(jax.random.key(0), (10, 20))
    state = moments_of(points, [10], is_dense=is_dense)
    expected = 10 / 15 * np.cov(points.T) + 5 / 15 * 1e-3 * np.eye(20)
    shrunk = welford.shrunk_covariance(state)
    np.testing.assert_allclose(shrunk, expected if is_dense else np.diag(expected), atol=1e-12)
    if is_dense:
        assert np.linalg.eigvalsh(shrunk).min() > 1e-4


# Step size


def tuned(acceptance_fn, *, target=0.8, num_steps=400, start=0.03, noise=0.0, sign=1.0):
    """Final step size of the recursion for a known curve of acceptance."""

    def body(state, key):
        acceptance = acceptance_fn(jnp.exp(state.log_step_size))
        acceptance = acceptance + noise * jax.random.normal(key)
        acceptance = jnp.where(sign > 0, acceptance, 2.0 * target - acceptance)
        return dual_averaging.dual_averaging_update(state, acceptance, target=target), None

    state = dual_averaging.dual_averaging_init(jnp.array(start), overshoot=10.0)
    state, _ = jax.lax.scan(body, state, jax.random.split(jax.random.key(0), num_steps))
    return float(dual_averaging.dual_averaging_final(state))


@pytest.mark.parametrize("target", [0.57, 0.8, 0.95])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 30.0])
def test_dual_averaging_reaches_its_target(x64, target, scale):
    acceptance_fn = lambda h: jnp.exp(-((h / scale) ** 2))  # noqa: E731
    step_size = tuned(acceptance_fn, target=target, start=0.3 * scale, num_steps=3_000)
    assert abs(acceptance_fn(step_size) - target) < 0.005


def test_dual_averaging_averages_noise_out(x64):
    acceptance_fn = lambda h: jnp.exp(-(h**2))  # noqa: E731
    step_size = tuned(acceptance_fn, noise=0.3, start=0.5, num_steps=4_000)
    assert abs(acceptance_fn(step_size) - 0.8) < 0.02


def test_dual_averaging_of_the_wrong_sign_is_seen(x64):
    acceptance_fn = lambda h: jnp.exp(-(h**2))  # noqa: E731
    assert abs(acceptance_fn(tuned(acceptance_fn, sign=-1.0)) - 0.8) > 0.1


def test_dual_averaging_is_the_published_recursion(x64):
    """Written out anew, for acceptances that are given."""
    acceptances, target = np.array([0.9, 0.1, np.nan, 0.7, 1.0]), 0.65
    state = dual_averaging.dual_averaging_init(jnp.array(0.2))
    error_sum, log_average = 0.0, 0.0
    for t, acceptance in enumerate(np.nan_to_num(acceptances), start=1):
        error_sum += target - acceptance
        # Unrolled: the running mean of the errors has the weights 1 / (t + t0).
        log_step = np.log(10 * 0.2) - np.sqrt(t) / 0.05 * error_sum / (t + 10)
        log_average = t**-0.75 * log_step + (1 - t**-0.75) * log_average
        state = dual_averaging.dual_averaging_update(state, acceptances[t - 1], target=target)
        np.testing.assert_allclose(state.log_step_size, log_step, rtol=1e-12)
        np.testing.assert_allclose(state.log_average, log_average, rtol=1e-12)


@pytest.mark.parametrize("start", [1e-4, 0.4, 1.0, 1e4])
def test_the_search_ends_within_a_factor_of_the_crossing(x64, start):
    crossing = 0.7
    accept = lambda trial, h: (jnp.where(h < crossing, 1.0, 0.0), jnp.array(3))  # noqa: E731
    step_size, cost = dual_averaging.search_step_size(accept, jnp.array(start), target=0.8)
    assert abs(np.log2(step_size / crossing)) < 0.5
    assert abs(cost / 3 - abs(np.log2(start / crossing))) <= 2.0


def test_the_search_ends_where_everything_is_accepted():
    accept = lambda trial, h: (jnp.array(1.0), jnp.array(1))  # noqa: E731
    step_size, cost = dual_averaging.search_step_size(
        accept, jnp.array(1.0), target=0.8, max_trials=10
    )
    assert (step_size, cost) == (2.0**10, 10)


# Windows


def test_windows_of_stan():
    windows = warmup_windows(1_000)
    assert np.flatnonzero(windows.is_end).tolist() == [99, 149, 249, 449, 949]
    assert np.flatnonzero(windows.is_start).tolist() == [0, 100, 150, 250, 450, 950]
    assert np.flatnonzero(windows.is_slow).tolist() == list(range(75, 950))


@pytest.mark.parametrize("num_steps", [1, 19, 20, 35, 149, 150, 151, 333, 2_000])
def test_windows_tile_the_slow_stretch(num_steps):
    for windows in (warmup_windows(num_steps), default_windows(num_steps, 100)):
        slow = np.flatnonzero(windows.is_slow)
        assert windows.is_start[0]
        if num_steps < 20:
            assert slow.size == 0
            continue
        # One stretch, ended by a window, with steps left to adapt the step size to the metric.
        np.testing.assert_array_equal(slow, np.arange(slow[0], slow[-1] + 1))
        assert np.flatnonzero(windows.is_end)[-1] == slow[-1] < num_steps - 1
        assert np.all(windows.is_slow[windows.is_end])
        np.testing.assert_array_equal(windows.is_start[1:], windows.is_end[:-1])


# The whole

NUM_DIMS = 100
VARIANCES = np.logspace(-2, 2, NUM_DIMS)
MAKE_HMC = bind(hmc, num_steps=10, jitter=0.2)


def ill_conditioned(params, x):
    return 0.5 * jnp.sum(x**2 / jnp.asarray(VARIANCES, x.dtype))


@functools.lru_cache
def adapted(num_chains=400, metric="diagonal", num_steps=60):
    start = 3.0 * jax.random.normal(jax.random.key(0), (num_chains, NUM_DIMS))
    return warmup(
        jax.random.key(1), MAKE_HMC, ill_conditioned, (), start, num_steps=num_steps, metric=metric
    )


def metric_errors(inverse_mass):
    return np.log(np.asarray(inverse_mass) / VARIANCES)


def test_the_diagonal_of_an_ill_conditioned_law():
    """Chains are independent, so that a variance has at least one draw a chain: 5 sd of its log."""
    bound = 5.0 * np.sqrt(2.0 / 400)
    errors = metric_errors(adapted().inverse_mass)
    assert np.abs(errors).max() < bound
    # Of the whole the error is known far better: 100 components, and no bias but the shrinkage.
    assert np.abs(errors.mean()) < bound / np.sqrt(NUM_DIMS) + 5.0 / 400
    # Divisors that are wrong by 2, and standard deviations in place of variances.
    assert np.abs(metric_errors(2.0 * adapted().inverse_mass)).max() > bound
    assert np.abs(metric_errors(np.sqrt(adapted().inverse_mass))).max() > bound


def test_a_metric_made_of_the_way_to_the_law_is_seen():
    """Without new windows the first steps, far away, stay in the covariance."""
    windows = warmup_windows(60, num_first=1, num_last=10, num_base=49)
    start = 100.0 + jax.random.normal(jax.random.key(0), (400, NUM_DIMS))
    options = {"num_steps": 60, "initial_step_size": 0.1}
    run = functools.partial(warmup, jax.random.key(1), MAKE_HMC, ill_conditioned, (), start)
    one_window = run(windows=windows, **options)
    assert np.abs(metric_errors(one_window.inverse_mass)).max() > 5.0 * np.sqrt(2.0 / 400)


def test_the_ratio_of_variances_is_exact_for_independent_gaussians():
    result = adapted(num_chains=4, metric="variance_ratio", num_steps=60)
    assert np.abs(metric_errors(result.inverse_mass)).max() < 1e-3
    assert np.abs(metric_errors(adapted(num_chains=4).inverse_mass)).max() > 0.1


def acceptance_error(adapted_kernel, positions, target):
    draws = sample(
        jax.random.key(2), adapted_kernel, ill_conditioned, (), positions, num_samples=20
    )
    return float(draws.info.acceptance_rate.mean()) - target


def test_the_frozen_kernel_accepts_as_often_as_aimed():
    result = adapted()
    assert abs(acceptance_error(result.kernel, result.positions, 0.8)) < 0.04
    wrong = MAKE_HMC(step_size=1.3 * result.step_size, inverse_mass=result.inverse_mass)
    assert abs(acceptance_error(wrong, result.positions, 0.8)) > 0.04
    assert result.info.acceptance_rate.shape == (60,)
    assert result.info.is_finite[-10:].all()
    # 10 leapfrog steps each of 60 steps, and the searches.
    assert 600 <= result.info.num_evaluations.sum() < 900


def test_a_dense_metric():
    root = np.array([[2.0, 0.0, 0.0], [1.9, 0.2, 0.0], [-0.3, 0.1, 0.05]])
    covariance = root @ root.T
    target = targets.gaussian(np.array([1.0, -2.0, 0.5]), covariance)
    start = jax.random.normal(jax.random.key(0), (400, 3))
    result = warmup(
        jax.random.key(1), MAKE_HMC, target.energy, (), start, num_steps=100, metric="dense"
    )
    whitened = np.linalg.solve(root, np.asarray(result.inverse_mass)) @ np.linalg.inv(root).T
    # Entries of a Wishart matrix of at least one draw a chain.
    assert np.abs(whitened - np.eye(3)).max() < 5.0 * np.sqrt(2.0 / 400)
    transposed = np.linalg.solve(root.T, np.asarray(result.inverse_mass)) @ np.linalg.inv(root)
    assert np.abs(transposed - np.eye(3)).max() > 5.0 * np.sqrt(2.0 / 400)


def chain_of_spins(params, x):
    spins = 2.0 * x - 1.0
    return -params * jnp.sum(spins[1:] * spins[:-1]) - 0.2 * jnp.sum(spins)


def test_the_step_size_of_a_discrete_kernel():
    """No metric: the kernel takes a step size alone."""
    start = jax.random.bernoulli(jax.random.key(0), 0.5, (100, 40)).astype(jnp.float32)
    options = {"num_steps": 60, "target_acceptance": 0.574, "metric": "identity"}
    run = functools.partial(warmup, jax.random.key(1), discrete_langevin, chain_of_spins, 0.5)
    result = run(start, **options)

    def acceptance(kernel):
        draws = sample(
            jax.random.key(2), kernel, chain_of_spins, 0.5, result.positions, num_samples=20
        )
        return float(draws.info.acceptance_rate.mean())

    assert abs(acceptance(result.kernel) - 0.574) < 0.04
    assert abs(acceptance(discrete_langevin(step_size=1.5 * result.step_size)) - 0.574) > 0.04


def skewed(params, x):
    a, b = x["a"], x["b"]
    return jnp.sum(jnp.cosh(a - params) + 0.3 * a) + 2.0 * jnp.square(b)


SKEWED_START = {"a": jnp.linspace(-1.0, 1.0, 12).reshape(6, 2), "b": jnp.linspace(0.0, 1.0, 6)}


@pytest.mark.parametrize("metric", adaptation.METRICS)
def test_shapes_on_pytrees_pooled_or_not(metric):
    run = functools.partial(
        warmup, jax.random.key(0), mala, skewed, 0.4, SKEWED_START, num_steps=30, metric=metric
    )
    size = {"identity": None, "dense": (3, 3)}.get(metric, (3,))
    for pooled in (True, False):
        result = run(pooled=pooled, target_acceptance=0.57)
        batch = () if pooled else (6,)
        assert result.step_size.shape == batch
        assert (result.inverse_mass is None) == (size is None)
        if size is not None:
            assert result.inverse_mass.shape == (*batch, *size)
            assert np.all(np.isfinite(result.inverse_mass))
        assert result.info.step_size.shape == (30, *batch)
        assert (result.kernel is None) == (not pooled)
        for leaf, start in zip(
            jax.tree.leaves(result.positions), jax.tree.leaves(SKEWED_START), strict=True
        ):
            assert leaf.shape == start.shape
            assert leaf.dtype == jnp.float32


def test_a_chain_on_its_own_does_not_see_the_others(x64):
    run = functools.partial(warmup, jax.random.key(0), mala, skewed, 0.4, num_steps=30)
    start = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), SKEWED_START)
    many = run(start, pooled=False)
    first = jax.tree.map(lambda leaf: leaf[:1], start)
    alone = run(first, pooled=False)
    shared = run(first, pooled=True)
    for one in (alone.step_size[0], shared.step_size):
        np.testing.assert_allclose(many.step_size[0], one, rtol=1e-10)
    np.testing.assert_allclose(many.inverse_mass[0], shared.inverse_mass, rtol=1e-10)
    assert len(set(np.asarray(many.step_size).tolist())) == 6


def over_devices(num_devices, **options):
    start = {"a": jnp.linspace(-1.0, 1.0, 32).reshape(16, 2), "b": jnp.linspace(0.0, 1.0, 16)}
    make_kernel = bind(hmc, num_steps=2)
    return warmup(
        jax.random.key(0),
        make_kernel,
        skewed,
        0.4,
        start,
        num_steps=30,
        num_devices=num_devices,
        **options,
    )


@functools.cache
def on_one_device(**options):
    return over_devices(1, **options)


@pytest.mark.parametrize(
    ("num_devices", "options"),
    [
        (2, {"metric": "dense"}),
        (8, {"metric": "dense"}),
        pytest.param(8, {"metric": "variance_ratio", "harmonic": True}, marks=pytest.mark.slow),
        pytest.param(8, {"pooled": False}, marks=pytest.mark.slow),
    ],
)
def test_devices_do_not_matter(num_devices, options, x64):
    one, many = on_one_device(**options), over_devices(num_devices, **options)
    for a, b in zip(jax.tree.leaves(one[:3]), jax.tree.leaves(many[:3]), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-7, atol=1e-9)
    for a, b in zip(one.info, many.info, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-7, atol=1e-9)


def test_a_metric_of_the_first_device_alone_is_seen(monkeypatch, x64):
    monkeypatch.setattr(adaptation, "welford_gather", lambda moments, axis_name: moments)
    one, many = on_one_device(metric="dense"), over_devices(4, metric="dense")
    assert np.abs(one.inverse_mass - many.inverse_mass).max() > 1e-3


def test_single_precision_is_kept_where_doubles_are_on(x64):
    start = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), SKEWED_START)
    result = warmup(jax.random.key(0), mala, skewed, jnp.float32(0.4), start, num_steps=30)
    for leaf in jax.tree.leaves((result.positions, result.step_size, result.inverse_mass)):
        assert leaf.dtype == jnp.float32


def test_new_params_and_options_do_not_compile_again():
    num_traces = 0

    def counted(params, x):
        nonlocal num_traces
        num_traces += 1
        return skewed(params, x)

    run = functools.partial(warmup, energy_fn=counted, initial_positions=SKEWED_START)
    make_kernels = (bind(hmc, num_steps=2), bind(hmc, num_steps=2))
    run(jax.random.key(0), make_kernels[0], params=0.4, num_steps=30)
    before = num_traces
    other = run(jax.random.key(1), make_kernels[1], params=0.7, num_steps=30, target_acceptance=0.7)
    assert num_traces == before
    assert np.isfinite(other.step_size)


def test_within_jit_as_without():
    run = lambda key: warmup(key, mala, skewed, 0.4, SKEWED_START, num_steps=30)[:3]  # noqa: E731
    inside, outside = jax.jit(run)(jax.random.key(0)), run(jax.random.key(0))
    for a, b in zip(jax.tree.leaves(inside), jax.tree.leaves(outside), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_the_harmonic_mean_is_the_more_careful():
    funnel = targets.funnel(4)
    start = jax.random.normal(jax.random.key(0), (64, 4))
    run = functools.partial(warmup, jax.random.key(1), MAKE_HMC, funnel.energy, (), start)
    sizes = [run(num_steps=60, harmonic=harmonic).step_size for harmonic in (False, True)]
    assert 0.0 < sizes[1] < sizes[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_steps": 0}, "num_steps is 0"),
        ({"metric": "round"}, "round"),
        ({"target_acceptance": 80}, "80"),
        ({"initial_step_size": -1.0}, "-1.0"),
        ({"windows": warmup_windows(40)}, "30"),
        ({"num_devices": 4}, "num_devices is 4"),
        ({"num_devices": 0}, "num_devices is 0"),
        ({"initial_positions": jnp.zeros((0, 2))}, r"\(0, 2\)"),
        ({"initial_positions": jnp.zeros(())}, r"\(\)"),
    ],
)
def test_wrong_calls_are_named(options, message):
    defaults = {"initial_positions": SKEWED_START, "num_steps": 30}
    with pytest.raises(ValueError, match=message):
        warmup(jax.random.key(0), mala, skewed, 0.4, **(defaults | options))

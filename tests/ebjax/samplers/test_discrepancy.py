"""Discrepancies: brute force by automatic differentiation, exact laws, coverage of intervals."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ebjax.energies import targets
from ebjax.samplers import diagnostics
from ebjax.samplers.diagnostics import discrepancy


def skewed_energy(params, x):
    return jnp.sum(0.25 * x**4 - 0.5 * x**2 + 0.6 * x) + params * x[0] * x[1]


def brute_stein(points, length_scale, energy_fn=skewed_energy):
    """The Stein kernel from derivatives of the base kernel, [B, B]."""

    def base(x, y):
        return (1.0 + jnp.sum((x - y) ** 2)) ** -0.5

    def score(z):
        return -jax.grad(lambda z: energy_fn(0.4, z * length_scale))(z)

    def kernel(x, y):
        mixed = jax.jacfwd(jax.grad(base, 0), 1)(x, y)
        return (
            score(x) @ score(y) * base(x, y)
            + score(x) @ jax.grad(base, 1)(x, y)
            + score(y) @ jax.grad(base, 0)(x, y)
            + jnp.trace(mixed)
        )

    z = points / length_scale
    return jax.vmap(lambda x: jax.vmap(lambda y: kernel(x, y))(z))(z)


@pytest.mark.parametrize("length_scale", [1.0, 0.3, np.array([0.5, 2.0])], ids=str)
def test_stein_is_brute_force(monkeypatch, x64, length_scale):
    points = jax.random.normal(jax.random.key(0), (37, 2))
    kernel = brute_stein(points, length_scale)
    # Rows are taken in pieces that do not divide their number.
    monkeypatch.setattr(discrepancy, "_PAIRS_AT_A_TIME", 37 * 2 * 5)
    both = [
        diagnostics.kernel_stein_discrepancy(
            skewed_energy, 0.4, points, length_scale=length_scale, is_unbiased=is_unbiased
        )
        for is_unbiased in (False, True)
    ]
    np.testing.assert_allclose(both[0], kernel.mean(), rtol=1e-11)
    off_diagonal = (kernel.sum() - jnp.trace(kernel)) / (37 * 36)
    np.testing.assert_allclose(both[1], off_diagonal, rtol=1e-10)
    assert both[0] > 0.0


def test_stein_takes_pytrees(x64):
    points = jax.random.normal(jax.random.key(0), (20, 2))
    energy_fn = lambda params, x: skewed_energy(params, jnp.stack([x["b"], x["a"][0]]))  # noqa: E731
    tree = {"b": points[:, 0], "a": points[:, 1:]}
    ours = diagnostics.kernel_stein_discrepancy(energy_fn, 0.4, tree)
    same = diagnostics.kernel_stein_discrepancy(skewed_energy, 0.4, points)
    np.testing.assert_allclose(ours, same, rtol=1e-12)


def z_score(values):
    values = np.asarray(values, np.float64)
    return values.mean() / (values.std(ddof=1) / np.sqrt(len(values)))


@pytest.mark.parametrize("name", ["banana", "double_well"])
def test_stein_has_mean_zero_for_exact_draws_and_no_other(name):
    target = {
        "banana": lambda: targets.banana(curvature=0.3, scale=1.5),
        "double_well": lambda: targets.double_well(tilt=0.8, quadratic=2.0),
    }[name]()
    draws = jax.vmap(target.sample)(jax.random.split(jax.random.key(0), 400 * 50))
    groups = draws.reshape(400, 50, *target.event_shape)

    def scores(energy_fn):
        stein = lambda x: diagnostics.kernel_stein_discrepancy(  # noqa: E731
            energy_fn, (), x, is_unbiased=True
        )
        return z_score(jax.lax.map(stein, groups))

    assert abs(scores(target.energy)) < 5.0
    # A law slightly shifted, and one slightly hotter.
    assert scores(lambda params, x: target.energy(params, x - 0.2)) > 5.0
    assert scores(lambda params, x: target.energy(params, x) / 1.4) > 5.0


def direct_mmd(x, y, *, skip_diagonal=True):
    pool = np.concatenate([x, y])
    squares = np.square(pool[:, None] - pool[None]).sum(axis=-1)
    width = np.median(squares[~np.eye(len(pool), dtype=bool)])
    kernel = np.exp(-squares / width)
    within = 0.0
    for block in (kernel[: len(x), : len(x)], kernel[len(x) :, len(x) :]):
        diagonal = len(block) if skip_diagonal else 0
        within += (block.sum() - diagonal) / (len(block) ** 2 - diagonal)
    return within - 2.0 * kernel[: len(x), len(x) :].mean()


def test_mmd_is_the_direct_sum(monkeypatch, x64):
    x, y = np.random.default_rng(0).standard_normal((2, 45, 3))
    y = y[:31] ** 2
    monkeypatch.setattr(discrepancy, "_PAIRS_AT_A_TIME", 300)
    ours = diagnostics.maximum_mean_discrepancy(x, y)
    np.testing.assert_allclose(ours, direct_mmd(x, y), rtol=1e-10)
    assert abs(ours - direct_mmd(x, y, skip_diagonal=False)) > 1e-3


def test_mmd_has_mean_zero_for_equal_laws_and_no_other():
    draw = lambda key: jax.random.gamma(key, 2.0, (300, 40, 2))  # noqa: E731
    x, y = draw(jax.random.key(0)), draw(jax.random.key(1))
    mmd = lambda pair: diagnostics.maximum_mean_discrepancy(*pair, bandwidth=2.0)  # noqa: E731
    assert abs(z_score(jax.lax.map(mmd, (x, y)))) < 5.0
    assert z_score(jax.lax.map(mmd, (x, y + 0.3))) > 5.0
    # With the diagonal kept it would not be unbiased.
    assert z_score(jax.lax.map(mmd, (x, y)) + 2.0 / 40) > 5.0


def coverage(factor=1.0, num=20, confidence=0.9):
    """Part of 4,000 intervals that hold log Z = 0, from weights of a gamma law with mean 1."""
    shape = 40.0
    weights = jax.random.gamma(jax.random.key(0), shape, (4_000, num)) / shape
    interval = jax.vmap(lambda w: diagnostics.log_z_interval(w, confidence=confidence))(
        jnp.log(weights)
    )
    half = factor * 0.5 * (interval.upper - interval.lower)
    return float(np.mean(np.abs(np.asarray(interval.log_z)) < half))


def test_log_z_intervals_hold_as_often_as_they_say():
    tolerance = 5.0 * np.sqrt(0.9 * 0.1 / 4_000)
    assert abs(coverage() - 0.9) < tolerance
    # A normal quantile in place of Student's, and an error without its root.
    assert abs(coverage(1.6449 / 1.7291) - 0.9) > 0.5 * tolerance
    assert abs(coverage(20**0.5) - 0.9) > tolerance


def test_log_z_of_weights(x64):
    log_weights = np.array([1_000.0, 1_000.0 + np.log(3.0), -np.inf, 1_000.0])
    interval = diagnostics.log_z_interval(log_weights)
    weights = np.array([1.0, 3.0, 0.0, 1.0])
    np.testing.assert_allclose(interval.log_z, 1_000.0 + np.log(weights.mean()), rtol=1e-14)
    error = weights.std(ddof=1) / weights.mean() / 2.0
    np.testing.assert_allclose(interval.standard_error, error, rtol=1e-10)
    np.testing.assert_allclose(interval.effective_sample_size, 25.0 / 11.0, rtol=1e-10)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: diagnostics.maximum_mean_discrepancy(x, x[:1]), "second"),
        (lambda x: diagnostics.maximum_mean_discrepancy(x, x[:, :1]), "components"),
        (lambda x: diagnostics.kernel_stein_discrepancy(skewed_energy, 0.4, x[:1]), "positions"),
        (lambda x: diagnostics.log_z_interval(x), r"\(5, 2\)"),
        (lambda x: diagnostics.log_z_interval(x[:, 0], confidence=95), "95"),
    ],
)
def test_wrong_calls_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call(jnp.zeros((5, 2)))

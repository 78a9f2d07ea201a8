"""Diagnostics: the numbers of ArviZ, on draws good and bad; tables; speed."""

import importlib
import sys
import time
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ebjax.samplers import Samples, diagnostics, mala, sample
from ebjax.samplers.diagnostics import component, convergence, report

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    arviz = pytest.importorskip("arviz")
# The same functions of arrays [C, N], before ArviZ 1 and since.
is_old = "InferenceData" in vars(arviz)
reference = arviz if is_old else importlib.import_module("arviz_stats.base").array_stats

SHAPES = [(5, 2), (64, 4)]
# For the rules that publications ask for; 21 draws have order statistics at 5 % and 95 %.
MORE_SHAPES = [(4, 1), (101, 1), (6, 2), (7, 3), (333, 5), (30, 200)]


def autoregressive(correlation, num_draws, num_chains, seed=0):
    """Stationary draws of x' = correlation x + noise, [N, C]."""
    noise = np.random.default_rng(seed).standard_normal((num_draws, num_chains))
    noise[0] /= np.sqrt(1.0 - correlation**2)
    draws = np.zeros_like(noise)
    for t in range(num_draws):
        draws[t] = correlation * draws[t - 1] + noise[t]
    return draws


def cases(num_draws, num_chains):
    independent = autoregressive(0.0, num_draws, num_chains)
    yield independent
    yield autoregressive(0.95, num_draws, num_chains)
    yield autoregressive(-0.9, num_draws, num_chains)
    # Heavy tails, ties of discrete draws, a chain elsewhere, a drift.
    yield np.tan(independent)
    yield np.round(independent)
    yield independent + 3.0 * (np.arange(num_chains) == 0)
    yield independent + np.linspace(0.0, 2.0, num_draws)[:, None]


def stacked(shape):
    """All cases as components, and as ArviZ has them: a list of [C, N]."""
    draws = list(cases(*shape))
    return np.stack(draws, axis=-1), [case.T for case in draws]


METHODS = [(m, None) for m in ("bulk", "tail", "mean", "sd", "median", "identity")]
METHODS += [("quantile", 0.3)]
TAIL = (0.05, 0.95)  # said to ArviZ, whose default has changed


@pytest.mark.parametrize(
    ("shape", "method", "probability"),
    [(shape, *method) for shape in SHAPES for method in METHODS],
)
def test_effective_sample_size_is_that_of_arviz(x64, shape, method, probability):
    draws, theirs = stacked(shape)
    ours = diagnostics.effective_sample_size(draws, method=method, probability=probability)
    their_probability = {"tail": TAIL}.get(method, probability)
    options = {} if their_probability is None else {"prob": their_probability}
    expected = [reference.ess(case, method=method, **options) for case in theirs]
    np.testing.assert_allclose(ours, expected, rtol=1e-6)


@pytest.mark.parametrize("shape", MORE_SHAPES)
def test_the_summary_is_that_of_arviz(x64, shape):
    draws, theirs = stacked(shape)
    table = diagnostics.summary(draws).values()
    expected = {
        "mcse": [reference.mcse(case, method="mean") for case in theirs],
        "ess_bulk": [reference.ess(case, method="bulk") for case in theirs],
        "ess_tail": [reference.ess(case, method="tail", prob=TAIL) for case in theirs],
        "r_hat": [reference.rhat(case) if shape[1] > 1 else np.nan for case in theirs],
    }
    if shape[1] == 1:
        assert all(np.isfinite(row.pop("r_hat")) for row in table)
        del expected["r_hat"]
    if shape[0] == 101 and not is_old:
        del expected["ess_tail"]  # a draw is the quantile, and ArviZ 1 rounds it away from itself
    for name, values in expected.items():
        np.testing.assert_allclose([row[name] for row in table], values, rtol=1e-6)


@pytest.mark.parametrize("shape", [shape for shape in SHAPES if shape[1] > 1])
@pytest.mark.parametrize("method", ["rank", "bulk", "folded", "split", "identity"])
def test_r_hat_is_that_of_arviz(x64, shape, method):
    draws, theirs = stacked(shape)
    name = {"bulk": "z_scale"}.get(method, method)
    expected = [reference.rhat(case, method=name) for case in theirs]
    np.testing.assert_allclose(diagnostics.r_hat(draws, method=method), expected, rtol=1e-6)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    ("method", "probability"),
    [("mean", None), ("sd", None), ("median", None), ("quantile", 0.97)],
)
def test_monte_carlo_error_is_that_of_arviz(x64, shape, method, probability):
    if method == "sd" and not is_old:
        pytest.skip("ArviZ 1 takes the effective size of x in place of that of (x - mean)²")
    draws, theirs = stacked(shape)
    ours = diagnostics.monte_carlo_error(draws, method=method, probability=probability)
    options = {} if probability is None else {"prob": probability}
    expected = [reference.mcse(case, method=method, **options) for case in theirs]
    np.testing.assert_allclose(ours, expected, rtol=1e-6)


def test_autocorrelation_is_that_of_arviz(x64):
    draws = autoregressive(0.7, 101, 3)
    expected = reference.autocorr(draws.T).T
    np.testing.assert_allclose(diagnostics.autocorrelation(draws), expected, atol=1e-12)


@pytest.mark.parametrize(
    ("name", "broken"),
    [
        ("split_halves", lambda x: x),
        ("normal_scores", lambda x: x),
        ("quantile", lambda x, probability: jnp.median(x)),
    ],
)
def test_the_comparison_sees_a_missing_part(monkeypatch, x64, name, broken):
    draws, theirs = stacked((64, 4))
    monkeypatch.setattr(component, name, broken)
    method = "tail" if name == "quantile" else "bulk"
    function = lambda x: component.ESS_METHODS[method](x)  # noqa: E731
    ours = convergence.map_jitted(draws, function=function)
    options = {"prob": TAIL} if method == "tail" else {}
    expected = np.array([reference.ess(case, method=method, **options) for case in theirs])
    assert np.max(np.abs(np.asarray(ours) / expected - 1.0)) > 1e-3


def test_the_time_of_a_known_chain():
    """tau = (1 + rho) / (1 - rho); its estimates scatter by a known amount."""
    draws = np.stack([autoregressive(0.8, 2_000, 4, seed) for seed in range(50)], axis=-1)
    times = np.asarray(diagnostics.integrated_autocorrelation_time(draws))
    # The standard deviation comes from the replicates; the truncation biases by less than 3 %.
    error = times.std(ddof=1) / np.sqrt(len(times))
    assert abs(times.mean() - 9.0) < 5.0 * error + 0.03 * 9.0
    # Half the time, as from a sum over one side, is refused.
    assert abs(times.mean() - 4.5) > 5.0 * error + 0.03 * 9.0


def test_constant_draws_count_as_in_arviz(x64):
    draws = np.ones((50, 4))
    for method in ("bulk", "tail"):
        assert diagnostics.effective_sample_size(draws, method=method) == 200
    assert np.isnan(diagnostics.r_hat(draws))
    # Chains that stand still at different places are worth one draw each, and R-hat says so.
    stuck = np.broadcast_to(np.arange(4.0), (50, 4))
    assert diagnostics.effective_sample_size(stuck, method="mean") < 5.0
    assert diagnostics.r_hat(stuck, method="split") > 1e3


def test_what_is_not_finite_gives_nan():
    draws = autoregressive(0.5, 40, 3)[..., None].repeat(3, axis=-1)
    draws[7, 1, 0], draws[8, 2, 1] = np.nan, np.inf
    figures = [
        diagnostics.effective_sample_size(draws, method="bulk"),
        diagnostics.effective_sample_size(draws, method="tail"),
        diagnostics.effective_sample_size(draws, method="mean"),
        diagnostics.r_hat(draws),
        diagnostics.monte_carlo_error(draws, method="sd"),
    ]
    for figure in figures:
        np.testing.assert_array_equal(np.isnan(figure), [True, True, False])


def test_one_chain_is_judged_by_its_halves(x64):
    drift = autoregressive(0.0, 200, 1) + np.linspace(0.0, 5.0, 200)[:, None]
    assert diagnostics.r_hat(drift) > 1.5
    assert diagnostics.r_hat(autoregressive(0.0, 200, 1)) < 1.05


def test_single_precision_agrees_with_double():
    draws = autoregressive(0.6, 500, 8)
    with jax.enable_x64(True):
        double = diagnostics.summary(draws)["x"]
    single = diagnostics.summary(np.asarray(draws, np.float32))["x"]
    for name, value in double.items():
        assert abs(single[name] - value) <= 1e-3 * max(abs(value), 1e-3), name


@pytest.mark.slow
def test_ranks_of_many_draws_stay_finite_in_single_precision():
    """(rank - 3/8) / (size + 1/4) of the largest rounds to 1, whose score is infinite."""
    scores = component.normal_scores(jnp.arange(2**23, dtype=jnp.float32))
    assert np.isfinite(scores[-1])
    assert scores[-1] == -scores[0]
    assert abs(scores[-1] - 5.26) < 0.02


def test_components_one_by_one_or_at_once(monkeypatch, x64):
    draws = {"a": autoregressive(0.5, 40, 6).reshape(40, 2, 3), "b": autoregressive(0.1, 40, 2)}
    at_once = diagnostics.summary(draws)
    monkeypatch.setattr(convergence, "_DRAWS_AT_A_TIME", 1)
    jax.clear_caches()
    one_by_one = diagnostics.summary(draws)
    jax.clear_caches()
    assert list(at_once) == list(one_by_one) == ["a[0]", "a[1]", "a[2]", "b"]
    for name, row in at_once.items():
        assert row == pytest.approx(one_by_one[name], rel=1e-12)


def test_the_summary_is_made_of_the_other_figures(x64):
    draws = {"a": autoregressive(0.5, 60, 6).reshape(60, 2, 3)}
    table = diagnostics.summary(draws)
    x = draws["a"][..., 2]
    expected = {
        "mean": x.mean(),
        "sd": x.std(ddof=1),
        "mcse": diagnostics.monte_carlo_error(x),
        "ess_bulk": diagnostics.effective_sample_size(x),
        "ess_tail": diagnostics.effective_sample_size(x, method="tail"),
        "r_hat": diagnostics.r_hat(x),
    }
    assert table["a[2]"] == pytest.approx({k: float(v) for k, v in expected.items()}, rel=1e-12)
    lines = str(table).splitlines()
    assert len(lines) == 4
    assert f"{x.mean():.4g}" in lines[3]
    assert table.worst()["r_hat"] == max(row["r_hat"] for row in table.values())


def test_compiled_once():
    draws = jnp.asarray(autoregressive(0.5, 40, 2))
    num_compiled = convergence.map_jitted._cache_size
    diagnostics.effective_sample_size(draws, method="quantile", probability=0.21)
    before = num_compiled()
    diagnostics.effective_sample_size(draws + 1.0, method="quantile", probability=0.21)
    assert num_compiled() == before


def test_works_within_jit():
    draws = jnp.asarray(autoregressive(0.5, 40, 2), jnp.float32)
    inside = jax.jit(diagnostics.effective_sample_size)(draws)
    np.testing.assert_allclose(inside, diagnostics.effective_sample_size(draws), rtol=1e-4)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: diagnostics.effective_sample_size(x[:, 0]), r"\(40,\)"),
        (lambda x: diagnostics.effective_sample_size(x[:3]), "N = 3"),
        (lambda x: diagnostics.effective_sample_size({"a": x, "b": x[:20]}), "same N, C"),
        (lambda x: diagnostics.effective_sample_size(x, method="best"), "best"),
        (lambda x: diagnostics.effective_sample_size(x, method="quantile"), "None"),
        (lambda x: diagnostics.effective_sample_size(x, probability=0.5), "0.5"),
        (
            lambda x: diagnostics.monte_carlo_error(x, method="quantile", probability=1.5),
            "1.5",
        ),
        (lambda x: diagnostics.r_hat(x, method="worst"), "worst"),
    ],
)
def test_wrong_calls_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call(jnp.zeros((40, 2)))


def test_efficiency_times_the_second_run_to_its_end(monkeypatch):
    """A run that takes 1 s the first time and 0.25 s after, by a clock that the runs move."""
    clock, runs = [0.0], []
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    finished = []

    def run():
        runs.append(0.25 if runs else 1.0)
        positions = jnp.asarray(autoregressive(0.5, 100, 4))
        return Samples(positions, (), (), np.full(4, 300), {})

    def wait(result):
        clock[0] += runs[-1]
        finished.append(len(runs))
        return result

    monkeypatch.setattr(report.jax, "block_until_ready", wait)
    figures = diagnostics.efficiency(run, thinning=3)
    assert finished == [1, 2]
    assert (figures.seconds, figures.compile_seconds) == (0.25, 0.75)
    assert figures.ess_per_second == figures.ess / 0.25
    assert figures.ess_per_step == figures.ess / 1_200
    assert figures.ess_per_evaluation == figures.ess / 1_200


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("package", ["arviz", "arviz_base"])
def test_arviz_gets_chains_first(monkeypatch, package):
    pytest.importorskip(package)
    if package == "arviz_base":
        monkeypatch.setitem(sys.modules, "arviz", None)
    energy_fn = lambda params, x: 0.5 * sum(jnp.sum(leaf**2) for leaf in x.values())  # noqa: E731
    start = {"a": jnp.zeros((3, 2)), "b": jnp.zeros(3)}
    draws = sample(jax.random.key(0), mala(step_size=0.5), energy_fn, (), start, num_samples=20)
    data = diagnostics.to_arviz(draws.positions, info=draws.info)
    assert data.posterior["a"].shape == (3, 20, 2)
    np.testing.assert_array_equal(data.posterior["b"][1], draws.positions["b"][:, 1])
    np.testing.assert_array_equal(data.sample_stats["lp"][2], -draws.info.energy[:, 2])
    assert "acceptance_rate" in data.sample_stats
    assert "energy" not in data.sample_stats
    ours = diagnostics.effective_sample_size(draws.positions["b"])
    np.testing.assert_allclose(reference.ess(data.posterior["b"].values), ours, rtol=1e-3)
    assert data.posterior["b"].dims == ("chain", "draw")
    assert hasattr(data, "children") == (package == "arviz_base" or not is_old)
    bare = diagnostics.to_arviz(draws.positions["a"])
    assert bare.posterior["x"].shape == (3, 20, 2)


def test_without_arviz_the_extra_is_named(monkeypatch):
    for package in ("arviz", "arviz_base"):
        monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=r"ebjax\[arviz\]"):
        diagnostics.to_arviz(jnp.zeros((5, 2)))

"""EB-GFN in the plane: the code, the seven laws against others' draws of them, and the recipe."""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats
from scipy.special import logsumexp
from sklearn import datasets

from ebjax.energies import targets
from ebjax.training import init_state, train
from gflownet import evaluation
from gflownet.exact import enumerate_graph, terminal_distribution
from gflownet.recipes import eb_gfn_plane
from gflownet.recipes.eb_gfn_plane import EBGFlowNetPlaneConfig, build
from gflownet.recipes.eb_gfn_plane_data import (
    LAWS,
    cell_centres,
    coded_law,
    decode,
    encode,
    entropy,
)

FIVE_SIGMA = 2 * stats.norm.sf(5)
NUM_DRAWS = 100_000
# Entropies of codes of 16 bits a coordinate, by nearest neighbours of the points, less 16 ln 2:
# those of 8 bits, but for what edges inside of cells add.
PUBLISHED_FLOORS = {
    "two_spirals": 8.945,
    "eight_gaussians": 8.891,
    "circles": 9.460,
    "moons": 8.628,
    "pinwheel": 8.453,
    "swiss_roll": 9.051,
    "checkerboard": 9.587,
}


@pytest.mark.parametrize("bits", [2, 8, 16])
def test_codes_are_those_of_cells_and_neighbours_differ_in_one_bit(bits):
    centres = cell_centres(3.0, bits)
    points = jnp.asarray(np.stack([centres, centres[::-1]], axis=-1), jnp.float32)
    code = np.asarray(encode(points, 3.0, bits))
    assert code.shape == (2**bits, 2 * bits)
    first = code[:, ::2].astype(int)
    np.testing.assert_array_equal(code[::-1, 1::2], first)
    assert len(np.unique(first, axis=0)) == 2**bits
    # Also across zero, where the sign alone changes.
    assert (np.abs(np.diff(first, axis=0)).sum(axis=1) == 1).all()
    np.testing.assert_allclose(decode(code, 3.0), points, atol=1e-6)
    # The planted bug: plain binary numbers.
    magnitude = np.abs(np.arange(2**bits) - 2 ** (bits - 1) + 0.5).astype(int)
    plain = magnitude[:, None] >> np.arange(bits - 1) & 1
    differ = np.abs(np.diff(plain, axis=0)).sum(axis=1).max()
    assert (differ == 1) == (bits == 2)


def test_points_share_the_code_of_their_cell_and_outside_that_of_the_last():
    points = 4.0 * jax.random.uniform(jax.random.key(0), (1000, 2), minval=-1.0)
    centres = decode(encode(points, 4.0, 6), 4.0)
    width = 4.0 / 2**5
    np.testing.assert_array_equal(jnp.floor(points / width), jnp.floor(centres / width))
    far = decode(encode(jnp.array([100.0, -100.0]), 4.0, 6), 4.0)
    np.testing.assert_allclose(far, [4.0 - width / 2, -4.0 + width / 2])


def _two_spirals(random, num):
    """In polar coordinates: the angle t falls from π, and the spiral and its noise turn."""
    t = 3 * np.pi * np.sqrt(random.random(num))
    spiral = t * np.exp(1j * (np.pi - t)) + 0.5 * (random.random(num) + 1j * random.random(num))
    sign = random.choice([-1, 1], num)
    noise = 0.1 * (random.standard_normal(num) + 1j * random.standard_normal(num))
    points = sign * spiral / 3 + noise
    return np.stack([points.real, points.imag], axis=-1)


def _pinwheel(random, num):
    arm = 1 + 0.3 * random.standard_normal(num) + 0.1j * random.standard_normal(num)
    angle = 0.4 * np.pi * random.integers(5, size=num) + 0.25 * np.exp(arm.real)
    points = 2 * arm * np.exp(1j * angle)
    return np.stack([points.real, points.imag], axis=-1)


def _of_target(target):
    draw = jax.jit(jax.vmap(target.sample))
    return lambda random, num: np.asarray(draw(jax.random.split(jax.random.key(9), num)))


OTHERS = {
    "two_spirals": _two_spirals,
    "eight_gaussians": _of_target(targets.eight_gaussians(4 / 1.414, 0.5 / 1.414)),
    "circles": _of_target(targets.rings((1.5, 3.0), 0.24)),
    "moons": lambda random, num: (
        2 * datasets.make_moons(num, noise=0.1, random_state=3)[0] - [1.0, 0.2]
    ),
    "pinwheel": _pinwheel,
    "swiss_roll": lambda random, num: (
        datasets.make_swiss_roll(num, noise=1.0, random_state=3)[0][:, [0, 2]] / 5
    ),
    "checkerboard": _of_target(targets.checkerboard()),
}


def fit(points, half_side, law):
    """p-value of points under the law of cells of 4 bits, rare cells together."""
    edges = half_side * np.linspace(-1, 1, len(law) + 1)
    observed = np.histogram2d(*points.T, bins=(edges, edges))[0].ravel()
    expected = len(points) * law.ravel()
    is_rare = expected < 10
    observed = np.append(observed[~is_rare], observed[is_rare].sum())
    expected = np.append(expected[~is_rare], expected[is_rare].sum())
    if expected[-1] == 0.0:
        assert observed[-1] == 0
        observed, expected = observed[:-1], expected[:-1]
    return stats.chisquare(observed, expected * observed.sum() / expected.sum()).pvalue


@functools.cache
def own(name):
    keys = jax.random.split(jax.random.key(0), NUM_DRAWS)
    return np.asarray(jax.jit(jax.vmap(LAWS[name].sample))(keys))


@pytest.mark.parametrize("name", LAWS)
def test_laws_are_those_that_others_draw(name):
    law = coded_law(LAWS[name], 4)
    assert law.sum() == pytest.approx(1.0)
    other = OTHERS[name](np.random.default_rng(0), NUM_DRAWS)
    for points in (own(name), other):
        assert np.isfinite(points).all()
        assert fit(points, LAWS[name].half_side, law) > FIVE_SIGMA
    # The planted bug: coordinates that are exchanged, turned or 3 % too large.
    assert fit(1.03 * other, LAWS[name].half_side, law) < FIVE_SIGMA
    # The square is the one of the published code: 2 more than the largest of 5,000 draws.
    assert np.abs(other[:5000]).max() + 2 == pytest.approx(LAWS[name].half_side, abs=0.5)


@pytest.mark.parametrize("name", LAWS)
def test_entropies_are_the_published_floors(name):
    sixteen = entropy(LAWS[name], 16) - 16 * math.log(2)
    assert sixteen == pytest.approx(PUBLISHED_FLOORS[name], abs=0.02)
    # A coarser code keeps the mass of its cells together, which loses something but never gains.
    eight = entropy(LAWS[name], 8)
    assert sixteen - 1e-3 < eight < sixteen + 0.03
    table = coded_law(LAWS[name], 8)
    np.testing.assert_allclose(
        table.reshape(16, 16, 16, 16).sum(axis=(1, 3)), coded_law(LAWS[name], 4), atol=2e-4
    )
    # The plain estimate of draws, too low by about half of the cells that it needs over draws.
    counts = np.unique(
        np.asarray(encode(own(name), LAWS[name].half_side, 8)), axis=0, return_counts=True
    )[1]
    shares = counts / counts.sum()
    plain = -shares @ np.log(shares)
    assert eight - 0.12 < plain < eight


TINY = {
    "dataset": "moons",
    "num_steps": 300,
    "batch_size": 128,
    "learning_rate": 1e-2,
    "policy_learning_rate": 1e-2,
    "energy_features": (32,),
    "hidden_features": (32,),
    "rising_updates": 50,
    "log_every": 100,
    "checkpoint_every": 300,
    "num_evaluated": 1000,
    "ema_decay": 0.9,
}


def all_states(bits):
    return np.arange(4**bits)[:, None] >> np.arange(2 * bits)[::-1] & 1


@functools.cache
def trained(negatives):
    config = EBGFlowNetPlaneConfig(**TINY, bits=3, negatives=negatives)
    run = build(config)
    return run, init_state(run, config), train(run, config).state


@pytest.mark.parametrize("negatives", ["flow", "gibbs", "gibbs_with_gradients"])
def test_a_short_run_comes_near_the_floor(negatives):
    run, start, state = trained(negatives)
    before = run.evaluate(jax.random.key(0), start)
    found = run.evaluate(jax.random.key(0), state)
    assert set(found) == set(before)
    assert 0.0 < found["gap"] < 0.2 < before["gap"] - 0.2
    assert found["gap"] == pytest.approx(found["nll"] - found["entropy"])
    assert found["entropy"] == pytest.approx(entropy(LAWS["moons"], 3))
    assert run.monitor(jax.random.key(1), state) == {"nll": found["nll"]}
    assert found["mmd"] < 0.2 * before["mmd"]
    assert abs(found["mmd_of_data"]) < 0.002
    assert (run.flow is not None) == (negatives == "flow") == ("nll_of_flow" in found)
    if negatives == "flow":
        assert abs(found["gap_of_flow"]) < 0.1 < before["nll_of_flow"] - found["nll_of_flow"]
        assert found["log_z_error"] < 0.3
    samples = run.sample(jax.random.key(1), state, 8)
    assert samples["bits"].shape == (8, 6)
    np.testing.assert_array_equal(
        encode(samples["positions"], LAWS["moons"].half_side, 3), samples["bits"]
    )
    assert set(run.figures(jax.random.key(2), state, samples)) == {"densities"}


def test_likelihoods_are_sums_over_all_states():
    run, _, state = trained("gibbs")
    states = all_states(3).astype(np.float32)
    energies = np.asarray(jax.vmap(run.energy, (None, 0))(state.ema, states), np.float64)
    log_z = logsumexp(-energies)
    points = np.asarray(decode(states, LAWS["moons"].half_side))
    column, row = ((points / LAWS["moons"].half_side + 1) * 4).astype(int).T
    shares = coded_law(LAWS["moons"], 3)[column, row]
    found = run.evaluate(jax.random.key(0), state)
    assert found["log_z"] == pytest.approx(log_z, abs=1e-5)
    assert found["nll"] == pytest.approx(shares @ energies + log_z, abs=1e-5)
    # Draws of the examples agree, within five standard errors.
    keys = jax.random.key(7), jnp.arange(20_000)
    drawn = jax.vmap(run.source.example, (None, None, 0))((), *keys).astype(int)
    values = energies[np.asarray(drawn) @ 2 ** np.arange(6)[::-1]] + log_z
    error = values.std() / np.sqrt(len(values))
    assert abs(values.mean() - found["nll"]) < 5 * error
    # What is drawn from the energy has the law of the energy.
    draws = jax.jit(jax.vmap(run.draw, (0, None)))(
        jax.random.split(jax.random.key(8), 20_000), state.ema
    )
    counts = np.bincount(np.asarray(draws).astype(int) @ 2 ** np.arange(6)[::-1], minlength=64)
    expected = len(draws) * np.exp(-energies - log_z)
    is_rare = expected < 10
    counts = np.append(counts[~is_rare], counts[is_rare].sum())
    expected = np.append(expected[~is_rare], expected[is_rare].sum())
    assert stats.chisquare(counts, expected * counts.sum() / expected.sum()).pvalue > FIVE_SIGMA


def test_an_energy_of_the_wrong_sign_is_worse_than_a_uniform_law(monkeypatch):
    run, _, state = trained("gibbs")
    uniform = 6 * math.log(2)
    assert run.monitor(jax.random.key(0), state)["nll"] < uniform
    energies_of = eb_gfn_plane.energies_of
    monkeypatch.setattr(eb_gfn_plane, "energies_of", lambda *args: -energies_of(*args))
    assert run.monitor(jax.random.key(0), state)["nll"] > uniform


def test_the_law_of_the_flow_is_a_mean_inside_of_the_logarithm(monkeypatch):
    config = EBGFlowNetPlaneConfig(
        **TINY | {"num_evaluated": 4000, "hidden_features": (8,)},
        bits=2,
        order="any_order",
        num_paths=60,
    )
    run = build(config)
    params = run.init(jax.random.key(3))
    state = init_state(run, config)._replace(ema=params)
    environment, policy = run.flow
    graph = enumerate_graph(environment)
    p = np.asarray(terminal_distribution(environment, policy, params, graph), np.float64)
    # Full sequences are listed in the order of their bits.
    np.testing.assert_array_equal(graph.states.tokens[graph.terminal], all_states(2))
    points = np.asarray(decode(all_states(2), LAWS["moons"].half_side))
    column, row = ((points / LAWS["moons"].half_side + 1) * 2).astype(int).T
    truth = -coded_law(LAWS["moons"], 2)[column, row] @ np.log(p)

    def figure():
        return run.evaluate(jax.random.key(0), state)["nll_of_flow"]

    assert figure() == pytest.approx(truth, abs=0.02)
    # The planted bugs: the mean of the logarithms, and the logarithm of one mean over all draws.
    monkeypatch.setattr(evaluation, "_log_mean_exp", lambda values: values.mean(axis=0))
    assert figure() > truth + 0.1
    monkeypatch.setattr(
        evaluation,
        "_log_mean_exp",
        lambda values: np.full(values.shape[1], logsumexp(values) - np.log(values.size)),
    )
    assert figure() < truth - 0.02


def test_long_codes_are_judged_by_importance_weights(monkeypatch):
    run, _, state = trained("flow")
    exact = run.evaluate(jax.random.key(0), state)
    monkeypatch.setattr(eb_gfn_plane, "_MAX_EXACT_BITS", 2)
    estimated = build(EBGFlowNetPlaneConfig(**TINY, bits=3)).evaluate(jax.random.key(0), state)
    error = estimated["log_z_standard_error"]
    assert 0.0 < error < 0.05
    assert abs(estimated["log_z"] - exact["log_z"]) < 5 * error
    assert estimated["nll"] == pytest.approx(exact["nll"], abs=5 * error + 5 / np.sqrt(1000))
    assert estimated["entropy"] == exact["entropy"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dataset": "rings"}, "dataset is 'rings'"),
        ({"bits": 1}, "bits is 1"),
        ({"bits": 9, "negatives": "gibbs"}, "bits is 9; with negatives 'gibbs'"),
        ({"order": "prepend_append"}, "order is 'prepend_append'"),
        ({"negatives": "noise"}, "negatives is 'noise'"),
        ({"num_paths": 0}, "num_paths is 0"),
        ({"energy_features": ()}, "energy_features is"),
    ],
)
def test_impossible_settings_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        EBGFlowNetPlaneConfig(**settings)

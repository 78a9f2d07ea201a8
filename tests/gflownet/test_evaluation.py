"""Estimates of a flow's law against the exact law of a graph with several paths to each end."""

import jax
import numpy as np
import pytest
from scipy import stats
from small_environments import exact_tables, random_tables, sets, tabular

from gflownet import evaluation, exact


@pytest.fixture(scope="module")
def flow():
    """A policy that is far from the target, and the exact figures of it."""
    environment, policy = tabular(sets(5, 3))
    params = random_tables(environment, seed=1, scale=0.7)
    graph = exact.enumerate_graph(environment)
    learned = np.asarray(exact.terminal_distribution(environment, policy, params, graph))
    target, log_z = exact.target_distribution(environment, graph)
    terminal = jax.tree.map(lambda leaf: leaf[graph.terminal], graph.states)
    return environment, policy, params, terminal, learned, target, log_z


def test_probabilities_of_ends_are_unbiased(flow):
    environment, policy, params, terminal, learned, _, _ = flow
    singles = np.stack(
        [
            evaluation.log_probabilities(key, environment, policy, params, terminal, num_samples=1)
            for key in jax.random.split(jax.random.key(0), 400)
        ]
    )
    estimates = np.exp(singles)
    error = estimates.std(axis=0, ddof=1) / np.sqrt(len(estimates))
    assert (np.abs(estimates.mean(axis=0) - learned) < 5.0 * error).all()
    # The planted bug: a mean of logarithms in the place of the logarithm of a mean.
    assert (np.abs(np.exp(singles.mean(axis=0)) - learned) > 5.0 * error).any()
    many = evaluation.log_probabilities(
        jax.random.key(1), environment, policy, params, terminal, num_samples=100
    )
    assert (np.abs(np.exp(many) - learned) < 5.0 * 2.0 * error).all()  # a quarter of the samples


def test_bounds_hold_and_meet_at_the_exact_flow(flow):
    environment, policy, params, terminal, learned, target, log_z = flow
    rows = np.random.default_rng(0).choice(len(target), size=2000, p=target / target.sum())
    targets = jax.tree.map(lambda leaf: leaf[rows], terminal)
    bounds = evaluation.evidence_bounds(
        jax.random.key(1), environment, policy, params, num_trajectories=4000, targets=targets
    )
    # At the ends alone the gaps are KL(p || R/Z) and KL(R/Z || p), and paths only add to them.
    lowest = float(np.sum(learned * np.log(learned / target)))
    assert bounds.elbo < log_z - lowest + 5.0 * bounds.elbo_standard_error
    highest = float(np.sum(target * np.log(target / learned)))
    assert bounds.eubo > log_z + highest - 5.0 * bounds.eubo_standard_error
    assert abs(bounds.log_z - log_z) < 5.0 * bounds.log_z_standard_error
    assert 1.0 < bounds.effective_sample_size < 4000.0

    tables, _ = exact_tables(environment, "random")
    perfect = evaluation.evidence_bounds(
        jax.random.key(1), environment, policy, tables, num_trajectories=50, targets=targets
    )
    np.testing.assert_allclose([perfect.elbo, perfect.log_z, perfect.eubo], log_z, atol=1e-5)
    assert perfect.effective_sample_size == pytest.approx(50.0, rel=1e-4)


def test_correlations_by_hand():
    """Of (0, 1, 1, 2) and (0, 1, 4, 9): equal values share the mean of their ranks."""
    found = evaluation.correlations(np.array([0.0, 1.0, 1.0, 2.0]), np.array([0.0, 1.0, 4.0, 9.0]))
    assert found["pearson"] == pytest.approx(9.0 / np.sqrt(2.0 * 49.0))
    assert found["spearman"] == pytest.approx(4.5 / np.sqrt(4.5 * 5.0))


def test_best_objects_are_counted_once():
    rng = np.random.default_rng(1)
    states = rng.integers(3, size=(200, 4))
    log_rewards = states.sum(axis=1).astype(float)
    best = evaluation.top_rewards(states, log_rewards, k=7)
    unique = np.unique(states, axis=0)
    expected = np.sort(unique.sum(axis=1))[::-1][:7]
    assert best["reward"] == pytest.approx(np.exp(expected).mean())
    chosen = best["states"]
    differences = [
        np.mean(a != b) for i, a in enumerate(chosen) for j, b in enumerate(chosen) if i != j
    ]
    assert best["diversity"] == pytest.approx(np.mean(differences))
    assert best["num_unique"] == len(unique)


def test_the_floor_is_that_of_binomial_counts():
    # E|k/n - p| of one binomial, summed over the cells.
    target = np.array([0.1, 0.2, 0.3, 0.4])
    num = 50
    counts = np.arange(num + 1)
    expected = 0.5 * sum(
        np.sum(stats.binom.pmf(counts, num, p) * np.abs(counts / num - p)) for p in target
    )
    found = evaluation.sampling_floor(target, num, num_repeats=4000)
    assert found == pytest.approx(expected, rel=0.05)


def test_modes_are_found_within_a_distance():
    modes = np.array([[0, 0, 0, 0], [1, 1, 1, 1], [0, 1, 0, 1]])
    states = np.array([[0, 0, 0, 1], [0, 0, 1, 1]])
    assert [evaluation.modes_found(states, modes, d) for d in (0, 1, 2)] == [0, 2, 3]

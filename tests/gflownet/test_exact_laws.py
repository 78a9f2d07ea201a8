"""Distances between laws, and the enumeration of graphs."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_environments import (
    DIAMOND_EDGES,
    DIAMOND_LOG_REWARD,
    SMALL,
    diamond,
    from_edges,
    sets,
    tabular,
    tabulate,
)

from gflownet import exact
from gflownet.environments import hypergrid


def test_distances_in_closed_form():
    p, q = [0.5, 0.5, 0.0], [0.25, 0.25, 0.5]
    assert exact.total_variation(p, q) == 0.5
    assert exact.kullback_leibler(p, q) == pytest.approx(math.log(2))
    assert exact.kullback_leibler(q, p) == math.inf
    middle = [0.375, 0.375, 0.25]
    assert exact.jensen_shannon(p, q) == pytest.approx(
        0.5 * math.log(0.5 / 0.375) + 0.5 * (0.5 * math.log(0.25 / 0.375) + 0.5 * math.log(2))
    )
    assert middle[0] == 0.5 * (p[0] + q[0])
    apart = [1.0, 0.0], [0.0, 1.0]
    assert exact.total_variation(*apart) == 1.0
    assert exact.jensen_shannon(*apart) == pytest.approx(math.log(2))
    assert exact.kullback_leibler(*apart) == math.inf


weight = st.one_of(st.just(0.0), st.floats(1e-9, 1))
weights = st.lists(weight, min_size=5, max_size=5).filter(lambda w: sum(w) > 1e-3)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(p=weights, q=weights)
def test_bounds(p, q):
    p, q = np.array(p) / np.sum(p), np.array(q) / np.sum(q)
    variation, divergence = exact.total_variation(p, q), exact.kullback_leibler(p, q)
    shannon = exact.jensen_shannon(p, q)
    assert -1e-12 <= variation <= 1 + 1e-12
    assert divergence >= 2 * variation**2 - 1e-9  # Pinsker
    assert -1e-12 <= shannon <= math.log(2) * variation + 1e-9  # Lin
    assert shannon == pytest.approx(exact.jensen_shannon(q, p), abs=1e-12)
    for distance in (exact.total_variation, exact.kullback_leibler, exact.jensen_shannon):
        assert distance(p, p) == pytest.approx(0.0, abs=1e-12)


@pytest.mark.parametrize("name", SMALL)
def test_graph_agrees_with_the_functions(name):
    environment = SMALL[name]()
    graph, tables = exact.enumerate_graph(environment), tabulate(environment)
    place = np.asarray([environment.state_index(s) for s in _rows(graph.states)])
    assert sorted(place) == list(range(len(tables.forward)))
    own = np.arange(len(place))
    np.testing.assert_array_equal(graph.forward_mask, tables.forward[place])
    np.testing.assert_array_equal(graph.backward_mask, tables.backward[place])
    for mine, theirs in ((tables.children, graph.children), (tables.parents, graph.parents)):
        mine = mine[place]
        np.testing.assert_array_equal(np.where(mine < 0, place[:, None], mine), place[theirs])
    assert place[graph.source] == tables.source
    np.testing.assert_array_equal(place[graph.terminal], np.flatnonzero(tables.is_terminal))
    # Levels are the longest paths: every edge leads to a later level.
    assert sum(graph.levels) == len(own)
    assert graph.levels[0] == 1
    assert len(graph.levels) == environment.max_length + 1
    level = np.repeat(np.arange(len(graph.levels)), graph.levels)
    state, action = np.nonzero(graph.forward_mask)
    assert (level[state] < level[graph.children[state, action]]).all()


def _rows(states):
    leaves, treedef = jax.tree.flatten(states)
    return [treedef.unflatten(row) for row in zip(*leaves, strict=True)]


def test_levels_where_paths_have_unequal_length():
    # 1 is a child of the source and also three steps away: its level is 3.
    graph = exact.enumerate_graph(diamond())
    assert graph.levels == (1, 2, 1, 2)
    states = np.asarray(graph.states).tolist()
    assert states[0] == 4
    assert sorted(states[1:3]) == [2, 5]
    assert states[3] == 0
    assert sorted(states[4:]) == [1, 3]


def test_terminal_distribution_by_hand():
    # Uniform P_F on the diamond: 4 -> 2, 5 or 1; 5 -> 0 or 3; 0 -> 1 or 3.
    environment, policy = tabular(diamond())
    graph = exact.enumerate_graph(environment)
    params = policy.init(None, None)
    law = exact.terminal_distribution(environment, policy, params, graph)
    at_0 = 1 / 3 + 1 / 3 * 1 / 2
    by_state = {1: 1 / 3 + at_0 / 2, 3: 1 / 3 * 1 / 2 + at_0 / 2}
    states = np.asarray(graph.states)[graph.terminal]
    np.testing.assert_allclose(law, [by_state[int(s)] for s in states], atol=1e-6)
    for batch_size in (1, 4):
        again = exact.terminal_distribution(
            environment, policy, params, graph, batch_size=batch_size
        )
        np.testing.assert_allclose(again, law, atol=1e-7)


def test_equal_rewards_with_unequal_numbers_of_paths():
    # The exact flow draws both ends equally; uniform P_F, the planted bug, does not.
    environment = from_edges(
        [(0, 0, 1), (0, 1, 2), (1, 1, 3), (2, 0, 3), (2, 2, 4)], [0.0] * 5, 0, 2
    )
    environment, policy = tabular(environment)
    graph = exact.enumerate_graph(environment)
    tables, log_z = exact.exact_flow(environment, graph)
    assert log_z == pytest.approx(math.log(2), abs=1e-6)
    tables = {name: jnp.asarray(table) for name, table in tables.items()}
    law = exact.terminal_distribution(environment, policy, tables, graph)
    np.testing.assert_allclose(law, [0.5, 0.5], atol=1e-6)
    law = exact.terminal_distribution(environment, policy, policy.init(None, None), graph)
    np.testing.assert_allclose(law, [0.75, 0.25], atol=1e-6)


def test_reward_parameters_reach_the_target():
    environment = sets(4, 2)
    graph = exact.enumerate_graph(environment)
    energies = jnp.array([0.0, 1.0, 2.0, 3.0])
    target, log_z = exact.target_distribution(environment, graph, energies)
    pairs = [(a, b) for a in range(4) for b in range(a)]
    assert log_z == pytest.approx(math.log(sum(math.exp(-a - b) for a, b in pairs)), abs=1e-6)
    chosen = np.asarray(graph.states)[graph.terminal]
    np.testing.assert_allclose(target, np.exp(-(chosen @ np.asarray(energies)) - log_z), atol=1e-6)
    flow_log_z = exact.exact_flow(environment, graph, reward_params=energies)[1]
    assert flow_log_z == pytest.approx(log_z, abs=1e-5)


def test_extreme_rewards():
    # Rewards of very different size, as log rewards: nothing overflows.
    environment = diamond()._replace(
        log_reward=lambda params, state: jnp.where(state == 1, 900.0, -900.0), log_z=None
    )
    graph = exact.enumerate_graph(environment)
    target, log_z = exact.target_distribution(environment, graph)
    assert log_z == 900.0
    assert sorted(target) == [0.0, 1.0]
    tables, flow_log_z = exact.exact_flow(environment, graph)
    assert flow_log_z == pytest.approx(900.0, rel=1e-6)
    assert all(np.isfinite(table).all() for table in tables.values())


@pytest.mark.parametrize("name", ["enumerate", "state_index"])
def test_no_enumeration(name):
    environment = diamond()._replace(**{name: None})
    with pytest.raises(ValueError, match="does not enumerate"):
        exact.enumerate_graph(environment)
    with pytest.raises(ValueError, match="does not enumerate"):
        exact.enumerate_graph(hypergrid(dim=9, side=20))


def test_cycle():
    edges = [*DIAMOND_EDGES, (0, 3, 2)]  # 2 -> 0 -> 2
    with pytest.raises(ValueError, match="cycle"):
        exact.enumerate_graph(from_edges(edges, DIAMOND_LOG_REWARD, 4, 3))


def test_wrong_index():
    environment = diamond()._replace(state_index=lambda state: (state + 1) % 6)
    with pytest.raises(ValueError, match="state_index"):
        exact.enumerate_graph(environment)


def test_second_source():
    environment = from_edges([*DIAMOND_EDGES, (6, 1, 1)], [*DIAMOND_LOG_REWARD, 0.0], 4, 3)
    with pytest.raises(ValueError, match="2 states have no parent"):
        exact.enumerate_graph(environment)
    environment = diamond()._replace(initial=lambda key: jnp.asarray(2, jnp.int32))
    with pytest.raises(ValueError, match="source, state 2"):
        exact.enumerate_graph(environment)

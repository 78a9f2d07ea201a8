"""Figures of the environments against brute force, and what is refused."""

import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from gflownet import environments as env
from gflownet import exact
from gflownet.testing import check_environment

RNG = np.random.default_rng(0)


def run(environment, actions):
    state = environment.initial(jax.random.key(0))
    for action in actions:
        state = environment.step(state, jnp.asarray(action, jnp.int32))
    return state


# Sets.


@pytest.mark.parametrize(
    ("size", "log_z"), [("small", 11.892389), ("medium", 45.378950), ("large", 48.391947)]
)
def test_benchmark_sets_have_the_published_log_z(size, log_z):
    assert abs(env.benchmark_sets(size).log_z - log_z) < 1e-6


def test_inclusion_probabilities_equal_enumeration():
    energies, chosen = RNG.normal(size=7), 3
    weights = {
        members: np.exp(-energies[list(members)].sum())
        for members in itertools.combinations(range(7), chosen)
    }
    z = sum(weights.values())
    expected = [sum(w for members, w in weights.items() if i in members) / z for i in range(7)]
    found = env.inclusion_probabilities(energies, chosen)
    np.testing.assert_allclose(found, expected, rtol=1e-12)
    assert abs(found.sum() - chosen) < 1e-12
    assert abs(env.sets(energies, chosen).log_z - np.log(z)) < 1e-12


# Sequences.


@pytest.mark.parametrize("order", ["append", "prepend_append", "any_order"])
def test_every_order_reaches_every_sequence_with_its_own_number_of_paths(order):
    """The exact flow of a constant reward counts sequences; paths are counted by enumeration."""
    environment = env.sequences(
        lambda params, tokens: jnp.zeros(()), vocabulary=2, length=4, order=order
    )
    graph = exact.enumerate_graph(environment)
    _, log_z = exact.exact_flow(environment, graph)
    assert abs(log_z - np.log(16)) < 1e-6
    paths = np.zeros(len(graph.parents))
    paths[graph.source] = 1
    for row in range(len(paths)):
        if row != graph.source:
            paths[row] = paths[graph.parents[row]][graph.backward_mask[row]].sum()
    tokens = np.asarray(graph.states.tokens)[graph.terminal]
    for row, sequence in zip(graph.terminal, tokens, strict=True):
        assert paths[row] == _count_paths(tuple(sequence), order)


def _count_paths(sequence, order):
    if order == "any_order":
        return 24
    if order == "append" or len(sequence) == 0:
        return 1
    first, last = sequence[1:], sequence[:-1]
    return _count_paths(last, order) + (_count_paths(first, order) if first != last else 0)


def test_prepending_puts_in_front():
    environment = env.sequences(
        lambda params, tokens: jnp.zeros(()), vocabulary=3, length=3, order="prepend_append"
    )
    assert run(environment, [1, 3 + 0, 2]).tokens.tolist() == [0, 1, 2]
    alone = run(environment, [1])
    assert environment.forward_mask(alone).tolist() == [True, True, True, True, False, True]


def test_tables_are_read_with_the_first_letter_leading(tmp_path):
    scores = RNG.uniform(-0.2, 1.0, size=4**8)
    path = tmp_path / "scores.npz"
    np.savez(path, score=scores)
    environment = env.tfbind8(path)
    share = np.maximum(scores, 1e-3) / scores.max()
    assert abs(environment.log_z - np.log(np.sum(10.0 * share**3))) < 1e-9
    tokens = [3, 0, 2, 1, 1, 0, 3, 2]
    state = run(environment, tokens)
    index = int("".join(map(str, tokens)), 4)
    assert abs(environment.log_reward((), state) - np.log(10.0 * share[index] ** 3)) < 1e-5
    with pytest.raises(ValueError, match=r"shape \(65536,\); it must be \(161051,\)"):
        env.qm9_strings(path)
    with pytest.raises(ValueError, match="there is no such file"):
        env.tfbind8(tmp_path / "none.npz")


def test_bit_rewards_are_distances_to_the_nearest_mode():
    modes = env.hidden_modes(16, num_modes=5)
    environment = env.bit_sequences(
        num_bits=16, bits_per_word=4, modes=modes, inverse_temperature=0.5
    )
    reward = jax.jit(jax.vmap(lambda tokens: environment.log_reward((), _full(tokens))))
    tokens = RNG.integers(16, size=(50, 4))
    bits = np.array([[int(b) for word in row for b in f"{word:04b}"] for row in tokens])
    expected = -0.5 * np.abs(bits[:, None] - modes[None]).sum(-1).min(1)
    np.testing.assert_allclose(reward(jnp.asarray(tokens)), expected, atol=1e-5)
    assert set(np.unique(env.hidden_modes(120))) == {0, 1}
    assert env.hidden_modes(120).shape == (60, 120)


def _full(tokens):
    return env.SequenceState(tokens, jnp.zeros((), bool))


def test_an_energy_being_trained_is_the_reward():
    energy_fn = lambda params, x: params["coupling"] * x[0] * x[1] - params["field"] * x[2]  # noqa: E731
    environment = env.discrete_energy(
        energy_fn, num_variables=3, values=(-1.0, 1.0), temperature=2.0
    )
    state = run(environment, [0 * 2 + 1, 2 * 2 + 0, 1 * 2 + 0])  # x = (1, -1, -1)
    params = {"coupling": jnp.float32(0.7), "field": jnp.float32(0.4)}
    assert abs(float(environment.log_reward(params, state)) - 0.15) < 1e-6
    gradient = jax.grad(lambda params: environment.log_reward(params, state))(params)
    assert abs(float(gradient["coupling"]) - 0.5) < 1e-6


# Problems on graphs.


def test_a_clique_graph_has_its_cliques_and_cross_pairs():
    graph = env.random_clique_graph(3, num_cliques=5, clique_size=4, tightness=0.3)
    for clique in range(5):
        block = graph[4 * clique : 4 * clique + 4, 4 * clique : 4 * clique + 4]
        assert (block == ~np.eye(4, dtype=bool)).all()
    assert env.best_value("independent_set", graph) <= 5
    assert graph[:4, 4:].any()


PATH = np.eye(4, k=1, dtype=bool) | np.eye(4, k=-1, dtype=bool)


def test_each_vertex_of_a_set_may_have_been_the_last():
    """On the path 0-1-2-3 the set {0, 3} has two orders, and undoing frees the right vertices."""
    environment = env.graph_problem("independent_set", PATH, inverse_temperature=2.0)
    state = run(environment, [0, 3])
    assert state.inside.tolist() == [True, False, False, True]
    assert environment.backward_mask(state).tolist() == [True, False, False, True]
    before = environment.undo(state, 3)
    assert environment.forward_mask(before).tolist() == [False, False, True, True]
    assert float(environment.log_reward((), state)) == 4.0
    # Maximal sets: {0, 2}, {0, 3}, {1, 3}.
    assert abs(environment.log_z - np.log(3.0 * np.exp(4.0))) < 1e-9


def test_the_last_vertex_of_a_dominating_set_was_needed():
    """On the path 0-1-2-3, {0, 1, 2} was not built with 0 last: {1, 2} dominates already."""
    environment = env.graph_problem("dominating_set", PATH)
    state = run(environment, [0, 1, 2])
    assert environment.forward_mask(state).tolist() == [False] * 4
    assert environment.backward_mask(state).tolist() == [False, False, True, False]
    assert float(environment.log_reward((), state)) == -3.0


def test_the_gain_of_a_vertex_is_how_much_the_cut_grows():
    graph = env.preferential_graph(3, num_vertices=9, num_neighbours=3)
    environment = env.graph_problem("cut", graph)
    state = environment.initial(jax.random.key(0))
    for vertex in (4, 0, 7):
        gain = int(env.GRAPH_PROBLEMS["cut"].gain(graph, state.inside)[vertex])
        grown = environment.step(state, vertex)
        reward, before = (float(environment.log_reward((), s)) for s in (grown, state))
        assert reward - before == gain
        assert bool(environment.forward_mask(state)[vertex]) == (gain > 0)
        state = grown


@pytest.mark.parametrize("problem", env.GRAPH_PROBLEMS)
def test_integer_programs_find_the_best_of_all_terminal_sets(problem):
    for seed in range(3):
        graph = env.preferential_graph(seed, num_vertices=9, num_neighbours=2 + seed)
        environment = env.graph_problem(problem, graph)
        states = environment.enumerate()
        is_end = ~np.asarray(jax.vmap(environment.forward_mask)(states)).any(axis=1)
        values = np.asarray(jax.vmap(environment.log_reward, (None, 0))((), states))[is_end]
        assert values.max() == env.best_value(problem, graph)
        brute = _brute_force(problem, graph)
        assert values.max() == brute


def test_a_problem_of_your_own_is_a_gain_and_a_value():
    """Vertex covers: a vertex gains the edges that no other vertex covers."""

    def program(adjacency):
        rows = np.eye(len(adjacency))[np.argwhere(np.triu(adjacency))].sum(axis=1)
        return np.ones(len(adjacency)), rows, 1.0, np.full(len(rows), np.inf)

    cover = env.GraphProblem(
        gain=lambda adjacency, inside: (adjacency & ~inside).sum(axis=1),
        value=lambda adjacency, inside: -inside.sum(),
        relations=lambda adjacency, inside, is_open: (adjacency & ~inside & is_open[:, None])[None],
        program=program,
    )
    graph = env.preferential_graph(1, num_vertices=8, num_neighbours=2)
    environment = env.graph_problem(cover, graph)
    check_environment(environment)
    # What a cover leaves out is independent.
    expected = env.best_value("independent_set", graph) - 8
    assert env.best_value(cover, graph) == expected
    states = environment.enumerate()
    is_end = ~np.asarray(jax.vmap(environment.forward_mask)(states)).any(axis=1)
    assert np.asarray(environment.log_z) > expected
    assert -states.inside[is_end].sum(axis=1).min() == expected


def _brute_force(problem, graph):
    """The best value over all subsets, by the definition of the problem."""
    size, best = len(graph), -np.inf
    for bits in range(2**size):
        s = np.array([bits >> v & 1 for v in range(size)], bool)
        inner = graph[np.ix_(s, s)]
        if problem == "independent_set":
            value = s.sum() if not inner.any() else -np.inf
        elif problem == "clique":
            value = s.sum() if inner.sum() == s.sum() * (s.sum() - 1) else -np.inf
        elif problem == "dominating_set":
            value = -s.sum() if (s | graph[s].any(axis=0)).all() else -np.inf
        else:
            value = graph[np.ix_(s, ~s)].sum()
        best = max(best, value)
    return best


# Directed acyclic graphs.


def test_linear_gaussian_scores_are_densities():
    data, _ = env.linear_gaussian_data(1, num_variables=4, num_samples=12)
    scores = env.linear_gaussian_scores(data, weight_variance=0.7, noise_variance=0.3)
    for variable, parents in ((0, []), (0, [1]), (2, [0, 3]), (3, [0, 1, 2])):
        inputs = data[:, parents]
        covariance = 0.3 * np.eye(12) + 0.7 * inputs @ inputs.T
        expected = stats.multivariate_normal(np.zeros(12), covariance).logpdf(data[:, variable])
        mask = sum(1 << parent for parent in parents)
        np.testing.assert_allclose(scores[variable, mask], expected, rtol=1e-9)
    assert np.isneginf(scores[1, 2])


def _total(scores, graph):
    parents = [int(sum(1 << int(i) for i in np.flatnonzero(column))) for column in graph.T]
    return sum(scores[variable, mask] for variable, mask in enumerate(parents))


def _graph(size, *edges):
    graph = np.zeros((size, size), bool)
    for i, j in edges:
        graph[i, j] = True
    return graph


def test_bge_gives_equivalent_graphs_the_same():
    data, _ = env.linear_gaussian_data(2, num_variables=3)
    scores = env.bge_scores(data)
    chains = [
        _graph(3, (0, 1), (1, 2)),
        _graph(3, (1, 0), (1, 2)),
        _graph(3, (2, 1), (1, 0)),
    ]
    values = [_total(scores, graph) for graph in chains]
    np.testing.assert_allclose(values, values[0], rtol=1e-12)
    collider = _total(scores, _graph(3, (0, 1), (2, 1)))
    assert abs(collider - values[0]) > 1e-3
    # Scores that are not made for it do tell them apart.
    other = env.linear_gaussian_scores(data)
    assert abs(_total(other, chains[0]) - _total(other, chains[1])) > 1e-3


def test_closure_equals_warshall_along_random_walks():
    environment = env.dags(np.zeros((5, 32)))
    rng = np.random.default_rng(3)
    step, mask_of = jax.jit(environment.step), jax.jit(environment.forward_mask)
    for _ in range(5):
        state, graph = environment.initial(jax.random.key(0)), np.zeros((5, 5), bool)
        while True:
            reaches = graph | np.eye(5, dtype=bool)
            for k in range(5):
                reaches |= reaches[:, k : k + 1] & reaches[k : k + 1]
            np.testing.assert_array_equal(state.reaches, reaches)
            allowed = ~graph & ~reaches.T
            np.testing.assert_array_equal(mask_of(state)[:-1], allowed.reshape(-1))
            if not allowed.any():
                break
            action = int(rng.choice(np.flatnonzero(allowed.reshape(-1))))
            graph[action // 5, action % 5] = True
            state = step(state, action)


def test_posterior_of_graphs_is_that_of_their_scores():
    data, _ = env.linear_gaussian_data(0, num_variables=3)
    scores = env.linear_gaussian_scores(data)
    environment = env.dags(scores)
    graph = exact.enumerate_graph(environment)
    target, log_z = exact.target_distribution(environment, graph)
    graphs = np.asarray(graph.states.adjacency)[graph.terminal]
    totals = np.array([_total(scores, one) for one in graphs])
    expected = np.exp(totals - np.logaddexp.reduce(totals))
    np.testing.assert_allclose(target, expected, atol=1e-4)
    empty = _total(scores, np.zeros((3, 3), bool))
    np.testing.assert_allclose(log_z + empty, np.logaddexp.reduce(totals), rtol=1e-5)
    marginals = env.edge_marginals(graphs, expected)
    assert marginals.shape == (3, 3)
    assert (np.diag(marginals) == 0.0).all()
    assert len(env.all_dags(4)) == 543


# Phylogenies.

SPECIES = {"a": "AACGT-A", "b": "AACCTGR", "c": "GTCCTGA", "d": "GTAGTGC", "e": "GAACT-C"}


def _parsimony(tree, sites):
    """Fewest changes of a rooted tree of nested pairs, by trying all letters at all inner nodes."""

    def costs(node):
        if isinstance(node, int):
            return [
                [0 if sites[node, s] >> b & 1 else np.inf for b in range(5)]
                for s in range(sites.shape[1])
            ]
        both = [costs(child) for child in node]
        return [
            [
                sum(min(c[s][other] + (other != b) for other in range(5)) for c in both)
                for b in range(5)
            ]
            for s in range(sites.shape[1])
        ]

    return sum(min(site) for site in costs(tree))


def test_mutations_are_those_of_brute_force_and_do_not_know_the_root():
    sites = env.encode_sites(SPECIES)
    environment = env.phylogeny(sites, offset=10.0, temperature=4.0)
    # One unrooted tree ((0 1) 4 (2 3)), rooted in three ways, by pairs of slots.
    pairs = [(i, j) for i in range(5) for j in range(i + 1, 5)]
    rootings = {
        (((0, 1), 4), (2, 3)): [(0, 1), (0, 4), (2, 3), (0, 2)],
        ((0, 1), ((2, 3), 4)): [(0, 1), (2, 3), (2, 4), (0, 2)],
        (0, (1, ((2, 3), 4))): [(2, 3), (2, 4), (1, 2), (0, 1)],
    }
    for tree, joins in rootings.items():
        state = run(environment, [pairs.index(pair) for pair in joins])
        expected = _parsimony(tree, sites)
        assert int(state.mutations.sum()) == expected
        assert abs(float(environment.log_reward((), state)) - (10.0 - expected) / 4.0) < 1e-6
    assert len({_parsimony(tree, sites) for tree in rootings}) == 1


def test_forests_do_not_know_the_order_of_their_joins():
    environment = env.phylogeny(env.encode_sites(SPECIES))
    pairs = [(i, j) for i in range(5) for j in range(i + 1, 5)]
    one = run(environment, [pairs.index((0, 1)), pairs.index((2, 4))])
    other = run(environment, [pairs.index((2, 4)), pairs.index((0, 1))])
    jax.tree.map(np.testing.assert_array_equal, one, other)
    assert np.flatnonzero(environment.backward_mask(one)).tolist() == [
        pairs.index((0, 1)),
        pairs.index((2, 4)),
    ]


def test_all_rooted_trees_are_listed():
    environment = env.phylogeny(env.encode_sites(dict(list(SPECIES.items())[:4])))
    states = environment.enumerate()
    by_size = [(np.sum((states.root >= 0).sum(1) == trees)) for trees in (1, 2, 3, 4)]
    assert by_size == [15, 15, 6, 1]  # (2n - 3)!! rooted trees


def test_alignments_are_read_or_refused(tmp_path):
    path = tmp_path / "x.json"
    path.write_text(json.dumps(SPECIES))
    assert env.load_alignment(path) == SPECIES
    fasta = tmp_path / "x.fasta"
    fasta.write_text(
        "".join(f">{name}\n{text[:3]}\n{text[3:]}\n" for name, text in SPECIES.items())
    )
    assert env.load_alignment(fasta) == SPECIES
    path.write_text("[1, 2]")
    with pytest.raises(ValueError, match="an object of species"):
        env.load_alignment(path)
    with pytest.raises(ValueError, match="b: has 1 sites; the first species has 2"):
        env.encode_sites({"a": "AC", "b": "A"})
    with pytest.raises(ValueError, match="a: has the letters"):
        env.encode_sites({"a": "AZ", "b": "AC"})


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: env.sets([0.0, 1.0], 3), "num_chosen is 3"),
        (lambda: env.benchmark_sets("huge"), "size is 'huge'"),
        (
            lambda: env.sequences(lambda p, t: 0.0, vocabulary=2, length=2, order="up"),
            "order is 'up'",
        ),
        (
            lambda: env.sequences(
                lambda p, t: 0.0, vocabulary=2, length=2, min_length=1, order="any_order"
            ),
            "min_length is 1",
        ),
        (lambda: env.bit_sequences(num_bits=10, bits_per_word=4), "bits_per_word is 4"),
        (
            lambda: env.graph_problem("cut", np.eye(3, dtype=bool)),
            "no vertex its own neighbour",
        ),
        (lambda: env.graph_problem("tour", np.zeros((3, 3))), "problem is 'tour'"),
        (
            lambda: env.preferential_graph(0, num_vertices=3, num_neighbours=3),
            "num_neighbours is 3",
        ),
        (lambda: env.dags(np.zeros((2, 3))), r"must be \[d, 2\^d\]"),
        (lambda: env.phylogeny(np.zeros((3, 2), np.uint8)), "sets of letters"),
        (lambda: env.bge_scores(np.zeros((4, 2)), precision_weight=2.0), "precision_weight is 2"),
        (
            lambda: env.discrete_energy(lambda p, x: x[0], num_variables=1, temperature=0.0),
            "temperature is 0",
        ),
    ],
)
def test_what_cannot_be_is_named(build, message):
    with pytest.raises(ValueError, match=message):
        build()

"""The recipes of sequences, graph problems, graphs and trees, small enough to be exact."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ebjax.training import init_state, train
from gflownet.environments import best_value
from gflownet.recipes import dags, graph_problems, phylogeny, sequences, sets

FEW = {"steps_per_call": 50, "log_every": 100, "checkpoint_every": 1000, "num_devices": 1}


def _figures(module, config, monitored, drawn):
    """Figures of merit before and after training; draws and pictures are looked at on the way."""
    run = module.build(config)
    before = run.evaluate(jax.random.key(0), init_state(run, config))
    state = train(run, config).state
    after = run.evaluate(jax.random.key(0), state)
    assert set(after) == set(before)
    assert set(run.monitor(jax.random.key(3), state)) == {run.monitor_name} == {monitored}
    draws = run.sample(jax.random.key(1), state, 7)
    assert all(len(array) == 7 for array in draws.values())
    assert set(run.figures(jax.random.key(2), state, draws)) == {drawn}
    return before, after, draws


@pytest.fixture
def table(tmp_path):
    """Scores of 65,536 sequences that depend on few letters, so that a flow learns them soon."""
    digits = np.arange(4**8)[:, None] // 4 ** np.arange(8)[::-1] % 4
    weights = np.random.default_rng(0).random((8, 4)) * (np.arange(8) < 3)[:, None]
    path = tmp_path / "scores.npz"
    np.savez(path, score=0.2 + weights[np.arange(8), digits].sum(axis=1))
    return str(path)


def test_a_table_of_scores_is_learned_and_judged_exactly(table):
    config = sequences.SequencesConfig(
        task="tfbind8",
        data_path=table,
        order="append",
        hidden_features=(64,),
        learning_rate=1e-2,
        num_steps=600,
        epsilon_decay_steps=100,
        num_evaluated=500,
        **FEW,
    )
    before, after, draws = _figures(sequences, config, "total_variation", "rewards")
    assert after["total_variation"] < 0.08 < before["total_variation"]
    assert abs(after["reward_ratio"] - 1.0) < 0.05 < abs(before["reward_ratio"] - 1.0)
    assert after["log_z_error"] < 0.1
    assert after["elbo_gap"] > -5 * after["importance_log_z_standard_error"]
    assert after["spearman"] > 0.8
    assert draws["tokens"].shape == (7, 8)


def test_bits_are_judged_near_their_modes_by_a_transformer():
    config = sequences.SequencesConfig(
        num_bits=8,
        bits_per_word=2,
        network="transformer",
        order="any_order",
        width=8,
        num_heads=2,
        num_layers=1,
        num_steps=2,
        batch_size=4,
        num_evaluated=64,
        **{**FEW, "steps_per_call": 2},
    )
    before, _, draws = _figures(sequences, config, "total_variation", "rewards")
    assert draws["tokens"].shape == (7, 4)
    # Of 256 sequences 37 lie within 2 bits of a mode: 64 uniform draws miss none of the 5.
    assert before["modes_found"] == 60
    bits = sequences.bits_near_modes(8)
    assert bits.shape == (480, 8)
    distance = np.abs(bits.reshape(60, 8, 8) - bits.reshape(60, 8, 8)[:, :1]).sum(axis=2)
    np.testing.assert_array_equal(distance, np.tile(np.arange(8), (60, 1)))


def test_graphs_follow_their_posterior():
    config = dags.DagsConfig(
        num_variables=3,
        num_samples=10,
        hidden_features=(64,),
        num_steps=600,
        epsilon_decay_steps=300,
        **FEW,
    )
    before, after, _ = _figures(dags, config, "jensen_shannon", "edges")
    assert after["jensen_shannon"] < 0.005 < before["jensen_shannon"]
    assert after["edge_correlation"] > 0.99
    assert after["largest_edge_error"] < 0.05
    assert after["log_z_error"] < 0.1


def test_trees_follow_their_law_and_are_written_as_newick(tmp_path):
    alignment = phylogeny.simulated_alignment(1, num_species=5, num_sites=40)
    path = tmp_path / "alignment.json"
    path.write_text(json.dumps(alignment))
    config = phylogeny.PhylogenyConfig(
        data_path=str(path), num_species=4, width=16, num_heads=2, num_steps=300, **FEW
    )
    before, after, draws = _figures(phylogeny, config, "jensen_shannon", "rewards")
    assert after["jensen_shannon"] < 0.02 < before["jensen_shannon"]
    assert after["log_z_error"] < 0.2
    for tree in draws["trees"]:
        assert tree.endswith(";")
        assert tree.count("(") == tree.count(")") == 3
        assert sorted(tree.strip(";").replace("(", "").replace(")", "").split(",")) == [
            f"species_{i}" for i in range(4)
        ]


def test_sets_of_unseen_graphs_are_large_and_independent(tmp_path):
    upper = np.triu(np.random.default_rng(0).random((24, 12, 12)) < 0.25, 1)
    graphs = upper | upper.transpose(0, 2, 1)
    np.save(tmp_path / "graphs.npy", graphs)
    config = graph_problems.GraphProblemsConfig(
        data_path=str(tmp_path / "graphs.npy"),
        num_held_out=4,
        width=16,
        num_layers=2,
        inverse_temperature=3.0,
        learning_rate=1e-2,
        num_steps=300,
        epsilon_decay_steps=100,
        **FEW,
    )
    before, after, draws = _figures(graph_problems, config, "negative_value", "sets")
    assert after["share_of_best"] > max(0.92, before["share_of_best"] + 0.03)
    assert after["best_of_20"] <= after["best_value"]
    optimum = [best_value("independent_set", graph) for graph in graphs[-4:]]
    assert after["best_value"] == np.mean(optimum)
    for inside, adjacency in zip(draws["sets"], draws["adjacency"], strict=True):
        assert not adjacency[np.ix_(inside, inside)].any()
        assert (inside | adjacency[inside].any(axis=0)).all()


@pytest.mark.parametrize("problem", ["clique", "dominating_set", "cut"])
def test_other_problems_are_learned_and_judged_too(problem):
    config = graph_problems.GraphProblemsConfig(
        problem=problem,
        num_graphs=8,
        num_held_out=3,
        num_cliques=4,
        clique_size=3,
        num_vertices=10,
        num_neighbours=3,
        width=16,
        num_layers=2,
        learning_rate=1e-2,
        num_steps=400,
        epsilon_decay_steps=50,
        **FEW,
    )
    before, after, draws = _figures(graph_problems, config, "negative_value", "sets")
    assert before["share_of_best"] < 0.9 < after["share_of_best"] <= 1.0
    assert after["mean_value"] > after["random_order"]
    best = [best_value(problem, graph) for graph in draws["adjacency"][:3]]
    assert after["best_value"] == pytest.approx(np.mean(best))
    assert (draws["values"][:3] <= best).all()


def test_greedy_rules_take_what_gains_most():
    # A hub whose leaves are joined in pairs: as many of the pairs as there are, but for the hub.
    graph = np.zeros((7, 7), bool)
    graph[0, 1:] = graph[1:, 0] = True
    graph[[1, 3, 5], [2, 4, 6]] = graph[[2, 4, 6], [1, 3, 5]] = True
    sizes = {
        problem: int(graph_problems.greedy_sets(problem, jnp.asarray(graph)[None]).sum())
        for problem in ("independent_set", "clique", "dominating_set")
    }
    assert sizes == {"independent_set": 3, "clique": 3, "dominating_set": 1}
    keys = jax.random.split(jax.random.key(0), 100)
    graphs = jnp.asarray(np.repeat(graph[None], 100, axis=0))
    random = np.asarray(graph_problems.greedy_sets("independent_set", graphs, keys))
    # The hub is the first vertex once in seven times, and then the only one.
    assert set(random.sum(axis=1)) == {1, 3}
    assert abs((random.sum(axis=1) == 1).mean() - 1 / 7) < 5 * np.sqrt(6 / 49 / 100)


def test_log_z_starts_where_the_first_policy_puts_it():
    config = sets.SetsConfig(size="small", objective="tb", hidden_features=(8,))
    run = sets.build(config)
    params = jax.jit(run.init)(jax.random.key(0))
    gap = run.monitor(
        jax.random.key(1), init_state(run, config)._replace(params=params, ema=params)
    )["elbo_gap"]
    # Log-weights of this untrained policy deviate by 2.6 (of 4,000): 2 is 6 standard errors of 64.
    assert params["log_z"] == pytest.approx(run.flow.environment.log_z - gap, abs=2.0)
    assert params["log_z"] > 5.0
    plain = sets.build(dataclasses.replace(config, estimates_log_z=False))
    assert jax.jit(plain.init)(jax.random.key(0))["log_z"] == 0.0


@pytest.mark.parametrize(
    ("module", "config", "objective"),
    [
        *((sets, sets.SetsConfig, name) for name in ("tb", "flsubtb", "led", "tlm")),
        *((sequences, sequences.SequencesConfig, name) for name in ("fm", "led", "tlm")),
        *((dags, dags.DagsConfig, name) for name in ("soft_dqn", "led", "tlm")),
        *((phylogeny, phylogeny.PhylogenyConfig, name) for name in ("tb", "pcl")),
    ],
)
def test_objectives_fit_the_loop(module, config, objective):
    """Parameters, carry and optimizer state keep their shapes; nothing is compiled."""
    options = {"objective": objective, "hidden_features": (8,), "batch_size": 4, "width": 8}
    names = {field.name for field in dataclasses.fields(config)}
    run = module.build(config(**{name: options[name] for name in options if name in names}))

    def step(key):
        params = run.init(key)
        batch = jnp.zeros(4)
        carry = run.objective.init(key, params, batch)
        keys = jax.random.split(key, 4)
        gradient, (after, _) = jax.grad(run.objective.loss, has_aux=True)(
            params, carry, keys, batch
        )
        opt_state = run.optimizer.init(params)
        updates, _ = run.optimizer.update(gradient, opt_state, params)
        return params, updates, carry, after

    params, updates, carry, after = jax.eval_shape(
        jax.vmap(step, axis_name="devices"), jax.random.split(jax.random.key(0), 1)
    )
    shapes = lambda tree: jax.tree.map(lambda leaf: leaf.shape, tree)  # noqa: E731
    assert shapes(params) == shapes(updates)
    assert shapes(carry) == shapes(after)


@pytest.mark.parametrize(
    ("config", "settings", "message"),
    [
        (sequences.SequencesConfig, {"task": "letters"}, "task is 'letters'"),
        (sequences.SequencesConfig, {"task": "tfbind8"}, "data_path is ''"),
        (sequences.SequencesConfig, {"objective": "mdb"}, "take any but mdb and forward_kl"),
        (
            sequences.SequencesConfig,
            {"network": "transformer", "objective": "led"},
            "takes 'mlp' only",
        ),
        (sequences.SequencesConfig, {"num_heads": 3}, "num_heads is 3; it must divide"),
        (dags.DagsConfig, {"score": "bic"}, "score is 'bic'"),
        (dags.DagsConfig, {"objective": "forward_kl"}, "objective is 'forward_kl'"),
        (dags.DagsConfig, {"num_variables": 16}, "num_variables is 16"),
        (phylogeny.PhylogenyConfig, {"objective": "tlm"}, "objective is 'tlm'"),
        (phylogeny.PhylogenyConfig, {"num_species": 2}, "num_species is 2"),
        (phylogeny.PhylogenyConfig, {"temperature": 0.0}, "temperature is 0.0"),
        (graph_problems.GraphProblemsConfig, {"problem": "tour"}, "problem is 'tour'"),
        (graph_problems.GraphProblemsConfig, {"objective": "tb"}, "objective is 'tb'"),
        (graph_problems.GraphProblemsConfig, {"tightness": 1.0}, "tightness is 1.0"),
        (
            graph_problems.GraphProblemsConfig,
            {"inverse_temperature": 0.0},
            "must be positive, or -1",
        ),
    ],
)
def test_impossible_settings_are_named(config, settings, message):
    with pytest.raises(ValueError, match=message):
        config(**settings)


def test_files_that_do_not_fit_are_named(tmp_path):
    path = tmp_path / "wide.npy"
    np.save(path, np.ones((5, 20)))
    with pytest.raises(ValueError, match=r"wide.npy: has shape \(5, 20\)"):
        dags.build(dags.DagsConfig(data_path=str(path)))
    with pytest.raises(ValueError, match="give more than num_held_out"):
        graph_problems.build(graph_problems.GraphProblemsConfig(data_path=str(path)))
    alignment = tmp_path / "two.json"
    alignment.write_text(json.dumps({"a": "ACGT", "b": "ACGA"}))
    with pytest.raises(ValueError, match=r"num_species is 6; .* has 2"):
        phylogeny.build(phylogeny.PhylogenyConfig(data_path=str(alignment)))

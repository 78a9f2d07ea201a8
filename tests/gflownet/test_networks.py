"""Policies as networks: symmetries, shapes, masks, and that each can learn a law exactly."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gflownet.policies import mlp_policy, pair_policy, transformer_policy, vertex_policy


def _logits(policy, observation, num_actions, seed=0):
    params = policy.init(jax.random.key(seed), observation)
    everything = jnp.ones(num_actions, bool)
    output = policy.apply(params, observation, everything, everything)
    return params, output


def test_renaming_vertices_renames_the_logits():
    rng = np.random.default_rng(0)
    adjacency = np.triu(rng.random((6, 6)) < 0.5, 1)
    adjacency = adjacency | adjacency.T
    features = jnp.asarray(rng.random((6, 2)), jnp.float32)
    policy = vertex_policy(lambda graph: graph, width=8, num_layers=2, with_flow=True)
    params, output = _logits(policy, (features, jnp.asarray(adjacency)), 6)
    order = rng.permutation(6)
    renamed = (features[order], jnp.asarray(adjacency[np.ix_(order, order)]))
    everything = jnp.ones(6, bool)
    other = policy.apply(params, renamed, everything, everything)
    np.testing.assert_allclose(other.forward.logits, output.forward.logits[order], atol=1e-5)
    np.testing.assert_allclose(other.backward.logits, output.backward.logits[order], atol=1e-5)
    np.testing.assert_allclose(other.log_flow, output.log_flow, atol=1e-5)
    # The graph matters, not only the features.
    none = policy.apply(params, (features, jnp.zeros((6, 6))), everything, everything)
    assert np.abs(none.forward.logits - output.forward.logits).max() > 1e-3


def test_relations_tell_what_edges_alone_cannot():
    """Two triangles and a hexagon: every vertex has two neighbours, whatever is passed along."""
    triangles = np.kron(np.eye(2), np.ones((3, 3)) - np.eye(3))
    hexagon = np.roll(np.eye(6), 1, axis=1) + np.roll(np.eye(6), -1, axis=1)
    policy = vertex_policy(lambda graph: graph, width=8, num_layers=3)
    features = jnp.ones((6, 1))

    def difference(relations_of):
        params, first = _logits(policy, (features, relations_of(triangles)), 6)
        everything = jnp.ones(6, bool)
        other = policy.apply(params, (features, relations_of(hexagon)), everything, everything)
        return np.abs(first.forward.logits - other.forward.logits).max()

    assert difference(jnp.asarray) < 1e-5
    assert difference(lambda edges: jnp.stack([edges, edges * (edges @ edges)])) > 1e-2


@pytest.mark.parametrize("num_layers", [0, 1])
def test_exchanging_slots_exchanges_the_pairs(num_layers):
    rng = np.random.default_rng(1)
    rows = rng.random((4, 3)).astype(np.float32)
    rows[:, 0] = [1, 1, 0, 1]
    policy = pair_policy(width=8, num_layers=num_layers, num_heads=2, with_flow=True)
    params, output = _logits(policy, jnp.asarray(rows), 6)
    order = np.array([3, 0, 2, 1])
    everything = jnp.ones(6, bool)
    other = policy.apply(params, jnp.asarray(rows[order]), everything, everything)

    def matrix(logits):
        full = np.zeros((4, 4))
        full[np.triu_indices(4, 1)] = logits
        return full + full.T

    expected = matrix(output.forward.logits)[np.ix_(order, order)]
    np.testing.assert_allclose(matrix(other.forward.logits), expected, atol=1e-5)
    np.testing.assert_allclose(other.log_flow, output.log_flow, atol=1e-5)
    # What stands in an empty slot is read by nobody.
    changed = rows.copy()
    changed[2, 1:] = 9.0
    same = policy.apply(params, jnp.asarray(changed), everything, everything)
    kept = [0, 2, 4]  # pairs (0, 1), (0, 3) and (1, 3)
    np.testing.assert_allclose(
        same.forward.logits[np.array(kept)], output.forward.logits[np.array(kept)], atol=1e-5
    )


def test_logits_per_place_come_from_the_place():
    policy = transformer_policy(3, 13, per_place=True, width=8, num_layers=0, num_heads=2)
    tokens = jnp.array([3, 0, 3, 1])
    params, output = _logits(policy, tokens, 13)
    everything = jnp.ones(13, bool)
    other = policy.apply(params, tokens.at[1].set(2), everything, everything)
    differs = np.abs(np.asarray(other.forward.logits - output.forward.logits)) > 1e-6
    # Without attention only the place itself and the last action, which sees the mean, change.
    np.testing.assert_array_equal(np.flatnonzero(differs), [3, 4, 5, 12])


def test_attention_lets_places_see_each_other():
    policy = transformer_policy(3, 12, per_place=True, width=8, num_layers=1, num_heads=2)
    tokens = jnp.array([3, 0, 3, 1])
    params, output = _logits(policy, tokens, 12)
    everything = jnp.ones(12, bool)
    other = policy.apply(params, tokens.at[1].set(2), everything, everything)
    assert (np.abs(np.asarray(other.forward.logits - output.forward.logits)) > 1e-6).all()


@pytest.mark.parametrize("backward", ["learned", "uniform"])
@pytest.mark.parametrize(
    ("make", "observation"),
    [
        (lambda **options: mlp_policy(6, (8,), **options), jnp.ones(3)),
        (
            lambda **options: transformer_policy(
                3, 6, width=8, num_layers=1, num_heads=2, **options
            ),
            jnp.array([0, 3]),
        ),
        (lambda **options: pair_policy(width=8, num_heads=2, **options), jnp.ones((4, 3))),
        (
            lambda **options: vertex_policy(lambda graph: graph, width=8, **options),
            (jnp.ones((6, 2)), jnp.ones((6, 6))),
        ),
    ],
    ids=["mlp", "transformer", "pairs", "vertices"],
)
def test_masks_flows_and_uniform_backward_policies(make, observation, backward):
    policy = make(backward=backward, with_flow=True)
    params = policy.init(jax.random.key(0), observation)
    forward = jnp.array([True, False, True, True, False, True])
    behind = jnp.array([False, True, True, False, False, False])
    output = policy.apply(params, observation, forward, behind)
    assert output.log_flow.shape == ()
    probs = np.asarray(output.forward.probs())
    assert (probs[~np.asarray(forward)] == 0.0).all()
    np.testing.assert_allclose(probs.sum(), 1.0, rtol=1e-6)
    back = np.asarray(output.backward.probs())
    assert (back[~np.asarray(behind)] == 0.0).all()
    if backward == "uniform":
        np.testing.assert_allclose(back, [0, 0.5, 0.5, 0, 0, 0], atol=1e-7)
    without = make(backward=backward)
    params = without.init(jax.random.key(0), observation)
    assert without.apply(params, observation, forward, behind).log_flow is None
    with pytest.raises(ValueError, match="backward is 'none'"):
        make(backward="none")


def test_impossible_sizes_are_named():
    with pytest.raises(ValueError, match="num_heads is 3; it must divide the width 8"):
        transformer_policy(3, 3, width=8, num_heads=3)
    policy = transformer_policy(3, 5, per_place=True, width=8, num_heads=2)
    with pytest.raises(ValueError, match="num_actions is 5; 2 places of 3 tokens need"):
        policy.init(jax.random.key(0), jnp.array([0, 3]))
    with pytest.raises(ValueError, match="width is 0"):
        vertex_policy(lambda graph: graph, width=0)

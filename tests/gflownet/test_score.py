"""Scores of trajectories, and the compact map under them, against plain evaluation."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from small_environments import SMALL, diamond, plain_scores, tabulate

from gflownet import compaction, forward_rollout, score
from gflownet.compaction import compact_map, compact_order
from gflownet.policies import mlp_policy

NUM = 12


@functools.cache
def case(name):
    """A network, trajectories drawn with its parameters and exploration, and plain gradients."""
    environment = SMALL[name]()
    policy = mlp_policy(environment.num_actions, (8,))
    observation = environment.observe(environment.initial(jax.random.key(0)))
    params = policy.init(jax.random.key(0), observation)
    keys = jax.random.split(jax.random.key(1), NUM)
    draw = jax.jit(lambda p: forward_rollout(keys, environment, policy, p, epsilon=0.3))
    trajectories = draw(params)
    weights = jax.random.normal(jax.random.key(2), (2, *trajectories.valid.shape))

    @jax.jit
    def plain(params, trajectories):
        def total(params):
            scores = plain_scores(environment, policy, params, trajectories)
            return weighted(weights, *scores), scores

        return jax.grad(total, has_aux=True)(params)

    return environment, policy, params, trajectories, weights, plain


def weighted(weights, log_pf, log_pb):
    return jnp.sum(weights[0] * log_pf) + jnp.sum(weights[1] * jnp.sin(log_pb))


def scored(name, chunk_size, is_on_policy):
    environment, policy, _, _, weights, _ = case(name)

    def gradient(params, trajectories):
        def total(params):
            scores = score(
                environment,
                policy,
                params,
                trajectories,
                is_on_policy=is_on_policy,
                chunk_size=chunk_size,
            )
            log_probs = (scores.log_pf, scores.log_pb)
            return weighted(weights, *log_probs), log_probs

        return jax.grad(total, has_aux=True)(params)

    return gradient


def assert_close(one, other, atol=2e-5):
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=atol, rtol=1e-4), one, other)


@pytest.mark.parametrize(
    ("name", "chunk_size", "is_on_policy"),
    [
        ("hypergrid_2x5", 1, True),
        ("hypergrid_2x5", 7, False),
        ("hypergrid_2x5", 64, True),
        ("hypergrid_2x5", 1000, False),
        ("sets_5_3", 7, True),
        ("sets_5_3", 1000, False),
        ("diamond", 1000, True),
        ("diamond", 7, False),
    ],
)
def test_values_and_gradients(name, chunk_size, is_on_policy):
    *_, params, trajectories, _, plain = case(name)
    actual = jax.jit(scored(name, chunk_size, is_on_policy))(params, trajectories)
    expected = plain(params, trajectories)
    assert_close(actual, expected)
    # Control: the gradient is not small, and dropping the last step changes it.
    norms = [float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(expected[0])]
    assert min(norms) > 1e-2
    length = trajectories.length
    shorter = trajectories.valid & (jnp.arange(len(trajectories.valid))[:, None] < length - 1)
    with pytest.raises(AssertionError):
        assert_close(actual, plain(params, trajectories._replace(valid=shorter)))


@pytest.mark.parametrize("name", ["hypergrid_2x5", "diamond"])
def test_other_parameters_than_those_that_drew(name):
    # Off policy the recorded values are ignored; on policy they are the values.
    *_, params, trajectories, _, plain = case(name)
    other = jax.tree.map(lambda leaf: 1.3 * leaf + 0.1, params)
    actual = jax.jit(scored(name, 16, False))(other, trajectories)
    assert_close(actual, plain(other, trajectories))
    values = jax.jit(scored(name, 16, True))(other, trajectories)[1]
    assert_close(values, (trajectories.log_pf, trajectories.log_pb))
    with pytest.raises(AssertionError):
        assert_close(values, actual[1])


@pytest.mark.parametrize("is_on_policy", [True, False])
def test_many_parameters_under_vmap(is_on_policy):
    environment, policy, params, _, _, plain = case("sets_5_3")
    seeds = [jax.tree.map(lambda leaf, s=s: (1 + 0.3 * s) * leaf, params) for s in range(3)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *seeds)
    keys = jax.random.split(jax.random.key(1), NUM)
    gradient = scored("sets_5_3", 7, is_on_policy)

    @jax.jit
    @jax.vmap
    def all_seeds(params):
        trajectories = forward_rollout(keys, environment, policy, params, epsilon=0.3)
        return trajectories, gradient(params, trajectories)

    trajectories, actual = all_seeds(stacked)
    for s, seed in enumerate(seeds):
        take = functools.partial(jax.tree.map, lambda leaf, s=s: leaf[s])
        assert_close(take(actual), plain(seed, take(trajectories)))


def test_unequal_counts_under_vmap():
    # Batches that need one chunk or so, several and none at all, side by side.
    *_, params, trajectories, _, plain = case("hypergrid_2x5")
    keep = jnp.array([1, NUM, 0])

    @jax.jit
    @functools.partial(jax.vmap, in_axes=(None, 0))
    def both(params, keep):
        kept = jnp.arange(NUM) < keep
        part = trajectories._replace(
            valid=trajectories.valid & kept,
            is_choice=trajectories.is_choice & kept,
            log_pf=jnp.where(kept, trajectories.log_pf, 0.0),
            log_pb=jnp.where(kept, trajectories.log_pb, 0.0),
        )
        return scored("hypergrid_2x5", 7, False)(params, part), plain(params, part)

    actual, expected = both(params, keep)
    assert_close(actual, expected)
    assert all(not leaf[2].any() for leaf in jax.tree.leaves(actual))


@pytest.mark.parametrize("is_on_policy", [True, False])
def test_nothing_valid_gives_nothing(is_on_policy):
    *_, params, trajectories, _, _ = case("hypergrid_2x5")
    nothing = trajectories._replace(
        valid=jnp.zeros_like(trajectories.valid),
        is_choice=jnp.zeros_like(trajectories.is_choice),
        log_pf=jnp.zeros_like(trajectories.log_pf),
        log_pb=jnp.zeros_like(trajectories.log_pb),
    )
    out = jax.jit(scored("hypergrid_2x5", 7, is_on_policy))(params, nothing)
    assert all(not leaf.any() for leaf in jax.tree.leaves(out))


@pytest.mark.parametrize(("chunk_size", "is_on_policy"), [(1, True), (5, True), (5, False)])
def test_states_without_choice_are_not_evaluated(is_on_policy, chunk_size):
    # Where nothing is to choose, observations are NaN; they must reach neither values nor gradient.
    environment = diamond()
    policy = mlp_policy(environment.num_actions, (8,))
    params = policy.init(jax.random.key(0), jnp.zeros(6))
    keys = jax.random.split(jax.random.key(1), NUM)
    trajectories = jax.jit(lambda p: forward_rollout(keys, environment, policy, p))(params)
    tables = tabulate(environment)
    with_choice = jnp.asarray((tables.forward.sum(1) > 1) | (tables.backward.sum(1) > 1))
    only_one = jnp.asarray(~with_choice)
    assert only_one.any()  # state 2: one parent, one child
    states = jnp.where(trajectories.is_choice, trajectories.states, 2)
    assert not only_one[trajectories.states][trajectories.is_choice].any()
    poisoned = environment._replace(
        observe=lambda s: jnp.where(only_one[s], jnp.nan, environment.observe(s))
    )
    trajectories = trajectories._replace(states=states)

    @functools.partial(jax.jit, static_argnums=0)
    def gradient(environment, params):
        def total(params):
            out = score(
                environment,
                policy,
                params,
                trajectories,
                is_on_policy=is_on_policy,
                chunk_size=chunk_size,
            )
            return out.log_pf.sum() + 2 * out.log_pb.sum()

        return jax.value_and_grad(total)(params)

    out = gradient(poisoned, params)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(out))
    assert_close(out, gradient(environment, params))


# The map itself

SIZE = 13
bits = st.lists(st.booleans(), min_size=SIZE, max_size=SIZE)
chunk_sizes = st.sampled_from([1, 4, 20])


@settings(max_examples=60, deadline=None, derandomize=True)
@given(needed=bits, chunk_size=chunk_sizes)
def test_order(needed, chunk_size):
    order = np.asarray(ordered(jnp.array(needed), chunk_size))
    assert len(order) % chunk_size == 0
    assert SIZE <= len(order) < SIZE + chunk_size
    assert sorted(order[:SIZE]) == list(range(SIZE))
    assert not order[SIZE:].any()
    count = sum(needed)
    assert order[:count].tolist() == np.flatnonzero(needed).tolist()
    assert order[count:SIZE].tolist() == np.flatnonzero(~np.array(needed)).tolist()


ordered = jax.jit(compact_order, static_argnums=1)


def pair(params, item):
    return jnp.sin(params["a"] * item["x"]).sum(), params["b"] * item["y"] ** 2


@functools.partial(jax.jit, static_argnums=(1, 2))
def mapped(needed, chunk_size, is_recorded):
    """The map and the plain masked map, with gradients; items not needed are NaN in the map."""
    key = jax.random.key(0)
    params = {"a": jnp.array([0.5, -1.0, 2.0]), "b": jnp.array(1.5)}
    items = {"x": jax.random.normal(key, (SIZE, 3)), "y": jnp.arange(1.0, SIZE + 1)}
    poison = {
        "x": jnp.where(needed[:, None], items["x"], jnp.nan),
        "y": jnp.where(needed, items["y"], jnp.nan),
    }
    weights = jax.random.normal(jax.random.key(1), (2, SIZE))

    def plain(params):
        out = jax.vmap(pair, (None, 0))(params, items)
        return jax.tree.map(lambda leaf: jnp.where(needed, leaf, 0.0), out)

    def compact(params):
        return compact_map(
            pair,
            params,
            poison,
            needed,
            recorded=plain(params) if is_recorded else None,
            like=(0.0, 0.0),
            chunk_size=chunk_size,
        )

    def total(fn):
        def value(params):
            out = fn(params)
            return sum((w * leaf).sum() for w, leaf in zip(weights, out, strict=True)), out

        return jax.grad(value, has_aux=True)(params)

    return total(compact), total(plain)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(needed=bits, chunk_size=chunk_sizes, is_recorded=st.booleans())
@example(needed=[False] * SIZE, chunk_size=20, is_recorded=True)
def test_map_equals_masked_map(needed, chunk_size, is_recorded):
    actual, expected = mapped(jnp.array(needed), chunk_size, is_recorded)
    assert_close(actual, expected, atol=1e-4)


@pytest.mark.parametrize("device", ["cpu", "accelerator"])
@pytest.mark.parametrize("count", [0, 1, 4, 5, SIZE])
def test_cost_follows_the_count(count, device, monkeypatch):
    monkeypatch.setattr(compaction, "on_accelerator", lambda: device == "accelerator")
    # A callback, which runs once a chunk, counts them: forward and backward.
    calls = []

    def counted(params, item):
        jax.debug.callback(lambda: calls.append(1))
        return params * item

    def total(params):
        return compact_map(
            counted,
            params,
            jnp.arange(float(SIZE)),
            jnp.arange(SIZE) < count,
            like=0.0,
            chunk_size=4,
        ).sum()

    value, gradient = jax.value_and_grad(total)(2.0)
    jax.effects_barrier()
    assert value == 2.0 * gradient == 2.0 * sum(range(count))
    chunks = 1 if device == "accelerator" else -(-count // 4)
    assert len(calls) == 2 * chunks

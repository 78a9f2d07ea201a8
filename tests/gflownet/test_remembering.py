"""Gradients from what a rollout's layers put out, against gradients that evaluate them again."""

from __future__ import annotations

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_environments import SMALL

from ebjax.parallel import is_side_by_side, side_by_side
from gflownet import compaction, forward_rollout, lanes, score, scoring
from gflownet.environments import hypergrid
from gflownet.objectives import detailed_balance, trajectory_balance
from gflownet.policies import mlp_policy, separate_backward, transformer_policy
from gflownet.policies.remembering import recalled, remembered
from gflownet.sampling import forward_sampler, mixed_sampler

KEYS = jax.random.split(jax.random.key(1), 16)

ENVIRONMENTS = {
    **SMALL,
    # Long enough that lanes are sorted and narrowed: rows of the log and of the buffers part.
    "hypergrid_4x12": lambda: hypergrid(dim=4, side=12),
}


def one_network(environment):
    return mlp_policy(environment.num_actions, (8, 8), with_flow=True)


def two_networks(environment):
    return separate_backward(one_network(environment), mlp_policy(environment.num_actions, (8,)))


def start(environment, policy):
    observation = environment.observe(environment.initial(jax.random.key(0)))
    return {"policy": policy.init(jax.random.key(0), observation), "log_z": jnp.zeros(())}


def gradient(objective, params):
    """Of one update's loss, and its metrics."""
    carry = objective.init(jax.random.key(2), params, KEYS)
    loss = functools.partial(objective.loss, carry=carry, keys=KEYS, batch=KEYS)
    return jax.jit(jax.value_and_grad(lambda p: loss(p)[0]))(params)


@pytest.mark.parametrize(
    ("name", "build", "network", "temperature"),
    [
        ("hypergrid_2x5", trajectory_balance, one_network, 1.0),
        ("hypergrid_2x5", detailed_balance, two_networks, 3.0),
        ("hypergrid_4x12", trajectory_balance, two_networks, 1.0),
        ("hypergrid_4x12", detailed_balance, one_network, 3.0),
        ("sets_5_3", trajectory_balance, one_network, 3.0),
        ("sets_5_3", detailed_balance, one_network, 1.0),
    ],
)
def test_same_gradient(name, build, network, temperature):
    with jax.enable_x64(True):
        environment = ENVIRONMENTS[name]()
        policy = network(environment)
        params = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), start(environment, policy))
        kept, anew = (
            gradient(
                build(
                    environment,
                    policy,
                    sampler=forward_sampler(
                        environment, policy, epsilon=0.2, temperature=temperature, remember=remember
                    ),
                    chunk_size=24,
                ),
                params,
            )
            for remember in (True, False)
        )
        kept, anew = jax.device_get((kept, anew))
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-9, atol=1e-11), kept, anew)
    assert min(np.abs(leaf).max() for leaf in jax.tree.leaves(anew[1]["policy"])) > 1e-4


@pytest.mark.parametrize("name", ["hypergrid_2x5", "sets_5_3"])
def test_same_gradient_where_looks_are_few(name, monkeypatch):
    # As on an accelerator: steps that nobody needs write rows too, behind those of the ends.
    monkeypatch.setattr(lanes, "on_accelerator", lambda: True)
    monkeypatch.setattr(lanes, "STEPS_A_LOOK", 4)
    environment = ENVIRONMENTS[name]()
    policy = one_network(environment)
    params = start(environment, policy)
    kept, anew = (
        gradient(
            trajectory_balance(
                environment,
                policy,
                sampler=forward_sampler(environment, policy, epsilon=0.2, remember=remember),
            ),
            params,
        )
        for remember in (True, False)
    )
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4), kept, anew)


def test_rows_of_other_states_are_caught():
    environment = ENVIRONMENTS["hypergrid_4x12"]()
    policy = one_network(environment)
    params = start(environment, policy)["policy"]
    draw = functools.partial(forward_rollout, KEYS, environment, policy, remember=True)
    trajectories = jax.jit(draw)(params)

    @jax.jit
    def slope(trajectories):
        def total(params):
            scores = score(environment, policy, params, trajectories, is_on_policy=True)
            return jnp.sum(scores.log_pf**2)

        return jax.grad(total)(params)["Dense_1"]["kernel"]

    expected = slope(trajectories._replace(memory=None))
    np.testing.assert_allclose(slope(trajectories), expected, rtol=1e-3, atol=1e-4)
    row = jnp.roll(trajectories.memory.row, 1, axis=1)
    wrong = trajectories._replace(memory=trajectories.memory._replace(row=row))
    assert jnp.abs(slope(wrong) - expected).max() > 0.1 * jnp.abs(expected).max()
    # Every state that was left has a row of its own.
    rows = np.asarray(trajectories.memory.row[:-1])[np.asarray(trajectories.valid)]
    assert len(set(rows.tolist())) == len(rows)


def compiled_products(remember):
    environment = ENVIRONMENTS["hypergrid_2x5"]()
    policy = mlp_policy(environment.num_actions, (8, 8))
    sampler = forward_sampler(environment, policy, remember=remember)
    objective = trajectory_balance(environment, policy, sampler=sampler)
    params = start(environment, policy)
    carry = objective.init(jax.random.key(2), params, KEYS)
    slope = jax.jit(jax.grad(lambda p: objective.loss(p, carry, KEYS, KEYS)[0]))
    return slope.lower(params).compile().as_text().count(" dot(")


def test_one_product_a_layer_less():
    assert compiled_products(True) == compiled_products(False) - 3


def test_nothing_is_kept_of(monkeypatch):
    environment = ENVIRONMENTS["hypergrid_2x5"]()
    policy = one_network(environment)
    params = start(environment, policy)

    def memory(policy=policy, params=params, remember=True):
        sampler = forward_sampler(environment, policy, remember=remember)
        carry = sampler.init(jax.random.key(0), params, KEYS)
        return sampler.sample(params, carry, KEYS, KEYS)[0].memory

    assert memory() is not None
    assert memory(remember=False) is None
    # A policy whose layers are not only dense ones, unless it says otherwise.
    assert not transformer_policy(2, environment.num_actions).remembers
    # More than there is room for.
    size = sum(leaf.nbytes for leaf in memory().outputs)
    monkeypatch.setattr(lanes, "MAX_MEMORY_BYTES", size)
    assert memory() is not None
    monkeypatch.setattr(lanes, "MAX_MEMORY_BYTES", size - 1)
    assert memory() is None


def test_nothing_is_kept_of_runs_side_by_side():
    seen = []

    def run(x, y):
        seen.append(is_side_by_side())
        return x + y

    assert side_by_side(run, (0, None))(jnp.arange(3), 1).tolist() == [1, 2, 3]
    assert seen == [True]
    assert not is_side_by_side()
    with pytest.raises(ZeroDivisionError):
        side_by_side(lambda x: 1 // 0)(jnp.arange(3))
    assert not is_side_by_side()


def test_nothing_is_kept_of_a_mixture():
    environment = ENVIRONMENTS["hypergrid_2x5"]()
    policy = one_network(environment)
    params = start(environment, policy)
    sampler = mixed_sampler([(forward_sampler(environment, policy), 1)] * 2)
    carry = sampler.init(jax.random.key(0), params, KEYS)
    assert sampler.sample(params, carry, KEYS, KEYS)[0].memory is None


class Block(nn.Module):
    """Two layers, one without a bias, the second of which sees the input again."""

    @nn.compact
    def __call__(self, x):
        y = jnp.tanh(nn.Dense(4, use_bias=False)(x))
        return nn.Dense(3)(jnp.concatenate([x, y])) * x.sum()


def test_any_function_of_dense_layers():
    block = Block()
    inputs = jax.random.normal(jax.random.key(0), (10, 5))
    params = block.init(jax.random.key(1), inputs[0])

    def total(call, params, inputs):
        return jnp.sum(jnp.sin(jax.vmap(call, (None, 0))(params, inputs)))

    _, outputs = jax.vmap(lambda x: remembered(block.apply, params, x))(inputs)
    slope = jax.grad(functools.partial(total, block.apply), (0, 1))
    expected = slope(params, inputs)

    def known(params, inputs):
        call = jax.vmap(lambda p, x, y: recalled(block.apply, y, p, x), (None, 0, 0))
        return jnp.sum(jnp.sin(call(params, inputs, outputs)))

    actual = jax.grad(known, (0, 1))(params, inputs)
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), actual, expected
    )


@pytest.mark.parametrize(
    ("change", "message"), [(-1, "more than the 1"), (1, "1 fewer than the 3")]
)
def test_other_layers_are_refused(change, message):
    block = Block()
    params = block.init(jax.random.key(1), jnp.ones(5))
    _, outputs = remembered(block.apply, params, jnp.ones(5))
    outputs = outputs[:1] if change < 0 else (*outputs, outputs[-1])
    with pytest.raises(ValueError, match=message):
        recalled(block.apply, outputs, params, jnp.ones(5))


@pytest.mark.parametrize("backward", ["learned", "uniform"])
def test_ends_are_evaluated_only_where_their_backward_law_is_learned(backward, monkeypatch):
    environment = ENVIRONMENTS["sets_5_3"]()
    policy = mlp_policy(environment.num_actions, (8,), backward=backward)
    params = start(environment, policy)["policy"]
    trajectories = jax.jit(lambda p: forward_rollout(KEYS, environment, policy, p))(params)
    evaluated = []

    def compact_map(*args, **options):
        evaluated.append(int(args[3].sum()))
        return compaction.compact_map(*args, **options)

    monkeypatch.setattr(scoring, "compact_map", compact_map)

    def total(params, is_on_policy):
        scores = score(environment, policy, params, trajectories, is_on_policy=is_on_policy)
        return jnp.sum(scores.log_pf**2) + jnp.sum(scores.log_pb**2)

    on_policy, anew = (jax.grad(total)(params, is_on) for is_on in (True, False))
    compare = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5)
    jax.tree.map(compare, on_policy, anew)
    num_ends = len(KEYS)
    left = int(trajectories.valid.sum())
    # Every state that was left has several ways on, and every end several ways back.
    assert evaluated == [left + num_ends * (backward == "learned"), left + num_ends]

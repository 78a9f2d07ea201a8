"""Heads of a policy: who draws, who is trained, what never changes, and the law of all."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gflownet.conditional import ConditionalState, at_condition
from gflownet.environments import hypergrid
from gflownet.exact import (
    enumerate_graph,
    target_distribution,
    terminal_distribution,
    total_variation,
)
from gflownet.objectives import detailed_balance, trajectory_balance
from gflownet.replay import replay_sampler
from gflownet.sampling import forward_sampler
from gflownet.thompson import bootstrapped, thompson_policy, with_heads

NUM_HEADS, NUM_SLOTS = 4, 64
GRID = hypergrid(dim=2, side=4)
HEADED = with_heads(GRID, NUM_HEADS)


def policy_of(**options):
    return thompson_policy(HEADED.num_actions, (32,), num_heads=NUM_HEADS, **options)


def init(policy):
    observation = HEADED.observe(HEADED.initial(jax.random.key(0)))
    return policy.init(jax.random.key(1), observation)


def draw(sampler, params, num=NUM_SLOTS):
    batch = jnp.zeros(num)
    carry = sampler.init(jax.random.key(2), params, batch)
    keys = jax.random.split(jax.random.key(3), num)
    return jax.jit(sampler.sample)(params, carry, keys, batch)


def test_each_trajectory_goes_to_different_heads():
    policy = policy_of()
    params = {"policy": init(policy)}
    own = forward_sampler(HEADED, policy)
    given, _, _ = draw(bootstrapped(own, num_heads=NUM_HEADS, num_trained=3), params)
    heads = np.asarray(given.terminal.condition).reshape(NUM_SLOTS, 3)
    assert all(len(set(row)) == 3 for row in heads)
    counts = np.bincount(heads.ravel(), minlength=NUM_HEADS)
    assert np.abs(counts - 48).max() < 5 * (64 * 0.75 * 0.25) ** 0.5
    assert (np.asarray(given.states.condition) == heads.ravel()).all()
    for array in (given.log_reward, given.terminal.state.position, given.valid.T):
        array = np.asarray(array).reshape(NUM_SLOTS, 3, -1)
        assert (array == array[:, :1]).all()
    assert given.log_flow is None
    drawn, _, _ = draw(own, params)
    assert len(np.unique(drawn.terminal.condition)) == NUM_HEADS


def test_heads_differ_by_what_is_never_trained():
    """All heads at the same trained weights: their difference is the prior's."""
    state = ConditionalState(GRID.initial(jax.random.key(0)), jnp.int32(0))
    laws = {}
    for scale in (0.0, 1.0):
        policy = policy_of(prior_scale=scale)
        params = init(policy)
        params["trained"] = jax.tree.map(jnp.zeros_like, params["trained"])
        laws[scale] = [
            policy.apply(
                params,
                HEADED.observe(state._replace(condition=jnp.int32(head))),
                HEADED.forward_mask(state),
                HEADED.backward_mask(state),
            ).forward.probs()
            for head in range(NUM_HEADS)
        ]
    assert np.ptp(laws[0.0], axis=0).max() == 0.0
    assert np.ptp(laws[1.0], axis=0).max() > 0.01


def train(objective, params, num_updates, num=32):
    optimizer = optax.multi_transform(
        {"policy": optax.adam(3e-3), "log_z": optax.adam(0.1)}, {n: n for n in params}
    )
    batch = jnp.zeros(num)

    @jax.jit
    def run(params):
        carry = objective.init(jax.random.key(4), params, batch)

        def body(loop, t):
            params, carry, state = loop
            keys = jax.random.split(jax.random.fold_in(jax.random.key(5), t), num)
            gradient, (carry, metrics) = jax.grad(objective.loss, has_aux=True)(
                params, carry, keys, batch
            )
            updates, state = optimizer.update(gradient, state, params)
            return (optax.apply_updates(params, updates), carry, state), metrics

        loop = (params, carry, optimizer.init(params))
        (params, *_), metrics = jax.lax.scan(body, loop, jnp.arange(num_updates))
        return params, metrics

    return run(params)


def distances(policy, params):
    """Exact total variation of each head, and of a random one."""
    graph = enumerate_graph(GRID)
    target, _ = target_distribution(GRID, graph)
    laws = []
    for head in range(NUM_HEADS):
        environment = at_condition(GRID, HEADED, jnp.int32(head))
        headed = enumerate_graph(environment)
        laws.append(np.asarray(terminal_distribution(environment, policy, params, headed)))
    return (
        [total_variation(law, target) for law in laws],
        total_variation(np.mean(laws, axis=0), target),
    )


@pytest.mark.parametrize("objective", [trajectory_balance, detailed_balance])
def test_every_head_learns_the_law(objective):
    with_flow = objective is detailed_balance
    policy = policy_of(with_flow=with_flow)
    start = init(policy)
    sampler = bootstrapped(forward_sampler(HEADED, policy), num_heads=NUM_HEADS)
    params = {"policy": start} if with_flow else {"policy": start, "log_z": jnp.zeros(())}
    params, _ = train(objective(HEADED, policy, sampler=sampler), params, 600)
    before, _ = distances(policy, start)
    heads, mixture = distances(policy, params["policy"])
    assert min(before) > 0.2
    assert max(heads) < 0.06
    assert mixture <= max(heads)
    jax.tree.map(np.testing.assert_array_equal, params["policy"]["prior"], start["prior"])


def test_replay_learns_from_the_losses_of_all_its_heads():
    policy = policy_of()
    inner = replay_sampler(
        HEADED,
        policy,
        forward_sampler(HEADED, policy),
        num_new=1,
        num_replayed=1,
        capacity=4,
        rule="prioritized",
    )
    sampler = bootstrapped(inner, num_heads=NUM_HEADS)
    params = {"policy": init(policy), "log_z": jnp.zeros(())}
    _, metrics = train(trajectory_balance(HEADED, policy, sampler=sampler), params, 5)
    assert np.isfinite(metrics["log_z"]).all()


def test_wrong_options_are_named():
    policy = policy_of()
    with pytest.raises(ValueError, match="num_heads is 1"):
        with_heads(GRID, 1)
    with pytest.raises(ValueError, match="prior_scale is -1"):
        policy_of(prior_scale=-1.0)
    with pytest.raises(ValueError, match="num_trained is 9"):
        bootstrapped(forward_sampler(HEADED, policy), num_heads=NUM_HEADS, num_trained=9)

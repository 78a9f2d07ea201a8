"""Behaviour policies: what is drawn, what is recorded; backward policies of maximum entropy."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from all_paths import paths, terminal_law
from scipy import stats
from small_environments import (
    SMALL,
    diamond,
    masked_log_softmax,
    plain_scores,
    random_tables,
    sets,
    tabular,
    tabulate,
)

from gflownet import MaskedCategorical, exact
from gflownet.environments import hypergrid
from gflownet.exploration import exploring_policy
from gflownet.policies import mlp_policy, tabular_policy
from gflownet.policies.max_entropy import fixed_backward, log_path_counts, max_entropy_backward
from gflownet.sampling import forward_sampler

FIVE_SIGMA = 2 * stats.norm.sf(5)
NUM = 8000


# Behaviour policies


def behaviour_table(environment, tables, *, epsilon, temperature, stop_bias):
    """[S, A] log-probabilities by which actions are drawn, in numpy."""
    mask = tabulate(environment).forward
    logits = np.asarray(tables["forward"], np.float64) / temperature
    logits[:, environment.stop_action] -= stop_bias
    probs = np.exp(masked_log_softmax(logits, mask))
    uniform = mask / np.maximum(mask.sum(axis=1, keepdims=True), 1)
    with np.errstate(divide="ignore"):
        return np.log((1 - epsilon) * probs + epsilon * uniform)


@functools.cache
def grid_and_draw():
    """A grid, its policy's tables, and trajectories by a behaviour, with their plain scores."""
    plain = hypergrid(dim=2, side=3, reward_floor=0.1)
    environment, policy = tabular(plain)
    tables = random_tables(plain, 0)
    keys = jax.random.split(jax.random.key(0), NUM)

    @jax.jit
    def draw(count, epsilon, temperature, stop_bias):
        sampler = forward_sampler(
            environment,
            policy,
            epsilon=epsilon,
            temperature=lambda count: temperature + 2 * count,
            stop_bias=lambda count: stop_bias * (1.0 - count),
        )
        assert sampler.is_on_policy
        carry = jnp.full(NUM, count, jnp.int32)
        t = sampler.sample({"policy": tables}, carry, keys, ())[0]
        index = jax.vmap(environment.state_index)(t.terminal)
        return index, (t.log_pf, t.log_pb), plain_scores(environment, policy, tables, t)

    return plain, tables, draw


@pytest.mark.parametrize(
    ("epsilon", "temperature", "stop_bias"),
    [(0.0, 2.0, 0.0), (0.2, 3.0, 1.5), (0.0, 0.5, -1.0), (1.0, 0.1, 9.0)],
)
def test_trajectories_follow_the_behaviour_and_record_the_policy(epsilon, temperature, stop_bias):
    plain, tables, draw = grid_and_draw()
    options = {"epsilon": epsilon, "temperature": temperature, "stop_bias": stop_bias}

    def fit(ends, **options):
        law = terminal_law(plain, behaviour_table(plain, tables, **options))
        expected = np.array([NUM * law[state] for state in law])
        return stats.chisquare(np.bincount(ends, minlength=30)[list(law)], expected).pvalue

    ends, recorded, scores = draw(0, **options)
    for name, expected in zip(recorded, scores, strict=True):
        np.testing.assert_allclose(name, expected, atol=1e-5)
    assert fit(ends, **options) > FIVE_SIGMA
    later, _, _ = draw(1, **options)
    assert fit(later, epsilon=epsilon, temperature=temperature + 2, stop_bias=0.0) > FIVE_SIGMA
    if epsilon < 1:
        # The planted bugs: the policy itself, the temperature upside down, no schedule.
        assert fit(ends, epsilon=epsilon, temperature=1.0, stop_bias=0.0) < FIVE_SIGMA
        assert fit(ends, **{**options, "temperature": 1 / temperature}) < FIVE_SIGMA
        assert fit(later, **options) < FIVE_SIGMA


def test_log_flow_and_backward_policy_stay():
    policy = tabular_policy(4, 3)
    other = exploring_policy(policy, temperature=3.0, stop_bias=2.0, stop_action=2)
    rng = np.random.default_rng(0)
    params = {
        "forward": jnp.asarray(rng.standard_normal((4, 3)), jnp.float32),
        "backward": jnp.asarray(rng.standard_normal((4, 3)), jnp.float32),
        "log_flow": jnp.arange(4.0),
    }
    mask = jnp.ones(3, bool)
    one, two = (p.apply(params, 1, mask, mask) for p in (policy, other))
    np.testing.assert_array_equal(one.backward.probs(), two.backward.probs())
    np.testing.assert_array_equal(one.forward.log_probs(), two.forward.log_probs())
    assert one.log_flow == two.log_flow
    assert not np.allclose(one.forward.probs(), two.forward.probs(), atol=0.05)
    # Both kinds of exploration, in either order; a uniform share of 1 leaves nothing of the other.
    np.testing.assert_allclose(two.forward.explore(1.0).probs(), 1 / 3, atol=1e-6)
    law = MaskedCategorical(params["forward"][1], mask)
    np.testing.assert_array_equal(
        law.explore(0.3).behave(params["forward"][0]).probs(),
        law.behave(params["forward"][0]).explore(0.3).probs(),
    )


def test_a_uniform_policy_is_the_same_at_any_temperature_and_may_put_off_the_stop():
    policy = tabular_policy(1, 3)

    def without_logits(params, observation, *masks):
        output = policy.apply(params, observation, *masks)
        return output._replace(forward=MaskedCategorical(None, masks[0]))

    tables = {"forward": jnp.zeros((1, 3)), "backward": jnp.zeros((1, 3)), "log_flow": jnp.zeros(1)}
    masks = jnp.array([True, False, True]), jnp.zeros(3, bool)
    options = {"temperature": 3.0, "stop_bias": 1.0, "stop_action": 2}
    expected, law = (
        exploring_policy(one, **options).apply(tables, 0, *masks).forward
        for one in (policy, policy._replace(apply=without_logits))
    )
    np.testing.assert_array_equal(law.probs(), expected.probs())
    assert law.probs()[2] < 0.3


def test_exploration_that_is_refused():
    environment, policy = tabular(sets())
    with pytest.raises(ValueError, match=r"temperature is 0\.0"):
        forward_sampler(environment, policy, temperature=0.0)
    with pytest.raises(ValueError, match=r"stop_bias is 1\.0"):
        forward_sampler(environment, policy, stop_bias=1.0)
    with pytest.raises(ValueError, match="stop_bias is"):
        forward_sampler(environment, policy, stop_bias=lambda count: 1.0 * count)


# Backward policies of maximum entropy


def path_sums(environment, table, *, at_child):
    """[paths] sums of a table's entries along every trajectory."""
    sums = []
    for path in paths(environment):
        states = [state for state, _ in path]
        actions = [action for _, action in path[:-1]]
        rows = states[1:] if at_child else states[:-1]
        sums.append(table[rows, actions].sum())
    return np.array(sums)


@pytest.mark.parametrize("name", SMALL)
def test_all_paths_to_an_object_are_equally_likely(name, x64):
    environment = SMALL[name]()
    graph = exact.enumerate_graph(environment)
    counts: dict = {}
    for path in paths(environment):
        counts[path[-1][0]] = counts.get(path[-1][0], 0) + 1
    index = np.asarray(jax.vmap(environment.state_index)(graph.states))
    log_counts = dict(zip(index.tolist(), log_path_counts(graph).tolist(), strict=True))
    for state, count in counts.items():
        assert log_counts[state] == pytest.approx(np.log(count), abs=1e-12)
    tables, _ = exact.exact_flow(environment, graph, backward_logits=max_entropy_backward(graph))
    ends = np.array([path[-1][0] for path in paths(environment)])
    log_pb = path_sums(environment, tables["backward"], at_child=True)
    np.testing.assert_allclose(log_pb, -np.log([counts[end] for end in ends]), atol=1e-12)
    # Of the flows to one R / Z, trajectories have the most entropy.
    uniform, _ = exact.exact_flow(environment, graph)
    sums = [path_sums(environment, flow["forward"], at_child=False) for flow in (tables, uniform)]
    entropy, less = (-float(np.sum(np.exp(log_pf) * log_pf)) for log_pf in sums)
    if name == "sets_5_3":  # n(s) = |s|!, for which it is the uniform policy
        assert entropy == pytest.approx(less, abs=1e-10)
    else:
        assert entropy > less + 1e-3


def test_hypergrid_in_closed_form(x64):
    environment = hypergrid(dim=3, side=5)
    graph = exact.enumerate_graph(environment)
    log_pb = masked_log_softmax(max_entropy_backward(graph), graph.backward_mask)
    position = np.asarray(graph.states.position)
    moving = ~np.asarray(graph.states.stopped) & (position.sum(axis=1) > 0)
    expected = position[moving] / position[moving].sum(axis=1, keepdims=True)
    np.testing.assert_allclose(np.exp(log_pb[moving][:, :3]), expected, atol=1e-12)
    assert (log_pb[np.asarray(graph.states.stopped), 3] == 0.0).all()


def test_a_network_with_a_given_backward_policy():
    environment = diamond()
    graph = exact.enumerate_graph(environment)
    index = np.asarray(jax.vmap(environment.state_index)(graph.states))
    logits = np.empty_like(max_entropy_backward(graph))
    logits[index] = max_entropy_backward(graph)
    policy = fixed_backward(
        mlp_policy(3, (4,), backward="uniform", with_flow=True), lambda o: o @ jnp.asarray(logits)
    )
    params = policy.init(jax.random.key(0), jnp.zeros(6))
    masks = jnp.array([True, False, True]), jnp.array([True, True, False])
    output = policy.apply(params, jnp.eye(6)[1], *masks)
    np.testing.assert_allclose(
        output.backward.probs(),
        np.exp(masked_log_softmax(logits[1], np.asarray(masks[1]))),
        atol=1e-6,
    )
    assert output.log_flow.shape == ()

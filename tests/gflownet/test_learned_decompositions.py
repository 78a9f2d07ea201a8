"""Forward-looking flows, learned energy decomposition, modified detailed balance, flow matching."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from all_paths import all_trajectories, terminal_law
from small_environments import (
    SMALL,
    diamond,
    exact_tables,
    masked_log_softmax,
    sets,
    state_energies,
    tabular,
    tabulate,
)

from gflownet import forward_rollout
from gflownet.objectives import (
    corrected_potential,
    decomposed_residuals,
    detailed_balance,
    detailed_balance_residuals,
    flow_matching,
    flow_matching_residuals,
    forward_looking,
    forward_looking_detailed_balance,
    forward_looking_flow,
    learned_energy_decomposition,
    modified_detailed_balance,
    modified_detailed_balance_residuals,
    potential_loss,
)
from gflownet.sampling import given_trajectories

NUM = 64


@functools.cache
def exact_rollouts(name):
    """An environment, its exact tables and trajectories of a uniform policy that record them."""
    environment, policy = tabular(SMALL[name]())
    tables, log_z = exact_tables(environment, "random")
    keys = jax.random.split(jax.random.key(0), NUM)
    draw = jax.jit(lambda tables: forward_rollout(keys, environment, policy, tables, epsilon=1.0))
    return environment, policy, tables, log_z, draw(tables)


def at_visited(environment, t, table):
    index = jax.vmap(jax.vmap(environment.state_index))(t.states)
    return jnp.asarray(table, jnp.float32)[index]


# Forward-looking


@pytest.mark.parametrize("name", ["diamond", "hypergrid_2x5"])
def test_forward_looking_flow(name):
    environment, _, tables, _, t = exact_rollouts(name)
    energies = state_energies(environment)
    energy = at_visited(environment, t, energies)
    log_flow = at_visited(environment, t, tables["log_flow"] + energies)
    flow = jax.vmap(forward_looking_flow, (1, 1, 0, 1), out_axes=1)(
        log_flow, energy, t.log_reward, t.valid
    )
    deltas = jax.vmap(detailed_balance_residuals, 1)(flow, t.log_pf, t.log_pb, t.valid)
    np.testing.assert_allclose(deltas, 0.0, atol=1e-5)
    # As the equation of the file has it.
    shifted = jnp.where(t.valid, log_flow[:-1], 0.0), jnp.where(t.valid[1:], log_flow[1:-1], 0.0)
    ahead = jnp.concatenate([shifted[1], jnp.zeros_like(shifted[1][:1])])
    delta = shifted[0] + t.log_pf - ahead - t.log_pb + energy[1:] - energy[:-1]
    np.testing.assert_allclose(jnp.where(t.valid, delta, 0.0).T, deltas, atol=1e-5)
    # The planted bug: energies left out.
    plain = jax.vmap(forward_looking_flow, (1, 1, 0, 1), out_axes=1)(
        log_flow, 0 * energy, t.log_reward, t.valid
    )
    wrong = jax.vmap(detailed_balance_residuals, 1)(plain, t.log_pf, t.log_pb, t.valid)
    assert np.abs(wrong).max() > 0.05


def test_free_terminal_flow_learns_another_law():
    # The planted bug of published scripts: with F~(x) free, R(x) g(x) has zero loss for any g.
    environment = diamond()
    energies = state_energies(environment)
    tables = tabulate(environment)
    g = np.where(np.arange(6) == 1, 2.0, 0.0)  # log g
    other = environment._replace(log_reward=lambda params, s: jnp.asarray(tables.log_reward + g)[s])
    wrong, _ = exact_tables(other, "random")
    t = all_trajectories(environment)
    log_flow = jnp.asarray(wrong["log_flow"] + energies, jnp.float32)[t.states]
    energy = jnp.asarray(energies, jnp.float32)[t.states]
    at = lambda table, states: jnp.asarray(table, jnp.float32)[states, t.actions]  # noqa: E731
    log_pf, log_pb = at(wrong["forward"], t.states[:-1]), at(wrong["backward"], t.states[1:])
    free = log_flow - energy  # log g at terminal states, and not 0
    balanced = jax.vmap(detailed_balance_residuals, 1)(free, log_pf, log_pb, t.valid)
    np.testing.assert_allclose(balanced, 0.0, atol=1e-5)
    law = terminal_law(environment, wrong["forward"])
    rewards = np.exp(tables.log_reward[[1, 3]])
    assert law[1] - rewards[0] / rewards.sum() > 0.1
    # With F~(x) = 1 the same policy is found out.
    held = jax.vmap(forward_looking_flow, (1, 1, 0, 1), out_axes=1)(
        log_flow, energy, t.log_reward, t.valid
    )
    deltas = jax.vmap(detailed_balance_residuals, 1)(held, log_pf, log_pb, t.valid)
    assert np.abs(deltas).max() > 1.0


def test_energies_are_asked_for_and_get_no_gradient():
    environment, policy = tabular(diamond())
    with pytest.raises(ValueError, match="intermediate_energy"):
        forward_looking(environment)
    with pytest.raises(ValueError, match="intermediate_energy"):
        forward_looking_detailed_balance(environment, policy)
    environment, policy = tabular(sets())
    params = {"policy": policy.init(jax.random.key(0), 0)}
    keys = jax.random.split(jax.random.key(0), 8)

    def loss(energies):
        objective = forward_looking_detailed_balance(environment, policy, reward_params=energies)
        return objective.loss(params, jnp.zeros(8, jnp.int32), keys, ())[0]

    value, gradient = jax.jit(jax.value_and_grad(loss))(jnp.arange(5.0))
    assert not gradient.any()
    assert value != jax.jit(loss)(jnp.ones(5))


# Learned energy decomposition


def test_corrected_potential_sums_to_the_reward():
    potential = jax.random.normal(jax.random.key(0), (5, 7))
    valid = jnp.arange(5)[:, None] < jnp.array([1, 2, 3, 4, 5, 5, 1])
    log_reward = jnp.arange(7.0)
    corrected = jax.vmap(corrected_potential, (1, 0, 1), out_axes=1)(potential, log_reward, valid)
    np.testing.assert_allclose(corrected.sum(axis=0), log_reward, atol=1e-5)
    assert not corrected[~valid].any()
    gradient = jax.grad(lambda p: corrected_potential(p[:, 3], log_reward[3], valid[:, 3]).sum())
    assert not gradient(potential).any()


def test_dropout_fits_every_subset():
    # With a potential that is the same at each step, any subset predicts the whole.
    valid = jnp.arange(6) < 4
    kept = jnp.array([[1, 0, 0, 1, 0, 0], [0, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1]], bool)
    even = jnp.where(valid, 0.5, 9.0)
    losses = jax.vmap(potential_loss, (None, None, 0, None))(even, jnp.array(2.0), kept, valid)
    np.testing.assert_allclose(losses, 0.0, atol=1e-6)
    uneven = jnp.array([2.0, 0.0, 0.0, 0.0, 9.0, 9.0])
    losses = jax.vmap(potential_loss, (None, None, 0, None))(uneven, jnp.array(2.0), kept, valid)
    np.testing.assert_allclose(losses, [4.0, 4.0, 0.0], atol=1e-6)
    nothing = jnp.zeros(6, bool)
    assert potential_loss(even, jnp.array(2.0), nothing, nothing) == 0.0


@pytest.mark.parametrize("name", ["diamond", "hypergrid_2x5"])
def test_decomposed_residuals(name):
    environment, _, tables, _, t = exact_rollouts(name)
    energies = state_energies(environment)
    energy = at_visited(environment, t, energies)
    log_flow = at_visited(environment, t, tables["log_flow"] + energies)
    potential = jnp.where(t.valid, energy[:-1] - energy[1:], 0.0)

    def residuals(potential):
        corrected = jax.vmap(corrected_potential, (1, 0, 1), out_axes=1)(
            potential, t.log_reward, t.valid
        )
        return jax.vmap(decomposed_residuals, (1, 1, 1, 1, 0, 1))(
            log_flow, t.log_pf, t.log_pb, corrected, t.log_reward, t.valid
        )

    np.testing.assert_allclose(residuals(potential), 0.0, atol=1e-5)
    # A potential that does not sum to log R moves the zero, whatever the correction.
    assert np.abs(residuals(potential + t.valid * energy[1:])).max() > 0.05


def test_decomposition_is_learned_beside_the_flow():
    # Tables for both: the law is right when the potential is.
    environment, policy = tabular(diamond())
    objective = learned_energy_decomposition(
        environment, policy, lambda table, pair: table[pair[0], pair[1]], dropout=0.0
    )
    params = {"policy": policy.init(jax.random.key(0), 0), "potential": jnp.zeros((6, 6))}
    rule = optax.adam(optax.cosine_decay_schedule(0.05, 1000))

    @jax.jit
    def train(params):
        def step(loop, key):
            params, state, carry = loop
            keys = jax.random.split(key, 16)
            gradient, (carry, metrics) = jax.grad(objective.loss, has_aux=True)(
                params, carry, keys, ()
            )
            updates, state = rule.update(gradient, state)
            return (optax.apply_updates(params, updates), state, carry), metrics

        start = (params, rule.init(params), jnp.zeros(16, jnp.int32))
        (params, _, _), metrics = jax.lax.scan(
            step, start, jax.random.split(jax.random.key(0), 1000)
        )
        return params, metrics

    params, metrics = train(params)
    target = np.exp([0.3, -0.9]) / np.exp([0.3, -0.9]).sum()
    law = terminal_law(environment, params["policy"]["forward"])
    assert abs(law[1] - target[0]) < 0.02
    assert abs(metrics["log_z"][-1] - np.logaddexp(0.3, -0.9)) < 0.05
    assert metrics["potential_error"][-50:].mean() < 0.2 * metrics["potential_error"][:50].mean()
    with pytest.raises(ValueError, match="dropout is 1"):
        learned_energy_decomposition(environment, policy, lambda p, x: p, dropout=1.0)


# Modified detailed balance


def test_modified_detailed_balance_is_detailed_balance_without_flow():
    # With F(s) = R(s) / P_F(stop | s), and only so, both have the same residual.
    rng = np.random.default_rng(0)
    log_stop, log_reward = rng.standard_normal((2, 5))
    log_pf, log_pb = rng.standard_normal((2, 4))
    inner = np.array([True, True, True, False])
    modified = modified_detailed_balance_residuals(
        *map(jnp.asarray, (log_stop, log_stop, log_pf, log_pb, log_reward, inner))
    )
    plain = detailed_balance_residuals(
        *map(jnp.asarray, (log_reward - log_stop, log_pf, log_pb, inner))
    )
    np.testing.assert_allclose(modified, plain, atol=1e-6)


def test_modified_detailed_balance_counts_no_stops():
    environment, policy, tables, _, t = exact_rollouts("hypergrid_2x5")
    objective = modified_detailed_balance(
        environment, policy, sampler=given_trajectories(), residual_loss=jnp.square
    )
    wrong = {**tables, "forward": tables["forward"] + 0.3 * jnp.sin(jnp.arange(3.0))}
    loss, (_, metrics) = jax.jit(
        lambda p: objective.loss(p, (), jax.random.split(jax.random.key(0), NUM), t)
    )({"policy": wrong})
    log_pf = masked_log_softmax(np.asarray(wrong["forward"]), tabulate(environment).forward)
    index = np.asarray(jax.vmap(jax.vmap(environment.state_index))(t.states))
    log_reward, total, count = tabulate(environment).log_reward, 0.0, 0
    backward = np.asarray(tables["backward"])
    for b in range(NUM):
        for step in range(int(t.length[b]) - 1):
            s, child, a = index[step, b], index[step + 1, b], int(t.actions[step, b])
            delta = log_reward[s] - log_pf[s, 2] + log_pf[s, a]
            delta -= log_reward[child] - log_pf[child, 2] + backward[child, a]
            total, count = total + delta**2, count + 1
    assert loss == pytest.approx(total / count, rel=1e-3)
    source = tabulate(environment).source
    assert metrics["log_z"] == pytest.approx(log_reward[source] - log_pf[source, 2], rel=1e-4)
    with pytest.raises(ValueError, match="stop"):
        modified_detailed_balance(*tabular(sets()))


# Flow matching


def test_a_missing_parent_breaks_the_flow():
    environment, _, tables, _, t = exact_rollouts("hypergrid_2x5")
    tabled = tabulate(environment)
    index = np.asarray(jax.vmap(jax.vmap(environment.state_index))(t.states))
    edge = np.asarray(tables["log_flow"])[:, None] + np.asarray(tables["forward"])
    entered = index[1:]
    parents = tabled.parents[entered]
    edges = edge[np.maximum(parents, 0), np.arange(3)]
    is_parent = parents >= 0
    flow = np.asarray(tables["log_flow"])[index]

    def residuals(is_parent, floor=0.0):
        fn = functools.partial(flow_matching_residuals, floor=floor)
        arrays = map(jnp.asarray, (edges, is_parent, flow, t.valid))
        return jax.vmap(fn, 1)(*arrays)

    np.testing.assert_allclose(residuals(is_parent), 0.0, atol=1e-5)
    np.testing.assert_allclose(residuals(is_parent, 0.3), 0.0, atol=1e-5)
    # The planted bug: only the parent that the trajectory came from.
    taken = np.arange(3) == np.asarray(t.actions)[..., None]
    assert np.abs(residuals(is_parent & taken)).max() > 0.1


def test_flow_matching_evaluates_all_parents():
    environment, policy, tables, _, t = exact_rollouts("diamond")
    objective = flow_matching(
        environment, policy, sampler=given_trajectories(), terminal_weight=3.0
    )
    # State 5 is made wrong: it is a parent of 0 and of 3, and of no one else.
    wrong = {**tables, "log_flow": tables["log_flow"].at[5].add(0.5)}
    edge = np.asarray(wrong["log_flow"])[:, None] + np.asarray(tables["forward"])
    tabled, total, count = tabulate(environment), 0.0, 0
    for b in range(NUM):
        for step in range(int(t.length[b])):
            s = int(t.states[step + 1, b])
            inflow = [edge[p, a] for a, p in enumerate(tabled.parents[s]) if p >= 0]
            end = tabled.is_terminal[s]
            outflow = tabled.log_reward[s] if end else wrong["log_flow"][s]
            delta = np.logaddexp.reduce(inflow) - outflow
            total, count = total + (3.0 if end else 1.0) * float(delta) ** 2, count + 1
    loss, _ = jax.jit(lambda p: objective.loss(p, (), jax.random.split(jax.random.key(0), NUM), t))(
        {"policy": wrong}
    )
    assert loss == pytest.approx(total / count, rel=1e-4)
    assert loss > 1e-3
    for options in ({"floor": -1.0}, {"terminal_weight": 0.0}):
        with pytest.raises(ValueError, match=next(iter(options))):
            flow_matching(environment, policy, **options)


def test_a_policy_without_flow_is_refused():
    environment, policy = tabular(diamond())
    bare = policy._replace(apply=lambda *args: policy.apply(*args)._replace(log_flow=None))
    objective = detailed_balance(environment, bare)
    params = {"policy": policy.init(jax.random.key(0), 0)}
    keys = jax.random.split(jax.random.key(0), 4)
    with pytest.raises(ValueError, match="log flow"):
        jax.eval_shape(objective.loss, params, jnp.zeros(4, jnp.int32), keys, ())

"""Stacks and choices: exact laws against loops in Python, constraints both ways, mixed kinds."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from bridges import check_walks, constant_target, draws_of, walk

from gflownet import exact
from gflownet.environments import (
    CubeState,
    box,
    choice,
    cube,
    enumerated,
    hypergrid,
    restricted,
    stack,
    steps_target,
    torus,
)
from gflownet.policies import tabular_policy
from gflownet.testing import EnvironmentCheckError, check_environment

GRID = hypergrid(dim=2, side=3, reward_floor=0.1)
LINE = hypergrid(dim=1, side=4, reward_floor=0.2)
CELLS = list(itertools.product(range(3), repeat=2))


def log_reward_of(environment, position):
    state = environment.initial(jax.random.key(0))
    state = state._replace(position=jnp.asarray(position, jnp.int32))
    return float(environment.log_reward((), state))


def axis_open_at(position):
    """Which actions of the second grid are allowed once the first has ended: a line, or all."""
    return [position[0] < 2, position[1] < 2, True]


def constrain(ended, source):
    x = ended[0].position
    return source._replace(allowed=jnp.stack([x[0] < 2, x[1] < 2, jnp.array(True)]))


def exact_law(environment):
    """The states, the law that the exact flow draws from, the target and log Z."""
    graph = exact.enumerate_graph(environment)
    tables, log_z = exact.exact_flow(environment, graph)
    indexed = environment._replace(observe=environment.state_index)
    policy = tabular_policy(len(graph.parents), environment.num_actions)
    law = exact.terminal_distribution(indexed, policy, tables, graph)
    target, target_log_z = exact.target_distribution(environment, graph)
    assert log_z == pytest.approx(target_log_z, abs=1e-5)
    states = jax.tree.map(lambda leaf: np.asarray(leaf)[graph.terminal], graph.states)
    assert exact.total_variation(law, target) < 1e-5
    return states, np.asarray(law), log_z


@pytest.fixture(scope="module")
def constrained():
    return enumerated(stack([GRID, restricted(GRID)], constraints={1: constrain}))


def test_constrained_stack_has_the_law_of_a_loop(constrained):
    check_environment(constrained)
    states, law, log_z = exact_law(constrained)
    expected = {}
    for one, two in itertools.product(CELLS, repeat=2):
        is_open = axis_open_at(one)
        if all(is_open[k] or two[k] == 0 for k in range(2)):
            expected[one, two] = log_reward_of(GRID, one) + log_reward_of(GRID, two)
    assert log_z == pytest.approx(np.logaddexp.reduce(list(expected.values())), abs=1e-5)
    first, second = states[0].position, states[1].state.position
    found = {
        (tuple(map(int, a)), tuple(map(int, b))): p
        for a, b, p in zip(first, second, law, strict=True)
    }
    assert found.keys() == expected.keys()
    for place, p in found.items():
        assert p == pytest.approx(np.exp(expected[place] - log_z), rel=1e-3)


def test_reward_of_all_parts():
    reward = lambda params, s: -0.5 * jnp.abs(s[0].position[0] - s[1].position[0])  # noqa: E731
    environment = enumerated(stack([LINE, LINE], log_reward=reward))
    _, log_z = exact.target_distribution(environment, exact.enumerate_graph(environment))
    pairs = itertools.product(range(4), repeat=2)
    assert log_z == pytest.approx(np.log(sum(np.exp(-0.5 * abs(a - b)) for a, b in pairs)))


def test_part_without_actions_is_passed_over():
    # The line is walked only if the first ended at an even place.
    def even(ended, source):
        return source._replace(allowed=jnp.broadcast_to(ended[0].position[0] % 2 == 0, (2,)))

    environment = enumerated(stack([LINE, restricted(LINE), LINE], constraints={1: even}))
    rewards = np.exp([log_reward_of(LINE, [x]) for x in range(4)])
    ways = [rewards.sum() if x % 2 == 0 else rewards[0] for x in range(4)]
    _, log_z = exact.target_distribution(environment, exact.enumerate_graph(environment))
    assert log_z == pytest.approx(np.log((rewards * ways).sum() * rewards.sum()), abs=1e-5)


def test_choice_adds_its_parts():
    environment = enumerated(choice([GRID, LINE]))
    check_environment(environment)
    states, law, log_z = exact_law(environment)
    logs = [GRID.log_z, LINE.log_z]
    assert log_z == pytest.approx(np.logaddexp.reduce(logs), abs=1e-5)
    for part, part_log_z in enumerate(logs):
        share = law[states.chosen == part + 1].sum()
        assert share == pytest.approx(np.exp(part_log_z - log_z), abs=1e-5)


def forgetful(environment):
    """The planted bug: the second part keeps its constraint when the first is opened again."""

    def undo(states, action):
        first, second = environment.undo(states, action)
        return first, second._replace(allowed=states[1].allowed)

    return environment._replace(undo=undo)


def unconstrained(environment):
    """The planted bug: the constraint holds on the way back only."""

    def step(states, action):
        first, second = environment.step(states, action)
        return first, second._replace(allowed=jnp.ones(3, bool))

    return environment._replace(step=step)


@pytest.mark.parametrize("bug", [forgetful, unconstrained])
def test_constraint_in_one_direction_is_caught(constrained, bug):
    with pytest.raises(EnvironmentCheckError, match="way back"):
        check_environment(bug(constrained))


SIDE, DIM = 3, 2
KINDS = hypergrid(dim=1, side=SIDE, reward_floor=0.5)


def switch(ended, source):
    """The first coordinate always, the second from kind 1 on."""
    return source._replace(active=jnp.arange(DIM) <= ended[0].position[0])


def mixed_stack():
    return stack([KINDS, cube(constant_target(DIM))], constraints={1: switch})


def mixed_ends(count=4096):
    """Draws of R / Z: kinds by their reward, then the cube of that kind, uniform."""
    rewards = np.exp([log_reward_of(KINDS, [x]) for x in range(SIDE)])
    kinds = np.random.default_rng(0).choice(SIDE, count, p=rewards / rewards.sum())
    active = np.arange(DIM) <= kinds[:, None]
    x = jnp.where(active, draws_of(constant_target(DIM), count), 0.0)
    yes = jnp.ones(count, bool)
    kind = type(KINDS.initial(None))(jnp.asarray(kinds[:, None], jnp.int32), yes)
    return (kind, CubeState(x, jnp.asarray(active), yes, yes)), float(np.log(rewards.sum()))


@pytest.fixture(scope="module")
def mixed_walks():
    ends, log_z = mixed_ends()
    return walk(mixed_stack(), ends), log_z


def test_discrete_part_and_cube(mixed_walks):
    # Z is the sum of the kinds' rewards, for the cube of each has volume 1.
    walks, log_z = mixed_walks
    check_walks(walks, log_z)
    kind, lattice = walks.ahead.terminal
    np.testing.assert_array_equal(lattice.active, np.arange(DIM) <= kind.position)
    assert not lattice.position[~lattice.active].any()


def test_walks_back_from_given_states_reach_the_source(mixed_walks):
    walks, _ = mixed_walks
    first = jax.tree.map(lambda leaf: leaf[0], walks.back.states)
    assert not first[0].position.any()
    assert not first[0].stopped.any()
    assert first[1].active.all()
    assert not first[1].left.any()
    # A discrete action has no value.
    is_kind = walks.back.valid & (walks.back.actions.which < KINDS.num_actions)
    assert is_kind.any()
    assert not walks.back.actions.value[is_kind].any()


def test_contract_of_mixed_kinds():
    inner = stack([cube(steps_target(3)), LINE, torus(num_steps=2)])
    check_environment(choice([GRID, box(), inner]), num_walks=32)


def test_constraint_of_values_in_one_direction_is_caught():
    environment = mixed_stack()

    def undo(states, action):
        kind, lattice = environment.undo(states, action)
        return kind, lattice._replace(active=states[1].active)

    with pytest.raises(EnvironmentCheckError, match="way back does not lead here"):
        check_environment(environment._replace(undo=undo))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: stack([]), "parts is empty"),
        (lambda: choice([]), "parts is empty"),
        (lambda: stack([LINE], constraints={0: switch}), "constraints has part 0"),
        (lambda: enumerated(cube()), "values of 2 coordinates"),
        (lambda: enumerated(GRID, max_states=5), "more than max_states = 5"),
    ],
)
def test_impossible_arguments_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()

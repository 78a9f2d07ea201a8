"""The cube: increments, their Jacobians, coordinates that are switched off."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from bridges import (
    check_that_a_missing_factor_shows,
    check_walks,
    constant_target,
    draws_of,
    small_policy,
    walk,
)

from gflownet.environments import CubeState, cube, steps_target
from gflownet.testing import EnvironmentCheckError, check_environment
from gflownet.types import Action

LEAVE, GROW, STOP = range(3)
M = 0.1
YES, NO = jnp.array(True), jnp.array(False)


def with_active(environment, active):
    """The cube with these coordinates from its source on."""
    active = jnp.array(active)
    return environment._replace(initial=lambda key: cube_source(environment, key, active))


def cube_source(environment, key, active):
    return environment.initial(key)._replace(active=active)


ACTIVE = np.array([True, False, True])


@pytest.fixture(scope="module")
def walks():
    environment = with_active(cube(constant_target(3), min_increment=M), ACTIVE)
    x = jnp.where(ACTIVE, draws_of(constant_target(3)), 0.0)
    yes = jnp.ones(len(x), bool)
    return walk(environment, CubeState(x, jnp.broadcast_to(ACTIVE, x.shape), yes, yes))


def test_walks_both_ways(walks):
    check_walks(walks, 0.0)
    assert not walks.ahead.states.position[..., ~ACTIVE].any()


BUGS = {
    "forward log(1 - u - m)": lambda x, y: np.log(np.maximum(1 - x - M, 1e-6)),
    "backward log(u' - m)": lambda x, y: np.log(np.maximum(y - M, 1e-6)),
}


@pytest.mark.parametrize("bug", BUGS)
def test_a_missing_jacobian_shows(walks, bug):
    errors = []
    for t in (walks.ahead, walks.back):
        x = t.states.position
        here = t.valid & (t.actions.which == GROW)
        terms = np.where(ACTIVE, BUGS[bug](x[:-1], x[1:]), 0.0).sum(axis=-1)
        errors.append(np.where(here, terms, 0.0).sum(axis=0))
    check_that_a_missing_factor_shows(walks, 0.0, errors)


@pytest.mark.parametrize("is_forward", [True, False])
def test_increments_and_the_choice_have_probability_one_in_all(is_forward):
    environment = cube(constant_target(2), min_increment=M)
    policy, params = small_policy(environment)
    x = jnp.array([0.35, 0.6])
    state = CubeState(x, jnp.ones(2, bool), YES, NO)
    masks = environment.forward_mask(state), environment.backward_mask(state)
    output = policy.apply(params, environment.observe(state), *masks)
    law = output.forward if is_forward else output.backward
    # Brute force: increments of at least m that stay inside, on a grid of cells that fit.
    count = 300
    room = 1 - x if is_forward else x
    sides = [(np.arange(count) + 0.5) / count * float(room[k]) for k in range(2)]
    d = np.stack(np.meshgrid(*sides, indexing="ij"), axis=-1).reshape(-1, 2)
    d = jnp.asarray(d[(d >= M).all(axis=1)], jnp.float32)
    log_prob = jax.jit(jax.vmap(lambda v: law.log_prob(Action(jnp.int32(GROW), v))))(d)
    cell = float(room.prod()) / count**2
    other = environment.action(STOP) if is_forward else Action(jnp.int32(LEAVE), x)
    mass = jnp.exp(log_prob).sum() * cell + jnp.exp(law.log_prob(other))
    assert mass == pytest.approx(1.0, abs=0.01)


def test_coordinates_that_are_off_have_no_probability():
    environment = with_active(cube(constant_target(2)), [True, False])
    policy, params = small_policy(environment)
    state = CubeState(jnp.array([0.3, 0.0]), jnp.array([True, False]), YES, NO)
    masks = environment.forward_mask(state), environment.backward_mask(state)
    law = policy.apply(params, environment.observe(state), *masks).forward
    action = law.sample(jax.random.key(0))
    action = Action(jnp.int32(GROW), jnp.array([0.25, 0.0]))
    other = law._replace(unit=law.unit._replace(beta=law.unit.beta.at[1].add(2.0)))
    assert other.log_prob(action) == law.log_prob(action)
    # Control: the active one has.
    other = law._replace(unit=law.unit._replace(beta=law.unit.beta.at[0].add(2.0)))
    assert other.log_prob(action) != law.log_prob(action)
    assert law.log_prob(action._replace(value=jnp.array([0.25, 0.1]))) == -jnp.inf


def test_forced_actions():
    environment = cube(constant_target(2))
    masks = lambda x: [  # noqa: E731
        fn(CubeState(jnp.array(x), jnp.ones(2, bool), YES, NO)).tolist()
        for fn in (environment.forward_mask, environment.backward_mask)
    ]
    assert masks([0.95, 0.5]) == [[False, False, True], [True, True, False]]
    assert masks([0.05, 0.5]) == [[False, True, True], [True, False, False]]
    nothing = CubeState(jnp.zeros(2), jnp.zeros(2, bool), YES, NO)
    assert environment.forward_mask(nothing).tolist() == [False, False, True]


CUBE = cube(steps_target(2))


def without_m(state):
    """Backward increments as if there were no least one."""
    observation = CUBE.observe(state)
    chart = observation.backward
    low = chart.low.at[GROW].set(0.0)
    return observation._replace(
        backward=chart._replace(low=low, width=chart.width.at[GROW].set(state.position))
    )


PLANTED = {
    "backward increments below m": (
        r"does not hold|does not allow",
        CUBE._replace(observe=without_m),
    ),
    "growth beyond 1 - m": (
        "goes on after max_length|does not lead here|way back",
        CUBE._replace(
            forward_mask=lambda s: jnp.stack(
                [~s.left, s.left & ~s.stopped, s.left & ~s.stopped],
            )
        ),
    ),
    "a source that remembers": (
        "does not lead here",
        CUBE._replace(
            undo=lambda s, a: CUBE.undo(s, a)._replace(
                position=jnp.where(
                    a.which == STOP, s.position, s.position - jnp.where(a.which == GROW, a.value, 0)
                )
            )
        ),
    ),
}


@pytest.mark.parametrize("bug", PLANTED)
def test_check_environment_catches(bug):
    message, environment = PLANTED[bug]
    with pytest.raises(EnvironmentCheckError, match=message):
        check_environment(environment, num_walks=256)


@pytest.mark.parametrize("active", [[True, True], [False, False]])
def test_contract(active):
    check_environment(with_active(CUBE, active))


@pytest.mark.parametrize("m", [0.0, 1.0])
def test_impossible_increments_are_named(m):
    with pytest.raises(ValueError, match=f"min_increment is {m}"):
        cube(min_increment=m)

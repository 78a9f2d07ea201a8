"""The box: its arcs, its Jacobians, and walks both ways; densities on the unit cube."""

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
from scipy import stats

from gflownet.environments import BoxState, box, corners_target, steps_target, torus_target
from gflownet.testing import EnvironmentCheckError, check_environment
from gflownet.types import Action

RADIUS = 0.25
ENVIRONMENT = box(constant_target(2), radius=RADIUS)
LEAVE, ARC, STOP = range(3)


def stopped_at(x):
    yes = jnp.ones(len(x), bool)
    return BoxState(jnp.asarray(x), yes, yes)


@pytest.fixture(scope="module")
def walks():
    return walk(ENVIRONMENT, stopped_at(draws_of(constant_target(2))))


def test_contract():
    check_environment(box(radius=0.2))


def test_walks_both_ways(walks):
    # The reward is 1 on the unit square: Z is 1 for any policy.
    check_walks(walks, 0.0)
    assert walks.ahead.length.max() > 5


def along(walks, index, fn):
    """Sums [B] of ``fn(positions that are left, positions that are entered)`` over its steps."""
    sums = []
    for t in (walks.ahead, walks.back):
        here = t.valid & (t.actions.which == index)
        x = t.states.position
        sums.append(np.where(here, fn(x[:-1], x[1:]), 0.0).sum(axis=0))
    return sums


def log_arc(room):
    """Log of the range B - A of an arc with that much room."""
    share = np.clip(room / RADIUS, 0, 1)
    width = (np.arcsin(share[..., 1]) - np.arccos(share[..., 0])) / (np.pi / 2)
    return np.log(np.maximum(width, 1e-6))


BUGS = {
    "scale of the disc": lambda x, y: np.log(RADIUS**2 * np.pi / 4) + 0 * x[..., 0],
    "r of the disc": lambda x, y: np.log(2 * np.linalg.norm(y, axis=-1) / RADIUS),
    "forward B - A": lambda x, y: log_arc(1 - x),
    "backward B - A": lambda x, y: log_arc(y),
    "delta of arcs one way": lambda x, y: np.log(RADIUS) + 0 * x[..., 0],
}


@pytest.mark.parametrize("bug", BUGS)
def test_a_missing_jacobian_shows(walks, bug):
    with np.errstate(divide="ignore", invalid="ignore"):
        errors = along(walks, LEAVE if "disc" in bug else ARC, BUGS[bug])
    check_that_a_missing_factor_shows(walks, 0.0, errors)


def test_first_step_integrates_to_one():
    policy, params = small_policy(ENVIRONMENT)
    source = ENVIRONMENT.initial(jax.random.key(0))
    middles = (np.arange(400) + 0.5) / 400 * RADIUS
    x = np.stack(np.meshgrid(middles, middles), axis=-1).reshape(-1, 2)
    x = jnp.asarray(x[np.square(x).sum(axis=1) < RADIUS**2], jnp.float32)

    def output_at(state):
        return policy.apply(
            params,
            ENVIRONMENT.observe(state),
            ENVIRONMENT.forward_mask(state),
            ENVIRONMENT.backward_mask(state),
        )

    @jax.jit
    @jax.vmap
    def density(x):
        state = BoxState(x, jnp.array(True), jnp.array(False))
        value = ENVIRONMENT.observe(state).backward.low[LEAVE]
        action = Action(jnp.int32(LEAVE), value)
        reached = ENVIRONMENT.step(source, action).position
        return jnp.exp(output_at(source).forward.log_prob(action)), reached

    values, reached = density(x)
    np.testing.assert_allclose(reached, x, atol=1e-6)
    cell = (RADIUS / 400) ** 2
    assert values.sum() * cell == pytest.approx(1.0, abs=0.01)
    # The planted bugs: no Jacobian at all, and r as if the radius itself were drawn.
    assert abs(values.sum() * cell * (RADIUS**2 * np.pi / 4) - 1.0) > 0.9
    radius = np.linalg.norm(x, axis=1) / RADIUS
    assert abs((values * 2 * radius).sum() * cell - 1.0) > 0.1


@pytest.mark.parametrize("position", [(0.3, 0.4), (0.9, 0.3), (0.2, 0.8), (0.79, 0.81)])
def test_arcs_and_the_stop_have_probability_one_in_all(position):
    policy, params = small_policy(ENVIRONMENT)
    state = BoxState(jnp.array(position), jnp.array(True), jnp.array(False))
    observation = ENVIRONMENT.observe(state)
    masks = ENVIRONMENT.forward_mask(state), ENVIRONMENT.backward_mask(state)
    law = policy.apply(params, observation, *masks).forward
    # Brute force: the angles at which an arc ends inside of the square.
    u = (np.arange(20_000) + 0.5) / 20_000
    ends = np.array(position) + RADIUS * np.stack([np.cos(np.pi * u / 2), np.sin(np.pi * u / 2)], 1)
    inside = u[(ends <= 1).all(axis=1)]
    values = jnp.asarray(np.stack([np.ones_like(inside), inside], axis=1), jnp.float32)
    log_prob = jax.jit(jax.vmap(lambda v: law.log_prob(Action(jnp.int32(ARC), v))))(values)
    length = RADIUS * np.pi / 2 / 20_000
    stop = jnp.exp(law.log_prob(ENVIRONMENT.action(STOP)))
    assert jnp.exp(log_prob).sum() * length + stop == pytest.approx(1.0, abs=3e-3)


def test_near_the_far_corner_there_is_only_the_stop():
    mask = lambda x: ENVIRONMENT.forward_mask(  # noqa: E731
        BoxState(jnp.array(x), jnp.array(True), jnp.array(False))
    ).tolist()
    assert mask([0.9, 0.85]) == [False, False, True]
    assert mask([0.7, 0.9]) == [False, True, True]


def broken_chart(direction, **changes):
    def observe(state):
        observation = ENVIRONMENT.observe(state)
        chart = getattr(observation, direction)
        changed = chart._replace(**{k: fn(getattr(chart, k)) for k, fn in changes.items()})
        return observation._replace(**{direction: changed})

    return ENVIRONMENT._replace(observe=observe)


PLANTED = {
    "arcs that leave the square": (
        "way back",
        broken_chart("forward", low=jnp.zeros_like, width=jnp.ones_like),
    ),
    "backward arcs of the whole quarter": (
        "does not lead here|does not hold|does not allow",
        broken_chart("backward", low=lambda x: x.at[ARC].set(jnp.array([1.0, 0.0]))),
    ),
    "a negative width": ("negative width", broken_chart("backward", width=lambda x: x - 1.0)),
    "undo of an arc of another length": (
        "way back does not lead here",
        ENVIRONMENT._replace(
            undo=lambda s, a: ENVIRONMENT.undo(s, a._replace(value=a.value * jnp.array([0.9, 1])))
        ),
    ),
    "a scale of what is determined": (
        "scales a value that is determined",
        broken_chart("backward", log_scale=lambda x: x - 1.0),
    ),
    "a plain observation": (
        "ChartedObservation",
        ENVIRONMENT._replace(observe=lambda s: s.position),
    ),
    "a reward of zero": (
        "log_reward is -inf",
        ENVIRONMENT._replace(log_reward=lambda p, s: jnp.log(0.0 * s.position[0])),
    ),
}


@pytest.mark.parametrize("bug", PLANTED)
def test_check_environment_catches(bug):
    message, environment = PLANTED[bug]
    with pytest.raises(EnvironmentCheckError, match=message):
        check_environment(environment)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: box(radius=0.0), "radius is 0.0"),
        (lambda: box(steps_target(3)), r"target has the shape \(3,\)"),
        (lambda: steps_target(0), "dim is 0"),
        (lambda: steps_target(2, reward_floor=0.0), "reward_floor is 0.0"),
        (lambda: steps_target(2, reward_ring=-1.0), "reward_ring -1.0"),
        (lambda: corners_target(2, offset=0.5), "offset is 0.5"),
        (lambda: corners_target(2, deviation=0.0), "deviation is 0.0"),
        (lambda: torus_target(0), "dim is 0"),
    ],
)
def test_impossible_arguments_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


TARGETS = {
    "steps_1": (lambda: steps_target(1), 1.0),
    "steps_2": (lambda: steps_target(2), 1.0),
    "steps_3": (lambda: steps_target(3), 1.0),
    "corners_2": (lambda: corners_target(2), 1.0),
    "corners_1": (lambda: corners_target(1, offset=0.4, deviation=0.2), 1.0),
    "torus_1": (lambda: torus_target(1), 2 * np.pi),
    "torus_2": (lambda: torus_target(2), 2 * np.pi),
    "torus_3": (lambda: torus_target(3), 2 * np.pi),
}


@pytest.mark.parametrize("name", TARGETS)
def test_targets(name):
    make, side = TARGETS[name]
    target = make()
    (dim,) = target.event_shape
    count = {1: 2000, 2: 400, 3: 100}[dim]
    # Steps lie on borders of cells, so that the middle rule is exact for them.
    middles = (np.arange(count) + 0.5) / count * side
    grid = np.stack(np.meshgrid(*[middles] * dim, indexing="ij"), axis=-1).reshape(-1, dim)
    energy = jax.jit(jax.vmap(lambda x: target.energy((), x)))
    density = np.exp(-np.float64(energy(jnp.asarray(grid, jnp.float32))))
    density *= (side / count) ** dim
    assert np.log(density.sum()) == pytest.approx(target.log_z, abs=2e-4)
    draws = np.float64(draws_of(target, 4000))
    assert ((draws >= 0) & (draws <= side)).all()
    marginal = density.reshape((count,) * dim).sum(axis=tuple(range(1, dim)))
    cumulative = np.append(0.0, np.cumsum(marginal / marginal.sum()))
    cdf = lambda x: np.interp(x, np.linspace(0, side, count + 1), cumulative)  # noqa: E731
    assert stats.kstest(draws[:, 0], cdf).pvalue > 1e-4
    # The planted bug: the uniform law.
    assert stats.kstest(draws[:, 0] / side, "uniform").pvalue < 1e-4
    if dim > 1:
        # How often both coordinates lie in the first half, by the law and in the draws.
        half = (grid[:, :2] < side / 2).all(axis=1)
        share = density[half].sum() / density.sum()
        error = np.sqrt(share * (1 - share) / 4000)
        assert abs((draws[:, :2] < side / 2).all(axis=1).mean() - share) < 5 * error

"""The hypergrid's reward and log Z against exact rational arithmetic and published values."""

from __future__ import annotations

import math
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gflownet.environments import hypergrid
from gflownet.environments.hypergrid import HypergridState, reward_tables

# side: (coordinates in the outer region, coordinates in the ring)
COUNTS = {8: (4, 2), 10: (6, 2), 16: (8, 2), 20: (10, 4), 21: (10, 2), 32: (16, 6), 64: (32, 12)}

# (dim, side, R0, R1, R2, log Z as published to 6 digits)
LOG_Z = [
    (2, 8, 0.1, 0.5, 2.0, 3.109061),
    (2, 8, 0.001, 0.5, 2.0, 2.776581),
    (2, 10, 0.001, 0.5, 2.0, 3.261935),
    (4, 8, 0.1, 0.5, 2.0, 6.344934),
    (4, 8, 0.01, 0.5, 2.0, 5.303106),
    (4, 8, 0.001, 0.5, 2.0, 5.100452),
    (2, 20, 0.001, 0.5, 2.0, 4.411585),
    (4, 20, 0.001, 0.5, 2.0, 8.643297),
    (4, 20, 1e-4, 1.0, 3.0, 9.285819),
    (2, 64, 0.001, 0.5, 2.0, 6.689719),
    (2, 16, 0.001, 0.5, 2.0, None),
    (2, 21, 0.001, 0.5, 2.0, None),
    (3, 16, 0.01, 0.5, 2.0, None),
]


def rational_tables(side):
    """The indicators from their definition, without rounding."""
    a = [abs(Fraction(x, side - 1) - Fraction(1, 2)) for x in range(side)]
    outer = np.array([v > Fraction(1, 4) for v in a])
    ring = np.array([Fraction(3, 10) < v < Fraction(4, 10) for v in a])
    return outer, ring


def float_tables(side):
    """The planted bug: the same with floating-point numbers."""
    a = np.abs(np.arange(side) / (side - 1) - 0.5)
    return a > 0.25, (a > 0.3) & (a < 0.4)


def enumerated_log_z(environment):
    """By summing rewards over all cells, in float64."""
    with jax.enable_x64(True):
        states = environment.enumerate()
        half = len(states.stopped) // 2
        cells = jax.tree.map(lambda leaf: jnp.asarray(leaf[half:]), states)
        assert cells.stopped.all()
        log_reward = jax.jit(jax.vmap(environment.log_reward, (None, 0)))((), cells)
        assert log_reward.dtype == jnp.float64
        return math.log(math.fsum(np.exp(np.asarray(log_reward)).tolist()))


@pytest.mark.parametrize(("side", "counts"), COUNTS.items())
def test_counts(side, counts):
    outer, ring = reward_tables(side)
    assert (outer.sum(), ring.sum()) == counts


@pytest.mark.parametrize("side", range(2, 80))
def test_tables_equal_rational_arithmetic(side):
    for table, expected in zip(reward_tables(side), rational_tables(side), strict=True):
        np.testing.assert_array_equal(table, expected)


@pytest.mark.parametrize("side", [16, 21])
def test_floats_would_fail(side):
    assert float_tables(side)[1].sum() == 3
    assert rational_tables(side)[1].sum() == 2


@pytest.mark.parametrize(("dim", "side", "r0", "r1", "r2", "published"), LOG_Z)
def test_log_z(dim, side, r0, r1, r2, published):
    environment = hypergrid(dim=dim, side=side, reward_floor=r0, reward_outer=r1, reward_ring=r2)
    assert environment.log_z == pytest.approx(enumerated_log_z(environment), rel=1e-9)
    if published is not None:
        assert environment.log_z == pytest.approx(published, abs=1e-6)
    # The planted bug: with floats, sides 16 and 21 miss this tolerance.
    outer, ring = float_tables(side)
    wrong = math.log(r0 * side**dim + r1 * outer.sum() ** dim + r2 * ring.sum() ** dim)
    assert (wrong == pytest.approx(environment.log_z, rel=1e-9)) == (side not in (16, 21))


@pytest.mark.parametrize(("dim", "side", "mass"), [(2, 8, 0.623), (2, 10, 0.383), (2, 20, 0.486)])
def test_share_of_the_modes(dim, side, mass):
    ring = rational_tables(side)[1].sum() ** dim
    assert ring * (0.001 + 0.5 + 2.0) / math.exp(hypergrid(dim=dim, side=side).log_z) == (
        pytest.approx(mass, abs=5e-4)
    )


def test_reward_values():
    environment = hypergrid(dim=2, side=8, reward_floor=0.1, reward_outer=0.5, reward_ring=2.0)
    outer, ring = rational_tables(8)
    for x in range(8):
        for y in range(8):
            state = HypergridState(jnp.array([x, y], jnp.int32), jnp.array(True))
            expected = 0.1 + 0.5 * (outer[x] & outer[y]) + 2.0 * (ring[x] & ring[y])
            reward = math.exp(environment.log_reward((), state))
            assert reward == pytest.approx(expected, rel=1e-6)
    # Corner: outer only; a mode; the middle: the floor.
    assert ring.tolist() == [False, True, False, False, False, False, True, False]


def test_reward_does_not_depend_on_parameters():
    environment = hypergrid(dim=2, side=8)
    state = HypergridState(jnp.array([1, 6], jnp.int32), jnp.array(True))
    assert environment.log_reward((), state) == environment.log_reward({"a": 1.0}, state)


@pytest.mark.parametrize(
    ("options", "value"),
    [
        ({"dim": 0}, "dim is 0"),
        ({"side": 1}, "side is 1"),
        ({"reward_floor": 0.0}, "reward_floor is 0.0"),
        ({"reward_floor": float("nan")}, "reward_floor is nan"),
        ({"reward_outer": -1.0}, "reward_outer is -1.0"),
        ({"reward_ring": -2.0}, "reward_ring -2.0"),
        ({"dim": 10**9}, "dim is 1000000000 and side 8; their product"),
    ],
)
def test_errors_name_the_value(options, value):
    with pytest.raises(ValueError, match=value):
        hypergrid(**options)


def test_large_grids_are_not_enumerated():
    environment = hypergrid(dim=10, side=20)
    assert environment.enumerate is None
    assert environment.state_index is None
    assert environment.log_z == pytest.approx(
        math.log(0.001 * 20.0**10 + 0.5 * 10.0**10 + 2.0 * 4.0**10)
    )
    # The floor alone: what is added weighs 2^-D and 4^-D of it, and 8^D is beyond a float.
    log_z = hypergrid(dim=400, side=8).log_z
    assert log_z == pytest.approx(math.log(0.001) + 400 * math.log(8.0), rel=1e-12)
    assert hypergrid(dim=2, side=8, max_enumerated=127).enumerate is None
    assert hypergrid(dim=2, side=8, max_enumerated=128).enumerate is not None


def test_actions_move_the_coordinate_they_name():
    environment = hypergrid(dim=3, side=5)
    start = environment.initial(jax.random.key(0))
    for action in range(3):
        moved = environment.step(start, jnp.asarray(action))
        np.testing.assert_array_equal(moved.position, np.eye(3, dtype=int)[action])
        assert not moved.stopped
    stopped = environment.step(start, jnp.asarray(3))
    assert stopped.stopped
    np.testing.assert_array_equal(stopped.position, [0, 0, 0])
    np.testing.assert_array_equal(environment.observe(moved), np.eye(5)[[0, 0, 1]].reshape(-1))

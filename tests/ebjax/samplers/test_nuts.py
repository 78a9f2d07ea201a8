"""NUTS: its transition probabilities on an orbit, computed exactly; invariance of known laws."""

import functools
import importlib
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ebjax.energies import targets
from ebjax.samplers import run_chain
from ebjax.samplers.hamiltonian import Phase, any_chain, leapfrog
from ebjax.samplers.metric import make_metric, scaled_gradient
from ebjax.samplers.nuts import nuts

# The package may export the function of the same name, which hides the module.
nuts_module = importlib.import_module("ebjax.samplers.nuts")

DENSE = np.array([[1.3, 0.4], [0.4, 0.6]])
METRICS = {"identity": None, "diagonal": np.array([1.7, 0.5]), "dense": DENSE}
PARAMS = 0.4


def asymmetric_energy(params, x):
    return jnp.sum(0.25 * x**4 - 0.5 * x**2 + 0.6 * x) + params * x[0] * x[1]


# The orbit: points ..., -1, 0, 1, ... of the leapfrog map. A transition that starts at point i with
# its momentum ends at point j with some probability P(j | i), and NUTS is right when the weights
# exp(-H) are invariant under it: Σ_i exp(-H_i) P(j | i) = exp(-H_j).

MAX_DEPTH = 4
LONGEST = 2**MAX_DEPTH - 1
# Starts from which a point in the middle can be reached, and what can be reached from those.
HALF_WIDTH = LONGEST + 3
EDGE = HALF_WIDTH + LONGEST


@functools.cache
def make_orbit(step_size, metric_name):
    """Positions, momenta and H of the points -EDGE ... EDGE."""
    assert jax.config.jax_enable_x64
    metric = make_metric(METRICS[metric_name])
    start, momentum = jnp.array([0.9, -1.3]), jnp.array([0.4, 1.1])

    @jax.jit
    def walk(step):
        gradient = jax.grad(asymmetric_energy, 1)(PARAMS, start)
        phase = Phase(start, momentum, scaled_gradient(metric, gradient))

        def body(phase, _):
            phase, _ = leapfrog(asymmetric_energy, PARAMS, metric, phase, step)
            return phase, (phase.position, phase.momentum)

        return jax.lax.scan(body, phase, None, EDGE)[1]

    forward, backward = walk(step_size), walk(-step_size)
    middle = (start[None], momentum[None])
    position, momentum = (
        np.concatenate([b[::-1], m, f]) for b, m, f in zip(backward, middle, forward, strict=True)
    )
    energy = jax.vmap(asymmetric_energy, (None, 0))(PARAMS, position)
    return position, momentum, np.asarray(energy + 0.5 * np.sum(momentum**2, -1))


class WithIndex:
    """The energy; of a position of the orbit, its parts tell which it is, as a vector of 0 and 1.

    With draws replaced by expectations that vector becomes the law of the draw.
    """

    def __init__(self, positions):
        self.positions = jnp.asarray(positions)

    def evaluate(self, params, x, with_gradient):
        del with_gradient
        is_here = jnp.max(jnp.abs(self.positions - x), axis=-1) < 1e-9
        return *jax.value_and_grad(asymmetric_energy, 1)(params, x), is_here.astype(x.dtype)

    def assemble(self, params, parts):
        del params
        return parts[0], parts[1]


def expect(is_new, new, old):
    """In the place of a choice between two, their mean."""
    mix = lambda a, b: jnp.where(is_new, a, b)  # noqa: E731
    if is_new.dtype != bool:
        mix = lambda a, b: is_new * a + (1.0 - is_new) * b  # noqa: E731
    return jax.tree.map(mix, new, old)


def transition_probabilities(monkeypatch, kernel, positions, momenta):
    """P(j | i, directions) by the library: [starts, 2**MAX_DEPTH, orbit], and the infos."""
    energy = WithIndex(positions)
    key = jax.random.key(0)

    def one(position, momentum, directions):
        def draw(key, tree, num_uniform=1):
            if tree.size == 0:  # of a choice, which is replaced by its expectation
                return tree, jnp.array([0.5])
            return momentum, (directions + jnp.array([0.5])) / 2**MAX_DEPTH

        monkeypatch.setattr(nuts_module, "random_normal_and_uniform", draw)
        state = kernel.init(energy, PARAMS, position)
        state, info = kernel.step(key, energy, PARAMS, state)
        return state.parts[2], info

    with monkeypatch.context() as monkeypatch:
        monkeypatch.setattr(nuts_module, "_choose", expect)
        monkeypatch.setattr(nuts_module, "_accepts", lambda u, r: jnp.exp(jnp.minimum(r, 0.0)))
        over_directions = jax.vmap(one, (None, None, 0))
        starts = slice(LONGEST, len(positions) - LONGEST)
        return jax.jit(jax.vmap(over_directions, (0, 0, None)))(
            positions[starts], momenta[starts], jnp.arange(2.0**MAX_DEPTH)
        )


def orbit_and_kernel(metric_name, step_size=0.35):
    inverse_mass = METRICS[metric_name]
    kernel = nuts(step_size=step_size, inverse_mass=inverse_mass, max_depth=MAX_DEPTH)
    return make_orbit(step_size, metric_name), kernel


def transitions(monkeypatch, metric_name, step_size):
    (positions, momenta, energy), kernel = orbit_and_kernel(metric_name, step_size)
    probs, info = transition_probabilities(monkeypatch, kernel, positions, momenta)
    # The orbit shows what is to be tested: U-turns at several depths, and unequal weights.
    assert len(np.unique(info.depth)) > 2
    assert np.ptp(energy) > 0.05
    return momenta, energy, np.asarray(probs)


def invariance_error(energy, probs):
    """Largest relative error of Σ_i exp(-H_i) P(j | i) = exp(-H_j) in the middle of the orbit."""
    weights = np.exp(energy.min() - energy)
    arrived = weights[LONGEST:-LONGEST] @ probs.mean(axis=1)
    return np.abs(arrived / weights - 1.0)[EDGE - 3 : EDGE + 4].max()


def one_end_only(first, last, left_last, right_first, left_sum, right_sum):
    return jnp.sum((left_sum + right_sum) * last) <= 0.0


BUGS = {
    "both halves grow forward": (
        "leapfrog",
        lambda energy_fn, params, metric, phase, step: leapfrog(
            energy_fn, params, metric, phase, jnp.abs(step)
        ),
    ),
    "points drawn uniformly": ("_log_weight", jnp.zeros_like),
    "one end tested": ("_has_turned", one_end_only),
    "no test within a half": (
        "_any_span_has_turned",
        lambda half, leaf: jnp.isnan(half.kinetic),
    ),
    "wrong checkpoints": ("_read", lambda stack, index: jax.tree.map(lambda s: s[0], stack)),
}


@pytest.mark.parametrize("bug", BUGS)
def test_the_orbit_shows_a_bug(monkeypatch, x64, bug):
    name, broken = BUGS[bug]
    monkeypatch.setattr(nuts_module, name, broken)
    _, energy, probs = transitions(monkeypatch, "dense", 0.45)
    assert invariance_error(energy, probs) > 1e-3


def reference_law(momenta, energy, start, directions):
    """P(j | start, directions) by recursion over the spans of the tree, and the leaves grown."""

    def span_turned(low, high):
        """Whether points low ... high, or a dyadic span within, have turned."""
        if low == high:
            return False
        mid = (low + high) // 2
        return span_turned(low, mid) or span_turned(mid + 1, high) or joined(low, mid, high)

    def joined(low, mid, high):
        total = lambda a, b: momenta[a : b + 1].sum(0)  # noqa: E731
        for a, b in ((low, high), (low, mid + 1), (mid, high)):
            if min(total(a, b) @ momenta[a], total(a, b) @ momenta[b]) <= 0.0:
                return True
        return False

    weights = np.exp(energy[start] - energy)
    law = np.zeros(len(energy))
    law[start] = 1.0
    low = high = start
    for depth in range(MAX_DEPTH):
        size = 2**depth
        is_backward = (directions >> depth) & 1
        new = (low - size, low - 1) if is_backward else (high + 1, high + size)
        if span_turned(*new):
            break
        old_weight = weights[low : high + 1].sum()
        half = np.zeros(len(energy))
        half[new[0] : new[1] + 1] = weights[new[0] : new[1] + 1]
        take = min(1.0, half.sum() / old_weight)
        law = take * half / half.sum() + (1.0 - take) * law
        low, high = min(low, new[0]), max(high, new[1])
        if joined(low, low + size - 1, high):
            break
    return law


@pytest.mark.parametrize("metric_name", METRICS)
def test_transitions_on_an_orbit(monkeypatch, x64, metric_name):
    """They leave the weights invariant, and are those of the recursion."""
    step_size = 0.45 if metric_name == "dense" else 0.35
    momenta, energy, probs = transitions(monkeypatch, metric_name, step_size)
    np.testing.assert_allclose(probs.sum(-1), 1.0, rtol=1e-12)
    assert invariance_error(energy, probs) < 1e-11
    for start in range(probs.shape[0]):
        for directions in range(2**MAX_DEPTH):
            law = reference_law(momenta, energy, start + LONGEST, directions)
            np.testing.assert_allclose(probs[start, directions], law, atol=1e-12)


@functools.partial(jax.jit, static_argnames=("kernel", "energy_fn", "num_steps"))
def run_all(keys, params, starts, *, kernel, energy_fn, num_steps):
    def end(key, position):
        state = kernel.init(energy_fn, params, position)
        return run_chain(key, kernel, energy_fn, params, state, num_steps)

    return jax.vmap(end)(keys, starts)


def run_many(kernel, energy_fn, starts, num_steps, params=()):
    keys = jax.random.split(jax.random.key(0), len(starts))
    options = {"kernel": kernel, "energy_fn": energy_fn, "num_steps": num_steps}
    return run_all(keys, params, starts, **options)


KNOWN_LAWS = {
    "double_well": (lambda: targets.double_well(tilt=0.8, quadratic=2.0), 0.4),
    "banana": (lambda: targets.banana(curvature=0.3, scale=1.5), 0.6),
}


def moment_z_scores(name, inverse_mass=None, num_chains=20_000, num_steps=3):
    """Exact draws, a few transitions: the ends must be exact draws again."""
    build, step_size = KNOWN_LAWS[name]
    target = build()
    kernel = nuts(step_size=step_size, inverse_mass=inverse_mass, max_depth=6)
    starts = jax.jit(jax.vmap(target.sample))(jax.random.split(jax.random.key(1), num_chains))
    state, info = run_many(kernel, target.energy, starts, num_steps)
    assert info.acceptance_rate.mean() > 0.7
    assert info.is_finite.mean() == 1.0
    centred = np.asarray(state.position, np.float64) - np.asarray(target.moments.mean)
    squares, variance = centred**2, np.diag(target.moments.covariance)
    products = centred.prod(1)  # no correlation in either law
    z = np.concatenate(
        [
            centred.mean(0) / np.sqrt(variance / num_chains),
            (squares.mean(0) - variance) / np.sqrt(squares.var(0) / num_chains),
            [products.mean() / np.sqrt(products.var() / num_chains)],
        ]
    )
    return np.abs(z)


@pytest.mark.parametrize("name", KNOWN_LAWS)
def test_known_laws_are_invariant(name):
    assert moment_z_scores(name).max() < 5.0


def test_a_known_law_is_invariant_with_a_dense_mass():
    assert moment_z_scores("banana", DENSE).max() < 5.0


def test_the_invariance_check_sees_uniform_weights(monkeypatch):
    monkeypatch.setattr(nuts_module, "_log_weight", jnp.zeros_like)
    assert moment_z_scores("double_well").max() > 5.0


def test_a_mass_is_a_change_of_coordinates(x64):
    """With M⁻¹ = F F', x from E is F y with y from E(F y) and the identity, chain by chain."""
    factor = np.linalg.cholesky(DENSE)
    energy = lambda params, x: asymmetric_energy(PARAMS, x)  # noqa: E731
    straight = lambda params, y: energy(params, factor @ y)  # noqa: E731
    starts = jax.random.normal(jax.random.key(2), (50, 2))
    options = {"step_size": 0.4, "max_depth": 6}
    state, info = run_many(nuts(inverse_mass=DENSE, **options), energy, starts @ factor.T, 5)
    other, other_info = run_many(nuts(**options), straight, starts, 5)
    np.testing.assert_allclose(state.position, other.position @ factor.T, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(info.acceptance_rate, other_info.acceptance_rate, rtol=1e-9)
    np.testing.assert_array_equal(info.num_evaluations, other_info.num_evaluations)


def test_a_position_may_be_any_tree(x64):
    """A vector and its parts in a tree go the same way, with a mass over all of them."""
    inverse_mass = jnp.array([[1.0, 0.3, 0.1], [0.3, 0.8, 0.0], [0.1, 0.0, 0.5]])
    kernel = nuts(step_size=0.4, inverse_mass=inverse_mass)
    vector = jnp.array([0.3, -1.0, 0.7])
    tree = {"a": vector[0], "b": vector[1:].reshape(2, 1)}
    flat = lambda params, x: asymmetric_energy(PARAMS, x)  # noqa: E731
    of_tree = lambda params, x: flat(params, jnp.append(x["a"], x["b"]))  # noqa: E731
    start = kernel.init(flat, (), vector), kernel.init(of_tree, (), tree)

    @jax.jit
    @jax.vmap
    def both(key):
        return kernel.step(key, flat, (), start[0]), kernel.step(key, of_tree, (), start[1])

    (one, info), (two, info_of_tree) = both(jax.random.split(jax.random.key(8), 10))
    # The noise is drawn leaf by leaf in the same order.
    np.testing.assert_allclose(one.position[:, 0], two.position["a"], rtol=1e-11)
    np.testing.assert_allclose(one.position[:, 1:], two.position["b"][..., 0], rtol=1e-11)
    np.testing.assert_array_equal(info.num_evaluations, info_of_tree.num_evaluations)


def test_info(x64):
    energy = lambda params, x: asymmetric_energy(PARAMS, x)  # noqa: E731
    starts = jax.random.normal(jax.random.key(3), (500, 2))
    for max_depth in (3, 10):
        kernel = nuts(step_size=0.15, max_depth=max_depth)
        keys = jax.random.split(jax.random.key(4), len(starts))

        @jax.jit
        @jax.vmap
        def step(key, x, kernel=kernel):
            new, info = kernel.step(key, energy, (), kernel.init(energy, (), x))
            return new, info, jax.value_and_grad(energy, 1)((), new.position)

        new, info, (energies, gradient) = step(keys, starts)
        np.testing.assert_allclose(info.energy, energies)
        np.testing.assert_allclose(new.gradient, gradient, rtol=1e-12)
        assert np.all(info.is_finite)
        assert not np.any(info.is_divergent)
        depth, count = np.asarray(info.depth), np.asarray(info.num_evaluations)
        assert depth.max() <= max_depth
        assert np.all(count < 2**depth)
        assert np.all(count >= 2 ** (depth - 1))
        # What no U-turn ended has all the points that the largest depth allows.
        assert np.all(count[~np.asarray(info.is_turning)] == 2**max_depth - 1)
        assert np.all(info.is_turning) == (max_depth == 10)
        # An error of H that small leaves the points nearly equally likely.
        assert np.abs(info.energy_error).mean() < 0.1
        assert info.acceptance_rate.min() > 0.7


def test_a_step_size_too_large_diverges_and_stays():
    energy = lambda params, x: jnp.sum(x**4)  # noqa: E731
    kernel = nuts(step_size=10.0)
    state = kernel.init(energy, (), jnp.ones(2))
    new, info = jax.jit(lambda key: kernel.step(key, energy, (), state))(jax.random.key(0))
    assert info.is_divergent
    assert not info.is_turning
    assert info.num_evaluations == 1
    np.testing.assert_array_equal(new.position, state.position)


def wall(outside, x):
    """The exponential law, with a wall at 0: E = x inside, infinite or undefined outside."""
    return jnp.where(x > 0.0, x, outside)


@pytest.mark.parametrize("outside", [jnp.inf, jnp.nan], ids=str)
def test_what_is_not_finite_is_never_drawn(outside):
    starts = jax.random.exponential(jax.random.key(5), (10_000,))
    kernel = nuts(step_size=0.7, max_depth=5)
    state, info = run_many(kernel, wall, starts, 3, jnp.float32(outside))
    assert np.all(state.position > 0.0)
    assert np.all(np.isfinite(state.energy))
    assert 0.0 < info.is_finite.mean() < 1.0
    np.testing.assert_array_equal(info.is_finite == 1.0, info.is_divergent == 0.0)
    position = np.asarray(state.position, np.float64)
    assert abs(position.mean() - 1.0) * math.sqrt(len(starts)) < 5.0
    assert abs((position**2).mean() - 2.0) / math.sqrt(20.0 / len(starts)) < 5.0


def test_a_start_without_an_energy_is_flagged():
    start = jnp.array(2.0)
    hole = lambda params, x: jnp.where(x == start, jnp.nan, 0.5 * x**2)  # noqa: E731
    kernel = nuts(step_size=0.1)
    step = jax.jit(lambda key: kernel.step(key, hole, (), kernel.init(hole, (), start)))
    new, info = step(jax.random.key(0))
    assert not info.is_finite
    assert info.acceptance_rate == 0.0
    assert new.position == start


def test_a_start_of_infinite_energy_walks_in():
    wall = lambda params, x: jnp.where(x > 0.0, 0.5 * x**2 + 5000.0, jnp.inf)  # noqa: E731
    kernel = nuts(step_size=0.5)
    state = kernel.init(wall, (), jnp.array(-0.1))
    state, _ = run_chain(jax.random.key(0), kernel, wall, (), state, 20)
    assert state.position > 0.0
    assert np.isfinite(state.energy)


def test_any_chain():
    flags = jnp.array([[False, True], [False, False]])
    both = jax.vmap(jax.vmap(any_chain, out_axes=None), out_axes=None)
    assert bool(both(flags))
    assert not bool(both(flags & False))
    assert not bool(any_chain(flags[0, 0]))


def test_chains_in_step_are_chains_alone(x64):
    """Nested and alone: the end of one chain does not touch another."""
    energy = lambda params, x: asymmetric_energy(PARAMS, x)  # noqa: E731
    kernel = nuts(step_size=0.2)
    starts = jax.random.normal(jax.random.key(6), (3, 4, 2))
    keys = jax.random.split(jax.random.key(7), (3, 4))
    one = jax.jit(lambda k, x: kernel.step(k, energy, (), kernel.init(energy, (), x)))
    state, info = jax.jit(jax.vmap(jax.vmap(one)))(keys, starts)
    assert len(np.unique(info.num_evaluations)) > 2
    for i in range(3):
        for j in range(4):
            alone, alone_info = one(keys[i, j], starts[i, j])
            np.testing.assert_allclose(state.position[i, j], alone.position, rtol=1e-11)
            assert info.num_evaluations[i, j] == alone_info.num_evaluations


def test_chains_over_devices():
    """Inside a caller's ``shard_map`` the loops of each device end with its own chains."""
    energy = lambda params, x: asymmetric_energy(PARAMS, x)  # noqa: E731
    kernel = nuts(step_size=0.2)
    starts = jax.random.normal(jax.random.key(6), (8, 2))
    keys = jax.random.split(jax.random.key(7), 8)
    step = jax.vmap(lambda k, x: kernel.step(k, energy, (), kernel.init(energy, (), x)))
    mesh = jax.make_mesh((2,), ("chains",), axis_types=(jax.sharding.AxisType.Auto,))
    over_devices = jax.shard_map(
        step, mesh=mesh, in_specs=jax.P("chains"), out_specs=jax.P("chains")
    )
    one, other = jax.jit(step)(keys, starts), jax.jit(over_devices)(keys, starts)
    np.testing.assert_allclose(one[0].position, other[0].position, rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(one[1].num_evaluations, other[1].num_evaluations)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"step_size": 0.0}, "step_size is 0.0"),
        ({"step_size": float("nan")}, "step_size is nan"),
        ({"step_size": 0.1, "max_depth": 0}, "max_depth is 0"),
        ({"step_size": 0.1, "max_depth": 21}, "max_depth is 21"),
        ({"step_size": 0.1, "max_depth": 2.5}, "max_depth is 2.5"),
        ({"step_size": 0.1, "divergence_threshold": 0.0}, "divergence_threshold is 0.0"),
        ({"step_size": 0.1, "inverse_mass": np.ones((2, 3))}, r"inverse_mass has shape \(2, 3\)"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(ValueError, match=message):
        nuts(**options)

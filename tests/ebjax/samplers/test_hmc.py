"""HMC: the integrator's geometry and order, detailed balance to the last digit, known laws."""

import functools
import importlib
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ebjax.energies import targets
from ebjax.numerics import inner_product
from ebjax.samplers import run_chain
from ebjax.samplers.hamiltonian import Phase, inner_products, leapfrog
from ebjax.samplers.hmc import hmc
from ebjax.samplers.metric import make_metric, scaled_gradient

# The package may export the function of the same name, which hides the module.
hmc_module = importlib.import_module("ebjax.samplers.hmc")

DENSE = np.array([[1.3, 0.4], [0.4, 0.6]])
METRICS = {"identity": None, "diagonal": np.array([1.7, 0.5]), "dense": DENSE}
PARAMS = 0.4
STEP_SIZE, NUM_STEPS = 0.3, 5

each_metric = pytest.mark.parametrize("inverse_mass", METRICS.values(), ids=METRICS.keys())
each_metric_name = pytest.mark.parametrize("metric_name", METRICS)


def asymmetric_energy(params, x):
    return jnp.sum(0.25 * x**4 - 0.5 * x**2 + 0.6 * x) + params * x[0] * x[1]


def flow(position, momentum, step, num_steps, inverse_mass=None, energy_fn=asymmetric_energy):
    """Position and momentum after so many steps, by the joined steps of HMC."""
    metric = make_metric(inverse_mass)
    gradient = jax.grad(energy_fn, 1)(PARAMS, position)
    start = Phase(position, momentum, scaled_gradient(metric, gradient))
    momentum, state = hmc_module._trajectory(energy_fn, PARAMS, metric, start, step, num_steps)
    return state.position, momentum


@functools.cache
def flow_program(metric_name):
    """The flow of many points, for any step and any number of steps."""
    run = functools.partial(flow, inverse_mass=METRICS[metric_name])
    return jax.jit(jax.vmap(run, (0, 0, None, None)))


def hamiltonian(position, momentum):
    return asymmetric_energy(PARAMS, position) + 0.5 * jnp.sum(momentum**2)


def random_points(num_points, seed=1):
    return jax.random.normal(jax.random.key(seed), (2, num_points, 2)) * 1.1


@each_metric
def test_joined_steps_are_leapfrog_steps(x64, inverse_mass):
    metric = make_metric(inverse_mass)
    position, momentum = jnp.array([0.9, -1.3]), jnp.array([0.4, 1.1])
    gradient = jax.grad(asymmetric_energy, 1)(PARAMS, position)
    phase = Phase(position, momentum, scaled_gradient(metric, gradient))
    for length in range(1, 5):
        phase, state = leapfrog(asymmetric_energy, PARAMS, metric, phase, STEP_SIZE)
        joined = flow(position, momentum, STEP_SIZE, length, inverse_mass)
        np.testing.assert_allclose(joined, phase[:2], rtol=1e-13)
        np.testing.assert_allclose(state.position, phase.position)
        # A traced length goes another way in the code.
        traced = flow(position, momentum, STEP_SIZE, jnp.int32(length), inverse_mass)
        np.testing.assert_allclose(joined, traced, rtol=1e-13)


@each_metric_name
def test_the_flow_is_reversible(x64, metric_name):
    run = flow_program(metric_name)
    position, momentum = random_points(10)
    end, end_momentum = run(position, momentum, STEP_SIZE, NUM_STEPS)
    assert np.abs(end - position).max(axis=-1).min() > 0.01
    back, back_momentum = run(end, -end_momentum, STEP_SIZE, NUM_STEPS)
    np.testing.assert_allclose(back, position, rtol=1e-11, atol=1e-11)
    np.testing.assert_allclose(back_momentum, -momentum, rtol=1e-11, atol=1e-11)
    # Back in time is the same without the flips.
    back, _ = run(end, end_momentum, -STEP_SIZE, NUM_STEPS)
    np.testing.assert_allclose(back, position, rtol=1e-11, atol=1e-11)


def volume(inverse_mass):
    def whole(z):
        return jnp.concatenate(flow(z[:2], z[2:], STEP_SIZE, NUM_STEPS, inverse_mass))

    points = jnp.concatenate(random_points(20), axis=-1)
    # A new program at each call, so that a patched module is traced anew.
    jacobians = jax.jit(jax.vmap(jax.jacfwd(whole)))(points)
    return np.linalg.det(np.asarray(jacobians))


@each_metric
def test_the_flow_conserves_volume(x64, inverse_mass):
    np.testing.assert_allclose(volume(inverse_mass), 1.0, rtol=1e-9)


def test_the_volume_shows_a_step_that_does_not_conserve_it(monkeypatch, x64):
    """The force taken half way between two positions, say."""
    kick = hmc_module.kick
    broken = lambda momentum, force, step: kick(momentum, force + 0.05 * momentum, step)  # noqa: E731
    monkeypatch.setattr(hmc_module, "kick", broken)
    assert np.abs(volume(None) - 1.0).min() > 1e-2


@each_metric_name
def test_the_error_is_of_second_order(x64, metric_name):
    """Over a fixed time, of H and of the position; the exact end is that of tiny steps."""
    # The shape of the points in the test of reversibility, whose program this is.
    position, momentum = np.repeat([[[0.9, -1.3]], [[0.4, 1.1]]], 10, axis=1)
    run = flow_program(metric_name)
    exact = run(position, momentum, 1.0 / 8192, 8192)[0][0]
    errors = []
    for num_steps in (16, 32, 64):
        end = [part[0] for part in run(position, momentum, 1.0 / num_steps, num_steps)]
        in_energy = hamiltonian(*end) - hamiltonian(position[0], momentum[0])
        errors.append([abs(float(in_energy)), float(jnp.linalg.norm(end[0] - exact))])
    orders = np.log2(np.array(errors)[:-1] / np.array(errors)[1:])
    np.testing.assert_allclose(orders, 2.0, atol=0.15)


def test_the_harmonic_oscillator(x64):
    """x(t) = x cos t + F ξ sin t in E = x' M x / 2."""
    mass = np.linalg.inv(DENSE)
    harmonic = lambda params, x: 0.5 * x @ mass @ x  # noqa: E731
    position, momentum = jnp.array([0.9, -1.3]), jnp.array([0.4, 1.1])
    end, _ = flow(position, momentum, 1e-3, 1700, DENSE, harmonic)
    factor = np.linalg.cholesky(DENSE)
    exact = position * math.cos(1.7) + factor @ momentum * math.sin(1.7)
    np.testing.assert_allclose(end, exact, atol=1e-6)


def balance_error(monkeypatch, inverse_mass=None):
    """Largest |log of exp(-H(z)) a(z) / exp(-H(z')) a(z')|, z' the end of the trajectory from z.

    The library's step computes both acceptances; its noise is replaced by the momentum.
    """
    kernel = hmc(step_size=0.35, num_steps=4, inverse_mass=inverse_mass)

    def log_flow(position, momentum):
        state = kernel.init(asymmetric_energy, PARAMS, position)
        draw = (momentum, jnp.full(3, 0.5))
        with monkeypatch.context() as patch:
            patch.setattr(hmc_module, "random_normal_and_uniform", lambda *args: draw)
            _, info = kernel.step(jax.random.key(0), asymmetric_energy, PARAMS, state)
        rate = info.acceptance_rate
        return jnp.log(rate) - hamiltonian(position, momentum), rate, info.energy_error

    position, momentum = random_points(200)
    forward_and_back = jax.jit(jax.vmap(log_flow))
    forward, rate, error = forward_and_back(position, momentum)
    end, end_momentum = jax.jit(jax.vmap(lambda x, xi: flow(x, xi, 0.35, 4, inverse_mass)))(
        position, momentum
    )
    backward, rate_back, error_back = forward_and_back(end, -end_momentum)
    # Of each pair one direction is certain and the other is not, so both branches are tested.
    assert np.all((rate == 1.0) | (rate_back == 1.0))
    usual = np.asarray((rate > 1e-200) & (rate_back > 1e-200) & (rate + rate_back < 2.0))
    assert usual.mean() > 0.8
    np.testing.assert_allclose(error[usual], -error_back[usual], atol=1e-8)
    return np.abs(forward - backward)[usual].max()


@each_metric
def test_detailed_balance(monkeypatch, x64, inverse_mass):
    assert balance_error(monkeypatch, inverse_mass) < 1e-8


def test_the_check_sees_a_kinetic_energy_left_out(monkeypatch, x64):
    monkeypatch.setattr(hmc_module, "inner_product", lambda a, b: jnp.zeros(()))
    assert balance_error(monkeypatch) > 1e-2


def test_acceptance_happens_as_often_as_it_says():
    kernel = hmc(step_size=0.8, num_steps=3)
    state = kernel.init(asymmetric_energy, PARAMS, jnp.array([1.0, -1.5]))
    keys = jax.random.split(jax.random.key(0), 20_000)
    step = jax.jit(jax.vmap(lambda k: kernel.step(k, asymmetric_energy, PARAMS, state)))
    new, info = step(keys)
    rate = np.asarray(info.acceptance_rate, np.float64)
    assert 0.05 < rate.mean() < 0.95
    z = (info.is_accepted.sum() - rate.sum()) / np.sqrt((rate * (1.0 - rate)).sum())
    assert abs(z) < 5.0
    moved = np.any(np.asarray(new.position) != np.asarray(state.position), axis=-1)
    np.testing.assert_array_equal(moved, info.is_accepted)


@pytest.mark.parametrize("random_length", [False, True])
def test_the_state_caches_what_it_says(random_length):
    kernel = hmc(step_size=0.3, num_steps=4, random_length=random_length, jitter=0.2)
    state = kernel.init(asymmetric_energy, PARAMS, jnp.array([1.0, -1.5]))
    state, info = run_chain(jax.random.key(0), kernel, asymmetric_energy, PARAMS, state, 20)
    energy, gradient = jax.value_and_grad(asymmetric_energy, 1)(PARAMS, state.position)
    np.testing.assert_allclose(state.energy, energy, rtol=1e-5)
    np.testing.assert_allclose(state.gradient, gradient, rtol=1e-5)
    assert 0.0 < info.acceptance_rate <= 1.0


def test_a_mass_is_a_change_of_coordinates(x64):
    """With M⁻¹ = F F', x from E is F y with y from E(F y) and the identity, chain by chain."""
    factor = np.linalg.cholesky(DENSE)
    straight = lambda params, y: asymmetric_energy(params, factor @ y)  # noqa: E731
    options = {"step_size": 0.5, "num_steps": 4, "jitter": 0.3}

    def end(kernel, energy_fn, start):
        state = kernel.init(energy_fn, PARAMS, start)
        return run_chain(jax.random.key(0), kernel, energy_fn, PARAMS, state, 30)

    start = jnp.array([0.3, -0.8])
    state, info = end(hmc(inverse_mass=DENSE, **options), asymmetric_energy, factor @ start)
    other, other_info = end(hmc(**options), straight, start)
    np.testing.assert_allclose(state.position, factor @ other.position, rtol=1e-8)
    assert info.is_accepted == other_info.is_accepted
    assert 0.0 < info.is_accepted < 1.0


KNOWN_LAWS = {
    # A step large enough that the Metropolis test has work to do.
    "double_well": (lambda: targets.double_well(tilt=0.8, quadratic=2.0), 0.5),
    "banana": (lambda: targets.banana(curvature=0.3, scale=1.5), 0.7),
}
VARIANTS = {
    "plain": {},
    "jitter": {"jitter": 0.4},
    "random_length": {"random_length": True},
    "dense": {"inverse_mass": DENSE},
}
NUM_CHAINS = 20_000


def moment_z_scores(name, options, num_steps=5):
    """Exact draws, a few transitions: the ends must be exact draws again."""
    build, step_size = KNOWN_LAWS[name]
    target = build()
    kernel = hmc(step_size=step_size, num_steps=4, **options)

    @jax.jit
    @jax.vmap
    def end(key):
        start_key, chain_key = jax.random.split(key)
        state = kernel.init(target.energy, (), target.sample(start_key))
        state, info = run_chain(chain_key, kernel, target.energy, (), state, num_steps)
        return state.position, info

    ends, info = end(jax.random.split(jax.random.key(0), NUM_CHAINS))
    assert 0.3 < info.is_accepted.mean() < 0.99
    centred = np.asarray(ends, np.float64) - np.asarray(target.moments.mean)
    squares, variance = centred**2, np.diag(target.moments.covariance)
    products = centred.prod(1)  # no correlation in either law
    z = np.concatenate(
        [
            centred.mean(0) / np.sqrt(variance / NUM_CHAINS),
            (squares.mean(0) - variance) / np.sqrt(squares.var(0) / NUM_CHAINS),
            [products.mean() / np.sqrt(products.var() / NUM_CHAINS)],
        ]
    )
    return np.abs(z)


@pytest.mark.parametrize(
    ("name", "variant"),
    [
        pytest.param(
            name,
            variant,
            marks=pytest.mark.slow if (name, variant == "plain") == ("double_well", False) else (),
        )
        for name in KNOWN_LAWS
        for variant in VARIANTS
    ],
)
def test_known_laws_are_invariant(name, variant):
    assert moment_z_scores(name, VARIANTS[variant]).max() < 5.0


@pytest.mark.parametrize("name", ["double_well", pytest.param("banana", marks=pytest.mark.slow)])
def test_the_invariance_check_sees_a_kinetic_energy_left_out(monkeypatch, name):
    monkeypatch.setattr(hmc_module, "inner_product", lambda a, b: jnp.zeros(()))
    assert moment_z_scores(name, {}).max() > 5.0


def test_jitter_scales_the_step(monkeypatch, x64):
    state = hmc(step_size=1.0, num_steps=1).init(asymmetric_energy, PARAMS, jnp.array([0.9, -1.3]))
    for uniform, scale in ((0.0, 0.6), (0.5, 1.0), (1.0, 1.4)):
        draw = (jnp.array([0.4, 1.1]), jnp.array([0.5, uniform, 0.5]))
        monkeypatch.setattr(hmc_module, "random_normal_and_uniform", lambda *a, draw=draw: draw)
        ends = [
            kernel.step(jax.random.key(0), asymmetric_energy, PARAMS, state)[1].energy_error
            for kernel in (
                hmc(step_size=0.2, num_steps=3, jitter=0.4),
                hmc(step_size=0.2 * scale, num_steps=3),
            )
        ]
        np.testing.assert_allclose(*ends, rtol=1e-9)


def test_random_length_is_uniform_and_says_so():
    kernel = hmc(step_size=0.2, num_steps=5, random_length=True)
    assert kernel.num_evaluations is None
    state = kernel.init(asymmetric_energy, PARAMS, jnp.array([0.9, -1.3]))
    step = jax.jit(lambda key: kernel.step(key, asymmetric_energy, PARAMS, state))
    keys = jax.random.split(jax.random.key(0), 10_000)
    new, info = jax.vmap(step)(keys)
    counts = np.bincount(info.num_evaluations, minlength=6)
    assert counts[0] == 0
    z = (counts[1:] - 2000) / math.sqrt(10_000 * 0.2 * 0.8)
    assert np.abs(z).max() < 5.0
    # Chains of other lengths beside it do not change where one goes.
    for i in range(5):
        alone, _ = step(keys[i])
        np.testing.assert_allclose(new.position[i], alone.position, rtol=1e-5)
    assert hmc(step_size=0.2, num_steps=5).num_evaluations == 5


@jax.jit
@functools.partial(jax.vmap, in_axes=(0, None))
def walk_at_a_wall(key, outside):
    """The exponential law, with a wall at 0: E = x inside, infinite or undefined outside."""
    wall = lambda params, x: jnp.where(x > 0.0, x, params)  # noqa: E731
    kernel = hmc(step_size=0.4, num_steps=3)
    start_key, chain_key = jax.random.split(key)
    state = kernel.init(wall, outside, jax.random.exponential(start_key))

    def body(state, key):
        state, info = kernel.step(key, wall, outside, state)
        return state, (state.position, info)

    return jax.lax.scan(body, state, jax.random.split(chain_key, 10))[1]


@pytest.mark.parametrize("outside", [jnp.inf, jnp.nan], ids=str)
def test_what_is_not_finite_is_rejected_and_flagged(outside):
    num_chains = 10_000
    keys = jax.random.split(jax.random.key(0), num_chains)
    positions, info = walk_at_a_wall(keys, jnp.float32(outside))
    assert np.all(positions > 0.0)
    assert not np.all(info.is_finite)
    assert not np.any(info.is_accepted & ~info.is_finite)
    assert np.all(info.acceptance_rate[~info.is_finite] == 0.0)
    assert np.all(info.is_divergent == ~info.is_finite)
    assert np.all(np.isfinite(info.energy))
    assert abs(positions[:, -1].mean() - 1.0) * math.sqrt(num_chains) < 5.0


def test_a_large_step_diverges():
    quartic = lambda params, x: jnp.sum(x**4)  # noqa: E731
    kernel = hmc(step_size=3.0, num_steps=2)
    state = kernel.init(quartic, (), jnp.ones(2))
    new, info = kernel.step(jax.random.key(0), quartic, (), state)
    assert info.is_divergent
    assert not info.is_accepted
    np.testing.assert_array_equal(new.position, state.position)


def test_a_start_without_an_energy_is_flagged():
    start = jnp.array(2.0)
    hole = lambda params, x: jnp.where(x == start, jnp.nan, 0.5 * x**2)  # noqa: E731
    kernel = hmc(step_size=0.1, num_steps=2)
    state = kernel.init(hole, (), start)
    new, info = kernel.step(jax.random.key(0), hole, (), state)
    assert not info.is_finite
    assert not info.is_accepted
    assert info.acceptance_rate == 0.0
    assert new.position == start


def test_a_start_of_infinite_energy_walks_in():
    wall = lambda params, x: jnp.where(x > 0.0, 0.5 * x**2, jnp.inf)  # noqa: E731
    kernel = hmc(step_size=0.5, num_steps=3)
    state = kernel.init(wall, (), jnp.array(-0.1))
    state, _ = run_chain(jax.random.key(0), kernel, wall, (), state, 50)
    assert state.position > 0.0
    assert np.isfinite(state.energy)


def test_gradients_flow_through_a_chain(x64):
    """Of the end, with respect to the energy's parameter and the step size."""

    def end(params, step_size):
        kernel = hmc(step_size=step_size, num_steps=3)
        state = kernel.init(asymmetric_energy, params, jnp.array([0.3, -0.8]))
        state, info = run_chain(jax.random.key(1), kernel, asymmetric_energy, params, state, 4)
        return state.position.sum(), info.is_accepted

    end = jax.jit(end)
    gradient = jax.jit(jax.grad(end, (0, 1), has_aux=True))(PARAMS, 0.2)[0]
    for index, small in enumerate(1e-5 * np.eye(2)):
        (above, rate), (below, _) = (end(*(np.array([PARAMS, 0.2]) + s * small)) for s in (1, -1))
        assert rate > 0.0
        np.testing.assert_allclose(gradient[index], (above - below) / 2e-5, rtol=1e-6)


def test_inner_products(x64):
    """All at once equals one at a time, on trees and scalars, also under vmap."""
    shapes = {"a": (5, 2, 3), "b": (5,)}
    trees = [
        {name: jax.random.normal(jax.random.key(i), shape) for name, shape in shapes.items()}
        for i in range(3)
    ]

    def both(u, v, w):
        pairs = ((u, v), (v, w), (w, w))
        return jnp.stack(inner_products(*pairs)), jnp.stack([inner_product(*p) for p in pairs])

    np.testing.assert_allclose(*jax.vmap(both)(*trees), rtol=1e-13)
    first, second = ([tree["a"].reshape(5, 6), tree["b"][:, None]] for tree in trees[:2])
    exact = np.sum(np.hstack(first) * np.hstack(second), axis=-1)
    np.testing.assert_allclose(jax.vmap(both)(*trees)[0][:, 0], exact, rtol=1e-13)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"step_size": -0.1, "num_steps": 1}, "step_size is -0.1"),
        ({"step_size": 0.1, "num_steps": 0}, "num_steps is 0"),
        ({"step_size": 0.1, "num_steps": 1.5}, "num_steps is 1.5"),
        ({"step_size": 0.1, "num_steps": 1, "jitter": 1.0}, "jitter is 1.0"),
        ({"step_size": 0.1, "num_steps": 1, "jitter": -0.1}, "jitter is -0.1"),
        ({"step_size": 0.1, "num_steps": 1, "inverse_mass": 2.0}, r"inverse_mass has shape \(\)"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(ValueError, match=message):
        hmc(**options)

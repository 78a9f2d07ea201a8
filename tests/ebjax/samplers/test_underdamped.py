"""Underdamped Langevin: its flows, the order of its errors, and the exactness of its test."""

import functools
import importlib
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg

from ebjax.energies import targets
from ebjax.samplers import langevin, mala, run_chain
from ebjax.samplers.underdamped import SPLITTINGS, underdamped

# The package exports the function of the same name, which hides the module.
underdamped_module = importlib.import_module("ebjax.samplers.underdamped")
langevin_module = importlib.import_module("ebjax.samplers.langevin")
mala_module = importlib.import_module("ebjax.samplers.mala")

each_splitting = pytest.mark.parametrize("splitting", SPLITTINGS)
METRICS = {
    "identity": None,
    "diagonal": np.array([0.6, 2.0]),
    "dense": np.array([[0.4, -0.5], [-0.5, 1.9]]),
}
STEP_SIZE, FRICTION, TEMPERATURE = 0.45, 1.3, 1.7


def asymmetric_energy(params, x):
    return jnp.sum(0.25 * x**4 - 0.5 * x**2 + 0.6 * x) + params * x[0] * x[1]


def dense(inverse_mass):
    inverse_mass = np.eye(2) if inverse_mass is None else inverse_mass
    return np.diag(inverse_mass) if inverse_mass.ndim == 1 else inverse_mass


def noisy_step(monkeypatch, kernel, energy_fn, params, state, noise, uniform=0.0):
    """The library's step under given noise: one vector for BAOAB, two for OBABO."""

    def draw(key, tree):
        given = noise if isinstance(tree, tuple) else noise[0]
        return given, jnp.array([uniform])

    with monkeypatch.context() as patch:
        patch.setattr(underdamped_module, "random_normal_and_uniform", draw)
        return kernel.step(jax.random.key(0), energy_fn, params, state)


def at(kernel, energy_fn, params, position, momentum):
    return kernel.init(energy_fn, params, position)._replace(momentum=momentum)


def flows(splitting, x, p, noise, inverse_mass):
    """The step as the composition of its flows, written apart. Returns also the change Δ."""
    noise = list(noise)
    energy = lambda x, p: asymmetric_energy(0.4, x) + 0.5 * p @ inverse_mass @ p  # noqa: E731
    root = np.linalg.inv(np.linalg.cholesky(inverse_mass)).T
    change = 0.0
    for letter in splitting:
        time = STEP_SIZE / splitting.count(letter)
        before = energy(x, p)
        if letter == "A":
            x = x + time * inverse_mass @ p
        elif letter == "B":
            p = p - time * jax.grad(asymmetric_energy, 1)(0.4, x)
        else:
            keep = math.exp(-FRICTION * time)
            p = keep * p + math.sqrt(TEMPERATURE * (1 - keep**2)) * root @ noise.pop(0)
            before = energy(x, p)
        change = change + energy(x, p) - before
    return x, p, change


@each_splitting
@pytest.mark.parametrize("metric", METRICS)
def test_a_step_is_the_composition_of_its_flows(monkeypatch, x64, splitting, metric):
    kernel = underdamped(
        step_size=STEP_SIZE,
        friction=FRICTION,
        temperature=TEMPERATURE,
        inverse_mass=METRICS[metric],
        splitting=splitting,
    )

    def compare(x, p, *noise):
        state = at(kernel, asymmetric_energy, 0.4, x, p)
        new, info = noisy_step(monkeypatch, kernel, asymmetric_energy, 0.4, state, noise)
        x, p, change = flows(splitting, x, p, noise, dense(METRICS[metric]))
        rate = jnp.minimum(1.0, jnp.exp(-change / TEMPERATURE))
        energy, gradient = jax.value_and_grad(asymmetric_energy, 1)(0.4, x)
        expected = (x, p, energy, gradient, rate)
        ours = (new.position, new.momentum, new.energy, new.gradient, info.acceptance_rate)
        return jax.tree.map(lambda a, b: jnp.abs(a - b).max(), expected, ours)

    points = jax.random.normal(jax.random.key(0), (4, 50, 2))
    assert max(np.max(error) for error in jax.jit(jax.vmap(compare))(*points)) < 1e-12


# A Gaussian: the step is affine, and its stationary law solves a Lyapunov equation.

COUPLED = np.array([[2.0, 0.6], [0.6, 0.5]])


def stationary_covariance(monkeypatch, kernel, precision):
    """Exact covariance [2D, 2D] of (x, p), from the library's step."""
    dim = len(precision)
    energy_fn = lambda _, x: 0.5 * x @ precision @ x  # noqa: E731

    def end(xp, noise):
        state = at(kernel, energy_fn, (), xp[:dim], xp[dim:])
        noise = (noise[:dim], noise[dim:])
        new, _ = noisy_step(monkeypatch, kernel, energy_fn, (), state, noise)
        return jnp.append(new.position, new.momentum)

    drift, noise = jax.jit(jax.jacobian(end, (0, 1)))(jnp.zeros(2 * dim), jnp.zeros(2 * dim))
    drift, noise = np.asarray(drift), np.asarray(noise)
    assert np.abs(np.linalg.eigvals(drift)).max() < 1.0
    return scipy.linalg.solve_discrete_lyapunov(drift, noise @ noise.T)


@pytest.mark.parametrize("friction", [0.3, 2.0, math.inf])
@pytest.mark.parametrize("step_size", [0.1, 0.8])
def test_laws_on_a_gaussian_in_closed_form(monkeypatch, x64, friction, step_size):
    precision, temperature = 2.5, TEMPERATURE
    options = {"step_size": step_size, "friction": friction, "temperature": temperature}
    shrink = 1.0 - precision * step_size**2 / 4.0
    variances = {
        "BAOAB": (temperature / precision, temperature * shrink),
        "OBABO": (temperature / (precision * shrink), temperature),
    }
    for splitting, expected in variances.items():
        kernel = underdamped(**options, splitting=splitting)
        covariance = stationary_covariance(monkeypatch, kernel, np.array([[precision]]))
        np.testing.assert_allclose(covariance, np.diag(expected), rtol=1e-10, atol=1e-12)


@each_splitting
@pytest.mark.parametrize("metric", METRICS)
def test_the_law_is_right_to_second_order_under_any_metric(monkeypatch, x64, splitting, metric):
    """Of x and p together: positions of BAOAB alone would be exact."""
    inverse_mass = dense(METRICS[metric])
    truth = scipy.linalg.block_diag(np.linalg.inv(COUPLED), np.linalg.inv(inverse_mass))
    errors = []
    for step_size in (0.1, 0.05):
        options = {"step_size": step_size, "friction": FRICTION}
        kernel = underdamped(**options, inverse_mass=METRICS[metric], splitting=splitting)
        covariance = stationary_covariance(monkeypatch, kernel, COUPLED)
        errors.append(np.abs(covariance - truth).max())
        if splitting == "BAOAB":
            np.testing.assert_allclose(covariance[:2, :2], truth[:2, :2], atol=1e-10)
    assert abs(np.log2(errors[0] / errors[1]) - 2.0) < 0.05


# A law that is not Gaussian: E = a cos x + b sin 2x on a circle. The transition operator is built
# from the library's step in the basis e^{imx} He_n(p), which it nearly maps into itself; the
# moments of its stationary law then solve a linear system, with no sampling error.

NUM_WAVES, NUM_HERMITE, NUM_NODES = 9, 14, 24


def wavy_energy(params, x):
    return 0.9 * jnp.cos(x) + 0.5 * jnp.sin(2.0 * x)


def hermite_rule(num):
    """Nodes and weights of the mean under N(0, 1)."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(num)
    return nodes, weights / weights.sum()


def basis(x, p):
    """[..., waves, Hermite] e^{imx} He_n(p) / sqrt(n!)."""
    waves = np.exp(1j * np.arange(-NUM_WAVES, NUM_WAVES + 1) * x[..., None])
    hermite = np.polynomial.hermite_e.hermevander(p, NUM_HERMITE - 1)
    hermite = hermite / np.sqrt(np.cumprod(np.r_[1.0, np.arange(1.0, NUM_HERMITE)]))
    return (waves[..., :, None] * hermite[..., None, :]).reshape(*x.shape, -1)


def stationary_wave(step, num_noises):
    """E[e^{ix}] under the stationary law of ``step(x, p, noise_1, ..) -> (x, p)``."""
    num_x = 2 * NUM_WAVES + 10
    x = 2.0 * np.pi * np.arange(num_x) / num_x
    p, p_weights = hermite_rule(NUM_NODES)
    xi, xi_weights = hermite_rule(8)
    grids = np.meshgrid(p, *[xi] * num_noises, indexing="ij")
    noise_weights = np.array(1.0)
    for _ in range(num_noises):
        noise_weights = np.multiply.outer(noise_weights, xi_weights)
    step = jax.jit(jax.vmap(step))
    operator = 0.0
    for x_node in x:
        flat = [np.ravel(grid) for grid in grids]
        new_x, new_p = (np.asarray(v) for v in step(np.full_like(flat[0], x_node), *flat))
        shape = grids[0].shape
        ends = basis(new_x.reshape(NUM_NODES, -1), new_p.reshape(NUM_NODES, -1))
        expected = np.einsum("kla,l->ka", ends, noise_weights.ravel())
        starts = basis(np.full(NUM_NODES, x_node), p).conj() * p_weights[:, None]
        operator = operator + expected.T @ starts / num_x
        assert shape[0] == NUM_NODES
    # μ_a = Σ_b operator_ab μ_b with the moment of the constant equal to 1.
    constant = NUM_WAVES * NUM_HERMITE
    system = np.eye(len(operator)) - operator
    rest = np.delete(np.arange(len(operator)), constant)
    moments = np.linalg.solve(system[np.ix_(rest, rest)], -system[rest, constant])
    return np.insert(moments, constant, 1.0)[(NUM_WAVES + 1) * NUM_HERMITE]


def true_wave():
    x = 2.0 * np.pi * np.arange(200) / 200
    density = np.exp(-np.asarray(wavy_energy((), x)))
    return (density * np.exp(1j * x)).sum() / density.sum()


def underdamped_wave_step(monkeypatch, splitting, step_size):
    kernel = underdamped(step_size=step_size, friction=FRICTION, splitting=splitting)

    def step(x, p, *noise):
        state = at(kernel, wavy_energy, (), x, p)
        new, _ = noisy_step(monkeypatch, kernel, wavy_energy, (), state, noise)
        return new.position, new.momentum

    return step, {"BAOAB": 1, "OBABO": 2}[splitting]


def langevin_wave_step(monkeypatch, step_size):
    kernel = langevin(step_size=step_size)

    def step(x, p, noise):
        with monkeypatch.context() as patch:
            patch.setattr(langevin_module, "random_normal_like", lambda key, tree: noise)
            state = kernel.init(wavy_energy, (), x)
            # The momentum plays no part; a fresh one keeps the moments defined.
            return kernel.step(jax.random.key(0), wavy_energy, (), state)[0].position, 0.0 * p

    return step, 1


def order(monkeypatch, build, step_sizes):
    errors = [abs(stationary_wave(*build(monkeypatch, h)) - true_wave()) for h in step_sizes]
    return np.log2(errors[0] / errors[1]), errors


@each_splitting
def test_positions_are_right_to_second_order(monkeypatch, x64, splitting):
    build = lambda patch, h: underdamped_wave_step(patch, splitting, h)  # noqa: E731
    found, errors = order(monkeypatch, build, (0.4, 0.2))
    assert errors[1] > 1e-7  # far above the error of the basis
    assert abs(found - 2.0) < 0.2


def test_overdamped_langevin_is_right_to_first_order(monkeypatch, x64):
    """The order is found, not assumed."""
    found, errors = order(monkeypatch, langevin_wave_step, (0.1, 0.05))
    assert errors[1] > 1e-4
    assert abs(found - 1.0) < 0.2


def test_friction_by_a_step_of_euler_is_right_to_first_order(monkeypatch, x64):
    def euler(metric, p, noise, decay, temperature):
        return (1.0 - decay) * p + jnp.sqrt(2.0 * decay * temperature) * noise

    monkeypatch.setattr(underdamped_module, "_refresh", euler)
    build = lambda patch, h: underdamped_wave_step(patch, "BAOAB", h)  # noqa: E731
    found, _ = order(monkeypatch, build, (0.2, 0.1))
    assert abs(found - 1.0) < 0.3


# The Metropolis test.


def backwards(splitting, x, p, noise, inverse_mass):
    """The path that leads from the end of a step, reversed, to its start, reversed."""
    noise = list(noise)
    root = np.linalg.inv(np.linalg.cholesky(inverse_mass)).T
    reverse_noise = []
    for letter in splitting:
        time = STEP_SIZE / splitting.count(letter)
        if letter == "A":
            x = x + time * inverse_mass @ p
        elif letter == "B":
            p = p - time * jax.grad(asymmetric_energy, 1)(0.4, x)
        else:
            keep = math.exp(-FRICTION * time)
            scale = math.sqrt(TEMPERATURE * (1 - keep**2))
            before, p = p, keep * p + scale * root @ noise.pop(0)
            reverse_noise.insert(0, jnp.linalg.solve(root, keep * p - before) / scale)
    return x, -p, reverse_noise


def balance_error(monkeypatch, splitting, metric, *, num_pairs=100):
    """Largest |log of π(z) φ(ξ) a(z, ξ) / π(z') φ(ξ') a(z', ξ')| between paths and their reverses.

    Also checked: reverses are what they are taken for, and keep volume.
    """
    inverse_mass = dense(METRICS[metric])
    num_noises = splitting.count("O")
    kernel = underdamped(
        step_size=STEP_SIZE,
        friction=FRICTION,
        temperature=TEMPERATURE,
        inverse_mass=METRICS[metric],
        splitting=splitting,
        metropolis=True,
    )

    def log_flow(x, p, noise):
        state = at(kernel, asymmetric_energy, 0.4, x, p)
        new, info = noisy_step(monkeypatch, kernel, asymmetric_energy, 0.4, state, noise)
        log_pi = -(asymmetric_energy(0.4, x) + 0.5 * p @ inverse_mass @ p) / TEMPERATURE
        log_phi = -0.5 * sum(jnp.sum(xi**2) for xi in noise)
        return log_pi + log_phi + jnp.log(info.acceptance_rate), new, info.acceptance_rate

    def compare(x, p, *noise):
        forward, new, rate = log_flow(x, p, noise)
        end_x, end_p, reverse_noise = backwards(splitting, x, p, noise, inverse_mass)
        backward, old, rate_back = log_flow(end_x, end_p, reverse_noise)
        miss = jnp.array([new.position - end_x, new.momentum + end_p, old.position - x])
        miss = jnp.abs(jnp.append(miss, old.momentum + p)).max()
        volume = jnp.linalg.slogdet(
            jax.jacobian(reverse)(jnp.stack([x, p, *noise])).reshape(2 * (2 + num_noises), -1)
        )[1]
        return forward - backward, miss, volume, rate, rate_back

    def reverse(path):
        x, p, noise = backwards(splitting, path[0], path[1], path[2:], inverse_mass)
        return jnp.stack([x, p, *noise])

    points = jax.random.normal(jax.random.key(1), (2 + num_noises, num_pairs, 2)) * 1.1
    error, miss, volume, rate, rate_back = jax.jit(jax.vmap(compare))(*points)
    assert miss.max() < 1e-12
    assert np.abs(volume).max() < 1e-10
    assert np.all((rate == 1.0) | (rate_back == 1.0))
    assert np.mean((rate < 1.0) | (rate_back < 1.0)) > 0.9
    return np.abs(error).max()


@each_splitting
@pytest.mark.parametrize("metric", [pytest.param("identity", marks=pytest.mark.slow), "dense"])
def test_every_path_balances_its_reverse(monkeypatch, x64, splitting, metric):
    assert balance_error(monkeypatch, splitting, metric) < 1e-10


@each_splitting
def test_the_check_sees_kinetic_energy_left_out(monkeypatch, x64, splitting):
    monkeypatch.setattr(underdamped_module, "_kick_work", lambda *_: 0.0)
    assert balance_error(monkeypatch, splitting, "dense") > 1e-2


@each_splitting
def test_a_refusal_reverses_the_momentum(monkeypatch, x64, splitting):
    options = {"step_size": 2.0, "friction": FRICTION, "splitting": splitting}
    kernel = underdamped(**options, metropolis=True)
    x, p = jnp.array([1.0, -1.5]), jnp.array([2.0, 0.7])
    noise = (jnp.array([0.3, -0.4]), jnp.array([-1.0, 0.8]))
    state = at(kernel, asymmetric_energy, 0.4, x, p)
    draw = [monkeypatch, kernel, asymmetric_energy, 0.4, state, noise]
    new, info = noisy_step(*draw, uniform=1.0)
    assert not info.is_accepted
    assert 0.0 <= info.acceptance_rate < 1.0
    if splitting == "BAOAB":
        expected = -p
    else:
        keep = math.exp(-FRICTION)
        scale = math.sqrt(1.0 - keep**2)
        expected = -keep * (keep * p + scale * noise[0]) + scale * noise[1]
    np.testing.assert_array_equal(new.position, x)
    np.testing.assert_allclose(new.momentum, expected, rtol=1e-13)


@pytest.mark.parametrize("metric", METRICS)
def test_with_infinite_friction_it_is_mala(monkeypatch, x64, metric):
    options = {"temperature": TEMPERATURE, "inverse_mass": METRICS[metric]}
    ours = underdamped(
        step_size=0.9, friction=math.inf, splitting="OBABO", metropolis=True, **options
    )
    theirs = mala(step_size=0.9**2 / 2.0, **options)
    x, noise = jnp.array([1.0, -1.5]), jnp.array([0.3, 0.6])
    state = at(ours, asymmetric_energy, 0.4, x, jnp.array([50.0, -70.0]))
    draw = [monkeypatch, ours, asymmetric_energy, 0.4, state, (noise, noise)]
    new, info = noisy_step(*draw)
    with monkeypatch.context() as patch:
        draw = (noise, jnp.array([0.0]))
        patch.setattr(mala_module, "random_normal_and_uniform", lambda key, tree: draw)
        state = theirs.init(asymmetric_energy, 0.4, x)
        expected, expected_info = theirs.step(jax.random.key(0), asymmetric_energy, 0.4, state)
    np.testing.assert_allclose(new.position, expected.position, rtol=1e-13)
    np.testing.assert_allclose(info.acceptance_rate, expected_info.acceptance_rate, rtol=1e-12)


each_splitting_mostly = pytest.mark.parametrize(
    "splitting", ["BAOAB", pytest.param("OBABO", marks=pytest.mark.slow)]
)
NUM_CHAINS, NUM_STEPS = 20_000, 25


def moment_z_scores(splitting, *, metropolis=True):
    """Exact draws of x and p, 25 steps: the ends must be exact draws again."""
    target = targets.double_well(tilt=0.8, quadratic=2.0)
    kernel = underdamped(step_size=0.5, friction=0.5, splitting=splitting, metropolis=metropolis)

    @jax.jit
    @jax.vmap
    def end(key):
        start_key, momentum_key, chain_key = jax.random.split(key, 3)
        start = target.sample(start_key)
        momentum = jax.random.normal(momentum_key, start.shape)
        state = at(kernel, target.energy, (), start, momentum)
        state, info = run_chain(chain_key, kernel, target.energy, (), state, NUM_STEPS)
        return state.position, state.momentum, info.acceptance_rate

    ends, momenta, rate = end(jax.random.split(jax.random.key(0), NUM_CHAINS))
    assert not metropolis or 0.3 < rate.mean() < 0.9
    centred = np.asarray(ends, np.float64) - np.asarray(target.moments.mean)
    laws = [(centred, np.diag(target.moments.covariance)), (np.asarray(momenta, np.float64), 1.0)]
    scores = []
    for values, variance in laws:
        squares = values**2
        scores.append(values.mean(0) / np.sqrt(variance / NUM_CHAINS))
        scores.append((squares.mean(0) - variance) / np.sqrt(squares.var(0) / NUM_CHAINS))
    return np.abs(np.concatenate(scores))


@each_splitting
def test_a_known_law_is_invariant_under_the_test(splitting):
    assert moment_z_scores(splitting).max() < 5.0


@each_splitting_mostly
def test_the_invariance_check_sees_a_refusal_without_reversal(monkeypatch, splitting):
    monkeypatch.setattr(underdamped_module, "_reverse", lambda state: state)
    assert moment_z_scores(splitting).max() > 5.0


@each_splitting_mostly
def test_the_invariance_check_sees_the_test_left_out(splitting):
    # Some chains fly off, and their components have no moments at all.
    assert np.nanmax(moment_z_scores(splitting, metropolis=False)) > 5.0


@functools.partial(jax.jit, static_argnames="splitting")
def walk_at_a_wall(keys, outside, *, splitting):
    """The exponential law, with a wall at 0: E = x inside, infinite or undefined outside."""
    wall = lambda params, x: jnp.where(x > 0.0, x, params)  # noqa: E731
    kernel = underdamped(step_size=0.7, friction=1.0, splitting=splitting, metropolis=True)

    def walk(key):
        start_key, momentum_key, chain_key = jax.random.split(key, 3)
        start, momentum = jax.random.exponential(start_key), jax.random.normal(momentum_key)
        state = at(kernel, wall, outside, start, momentum)

        def body(state, key):
            state, info = kernel.step(key, wall, outside, state)
            return state, (state.position, info)

        return jax.lax.scan(body, state, jax.random.split(chain_key, 10))[1]

    return jax.vmap(walk)(keys)


@each_splitting
@pytest.mark.parametrize("outside", [jnp.inf, jnp.nan], ids=str)
def test_what_is_not_finite_is_refused_and_flagged(splitting, outside):
    num_chains = 10_000
    keys = jax.random.split(jax.random.key(0), num_chains)
    positions, info = walk_at_a_wall(keys, jnp.float32(outside), splitting=splitting)
    assert np.all(positions > 0.0)
    assert not np.all(info.is_finite)
    assert not np.any(info.is_accepted & ~info.is_finite)
    assert np.all(np.isfinite(info.energy))
    assert abs(positions[:, -1].mean() - 1.0) * math.sqrt(num_chains) < 5.0


def test_without_a_test_what_is_not_finite_is_flagged():
    kernel = underdamped(step_size=0.7, friction=1.0)
    hole = lambda params, x: jnp.where(x > 0.0, jnp.nan, x)  # noqa: E731
    state = at(kernel, hole, (), jnp.array(-0.1), jnp.array(3.0))
    _, info = jax.jit(lambda key: kernel.step(key, hole, (), state))(jax.random.key(0))
    assert not info.is_finite
    assert info.acceptance_rate == 0.0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"step_size": 0.0}, "step_size is 0.0"),
        ({"friction": 0.0}, "friction is 0.0"),
        ({"temperature": 0.0}, "temperature is 0.0"),
        ({"splitting": "ABOBA"}, "splitting is 'ABOBA'"),
        ({"inverse_mass": np.ones((2, 3))}, r"shape \(2, 3\)"),
    ],
)
def test_options_out_of_range_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        underdamped(**{"step_size": 0.1, "friction": 1.0, **options})

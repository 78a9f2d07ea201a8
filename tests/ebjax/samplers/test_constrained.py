"""Domains: maps to the last digit, folded kernels in exact balance, known laws on each domain."""

import functools
import importlib
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
import scipy.stats

from ebjax.samplers import langevin, mala, run_chain, sample
from ebjax.samplers.constrained import (
    box,
    folded,
    folded_energy,
    projected_langevin,
    reals,
    simplex,
    torus,
    unconstrain,
)
from ebjax.samplers.random_walk import random_walk
from ebjax.samplers.underdamped import underdamped

constrained_module = importlib.import_module("ebjax.samplers.constrained")
mala_module = importlib.import_module("ebjax.samplers.mala")

# Domains.

INFINITY = math.inf
BOXES = {
    "interval": (-1.0, 0.5),
    "above": (0.25, INFINITY),
    "below": (-INFINITY, 0.75),
    "free": (-INFINITY, INFINITY),
}
each_box = pytest.mark.parametrize("name", BOXES)


@each_box
def test_fold_of_a_box_mirrors_at_its_walls(x64, name):
    low, high = BOXES[name]
    domain = box(low, high)
    x = np.linspace(-9.0, 9.0, 1001)
    fold = jax.jit(domain.fold)
    folds = fold(x)
    assert np.all((folds >= low) & (folds <= high))
    inside = np.asarray((x >= low) & (x <= high))
    np.testing.assert_array_equal(folds[inside], x[inside])
    for wall in (low, high):
        if math.isfinite(wall):
            np.testing.assert_allclose(fold(2.0 * wall - x), folds, atol=1e-13)
    slopes = np.asarray(jax.jit(jax.vmap(jax.grad(domain.fold)))(x))
    np.testing.assert_array_equal(np.abs(slopes), 1.0)
    np.testing.assert_array_equal(slopes[inside], 1.0)


def test_bounds_may_differ_between_components(x64):
    low, high = np.array(list(BOXES.values())).T
    domain = box(low, high)
    for x in (jnp.array([3.0, -2.0, 1.3, 4.0]), jnp.array([-0.3, 0.5, -2.0, 0.0])):
        for function in ("fold", "project"):
            each = [getattr(box(a, b), function)(v) for a, b, v in zip(low, high, x, strict=True)]
            np.testing.assert_allclose(getattr(domain, function)(x), jnp.stack(each), rtol=1e-14)


def test_fold_of_a_torus_wraps():
    domain = torus(jnp.array([1.0, 3.0]))
    np.testing.assert_allclose(domain.fold(jnp.array([-0.25, 7.5])), [0.75, 1.5])
    assert torus(1.0).fold(jnp.float32(-1e-12)) < 1.0


def test_projection_onto_the_simplex_is_the_nearest_point(x64):
    """By its conditions: x - x' is one number on the support and at most that off it."""
    x = 2.0 * jax.random.normal(jax.random.key(0), (200, 5))
    nearest = simplex().project(x)
    np.testing.assert_allclose(nearest.sum(-1), 1.0, rtol=1e-12)
    assert np.all(nearest >= 0.0)
    shift = np.where(nearest > 0.0, x - nearest, -np.inf).max(-1, keepdims=True)
    removed = np.asarray(x - nearest)
    np.testing.assert_allclose(np.where(nearest > 0.0, removed - shift, 0.0), 0.0, atol=1e-12)
    assert np.all(removed <= shift + 1e-12)
    np.testing.assert_allclose(simplex().project(nearest), nearest, atol=1e-14)


@pytest.mark.parametrize("name", [*BOXES, "mixed", "simplex"])
def test_maps_invert_and_tell_their_volume(x64, name):
    if name == "simplex":
        domain, size = simplex(), 4
    else:
        bounds = np.array(list(BOXES.values())).T if name == "mixed" else BOXES[name]
        domain, size = box(*bounds), 4
    y = 1.5 * jax.random.normal(jax.random.key(1), (20, size))
    x, log_volume = jax.jit(jax.vmap(domain.forward))(y)
    np.testing.assert_allclose(jax.jit(jax.vmap(domain.inverse))(x), y, rtol=1e-9, atol=1e-9)
    # On a simplex the volume is that of all components but the last.
    jacobian = jax.jit(jax.vmap(jax.jacobian(lambda v: domain.forward(v)[0][:size])))(y)
    expected = np.linalg.slogdet(np.asarray(jacobian))[1]
    np.testing.assert_allclose(log_volume, expected, rtol=1e-9, atol=1e-9)
    # Far out nothing is undefined.
    for far in (-50.0, 50.0):
        volume = jax.jit(jax.value_and_grad(lambda v: domain.forward(v)[1]))(jnp.full(size, far))
        assert all(np.all(np.isfinite(part)) for part in volume)


# Folded kernels: detailed balance, image by image.

STEP_SIZE, TEMPERATURE = 0.6, 1.4
FOLDING = {
    "box": (box(np.array([-1.0, 0.0]), np.array([1.0, 0.8])), [[-1.0, 0.0], [1.0, 0.8]]),
    "half": (box(np.array([-0.5, -np.inf]), np.array([np.inf, 0.7])), [[-0.5, -1.0], [1.0, 0.7]]),
    "torus": (torus(np.array([2.0, 1.0])), [[0.0, 0.0], [2.0, 1.0]]),
}


def tilted_energy(params, x):
    return params * jnp.sum(jnp.sin(x + 0.4) * x) + 0.8 * x[0] * jnp.cos(2.0 * x[1])


def balance_error(monkeypatch, name, *, num_pairs=200):
    """Largest |log of π(x) q(z|x) a / π(y) q(z'|y) a'|, y = fold(z), z' the mirror image of x.

    The images are disjoint ways from x to y, each balanced by its own way back, so that the sum
    over them is balanced.
    """
    domain, corners = FOLDING[name]
    inverse_mass = np.array([0.5, 1.6])
    kernel = folded(
        mala(step_size=STEP_SIZE, temperature=TEMPERATURE, inverse_mass=inverse_mass), domain
    )
    scale = np.sqrt(2.0 * STEP_SIZE * TEMPERATURE * inverse_mass)

    def log_flow(x, z):
        state = kernel.init(tilted_energy, 1.1, x)
        mean = x - STEP_SIZE * inverse_mass * jax.grad(tilted_energy, 1)(1.1, x)
        with monkeypatch.context() as patch:
            draw = ((z - mean) / scale, jnp.array([0.0]))
            patch.setattr(mala_module, "random_normal_and_uniform", lambda key, tree: draw)
            new, info = kernel.step(jax.random.key(0), tilted_energy, 1.1, state)
        log_pi = -tilted_energy(1.1, x) / TEMPERATURE
        log_q = jax.scipy.stats.norm.logpdf(z, mean, scale).sum()
        return log_pi + log_q + jnp.log(info.acceptance_rate), new, info.acceptance_rate

    def compare(x, z):
        y, sign = domain.fold(z), jax.grad(lambda v: domain.fold(v).sum())(z)
        forward, new, rate = log_flow(x, z)
        backward, old, rate_back = log_flow(y, y + sign * (x - z))
        gradient = jax.grad(tilted_energy, 1)(1.1, y)
        miss = [new.position - y, old.position - x, new.gradient - gradient]
        return forward - backward, jnp.abs(jnp.stack(miss)).max(), rate, rate_back

    keys = jax.random.split(jax.random.key(1))
    low, high = np.array(corners)
    x = jax.random.uniform(keys[0], (num_pairs, 2), minval=low, maxval=high)
    z = x + 1.5 * jax.random.normal(keys[1], x.shape)
    error, miss, rate, rate_back = jax.jit(jax.vmap(compare))(x, z)
    assert np.mean(domain.fold(z) != z) > 0.25
    assert np.mean((rate < 1.0) | (rate_back < 1.0)) > 0.5
    return np.abs(error).max(), miss.max()


@pytest.mark.parametrize("name", FOLDING)
def test_a_folded_kernel_balances_each_image(monkeypatch, x64, name):
    error, miss = balance_error(monkeypatch, name)
    assert error < 1e-10
    assert miss < 1e-10


def test_the_check_sees_a_gradient_that_is_not_turned(monkeypatch, x64):
    monkeypatch.setattr(
        constrained_module.jax, "linearize", lambda f, x: (f(x), lambda vector: vector)
    )
    _, miss = balance_error(monkeypatch, "box")
    assert miss > 1e-2


def test_the_check_sees_a_projection_in_the_place_of_the_fold(monkeypatch, x64):
    domain, corners = FOLDING["box"]
    planted = (domain._replace(fold=domain.project), corners)
    monkeypatch.setitem(FOLDING, "box", planted)
    error, miss = balance_error(monkeypatch, "box")
    assert max(error, miss) > 1e-2


# Known laws in one dimension: started from exact draws, the ends must be exact draws again.

NUM_CHAINS, NUM_STEPS = 20_000, 15
LAWS = {
    # A normal cut to [0, 1.5], pressed against its upper wall.
    "truncated_normal": (
        box(0.0, 1.5),
        (0.0, 1.5),
        lambda params, x: 0.5 * ((x - 1.3) / 0.7) ** 2,
        (lambda x: x, lambda x: x**2),
    ),
    "von_mises": (
        torus(),
        (0.0, 2.0 * math.pi),
        lambda params, x: -1.3 * jnp.cos(x - 0.5),
        (jnp.cos, jnp.sin, lambda x: jnp.sin(2.0 * x)),
    ),
}
KERNELS = {
    "mala": lambda: mala(step_size=0.3),
    "random_walk": lambda: random_walk(step_size=1.0),
    "underdamped": lambda: underdamped(step_size=0.9, friction=1.0, metropolis=True),
    "OBABO": lambda: underdamped(step_size=0.9, friction=1.0, metropolis=True, splitting="OBABO"),
}


def invariance_z_scores(kernel, law):
    _, (low, high), energy_fn, features = LAWS[law]
    grid = np.linspace(low, high, 20_001)
    density = np.exp(-np.asarray(energy_fn((), grid), np.float64))
    cdf = np.append(0.0, np.cumsum(0.5 * (density[1:] + density[:-1])))

    def end(key, start):
        momentum_key, chain_key = jax.random.split(key)
        state = kernel.init(energy_fn, (), start)
        if "momentum" in state._fields:
            state = state._replace(momentum=jax.random.normal(momentum_key))
        return run_chain(chain_key, kernel, energy_fn, (), state, NUM_STEPS)[0].position

    uniform = (np.random.default_rng(0).permutation(NUM_CHAINS) + 0.5) / NUM_CHAINS
    starts = jnp.float32(np.interp(uniform * cdf[-1], cdf, grid))
    ends = jax.jit(jax.vmap(end))(jax.random.split(jax.random.key(0), NUM_CHAINS), starts)
    assert np.all((ends >= low) & (ends <= high))
    weights = density / density.sum()
    scores = []
    for feature in features:
        expected = (weights * np.asarray(feature(grid))).sum()
        values = np.asarray(feature(ends), np.float64)
        scores.append(abs(values.mean() - expected) / values.std() * math.sqrt(NUM_CHAINS))
    return max(scores)


@pytest.mark.parametrize(
    ("name", "law"),
    [
        pytest.param(name, law, marks=() if name in fast else pytest.mark.slow)
        for law, fast in (("truncated_normal", ("mala", "underdamped")), ("von_mises", ("OBABO",)))
        for name in KERNELS
    ],
)
def test_known_laws_are_invariant_under_folded_kernels(name, law):
    assert invariance_z_scores(folded(KERNELS[name](), LAWS[law][0]), law) < 5.0


@pytest.mark.parametrize(
    "law", ["truncated_normal", pytest.param("von_mises", marks=pytest.mark.slow)]
)
def test_the_invariance_check_sees_a_missing_metropolis_test(law):
    assert invariance_z_scores(folded(langevin(step_size=0.3), LAWS[law][0]), law) > 5.0


# The two unadjusted chains on an interval, against the exact laws of their discretisations.


def interval_energy(params, x):
    return 2.0 * x + 0.5 * jnp.sin(3.0 * x)


def interval_law(method, step_size):
    """Points and probabilities on [0, 1]: Gauss nodes, and the two ends as atoms."""
    nodes, weights = np.polynomial.legendre.leggauss(80)
    x = np.concatenate([0.5 * (nodes + 1.0), [0.0, 1.0]])
    mean = x - step_size * np.asarray(jax.vmap(jax.grad(interval_energy, 1), (None, 0))((), x))
    scale = math.sqrt(2.0 * step_size)
    density = lambda y: scipy.stats.norm.pdf(y, mean[:, None], scale)  # noqa: E731
    inner = x[:-2]
    if method == "project":
        inside = density(inner)
        ends = np.stack(
            [scipy.stats.norm.cdf(0.0, mean, scale), scipy.stats.norm.sf(1.0, mean, scale)]
        )
    else:
        inside = sum(density(inner + 2 * k) + density(-inner + 2 * k) for k in range(-8, 9))
        ends = np.zeros((2, len(x)))
    transition = np.concatenate([inside * 0.5 * weights, ends.T], axis=1)
    np.testing.assert_allclose(transition.sum(1), 1.0, rtol=1e-10)
    law = np.linalg.matrix_power(transition, 2000)[0]
    return x, law / law.sum()


def interval_z_scores(kernel, method, step_size):
    x, law = interval_law(method, step_size)
    draws = sample(
        jax.random.key(0),
        kernel,
        interval_energy,
        (),
        jnp.full((NUM_CHAINS,), 0.5),
        num_samples=1,
        num_burn_in=100,
    )
    ends = np.asarray(draws.positions[0], np.float64)
    scores = []
    for feature in (lambda x: x, lambda x: x**2, lambda x: np.where(x == 0.0, 1.0, 0.0)):
        expected, values = (law * feature(x)).sum(), feature(ends)
        error = max(values.std(), 1e-3) / math.sqrt(NUM_CHAINS)
        scores.append(abs(values.mean() - expected) / error)
    return max(scores)


def test_laws_of_the_unadjusted_chains():
    step_size = 0.05
    projected = projected_langevin(step_size=step_size, domain=box(0.0, 1.0))
    reflected = folded(langevin(step_size=step_size), box(0.0, 1.0))
    assert interval_z_scores(projected, "project", step_size) < 5.0
    assert interval_z_scores(reflected, "reflect", step_size) < 5.0
    assert interval_z_scores(projected, "reflect", step_size) > 5.0
    assert interval_z_scores(reflected, "project", step_size) > 5.0


@pytest.mark.parametrize(("method", "expected"), [("project", 0.5), ("reflect", 1.0)])
def test_orders_of_the_unadjusted_chains(x64, method, expected):
    """The error of the mean, O(sqrt h) and O(h), from the exact laws."""
    grid = np.linspace(0.0, 1.0, 20_001)
    density = np.exp(-np.asarray(interval_energy((), grid)))
    truth = (grid * density).sum() / density.sum()
    errors = []
    for step_size in (0.004, 0.001):
        x, law = interval_law(method, step_size)
        errors.append(abs((law * x).sum() - truth))
    assert abs(np.log2(errors[0] / errors[1]) / 2.0 - expected) < 0.2


def test_projected_langevin_is_langevin_projected():
    energy_fn = lambda params, x: jnp.sum(params * x**2)  # noqa: E731
    params, x = jnp.array([1.0, 2.0, 3.0]), jnp.array([0.2, 0.3, 0.5])
    kernels = langevin(step_size=0.3), projected_langevin(step_size=0.3, domain=simplex())
    states = [kernel.init(energy_fn, params, x) for kernel in kernels]
    step = lambda kernel, state: kernel.step(jax.random.key(0), energy_fn, params, state)[0]  # noqa: E731
    free, ours = (
        jax.jit(functools.partial(step, kernel))(state).position
        for kernel, state in zip(kernels, states, strict=True)
    )
    np.testing.assert_allclose(ours, simplex().project(free), rtol=1e-6)
    assert np.any(ours == 0.0)


# Unconstrained laws: their integrals over R^D, by quadrature, are those on the domain.

CONCENTRATION = np.array([0.7, 2.0, 3.5])


def dirichlet_energy(params, x):
    return -jnp.sum((params - 1.0) * jnp.log(x))


def dirichlet_integrals():
    """∫ exp(-E) and the means of x and x² under it, in the plane of the log-ratios."""
    law = unconstrain(dirichlet_energy, simplex())
    axis = np.linspace(-45.0, 45.0, 301)
    y = np.stack(np.meshgrid(axis, axis), -1).reshape(-1, 2)
    evaluate = jax.jit(jax.vmap(lambda v: (law.energy(CONCENTRATION, v), law.forward(v))))
    energy, x = (np.asarray(part) for part in evaluate(y))
    density, area = np.exp(-energy), float(axis[1] - axis[0]) ** 2
    total = density.sum() * area
    moments = [(density[:, None] * x**k).sum(0) * area / total for k in (1, 2)]
    return total, *moments


def test_the_dirichlet_law_by_quadrature(x64):
    total, mean, square = dirichlet_integrals()
    whole = CONCENTRATION.sum()
    log_z = scipy.special.gammaln(CONCENTRATION).sum() - scipy.special.gammaln(whole)
    np.testing.assert_allclose(np.log(total), log_z, atol=1e-9)
    np.testing.assert_allclose(mean, CONCENTRATION / whole, rtol=1e-9)
    expected = CONCENTRATION * (CONCENTRATION + 1.0) / (whole * (whole + 1.0))
    np.testing.assert_allclose(square, expected, rtol=1e-9)


@pytest.mark.parametrize("name", ["interval", "above", "below"])
def test_a_law_on_a_box_by_quadrature(x64, name):
    low, high = BOXES[name]
    energy_fn = lambda params, x: 0.5 * (x - params) ** 2  # noqa: E731
    law = unconstrain(energy_fn, box(low, high))
    y = np.linspace(-40.0, 40.0, 8001)
    evaluate = jax.jit(jax.vmap(lambda v: (law.energy(0.3, v), law.forward(v))))
    energy, x = (np.asarray(part) for part in evaluate(y))
    density, width = np.exp(-energy), y[1] - y[0]
    expected = scipy.stats.truncnorm(low - 0.3, high - 0.3, loc=0.3)
    total = math.sqrt(2 * math.pi) * (
        scipy.stats.norm.cdf(high - 0.3) - scipy.stats.norm.cdf(low - 0.3)
    )
    np.testing.assert_allclose(density.sum() * width, total, rtol=1e-8)
    np.testing.assert_allclose((density * x).sum() * width / total, expected.mean(), rtol=1e-8)


def dirichlet_z_scores():
    """MALA in the plane from exact draws on the simplex: the ends are exact draws again."""
    law = unconstrain(dirichlet_energy, simplex())
    kernel, params = mala(step_size=0.6), jnp.float32(CONCENTRATION)

    @jax.jit
    @jax.vmap
    def end(key):
        start_key, chain_key = jax.random.split(key)
        # In logs, where small components do not vanish.
        log_gamma = jax.random.loggamma(start_key, params)
        start = law.inverse(jnp.exp(jax.nn.log_softmax(log_gamma)))
        state = kernel.init(law.energy, params, start)
        state, info = run_chain(chain_key, kernel, law.energy, params, state, NUM_STEPS)
        return law.forward(state.position), info.acceptance_rate

    ends, rate = end(jax.random.split(jax.random.key(0), NUM_CHAINS))
    assert 0.2 < rate.mean() < 0.95
    ends, whole = np.asarray(ends, np.float64), CONCENTRATION.sum()
    mean = CONCENTRATION / whole
    square = CONCENTRATION * (CONCENTRATION + 1.0) / (whole * (whole + 1.0))
    scores = [
        np.abs(values.mean(0) - expected) / values.std(0) * math.sqrt(NUM_CHAINS)
        for values, expected in ((ends, mean), (ends**2, square))
    ]
    return np.max(scores)


def test_the_dirichlet_law_is_invariant():
    assert dirichlet_z_scores() < 5.0


def test_the_checks_see_a_volume_left_out(monkeypatch, x64):
    ours = constrained_module._forward_pairs
    monkeypatch.setattr(constrained_module, "_forward_pairs", lambda *a: (ours(*a)[0], 0.5))
    assert dirichlet_z_scores() > 5.0
    assert not np.allclose(dirichlet_integrals()[1], CONCENTRATION / CONCENTRATION.sum(), rtol=0.1)


# Pytrees, and what is refused.


def test_each_part_of_a_position_may_have_its_own_domain(x64):
    domains = {"angle": torus(), "rest": box(0.0, 1.0)}
    energy_fn = lambda p, x: jnp.cos(x["angle"]) + jnp.sum(x["rest"][0]) + x["rest"][1] ** 2  # noqa: E731
    start = {"angle": jnp.array(6.2), "rest": (jnp.array([0.1, 0.9]), jnp.array(0.5))}
    kernel = folded(mala(step_size=0.8), domains)
    run = jax.jit(lambda state: run_chain(jax.random.key(0), kernel, energy_fn, (), state, 50))
    state, info = run(jax.jit(lambda x: kernel.init(energy_fn, (), x))(start))
    assert 0.0 <= state.position["angle"] < 2.0 * math.pi
    assert all(np.all((leaf >= 0) & (leaf <= 1)) for leaf in state.position["rest"])
    gradient = jax.grad(energy_fn, 1)((), state.position)
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12)  # noqa: E731
    jax.tree.map(close, gradient, state.gradient)
    assert info.is_finite == 1.0

    domains = {"weights": simplex(), "scale": box(0.0, math.inf), "free": reals()}
    x = {
        "weights": jnp.array([[0.2, 0.3, 0.5], [0.6, 0.3, 0.1]]),
        "scale": jnp.array(2.0),
        "free": jnp.array([-1.0, 4.0]),
    }
    law = unconstrain(lambda params, x: jnp.zeros(()), domains)
    y = law.inverse(x)
    assert jax.tree.map(jnp.shape, y) == {"weights": (2, 2), "scale": (), "free": (2,)}
    jax.tree.map(close, law.forward(y), x)
    volumes = [simplex().forward(row)[1] for row in y["weights"]]
    np.testing.assert_allclose(-law.energy((), y), sum(volumes) + math.log(2.0), rtol=1e-12)


def test_what_a_domain_cannot_do_is_said():
    flat = lambda params, x: jnp.sum(x)  # noqa: E731
    with pytest.raises(ValueError, match="no function 'fold'"):
        folded(mala(step_size=0.1), simplex()).init(flat, (), jnp.full(3, 1 / 3))
    with pytest.raises(ValueError, match="no function 'inverse'"):
        unconstrain(flat, torus()).inverse(jnp.ones(2))
    with pytest.raises(ValueError, match=r"low is 1\.0 and high is 1\.0"):
        box(1.0, 1.0)
    with pytest.raises(ValueError, match="period is 0"):
        torus(0)
    flat_parts = lambda params, x: jnp.sum(x)  # noqa: E731
    flat_parts.evaluate = None
    with pytest.raises(ValueError, match="has parts"):
        folded(mala(step_size=0.1), box(0.0, 1.0)).init(flat_parts, (), jnp.ones(2))


def test_equal_domains_are_equal():
    assert folded(mala(step_size=0.1), box(0.0, 1.0)) == folded(mala(step_size=0.1), box(0.0, 1.0))
    assert unconstrain(dirichlet_energy, simplex()) == unconstrain(dirichlet_energy, simplex())


def test_a_folded_energy_repeats(x64):
    energy_fn = folded_energy(lambda params, x: params * x, box(0.0, 1.0))
    np.testing.assert_allclose(
        [energy_fn(2.0, jnp.array(z)) for z in (0.3, -0.3, 1.7, 2.3)], 0.6, rtol=1e-12
    )

"""Laws that every discrete kernel keeps, on binary and on categorical variables."""

import functools
import inspect

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ebjax.energies.boltzmann import enumerate_law
from ebjax.samplers.block_gibbs import block_gibbs
from ebjax.samplers.checkerboard import checkerboard_gibbs
from ebjax.samplers.discrete import BALANCING, choose
from ebjax.samplers.discrete_langevin import discrete_langevin
from ebjax.samplers.gibbs import gibbs
from ebjax.samplers.gibbs_with_gradients import gibbs_with_gradients
from ebjax.samplers.path_auxiliary import path_auxiliary
from ebjax.samplers.run import sample

# name -> a function of the number of categories that builds the kernel anew
KERNELS = {
    "gibbs": lambda k: gibbs(num_categories=k),
    "gibbs_sweep": lambda k: gibbs(num_categories=k, scan="systematic", num_updates=4),
    "gibbs_cold": lambda k: gibbs(num_categories=k, temperature=0.5),
    "block_gibbs": lambda k: block_gibbs(blocks=[[0, 1], [1, 0]], num_categories=k),
    "gwg": lambda k: gibbs_with_gradients(num_categories=k),
    "gwg_barker": lambda k: gibbs_with_gradients(num_categories=k, balancing="barker"),
    "dmala": lambda k: discrete_langevin(step_size=0.5, num_categories=k),
    "dula": lambda k: discrete_langevin(step_size=0.5, num_categories=k, is_adjusted=False),
    "pas_fast": lambda k: path_auxiliary(radius=2, num_categories=k),
    "pas_fresh": lambda k: path_auxiliary(radius=1.5, num_categories=k, is_fast=False),
    "checkerboard": lambda k: checkerboard_gibbs(periodic=False),
}
CATEGORIES = {"binary": None, "categorical": 3}
CASES = [
    (name, kind)
    for name in KERNELS
    for kind in CATEGORIES
    if (name, kind) != ("checkerboard", "categorical")
]
each_case = pytest.mark.parametrize(("name", "kind"), CASES)
# Other constants or loops of the kernels above, whose matrices test_discrete_exact enumerates.
VARIANTS = ("gibbs_sweep", "gibbs_cold", "gwg_barker", "dula", "pas_fresh")


def mostly(is_slow):
    """The cases, those that ``is_slow(name, kind)`` among the slow tests."""
    marks = lambda case: pytest.mark.slow if is_slow(*case) else ()  # noqa: E731
    cases = [pytest.param(*case, marks=marks(case)) for case in CASES]
    return pytest.mark.parametrize(("name", "kind"), cases)


each_kernel = mostly(lambda name, kind: name in VARIANTS)
each_law = mostly(lambda name, kind: name in VARIANTS and kind == "categorical")
PRECISIONS = {"float32": False, "float32_in_x64": True, "float64": True}


def energy_fn(params, x):
    """Pairs and fields on a square of four sites: asymmetric, and fit for all kernels."""
    if x.ndim == 2:
        spins = 2.0 * x - 1.0
        across, down = spins[:, 0] * spins[:, 1], spins[0] * spins[1]
    else:
        spins = x * jnp.array([0.9, -0.4, 0.2], x.dtype)
        across, down = jnp.sum(x[:, 0] * x[:, 1], -1), jnp.sum(x[0] * x[1], -1)
    field = jnp.array([[0.3, -0.2], [0.5, 0.1]], x.dtype)
    field = field if x.ndim == 2 else field[..., None]
    return -params * (jnp.sum(across) + jnp.sum(down)) - jnp.sum(field * spins)


def first_position(kind, dtype=np.float32):
    if kind == "categorical":
        return np.eye(3, dtype=dtype)[np.array([[0, 2], [1, 1]])]
    return np.array([[0.0, 1.0], [1.0, 1.0]], dtype)


@each_case
@pytest.mark.parametrize("precision", PRECISIONS)
def test_state_is_a_fixed_point_of_step(name, kind, precision):
    kernel = KERNELS[name](CATEGORIES[kind])
    with jax.enable_x64(PRECISIONS[precision]):
        dtype = jnp.dtype(precision.removesuffix("_in_x64"))
        params = jnp.array(0.6, dtype)
        state = jax.eval_shape(
            lambda x: kernel.init(energy_fn, params, x), first_position(kind, dtype)
        )
        new, info = jax.eval_shape(
            lambda key, state: kernel.step(key, energy_fn, params, state), jax.random.key(0), state
        )
        chex.assert_trees_all_equal_shapes_and_dtypes(state, new)
        assert new.position.dtype == dtype
        assert not any(leaf.weak_type for leaf in jax.tree.leaves((state, new)))
        assert info.energy.dtype == dtype
        assert (info.is_finite.dtype, info.is_finite.shape) == (bool, ())


@each_kernel
def test_jit_vmap_and_loops_agree(name, kind, x64):
    kernel, position = KERNELS[name](CATEGORIES[kind]), first_position(kind, np.float64)

    def step(key):
        return kernel.step(key, energy_fn, 0.6, kernel.init(energy_fn, 0.6, position))

    keys = jax.random.split(jax.random.key(1), 4)
    many, jitted = jax.jit(jax.vmap(step))(keys), jax.jit(step)
    for i in range(4):
        of_many = jax.tree.map(lambda leaf, i=i: leaf[i], many)
        chex.assert_trees_all_close(jitted(keys[i]), of_many, rtol=1e-12, atol=1e-12)
    chex.assert_trees_all_equal(jitted(keys[0]), jitted(keys[0]))
    # Operation by operation; the categorical kernels share all that is not traced here.
    if kind == "binary":
        chex.assert_trees_all_close(step(keys[0]), jitted(keys[0]), rtol=1e-12)


@each_kernel
def test_positions_stay_discrete_and_the_energy_is_theirs(name, kind):
    kernel, start = KERNELS[name](CATEGORIES[kind]), first_position(kind)

    @jax.jit
    def chain(keys):
        def body(state, key):
            state, info = kernel.step(key, energy_fn, 0.6, state)
            return state, (state.position, info, energy_fn(0.6, state.position))

        return jax.lax.scan(body, kernel.init(energy_fn, 0.6, start), keys)[1]

    positions, info, energies = chain(jax.random.split(jax.random.key(2), 200))
    positions = np.asarray(positions)
    assert np.all((positions == 0.0) | (positions == 1.0))
    assert kind == "binary" or np.all(positions.sum(-1) == 1.0)
    np.testing.assert_allclose(info.energy, energies, atol=1e-5)
    assert np.all(info.is_finite)
    # A cold chain sits at the lowest energy for hundreds of steps.
    assert name == "gibbs_cold" or len(np.unique(positions.reshape(200, -1), axis=0)) > 5
    if hasattr(info, "num_changed") and name != "gibbs_sweep":
        pairs = np.concatenate([start[None], positions])
        differs = pairs[1:] != pairs[:-1]
        differs = differs if kind == "binary" else differs.any(-1)
        np.testing.assert_array_equal(info.num_changed, differs.reshape(200, -1).sum(-1))


@functools.cache
def exact_law(kind, params, temperature):
    """All states [N, ...] and their log-probabilities [N]."""
    tempered = lambda p, x: energy_fn(p, x) / temperature  # noqa: E731
    law = enumerate_law(tempered, params, (2, 2), CATEGORIES[kind])
    return np.asarray(law.states), np.asarray(law.log_probs)


def law_z_scores(name, kind, params, law_params, num_chains=5_000, num_steps=6):
    """Exact draws moved on: frequencies of all states against the enumerated law."""
    states, log_probs = exact_law(kind, law_params, 0.5 if name == "gibbs_cold" else 1.0)
    probs = np.exp(log_probs.astype(np.float64))
    starts = np.random.default_rng(0).choice(len(states), num_chains, p=probs / probs.sum())
    kernel = KERNELS[name](CATEGORIES[kind])
    draws = sample(
        jax.random.key(1),
        kernel,
        energy_fn,
        params,
        states[starts],
        num_samples=1,
        thinning=num_steps,
    )
    ends = np.asarray(draws.positions[0]).reshape(num_chains, 1, -1)
    same = ends == states.reshape(1, len(states), -1)
    counts = same.all(-1).sum(0)
    known = probs * num_chains > 10.0
    z = (counts - num_chains * probs) / np.sqrt(num_chains * probs * (1.0 - probs))
    return np.abs(z[known]).max()


@each_law
def test_the_law_is_invariant(name, kind):
    if name == "dula":
        pytest.skip("the unadjusted chain has a law of its own; see test_discrete_exact")
    assert law_z_scores(name, kind, 0.6, 0.6) < 5.0


@each_law
def test_the_check_sees_another_law(name, kind):
    assert law_z_scores(name, kind, 0.6, -0.6) > 5.0


@each_kernel
def test_nan_is_flagged_and_nothing_moves_there(name, kind):
    kernel, position = KERNELS[name](CATEGORIES[kind]), first_position(kind)
    broken = lambda params, x: jnp.where(jnp.sum(x) > 1e9, 0.0, jnp.nan) * jnp.sum(x)  # noqa: E731

    @jax.jit
    def step(key):
        return kernel.step(key, broken, (), kernel.init(broken, (), position))

    new, info = step(jax.random.key(0))
    assert not info.is_finite
    np.testing.assert_array_equal(new.position, position)


@functools.cache
def walled_program(name, kind):
    """A state of no energy beside the start; energies read off the value, not the gradient."""
    kernel, position = KERNELS[name](CATEGORIES[kind]), first_position(kind)
    wall = position.copy()
    wall[0, 0] = np.roll(wall[0, 0], 1) if kind == "categorical" else 1.0 - wall[0, 0]

    def walled(bad, x):
        return energy_fn(0.6, x) + jnp.where(jnp.all(x == wall), bad, 0.0)

    @jax.jit
    def chains(bad, keys, start):
        def chain(key):
            def body(state, key):
                state, info = kernel.step(key, walled, bad, state)
                return state, (state.position, info.energy, info.is_finite)

            return jax.lax.scan(body, kernel.init(walled, bad, start), jax.random.split(key, 20))[1]

        return jax.vmap(chain)(keys)

    return chains, position, wall


@pytest.mark.parametrize("bad", [jnp.inf, jnp.nan])
@each_kernel
def test_a_wall_is_never_entered(name, kind, bad):
    if name in ("block_gibbs", "checkerboard"):
        pytest.skip("needs a multilinear energy, which has no walls")
    chains, position, wall = walled_program(name, kind)
    keys = jax.random.split(jax.random.key(0), 50)
    positions, energy, is_finite = chains(jnp.float32(bad), keys, position)
    is_wall = np.all(np.asarray(positions) == wall, axis=tuple(range(2, positions.ndim)))
    assert not np.any(is_wall)
    assert np.all(np.isfinite(energy))
    assert not np.all(is_finite)
    if bad == jnp.inf:
        positions = chains(jnp.float32(bad), keys, wall)[0][:, -1]
        has_left = np.any(np.asarray(positions) != wall, axis=tuple(range(1, positions.ndim)))
        assert np.any(has_left), "an infinite start may be left"


@each_case
def test_arguments_and_equality(name, kind):
    build = functools.partial(KERNELS[name], CATEGORIES[kind])
    assert build() == build()
    assert hash(build()) == hash(build())
    kernel = build()
    assert list(inspect.signature(kernel.init).parameters) == ["energy_fn", "params", "position"]
    state = jax.eval_shape(lambda x: kernel.init(energy_fn, 0.6, x), first_position(kind))
    assert "position" in state._fields


TRACED = {
    "gibbs": lambda t: gibbs(temperature=t),
    "block_gibbs": lambda t: block_gibbs(blocks=[[0, 1], [1, 0]], temperature=t),
    "gwg": lambda t: gibbs_with_gradients(temperature=t),
    "dmala": lambda t: discrete_langevin(step_size=t / 2, temperature=t),
    "pas": lambda t: path_auxiliary(radius=t, max_length=3, temperature=t),
    "checkerboard": lambda t: checkerboard_gibbs(periodic=False, temperature=t),
}


@pytest.mark.parametrize("name", TRACED)
def test_options_may_be_traced(name):
    keys = jax.random.split(jax.random.key(0), 50)

    def end(temperature):
        kernel = TRACED[name](temperature)
        state = kernel.init(energy_fn, 0.6, first_position("binary"))
        return jax.vmap(lambda k: kernel.step(k, energy_fn, 0.6, state)[0].position)(keys)

    traced, bound = jax.jit(end), jax.jit(lambda: end(1.5))
    np.testing.assert_array_equal(traced(jnp.array(1.5)), bound())
    assert np.any(traced(jnp.array(0.1)) != bound())  # the control


def test_pytrees_of_variables():
    leaves = {"a": jnp.zeros((2, 3)), "b": jnp.ones(2)}
    total = lambda params, x: params * jnp.sum(x["a"]) * jnp.sum(x["b"])  # noqa: E731
    for kernel in (
        gibbs(num_updates=3),
        gibbs_with_gradients(),
        discrete_langevin(step_size=1.0),
        path_auxiliary(radius=2),
        block_gibbs(blocks={"a": 0, "b": [1, 1]}),
    ):
        step = lambda key, k=kernel: k.step(key, total, 0.3, k.init(total, 0.3, leaves))  # noqa: E731
        state, info = jax.jit(step)(jax.random.key(0))
        chex.assert_trees_all_equal_shapes_and_dtypes(state.position, leaves)
        np.testing.assert_allclose(info.energy, total(0.3, state.position), rtol=1e-5)


def test_choices_are_as_likely_as_their_weights():
    weights = np.array([0.0, 3.0, 0.5, 0.0, 1.5, 2.0, 0.0])
    log_weights = jnp.log(jnp.asarray(weights))
    uniform = jax.random.uniform(jax.random.key(0), (50_000, 2))
    counts = np.bincount(jax.vmap(lambda u: choose(u, log_weights))(uniform), minlength=7)
    probs = weights / weights.sum()
    assert np.all(counts[weights == 0.0] == 0)
    known = probs > 0.0
    z = (counts - 50_000 * probs)[known] / np.sqrt(50_000 * probs * (1.0 - probs))[known]
    assert np.abs(z).max() < 5.0
    for edge in (1e-30, 1.0):
        assert weights[choose(jnp.full(2, edge), log_weights)] > 0.0


def test_balancing_functions_are_balanced():
    log_t = jnp.linspace(-4.0, 4.0, 17)
    for log_g in BALANCING.values():
        np.testing.assert_allclose(log_g(log_t), log_t + log_g(-log_t), atol=1e-6)


WRONG = {
    "num_categories is 1": lambda: gibbs(num_categories=1),
    "scan is 'x'": lambda: gibbs(scan="x"),
    "num_updates is 0": lambda: gibbs(num_updates=0),
    "temperature is 0": lambda: gibbs_with_gradients(temperature=0),
    "balancing is 'y'": lambda: gibbs_with_gradients(balancing="y"),
    "gradient_power is 0": lambda: discrete_langevin(step_size=1.0, gradient_power=0),
    "step_size is -1": lambda: discrete_langevin(step_size=-1),
    "radius is 0.5": lambda: path_auxiliary(radius=0.5),
    "max_length is None": lambda: path_auxiliary(radius=jnp.array(2.0)),
    "num_sweeps is 0": lambda: checkerboard_gibbs(num_sweeps=0),
}


@pytest.mark.parametrize("message", WRONG)
def test_wrong_options_are_named(message):
    with pytest.raises(ValueError, match=message):
        WRONG[message]()


def test_wrong_shapes_are_named():
    kernel = gibbs_with_gradients(num_categories=3)
    state = kernel.init(lambda p, x: x.sum(), (), jnp.zeros((2, 4)))
    with pytest.raises(ValueError, match=r"\(2, 4\)"):
        kernel.step(jax.random.key(0), lambda p, x: x.sum(), (), state)

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


def start(name, kind, dtype=jnp.float32):
    kernel = KERNELS[name](CATEGORIES[kind])
    position = jnp.array([[0.0, 1.0], [1.0, 1.0]], dtype)
    if kind == "categorical":
        position = jax.nn.one_hot(jnp.array([[0, 2], [1, 1]]), 3, dtype=dtype)
    params = jnp.array(0.6, dtype)
    return kernel, params, kernel.init(energy_fn, params, position)


@each_case
@pytest.mark.parametrize("precision", PRECISIONS)
def test_state_is_a_fixed_point_of_step(name, kind, precision):
    with jax.enable_x64(PRECISIONS[precision]):
        dtype = jnp.dtype(precision.removesuffix("_in_x64"))
        kernel, params, state = start(name, kind, dtype)
        new, info = jax.eval_shape(
            lambda key, params, state: kernel.step(key, energy_fn, params, state),
            jax.random.key(0),
            params,
            state,
        )
        chex.assert_trees_all_equal_shapes_and_dtypes(state, new)
        assert new.position.dtype == dtype
        assert not any(leaf.weak_type for leaf in jax.tree.leaves((state, new)))
        assert info.energy.dtype == dtype
        assert (info.is_finite.dtype, info.is_finite.shape) == (bool, ())


@each_case
def test_jit_vmap_and_loops_agree(name, kind, x64):
    kernel, params, state = start(name, kind, jnp.float64)
    step = functools.partial(lambda k, s: kernel.step(k, energy_fn, params, s))
    keys = jax.random.split(jax.random.key(1), 4)
    many = jax.jit(jax.vmap(step, (0, None)))(keys, state)
    jitted = jax.jit(step)
    for i in range(4):
        of_many = jax.tree.map(lambda leaf, i=i: leaf[i], many)
        chex.assert_trees_all_close(jitted(keys[i], state), of_many, rtol=1e-12, atol=1e-12)
    chex.assert_trees_all_close(step(keys[0], state), jitted(keys[0], state), rtol=1e-12)
    chex.assert_trees_all_equal(jitted(keys[0], state), jitted(keys[0], state))


@each_case
def test_positions_stay_discrete_and_the_energy_is_theirs(name, kind):
    kernel, params, state = start(name, kind)

    @jax.jit
    def chain(state, keys):
        def body(state, key):
            state, info = kernel.step(key, energy_fn, params, state)
            return state, (state.position, info)

        return jax.lax.scan(body, state, keys)[1]

    positions, info = chain(state, jax.random.split(jax.random.key(2), 200))
    assert np.all((positions == 0.0) | (positions == 1.0))
    assert kind == "binary" or np.all(positions.sum(-1) == 1.0)
    energies = jax.vmap(lambda x: energy_fn(params, x))(positions)
    np.testing.assert_allclose(info.energy, energies, atol=1e-5)
    assert np.all(info.is_finite)
    # A cold chain sits at the lowest energy for hundreds of steps.
    assert name == "gibbs_cold" or len(np.unique(positions.reshape(200, -1), axis=0)) > 5
    if hasattr(info, "num_changed") and name != "gibbs_sweep":
        pairs = jnp.concatenate([state.position[None], positions])
        differs = pairs[1:] != pairs[:-1]
        differs = differs if kind == "binary" else differs.any(-1)
        np.testing.assert_array_equal(info.num_changed, differs.reshape(200, -1).sum(-1))


def law_z_scores(name, kind, params, law_params, num_chains=5_000, num_steps=6):
    """Exact draws moved on: frequencies of all states against the enumerated law."""
    num_categories = CATEGORIES[kind]
    tempered = lambda p, x: energy_fn(p, x) / (0.5 if name == "gibbs_cold" else 1.0)  # noqa: E731
    law = enumerate_law(tempered, law_params, (2, 2), num_categories)
    positions = law.states[
        jax.random.categorical(jax.random.key(0), law.log_probs, shape=(num_chains,))
    ]
    kernel = KERNELS[name](num_categories)
    draws = sample(
        jax.random.key(1), kernel, energy_fn, params, positions, num_samples=1, thinning=num_steps
    )
    same = draws.positions[0].reshape(num_chains, 1, -1) == law.states.reshape(
        1, len(law.states), -1
    )
    counts = np.asarray(same.all(-1).sum(0), np.float64)
    probs = np.exp(np.asarray(law.log_probs, np.float64))
    known = probs * num_chains > 10.0
    z = (counts - num_chains * probs) / np.sqrt(num_chains * probs * (1.0 - probs))
    return np.abs(z[known]).max()


@each_case
def test_the_law_is_invariant(name, kind):
    if name == "dula":
        pytest.skip("the unadjusted chain has a law of its own; see test_discrete_exact")
    assert law_z_scores(name, kind, 0.6, 0.6) < 5.0


@each_case
def test_the_check_sees_another_law(name, kind):
    assert law_z_scores(name, kind, 0.6, -0.6) > 5.0


@each_case
def test_nan_is_flagged_and_nothing_moves_there(name, kind):
    kernel, params, state = start(name, kind)
    broken = lambda params, x: jnp.where(jnp.sum(x) > 1e9, 0.0, jnp.nan) * jnp.sum(x)  # noqa: E731
    new, info = kernel.step(
        jax.random.key(0), broken, params, kernel.init(broken, params, state.position)
    )
    assert not info.is_finite
    np.testing.assert_array_equal(new.position, state.position)


@pytest.mark.parametrize("bad", [jnp.inf, jnp.nan])
@each_case
def test_a_wall_is_never_entered(name, kind, bad):
    """A state of no energy beside the start; energies read off the value, not the gradient."""
    if name in ("block_gibbs", "checkerboard"):
        pytest.skip("needs a multilinear energy, which has no walls")
    kernel, params, state = start(name, kind)
    wall = state.position.at[0, 0].set(
        jnp.roll(state.position[0, 0], 1) if kind == "categorical" else 1.0 - state.position[0, 0]
    )

    def walled(params, x):
        return energy_fn(params, x) + jnp.where(jnp.all(x == wall), bad, 0.0)

    @jax.jit
    @jax.vmap
    def chain(key):
        def body(state, key):
            state, info = kernel.step(key, walled, params, state)
            return state, (state.position, info.energy, info.is_finite)

        start = kernel.init(walled, params, state.position)
        return jax.lax.scan(body, start, jax.random.split(key, 20))[1]

    positions, energy, is_finite = chain(jax.random.split(jax.random.key(0), 50))
    assert not np.any(np.all(positions == wall, axis=tuple(range(2, positions.ndim))))
    assert np.all(np.isfinite(energy))
    assert not np.all(is_finite)
    left = KERNELS[name](CATEGORIES[kind]).init(walled, params, wall)
    if bad == jnp.inf:

        def walk(state, key):
            return kernel.step(key, walled, params, state)[0], None

        end, _ = jax.lax.scan(walk, left, jax.random.split(jax.random.key(1), 100))
        assert not np.array_equal(end.position, wall), "an infinite start may be left"


@each_case
def test_arguments_and_equality(name, kind):
    kernel, _, state = start(name, kind)
    build = functools.partial(KERNELS[name], CATEGORIES[kind])
    assert build() == build()
    assert hash(build()) == hash(build())
    assert list(inspect.signature(kernel.init).parameters) == ["energy_fn", "params", "position"]
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
    _, params, state = start("gwg", "binary")

    def end(temperature):
        kernel = TRACED[name](temperature)
        state_of = kernel.init(energy_fn, params, state.position)
        keys = jax.random.split(jax.random.key(0), 50)
        step = jax.vmap(lambda k: kernel.step(k, energy_fn, params, state_of)[0].position)
        return step(keys)

    np.testing.assert_array_equal(jax.jit(end)(jnp.array(1.5)), end(1.5))


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
        state = kernel.init(total, 0.3, leaves)
        state, info = kernel.step(jax.random.key(0), total, 0.3, state)
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

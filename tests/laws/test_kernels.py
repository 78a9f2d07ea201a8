"""Laws that every kernel keeps. A new kernel is one row of ``KERNELS``."""

import functools
import inspect

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ebjax.samplers import (
    block_gibbs,
    box,
    checkerboard_blocks,
    checkerboard_gibbs,
    discrete_langevin,
    folded,
    gibbs,
    gibbs_with_gradients,
    hmc,
    langevin,
    mala,
    nuts,
    parallel_tempering,
    path_auxiliary,
    polynomial_decay,
    projected_langevin,
    random_walk,
    torus,
    underdamped,
)
from ebjax.types import bind

# name -> a function that builds the kernel anew. Continuous kernels take any pytree.
CONTINUOUS = {
    "langevin": lambda: langevin(step_size=0.05),
    "langevin_noise_scale": lambda: langevin(step_size=0.05, noise_scale=0.01),
    "langevin_clipped": lambda: langevin(step_size=0.5, gradient_clip=1.0, bounds=(-1.0, 1.0)),
    "langevin_descent": lambda: langevin(step_size=0.05, temperature=0.0),
    "langevin_decaying": lambda: langevin(step_size=polynomial_decay(0.1)),
    "mala": lambda: mala(step_size=0.2),
    "mala_cold": lambda: mala(step_size=0.05, temperature=0.3),
    "random_walk": lambda: random_walk(step_size=0.4),
    "underdamped": lambda: underdamped(step_size=0.2, friction=1.5),
    "underdamped_obabo": lambda: underdamped(step_size=0.2, friction=1.5, splitting="OBABO"),
    "underdamped_metropolis": lambda: underdamped(
        step_size=0.2, friction=1.5, splitting="OBABO", metropolis=True
    ),
    "hmc": lambda: hmc(step_size=0.2, num_steps=3),
    "hmc_jittered": lambda: hmc(step_size=0.2, num_steps=4, jitter=0.3, random_length=True),
    "nuts": lambda: nuts(step_size=0.3, max_depth=5),
    "folded_mala": lambda: folded(mala(step_size=0.2), box(-2.0, 2.0)),
    "folded_random_walk": lambda: folded(random_walk(step_size=0.5), torus(5.0)),
    "projected_langevin": lambda: projected_langevin(step_size=0.1, domain=box(-1.0, 2.0)),
    "parallel_tempering": lambda: parallel_tempering(
        mala, inverse_temperatures=(0.2, 0.5, 1.0), step_size=(0.5, 0.3, 0.2)
    ),
    "parallel_tempering_hmc": lambda: parallel_tempering(
        bind(hmc, num_steps=2), inverse_temperatures=(0.3, 1.0), step_size=0.2, num_local_steps=2
    ),
}
_BLOCKS = [0, 1, 2, 3]
BINARY = {
    "gibbs": lambda: gibbs(),
    "gibbs_systematic": lambda: gibbs(scan="systematic", num_updates=4),
    "block_gibbs": lambda: block_gibbs(blocks=_BLOCKS),
    "gibbs_with_gradients": lambda: gibbs_with_gradients(),
    "discrete_langevin": lambda: discrete_langevin(step_size=0.5),
    "discrete_langevin_unadjusted": lambda: discrete_langevin(step_size=0.5, is_adjusted=False),
    "path_auxiliary": lambda: path_auxiliary(radius=2.0),
    "path_auxiliary_fresh": lambda: path_auxiliary(radius=2.0, is_fast=False),
}
CATEGORICAL = {
    "categorical_gibbs": lambda: gibbs(num_categories=3),
    "categorical_block_gibbs": lambda: block_gibbs(blocks=_BLOCKS, num_categories=3),
    "categorical_gibbs_with_gradients": lambda: gibbs_with_gradients(num_categories=3),
    "categorical_discrete_langevin": lambda: discrete_langevin(step_size=0.5, num_categories=3),
    "categorical_path_auxiliary": lambda: path_auxiliary(radius=2.0, num_categories=3),
}
LATTICE = {
    "checkerboard_gibbs": lambda: checkerboard_gibbs(),
    "lattice_block_gibbs": lambda: block_gibbs(blocks=checkerboard_blocks((4, 4)).tolist()),
}
KERNELS = {**CONTINUOUS, **BINARY, **CATEGORICAL, **LATTICE}
DISCRETE_POSITIONS = {
    **dict.fromkeys(BINARY, lambda dtype: jnp.array([0, 1, 1, 0], dtype)),
    **dict.fromkeys(CATEGORICAL, lambda dtype: jnp.eye(3, dtype=dtype)[jnp.array([0, 2, 1, 0])]),
    **dict.fromkeys(LATTICE, lambda dtype: jnp.arange(16).reshape(4, 4).astype(dtype) % 3 % 2),
}
POSITIONS = {
    "vector": lambda dtype: jnp.array([0.3, -0.2, 0.9], dtype),
    "pytree": lambda dtype: {"a": jnp.ones((2, 3), dtype), "b": (jnp.array(0.1, dtype),)},
}
# float32 positions also where float64 is on: a kernel must not promote them.
PRECISIONS = {"float32": False, "float32_in_x64": True, "float64": True}

each_kernel = pytest.mark.parametrize("name", KERNELS)
each_kernel_and_position = pytest.mark.parametrize(
    ("name", "position_name"),
    [
        (name, position)
        for name in KERNELS
        for position in (POSITIONS if name in CONTINUOUS else ("vector",))
    ],
)


def energy_fn(params, x):
    """Asymmetric and anharmonic, so that no symmetry hides a mistake."""
    return sum(
        jnp.sum(0.25 * (leaf - params) ** 4 + 0.5 * leaf**2 + 0.3 * leaf)
        for leaf in jax.tree.leaves(x)
    )


def lattice_energy(params, x):
    """Neighbours on a torus, as the kernels of lattices ask for."""
    spins = 2.0 * x - 1.0
    bonds = spins * jnp.roll(spins, 1, 0) + spins * jnp.roll(spins, 1, 1)
    return -0.4 * jnp.sum(bonds) + params * jnp.sum(spins)


def energy_of(name):
    return lattice_energy if name in LATTICE else energy_fn


def position_of(name, position_name, dtype):
    return (POSITIONS[position_name] if name in CONTINUOUS else DISCRETE_POSITIONS[name])(dtype)


def start(name, position_name="vector", dtype=jnp.float32):
    """``(kernel, params, state)``."""
    kernel = KERNELS[name]()
    params = jnp.array(0.7, dtype)
    position = position_of(name, position_name, dtype)
    return kernel, params, kernel.init(energy_of(name), params, position)


def step_of(name, kernel):
    return lambda key, params, state: kernel.step(key, energy_of(name), params, state)


@each_kernel_and_position
@pytest.mark.parametrize("precision", PRECISIONS)
def test_state_is_a_fixed_point_of_step(name, position_name, precision):
    with jax.enable_x64(PRECISIONS[precision]):
        kernel = KERNELS[name]()
        dtype = jnp.dtype(precision.removesuffix("_in_x64"))
        params = jax.ShapeDtypeStruct((), dtype)
        position = jax.eval_shape(lambda: position_of(name, position_name, dtype))
        init = functools.partial(kernel.init, energy_of(name))
        state = jax.eval_shape(init, params, position)
        key = jax.eval_shape(lambda: jax.random.key(0))
        step = step_of(name, kernel)
        new, info = jax.eval_shape(step, key, params, state)
        chex.assert_trees_all_equal_structs(state, new)
        chex.assert_trees_all_equal_shapes_and_dtypes(state, new)
        assert {leaf.dtype for leaf in jax.tree.leaves(new.position)} == {dtype}
        # A weak type would differ from that of the next step, and a scan would not compile.
        assert not any(leaf.weak_type for leaf in jax.tree.leaves((state, new)))
        assert info.energy.dtype == dtype
        assert info.is_finite.dtype == bool
        assert info.is_finite.shape == ()


@each_kernel
def test_jit_equals_no_jit(name, x64):
    kernel, params, state = start(name, "pytree", jnp.float64)
    key, step = jax.random.key(1), step_of(name, kernel)
    plain = step(key, params, state)
    jitted = jax.jit(step)(key, params, state)
    assert jitted[1].is_finite
    chex.assert_trees_all_close(plain, jitted, rtol=1e-13, atol=1e-13)


@each_kernel
def test_vmap_equals_a_loop(name, x64):
    kernel, params, state = start(name, "pytree", jnp.float64)
    step = step_of(name, kernel)
    keys = jax.random.split(jax.random.key(2), 5)
    scales = jnp.linspace(0.1, 1.0, 5) if name in CONTINUOUS else jnp.ones(5)
    positions = jax.vmap(lambda s: jax.tree.map(lambda x: s * x, state.position))(scales)

    def one(key, position):
        return step(key, params, kernel.init(energy_of(name), params, position))

    many = jax.jit(jax.vmap(one))(keys, positions)
    one = jax.jit(one)
    for i in range(5):
        alone, of_many = (
            one(keys[i], jax.tree.map(lambda x, i=i: x[i], positions)),
            jax.tree.map(lambda x, i=i: x[i], many),
        )
        chex.assert_trees_all_close(alone, of_many, rtol=1e-12, atol=1e-12)


@each_kernel
def test_the_key_decides(name):
    kernel, params, state = start(name)
    step = jax.jit(step_of(name, kernel))
    first, again, *others = (step(jax.random.key(seed), params, state) for seed in (3, 3, 4, 5, 6))
    chex.assert_trees_all_equal(first, again)
    is_noisy = name != "langevin_descent"
    ends = {np.asarray(end.position).tobytes() for end, _ in (first, *others)}
    assert (len(ends) > 1) == is_noisy


@each_kernel
def test_new_params_do_not_trace_again(name):
    kernel, params, state = start(name)
    num_traces = 0

    def counted(params, x):
        nonlocal num_traces
        num_traces += 1
        return energy_of(name)(params, x)

    @jax.jit
    def step(key, params, state):
        return kernel.step(key, counted, params, state)

    ends, traces = [], []
    for i in range(4):
        end, _ = step(jax.random.key(5), params + 0.3 * i, state)
        ends.append(np.asarray(end.position))
        traces.append(num_traces)
    assert traces[0] == traces[3]
    if name.startswith("langevin"):
        assert not np.array_equal(ends[0], ends[3]), "the parameters were baked in"


@each_kernel
def test_a_traced_state_flows_through_scan(name):
    """One compiled chain equals the loop of steps."""
    kernel, params, state = start(name)
    keys = jax.random.split(jax.random.key(6), 10)
    step = jax.jit(lambda k, s: step_of(name, kernel)(k, params, s))
    looped = state
    for key in keys:
        looped, _ = step(key, looped)
    scanned, _ = jax.lax.scan(lambda s, k: step(k, s), state, keys)
    chex.assert_trees_all_close(looped, scanned, rtol=1e-5, atol=1e-6)


@each_kernel
def test_a_kernel_says_when_it_is_not_finite(name):
    kernel, params, state = start(name)

    def broken(params, x):
        return jnp.where(jnp.sum(x) > 1e9, 0.0, jnp.nan) * params

    state = kernel.init(broken, params, state.position)
    _, info = kernel.step(jax.random.key(7), broken, params, state)
    assert not info.is_finite


def positional(function):
    return [
        parameter.name
        for parameter in inspect.signature(function).parameters.values()
        if parameter.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD
    ]


@each_kernel
def test_argument_names(name):
    kernel, _, state = start(name)
    assert positional(kernel.init) == ["energy_fn", "params", "position"]
    assert positional(kernel.step) == ["key", "energy_fn", "params", "state"]
    assert "position" in state._fields


@each_kernel
def test_evaluations_are_told(name):
    kernel, params, state = start(name)
    _, info = jax.eval_shape(step_of(name, kernel), jax.random.key(8), params, state)
    if kernel.num_evaluations is None:
        assert info.num_evaluations.shape == ()
        assert info.num_evaluations.dtype == jnp.int32
    else:
        assert isinstance(kernel.num_evaluations, int)
        assert kernel.num_evaluations > 0


@each_kernel
def test_equal_options_give_equal_kernels(name):
    assert KERNELS[name]() == KERNELS[name]()
    assert hash(KERNELS[name]()) == hash(KERNELS[name]())
    for other in KERNELS:
        assert (KERNELS[name]() == KERNELS[other]()) == (name == other)

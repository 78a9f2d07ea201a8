"""Laws that every kernel keeps. A new kernel is one row of ``KERNELS``."""

import functools
import inspect

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ebjax.samplers import langevin, mala

# name -> a function that builds the kernel anew
KERNELS = {
    "langevin": lambda: langevin(step_size=0.05),
    "langevin_noise_scale": lambda: langevin(step_size=0.05, noise_scale=0.01),
    "langevin_clipped": lambda: langevin(step_size=0.5, gradient_clip=1.0, bounds=(-1.0, 1.0)),
    "langevin_descent": lambda: langevin(step_size=0.05, temperature=0.0),
    "mala": lambda: mala(step_size=0.2),
    "mala_cold": lambda: mala(step_size=0.05, temperature=0.3),
}
POSITIONS = {
    "vector": lambda dtype: jnp.array([0.3, -0.2, 0.9], dtype),
    "pytree": lambda dtype: {"a": jnp.ones((2, 3), dtype), "b": (jnp.array(0.1, dtype),)},
}
# float32 positions also where float64 is on: a kernel must not promote them.
PRECISIONS = {"float32": False, "float32_in_x64": True, "float64": True}

each_kernel = pytest.mark.parametrize("name", KERNELS)
each_position = pytest.mark.parametrize("position_name", POSITIONS)


def energy_fn(params, x):
    """Asymmetric and anharmonic, so that no symmetry hides a mistake."""
    return sum(
        jnp.sum(0.25 * (leaf - params) ** 4 + 0.5 * leaf**2 + 0.3 * leaf)
        for leaf in jax.tree.leaves(x)
    )


def start(kernel, position_name="vector", dtype=jnp.float32):
    position = POSITIONS[position_name](dtype)
    params = jnp.array(0.7, dtype)
    return params, kernel.init(energy_fn, params, position)


def step_with(kernel, key, params, state):
    return kernel.step(key, energy_fn, params, state)


@each_kernel
@each_position
@pytest.mark.parametrize("precision", PRECISIONS)
def test_state_is_a_fixed_point_of_step(name, position_name, precision):
    with jax.enable_x64(PRECISIONS[precision]):
        kernel = KERNELS[name]()
        dtype = jnp.dtype(precision.removesuffix("_in_x64"))
        params = jax.ShapeDtypeStruct((), dtype)
        position = jax.eval_shape(lambda: POSITIONS[position_name](dtype))
        init = functools.partial(kernel.init, energy_fn)
        state = jax.eval_shape(init, params, position)
        key = jax.eval_shape(lambda: jax.random.key(0))
        step = functools.partial(step_with, kernel)
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
    kernel = KERNELS[name]()
    params, state = start(kernel, "pytree", jnp.float64)
    key = jax.random.key(1)
    plain = kernel.step(key, energy_fn, params, state)
    jitted = jax.jit(functools.partial(step_with, kernel))(key, params, state)
    assert jitted[1].is_finite
    chex.assert_trees_all_close(plain, jitted, rtol=1e-13, atol=1e-13)


@each_kernel
def test_vmap_equals_a_loop(name, x64):
    kernel = KERNELS[name]()
    params, state = start(kernel, "pytree", jnp.float64)
    step = functools.partial(step_with, kernel)
    keys = jax.random.split(jax.random.key(2), 5)
    scales = jnp.linspace(0.1, 1.0, 5)
    positions = jax.vmap(lambda s: jax.tree.map(lambda x: s * x, state.position))(scales)

    def one(key, position):
        return step(key, params, kernel.init(energy_fn, params, position))

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
    kernel = KERNELS[name]()
    params, state = start(kernel)
    step = jax.jit(functools.partial(step_with, kernel))
    first, again, *others = (step(jax.random.key(seed), params, state) for seed in (3, 3, 4, 5, 6))
    chex.assert_trees_all_equal(first, again)
    is_noisy = name != "langevin_descent"
    ends = {np.asarray(end.position).tobytes() for end, _ in (first, *others)}
    assert (len(ends) > 1) == is_noisy


@each_kernel
def test_new_params_do_not_trace_again(name):
    kernel = KERNELS[name]()
    params, state = start(kernel)
    num_traces = 0

    def counted(params, x):
        nonlocal num_traces
        num_traces += 1
        return energy_fn(params, x)

    @jax.jit
    def step(key, params, state):
        return kernel.step(key, counted, params, state)

    ends = []
    for i in range(4):
        end, _ = step(jax.random.key(5), params + 0.3 * i, state)
        ends.append(np.asarray(end.position))
    assert num_traces == 1
    if name.startswith("langevin"):
        assert not np.array_equal(ends[0], ends[3]), "the parameters were baked in"


@each_kernel
def test_a_traced_state_flows_through_scan(name):
    """One compiled chain equals the loop of steps."""
    kernel = KERNELS[name]()
    params, state = start(kernel)
    keys = jax.random.split(jax.random.key(6), 10)
    step = jax.jit(lambda k, s: kernel.step(k, energy_fn, params, s))
    looped = state
    for key in keys:
        looped, _ = step(key, looped)
    scanned, _ = jax.lax.scan(lambda s, k: step(k, s), state, keys)
    chex.assert_trees_all_close(looped, scanned, rtol=1e-5, atol=1e-6)


@each_kernel
def test_a_kernel_says_when_it_is_not_finite(name):
    kernel = KERNELS[name]()
    params, state = start(kernel)

    def broken(params, x):
        return jnp.where(jnp.sum(x) > 1e9, 0.0, jnp.nan) * params

    state = kernel.init(broken, params, state.position)
    _, info = kernel.step(jax.random.key(7), broken, params, state)
    assert not info.is_finite


@each_kernel
def test_argument_names(name):
    kernel = KERNELS[name]()
    assert list(inspect.signature(kernel.init).parameters) == ["energy_fn", "params", "position"]
    positional = [
        parameter.name
        for parameter in inspect.signature(kernel.step).parameters.values()
        if parameter.kind is not inspect.Parameter.KEYWORD_ONLY
    ]
    assert positional == ["key", "energy_fn", "params", "state"]
    _, state = start(kernel)
    assert "position" in state._fields


@each_kernel
def test_equal_options_give_equal_kernels(name):
    assert KERNELS[name]() == KERNELS[name]()
    assert hash(KERNELS[name]()) == hash(KERNELS[name]())
    for other in KERNELS:
        assert (KERNELS[name]() == KERNELS[other]()) == (name == other)

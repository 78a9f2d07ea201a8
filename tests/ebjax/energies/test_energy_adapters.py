"""Functions and NNX modules as energies."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from ebjax.energies.adapters import from_function, from_linen, from_nnx
from ebjax.samplers import langevin, sample


class Network(nnx.Module):
    """Nested, with a list of layers."""

    def __init__(self, rngs):
        self.first = nnx.Linear(2, 4, rngs=rngs)
        self.layers = nnx.List([nnx.Linear(4, 4, rngs=rngs) for _ in range(2)])
        self.last = nnx.Linear(4, 1, rngs=rngs)

    def __call__(self, x, shift=0.0):
        x = jnp.tanh(self.first(x))
        for layer in self.layers:
            x = jnp.tanh(layer(x))
        return self.last(x) + shift


def with_statistics(rngs):
    return nnx.Sequential(nnx.Linear(2, 2, rngs=rngs), nnx.BatchNorm(2, rngs=rngs))


def test_an_nnx_energy_is_its_module():
    energy = from_nnx(Network)
    key, x = jax.random.key(3), jnp.array([0.3, -1.0])
    params = energy.init(key, x)
    module = Network(nnx.Rngs(key))
    np.testing.assert_allclose(energy.apply(params, x), module(x)[0], rtol=1e-6)
    np.testing.assert_allclose(energy.apply(params, x, 2.0), module(x, 2.0)[0], rtol=1e-6)
    gradient = jax.grad(energy.apply)(params, x)
    expected = nnx.to_pure_dict(nnx.grad(lambda m: m(x)[0])(module))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), gradient, expected)
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(params))


def test_nnx_params_are_an_argument():
    """Other params give other energies, in the same compiled program."""
    energy = from_nnx(Network)
    x = jnp.array([[0.3, -1.0], [0.0, 2.0], [1.0, 1.0]])
    num_traces = 0

    @jax.jit
    def apply(params, x):
        nonlocal num_traces
        num_traces += 1
        return jax.vmap(energy.apply, (None, 0))(params, x)

    first, second = (energy.init(jax.random.key(seed), x[0]) for seed in (0, 1))
    energies = apply(first, x)
    assert np.all(apply(second, x) != energies)
    np.testing.assert_array_equal(apply(first, x), energies)
    assert num_traces == 1
    np.testing.assert_allclose(energies[1], energy.apply(first, x[1]), rtol=1e-5)


def test_samplers_take_an_nnx_energy():
    energy = from_nnx(Network)
    params = energy.init(jax.random.key(0), jnp.zeros(2))
    draws = sample(
        jax.random.key(1),
        langevin(step_size=0.01),
        energy.apply,
        params,
        jnp.zeros((2, 2)),
        num_samples=3,
    )
    assert np.all(np.isfinite(draws.positions))
    assert np.ptp(np.asarray(draws.positions)) > 0


def test_a_module_with_statistics_is_refused():
    with pytest.raises(ValueError, match="holds BatchStat beside its parameters"):
        from_nnx(with_statistics)


def test_nnx_output_of_many_numbers_is_an_error():
    energy = from_nnx(lambda rngs: nnx.Linear(2, 3, rngs=rngs))
    params = energy.init(jax.random.key(0), jnp.zeros(2))
    with pytest.raises(ValueError, match=r"Linear returned shape \(3,\)"):
        energy.apply(params, jnp.zeros(2))


def quadratic(params, x, scale=1.0):
    return scale * params["k"] * jnp.sum(x**2, keepdims=True)


def test_a_function_with_its_params():
    energy = from_function(quadratic, {"k": jnp.array(0.5)})
    params = energy.init(jax.random.key(0), jnp.zeros(2))
    assert energy.apply(params, jnp.array([1.0, 3.0])) == 5.0
    assert energy.apply(params, jnp.array([1.0, 3.0]), 2.0) == 10.0
    assert jax.grad(energy.apply)(params, jnp.array([1.0, 3.0]))["k"] == 10.0


def test_a_function_with_its_own_init():
    energy = from_function(quadratic, lambda key, x: {"k": jax.random.uniform(key) + x.size})
    params = energy.init(jax.random.key(0), jnp.zeros(7))
    assert params["k"] == jax.random.uniform(jax.random.key(0)) + 7
    assert from_function(quadratic, from_linen) == from_function(quadratic, from_linen)


def test_a_function_of_many_numbers_is_an_error():
    energy = from_function(lambda params, x: params * x, 1.0)
    with pytest.raises(ValueError, match=r"returned shape \(2,\)"):
        energy.apply(1.0, jnp.zeros(2))

"""Energies that are wrong give an error on the host or a flag, and never a chain of NaN."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ebjax.samplers import langevin, mala, sample
from ebjax.samplers.evaluate import value, value_and_gradient

START = jnp.array([[0.5, -0.5], [1.0, 2.0]])


def quadratic(params, x):
    return 0.5 * jnp.sum(x**2)


@pytest.mark.parametrize("evaluate", [value, value_and_gradient])
@pytest.mark.parametrize("shape", [(1,), (2,), (2, 2)])
def test_an_energy_that_is_no_scalar_is_named(evaluate, shape):
    def energy_fn(params, x):
        return jnp.ones(shape) * jnp.sum(x)

    with pytest.raises(ValueError, match=r"has the shape \(" + str(shape[0])):
        evaluate(energy_fn, (), START[0])


@pytest.mark.parametrize("kernel", [langevin(step_size=0.1), mala(step_size=0.1)])
def test_a_batched_energy_is_named_through_the_runner(kernel):
    with pytest.raises(ValueError, match="must be a scalar"):
        sample(jax.random.key(0), kernel, lambda p, x: x**2, (), START, num_samples=2)


@pytest.mark.parametrize("kernel", [langevin(step_size=0.1), mala(step_size=0.1)])
def test_integer_positions_are_named(kernel):
    start = jnp.zeros((3, 2), jnp.int32)
    with pytest.raises(TypeError, match="int32"):
        sample(jax.random.key(0), kernel, quadratic, (), start, num_samples=2)


def test_parts_are_what_the_energy_keeps():
    class Weighted:
        def __call__(self, params, x):
            return params * jnp.sum(x**2)

        def evaluate(self, params, x, *, with_gradient):
            return (jnp.sum(x**2), 2.0 * x) if with_gradient else (jnp.sum(x**2),)

        def assemble(self, params, parts):
            return params * parts[0], params * parts[1] if len(parts) > 1 else None

    energy_fn, x = Weighted(), jnp.array([1.0, 2.0])
    energy, gradient, parts = value_and_gradient(energy_fn, 3.0, x)
    plain = value_and_gradient(lambda params, x: energy_fn(params, x), 3.0, x)
    np.testing.assert_allclose(energy, plain[0])
    np.testing.assert_allclose(gradient, plain[1])
    assert plain[2] == ()
    np.testing.assert_allclose(energy_fn.assemble(0.5, parts)[1], x)
    assert value(energy_fn, 3.0, x)[0] == 15.0


def test_a_metropolis_chain_leaves_a_point_of_no_probability():
    def energy_fn(params, x):
        return jnp.where(x[0] > 0.0, quadratic(params, x), jnp.inf)

    start = jnp.full((50, 2), -0.1)
    draws = sample(jax.random.key(0), mala(step_size=0.3), energy_fn, (), start, num_samples=50)
    assert np.all(draws.positions[-1][:, 0] > 0.0)
    assert np.all(np.isfinite(draws.positions))


def test_regions_of_nan_are_never_entered():
    def energy_fn(params, x):
        return jnp.where(x[0] > 0.0, quadratic(params, x), jnp.nan)

    draws = sample(jax.random.key(0), mala(step_size=0.3), energy_fn, (), START, num_samples=200)
    assert np.all(draws.positions[..., 0] > 0.0)
    assert draws.info.is_finite.mean() < 1.0  # and the refused proposals are told

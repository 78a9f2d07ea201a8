"""Paths: parts give the same energy and gradient as a new evaluation, at every β."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from ebjax.samplers import mala
from ebjax.samplers.evaluate import value, value_and_gradient
from ebjax.samplers.smc import geometric_path, normal_energy, power_path


def target_energy(params, x):
    return jnp.sum(0.25 * x**4 + params * x) + x[0] * x[1]


PATHS = {
    "geometric": (lambda: geometric_path(normal_energy, target_energy), ((0.3, 2.0), 0.7)),
    "power": (lambda: power_path(target_energy), 0.7),
}
each_path = pytest.mark.parametrize("name", PATHS)
POINT = np.array([0.4, -1.3])


@each_path
@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_parts_agree_with_the_call(x64, name, beta):
    build, params = PATHS[name]
    path, x = build(), jnp.asarray(POINT)
    parts = value_and_gradient(path, (0.9, params), x)[2]
    energy, gradient = path.assemble((beta, params), parts)
    exact, exact_gradient = jax.value_and_grad(path, 1)((beta, params), x)
    np.testing.assert_allclose(energy, exact, rtol=1e-14)
    np.testing.assert_allclose(gradient, exact_gradient, rtol=1e-14, atol=1e-14)
    energy, parts = value(path, (beta, params), x)
    np.testing.assert_allclose(energy, exact, rtol=1e-14)
    difference = path.difference((beta, params), (0.8, params), parts)
    np.testing.assert_allclose(difference, path((0.8, params), x) - exact, rtol=1e-12)


@each_path
def test_a_kernel_state_moves_to_another_temperature(x64, name):
    build, params = PATHS[name]
    path, kernel = build(), mala(step_size=0.1)
    warm = kernel.init(path, (0.2, params), jnp.asarray(POINT))
    cold = kernel.init(path, (0.9, params), jnp.asarray(POINT))
    energy, gradient = path.assemble((0.9, params), warm.parts)
    np.testing.assert_allclose(energy, cold.energy, rtol=1e-14)
    np.testing.assert_allclose(gradient, cold.gradient, rtol=1e-14)


@each_path
def test_equal_functions_make_equal_paths(name):
    build, _ = PATHS[name]
    assert build() == build()
    assert hash(build()) == hash(build())
    assert geometric_path(target_energy, target_energy) != build()


def test_no_share_of_an_infinite_energy_is_none():
    wall = lambda params, x: jnp.where(x > 0.0, x, jnp.inf)  # noqa: E731
    path, params = geometric_path(lambda params, x: 0.5 * x**2, wall), ((), ())
    x = jnp.array(-1.0)
    assert path((0.0, params), x) == 0.5
    assert path((1e-6, params), x) == jnp.inf
    assert jax.grad(path, 1)((0.0, params), x) == -1.0
    energy, gradient, _ = value_and_gradient(path, (0.0, params), x)
    assert (energy, gradient) == (0.5, -1.0)


def test_normal_energy(x64):
    mean, scale = np.array([0.3, -2.0]), np.array([0.5, 3.0])
    exact = -scipy.stats.norm.logpdf(POINT, mean, scale).sum()
    assert abs(normal_energy((mean, scale), jnp.asarray(POINT)) - exact) < 1e-12
    exact = -scipy.stats.norm.logpdf(POINT, 0.3, 2.0).sum()
    assert abs(normal_energy((0.3, 2.0), jnp.asarray(POINT)) - exact) < 1e-12
    assert normal_energy((0.3, 2.0), jnp.asarray(POINT, jnp.float32)).dtype == jnp.float32

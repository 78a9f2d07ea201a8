"""Metrics against dense linear algebra in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from ebjax.samplers.metric import (
    kinetic_energy,
    make_metric,
    momentum,
    scaled_gradient,
    scaled_noise,
    velocity,
)

DIM = 5
ROOT = np.random.default_rng(0).normal(size=(DIM, DIM))
DENSE = ROOT @ ROOT.T + 0.5 * np.eye(DIM)
DIAGONAL = np.array([0.1, 1.0, 2.0, 30.0, 0.7])
INVERSE_MASSES = {"identity": None, "diagonal": DIAGONAL, "dense": DENSE}

each_metric = pytest.mark.parametrize("name", INVERSE_MASSES)


def matrix(name):
    inverse_mass = INVERSE_MASSES[name]
    if inverse_mass is None:
        return np.eye(DIM)
    return np.diag(inverse_mass) if inverse_mass.ndim == 1 else inverse_mass


def tree(seed):
    vector = np.random.default_rng(seed).normal(size=DIM)
    return {"a": jnp.asarray(vector[:4].reshape(2, 2)), "b": (jnp.asarray(vector[4]),)}, vector


def flat(vector):
    return np.asarray(ravel_pytree(vector)[0])


@each_metric
def test_functions_are_their_matrices(x64, name):
    metric = make_metric(INVERSE_MASSES[name])
    inverse_mass, factor = matrix(name), np.linalg.cholesky(matrix(name))
    as_tree, vector = tree(1)
    for function, of_matrix in (
        (velocity, inverse_mass),
        (momentum, np.linalg.inv(factor).T),
        (scaled_noise, factor),
        (scaled_gradient, factor.T),
    ):
        result = function(metric, as_tree)
        assert jax.tree.structure(result) == jax.tree.structure(as_tree)
        np.testing.assert_allclose(flat(result), of_matrix @ vector, rtol=1e-11, atol=1e-12)
    energy = 0.5 * vector @ inverse_mass @ vector
    np.testing.assert_allclose(kinetic_energy(metric, as_tree), energy, rtol=1e-12)


@each_metric
def test_whitened_momentum(x64, name):
    """For p = M^½ ξ: the kinetic energy is ξ'ξ/2, the velocity F ξ, and F' p is ξ again."""
    metric = make_metric(INVERSE_MASSES[name])
    noise, vector = tree(2)
    p = momentum(metric, noise)
    np.testing.assert_allclose(kinetic_energy(metric, p), 0.5 * vector @ vector, rtol=1e-11)
    np.testing.assert_allclose(
        flat(velocity(metric, p)), flat(scaled_noise(metric, noise)), rtol=1e-10, atol=1e-12
    )
    np.testing.assert_allclose(flat(scaled_gradient(metric, p)), vector, rtol=1e-10, atol=1e-12)


@each_metric
def test_it_may_be_traced(x64, name):
    as_tree, _ = tree(3)
    if INVERSE_MASSES[name] is None:
        return
    function = jax.jit(lambda inverse_mass: scaled_noise(make_metric(inverse_mass), as_tree))
    traced = function(INVERSE_MASSES[name])
    plain = scaled_noise(make_metric(INVERSE_MASSES[name]), as_tree)
    np.testing.assert_allclose(flat(traced), flat(plain), rtol=1e-12)


@each_metric
def test_the_dtype_of_the_position_stays(x64, name):
    """A metric of another precision does not promote."""
    metric = make_metric(INVERSE_MASSES[name])
    as_tree = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), tree(4)[0])
    for function in (velocity, momentum, scaled_noise, scaled_gradient):
        assert {leaf.dtype for leaf in jax.tree.leaves(function(metric, as_tree))} == {
            jnp.dtype(jnp.float32)
        }


@pytest.mark.parametrize(
    ("inverse_mass", "message"),
    [
        (1.0, r"shape \(\)"),
        (np.ones((2, 3)), r"shape \(2, 3\)"),
        (np.ones((2, 2, 2)), r"shape \(2, 2, 2\)"),
        (np.array([1.0, 0.0]), "not all positive"),
        (np.array([1.0, np.nan]), "not all positive"),
        (np.array([[1.0, 0.2], [0.1, 1.0]]), "not symmetric"),
        (np.array([[1.0, 2.0], [2.0, 1.0]]), "not positive definite"),
    ],
)
def test_wrong_inverse_masses(inverse_mass, message):
    with pytest.raises(ValueError, match=message):
        make_metric(inverse_mass)


@pytest.mark.parametrize("function", [velocity, momentum, scaled_noise, scaled_gradient])
def test_a_size_that_does_not_fit(function):
    with pytest.raises(ValueError, match="the position has 3 components"):
        function(make_metric(jnp.ones(2)), jnp.ones(3))

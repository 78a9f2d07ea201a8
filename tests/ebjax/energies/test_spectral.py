"""Spectral normalisation against singular values, before and after training."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ebjax.energies.networks import convolutional_energy, mlp_energy
from ebjax.energies.spectral import (
    largest_singular_value,
    normalized_objective,
    spectral_normalize,
    spectrally_normalized,
)
from ebjax.objectives.contrastive_divergence import persistent_contrastive_divergence
from ebjax.samplers import langevin

ENERGY = mlp_energy((32, 32))
INIT = jax.jit(lambda key: ENERGY.init(key, jnp.zeros(2)))
normalize = jax.jit(spectral_normalize)


def singular_values(params):
    """The largest one of each matrix, exact."""
    matrices = [leaf for leaf in jax.tree.leaves(params) if leaf.ndim >= 2]
    return np.array([np.linalg.norm(np.reshape(m, (-1, m.shape[-1])), 2) for m in matrices])


@pytest.mark.parametrize("shape", [(40, 7), (64, 64), (1, 5), (3, 3, 4, 8)])
def test_the_largest_singular_value(shape):
    for seed in range(5):
        matrix = jax.random.normal(jax.random.key(seed), shape)
        exact = np.linalg.norm(np.reshape(matrix, (-1, shape[-1])), 2)
        found = float(jax.jit(largest_singular_value)(matrix))
        assert 0.95 * exact <= found <= exact * (1.0 + 1e-5)


def test_few_iterations_are_not_enough():
    """The control: without iterating the estimate is far off, so the test above can fail."""
    matrix = jax.random.normal(jax.random.key(0), (64, 64))
    assert largest_singular_value(matrix, num_iterations=1) < 0.95 * np.linalg.norm(matrix, 2)


def test_its_gradient_is_that_of_the_norm(x64):
    matrix = jax.random.normal(jax.random.key(0), (6, 4))
    left, _, right = np.linalg.svd(matrix)
    value = functools.partial(largest_singular_value, num_iterations=1000)
    gradient = jax.grad(value)(matrix)
    np.testing.assert_allclose(gradient, np.outer(left[:, 0], right[0]), atol=1e-8)


def test_only_matrices_are_scaled_and_zeros_stay():
    params = {"kernel": jnp.zeros((3, 4)), "bias": jnp.arange(3.0), "scale": jnp.array(9.0)}
    new = normalize(params)
    jax.tree.map(np.testing.assert_array_equal, new, params)
    gradient = jax.grad(lambda p: sum(jnp.sum(v) for v in spectral_normalize(p).values()))(params)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))
    params = {"a": 2.0 * jnp.eye(3), "b": 2.0 * jnp.eye(3)}
    new = spectral_normalize(params, select=lambda path, leaf: path[0].key == "a")
    assert (float(new["a"][0, 0]), float(new["b"][0, 0])) == (1.0, 2.0)


@pytest.mark.parametrize("bound", [1.0, 3.0])
def test_the_energy_is_lipschitz(bound):
    """Three layers and the slope of SiLU, at most 1.1, twice; without it the slope is larger."""
    energy = spectrally_normalized(ENERGY, bound=bound)
    params = jax.tree.map(lambda leaf: 8.0 * leaf, INIT(jax.random.key(0)))
    points = 3.0 * jax.random.normal(jax.random.key(1), (500, 2))
    slopes = [
        np.linalg.norm(jax.jit(jax.vmap(jax.grad(e.apply, 1), (None, 0)))(params, points), axis=1)
        for e in (energy, ENERGY)
    ]
    limit = bound**3 * 1.1**2 * 1.05**3
    assert slopes[0].max() < limit
    assert slopes[0].max() > 0.05 * limit  # not flat
    assert slopes[1].max() > limit


def test_convolutions():
    energy = convolutional_energy((4, 8), dense_features=8)
    params = jax.jit(lambda: energy.init(jax.random.key(0), jnp.zeros((8, 8, 1))))()
    norms = singular_values(normalize(params))
    assert len(norms) == 4
    assert np.all((norms >= 0.9999) & (norms < 1.05))


def test_normalised_after_training():
    """Training grows the weights; the norms of those that act stay at one."""
    objective = normalized_objective(
        persistent_contrastive_divergence(
            ENERGY.apply,
            langevin(step_size=0.05),
            lambda key: jax.random.normal(key, (2,)),
            num_steps=5,
        )
    )
    batch = 3.0 + 0.3 * jax.random.normal(jax.random.key(1), (64, 2))
    start = INIT(jax.random.key(0))
    optimizer = optax.adam(0.02)

    @jax.jit
    def run(params):
        carry = objective.init(jax.random.key(2), params, batch)

        def body(loop, t):
            params, carry, opt_state = loop
            keys = jax.random.split(jax.random.fold_in(jax.random.key(3), t), 64)
            gradient, (carry, metrics) = jax.grad(objective.loss, has_aux=True)(
                params, carry, keys, batch
            )
            updates, opt_state = optimizer.update(gradient, opt_state)
            return (optax.apply_updates(params, updates), carry, opt_state), metrics

        return jax.lax.scan(body, (params, carry, optimizer.init(params)), jnp.arange(200))

    (trained, _, _), metrics = run(start)
    norms = singular_values(normalize(trained))
    assert np.all((norms > 0.95) & (norms < 1.05))
    raw = singular_values(trained)
    assert np.abs(raw / singular_values(start) - 1.0).max() > 0.1  # the weights did move
    assert np.abs(raw - 1.0).max() > 0.5  # and are not normalised by themselves
    assert metrics["energy_gap"][-1] < metrics["energy_gap"][0]
    # Energies cannot differ by more than the slope allows over the distance of about 3 and 4.
    assert np.abs(metrics["energy_gap"]).max() < 6.0


def test_the_objective_at_normalised_weights_is_that_of_the_normalised_energy(x64):
    def plain(energy_fn):
        return persistent_contrastive_divergence(
            energy_fn,
            langevin(step_size=0.1),
            lambda key: jax.random.normal(key, (2,)),
            num_steps=1,
        )

    energy = mlp_energy((8,))
    params = energy.init(jax.random.key(0), jnp.zeros(2))
    params = jax.tree.map(lambda leaf: leaf.astype(float), params)
    batch = jax.random.normal(jax.random.key(1), (4, 2))
    keys = jax.random.split(jax.random.key(2), 4)
    inside = plain(spectrally_normalized(energy).apply)
    outside = normalized_objective(plain(energy.apply))
    carry = inside.init(jax.random.key(3), params, batch)
    gradients = [
        jax.jit(jax.grad(objective.loss, has_aux=True))(params, carry, keys, batch)[0]
        for objective in (inside, outside)
    ]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-10), *gradients)


def test_one_network_of_several():
    from ebjax.types import Objective

    seen = Objective(lambda *_: (), lambda params, c, k, b: (jnp.sum(params["energy"]), params))
    objective = normalized_objective(seen, name="energy")
    params = {"energy": 4.0 * jnp.eye(2), "sampler": 4.0 * jnp.eye(2)}
    loss, new = objective.loss(params, (), None, None)
    assert loss == pytest.approx(2.0)
    assert float(new["sampler"][0, 0]) == 4.0


@pytest.mark.parametrize("options", [{"bound": 0.0}, {"num_iterations": 0}])
def test_errors_name_the_value(options):
    (name, value), *_ = options.items()
    for make in (spectral_normalize, spectrally_normalized, normalized_objective):
        with pytest.raises(ValueError, match=f"{name} is {value}"):
            make(ENERGY if make is not spectral_normalize else {}, **options)

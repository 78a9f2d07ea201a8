"""Networks as energies: one example in, one scalar out, smooth in it, nothing shared."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ebjax.energies import convolutional_energy, from_linen, mlp_energy


class PairEnergy(nn.Module):
    """A user's own module, on a pytree and with context."""

    @nn.compact
    def __call__(self, x, label=0):
        hidden = nn.tanh(nn.Dense(8)(jnp.append(x["a"], x["b"])))
        return nn.Dense(3)(hidden)[label]


ENERGIES = {
    "mlp": (lambda: mlp_energy((16, 8)), lambda key: jax.random.normal(key, (5,))),
    "mlp_of_matrix": (
        lambda: mlp_energy((16,), activation=nn.tanh),
        lambda key: jax.random.normal(key, (3, 2)),
    ),
    "convolutional": (
        lambda: convolutional_energy((4, 8), dense_features=8),
        lambda key: jax.random.normal(key, (5, 7, 2)),
    ),
    "pytree": (
        lambda: from_linen(PairEnergy()),
        lambda key: {"a": jax.random.normal(key, (3,)), "b": jax.random.normal(key)},
    ),
}
each_energy = pytest.mark.parametrize("name", ENERGIES)


def made(name):
    build, example = ENERGIES[name]
    energy = build()
    batch = jax.jit(jax.vmap(example))(jax.random.split(jax.random.key(1), 6))
    params = jax.jit(energy.init)(jax.random.key(0), jax.tree.map(lambda x: x[0], batch))
    return energy, params, batch


@each_energy
def test_one_scalar_that_depends_on_params_and_example(name):
    energy, params, batch = made(name)
    energies = jax.jit(jax.vmap(energy.apply, (None, 0)))(params, batch)
    assert energies.shape == (6,)
    assert energies.dtype == jnp.float32
    assert len(np.unique(energies)) == 6
    one = jax.tree.map(lambda x: x[0], batch)
    gradient = jax.jit(jax.grad(energy.apply))(params, one)
    unused = [np.all(np.asarray(leaf) == 0) for leaf in jax.tree.leaves(gradient)]
    assert sum(unused) == 0


@each_energy
def test_init_reads_the_shape_and_the_key_only(name):
    energy, params, batch = made(name)
    init = jax.jit(energy.init)
    other = jax.tree.map(lambda x: 100.0 * np.asarray(x)[3], batch)
    again = init(jax.random.key(0), other)
    jax.tree.map(np.testing.assert_array_equal, params, again)
    anew = jax.tree.leaves(init(jax.random.key(5), other))
    assert any(np.any(a != b) for a, b in zip(jax.tree.leaves(params), anew, strict=True))


@each_energy
def test_batch_mates_change_nothing(name):
    """No batch statistics: others in the batch may be anything, also not finite."""
    energy, params, batch = made(name)
    apply = jax.jit(jax.vmap(energy.apply, (None, 0)))
    energies = apply(params, batch)
    for junk in (1e3, jnp.nan):
        spoiled = jax.tree.map(
            lambda x, junk=junk: np.concatenate([x[:1], np.full_like(x[1:], junk)]), batch
        )
        np.testing.assert_allclose(apply(params, spoiled)[0], energies[0], rtol=1e-6)


@each_energy
def test_gradient_in_x_is_smooth(name, x64):
    """The gradient is that of central differences, and so is the curvature: it has no kinks."""
    build, example = ENERGIES[name]
    energy = build()
    x, direction = (example(jax.random.key(seed)) for seed in (2, 3))
    params = jax.jit(energy.init)(jax.random.key(0), x)
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), params)

    @jax.jit
    def along(t):
        moved = jax.tree.map(lambda a, b: a + t * b, x, direction)
        return energy.apply(params, moved)

    slope, bend = jax.jit(jax.grad(along)), jax.jit(jax.grad(jax.grad(along)))
    eps = 1e-4
    for t in (0.0, 0.7):
        central = (along(t + eps) - along(t - eps)) / (2 * eps)
        np.testing.assert_allclose(slope(t), central, rtol=1e-5, atol=1e-7)
        curvature = bend(t)
        central = (slope(t + eps) - slope(t - eps)) / (2 * eps)
        np.testing.assert_allclose(curvature, central, rtol=1e-5, atol=1e-7)
        assert abs(curvature) > 1e-6, "piecewise linear: samplers would see no curvature"


def test_the_smoothness_check_sees_relu():
    energy = mlp_energy((16, 8), activation=nn.relu)
    params = energy.init(jax.random.key(0), jnp.zeros(5))
    curvature = jax.grad(jax.grad(lambda t: energy.apply(params, t * jnp.arange(1.0, 6.0))))(0.7)
    assert curvature == 0.0


def test_a_convolutional_energy_without_its_dense_layer():
    """The first layer keeps 6 x 6, the second halves it, and one number is read off the map."""
    energy = convolutional_energy((2, 3), dense_features=0)
    key, image = jax.random.key(0), jax.ShapeDtypeStruct((6, 6, 1), jnp.float32)
    params = jax.eval_shape(energy.init, key, image)
    assert params["Dense_0"]["kernel"].shape == (3 * 3 * 3, 1)
    assert "Dense_1" not in params
    assert jax.eval_shape(energy.apply, params, image).shape == ()


def test_context_reaches_the_module():
    energy, params, batch = made("pytree")
    one = jax.tree.map(lambda x: x[0], batch)
    energies = [energy.apply(params, one, label) for label in range(3)]
    assert len(set(map(float, energies))) == 3


def test_more_than_one_number_is_an_error():
    energy = from_linen(nn.Dense(4))
    params = energy.init(jax.random.key(0), jnp.zeros(2))
    with pytest.raises(ValueError, match=r"Dense returned shape \(4,\)"):
        energy.apply(params, jnp.zeros(2))


def test_one_number_of_any_rank_is_a_scalar():
    energy = from_linen(nn.Dense(1))
    params = energy.init(jax.random.key(0), jnp.zeros(2))
    assert energy.apply(params, jnp.ones(2)).shape == ()


def test_equal_networks_share_their_compiled_programs():
    assert mlp_energy((16,)) == mlp_energy((16,))
    assert mlp_energy((16,)) != mlp_energy((8,))

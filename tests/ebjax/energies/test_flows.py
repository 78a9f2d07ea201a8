"""Flows are normalised, their draws have their density, and they start as what they say."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("distrax")

from ebjax.energies import flows
from ebjax.energies.flows import coupling_flow, flow_energy

COUPLINGS = ["affine", "spline"]


def far_from_the_start(coupling, shape=(2,), **options):
    """A flow whose parameters have all been moved at random."""
    flow = coupling_flow(
        shape, num_layers=3, features=(8,), coupling=coupling, num_bins=4, **options
    )
    params = flow.init(jax.random.key(0), jnp.zeros(shape))
    leaves, treedef = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    moved = [
        (leaf + 0.15 * jax.random.normal(key, leaf.shape)).astype(float)
        for leaf, key in zip(leaves, keys, strict=True)
    ]
    return flow, jax.tree.unflatten(treedef, moved)


def plane(half=14.0, num=281):
    line = jnp.linspace(-half, half, num)
    points = jnp.stack(jnp.meshgrid(line, line, indexing="ij"), axis=-1).reshape(-1, 2)
    return points, (line[1] - line[0]) ** 2


def mass(log_prob_fn):
    points, area = plane()
    return float(jnp.exp(jax.jit(jax.vmap(log_prob_fn))(points)).sum() * area)


@pytest.mark.parametrize("coupling", COUPLINGS)
def test_the_density_integrates_to_one(x64, coupling):
    flow, params = far_from_the_start(coupling)
    assert mass(lambda x: flow.log_prob(params, x)) == pytest.approx(1.0, abs=2e-3)
    # The law is not the one that it started as.
    assert abs(flow.log_prob(params, jnp.zeros(2)) + math.log(2 * math.pi)) > 0.1


@pytest.mark.parametrize("coupling", COUPLINGS)
def test_the_integral_sees_a_forgotten_determinant(x64, coupling):
    flow, params = far_from_the_start(coupling)
    settings = flow.log_prob.keywords["settings"]

    def without(x):
        z = flows._distribution(params, settings).bijector.inverse(x)
        return -0.5 * jnp.sum(z**2) - math.log(2 * math.pi)

    assert abs(mass(without) - 1.0) > 0.02


@pytest.mark.parametrize(
    ("coupling", "shape"), [("affine", (2, 2)), ("spline", (1,)), ("spline", (3,))]
)
def test_the_map_inverts_and_its_determinant_is_that_of_its_jacobian(x64, coupling, shape):
    flow, params = far_from_the_start(coupling, shape, scale=1.7, location=0.3)
    settings, size = flow.log_prob.keywords["settings"], math.prod(shape)

    @jax.jit
    def there_and_back(z):
        bijector = flows._distribution(params, settings).bijector
        x = bijector.forward(z)
        log_det = jnp.linalg.slogdet(jax.jacfwd(bijector.forward)(z))[1]
        return bijector.inverse(x), log_det, flow.log_prob(params, x.reshape(shape))

    z = jax.random.normal(jax.random.key(2), (size,), float)
    back, log_det, log_prob = there_and_back(z)
    np.testing.assert_allclose(back, z, atol=1e-9)
    exact = -0.5 * np.sum(z**2) - 0.5 * size * math.log(2 * math.pi) - log_det
    np.testing.assert_allclose(log_prob, exact, atol=1e-9)
    assert abs(log_det - size * math.log(1.7)) > 0.01  # more than the frame
    assert jax.eval_shape(flow.sample, params, jax.random.key(0)).shape == shape


@pytest.mark.parametrize("coupling", COUPLINGS)
def test_draws_have_the_density(x64, coupling):
    """Means of test functions over draws against the integral of the density, in SE."""
    flow, params = far_from_the_start(coupling)
    points, area = plane()
    weights = jnp.exp(jax.jit(jax.vmap(lambda x: flow.log_prob(params, x)))(points)) * area
    keys = jax.random.split(jax.random.key(3), 5000)
    draws = jax.jit(jax.vmap(lambda key: flow.sample(params, key)))(keys)

    def features(x):
        return jnp.stack([jnp.tanh(x[..., 0]), jnp.tanh(x[..., 1]), jnp.cos(x[..., 0] - x[..., 1])])

    exact = features(points) @ weights
    seen = features(draws)
    z = (seen.mean(1) - exact) / (seen.std(1) / math.sqrt(len(keys)))
    assert np.abs(z).max() < 5.0
    # A law that the flow is not would be told apart.
    standard = features(jax.random.normal(jax.random.key(4), (5000, 2))).mean(1)
    assert np.abs((standard - exact) / (seen.std(1) / math.sqrt(len(keys)))).max() > 5.0


@pytest.mark.parametrize("coupling", COUPLINGS)
def test_it_starts_as_the_normal_law_of_its_frame(coupling):
    location, scale = np.array([1.0, -2.0]), np.array([0.5, 3.0])
    flow = coupling_flow(
        (2,), num_layers=2, features=(8,), coupling=coupling, location=location, scale=scale
    )
    params = flow.init(jax.random.key(0), jnp.zeros(2))
    x = jnp.array([0.7, 1.0])
    exact = -0.5 * np.sum(((x - location) / scale) ** 2) - np.log(2 * np.pi) - np.log(scale).sum()
    np.testing.assert_allclose(flow.log_prob(params, x), exact, rtol=1e-4)
    energy = flow_energy(flow)
    np.testing.assert_allclose(energy.apply(params, x), -exact, rtol=1e-4)


def test_equal_options_make_equal_flows():
    first, second = (coupling_flow((2,), scale=np.ones(2)) for _ in range(2))
    assert first == second
    assert hash(first) == hash(second)
    assert first != coupling_flow((2,), scale=np.ones(2), num_bins=9)


ERRORS = {
    "num_layers is 1": {"num_layers": 1},
    "coupling is 'cubic'": {"coupling": "cubic"},
    "num_bins is 1": {"num_bins": 1},
    r"bound is 0\.0": {"bound": 0.0},
    r"scale is -1\.0": {"scale": -1.0},
    r"location has shape \(3,\)": {"location": np.zeros(3)},
}


@pytest.mark.parametrize("message", ERRORS)
def test_errors_name_the_value(message):
    with pytest.raises(ValueError, match=message):
        coupling_flow((2,), **ERRORS[message])


def test_a_wrong_shape_is_named():
    with pytest.raises(ValueError, match=r"x has shape \(3,\)"):
        coupling_flow((2,)).init(jax.random.key(0), jnp.zeros(3))
    with pytest.raises(ValueError, match=r"shape is \(0,\)"):
        coupling_flow((0,))

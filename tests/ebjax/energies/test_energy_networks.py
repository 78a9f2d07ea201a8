"""Networks as energies: one example in, one scalar out, smooth in it, nothing shared."""

import functools
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ebjax.energies.networks import (
    Graph,
    class_conditional_energy,
    convolutional_energy,
    from_linen,
    graph_energy,
    mlp_classifier,
    mlp_energy,
    residual_classifier,
    residual_energy,
    set_energy,
    vision_transformer_classifier,
    vision_transformer_energy,
)


class PairEnergy(nn.Module):
    """A user's own module, on a pytree and with context."""

    @nn.compact
    def __call__(self, x, label=0):
        hidden = nn.tanh(nn.Dense(8)(jnp.append(x["a"], x["b"])))
        return nn.Dense(3)(hidden)[label]


def random_graph(key, num_nodes=4, num_kinds=2):
    keys = jax.random.split(key)
    return Graph(
        jax.random.normal(keys[0], (num_nodes, 3)),
        jax.random.uniform(keys[1], (num_nodes, num_nodes, num_kinds)),
    )


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
    "mlp_with_frequencies": (
        lambda: mlp_energy((8,), num_frequencies=4, center=[1.0, 2.0], scale=3.0),
        lambda key: jax.random.normal(key, (2,)),
    ),
    "residual": (
        lambda: residual_energy((3, 4)),
        lambda key: jax.random.normal(key, (5, 4, 2)),
    ),
    "vision_transformer": (
        lambda: vision_transformer_energy(width=4, num_layers=1, num_heads=2),
        lambda key: jax.random.normal(key, (4, 4, 1)),
    ),
    "set": (
        lambda: set_energy(width=4, num_layers=1, num_heads=2, features=(4,)),
        lambda key: jax.random.normal(key, (3, 2)),
    ),
    "graph": (
        lambda: graph_energy(width=4, num_layers=2, features=(4,)),
        random_graph,
    ),
    "class_conditional": (
        lambda: class_conditional_energy(3, (8,)),
        lambda key: jax.random.normal(key, (2,)),
    ),
    "pytree": (
        lambda: from_linen(PairEnergy()),
        lambda key: {"a": jax.random.normal(key, (3,)), "b": jax.random.normal(key)},
    ),
}
each_energy = pytest.mark.parametrize("name", ENERGIES)


class Made(NamedTuple):
    """An energy with params, a batch of six, and its compiled values and slopes in the params."""

    energy: Any
    init: Any
    params: Any
    batch: Any
    evaluate: Any
    num_traces: list


@functools.cache
def made(name):
    """In single precision, whichever test asks first."""
    build, example = ENERGIES[name]
    energy, num_traces = build(), []

    @jax.jit
    def evaluate(params, batch):
        num_traces.append(1)
        return jax.vmap(jax.value_and_grad(energy.apply), (None, 0))(params, batch)

    with jax.enable_x64(False):
        batch = jax.jit(jax.vmap(example))(jax.random.split(jax.random.key(1), 6))
        init = jax.jit(energy.init)
        params = init(jax.random.key(0), jax.tree.map(lambda x: x[0], batch))
    return Made(energy, init, params, batch, evaluate, num_traces)


@each_energy
def test_one_scalar_that_depends_on_params_and_example(name):
    it = made(name)
    energies, gradients = it.evaluate(it.params, it.batch)
    assert energies.shape == (6,)
    assert energies.dtype == jnp.float32
    assert len(np.unique(energies)) == 6
    unused = [
        jax.tree_util.keystr(path)
        for path, leaf in jax.tree_util.tree_leaves_with_path(gradients)
        if np.all(np.asarray(leaf)[0] == 0)
    ]
    assert unused == []


@each_energy
def test_one_trace_serves_all_params_and_examples(name):
    it = made(name)
    it.evaluate(it.params, it.batch)
    it.evaluate(jax.tree.map(lambda leaf: leaf + 0.1, it.params), it.batch)
    assert len(it.num_traces) == 1


@each_energy
def test_init_reads_the_shape_and_the_key_only(name):
    it = made(name)
    other = jax.tree.map(lambda x: 100.0 * np.asarray(x)[3], it.batch)
    again = it.init(jax.random.key(0), other)
    jax.tree.map(np.testing.assert_array_equal, it.params, again)
    anew = jax.tree.leaves(it.init(jax.random.key(5), other))
    assert any(np.any(a != b) for a, b in zip(jax.tree.leaves(it.params), anew, strict=True))


@each_energy
def test_batch_mates_change_nothing(name):
    """No batch statistics: others in the batch may be anything, also not finite."""
    it = made(name)
    energies, _ = it.evaluate(it.params, it.batch)
    for junk in (1e3, jnp.nan):
        spoiled = jax.tree.map(
            lambda x, junk=junk: np.concatenate([x[:1], np.full_like(x[1:], junk)]), it.batch
        )
        found, _ = it.evaluate(it.params, spoiled)
        np.testing.assert_allclose(found[0], energies[0], rtol=1e-6)


@each_energy
def test_gradient_in_x_is_smooth(name, x64):
    """The gradient is that of central differences, and so is the curvature: it has no kinks."""
    it = made(name)
    params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), it.params)
    x, direction = (
        jax.tree.map(lambda leaf, i=i: np.asarray(leaf[i], np.float64), it.batch) for i in (0, 1)
    )

    def along(t):
        moved = jax.tree.map(lambda a, b: a + t * b, x, direction)
        return it.energy.apply(params, moved)

    @jax.jit
    @jax.vmap
    def with_derivatives(t):
        """Value, slope and curvature; the slope in reverse mode, as samplers take it."""
        (value, slope), (_, bend) = jax.jvp(jax.value_and_grad(along), (t,), (jnp.ones(()),))
        return value, slope, bend

    eps = 1e-4
    points = np.array([[t - eps, t, t + eps] for t in (0.0, 0.7)])
    value, slope, bend = (np.asarray(a).reshape(2, 3) for a in with_derivatives(points.ravel()))
    for of, derivative in ((value, slope), (slope, bend)):
        central = (of[:, 2] - of[:, 0]) / (2 * eps)
        np.testing.assert_allclose(derivative[:, 1], central, rtol=1e-5, atol=1e-7)
    assert np.abs(bend[:, 1]).min() > 1e-6, "piecewise linear: samplers would see no curvature"


def test_the_smoothness_check_sees_relu():
    energy = mlp_energy((16, 8), activation=nn.relu)
    params = energy.init(jax.random.key(0), jnp.zeros(5))
    curvature = jax.grad(jax.grad(lambda t: energy.apply(params, t * jnp.arange(1.0, 6.0))))(0.7)
    assert curvature == 0.0


@functools.cache
def smooth_set(num_layers):
    energy = set_energy(width=8, num_layers=num_layers, num_heads=2, features=(4,))
    params = jax.jit(energy.init)(jax.random.key(0), jnp.zeros((2, 3)))
    return jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params), jax.jit(energy.apply)


@pytest.mark.parametrize("num_layers", [0, 1])
def test_a_set_has_no_order(x64, num_layers):
    params, apply = smooth_set(num_layers)
    x = np.random.default_rng(0).normal(size=(5, 3))
    mask = np.ones(5, bool)
    order = np.array([3, 0, 4, 1, 2])
    energy = apply(params, x, mask)
    assert abs(apply(params, x[order], mask) - energy) < 1e-13
    # The control: permuting one coordinate alone gives another set.
    spoiled = np.column_stack([x[order, 0], x[:, 1:]])
    assert abs(apply(params, spoiled, mask) - energy) > 1e-4


@pytest.mark.parametrize("num_layers", [0, 1])
def test_padding_of_a_set_is_not_read(x64, num_layers):
    params, apply = smooth_set(num_layers)
    x = np.random.default_rng(0).normal(size=(3, 3))
    energy = apply(params, x, np.ones(3, bool))
    padded = np.full((5, 3), np.nan)
    padded[[0, 2, 3]] = x
    mask = np.array([True, False, True, True, False])
    assert abs(apply(params, padded, mask) - energy) < 1e-13
    slope = jax.jit(jax.grad(apply, 1))(params, padded, mask)
    assert np.all(np.isfinite(slope))
    np.testing.assert_array_equal(slope[~mask], 0.0)
    assert np.all(np.any(np.asarray(slope)[mask] != 0.0, axis=1))
    # The control: without the mask, the padding counts.
    assert abs(apply(params, np.nan_to_num(padded), np.ones(5, bool)) - energy) > 1e-4
    assert np.isfinite(apply(params, padded, np.zeros(5, bool)))  # the empty set


@functools.cache
def smooth_graph():
    energy = graph_energy(width=6, num_layers=2, features=(4,))
    example = Graph(jnp.zeros((2, 3)), jnp.zeros((2, 2, 2)))
    params = jax.jit(energy.init)(jax.random.key(0), example)
    return jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params), jax.jit(energy.apply)


def numpy_graph(num_nodes=5):
    generator = np.random.default_rng(0)
    return Graph(generator.normal(size=(num_nodes, 3)), generator.random((num_nodes, num_nodes, 2)))


def test_a_graph_has_no_order(x64):
    params, apply = smooth_graph()
    x, mask, order = numpy_graph(), np.ones(5, bool), np.array([3, 0, 4, 1, 2])
    energy = apply(params, x, mask)
    turned = Graph(x.nodes[order], x.adjacency[order][:, order])
    assert abs(apply(params, turned, mask) - energy) < 1e-13
    # The controls: nodes without their edges, and edges turned round.
    assert abs(apply(params, turned._replace(adjacency=x.adjacency), mask) - energy) > 1e-4
    reverse = x._replace(adjacency=x.adjacency.swapaxes(0, 1))
    assert abs(apply(params, reverse, mask) - energy) > 1e-4


def test_padding_of_a_graph_is_not_read(x64):
    params, apply = smooth_graph()
    small, mask = numpy_graph(3), np.array([True, False, True, True, False])
    energy = apply(params, small, np.ones(3, bool))
    padded = Graph(np.full((5, 3), np.nan), np.full((5, 5, 2), np.nan))
    padded.nodes[mask] = small.nodes
    padded.adjacency[np.ix_(mask, mask)] = small.adjacency
    assert abs(apply(params, padded, mask) - energy) < 1e-13
    slope = jax.jit(jax.grad(apply, 1))(params, padded, mask)
    outside = ~(mask[:, None] & mask)
    np.testing.assert_array_equal(slope.nodes[~mask], 0.0)
    np.testing.assert_array_equal(slope.adjacency[outside], 0.0)
    assert np.all(np.asarray(slope.adjacency)[~outside] != 0.0)
    full = jax.tree.map(np.nan_to_num, padded)
    assert abs(apply(params, full, np.ones(5, bool)) - energy) > 1e-4


def test_one_kind_of_edge_needs_no_axis():
    energy = graph_energy(width=4, num_layers=1, features=())
    x = random_graph(jax.random.key(0), num_kinds=1)
    params = energy.init(jax.random.key(1), x)
    flat = x._replace(adjacency=x.adjacency[..., 0])
    assert energy.apply(params, flat) == energy.apply(params, x)


def test_standardisation_is_a_change_of_units():
    """Data in other units, with their mean and deviation given, have the same energies."""
    plain = mlp_energy((8,))
    params = plain.init(jax.random.key(0), jnp.zeros(2))
    center, scale = np.array([100.0, -3.0]), np.array([20.0, 0.1])
    moved = mlp_energy((8,), center=center, scale=scale)
    x = jax.random.normal(jax.random.key(1), (2,))
    shifted = (center + scale * np.asarray(x)).astype(np.float32)
    np.testing.assert_allclose(moved.apply(params, shifted), plain.apply(params, x), rtol=1e-4)
    assert abs(plain.apply(params, shifted) - plain.apply(params, x)) > 1e-2


def test_classes_differ_and_weights_of_classes_relax_labels():
    for kind in ("modulated", "projected"):
        energy = class_conditional_energy(3, (8,), kind=kind)
        x = jnp.array([0.5, -1.0])
        params = energy.init(jax.random.key(0), x)
        apply = jax.jit(energy.apply)
        energies = [apply(params, x, label) for label in range(3)]
        assert len(set(map(float, energies))) == 3
        np.testing.assert_allclose(apply(params, x, jnp.eye(3)[1]), energies[1], rtol=1e-6)
        # A label out of range is no class, and not the last one.
        np.testing.assert_allclose(apply(params, x, 7), apply(params, x, jnp.zeros(3)), rtol=1e-6)
        assert all(abs(apply(params, x, 7) - e) > 1e-5 for e in energies)


CLASSIFIERS = {
    "mlp": (lambda: mlp_classifier(3, (4,)), (5,)),
    "residual": (lambda: residual_classifier(3, (2, 3)), (5, 4, 1)),
    "vision_transformer": (
        lambda: vision_transformer_classifier(3, width=4, num_layers=1, num_heads=2),
        (4, 4, 1),
    ),
}


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_a_classifier_has_one_logit_a_class(name):
    build, shape = CLASSIFIERS[name]
    classifier = build()
    example = jax.ShapeDtypeStruct(shape, jnp.float32)
    params = jax.eval_shape(classifier.init, jax.random.key(0), example)
    assert jax.eval_shape(classifier.apply, params, example).shape == (3,)


ERRORS = {
    "features is (0,)": lambda: mlp_energy((0,)),
    "num_frequencies is -1": lambda: mlp_energy(num_frequencies=-1),
    "scale is 0.0": lambda: mlp_energy(scale=0.0),
    "center is nan": lambda: mlp_energy(center=np.nan),
    "center has 3 numbers; an example has 2": lambda: init(mlp_energy(center=np.ones(3)), (2,)),
    "features is ()": lambda: residual_energy(()),
    "blocks_per_stage is 0": lambda: residual_energy(blocks_per_stage=0),
    "An example has shape (8, 8)": lambda: init(residual_energy((2,)), (8, 8)),
    "An example has shape (64,)": lambda: init(convolutional_energy((2,)), (64,)),
    "patch_size is 3; it must divide": lambda: init(
        vision_transformer_energy(patch_size=3), (8, 8, 1)
    ),
    "num_heads is 3": lambda: vision_transformer_energy(num_heads=3),
    "num_layers is -1": lambda: set_energy(num_layers=-1),
    "A set has shape (5,)": lambda: init(set_energy(), (5,)),
    "mask has shape (4,)": lambda: init(set_energy(), (3, 2), jnp.ones(4, bool)),
    "adjacency has shape (3, 2)": lambda: graph_energy().init(
        jax.random.key(0), Graph(jnp.ones((3, 1)), jnp.ones((3, 2)))
    ),
    "nodes has shape (3,)": lambda: graph_energy().init(
        jax.random.key(0), Graph(jnp.ones(3), jnp.ones((3, 3)))
    ),
    "num_classes is 1": lambda: class_conditional_energy(1),
    "kind is 'concatenated'": lambda: class_conditional_energy(2, kind="concatenated"),
    "label has shape (2,)": lambda: init(class_conditional_energy(3, (2,)), (2,), jnp.ones(2)),
}


def init(energy, shape, *context):
    return energy.init(jax.random.key(0), jnp.zeros(shape), *context)


@pytest.mark.parametrize("message", ERRORS)
def test_errors_name_the_value(message):
    with pytest.raises(ValueError) as raised:
        ERRORS[message]()
    assert message in str(raised.value)
    assert str(raised.value).endswith(".")


def test_a_convolutional_energy_without_its_dense_layer():
    """The first layer keeps 6 x 6, the second halves it, and one number is read off the map."""
    energy = convolutional_energy((2, 3), dense_features=0)
    key, image = jax.random.key(0), jax.ShapeDtypeStruct((6, 6, 1), jnp.float32)
    params = jax.eval_shape(energy.init, key, image)
    assert params["Dense_0"]["kernel"].shape == (3 * 3 * 3, 1)
    assert "Dense_1" not in params
    assert jax.eval_shape(energy.apply, params, image).shape == ()


def test_context_reaches_the_module():
    it = made("pytree")
    one = jax.tree.map(lambda x: x[0], it.batch)
    energies = [it.energy.apply(it.params, one, label) for label in range(3)]
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
    assert set_energy(width=8) == set_energy(width=8)
    assert mlp_energy(center=np.ones(2)) == mlp_energy(center=[1.0, 1.0])

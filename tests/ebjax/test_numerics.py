"""Masked softmax, keys of examples, shuffled streams, noise and finiteness."""

import functools
import math

import hypothesis
import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
import scipy.stats
from jax.extend.core import jaxprs_in_params

from ebjax import numerics
from ebjax.energies import mlp_energy, targets
from ebjax.numerics import (
    all_finite,
    example_keys,
    inner_product,
    masked_log_softmax,
    random_normal_and_uniform,
    random_normal_like,
    shuffled_index,
)
from ebjax.objectives.chain_divergence import log_nearest_distance
from ebjax.objectives.score_matching import finite_difference_score_matching_loss
from ebjax.samplers import metric

log_softmax = jax.jit(masked_log_softmax)


@jax.jit
def weighted_sum_gradient(logits, mask, weights):
    def total(logits):
        return jnp.sum(jnp.where(mask, masked_log_softmax(logits, mask) * weights, 0.0))

    return jax.grad(total)(logits)


WIDTH = 5
logit_rows = hnp.arrays(np.float32, WIDTH, elements=st.floats(-80.0, 80.0, width=32))
masks = hnp.arrays(np.bool_, WIDTH)
junk = st.sampled_from([np.inf, -np.inf, np.nan, 3e38, 0.0])


@hypothesis.settings(deadline=None, max_examples=200, derandomize=True)
@hypothesis.given(logits=logit_rows, mask=masks, forbidden=junk, weights=logit_rows)
def test_masked_log_softmax(logits, mask, forbidden, weights):
    """Values and gradients are those of the allowed entries alone, whatever the others hold."""
    logits = np.where(mask, logits, np.float32(forbidden))
    weights = weights / 80.0
    out = np.asarray(log_softmax(logits, mask))
    gradient = np.asarray(weighted_sum_gradient(logits, mask, weights))
    assert np.all(out[~mask] == -np.inf)
    assert np.all(gradient[~mask] == 0.0)
    assert np.all(np.isfinite(gradient))
    if mask.any():
        allowed = logits[mask].astype(np.float64)
        log_probs = scipy.special.log_softmax(allowed)
        np.testing.assert_allclose(out[mask], log_probs, rtol=1e-5, atol=1e-5)
        expected = weights[mask] - weights[mask].sum() * np.exp(log_probs)
        np.testing.assert_allclose(gradient[mask], expected, rtol=1e-4, atol=1e-5)


def test_masked_log_softmax_of_a_batch_is_by_row():
    logits = jax.random.normal(jax.random.key(0), (3, 4, WIDTH))
    mask = jax.random.bernoulli(jax.random.key(1), 0.5, (3, 4, WIDTH)).at[0, 0].set(False)
    out = masked_log_softmax(logits, mask)
    rows = [[log_softmax(logits[i, j], mask[i, j]) for j in range(4)] for i in range(3)]
    np.testing.assert_allclose(out, jnp.array(rows), rtol=1e-6)
    sums = jnp.exp(out).sum(-1)
    np.testing.assert_allclose(sums, mask.any(-1), rtol=1e-6)


def test_the_naive_mask_would_fail():
    """The control: masking probabilities and taking the log has gradients that are not finite."""
    mask = jnp.array([True, False, True])

    def naive(logits):
        masked = jax.nn.softmax(logits) * mask
        return jnp.where(mask, jnp.log(masked / masked.sum()), 0.0)[0]

    assert np.isclose(naive(jnp.zeros(3)), masked_log_softmax(jnp.zeros(3), mask)[0])
    assert not np.isfinite(jax.grad(naive)(jnp.zeros(3))).all()


def test_example_keys_depend_on_the_global_index_only():
    key = jax.random.key(0)
    whole = jax.random.key_data(example_keys(key, 7, jnp.arange(8)))
    halves = [jax.random.key_data(example_keys(key, 7, jnp.arange(4) + 4 * i)) for i in range(2)]
    np.testing.assert_array_equal(whole, np.concatenate(halves))
    by_hand = jax.random.fold_in(jax.random.fold_in(key, 7), 5)
    np.testing.assert_array_equal(whole[5], jax.random.key_data(by_hand))


def test_example_keys_differ_between_examples_steps_and_runs():
    data = [
        jax.random.key_data(example_keys(jax.random.key(seed), step, jnp.arange(16)))
        for seed in range(2)
        for step in range(4)
    ]
    rows = {tuple(row) for row in np.concatenate(data).tolist()}
    assert len(rows) == 2 * 4 * 16


@functools.partial(jax.jit, static_argnames="size")
def _stream(key, positions, size):
    return jax.vmap(lambda i: shuffled_index(key, i, size))(positions)


def stream(seed, positions, size):
    return np.asarray(_stream(jax.random.key(seed), positions, size))


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 16, 17, 100, 257, 1797])
def test_each_pass_is_a_permutation(size):
    num_passes = 3
    order = stream(0, jnp.arange(num_passes * size), size).reshape(num_passes, size)
    for row in order:
        np.testing.assert_array_equal(np.sort(row), np.arange(size))
    if size >= 16:  # two equal orders by chance: 1 in 16!
        other_key = stream(1, jnp.arange(num_passes * size), size)[:size]
        assert not np.array_equal(order[0], order[1])
        assert not np.array_equal(order[1], order[2])
        assert not np.array_equal(order[0], other_key)
        assert not np.array_equal(order[0], np.arange(size))


def chi_squared_z(observed, expected):
    """The standard score of Pearson's statistic, by the Wilson-Hilferty normal approximation."""
    statistic = np.sum((observed - expected) ** 2 / expected)
    dof = observed.size - 1
    spread = 2.0 / (9.0 * dof)
    return ((statistic / dof) ** (1.0 / 3.0) - (1.0 - spread)) / math.sqrt(spread)


@pytest.mark.parametrize("size", [3, 5, 10, 37])
def test_the_shuffle_is_uniform(size):
    """The first index, and where two neighbours go, over many keys."""
    num_keys = 400 * size
    keys = jax.random.split(jax.random.key(3), num_keys)
    draw = jax.jit(jax.vmap(shuffled_index, (0, None, None)), static_argnums=2)
    two = np.stack([draw(keys, position, size) for position in (0, 1)], axis=-1)
    for column in two.T:
        counts = np.bincount(column, minlength=size)
        assert chi_squared_z(counts, np.full(size, num_keys / size)) < 5.0
    steps = np.bincount((two[:, 1] - two[:, 0]) % size, minlength=size)
    assert steps[0] == 0
    assert chi_squared_z(steps[1:], np.full(size - 1, num_keys / (size - 1))) < 5.0


def test_the_uniformity_check_sees_a_bias():
    """Modulo of a power of two, the usual bug: some of 10 items come twice as often."""
    draws = np.asarray(jax.random.bits(jax.random.key(0), (4000,))) % 16 % 10
    assert chi_squared_z(np.bincount(draws, minlength=10), np.full(10, 400.0)) > 5.0


def test_the_stream_is_long():
    size = 1_000_003
    last = jnp.uint32(2**32 - 1)
    index = stream(0, jnp.array([last - 1, last]), size)
    assert index[0] != index[1]
    assert np.all((index >= 0) & (index < size))


@pytest.mark.parametrize("size", [0, -3, 2**30])
def test_sizes_out_of_range_are_named(size):
    with pytest.raises(ValueError, match=str(size)):
        shuffled_index(jax.random.key(0), 0, size)


def test_random_normal_like_keeps_structure_and_dtype():
    tree = {"a": jnp.zeros((4, 3), jnp.bfloat16), "b": [jnp.float32(1.0), jnp.zeros(2)]}
    noise = random_normal_like(jax.random.key(0), tree)
    assert jax.tree.structure(noise) == jax.tree.structure(tree)
    for before, after in zip(jax.tree.leaves(tree), jax.tree.leaves(noise), strict=True):
        assert (before.shape, before.dtype) == (after.shape, after.dtype)


def test_random_normal_like_gives_each_leaf_its_own_noise():
    noise = random_normal_like(jax.random.key(0), {"a": jnp.zeros(3), "b": jnp.zeros(3)})
    assert np.all(noise["a"] != noise["b"])


@pytest.mark.parametrize("implementation", ["threefry2x32", "rbg"])
@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
def test_noise_has_its_law(x64, implementation, dtype):
    num = 20_001
    key = jax.random.key(0, impl=implementation)
    tree = {"a": jnp.ones(num, dtype), "b": jnp.ones((1, num), "float32")}
    noise, uniform = random_normal_and_uniform(key, tree, num)
    assert uniform.min() > 0.0
    assert uniform.max() < 1.0
    for leaf in jax.tree.leaves(noise):
        statistic = scipy.stats.kstest(np.asarray(leaf, float).ravel(), "norm").statistic
        assert statistic * math.sqrt(num) < 2.2  # exceeded with probability 1e-4
    assert scipy.stats.kstest(np.asarray(uniform, float), "uniform").statistic < 2.2 / num**0.5
    columns = np.stack([np.asarray(v, float).ravel() for v in (noise["a"], noise["b"], uniform)])
    apart = np.corrcoef(columns)[np.triu_indices(3, 1)]
    # Neighbours, and the two words of one block, which lie half the draw apart.
    shifted = [np.corrcoef(columns[0][k:], columns[0][:-k])[0, 1] for k in (1, 2, num // 2)]
    assert np.abs([*apart, *shifted]).max() * math.sqrt(num // 2) < 5.0


def test_extreme_words_give_finite_noise(monkeypatch, x64):
    for word in (0, 2**32 - 1):
        monkeypatch.setattr(
            numerics, "random_words", lambda key, num, w=word: jnp.full(num, w, jnp.uint32)
        )
        tree = {"single": jnp.zeros(2, "float32"), "double": jnp.zeros(2)}
        noise, uniform = random_normal_and_uniform(jax.random.key(0), tree)
        assert all(np.all(np.abs(leaf) > 5.0) for leaf in jax.tree.leaves(noise))
        assert all_finite(noise)
        assert 0.0 < uniform[0] < 1.0


def test_noise_for_what_is_not_real_is_refused():
    with pytest.raises(TypeError, match="int32"):
        random_normal_like(jax.random.key(0), jnp.arange(3))


@pytest.mark.parametrize("bad", [jnp.inf, -jnp.inf, jnp.nan])
def test_all_finite(bad):
    tree = {"a": jnp.zeros((2, 3)), "b": jnp.float32(1.0), "count": jnp.int32(3)}
    assert all_finite(tree)
    assert not all_finite(tree | {"b": jnp.float32(bad)})
    assert not all_finite(tree | {"a": tree["a"].at[1, 2].set(bad)})


def precisions(fn, *args):
    """Of all products of matrices of a function, batched over the first axis of its arguments."""
    found = []

    def visit(jaxpr):
        for equation in jaxpr.eqns:
            if equation.primitive.name == "dot_general":
                found.append(equation.params["precision"])
            for sub in jaxprs_in_params(equation.params):
                visit(sub)

    visit(jax.make_jaxpr(jax.vmap(fn))(*args).jaxpr)
    return found


NETWORK = mlp_energy((8,))
PARAMS = NETWORK.init(jax.random.key(0), jnp.zeros(3))
METRIC = metric.make_metric(jnp.array([[2.0, 0.5, 0.0], [0.5, 1.0, 0.0], [0.0, 0.0, 3.0]]))
ROTATED = targets.ill_conditioned_gaussian(3, 10.0, seed=0)
CORRELATED = targets.gaussian(jnp.zeros(3), jnp.eye(3) + 0.5)
IN_FULL = {
    "product": lambda x, key: numerics.full_precision_matmul(x[None], x),
    "finite_differences": lambda x, key: finite_difference_score_matching_loss(
        NETWORK.apply, PARAMS, x, key
    ),
    "velocity": lambda x, key: metric.velocity(METRIC, x),
    "displacement": lambda x, key: metric.scaled_noise(METRIC, x),
    "gradient": lambda x, key: metric.scaled_gradient(METRIC, x),
    "nearest": lambda x, key: log_nearest_distance(x[None], jnp.ones((4, 3)), jnp.zeros(1, int)),
    "quadratic_form": lambda x, key: ROTATED.energy((), x),
    "exact_draw": lambda x, key: ROTATED.sample(key),
    "draw_of_distrax": lambda x, key: CORRELATED.sample(key),
}


@pytest.mark.parametrize("name", IN_FULL)
def test_what_must_be_exact_does_not_round_its_factors(name):
    x, keys = jnp.ones((2, 3)), jax.random.split(jax.random.key(0), 2)
    found = precisions(IN_FULL[name], x, keys)
    highest = jax.lax.Precision.HIGHEST
    assert found
    assert set(found) == {(highest, highest)}
    # Control: a network's own products are as fast as the device can.
    assert set(precisions(lambda x, key: NETWORK.apply(PARAMS, x), x, keys)) == {None}


@pytest.mark.parametrize("shape", [(), (0,), (1,), (4,), (2, 2), (5,), (3, 4)], ids=str)
def test_inner_products_of_few_and_of_many_components(shape, x64):
    generator = np.random.default_rng(0)
    first, second = ({"a": generator.normal(size=shape), "b": [2.0]} for _ in range(2))
    expected = np.sum(first["a"] * second["a"]) + 4.0
    for product in (inner_product, jax.jit(inner_product)):
        np.testing.assert_allclose(product(first, second), expected, rtol=1e-14)
    assert inner_product(first, second).shape == ()


@pytest.mark.parametrize(("size", "num_reductions"), [(4, 0), (5, 1)])
def test_sums_of_few_components_are_no_reduction(size, num_reductions):
    x = jnp.ones((10, size))
    jaxpr = str(jax.make_jaxpr(jax.vmap(inner_product))(x, x))
    assert jaxpr.count("reduce_sum") == num_reductions

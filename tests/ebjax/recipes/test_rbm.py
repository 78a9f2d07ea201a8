"""The RBM recipe: what it loads, that it follows the likelihood, what it says of it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ebjax.energies.boltzmann import RBMParams, rbm_free_energy, rbm_log_z
from ebjax.objectives.pseudolikelihood import flip_differences
from ebjax.recipes.rbm import RBMConfig, build, free_energy_differences, load_images, recipe
from ebjax.training import train


def examples_of(run, num):
    one = lambda i: run.source.example(run.source.arrays, jax.random.key(0), i)  # noqa: E731
    return np.asarray(jax.jit(jax.vmap(one))(np.arange(num, dtype=np.uint32)))


def test_examples_are_all_training_images_at_the_threshold():
    config = RBMConfig(num_hidden=4)
    training, held_out = load_images(config)
    assert training.shape == (1500, 8, 8)
    assert held_out.shape == (297, 8, 8)
    assert training.max() == 1.0
    batch = examples_of(build(config), 1500)
    expected = (training.reshape(1500, -1) >= 0.5).astype(np.float32)
    assert batch.dtype == np.float32
    order = np.lexsort
    assert np.array_equal(batch[order(batch.T)], expected[order(expected.T)])


@pytest.fixture
def grey_file(tmp_path):
    """Forty images of four grey values, as bytes, beside an array that is none of them."""
    path = tmp_path / "grey.npz"
    images = np.tile(np.array([[0, 64, 191, 255]], np.uint8), (40, 1)).reshape(40, 2, 2)
    np.savez(path, images=images, labels=np.zeros(40, np.uint8))
    return str(path)


def test_grey_values_are_probabilities_where_asked(grey_file):
    options = {"data_path": grey_file, "num_held_out": 4, "num_hidden": 2, "batch_size": 4}
    binary = examples_of(build(RBMConfig(**options)), 36)
    assert np.array_equal(binary, np.tile([0, 0, 1, 1], (36, 1)))
    drawn = examples_of(build(RBMConfig(**options, stochastic_binarization=True)), 3600)
    probs = np.array([0.0, 64.0, 191.0, 255.0]) / 255.0
    error = np.sqrt(probs * (1.0 - probs) / 3600)
    assert np.all(np.abs(drawn.mean(0) - probs) <= 5.0 * error)
    assert drawn[:, 1].std() > 0.3


def test_values_beyond_grey_are_refused(tmp_path):
    path = tmp_path / "wrong.npy"
    np.save(path, np.full((30, 4), -0.5, np.float32))
    with pytest.raises(ValueError, match=r"values from -0\.5 to"):
        load_images(RBMConfig(data_path=str(path), num_held_out=3))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("num_held_out", 0),
        ("num_hidden", 0),
        ("gibbs_steps", 0),
        ("threshold", 1.5),
        ("method", "other"),
        ("learning_rate", -1.0),
        ("ais_chains", 1),
    ],
)
def test_impossible_settings_are_named(field, value):
    with pytest.raises(ValueError, match=field):
        recipe.config(**{field: value})


def random_machine(num_visible, num_hidden):
    generator = np.random.default_rng(0)
    shapes = ((num_visible, num_hidden), (num_visible,), (num_hidden,))
    return RBMParams(*(jnp.asarray(generator.normal(size=s), jnp.float32) for s in shapes))


def test_flips_of_the_free_energy_are_those_of_its_definition():
    params = random_machine(6, 4)
    x = jnp.array([0.0, 1.0, 1.0, 0.0, 1.0, 0.0])
    np.testing.assert_allclose(
        free_energy_differences(params, x),
        flip_differences(rbm_free_energy, params, x),
        atol=1e-5,
    )


def gradient_z_scores(method, num=4000, num_updates=50):
    """The objective's gradient against that of the exact likelihood.

    The slope in W and the biases is a mean over slots of differences of v's and of conditional
    means; the error is that of the slots. Persistent chains forget their start within the updates.
    """
    # Strong weights, and biases under which a state is as likely as its opposite: slow to mix.
    weights = 3.0 * random_machine(4, 3).weights
    params = RBMParams(weights, -0.5 * weights.sum(axis=1), -0.5 * weights.sum(axis=0))
    run = build(RBMConfig(num_hidden=3, method=method))
    batch = jax.random.bernoulli(jax.random.key(1), 0.9, (num, 64)).astype(jnp.float32)
    # A machine of four of the pixels; all others are free coins of both data and model.
    wide = RBMParams(
        jnp.zeros((64, 3)).at[:4].set(params.weights),
        jnp.zeros(64).at[:4].set(params.visible_bias),
        params.hidden_bias,
    )
    carry = run.objective.init(jax.random.key(2), wide, batch)

    def update(step, state):
        keys = jax.random.split(jax.random.fold_in(jax.random.key(3), step), num)
        carry = state[0]
        gradient, (carry, _) = jax.grad(run.objective.loss, has_aux=True)(wide, carry, keys, batch)
        return carry, gradient

    @jax.jit
    def last(carry):
        carry, gradient = jax.lax.fori_loop(0, num_updates, update, (carry, wide))
        ends = jax.tree.leaves(carry.position)[0][:, 0]
        slope = jax.vmap(jax.grad(rbm_free_energy), (None, 0))
        return gradient, jax.tree.map(jnp.subtract, slope(wide, batch), slope(wide, ends))

    gradient, pairs = last(carry)
    # The objective's gradient is the mean of the pairs, with conditional means of the hidden units.
    for got, pair in zip(gradient, pairs, strict=True):
        np.testing.assert_allclose(got, pair.mean(0), atol=1e-5)

    def negative_log_likelihood(params):
        data = jax.vmap(rbm_free_energy, (None, 0))(params, batch[:, :4]).mean()
        return data + rbm_log_z(params)

    exact = jax.grad(negative_log_likelihood)(params)
    # The pixels of the machine, and its hidden units.
    parts = (
        (gradient.weights[:4], exact.weights, pairs.weights[:, :4]),
        (gradient.visible_bias[:4], exact.visible_bias, pairs.visible_bias[:, :4]),
        (gradient.hidden_bias, exact.hidden_bias, pairs.hidden_bias),
    )
    z = [np.ravel((got - truth) / (pair.std(0) / np.sqrt(num))) for got, truth, pair in parts]
    return np.abs(np.concatenate(z)).max()


def test_the_gradient_is_that_of_the_likelihood():
    assert gradient_z_scores("persistent") < 5.0


def test_the_gradient_check_sees_chains_that_start_at_the_data():
    """Contrastive divergence is not the gradient of the likelihood."""
    assert gradient_z_scores("from_data", num_updates=1) > 5.0


@functools.cache
def trained():
    config = recipe.config(
        num_steps=1000,
        num_hidden=16,
        learning_rate=0.2,
        num_devices=1,
        sample_steps=200,
        ais_temperatures=300,
        ais_chains=100,
    )
    run = build(config)
    return run, train(run, config).state


def test_a_short_run_learns_and_the_estimates_agree_with_enumeration():
    run, state = trained()
    figures = run.evaluate(jax.random.key(2), state)
    error = figures["log_z_standard_error"]
    assert error < 0.2
    assert abs(figures["log_z"] - figures["log_z_exact"]) < 5.0 * error
    exact = figures["log_likelihood_held_out_exact"]
    low, high = (figures[f"log_likelihood_held_out_{end}"] for end in ("low", "high"))
    assert low < high
    assert abs(figures["log_likelihood_held_out"] - exact) < 5.0 * error
    assert figures["log_likelihood_held_out_conservative"] < exact + 0.5
    assert exact > figures["log_likelihood_of_independent_pixels"] + 3.0
    assert figures["log_likelihood_training"] > exact - 1.0
    assert figures["pseudo_log_likelihood"] > exact  # a site knows all others
    assert 0.0 < figures["reconstruction_error"] < 0.3
    assert set(run.monitor(jax.random.key(0), state)) >= {run.monitor_name, "free_energy_gap"}


def test_samples_are_binary_images_and_figures_are_drawn():
    run, state = trained()
    draws = run.sample(jax.random.key(1), state, 200)
    assert draws["images"].shape == (200, 8, 8)
    assert set(np.unique(draws["images"])) == {0.0, 1.0}
    assert 0.0 < draws["probabilities"].min() < draws["probabilities"].max() < 1.0
    _, held_out = load_images(RBMConfig())
    pixels = (held_out >= 0.5).mean(0)
    independent = np.abs(pixels - 0.5).mean()
    assert np.abs(draws["images"].mean(0) - pixels).mean() < 0.3 * independent
    pictures = run.figures(jax.random.key(3), state, draws)
    assert set(pictures) == {"samples", "filters", "chains"}


def test_it_starts_as_independent_pixels():
    run = build(RBMConfig(num_hidden=4, weight_scale=0.0))
    params = run.init(jax.random.key(0))
    training, _ = load_images(RBMConfig())
    means = (training >= 0.5).reshape(1500, -1).mean(0)
    np.testing.assert_allclose(jax.nn.sigmoid(params.visible_bias), means, atol=1e-3)
    flat = build(RBMConfig(num_hidden=4, bias_from_data=False)).init(jax.random.key(0))
    assert np.all(flat.visible_bias == 0.0)


def test_weight_decay_spares_the_biases():
    run = build(RBMConfig(num_hidden=4, weight_decay=0.5, learning_rate=1.0))
    params = jax.tree.map(jnp.ones_like, run.init(jax.random.key(0)))
    gradient = jax.tree.map(jnp.zeros_like, params)
    updates, _ = run.optimizer.update(gradient, run.optimizer.init(params), params)
    np.testing.assert_allclose(updates.weights, -0.5)
    assert not updates.visible_bias.any()
    assert not updates.hidden_bias.any()

"""The images recipe: what it loads, what it refuses, what it learns."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.datasets import load_digits

from ebjax.evaluation import frechet_distance
from ebjax.objectives.recovery_schedule import recovery_pair, recovery_schedule
from ebjax.recipes.image_evaluation import (
    ImageSets,
    _normal_log_likelihood,
    likelihood_figures,
    outliers,
)
from ebjax.recipes.image_files import load_images
from ebjax.recipes.image_models import (
    Model,
    Pixels,
    _levels_of_pixels,
    build_model,
    pixels_of,
)
from ebjax.recipes.images import ImagesConfig, build, recipe
from ebjax.samplers import langevin
from ebjax.training import train

TINY = {
    "num_steps": 4,
    "batch_size": 8,
    "log_every": 2,
    "checkpoint_every": 4,
    "num_devices": 1,
    "learning_rate_warmup_steps": 1,
    "features": (8,),
    "langevin_steps": 2,
    "chains_per_example": 2,
    "sample_steps": 4,
    "recovery_steps": 2,
    "num_levels": 2,
}


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Images of 12 x 8 bytes as a file, with labels, and as stored."""
    images = np.random.default_rng(0).integers(0, 256, (40, 12, 8), np.uint8)
    images[0, 0, :2] = 0, 255
    folder = tmp_path_factory.mktemp("images")
    np.savez(folder / "images.npz", images=images, labels=np.arange(40) % 2)
    np.save(folder / "images.npy", images)
    return folder, images


def test_default_images_are_the_digits_in_the_range():
    images = load_images(ImagesConfig())
    everything = np.concatenate([images.take(images.training), images.take(images.held_out)])
    assert everything.shape == (1797, 8, 8, 1)
    original = (load_digits().images / 8 - 1).astype(np.float32)
    assert np.allclose(np.sort(everything.sum((1, 2, 3))), np.sort(original.sum((1, 2))), atol=1e-5)
    assert (everything.min(), everything.max(), images.num_values) == (-1, 1, 17)


@pytest.mark.parametrize("downsample", [1, 2, 4])
def test_a_file_is_scaled_and_averaged(written, downsample):
    folder, stored = written
    config = ImagesConfig(
        data_path=str(folder / "images.npz"),
        data_key="images",
        label_key="labels",
        num_held_out=10,
        downsample=downsample,
    )
    images = load_images(config)
    assert images.num_values == 256
    shown = images.take(images.training)
    blocks = stored[images.training].reshape(30, 12 // downsample, downsample, -1, downsample)
    expected = np.round(blocks.mean(axis=(2, 4))) / 127.5 - 1
    assert shown.shape == (*expected.shape, 1)
    # A mean of half a level may round either way.
    assert np.abs(shown[..., 0] - expected).max() < 1.01 / 127.5
    assert np.abs(shown[..., 0] - expected).mean() < 0.5 / 127.5 / downsample**2
    assert images.labels(images.held_out).tolist() == (images.held_out % 2).tolist()


def test_streaming_gives_the_same_examples(written):
    folder, _ = written
    options = {**TINY, "data_path": str(folder / "images.npy"), "num_held_out": 10}
    in_memory, streamed = (
        build(ImagesConfig(**options)),
        build(ImagesConfig(**options, stream=True)),
    )
    key, positions = jax.random.key(0), jnp.arange(64, dtype=jnp.uint32)

    def batch(source, arrays):
        return np.asarray(jax.vmap(source.example, (None, None, 0))(arrays, key, positions))

    expected = batch(in_memory.source, in_memory.source.arrays)
    found = batch(streamed.source, streamed.source.load(key, 0, 64))
    assert np.array_equal(found, expected)
    assert expected.min() >= -1
    assert expected.max() <= 1


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("data_path", ""),
        ("objective", "vae"),
        ("energy_network", "tree"),
        ("num_held_out", 1),
        ("downsample", 0),
        ("features", ()),
        ("step_share", 2.0),
        ("num_levels", 1),
        ("rebirth_probability", 1.5),
        ("drift_steps", 3),
        ("gradient_penalty", float("nan")),
    ],
)
def test_impossible_settings_are_named(field, value):
    with pytest.raises(ValueError, match=field):
        recipe.config(**{field: value})


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"data_path": "none.npz"}, "none.npz: there is no such file"),
        ({"data_path": "wine"}, r"wine: an example has shape \(13,\); images are"),
        ({"downsample": 3}, "downsample is 3; it must divide the sides of the images, 8 and 8"),
        ({"num_held_out": 1797}, "num_held_out is 1797; of 1797"),
    ],
)
def test_data_that_do_not_fit_are_named(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        build(ImagesConfig(**options))


def test_outliers_are_what_they_are_called():
    images = np.random.default_rng(0).uniform(-1, 1, (5, 4, 3, 1)).astype(np.float32)
    found = outliers(jax.random.key(0), images)
    assert np.array_equal(found["inverted"], -images)
    flat, permuted = images.reshape(5, -1), found["permuted"].reshape(5, -1)
    assert np.array_equal(np.sort(flat), np.sort(permuted))
    orders = [
        np.argsort(np.argsort(a))[np.argsort(b)].tolist()
        for a, b in zip(flat, permuted, strict=True)
    ]
    assert len({tuple(order) for order in orders}) == 5  # an order of its own each
    assert found["noise"].shape == images.shape
    assert np.abs(found["noise"]).max() <= 1


def box_model(slope, temperature):
    """E = τ slope Σ x on the box: independent pixels, with a known law at temperature τ."""
    energy = lambda params, x: temperature * params * jnp.sum(x)  # noqa: E731
    kernel = langevin(step_size=0.1)
    nothing = (None, None, None, None)
    return Model(
        nothing[0], nothing[1], energy, nothing[2], nothing[3], (), temperature, kernel, 0.5, 0.0
    )


def test_likelihood_of_a_law_that_is_known(monkeypatch):
    """Dequantised pixels of density ∝ exp(-b y) on [-1, 1], annealed at temperature 0.01."""
    monkeypatch.setattr("ebjax.recipes.image_evaluation._NUM_TEMPERATURES", 200)
    slope, num_values, num_pixels = 1.5, 4, 6
    rng = np.random.default_rng(0)
    levels = rng.integers(0, num_values, (300, 2, 3, 1))
    images = (2.0 * levels / (num_values - 1) - 1.0).astype(np.float32)
    sets = ImageSets(images, images[:64], None, num_values)
    figures = likelihood_figures(jax.random.key(0), slope, box_model(slope, 0.01), sets)
    # E[b y] over the noise is b times the middle of the level's cell.
    middle = (2.0 * levels[:64] + 1.0) / num_values - 1.0
    log_z = num_pixels * math.log(2.0 * math.sinh(slope) / slope)
    nats = slope * middle.sum(axis=(1, 2, 3)).mean() + log_z
    exact = nats / (num_pixels * math.log(2.0)) - math.log2(2.0 / num_values)
    # Averages of uniform noise: variance (b Δ)²/12 a pixel.
    error = slope * (2 / num_values) / math.sqrt(12 * num_pixels * 64) / math.log(2.0)
    error += figures["tempered_bits_per_dim_standard_error"]
    assert abs(figures["tempered_bits_per_dim"] - exact) < 5 * error
    # The control: at the wrong temperature the law is nearly uniform.
    wrong = box_model(slope, 0.01)._replace(temperature=1.0)
    flat = likelihood_figures(jax.random.key(0), slope, wrong, sets)["tempered_bits_per_dim"]
    assert abs(flat - exact) > 5 * error


def test_normal_law_is_the_one_of_the_training_images():
    rng = np.random.default_rng(0)
    training, examples = rng.normal(size=(500, 2, 2, 1)), rng.normal(size=(7, 2, 2, 1))
    from scipy.stats import multivariate_normal

    flat = training.reshape(500, 4)
    expected = multivariate_normal(flat.mean(axis=0), np.cov(flat.T)).logpdf(examples.reshape(7, 4))
    assert np.allclose(_normal_log_likelihood(training, examples), expected)


@pytest.mark.parametrize("network", ["convolutional", "residual"])
@pytest.mark.parametrize("objective", ["pcd", "recovery_likelihood"])
def test_every_network_serves_both_objectives(network, objective):
    """Energies are finite, and the level matters."""
    config = ImagesConfig(
        **{**TINY, "features": (4, 4)}, energy_network=network, objective=objective
    )
    model = build_model(config, (4, 4, 2))
    params = model.init(jax.random.key(0))
    x = jax.random.normal(jax.random.key(1), (4, 4, 2))
    value, gradient = jax.value_and_grad(model.energy, argnums=1)(params, x)
    assert value.shape == ()
    assert bool(jnp.isfinite(gradient).all())
    assert float(jnp.abs(gradient).max()) > 0
    path = jax.eval_shape(model.path, jax.random.key(0), params)
    assert path.shape == (len(model.path_steps), 4, 4, 2)
    assert jax.eval_shape(model.draw, jax.random.key(0), params).shape == (4, 4, 2)


def test_normal_pixels_are_part_of_the_law_that_is_drawn():
    """E/τ has the quadratic of the pixels' own normal law, and chains start from that law."""
    images = np.random.default_rng(0).uniform(-1.0, 0.2, (50, 4, 4, 1)).astype(np.float32)
    pixels = pixels_of(images, 0.1)
    assert np.allclose(pixels.deviation**2, images.var(axis=0) + 0.01, atol=2e-4)
    plain = ImagesConfig(**TINY)
    tilted = dataclasses.replace(plain, normal_pixels=True)
    with pytest.raises(ValueError, match="normal_pixels is True"):
        build_model(tilted, (4, 4, 1))
    flat, model = (build_model(config, (4, 4, 1), pixels) for config in (plain, tilted))
    params = model.init(jax.random.key(0))
    x = jnp.asarray(images[0])
    added = (model.energy(params, x) - flat.energy(params, x)) / model.temperature
    assert np.isclose(added, 0.5 * np.square((x - pixels.mean) / pixels.deviation).sum(), rtol=1e-3)
    starts = jax.vmap(model.path, (0, None))(jax.random.split(jax.random.key(1), 400), params)[:, 0]
    z = (starts.mean(axis=0) - pixels.mean) / pixels.deviation * np.sqrt(400)
    inside = np.abs(pixels.mean) + 3.0 * pixels.deviation < 1.0  # nearly nothing is clipped
    assert np.abs(z[inside]).max(initial=0.0) < 5.0
    assert starts.std() < 0.9 * np.sqrt(1.0 / 3.0)  # that of uniform noise


def test_levels_of_normal_pixels_are_their_law(x64):
    """Of x = m + v z, diffused and scaled, by moments; without pixels N(0, 1)."""
    schedule = recovery_schedule([0.1, 0.5, 0.9, 0.999])
    pixels = Pixels(np.full((1, 1, 1), -0.8), np.full((1, 1, 1), 0.3))
    means, deviations = _levels_of_pixels(schedule, pixels, (1, 1, 1))
    keys = jax.random.split(jax.random.key(0), 20_000)
    x = -0.8 + 0.3 * jax.random.normal(jax.random.key(1), (20_000,))
    for level in range(3):
        pair = lambda key, x: recovery_pair(key, x, level, schedule)  # noqa: B023, E731
        y, _ = jax.vmap(pair)(keys, x)
        mean, deviation = means[level].item(), deviations[level].item()
        assert abs(y.mean() - mean) < 5.0 * deviation / np.sqrt(20_000)
        assert abs(y.std() / deviation - 1.0) < 5.0 / np.sqrt(2.0 * 20_000)
    means, deviations = _levels_of_pixels(schedule, None, (1, 1, 1))
    assert np.all(means == 0.0)
    assert np.allclose(deviations, schedule.scale.reshape(3, 1, 1, 1))


SHORT = {
    "batch_size": 64,
    "features": (128, 128),
    "num_devices": 1,
    "num_steps": 300,
    "ema_decay": 0.98,
}


@functools.cache
def held_out_digits():
    images = load_images(ImagesConfig())
    return images.take(images.held_out)


def figures_of_a_run(config):
    """Pixel distances to held-out digits, of samples, of an untrained energy's and of noise.

    First the gap of energies from samples to held-out digits, as a share of that to noise.
    """
    run = build(config)
    state = train(run._replace(monitor=None), config).state
    untrained = state._replace(ema=run.init(jax.random.key(0)))
    drawn, before = (run.sample(jax.random.key(1), s, 300) for s in (state, untrained))
    noise = np.random.default_rng(0).uniform(-1, 1, (300, 8, 8, 1))
    energy = jax.jit(jax.vmap(build_model(config, (8, 8, 1)).energy, (None, 0)))
    data = float(energy(state.ema, held_out_digits()).mean())
    gap = (drawn["energies"].mean() - data) / (float(energy(state.ema, noise).mean()) - data)
    sets = (drawn["images"], before["images"], noise)
    return gap, *(frechet_distance(images, held_out_digits()) for images in sets)


def test_pcd_learns_and_stays_in_balance():
    config = ImagesConfig(**SHORT, sample_steps=200, chains_per_example=4, langevin_steps=20)
    gap, drawn, before, noise = figures_of_a_run(config)
    assert drawn < min(before, noise) / 4
    assert abs(gap) < 0.15


def test_recovery_likelihood_learns():
    config = ImagesConfig(
        **SHORT,
        objective="recovery_likelihood",
        learning_rate=1e-3,
        recovery_steps=10,
        num_levels=4,
    )
    _, drawn, before, noise = figures_of_a_run(config)
    assert drawn < min(before, noise) / 4

"""The digits recipe: what it loads, what it learns, what it draws."""

import jax
import numpy as np
import pytest
from sklearn.datasets import load_digits
from sklearn.svm import SVC

from ebjax.evaluation import frechet_distance
from ebjax.recipes.digits import DigitsConfig, build, load_images, recipe
from ebjax.training import train


def test_split_is_a_partition_of_all_images():
    training, held_out = load_images(297)
    assert training.shape == (1500, 8, 8, 1)
    assert held_out.shape == (297, 8, 8, 1)
    both = np.concatenate([training, held_out]).reshape(1797, -1)
    original = (load_digits().data / 8 - 1).astype(np.float32)
    assert np.array_equal(np.sort(both.sum(axis=1)), np.sort(original.sum(axis=1)))
    assert both.min() == -1
    assert both.max() == 1


def test_examples_are_training_images_with_noise_within_the_range():
    run = build(DigitsConfig(data_noise=0.04))
    training, _ = load_images(297)
    batch = jax.vmap(lambda i: run.source.example(run.source.arrays, jax.random.key(0), i))(
        np.arange(1500, dtype=np.uint32)
    )
    distances = np.abs(np.asarray(batch)[:, None] - training[None]).max(axis=(2, 3, 4))
    nearest = distances.argmin(axis=1)
    assert len(set(nearest.tolist())) == 1500  # one pass sees each image once
    assert distances.min(axis=1).max() < 0.04 * 6  # 96,000 normal numbers stay below 6 sigma
    assert np.abs(np.asarray(batch)).max() <= 1


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("num_held_out", 1),
        ("hidden_features", ()),
        ("rebirth_probability", 1.5),
        ("langevin_steps", 0),
        ("learning_rate", -1.0),
        ("batch_size", 0),
        ("data_noise", float("nan")),
    ],
)
def test_impossible_settings_are_named(field, value):
    with pytest.raises(ValueError, match=field):
        recipe.config(**{field: value})


def run_digits(**options):
    config = recipe.config(**options)
    run = recipe.build(config)
    state = train(run, config).state
    return run, state


def test_short_run_learns_and_stays_in_balance():
    """Pixel distance falls at least fivefold from noise; energies of data and samples agree."""
    run, state = run_digits(
        num_steps=150, num_devices=1, sample_steps=200, hidden_features=(128, 128)
    )
    draws = run.sample(jax.random.key(1), state, 500)
    _, held_out = load_images(297)
    noise = np.random.default_rng(0).uniform(-1, 1, (500, 8, 8, 1))
    assert frechet_distance(draws["images"], held_out) < frechet_distance(noise, held_out) / 5
    figures = run.evaluate(jax.random.key(2), state)
    assert abs(figures["energy_held_out"] - figures["energy_samples"]) < 1
    assert figures["energy_noise"] > figures["energy_samples"] + 1
    assert figures["auroc_noise"] > 0.99
    pictures = run.figures(jax.random.key(3), state, draws)
    assert set(pictures) == {"samples", "energies", "chains"}


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_full_run_draws_digits_of_all_classes(seed):
    run, state = run_digits(seed=seed)
    draws = [run.sample(jax.random.key(i), state, 500)["images"] for i in range(4)]
    images = draws[0].reshape(500, -1)
    digits = load_digits()
    judge = SVC(probability=False, gamma="scale").fit(digits.data / 8 - 1, digits.target)
    shares = np.bincount(judge.predict(images), minlength=10) / 500
    assert shares.min() > 0.03
    assert shares.max() < 0.2
    training, held_out = load_images(297)
    # Of 500 draws it deviates by 0.1 from one key to the next.
    distances = [frechet_distance(drawn.reshape(-1, 8, 8, 1), held_out) for drawn in draws]
    assert np.mean(distances) < 1.0
    # Not copies: as far from the nearest training image as held-out digits are, within a fifth.
    flat = training.reshape(len(training), -1)

    def nearest(x):
        x = x.reshape(len(x), -1)
        return np.sqrt(((x[:, None] - flat[None]) ** 2).sum(axis=2).min(axis=1)).mean()

    assert abs(nearest(images) / nearest(held_out) - 1) < 0.2

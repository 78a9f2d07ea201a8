"""The joint classifier of digits: its data, its plain twin, what it learns and draws."""

import jax
import numpy as np
import pytest
from sklearn.datasets import load_digits

from ebjax.evaluation import frechet_distance
from ebjax.objectives.joint_classification import JointBatch
from ebjax.recipes.jem import build, load_labelled_images, recipe
from ebjax.training import train


def test_images_keep_their_labels_through_the_split():
    data = load_labelled_images(recipe.config(seed=3))
    assert data.images.shape == (1300, 8, 8, 1)
    assert data.held_out_images.shape == (497, 8, 8, 1)
    digits = load_digits()
    label_of = {
        image.tobytes(): label for image, label in zip(digits.images, digits.target, strict=True)
    }
    assert len(label_of) == 1797
    for images, labels in (
        (data.images, data.labels),
        (data.held_out_images, data.held_out_labels),
    ):
        originals = (8.0 * (images[..., 0].astype(np.float64) + 1.0)).round()
        found = [label_of.pop(image.tobytes()) for image in originals]  # each image once
        np.testing.assert_array_equal(found, labels)


def test_examples_of_both_terms_are_drawn_apart():
    """Clean labelled images, noisy ones for the likelihood; one pass sees each of both once."""
    config = recipe.config(data_noise=0.03, seed=3)
    run = build(config)
    data = load_labelled_images(recipe.config(seed=3))
    one = jax.jit(jax.vmap(lambda i: run.source.example(run.source.arrays, jax.random.key(0), i)))
    batch = one(np.arange(1300, dtype=np.uint32))
    index_of = {image.tobytes(): i for i, image in enumerate(data.images)}
    index = [index_of[image.tobytes()] for image in np.asarray(batch.labelled)]
    assert len(set(index)) == 1300
    np.testing.assert_array_equal(batch.label, data.labels[index])
    noisy = np.asarray(batch.unlabelled).reshape(1300, 64)
    clean = data.images.reshape(1300, 64)
    distances = (noisy**2).sum(1)[:, None] + (clean**2).sum(1) - 2.0 * noisy @ clean.T
    nearest = distances.argmin(axis=1)
    assert len(set(nearest.tolist())) == 1300
    assert np.mean(nearest == index) < 0.05  # 1 in 1300 would agree by chance
    assert 0.01 < np.sqrt(distances.min(axis=1).mean() / 64) < 0.03  # clipped at the border
    assert np.abs(noisy).max() <= 1.0


@pytest.fixture(scope="module")
def bars(tmp_path_factory):
    """Three classes of 12 x 8 bytes: a bright bar at the left, in the middle, at the right."""
    generator = np.random.default_rng(0)
    labels = generator.integers(0, 3, 400)
    images = generator.integers(0, 60, (400, 12, 8), np.uint8)
    for image, label in zip(images, labels, strict=True):
        image[:, 3 * label : 3 * label + 2] += np.uint8(180)
    path = tmp_path_factory.mktemp("bars") / "bars.npz"
    np.savez(path, pictures=images, kinds=labels)
    return path


@pytest.mark.parametrize(("network", "births"), [("mlp", "noise"), ("residual", "class_gaussians")])
def test_a_file_of_labelled_images_is_learned(bars, network, births):
    config = recipe.config(
        **SHORT | {"hidden_features": (16, 16), "num_steps": 60, "langevin_steps": 10},
        data_path=str(bars),
        data_key="pictures",
        label_key="kinds",
        downsample=2,
        num_held_out=100,
        classifier_network=network,
        births=births,
        num_devices=1,
    )
    data = load_labelled_images(config)
    assert data.images.shape == (300, 6, 4, 1)
    assert data.images.min() >= -1.0
    assert data.images.max() <= 1.0
    assert data.num_classes == 3
    run = recipe.build(config)
    state = train(run, config).state
    figures = run.evaluate(jax.random.key(2), state)
    assert figures["accuracy"] > 0.9  # chance: a third
    assert figures["frechet_pixel"] < figures["frechet_pixel_of_noise"]
    draws = run.sample(jax.random.key(1), state, 30)
    assert draws["images_of_class"].shape == (30, 6, 4, 1)
    assert draws["labels"].tolist() == [0, 1, 2] * 10
    assert "samples_by_class" in run.figures(jax.random.key(0), state, draws)


@pytest.mark.parametrize(
    ("options", "says"),
    [({}, "label_key"), ({"label_key": "negative"}, "-1"), ({"label_key": "alike"}, "two classes")],
)
def test_labels_that_name_no_classes_are_refused(tmp_path, options, says):
    images = np.random.default_rng(0).uniform(size=(20, 4, 4))
    labels = {"negative": np.arange(20) - 1, "alike": np.zeros(20, int)}
    np.savez(tmp_path / "some.npz", images=images, **labels)
    path = str(tmp_path / "some.npz")
    config = recipe.config(data_path=path, data_key="images", num_held_out=5, **options)
    with pytest.raises(ValueError, match=says):
        build(config)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("num_held_out", 1),
        ("num_held_out", 1797),
        ("classifier_network", "perceptron"),
        ("downsample", 3),
        ("data_path", ""),
        ("hidden_features", ()),
        ("likelihood_weight", -1.0),
        ("births", "zeros"),
        ("langevin_steps", 0),
        ("rebirth_probability", 1.5),
    ],
)
def test_impossible_settings_are_named(field, value):
    with pytest.raises(ValueError, match=field):
        build(recipe.config(**{field: value}))


def trained(**options):
    config = recipe.config(**{"num_devices": 1, **options})
    run = recipe.build(config)
    return run, train(run, config).state


SHORT = {
    "num_steps": 120,
    "hidden_features": (64, 64),
    "sample_steps": 40,
    "learning_rate": 2e-3,
    "likelihood_weight": 0.3,
    "chains_per_example": 8,
}


def test_short_run_classifies_and_draws():
    data = load_labelled_images(recipe.config(seed=0))
    noise = np.random.default_rng(0).uniform(-1, 1, (500, 8, 8, 1))
    far = frechet_distance(noise, data.held_out_images)
    run, state = trained(**SHORT)
    figures = run.evaluate(jax.random.key(2), state)
    assert figures["accuracy"] > 0.85
    assert figures["frechet_pixel"] < far / 2
    assert abs(figures["energy_held_out"] - figures["energy_chains"]) < 3.0
    assert figures["auroc_foreign"] > 0.97
    assert figures["samples_of_class_recognised"] > 0.5
    assert run.monitor(jax.random.key(3), state)["accuracy_held_out"] == figures["accuracy"]
    draws = run.sample(jax.random.key(1), state, 1000)
    assert {name: value.shape for name, value in draws.items()} == {
        "images": (1000, 8, 8, 1),
        "energies": (1000,),
        "images_of_class": (1000, 8, 8, 1),
        "labels": (1000,),
    }
    pictures = run.figures(jax.random.key(0), state, draws)
    assert set(pictures) == {"samples_by_class", "samples", "reliability", "energies"}


def test_the_plain_twin_classifies_and_has_no_chains():
    config = recipe.config(**SHORT | {"likelihood_weight": 0.0}, num_devices=1)
    run = recipe.build(config)
    state = train(run, config).state
    assert state.carry == ()
    assert run.monitor(jax.random.key(3), state)["accuracy_held_out"] > 0.9  # chance: 0.1


def test_births_from_class_gaussians():
    """Close to the data in mean and covariance, before anything is learned."""
    run = build(recipe.config(births="class_gaussians", hidden_features=(8,)))
    data = load_labelled_images(recipe.config(seed=0))
    batch = JointBatch(data.images[:60], data.labels[:60], data.images[:60])
    births = np.asarray(run.objective.init(jax.random.key(0), {}, batch).position)
    births = births.reshape(-1, 8, 8, 1)
    noise = np.random.default_rng(0).uniform(-1, 1, births.shape)
    near, far = (frechet_distance(x, data.held_out_images) for x in (births, noise))
    assert near < far / 10


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_full_run_classifies_like_its_plain_twin_and_draws(seed):
    joint, state = trained(seed=seed)
    figures = joint.evaluate(jax.random.key(2), state)
    plain, state = trained(seed=seed, likelihood_weight=0.0)
    control = plain.evaluate(jax.random.key(2), state)
    assert figures["accuracy"] > 0.95
    assert figures["accuracy"] > control["accuracy"] - 0.01
    assert figures["frechet_pixel"] < 2.5
    assert control["frechet_pixel"] > 3 * figures["frechet_pixel"]
    assert abs(figures["energy_gap"]) < 1.5
    assert figures["samples_of_class_recognised"] > 0.9
    assert figures["auroc_foreign"] > 0.995

"""Foreign inputs told by energy: the sets, the two phases, the figures."""

import jax
import numpy as np
import pytest
from sklearn.datasets import load_digits

from ebjax.recipes.energy_ood import build, load_sets, recipe
from ebjax.training import train


def test_sets_are_disjoint_and_labelled():
    sets = load_sets(1000, seed=3)
    digits = load_digits()
    assert sets.training.shape == (1000, 64)
    assert len(sets.held_out) == (digits.target < 8).sum() - 1000
    assert sets.training_labels.max() == sets.held_out_labels.max() == 7
    label_of = {
        image.tobytes(): label for image, label in zip(digits.data, digits.target, strict=True)
    }
    for images, labels in (
        (sets.training, sets.training_labels),
        (sets.held_out, sets.held_out_labels),
    ):
        originals = (16.0 * images.astype(np.float64)).round()
        np.testing.assert_array_equal([label_of.pop(i.tobytes()) for i in originals], labels)
    rest = (16.0 * sets.foreign["digits_8_9"].astype(np.float64)).round()
    assert all(label_of.pop(image.tobytes()) >= 8 for image in rest)
    assert not label_of  # every image is in one set
    for images in sets.foreign.values():
        assert images.dtype == np.float32
        assert images.min() >= 0.0
        assert images.max() <= 1.0


def test_foreign_sets_are_what_they_say():
    sets = load_sets(1000, seed=0)
    test, foreign = sets.held_out, sets.foreign
    np.testing.assert_array_equal(np.sort(foreign["permuted"], 1), np.sort(test, 1))
    turned = foreign["turned"].reshape(-1, 8, 8)
    np.testing.assert_array_equal(turned[5], np.rot90(test[5].reshape(8, 8)))
    residual = 2.0 * foreign["mixed"] - test
    assert {image.tobytes() for image in residual} == {image.tobytes() for image in test}


def test_auxiliary_outliers_are_not_the_test_sets():
    """Training images only, and the pixel order of the test set is not among those of training."""
    sets = load_sets(1000, seed=0)
    for order in sets.orders:
        assert not np.array_equal(sets.held_out[:, order], sets.foreign["permuted"])
    config = recipe.config(outliers_per_example=3)
    run = build(config)
    one = jax.jit(jax.vmap(lambda i: run.source.example(run.source.arrays, jax.random.key(0), i)))
    batch = one(np.arange(1000, dtype=np.uint32))
    assert len({image.tobytes() for image in np.asarray(batch.examples)}) == 1000
    assert batch.outliers.shape == (1000, 3, 64)
    squares = sets.training.reshape(-1, 8, 8)
    made = [sets.training[:, order] for order in sets.orders]
    made += [np.roll(squares, 4, axis=1).reshape(-1, 64), squares[:, ::-1].reshape(-1, 64)]
    known = {image.tobytes(): kind for kind, images in enumerate(made) for image in images}
    kinds = [known[image.tobytes()] for image in np.asarray(batch.outliers).reshape(-1, 64)]
    counts = np.bincount(kinds, minlength=7)
    z = (counts - 3000 / 7) / np.sqrt(3000 * (1 / 7) * (6 / 7))
    assert np.abs(z).max() < 5.0


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("num_training", 10),
        ("num_pretraining_steps", 0),
        ("hidden_features", (0,)),
        ("hinge_weight", -0.1),
        ("margin_out", float("nan")),
    ],
)
def test_impossible_settings_are_named(field, value):
    with pytest.raises(ValueError, match=field):
        recipe.config(**{field: value})


def trained(**options):
    config = recipe.config(**{"num_devices": 1, **options})
    run = recipe.build(config)
    state = train(run, config).state
    return run, state, run.evaluate(jax.random.key(1), state)


SHORT = {"num_pretraining_steps": 200, "num_fine_tuning_steps": 100, "hidden_features": (64, 64)}


def test_fine_tuning_tells_what_plain_training_does_not():
    _, _, plain = trained(**SHORT, num_steps=200)
    run, state, tuned = trained(**SHORT, num_steps=300)
    assert plain["is_fine_tuned"] == 0.0
    assert tuned["is_fine_tuned"] == 1.0
    assert plain["accuracy"] > 0.95
    assert tuned["accuracy"] > plain["accuracy"] - 0.02
    assert plain["auroc_energy_digits_8_9"] > 0.85  # a score of the wrong sign is below 0.5
    assert tuned["fpr95_energy_permuted"] < 0.05
    assert tuned["energy_held_out"] < plain["energy_held_out"] - 1.0
    for name in ("permuted", "uniform"):
        before, after = (
            each[f"energy_{name}"] - each["energy_held_out"] for each in (plain, tuned)
        )
        assert after > before + 1.0
    draws = run.sample(jax.random.key(2), state, 30)
    assert draws["images_mixed"].shape == (30, 8, 8)
    pictures = run.figures(jax.random.key(3), state, draws)
    assert set(pictures) == {"images", "energies", "roc"}


@pytest.mark.slow
def test_full_runs_over_five_seeds():
    """Means of five seeds: energy against the softmax on 8 and 9, and after fine-tuning."""
    before = [trained(seed=seed, num_steps=940)[2] for seed in range(5)]
    after = [trained(seed=seed)[2] for seed in range(5)]
    mean = lambda rows, name: np.mean([row[name] for row in rows])  # noqa: E731
    assert mean(before, "fpr95_energy_digits_8_9") < 0.75 * mean(before, "fpr95_msp_digits_8_9")
    assert mean(after, "fpr95_energy_permuted") <= 0.02
    assert mean(after, "fpr95_energy_uniform") <= 0.02
    assert mean(before, "accuracy") - mean(after, "accuracy") < 0.01
    # Where it fails, it is seen to fail: turned digits have lower energy than upright ones.
    assert mean(before, "auroc_energy_turned") < 0.5

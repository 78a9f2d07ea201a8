"""The two squared hinges: their slopes, their switch, their measured margin."""

import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ebjax.energies.joint import joint_energy
from ebjax.energies.networks import mlp_classifier
from ebjax.objectives.energy_bounded import (
    OutlierBatch,
    energy_bounded,
    inlier_hinge,
    outlier_hinge,
)

module = importlib.import_module("ebjax.objectives.energy_bounded")

CLASSIFIER = mlp_classifier(3, (8,))
BATCH_SIZE, NUM_OUTLIERS = 6, 2


def setting(**options):
    objective = energy_bounded(CLASSIFIER.apply, **options)
    if "axis_name" not in options:
        objective = objective._replace(loss=jax.jit(objective.loss))
    params = jax.jit(CLASSIFIER.init)(jax.random.key(0), jnp.zeros(2))
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.result_type(float)), params)
    keys = jax.random.split(jax.random.key(1), 3)
    batch = OutlierBatch(
        examples=jax.random.normal(keys[0], (BATCH_SIZE, 2)),
        label=jax.random.randint(keys[1], (BATCH_SIZE,), 0, 3),
        outliers=3.0 * jax.random.normal(keys[2], (BATCH_SIZE, NUM_OUTLIERS, 2)),
    )
    carry = objective.init(jax.random.key(2), params, batch)
    return objective, params, carry, jax.random.split(jax.random.key(3), BATCH_SIZE), batch


def energies_of(params, batch):
    """Energies of inputs and of outliers, with NumPy."""
    logits = lambda x: np.asarray(jax.vmap(CLASSIFIER.apply, (None, 0))(params, x))  # noqa: E731
    inner = -np.log(np.exp(logits(batch.examples)).sum(-1))
    outer = -np.log(np.exp(logits(batch.outliers.reshape(-1, 2))).sum(-1))
    return inner, outer


@pytest.mark.parametrize("hinge", [inlier_hinge, outlier_hinge])
def test_slopes_are_those_of_differences_and_vanish_beyond_the_margin(x64, hinge):
    margin = -1.0
    energies = jnp.linspace(-3.0, 2.0, 12)
    slopes = jax.vmap(jax.grad(hinge), (0, None))(energies, margin)
    differences = (hinge(energies + 1e-6, margin) - hinge(energies - 1e-6, margin)) / 2e-6
    np.testing.assert_allclose(slopes, differences, atol=1e-8)
    is_beyond = energies < margin if hinge is inlier_hinge else energies > margin
    np.testing.assert_array_equal(slopes[is_beyond], 0.0)
    sign = 1.0 if hinge is inlier_hinge else -1.0
    assert np.all(sign * slopes[~is_beyond] > 0.0)  # a step moves the energy towards its margin


def loss_error(**options):
    """The loss against the formula of the head of the file, written out with NumPy."""
    settings = {"weight": 0.3, "margin_in": -1.3, "margin_out": -0.9, **options}
    objective, params, carry, keys, batch = setting(**settings)
    loss, (_, metrics) = objective.loss(params, carry, keys, batch)
    inner, outer = energies_of(params, batch)
    logits = np.asarray(jax.vmap(CLASSIFIER.apply, (None, 0))(params, batch.examples))
    entropy = -logits[np.arange(BATCH_SIZE), np.asarray(batch.label)] - inner
    low = np.maximum(inner + 1.3, 0.0) ** 2
    high = np.maximum(-0.9 - outer, 0.0) ** 2
    assert low.mean() > 1e-3
    assert high.mean() > 1e-3
    np.testing.assert_allclose(metrics["energy_in"], inner.mean(), rtol=1e-6)
    np.testing.assert_allclose(metrics["energy_out"], outer.mean(), rtol=1e-6)
    assert metrics["share_in_below"] == np.mean(inner < -1.3, dtype=np.float32)
    assert metrics["share_out_above"] == np.mean(outer > -0.9, dtype=np.float32)
    return abs(loss - (entropy.mean() + 0.3 * (low.mean() + high.mean())))


def test_the_loss_is_that_of_the_formula(x64):
    assert loss_error() < 1e-12


def test_the_check_sees_exchanged_margins(x64, monkeypatch):
    monkeypatch.setattr(module, "inlier_hinge", outlier_hinge)
    monkeypatch.setattr(module, "outlier_hinge", inlier_hinge)
    assert loss_error() > 1e-3


def test_the_hinges_wait_for_pretraining():
    objective, params, carry, keys, batch = setting(
        weight=10.0, margin_in_offset=-2.0, num_pretraining_steps=2
    )
    plain, *_ = setting(weight=0.0, margin_in_offset=-2.0, num_pretraining_steps=2)
    run = [each.loss for each in (objective, plain)]
    differences = []
    for _ in range(3):
        (loss, (new, _)), (without, _) = (each(params, carry, keys, batch) for each in run)
        differences.append(float(loss - without))
        carry = new
    assert differences[:2] == [0.0, 0.0]
    assert differences[2] > 1.0
    np.testing.assert_array_equal(carry.step, 3)


def test_the_measured_margin_is_the_mean_energy_and_is_held():
    objective, params, carry, keys, batch = setting(margin_in_offset=-2.0, num_pretraining_steps=30)
    step = objective.loss
    for _ in range(30):
        _, (carry, _) = step(params, carry, keys, batch)
    held = carry.mean_energy
    inner, _ = energies_of(params, batch)
    # Equal energies again and again: the running mean has forgotten where it started.
    np.testing.assert_allclose(held, inner, rtol=1e-5)
    moved = jax.tree.map(lambda leaf: 2.0 * leaf, params)
    _, (carry, metrics) = step(moved, carry, keys, batch)
    np.testing.assert_array_equal(carry.mean_energy, held)
    np.testing.assert_allclose(metrics["margin_in"], inner.mean() - 2.0, rtol=1e-5)


def test_the_margin_is_the_same_on_several_devices():
    """Each device has its own slots; the margin is of all of them."""
    options = {"margin_in_offset": -2.0, "num_pretraining_steps": 1}
    objective, params, carry, keys, batch = setting(**options)
    _, (carry, _) = objective.loss(params, carry, keys, batch)
    loss, (_, metrics) = objective.loss(params, carry, keys, batch)
    split = lambda tree: jax.tree.map(lambda x: x.reshape(2, 3, *x.shape[1:]), tree)  # noqa: E731
    parts = (split(carry), split(keys), split(batch))
    results = {}
    for axis_name in ("devices", None):
        spread, *_ = setting(**options, axis_name=axis_name)
        run = jax.jit(jax.vmap(spread.loss, (None, 0, 0, 0), axis_name="devices"))
        losses, (_, all_metrics) = run(params, *parts)
        results[axis_name] = (losses.mean(), all_metrics["margin_in"])
    np.testing.assert_allclose(results["devices"][0], loss, rtol=1e-6)
    np.testing.assert_allclose(results["devices"][1], metrics["margin_in"], rtol=1e-6)
    assert np.ptp(results[None][1]) > 1e-4  # without the axis each device has its own


def test_no_gradient_through_the_measured_margin(x64):
    objective, params, carry, keys, batch = setting(margin_in_offset=-0.5, num_pretraining_steps=1)
    _, (carry, _) = objective.loss(params, carry, keys, batch)
    margin = float(carry.mean_energy.mean()) - 0.5
    fixed, *_ = setting(margin_in=margin)
    ours, theirs = (
        jax.jit(jax.grad(each.loss, has_aux=True))(params, carry, keys, batch)[0]
        for each in (objective, fixed)
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-12), ours, theirs)


def test_the_energy_is_the_joint_energy():
    objective, params, carry, keys, batch = setting(margin_in=0.0)
    _, (_, metrics) = objective.loss(params, carry, keys, batch)
    energy_fn = joint_energy(CLASSIFIER.apply)
    energies = jax.vmap(energy_fn, (None, 0))(params, batch.examples)
    np.testing.assert_allclose(metrics["energy_in"], energies.mean(), rtol=1e-6)


ERRORS = {
    "weight is -1": {"weight": -1.0, "margin_in": 0.0},
    "num_pretraining_steps is -1": {"num_pretraining_steps": -1},
    "margin_in is None and num_pretraining_steps is 0": {},
}


@pytest.mark.parametrize("message", ERRORS)
def test_errors_name_the_value(message):
    with pytest.raises(ValueError, match=message):
        setting(**ERRORS[message])

"""JEM: the sum of its parts, no leak through the sampler, and a density that is learned."""

import importlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ebjax.energies.joint import joint_energy
from ebjax.energies.networks import mlp_classifier
from ebjax.objectives.joint_classification import (
    JointBatch,
    class_gaussian_births,
    cross_entropy,
    joint_classification,
    sharpness_ascent,
)
from ebjax.objectives.regularizers import energy_magnitude
from ebjax.samplers import langevin

module = importlib.import_module("ebjax.objectives.joint_classification")

CLASSIFIER = mlp_classifier(3, (8,))
ENERGY_FN = joint_energy(CLASSIFIER.apply)
BATCH_SIZE = 8


def uniform(key):
    return jax.random.uniform(key, (2,), minval=-1.0, maxval=1.0)


def setting(**options):
    """An objective with its params, carry, keys and batch."""
    objective = joint_classification(
        CLASSIFIER.apply, langevin(step_size=0.05), uniform, **{"num_steps": 3, **options}
    )
    params = jax.jit(CLASSIFIER.init)(jax.random.key(0), jnp.zeros(2))
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.result_type(float)), params)
    keys = jax.random.split(jax.random.key(1), 3)
    batch = JointBatch(
        labelled=jax.random.normal(keys[0], (BATCH_SIZE, 2)),
        label=jax.random.randint(keys[1], (BATCH_SIZE,), 0, 3),
        unlabelled=0.5 + jax.random.normal(keys[2], (BATCH_SIZE, 2)),
    )
    carry = objective.init(jax.random.key(2), params, batch)
    return objective, params, carry, jax.random.split(jax.random.key(3), BATCH_SIZE), batch


def gradient_of(objective, *arguments):
    return jax.jit(jax.value_and_grad(objective.loss, has_aux=True))(*arguments)


def formula(params, batch, negatives, weight, alpha=0.0):
    """The loss of the head of the file, with x_q given."""
    logits = jax.vmap(CLASSIFIER.apply, (None, 0))(params, batch.labelled)
    entropy = -jnp.mean(jax.nn.log_softmax(logits)[jnp.arange(BATCH_SIZE), batch.label])
    data, samples = (
        jax.vmap(ENERGY_FN, (None, 0))(params, x) for x in (batch.unlabelled, negatives)
    )
    penalty = alpha * (jnp.mean(data**2) + jnp.mean(samples**2))
    return entropy + weight * (data.mean() - samples.mean()) + penalty


def largest_difference(first, second):
    pairs = zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True)
    return max(np.abs(np.asarray(a) - np.asarray(b)).max() for a, b in pairs)


def formula_error(weight=0.7, alpha=0.2):
    options = {"likelihood_weight": weight, "regularizers": (energy_magnitude(alpha),)}
    objective, params, carry, keys, batch = setting(**options)
    (loss, (carry, _)), gradient = gradient_of(objective, params, carry, keys, batch)
    negatives = np.asarray(carry.position[:, 0])
    value, slope = jax.jit(jax.value_and_grad(formula), static_argnums=(3, 4))(
        params, batch, negatives, weight, alpha
    )
    return max(abs(loss - value), largest_difference(gradient, slope))


def test_loss_and_gradient_are_those_of_the_formula(x64):
    """Equal to the gradient with x_q as a constant: nothing leaks through the sampler."""
    assert formula_error() < 1e-12


def test_the_check_sees_a_leak(x64, monkeypatch):
    monkeypatch.setattr(jax.lax, "stop_gradient", lambda tree: tree)
    assert formula_error() > 1e-5


def test_weight_zero_is_plain_classification():
    """To the bit, and no chain runs."""
    objective, params, carry, keys, batch = setting(likelihood_weight=0.0)
    assert carry == ()

    def plain(params, batch):
        logits = jax.vmap(CLASSIFIER.apply, (None, 0))(params, batch.labelled)
        return jax.vmap(cross_entropy)(logits, batch.label).mean()

    expected = jax.jit(jax.value_and_grad(plain))
    update = optax.adam(1e-2)
    ours = theirs = params
    ours_state = theirs_state = update.init(params)
    for _ in range(3):
        (loss, (carry, metrics)), gradient = gradient_of(objective, ours, carry, keys, batch)
        updates, ours_state = update.update(gradient, ours_state)
        ours = optax.apply_updates(ours, updates)
        value, gradient = expected(theirs, batch)
        updates, theirs_state = update.update(gradient, theirs_state)
        theirs = optax.apply_updates(theirs, updates)
        assert loss == value
        assert set(metrics) == {"cross_entropy", "accuracy"}
    assert largest_difference(ours, theirs) == 0.0


def test_metrics():
    objective, params, carry, keys, batch = setting(likelihood_weight=0.5)
    (loss, (carry, metrics)), _ = gradient_of(objective, params, carry, keys, batch)
    logits = jax.vmap(CLASSIFIER.apply, (None, 0))(params, batch.labelled)
    assert metrics["accuracy"] == np.mean(np.argmax(logits, 1) == batch.label)
    expected = metrics["cross_entropy"] + 0.5 * metrics["energy_gap"]
    np.testing.assert_allclose(loss, expected, rtol=1e-6)
    energies = jax.vmap(ENERGY_FN, (None, 0))(params, batch.unlabelled)
    np.testing.assert_allclose(metrics["energy_data"], energies.mean(), rtol=1e-5)
    assert metrics["chain_age"] == 3.0
    assert metrics["chains_finite"] == 1.0
    assert all(jnp.shape(value) == () for value in metrics.values())


def test_one_step_lowers_data_and_raises_samples(x64):
    """Data and chains on opposite sides, so that one does not drag the other along."""
    objective, params, carry, keys, batch = setting(likelihood_weight=100.0)
    batch = batch._replace(unlabelled=batch.unlabelled + 2.0)
    carry = carry._replace(position=carry.position - 2.0)
    (_, (carry, _)), gradient = gradient_of(objective, params, carry, keys, batch)
    new = jax.tree.map(lambda p, g: p - 1e-5 * g, params, gradient)
    change = [
        jax.vmap(ENERGY_FN, (None, 0))(new, x).mean()
        - jax.vmap(ENERGY_FN, (None, 0))(params, x).mean()
        for x in (batch.unlabelled, carry.position[:, 0])
    ]
    assert change[0] < 0.0 < change[1]


def test_sharpness_takes_the_gradient_at_the_edge_with_the_same_samples(x64):
    """The gradient of the formula at θ + ε, x_q being those drawn at θ."""
    radius, weight = 0.3, 0.7
    objective, params, carry, keys, batch = setting(
        likelihood_weight=weight, sharpness_radius=radius
    )
    (_, (after, _)), gradient = gradient_of(objective, params, carry, keys, batch)
    plain = setting(likelihood_weight=weight)[0]
    (_, (same, _)), _ = gradient_of(plain, params, carry, keys, batch)
    np.testing.assert_array_equal(after.position, same.position)
    slope = jax.jit(jax.grad(formula), static_argnums=3)
    negatives = np.asarray(after.position[:, 0])
    ascent = sharpness_ascent(params, slope(params, batch, negatives, weight), radius)
    edge = jax.tree.map(jnp.add, params, ascent)
    assert largest_difference(gradient, slope(edge, batch, negatives, weight)) < 1e-12
    assert largest_difference(gradient, slope(params, batch, negatives, weight)) > 1e-4
    # ε lies on the ellipsoid | ε / θ | = ρ, and no other direction on it rises faster.
    pairs = zip(jax.tree.leaves(ascent), jax.tree.leaves(params), strict=True)
    scaled = [np.asarray(e)[p != 0] / np.asarray(p)[p != 0] for e, p in pairs]
    assert abs(np.sqrt(sum(np.sum(s**2) for s in scaled)) - radius) < 1e-12


def test_births_of_a_class_have_its_mean_and_covariance():
    generator = np.random.default_rng(0)
    root = np.array([[1.0, 0.0], [0.8, 0.5]])
    few = generator.normal(size=(100, 2)) @ root.T
    many = 20.0 + 0.1 * generator.normal(size=(300, 2))
    examples, labels = np.concatenate([few, many]), np.repeat([4, 7], [100, 300])
    births = class_gaussian_births(examples, labels)
    draws = np.asarray(jax.vmap(births)(jax.random.split(jax.random.key(0), 8000)), np.float64)
    is_few = draws[:, 0] < 10.0
    assert abs(is_few.mean() - 0.25) < 5 * np.sqrt(0.25 * 0.75 / 8000)
    own = draws[is_few]
    covariance = np.cov(few.T, bias=True) + 1e-4 * np.eye(2)
    z_mean = (own.mean(0) - few.mean(0)) / np.sqrt(np.diag(covariance) / len(own))
    spread = np.sqrt((np.outer(*[np.diag(covariance)] * 2) + covariance**2) / len(own))
    z_covariance = (np.cov(own.T) - covariance) / spread
    assert np.abs(z_mean).max() < 5.0
    assert np.abs(z_covariance).max() < 5.0
    assert np.abs((np.cov(own.T) - np.diag(np.diag(covariance))) / spread).max() > 5.0
    clipped = class_gaussian_births(examples, labels, bounds=(0.0, 1.0))
    inside = np.asarray(jax.vmap(clipped)(jax.random.split(jax.random.key(0), 100)))
    assert inside.min() >= 0.0
    assert inside.max() <= 1.0


CENTERS = np.array([[-1.5, 0.0], [1.5, 0.0], [0.0, 1.8]])
SPREAD = 0.4


def mixture(key, num):
    class_key, noise_key = jax.random.split(key)
    label = jax.random.randint(class_key, (num,), 0, 3)
    return jnp.asarray(CENTERS)[label] + SPREAD * jax.random.normal(noise_key, (num, 2)), label


def kl_on_a_grid(params, apply):
    """KL(data ‖ model) of three Gaussians in the plane, exp(-E) normalised on a grid."""
    axis = np.linspace(-4.5, 4.5, 91)
    grid = np.stack(np.meshgrid(axis, axis), axis=-1).reshape(-1, 2)
    energies = np.asarray(apply(params, grid.astype(np.float32)), np.float64)
    cell = (axis[1] - axis[0]) ** 2
    log_model = -energies - np.log(np.exp(-energies - (-energies).max()).sum() * cell)
    log_model -= (-energies).max()
    squares = ((grid[:, None] - CENTERS) ** 2).sum(-1)
    data = np.exp(-squares / (2 * SPREAD**2)).mean(1) / (2 * np.pi * SPREAD**2)
    return float(np.sum(data * (np.log(np.maximum(data, 1e-300)) - log_model)) * cell)


@pytest.mark.slow
def test_the_density_of_three_gaussians_is_learned():
    """At temperature one, the joint model is a density: KL falls below 0.05 nat; plain training,
    which leaves E undetermined, is the control.
    """
    classifier = mlp_classifier(3, (64, 64))
    apply = jax.jit(jax.vmap(joint_energy(classifier.apply), (None, 0)))
    found = {}
    for weight in (0.0, 1.0):
        objective = joint_classification(
            classifier.apply,
            langevin(step_size=0.02),
            lambda key: 3.0 * uniform(key),
            num_steps=20,
            likelihood_weight=weight,
            chains_per_example=4,
        )
        optimizer = optax.adam(optax.cosine_decay_schedule(2e-3, 2500))
        params = classifier.init(jax.random.key(0), jnp.zeros(2))

        def draw(key):
            x, label = mixture(key, 256)
            return JointBatch(x, label, jnp.roll(x, 1, axis=0))

        carry = objective.init(jax.random.key(1), params, draw(jax.random.key(2)))

        @jax.jit
        def train(params, carry, objective=objective, optimizer=optimizer):
            def update(state, t):
                params, opt_state, carry = state
                data_key, loss_key = jax.random.split(jax.random.fold_in(jax.random.key(3), t))
                gradient, (carry, metrics) = jax.grad(objective.loss, has_aux=True)(
                    params, carry, jax.random.split(loss_key, 256), draw(data_key)
                )
                updates, opt_state = optimizer.update(gradient, opt_state)
                return (optax.apply_updates(params, updates), opt_state, carry), metrics

            start = (params, optimizer.init(params), carry)
            (params, _, _), metrics = jax.lax.scan(update, start, jnp.arange(2500))
            return params, metrics["accuracy"][-100:].mean()

        params, accuracy = train(params, carry)
        found[weight] = kl_on_a_grid(params, apply)
        assert accuracy > 0.98
    assert found[1.0] < 0.05
    assert found[0.0] > 0.5


ERRORS = {
    "likelihood_weight is -1": {"likelihood_weight": -1.0},
    "sharpness_radius is nan": {"sharpness_radius": float("nan")},
    "num_steps is 0": {"num_steps": 0},
    "rebirth_probability is 2": {"rebirth_probability": 2.0},
}


@pytest.mark.parametrize("message", ERRORS)
def test_errors_name_the_value(message):
    with pytest.raises(ValueError, match=message):
        setting(**ERRORS[message])


def test_errors_of_births():
    with pytest.raises(ValueError, match=r"labels has shape \(3,\)"):
        class_gaussian_births(np.zeros((4, 2)), np.zeros(3))
    with pytest.raises(ValueError, match="ridge is 0"):
        class_gaussian_births(np.zeros((4, 2)), np.zeros(4), ridge=0.0)

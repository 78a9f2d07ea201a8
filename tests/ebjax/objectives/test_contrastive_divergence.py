"""PCD: its gradient is the likelihood's, its chains persist, and nothing leaks."""

import importlib
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ebjax.energies import mlp_energy
from ebjax.objectives import contrastive_loss, persistent_contrastive_divergence
from ebjax.samplers import langevin, mala

module = importlib.import_module("ebjax.objectives.contrastive_divergence")

ENERGY = mlp_energy((8,))
STILL = langevin(step_size=np.zeros(()))  # chains that stay where they start
MOVING = langevin(step_size=0.05)


def uniform(key):
    return jax.random.uniform(key, (2,), minval=-1.0, maxval=1.0)


def setting(kernel=MOVING, *, batch_size=8, energy_fn=ENERGY.apply, **options):
    """An objective with its params, carry, keys and batch."""
    objective = persistent_contrastive_divergence(
        energy_fn, kernel, uniform, **{"num_steps": 4, **options}
    )
    objective = objective._replace(loss=jax.jit(objective.loss))
    params = jax.jit(ENERGY.init)(jax.random.key(0), jnp.zeros(2))
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.result_type(float)), params)
    batch = 0.5 + jax.random.normal(jax.random.key(1), (batch_size, 2))
    carry = objective.init(jax.random.key(2), params, batch)
    keys = jax.random.split(jax.random.key(3), batch_size)
    return objective, params, carry, keys, batch


energies = jax.jit(jax.vmap(ENERGY.apply, (None, 0)))


def gradient_of(objective, params, carry, keys, batch):
    return jax.jit(jax.grad(objective.loss, has_aux=True))(params, carry, keys, batch)


def gradient_pair(alpha=0.0):
    """The objective's gradient, and that of the formula with the negatives as constants."""
    objective, params, carry, keys, batch = setting(energy_regularizer=alpha)
    gradient, (carry, _) = gradient_of(objective, params, carry, keys, batch)
    negatives = np.asarray(carry.position[:, 0])

    def formula(params):
        positive, negative = energies(params, batch), energies(params, negatives)
        square = jnp.square(positive).mean() + jnp.square(negative).mean()
        return positive.mean() - negative.mean() + alpha * square

    return gradient, jax.jit(jax.grad(formula))(params)


def largest_difference(first, second):
    pairs = zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True)
    return max(np.abs(np.asarray(a) - np.asarray(b)).max() for a, b in pairs)


@pytest.mark.parametrize("alpha", [0.0, 0.3])
def test_no_gradient_leaks_through_the_sampler(x64, alpha):
    assert largest_difference(*gradient_pair(alpha)) < 1e-12


def test_the_leak_check_sees_a_leak(monkeypatch, x64):
    monkeypatch.setattr(jax.lax, "stop_gradient", lambda tree: tree)
    assert largest_difference(*gradient_pair()) > 1e-4


def test_the_carry_gets_no_gradient_either():
    objective, params, carry, keys, batch = setting()

    def loss(position):
        return objective.loss(params, carry._replace(position=position), keys, batch)[0]

    assert np.all(np.asarray(jax.jit(jax.grad(loss))(carry.position)) == 0.0)


def test_one_step_lowers_data_and_raises_samples(x64):
    """Data and chains on opposite sides, so that one does not drag the other along."""
    objective, params, carry, keys, batch = setting()
    batch, carry = batch + 2.0, carry._replace(position=carry.position - 2.0)
    gradient, (carry, _) = gradient_of(objective, params, carry, keys, batch)
    negatives = carry.position[:, 0]
    sgd = optax.sgd(1e-3)
    updates, _ = sgd.update(gradient, sgd.init(params))
    new = optax.apply_updates(params, updates)
    assert energies(new, batch).mean() < energies(params, batch).mean()
    assert energies(new, negatives).mean() > energies(params, negatives).mean()


def test_the_loss_of_a_pair():
    slopes = jax.grad(contrastive_loss, (0, 1))(jnp.array(2.0), jnp.array(5.0))
    assert slopes == (1.0, -1.0)
    loss = contrastive_loss(jnp.array(2.0), jnp.array(5.0), energy_regularizer=0.1)
    assert loss == pytest.approx(-3.0 + 0.1 * 29.0)


def test_the_regulariser_is_the_mean_of_squares():
    alpha = 0.25
    plain, regularised = (setting(energy_regularizer=a) for a in (0.0, alpha))
    (loss, (_, metrics)), (with_it, (carry, _)) = (s[0].loss(*s[1:]) for s in (plain, regularised))
    _, params, _, _, batch = plain
    both = (energies(params, batch), energies(params, carry.position[:, 0]))
    mean_of_squares = sum(np.mean(np.square(e)) for e in both)
    square_of_mean = sum(np.square(np.mean(e)) for e in both)
    np.testing.assert_allclose(with_it - loss, alpha * mean_of_squares, rtol=1e-4)
    assert abs(mean_of_squares - square_of_mean) > 1e-2  # they can be told apart here
    np.testing.assert_allclose(metrics["energy_gap"], loss, rtol=1e-5)


@pytest.mark.parametrize("kernel", [MOVING, mala(step_size=0.1)], ids=["langevin", "mala"])
def test_metrics(kernel):
    objective, params, carry, keys, batch = setting(kernel)
    _, (carry, metrics) = objective.loss(params, carry, keys, batch)
    np.testing.assert_allclose(metrics["energy_data"], energies(params, batch).mean(), rtol=1e-5)
    samples = energies(params, carry.position[:, 0]).mean()
    np.testing.assert_allclose(metrics["energy_samples"], samples, rtol=1e-5)
    assert metrics["chain_age"] == 4.0
    assert metrics["chains_finite"] == 1.0
    assert metrics["sampler_gradient_norm"] > 0.0
    assert ("acceptance_rate" in metrics) == (kernel is not MOVING)
    assert all(jnp.shape(value) == () for value in metrics.values())


def test_chains_that_fail_are_counted():
    broken = lambda params, x: jnp.where(x[0] > 0.0, jnp.nan, ENERGY.apply(params, x))  # noqa: E731
    objective, params, carry, keys, batch = setting(
        STILL, energy_fn=broken, batch_size=64, rebirth_probability=0.0
    )
    _, (_, metrics) = objective.loss(params, carry, keys, batch)
    assert metrics["chains_finite"] == np.mean(carry.position[:, 0, 0] <= 0.0)


def test_initial_positions_are_those_asked_for():
    _, _, carry, _, _ = setting(batch_size=500, chains_per_example=3)
    position = np.asarray(carry.position)
    assert position.shape == (500, 3, 2)
    assert position.min() >= -1.0
    assert position.max() <= 1.0
    assert len(np.unique(position.reshape(-1, 2), axis=0)) == 1500  # every chain its own noise
    assert carry.age.shape == (500, 3)
    assert carry.age.dtype == jnp.int32
    assert np.all(np.asarray(carry.age) == 0)


def run_updates(num_updates, batch_size, kernel=MOVING, **options):
    """Carries before and after each of several updates."""
    objective, params, carry, keys, batch = setting(kernel, batch_size=batch_size, **options)
    carries = [carry]
    for t in range(num_updates):
        step_keys = jax.vmap(jax.random.fold_in, (0, None))(keys, t)
        _, (carry, _) = objective.loss(params, carry, step_keys, batch)
        carries.append(carry)
    return [jax.tree.map(np.asarray, carry) for carry in carries]


def test_chains_are_written_back_to_their_place():
    carries = run_updates(5, 50, chains_per_example=3, rebirth_probability=0.0)
    for before, after in itertools.pairwise(carries):
        moved = np.any(before.position != after.position, axis=-1)
        np.testing.assert_array_equal(moved.sum(1), np.ones(50))
        np.testing.assert_array_equal(after.age - before.age, 4 * moved)
    # Without rebirth no step is lost: card 22's "mean age stays at K" is the bug.
    np.testing.assert_array_equal(carries[-1].age.sum(1), np.full(50, 5 * 4))


def test_the_chosen_chain_goes_on_from_where_it_was():
    """A chain that does not move stays, and a moved one ends near its own start."""
    carries = run_updates(3, 50, STILL, chains_per_example=3, rebirth_probability=0.0)
    np.testing.assert_array_equal(carries[0].position, carries[-1].position)


def test_each_chain_of_a_slot_is_chosen_equally_often():
    batch_size, num_chains = 9000, 3
    _, after = run_updates(1, batch_size, chains_per_example=num_chains)
    counts = (after.age > 0).sum(0)
    p = 1.0 / num_chains
    z = (counts - batch_size * p) / np.sqrt(batch_size * p * (1.0 - p))
    assert np.abs(z).max() < 5.0


def test_slots_draw_apart():
    """Slots with equal chains and equal data part ways: each has its own key."""
    objective, params, carry, keys, batch = setting()
    same = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf[:1], leaf.shape), carry)
    _, (after, _) = objective.loss(params, same, keys, batch)
    assert np.unique(after.position[:, 0, 0]).size == len(batch)


@pytest.mark.parametrize("probability", [0.0, 0.3, 1.0])
def test_rebirth_happens_as_often_as_it_says(probability):
    batch_size = 10_000
    objective, params, carry, keys, batch = setting(
        STILL, batch_size=batch_size, rebirth_probability=probability
    )
    old = carry._replace(position=carry.position + 50.0, age=carry.age + 1000)
    _, (after, _) = objective.loss(params, old, keys, batch)
    age, position = np.asarray(after.age[:, 0]), np.asarray(after.position[:, 0])
    is_reborn = age == 4
    np.testing.assert_array_equal(age[~is_reborn], 1004)
    # The reborn start in the range of the noise, the others go on from their own place.
    assert np.all(np.abs(position[is_reborn]) <= 1.0)
    np.testing.assert_array_equal(position[~is_reborn], np.asarray(old.position[:, 0])[~is_reborn])
    count, variance = is_reborn.sum(), batch_size * probability * (1.0 - probability)
    assert abs(count - batch_size * probability) <= 5.0 * np.sqrt(variance)
    if 0.0 < probability < 1.0:
        planted = batch_size * (probability + 0.05)  # the control
        assert abs(count - planted) > 5.0 * np.sqrt(variance)


def test_slices_of_the_batch_add_up(x64):
    """What N devices compute, each on its slots, is what one computes on all."""
    objective, params, carry, keys, batch = setting(
        chains_per_example=2, rebirth_probability=0.5, energy_regularizer=0.1
    )
    run = jax.jit(jax.value_and_grad(objective.loss, has_aux=True))
    (loss, (new, metrics)), gradient = run(params, carry, keys, batch)
    for num_slices in (2, 8):
        split = jax.tree.map(
            lambda leaf, n=num_slices: leaf.reshape(n, -1, *leaf.shape[1:]), (carry, keys, batch)
        )
        parts = [
            run(params, *jax.tree.map(lambda leaf, i=i: leaf[i], split)) for i in range(num_slices)
        ]
        means = [(loss, metrics, gradient) for (loss, (_, metrics)), gradient in parts]
        mean = jax.tree.map(lambda *leaves: np.mean(leaves, axis=0), *means)
        carries = [carry for (_, (carry, _)), _ in parts]
        joined = jax.tree.map(lambda *leaves: np.concatenate(leaves), *carries)
        assert largest_difference(mean, (loss, metrics, gradient)) < 1e-12
        assert largest_difference(joined, new) < 1e-12


# An exponential family, where the likelihood's gradient is known.
TRUE = {"mean": jnp.array([0.4, -0.3]), "precision": jnp.array([[1.5, 0.5], [0.5, 0.8]])}


def gaussian_energy(params, x):
    centred = x - params["mean"]
    return 0.5 * centred @ params["precision"] @ centred


def gradient_z_scores(num_chains=4000):
    """PCD's gradient after several updates of persistent chains, against the exact one.

    d(-log p)/dm = P (m - E x),  d(-log p)/dP = (E_data[c c'] - P^{-1}) / 2 with c = x - m.
    Data enter both alike, so the error is that of C independent chains:
    Var = P_ii / C and (S_ii S_jj + S_ij²) / (4 C) with S = P^{-1}.
    """
    objective = persistent_contrastive_divergence(
        gaussian_energy, mala(step_size=0.5), uniform, num_steps=25, rebirth_probability=0.0
    )
    shift = jnp.array([1.0, 0.5])
    batch = shift + 0.7 * jax.random.normal(jax.random.key(1), (num_chains, 2))
    carry = objective.init(jax.random.key(2), TRUE, batch)
    gradient_fn = jax.jit(jax.grad(objective.loss, has_aux=True))
    for step in range(4):
        keys = jax.random.split(jax.random.key(step), num_chains)
        gradient, (carry, _) = gradient_fn(TRUE, carry, keys, batch)
    data, mean, precision = (np.asarray(a, float) for a in (batch, TRUE["mean"], TRUE["precision"]))
    covariance, centred = np.linalg.inv(precision), data - mean
    exact_mean = -precision @ centred.mean(0)
    exact_precision = 0.5 * (centred.T @ centred / num_chains - covariance)
    diagonal = np.diag(covariance)
    variance = 0.25 * (np.outer(diagonal, diagonal) + covariance**2)
    z_mean = (gradient["mean"] - exact_mean) / np.sqrt(np.diag(precision) / num_chains)
    z_precision = (gradient["precision"] - exact_precision) / np.sqrt(variance / num_chains)
    return np.abs(np.concatenate([z_mean, np.ravel(z_precision)]))


def test_the_gradient_is_that_of_the_likelihood():
    assert gradient_z_scores().max() < 5.0


def test_the_check_sees_a_wrong_sign(monkeypatch):
    monkeypatch.setattr(module, "contrastive_loss", lambda p, n, *, energy_regularizer: n - p)
    assert gradient_z_scores().max() > 5.0


def test_the_check_sees_chains_that_restart(monkeypatch):
    """One step from noise at each update is not a draw of the model."""

    def restarting(key, kernel, energy_fn, params, state, num_steps):
        state = kernel.init(energy_fn, params, uniform(key))
        return run_chain(key, kernel, energy_fn, params, state, 1)

    run_chain = module.run_chain
    monkeypatch.setattr(module, "run_chain", restarting)
    assert gradient_z_scores().max() > 5.0


def test_training_finds_the_mean_of_the_data():
    """The fixed point: with the exact precision, the learned mean is that of the data."""
    num = 2000
    objective = persistent_contrastive_divergence(
        lambda mean, x: 0.5 * jnp.sum(jnp.square(x - mean)),
        mala(step_size=0.5),
        uniform,
        num_steps=5,
    )
    batch = jnp.array([1.3, -0.8]) + jax.random.normal(jax.random.key(1), (num, 2))
    carry = objective.init(jax.random.key(2), jnp.zeros(2), batch)

    @jax.jit
    def update(state, t):
        mean, carry = state
        keys = jax.random.split(jax.random.fold_in(jax.random.key(3), t), num)
        gradient, (carry, _) = jax.grad(objective.loss, has_aux=True)(mean, carry, keys, batch)
        return (mean - 0.1 * gradient, carry), mean

    _, means = jax.lax.scan(update, (jnp.zeros(2), carry), jnp.arange(150))
    error = means[-1] - batch.mean(0)
    # The last mean averages the noise of the chains, variance 1/C a step: 1/C bounds it.
    assert np.abs(error).max() * np.sqrt(num) < 5.0


def test_positions_may_be_pytrees():
    energy_fn = lambda params, x: params * jnp.sum(x["a"] ** 2) + x["b"] ** 2  # noqa: E731
    birth = lambda key: {"a": jax.random.normal(key, (3,)), "b": jax.random.normal(key)}  # noqa: E731
    objective = persistent_contrastive_divergence(energy_fn, MOVING, birth, num_steps=2)
    batch = jax.vmap(birth)(jax.random.split(jax.random.key(0), 4))
    carry = objective.init(jax.random.key(1), 1.0, batch)
    keys = jax.random.split(jax.random.key(2), 4)
    shapes = lambda tree: jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), tree)  # noqa: E731
    loss, (new, _) = jax.eval_shape(objective.loss, 1.0, carry, keys, batch)
    assert loss.shape == ()
    assert shapes(new) == shapes(carry)


ERRORS = {
    "num_steps": {"num_steps": 0},
    "chains_per_example": {"chains_per_example": 0},
    "rebirth_probability": {"rebirth_probability": 1.5},
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors_name_the_value(name):
    with pytest.raises(ValueError, match=f"{name} is {ERRORS[name][name]}"):
        setting(**ERRORS[name])

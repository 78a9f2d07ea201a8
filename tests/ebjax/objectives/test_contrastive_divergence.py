"""PCD: its gradient is the likelihood's, its chains persist, and nothing leaks."""

import importlib
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ebjax.energies import mlp_energy
from ebjax.energies.boltzmann import enumerate_states
from ebjax.objectives.chain_divergence import ChainDivergence, log_nearest_distance
from ebjax.objectives.contrastive_divergence import (
    contrastive_divergence,
    contrastive_loss,
    persistent_contrastive_divergence,
    short_run,
)
from ebjax.objectives.regularizers import energy_magnitude, gradient_penalty
from ebjax.samplers import gibbs, langevin, mala

module = importlib.import_module("ebjax.objectives.contrastive_divergence")
chains_module = importlib.import_module("ebjax.objectives.persistent_chains")
divergence_module = importlib.import_module("ebjax.objectives.chain_divergence")

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

    run_chain = chains_module.run_chain
    monkeypatch.setattr(chains_module, "run_chain", restarting)
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


# Where the chains start.


def at_the_example(key, example):
    del key
    return example


@pytest.mark.parametrize("make", ["contrastive_divergence", "short_run", "born_at_the_example"])
def test_chains_start_where_they_should(make):
    """With a kernel that does not move, the ends are the starts."""
    objective = {
        "contrastive_divergence": contrastive_divergence(ENERGY.apply, STILL, num_steps=2),
        "short_run": short_run(ENERGY.apply, STILL, uniform, num_steps=2),
        "born_at_the_example": short_run(ENERGY.apply, STILL, at_the_example, num_steps=2),
    }[make]
    _, params, _, keys, batch = setting(STILL)
    batch = batch + 5.0
    carry = objective.init(jax.random.key(0), params, batch)
    _, (carry, metrics) = jax.jit(objective.loss)(params, carry, keys, batch)
    ends = np.asarray(carry.position[:, 0])
    if make == "short_run":
        assert np.abs(ends).max() <= 1.0
    else:
        np.testing.assert_array_equal(ends, batch)
        assert metrics["energy_gap"] == 0.0
    np.testing.assert_array_equal(carry.age, 2)


# CD-k on a model that can be enumerated: four spins, single-site Gibbs sampling.
STATES = np.asarray(enumerate_states((4,)), float)
SPINS = {
    "couplings": np.array([[0, 2.0, 0, -1], [2.0, 0, 1.5, 0], [0, 1.5, 0, 1], [-1, 0, 1, 0]]),
    "bias": np.array([-1.2, -0.5, 0.3, 0.4]),
}


def spin_energy(params, x):
    return -0.5 * x @ params["couplings"] @ x - params["bias"] @ x


def spin_laws(num_steps):
    """Laws over the 16 states: the data's, that after k random-site Gibbs updates, the model's."""
    logits = np.array([-spin_energy(SPINS, x) for x in STATES])
    model = np.exp(logits) / np.exp(logits).sum()
    transition = np.zeros((16, 16))
    for i, state in enumerate(STATES):
        for site in range(4):
            other = state.copy()
            other[site] = 1.0 - other[site]
            j = np.flatnonzero((other == STATES).all(1))[0]
            transition[i, j] += 0.25 * model[j] / (model[i] + model[j])
            transition[i, i] += 0.25 * model[i] / (model[i] + model[j])
    data = np.full(16, 1 / 16)
    return data, data @ np.linalg.matrix_power(transition, num_steps), model


def spin_gradient(positive, negative):
    """Of the loss, given the laws of data and samples, and what one sample contributes."""
    terms = np.concatenate([-0.5 * STATES[:, :, None] * STATES[:, None], -STATES[..., None]], 2)
    terms = terms.reshape(16, -1)
    variance = negative @ terms**2 - (negative @ terms) ** 2
    return (positive - negative) @ terms, variance


def sampled_spin_gradient(num_steps, num_copies=2000):
    objective = contrastive_divergence(spin_energy, gibbs(), num_steps=num_steps)
    batch = np.repeat(STATES, num_copies, axis=0)
    carry = objective.init(jax.random.key(0), SPINS, batch)
    keys = jax.random.split(jax.random.key(1), len(batch))
    gradient, _ = jax.jit(jax.grad(objective.loss, has_aux=True))(SPINS, carry, keys, batch)
    return np.concatenate([gradient["couplings"], gradient["bias"][:, None]], 1).ravel()


@pytest.mark.parametrize("num_steps", [1, 40])
def test_contrastive_divergence_is_that_of_the_transition_matrix(num_steps, x64):
    data, after, model = spin_laws(num_steps)
    (expected, variance), (exact, _) = spin_gradient(data, after), spin_gradient(data, model)
    error = np.sqrt(np.maximum(variance, 1e-12) / (16 * 2000))
    sampled = sampled_spin_gradient(num_steps)
    assert np.abs((sampled - expected) / error).max() < 5.0
    # With k the gradient becomes that of the likelihood; one step is far from it.
    assert (np.abs(expected - exact).max() < 1e-3) == (num_steps == 40)
    assert (np.abs((sampled - exact) / error).max() < 6.0) == (num_steps == 40)


# Conditional energies.


def given_energy(params, x, context):
    return 0.5 * jnp.sum(jnp.square(x - params[context]))


def conditional(**options):
    objective = persistent_contrastive_divergence(
        given_energy, langevin(step_size=0.2), uniform, **{"num_steps": 3, **options},
        has_context=True,
    )  # fmt: skip
    means = jnp.array([[-3.0, 0.0], [0.0, 2.0], [4.0, 4.0]])
    contexts = jnp.arange(30) % 3
    batch = (means[contexts] + 0.5, contexts)
    carry = objective.init(jax.random.key(2), means, batch)
    return objective, means, carry, jax.random.split(jax.random.key(3), 30), batch


def test_chains_keep_their_context(x64):
    objective, means, carry, keys, (points, contexts) = conditional(
        chains_per_example=2, rebirth_probability=0.0
    )
    np.testing.assert_array_equal(carry.context[:, 0], contexts)
    assert np.any(carry.context[:, 1] != contexts)
    shuffled = (points, jnp.roll(contexts, 1))
    run = jax.jit(jax.grad(objective.loss, has_aux=True))
    gradient, (new, _) = run(means, carry, keys, shuffled)
    np.testing.assert_array_equal(new.context, carry.context)
    # d E / d mean_c sums m_c - x over the examples of context c, and over the chains of context c.
    moved = np.any(np.asarray(new.position != carry.position), -1)
    ends, of_ends = np.asarray(new.position)[moved], np.asarray(new.context)[moved]

    def formula(negative_contexts):
        expected = np.zeros((3, 2))
        np.add.at(expected, np.asarray(shuffled[1]), np.asarray(means[shuffled[1]] - points))
        np.subtract.at(expected, negative_contexts, means[negative_contexts] - ends)
        return expected / 30

    np.testing.assert_allclose(gradient, formula(of_ends), atol=1e-12)
    # The control: chains judged under the context that their slot holds now.
    assert np.abs(gradient - formula(np.asarray(shuffled[1]))).max() > 0.1


def test_chains_born_anew_take_the_context_of_the_example():
    objective, means, carry, keys, (points, contexts) = conditional(rebirth_probability=1.0)
    shuffled = (points, jnp.roll(contexts, 1))
    _, (new, _) = jax.jit(objective.loss)(means, carry, keys, shuffled)
    np.testing.assert_array_equal(new.context[:, 0], shuffled[1])


# The dependence of the chains on the parameters.


def scaled_energy(scale, x):
    return 0.5 * scale * jnp.sum(jnp.square(x))


def divergence_setting(step_size, divergence, num_steps=1, temperature=1.0):
    objective = contrastive_divergence(
        scaled_energy,
        langevin(step_size=step_size, temperature=temperature),
        num_steps=num_steps,
        divergence=divergence,
    )
    batch = jax.random.normal(jax.random.key(0), (6, 2))
    carry = objective.init(jax.random.key(1), 1.7, batch)
    keys = jax.random.split(jax.random.key(2), 6)
    run = jax.jit(jax.grad(objective.loss, has_aux=True))
    gradient, (carry, metrics) = run(1.7, carry, keys, batch)
    return gradient, np.asarray(batch), np.asarray(carry.position[:, 0]), metrics


def test_the_gradient_through_the_last_step_is_the_closed_form(x64):
    """x = (1 - h λ) x_0 + noise, so d E_frozen(x) / dλ = λ x · (-h x_0), beside (x_0² - x²) / 2."""
    weight, h, scale = 0.7, 0.2, 1.7
    gradient, start, end, metrics = divergence_setting(h, ChainDivergence(weight=weight))
    plain = 0.5 * (np.sum(start**2, 1) - np.sum(end**2, 1)).mean()
    term = -scale * h * np.sum(end * start, 1).mean()
    assert gradient == pytest.approx(plain + weight * term, abs=1e-12)
    assert abs(term) > 0.1
    energy = 0.5 * scale * np.sum(end**2, 1).mean()
    assert metrics["chain_divergence"] == pytest.approx(weight * energy)


@pytest.mark.parametrize("num_differentiable", [1, 3])
def test_only_the_last_steps_are_differentiated_through(num_differentiable, x64):
    """Without noise x = (1 - h λ)^L y; y, where the last L of three steps start, is constant."""
    options = ChainDivergence(num_steps=num_differentiable)
    gradient, start, end, _ = divergence_setting(0.2, options, num_steps=3, temperature=0.0)
    scale, factor = 1.7, 1.0 - 0.2 * 1.7
    np.testing.assert_allclose(end, factor**3 * start, rtol=1e-12)
    plain = 0.5 * (np.sum(start**2, 1) - np.sum(end**2, 1)).mean()
    slope = -0.2 * num_differentiable * end / factor
    assert gradient == pytest.approx(plain + scale * np.sum(end * slope, 1).mean(), abs=1e-12)


def without_a_step(monkeypatch=None):
    if monkeypatch is not None:  # the bug: the energy that judges the ends is not frozen
        monkeypatch.setattr(divergence_module.jax.lax, "stop_gradient", lambda tree: tree)
    options = ChainDivergence(entropy_weight=0.3)
    return divergence_setting(np.zeros(()), options)[0]


def test_without_a_step_the_divergence_has_no_gradient(x64):
    # Chains that stay at the data: the energies cancel, and the term adds nothing.
    assert abs(without_a_step()) < 1e-14


def test_the_check_sees_a_judge_that_is_not_frozen(monkeypatch, x64):
    assert abs(without_a_step(monkeypatch)) > 0.1


def test_nearest_neighbours_are_others(x64):
    points = jax.random.normal(jax.random.key(0), (20, 3))
    distances = np.linalg.norm(points[:, None] - points[None], axis=-1)
    others = distances + np.diag(np.full(20, np.inf))
    index = jnp.arange(20)
    found = log_nearest_distance(points, points, index)
    np.testing.assert_allclose(found, np.log(others.min(1)), rtol=1e-10)
    # A slice of the points against all of them, as one of four devices has it.
    part = log_nearest_distance(points[5:10], points, index[5:10])
    np.testing.assert_allclose(part, found[5:10])
    gradient = jax.grad(lambda p: log_nearest_distance(p, points, index).sum())(points)
    away = points - points[others.argmin(1)]
    np.testing.assert_allclose(gradient, away / others.min(1)[:, None] ** 2, rtol=1e-8)
    wrong = log_nearest_distance(points, points, index + 20)  # nobody is left out
    assert np.all(wrong < -10.0)
    assert np.isfinite(
        jax.grad(lambda p: log_nearest_distance(p, points, index + 20).sum())(points)
    ).all()


# Penalties, adaptive step sizes, resets.


def test_penalties_are_at_data_and_at_negatives(x64):
    objective, params, carry, keys, batch = setting(
        regularizers=(energy_magnitude(0.2), gradient_penalty(0.1))
    )
    loss, (new, metrics) = objective.loss(params, carry, keys, batch)
    slope = jax.jit(jax.vmap(jax.grad(ENERGY.apply, 1), (None, 0)))

    def penalty(points):
        squares = np.sum(np.square(slope(params, points)), -1)
        return np.mean(0.2 * np.square(energies(params, points)) + 0.1 * squares)

    expected = penalty(batch) + penalty(new.position[:, 0])
    assert metrics["penalty"] == pytest.approx(expected, rel=1e-10)
    assert loss == pytest.approx(float(metrics["energy_gap"] + expected), rel=1e-10)


def mala_of(step_size):
    return mala(step_size=step_size)


def test_step_sizes_follow_acceptance():
    """Steps that start a thousand times too small and too large come to the same acceptance."""
    num, target = 64, 0.57
    objective = persistent_contrastive_divergence(
        gaussian_energy,
        mala_of,
        uniform,
        num_steps=3,
        target_acceptance=target,
        rebirth_probability=0.0,
        adaptation_gain=0.2,
    )
    batch = jnp.zeros((num, 2))
    carry = objective.init(jax.random.key(2), TRUE, batch)
    np.testing.assert_allclose(carry.log_step_size, np.log(0.1), rtol=1e-6)
    starts = jnp.where(jnp.arange(num) % 2 == 0, np.log(1e-3), np.log(30.0))
    carry = carry._replace(log_step_size=starts)

    @jax.jit
    def run(carry):
        def body(carry, t):
            keys = jax.random.split(jax.random.fold_in(jax.random.key(3), t), num)
            _, (carry, metrics) = objective.loss(TRUE, carry, keys, batch)
            return carry, metrics

        return jax.lax.scan(body, carry, jnp.arange(400))

    carry, metrics = run(carry)
    # 200 updates of 64 slots of 3 steps each, and an acceptance that varies by less than 1/2.
    assert abs(np.mean(metrics["acceptance_rate"][200:]) - target) < 0.02
    even, odd = carry.log_step_size[::2], carry.log_step_size[1::2]
    spread = np.std(np.asarray(carry.log_step_size)) / np.sqrt(num / 4)
    assert abs(even.mean() - odd.mean()) < 5.0 * spread
    assert metrics["acceptance_rate"][0] > 0.4  # half of them start above 0.99
    assert 0.5 < np.exp(np.mean(carry.log_step_size)) < 4.0


@pytest.mark.parametrize("is_low", [True, False])
def test_chains_that_fell_too_low_are_born_anew(is_low):
    """A pit at 50: chains that sit in it lie far below the data, for as long as patience lasts."""

    def energy_fn(params, x):
        return params - 100.0 * jnp.exp(-0.5 * jnp.sum(jnp.square(x - 50.0)))

    objective, _, carry, keys, batch = setting(
        STILL,
        energy_fn=energy_fn,
        chains_per_example=2,
        rebirth_probability=0.0,
        reset_margin=10.0,
        reset_patience=2,
    )
    pit = 50.0 if is_low else 0.0
    carry = carry._replace(position=jnp.full_like(carry.position, pit), age=carry.age + 100)
    _, (carry, metrics) = objective.loss(0.0, carry, keys, batch)
    assert metrics["resets"] == 0.0
    assert np.all(np.asarray(carry.position) == pit)
    np.testing.assert_array_equal(carry.num_low, int(is_low))
    _, (carry, metrics) = objective.loss(0.0, carry, keys, batch)
    assert metrics["resets"] == float(is_low)
    np.testing.assert_array_equal(carry.num_low, 0)
    if is_low:
        assert np.abs(carry.position).max() <= 1.0
        assert len(np.unique(carry.position[..., 0])) == carry.age.size
        assert np.all(np.asarray(carry.age) == 0)
    else:
        assert np.all(np.asarray(carry.position) == pit)


ERRORS = {
    "num_steps": {"num_steps": 0},
    "chains_per_example": {"chains_per_example": 0},
    "rebirth_probability": {"rebirth_probability": 1.5},
    "reset_margin": {"reset_margin": -1.0},
    "reset_patience": {"reset_patience": 0},
    "target_acceptance": {"target_acceptance": 1.5, "kernel": mala_of},
    "step_size": {"target_acceptance": 0.5, "kernel": mala_of, "step_size": 0.0},
    "adaptation_gain": {"target_acceptance": 0.5, "kernel": mala_of, "adaptation_gain": -1.0},
    "num_differentiable_steps": {"divergence": ChainDivergence(num_steps=5)},
    "entropy_weight": {"divergence": ChainDivergence(entropy_weight=-1.0)},
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors_name_the_value(name):
    with pytest.raises(ValueError, match=f"{name} is "):
        setting(**ERRORS[name])


def test_a_kernel_and_an_adaptive_one_are_told_apart():
    with pytest.raises(ValueError, match="fixed step size"):
        setting(MOVING, target_acceptance=0.5)
    with pytest.raises(ValueError, match="must be a Kernel"):
        setting(mala_of)
    with pytest.raises(ValueError, match=r"rebirth_probability is 0\.5"):
        short_run(ENERGY.apply, MOVING, uniform, num_steps=1, rebirth_probability=0.5)

"""Flips are what they say, and pseudolikelihood finds the law and the couplings."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ebjax.energies.boltzmann import enumerate_law, enumerate_states
from ebjax.energies.lattice import (
    IsingParams,
    ising_lattice,
    ising_lattice_energy,
    lattice_edges,
    potts_lattice,
)
from ebjax.objectives.pseudolikelihood import (
    flip_differences,
    flip_objective,
    pseudolikelihood,
    pseudolikelihood_loss,
)

BINARY, CATEGORICAL = ((4,), None), ((3,), 3)  # shapes of the sites, categories


def table_energy(logits, x):
    """-logits of the state, for binary or one-hot ``x``: any law at all, affine in each site."""
    rows = jnp.stack([1.0 - x, x], axis=-1) if x.ndim == 1 else x
    value = logits
    for row in rows:
        value = jnp.tensordot(row, value, axes=(0, 0))
    return -value


def random_table(shape, num_categories):
    table_shape = (num_categories or 2,) * shape[0]
    return jnp.asarray(np.random.default_rng(0).normal(size=table_shape))


def expected_loss(loss_of_differences, shape, num_categories, *, data_logits, **options):
    """``params -> Σ_x p_data(x) loss(x)``, by enumeration."""
    law = enumerate_law(table_energy, data_logits, shape, num_categories)
    probs = jnp.exp(law.log_probs)

    def value(params):
        def loss(x):
            return loss_of_differences(
                flip_differences(table_energy, params, x, num_categories=num_categories, **options)
            )

        return probs @ jax.vmap(loss)(law.states)

    return jax.jit(value)


@pytest.mark.parametrize("is_multilinear", [False, True])
@pytest.mark.parametrize(("shape", "num_categories"), [BINARY, CATEGORICAL])
def test_the_expected_loss_is_smallest_at_the_law_of_the_data(
    x64, shape, num_categories, is_multilinear
):
    truth = random_table(shape, num_categories)
    value = expected_loss(
        pseudolikelihood_loss,
        shape,
        num_categories,
        data_logits=truth,
        is_multilinear=is_multilinear,
    )
    assert np.abs(jax.grad(value)(truth)).max() < 1e-12
    curvature = jax.hessian(value)(truth).reshape(truth.size, truth.size)
    spectrum = np.linalg.eigvalsh(curvature)
    assert np.abs(spectrum[0]) < 1e-12  # the constant that no difference sees
    assert spectrum[1] > 1e-4  # every other direction is told apart


@pytest.mark.parametrize(("shape", "num_categories"), [BINARY, CATEGORICAL])
def test_the_check_sees_flips_of_the_wrong_sign(x64, shape, num_categories):
    truth = random_table(shape, num_categories)
    wrong = lambda differences: pseudolikelihood_loss(-differences)  # noqa: E731
    value = expected_loss(wrong, shape, num_categories, data_logits=truth)
    assert np.abs(jax.grad(value)(truth)).max() > 1e-2


@pytest.mark.parametrize(("shape", "num_categories"), [BINARY, CATEGORICAL])
def test_the_loss_is_that_of_the_conditional_laws(x64, shape, num_categories):
    logits = random_table(shape, num_categories)
    states = enumerate_states(shape, num_categories)
    probs = np.exp(np.asarray(logits))
    for x in states[:: max(1, len(states) // 9)]:
        index = x.astype(int) if num_categories is None else x.argmax(-1)
        exact = 0.0
        for site in range(shape[0]):
            line = probs[tuple(slice(None) if i == site else k for i, k in enumerate(index))]
            exact -= np.log(line[index[site]] / line.sum())
        differences = flip_differences(
            table_energy, logits, jnp.asarray(x, float), num_categories=num_categories
        )
        np.testing.assert_allclose(pseudolikelihood_loss(differences), exact, rtol=1e-12)


@pytest.mark.parametrize("periodic", [False, True])
def test_one_gradient_has_the_local_fields_of_ising(x64, periodic):
    energy_fn = ising_lattice_energy(periodic).apply
    params = IsingParams(jnp.array(0.37), jax.random.normal(jax.random.key(0), (3, 4)))
    x = jax.random.bernoulli(jax.random.key(1), 0.5, (3, 4)).astype(float)
    spins = np.asarray(2.0 * x - 1.0)
    fields = np.asarray(params.field).copy()
    for first, second in lattice_edges((3, 4), periodic):
        fields.flat[first] += 0.37 * spins.flat[second]
        fields.flat[second] += 0.37 * spins.flat[first]
    exact = (2.0 * spins * fields).reshape(-1, 1)
    by_flips = flip_differences(energy_fn, params, x)
    by_gradient = flip_differences(energy_fn, params, x, is_multilinear=True)
    np.testing.assert_allclose(by_flips, exact, atol=1e-12)
    np.testing.assert_allclose(by_gradient, exact, atol=1e-12)


def test_one_gradient_has_the_local_fields_of_potts(x64):
    target = potts_lattice((3, 3), num_categories=4, coupling=0.6, field=[0.1, 0.2, -0.4, 0.0])
    x = jax.nn.one_hot(jax.random.randint(jax.random.key(0), (3, 3), 0, 4), 4, dtype=float)
    by_flips, by_gradient = (
        flip_differences(target.energy, (), x, num_categories=4, is_multilinear=flag)
        for flag in (False, True)
    )
    assert by_flips.shape == (9, 3)
    np.testing.assert_allclose(by_gradient, by_flips, atol=1e-12)
    assert np.ptp(by_flips) > 1.0


def test_chosen_sites_are_those_of_all(x64):
    logits = random_table(*BINARY)
    x = jnp.array([0.0, 1.0, 1.0, 0.0])
    sites = jnp.array([2, 0])
    every = flip_differences(table_energy, logits, x)
    for flag in (False, True):
        some = flip_differences(table_energy, logits, x, sites=sites, is_multilinear=flag)
        np.testing.assert_allclose(some, every[sites], atol=1e-12)


def test_some_sites_stand_for_all_on_average():
    """The mean over many keys is the full loss, within 5 standard errors."""
    logits = random_table(*BINARY).astype(jnp.float32)
    num = 4000
    batch = jnp.broadcast_to(jnp.array([0.0, 1.0, 1.0, 0.0]), (num, 4))
    full = pseudolikelihood(table_energy)
    exact = full.loss(logits, (), jax.random.split(jax.random.key(0), 1), batch[:1])[0]
    part = pseudolikelihood(table_energy, num_sites=1)
    one = lambda key, x: part.loss(logits, (), key[None], x[None])[0]  # noqa: E731
    values = jax.jit(jax.vmap(one))(jax.random.split(jax.random.key(1), num), batch)
    z = (values.mean() - exact) / (values.std() / np.sqrt(num))
    assert abs(z) < 5.0
    assert values.std() > 0.1


SIDES = (3, 4)
TRUE = IsingParams(0.35, 0.15)


def recovery_z_scores(differences_fn, num_samples=4000):
    """Coupling and field fitted to exact samples, against the truth.

    At the minimum of the mean loss l the error has covariance H^-1 V H^-1 / N, with H = E ∂²l and
    V = E ∂l ∂l' under the law of the data, both by enumeration.
    """
    target = ising_lattice(SIDES, coupling=TRUE.coupling, field=TRUE.field)
    states = jnp.asarray(enumerate_states((12,)).reshape(-1, *SIDES), float)
    probs = jnp.exp(-jax.vmap(lambda x: target.energy((), x))(states) - target.log_z)
    counts = np.random.default_rng(0).multinomial(num_samples, probs / probs.sum())

    def losses(theta):
        params = IsingParams(theta[0], theta[1])
        return jax.vmap(lambda x: pseudolikelihood_loss(differences_fn(params, x)))(states)

    slope = jax.jacfwd(losses)  # two parameters, 4,096 losses: forward twice
    derivatives = jax.jit(lambda theta: (slope(theta), jax.jacfwd(slope)(theta)))
    theta = jnp.zeros(2)
    for _ in range(8):
        slopes, curvatures = derivatives(theta)
        weights = counts / num_samples
        theta = theta - jnp.linalg.solve(
            jnp.tensordot(weights, curvatures, 1), jnp.tensordot(weights, slopes, 1)
        )
    truth = jnp.array(TRUE)
    slopes, curvatures = derivatives(truth)
    inverse = np.linalg.inv(np.tensordot(probs, curvatures, 1))
    covariance = inverse @ ((slopes.T * probs) @ slopes) @ inverse / num_samples
    return np.abs(theta - truth) / np.sqrt(np.diag(covariance))


def test_ising_is_recovered_from_exact_samples(x64):
    energy_fn = ising_lattice_energy().apply
    z = recovery_z_scores(lambda p, x: flip_differences(energy_fn, p, x, is_multilinear=True))
    assert z.max() < 5.0


def test_the_recovery_sees_a_missing_half(x64):
    """The change of the energy is 2 s_i times the local field, not s_i times it."""
    energy_fn = ising_lattice_energy().apply
    half = lambda p, x: 0.5 * flip_differences(energy_fn, p, x, is_multilinear=True)  # noqa: E731
    assert recovery_z_scores(half).max() > 5.0


def test_the_objective_is_the_mean_of_examples_with_its_metrics(x64):
    logits = random_table(*CATEGORICAL)
    batch = jnp.asarray(enumerate_states(*CATEGORICAL)[:5], float)
    keys = jax.random.split(jax.random.key(0), 5)
    objective = pseudolikelihood(table_energy, num_categories=3)
    differences = jax.vmap(lambda x: flip_differences(table_energy, logits, x, num_categories=3))(
        batch
    )
    loss, (carry, metrics) = objective.loss(
        logits, objective.init(keys[0], logits, batch), keys, batch
    )
    assert carry == ()
    np.testing.assert_allclose(loss, jax.vmap(pseudolikelihood_loss)(differences).mean())
    np.testing.assert_allclose(metrics["difference"], differences.mean())
    np.testing.assert_allclose(metrics["downhill"], (differences < 0).mean(), rtol=1e-6)


def test_errors_name_the_value():
    with pytest.raises(ValueError, match="num_sites is 0"):
        flip_objective(jnp.sum, table_energy, num_sites=0)
    objective = pseudolikelihood(table_energy, num_sites=5)
    with pytest.raises(ValueError, match="num_sites is 5; an example has 4"):
        objective.loss(
            random_table(*BINARY), (), jax.random.split(jax.random.key(0), 1), jnp.zeros((1, 4))
        )
    with pytest.raises(ValueError, match="num_categories is 1"):
        flip_differences(table_energy, (), jnp.zeros((3, 1)), num_categories=1)
    with pytest.raises(ValueError, match=r"x has shape \(3, 2\)"):
        flip_differences(table_energy, (), jnp.zeros((3, 2)), num_categories=4)

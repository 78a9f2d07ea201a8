"""Penalties: their closed forms, their gradients, and what a large weight does to the law."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ebjax.energies import targets
from ebjax.energies.networks import mlp_energy
from ebjax.objectives.contrastive_divergence import persistent_contrastive_divergence
from ebjax.objectives.regularizers import (
    energy_magnitude,
    gradient_penalty,
    mean_penalty,
    regularized,
)
from ebjax.samplers import langevin
from ebjax.training import initial_state, make_update
from ebjax.types import Objective, Source


def quadratic(params, x):
    """With ∇_x E = λ (x - m)."""
    return 0.5 * params["scale"] * jnp.sum(jnp.square(x - params["mean"]))


PARAMS = {"scale": jnp.array(1.5), "mean": jnp.array([0.5, -1.0])}
POINT = jnp.array([1.5, 1.0])  # E = 3.75, ∇E = (1.5, 3), |∇E|² = 11.25


def test_closed_forms():
    assert energy_magnitude(0.2)(quadratic, PARAMS, POINT) == pytest.approx(0.2 * 3.75**2)
    assert gradient_penalty(0.2)(quadratic, PARAMS, POINT) == pytest.approx(0.2 * 11.25)
    two_sided = gradient_penalty(0.2, target=2.0)(quadratic, PARAMS, POINT)
    assert two_sided == pytest.approx(0.2 * (np.sqrt(11.25) - 2.0) ** 2)
    # The slope is taken in x and not in the parameters, whose gradient has another norm.
    of_params = jax.grad(quadratic)(PARAMS, POINT)
    norm = sum(float(jnp.sum(leaf**2)) for leaf in jax.tree.leaves(of_params))
    assert abs(norm - 11.25) > 1.0


def test_the_penalty_of_slopes_has_its_gradient_in_the_parameters(x64):
    """d/dλ w λ² r² = 2 w λ r², and with c: d/dλ w (λ r - c)² = 2 w (λ r - c) r."""
    params = jax.tree.map(lambda leaf: leaf.astype(float), PARAMS)
    point, radius = POINT.astype(float), np.sqrt(5.0)
    for target in (0.0, 2.0):
        penalty = gradient_penalty(0.3, target=target)
        gradient = jax.grad(lambda p, penalty=penalty: penalty(quadratic, p, point))(params)
        expected = 2.0 * 0.3 * (1.5 * radius - target) * radius
        assert gradient["scale"] == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("target", [0.0, 1.0])
def test_a_flat_point_has_a_finite_gradient(target):
    penalty = gradient_penalty(1.0, target=target)
    gradient = jax.grad(lambda p: penalty(quadratic, p, p["mean"]))(PARAMS)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))
    assert penalty(quadratic, PARAMS, PARAMS["mean"]) == target**2


def test_positions_may_be_pytrees():
    energy_fn = lambda params, x: params * (jnp.sum(x["a"]) + 2.0 * x["b"])  # noqa: E731
    point = {"a": jnp.ones(3), "b": jnp.array(1.0)}
    assert gradient_penalty(1.0)(energy_fn, 2.0, point) == pytest.approx(4.0 * (3.0 + 4.0))


def test_the_mean_is_over_examples_with_their_contexts():
    energy_fn = lambda params, x, context: params * x * context  # noqa: E731
    x, context = jnp.array([1.0, 2.0]), jnp.array([3.0, -1.0])
    penalties = (energy_magnitude(1.0), gradient_penalty(0.5))
    # 36 + 16 over two for the energies 6 and -4; slopes 6 and -2.
    assert mean_penalty(penalties, energy_fn, 2.0, x, context) == pytest.approx(26.0 + 10.0)


def plain_objective():
    """Score matching of a quadratic: tr ∇²E = -d λ and |∇E|² / 2, with the exact minimiser."""

    def loss(params, carry, keys, batch):
        del keys
        slopes = jax.vmap(jax.grad(quadratic, 1), (None, 0))(params, batch)
        dim = batch.shape[1]
        value = 0.5 * jnp.mean(jnp.sum(jnp.square(slopes), 1)) - dim * params["scale"]
        return value, (carry, {"energy_data": value})

    return Objective(lambda key, params, batch: jnp.zeros(len(batch)), loss)


def test_any_objective_is_regularised_and_biased(x64):
    """With |∇E|² of weight w the minimiser is the precision over 1 + 2 w: flatter than the data."""
    batch = 2.0 * jax.random.normal(jax.random.key(0), (500, 2))
    params = {"scale": jnp.array(1.0), "mean": batch.mean(0)}
    precision = 2.0 / np.mean(np.sum(np.square(batch - batch.mean(0)), 1))
    for weight in (0.0, 0.5):
        objective = regularized(plain_objective(), quadratic, gradient_penalty(weight))

        def slope(scale, objective=objective):
            return objective.loss({**params, "scale": scale}, jnp.zeros(500), None, batch)[0]

        best = precision / (1.0 + 2.0 * weight)
        assert jax.grad(slope)(best) == pytest.approx(0.0, abs=1e-12)
        assert abs(jax.grad(slope)(1.1 * best)) > 0.1
    _, (carry, metrics) = objective.loss(params, jnp.zeros(500), None, batch)
    assert carry.shape == (500,)
    assert set(metrics) == {"energy_data", "penalty"}


def test_batches_may_hold_more_than_positions():
    def loss(params, carry, keys, batch):
        return params * 0.0, (carry, {})

    objective = regularized(
        Objective(lambda key, params, batch: (), loss),
        lambda params, x: params * x,
        energy_magnitude(1.0),
        positions=lambda batch: batch["x"],
    )
    batch = {"x": jnp.array([1.0, 3.0]), "label": jnp.array([0, 1])}
    assert objective.loss(2.0, (), None, batch)[0] == pytest.approx(20.0)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: energy_magnitude(-1.0), "weight is -1.0"),
        (lambda: energy_magnitude(float("nan")), "weight is nan"),
        (lambda: gradient_penalty(1.0, target=-2.0), "target is -2.0"),
        (lambda: regularized(plain_objective(), quadratic), "No regularizers"),
    ],
)
def test_errors_name_the_value(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_equal_penalties_are_equal():
    assert energy_magnitude(0.1) == energy_magnitude(0.1)
    assert gradient_penalty(0.1) != gradient_penalty(0.1, target=1.0)


def divergence_on_a_ring(weight, seed=0, num_updates=2000):
    """KL(data ‖ model) of eight Gaussians by quadrature, averaged weights, after training."""
    target, energy = targets.eight_gaussians(), mlp_energy((128, 128))
    objective = persistent_contrastive_divergence(
        energy.apply,
        langevin(step_size=0.02),
        lambda key: 2.0 * jax.random.normal(key, (2,)),
        num_steps=40,
        chains_per_example=20,
        energy_regularizer=weight,
    )
    optimizer, num = optax.adam(1e-3, b1=0.0), 256
    source = Source((), lambda arrays, key, i: target.sample(jax.random.fold_in(key, i)))
    init = lambda key: energy.init(key, jnp.zeros(2))  # noqa: E731
    state = initial_state(jax.random.key(seed), init, objective, optimizer, source, num)
    update = make_update(objective, optimizer, source, batch_size=num, ema_decay=0.99)
    state = jax.lax.fori_loop(0, num_updates, lambda _, s: update(s, ())[0], state)
    axis = np.linspace(-4.0, 4.0, 200)
    grid = jnp.asarray(np.stack(np.meshgrid(axis, axis), -1).reshape(-1, 2), jnp.float32)
    of_model = np.asarray(jax.vmap(energy.apply, (None, 0))(state.ema, grid), float)
    of_target = np.asarray(jax.vmap(lambda x: target.energy((), x))(grid), float)
    cell = (axis[1] - axis[0]) ** 2
    log_z = np.log(np.sum(np.exp(-of_model)) * cell)
    return np.sum(np.exp(-of_target) * (of_model + log_z - of_target)) * cell


@pytest.mark.slow
def test_a_large_weight_gives_a_steady_run_and_a_wrong_law():
    small, large = (divergence_on_a_ring(weight) for weight in (0.01, 1.0))
    assert small < 0.25
    assert large > 1.5

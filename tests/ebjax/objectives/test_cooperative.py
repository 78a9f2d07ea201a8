"""Cooperative training of Gaussians, where every expectation is known."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ebjax.objectives.cooperative import cooperative, refined_proposal
from ebjax.objectives.regularizers import energy_magnitude
from ebjax.samplers import langevin, mala


def energy_fn(mean, x):
    return 0.5 * jnp.sum(jnp.square(x - mean))


def latent(key):
    return jax.random.normal(key, (2,))


def propose(sampler, key):
    return sampler["shift"] + sampler["scale"] * latent(key)


def reconstruction(sampler, key, proposal, refined):
    """The same latent shall give what the chain made of it."""
    del proposal
    return 0.5 * jnp.sum(jnp.square(propose(sampler, key) - refined))


def negative_log_density(sampler, key, proposal, refined):
    del key, proposal
    z = (refined - sampler["shift"]) / sampler["scale"]
    return jnp.sum(0.5 * jnp.square(z) + jnp.log(jnp.abs(sampler["scale"])))


def log_prob(sampler, x):
    return -negative_log_density(sampler, None, None, x) - jnp.log(2.0 * jnp.pi)


PARAMS = {
    "energy": np.array([0.5, -1.0]),
    "sampler": {"shift": np.array([2.0, 1.0]), "scale": np.array([0.5, 0.8])},
}
DESCENT = langevin(step_size=0.25, temperature=0.0)


def gradients(kernel, *, loss=reconstruction, num=6, **options):
    objective = cooperative(energy_fn, propose, loss, kernel, num_steps=3, **options)
    batch = jax.random.normal(jax.random.key(0), (num, 2))
    carry = objective.init(jax.random.key(1), PARAMS, batch)
    keys = jax.random.split(jax.random.key(2), num)
    run = jax.jit(jax.value_and_grad(objective.loss, has_aux=True))
    (value, (samples, metrics)), gradient = run(PARAMS, carry, keys, batch)
    return value, gradient, jax.tree.map(np.asarray, samples), metrics, np.asarray(batch)


def expected_gradient(samples, batch, weight):
    """By hand, of the energy's mean and of the generator, given the samples."""
    shift, scale = PARAMS["sampler"]["shift"], PARAMS["sampler"]["scale"]
    z = (samples.proposal - shift) / scale
    error = samples.proposal - samples.refined
    return {
        "energy": samples.refined.mean(0) - batch.mean(0),
        "sampler": {"shift": weight * error.mean(0), "scale": weight * (error * z).mean(0)},
    }


def test_gradients_are_the_closed_forms(x64):
    _, gradient, samples, metrics, batch = gradients(DESCENT, sampler_weight=0.7)
    # Three steps of descent contract towards the mean by (1 - h)^3.
    mean = PARAMS["energy"]
    np.testing.assert_allclose(
        samples.refined, mean + 0.75**3 * (samples.proposal - mean), rtol=1e-12
    )
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-12),
        gradient,
        expected_gradient(samples, batch, 0.7),
    )
    assert metrics["energy_proposals"] > metrics["energy_samples"]
    assert metrics["chains_finite"] == 1.0


def test_the_check_sees_a_gradient_through_the_chain(monkeypatch, x64):
    monkeypatch.setattr(jax.lax, "stop_gradient", lambda tree: tree)
    _, gradient, samples, _, batch = gradients(DESCENT, sampler_weight=0.7)
    expected = expected_gradient(samples, batch, 0.7)
    assert np.abs(gradient["energy"] - expected["energy"]).max() > 0.05
    assert np.abs(gradient["sampler"]["shift"] - expected["sampler"]["shift"]).max() > 0.05


def test_the_loss_gets_the_key_of_the_proposal(x64):
    _, _, samples, _, _ = gradients(DESCENT)

    def difference(sampler, key, proposal, refined):
        del refined
        return jnp.abs(propose(sampler, key) - proposal).max()

    for options in ({}, {"num_proposals": 5, "log_prob": log_prob}):
        _, _, _, metrics, _ = gradients(DESCENT, loss=difference, **options)
        assert metrics["sampler_loss"] == pytest.approx(0.0, abs=1e-14)
    assert len(np.unique(samples.proposal[:, 0])) == 6  # each slot its own


def test_penalties_are_on_the_energy(x64):
    options = {"regularizers": (energy_magnitude(0.3),)}
    value, _, samples, metrics, batch = gradients(DESCENT, **options)
    plain = gradients(DESCENT)[0]
    squares = [
        np.mean([energy_fn(PARAMS["energy"], x) ** 2 for x in points])
        for points in (batch, samples.refined)
    ]
    assert value - plain == pytest.approx(0.3 * sum(squares), rel=1e-10)
    assert metrics["penalty"] == pytest.approx(0.3 * sum(squares), rel=1e-10)


@pytest.mark.parametrize("loss", [reconstruction, negative_log_density])
def test_both_find_the_data(loss):
    """The energy's mean and the sampler's go to the data's; the density's width goes to one."""
    num = 1000
    objective = cooperative(energy_fn, propose, loss, mala(step_size=0.5), num_steps=4)
    batch = jnp.array([1.5, -0.7]) + jax.random.normal(jax.random.key(0), (num, 2))
    params = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), PARAMS)
    optimizer = optax.sgd(0.1)

    @jax.jit
    def run(params):
        carry = objective.init(jax.random.key(1), params, batch)

        def body(loop, t):
            params, carry = loop
            keys = jax.random.split(jax.random.fold_in(jax.random.key(2), t), num)
            gradient, (carry, _) = jax.grad(objective.loss, has_aux=True)(
                params, carry, keys, batch
            )
            updates, _ = optimizer.update(gradient, optimizer.init(params))
            return (optax.apply_updates(params, updates), carry), params

        return jax.lax.scan(body, (params, carry), jnp.arange(300))[1]

    history = run(params)
    mean, shift = history["energy"][-100:].mean(0), history["sampler"]["shift"][-100:].mean(0)
    scale = np.abs(history["sampler"]["scale"][-100:]).mean(0)
    # One update averages 1,000 draws; an average of 100 of them is within five such errors.
    np.testing.assert_allclose(mean, batch.mean(0), atol=5 / np.sqrt(num))
    np.testing.assert_allclose(shift, mean, atol=5 / np.sqrt(num))
    if loss is negative_log_density:
        np.testing.assert_allclose(scale, 1.0, atol=0.1)
    else:
        # The latent of a proposal says less and less of where the chain ends: the width shrinks.
        assert np.all(scale < 0.1)


def two_modes(share, x):
    """[] log density of two modes that are 20 deviations apart, ``share`` of it in the left one."""
    left, right = (-0.5 * jnp.square(x - mean) for mean in (-10.0, 10.0))
    return jnp.logaddexp(jnp.log(share) + left, jnp.log1p(-share) + right)


def propose_mode(share, key):
    side_key, place_key = jax.random.split(key)
    mean = jnp.where(jax.random.bernoulli(side_key, share), -10.0, 10.0)
    return mean + jax.random.normal(place_key)


def expected_left_share(num, proposed, weighed, true):
    """Of one of ``num`` draws, a share ``proposed`` of them left, by true / weighed masses."""
    total = 0.0
    for left in range(num + 1):
        chance = math.comb(num, left) * proposed**left * (1 - proposed) ** (num - left)
        heavy, light = left * true / weighed, (num - left) * (1 - true) / (1 - weighed)
        total += chance * heavy / (heavy + light)
    return total


NUM_DRAWS = 20_000


def left_share(num_proposals, weighed=0.3):
    """Share of draws that are left, of an energy with 0.8 of its mass there and proposals with 0.3,
    and [NUM_DRAWS] the effective shares of the proposals' weights."""
    sample = refined_proposal(
        lambda share, x: -two_modes(share, x),
        propose_mode,
        mala(step_size=0.1),
        num_steps=2,
        num_proposals=num_proposals,
        log_prob=lambda share, x: two_modes(weighed, x),
    )
    params = {"energy": 0.8, "sampler": 0.3}
    keys = jax.random.split(jax.random.key(0), NUM_DRAWS)
    _, samples, _, effective = jax.jit(jax.vmap(sample, (None, 0)))(params, keys)
    return np.mean(samples.refined < 0), np.asarray(effective)


@pytest.mark.parametrize("num_proposals", [1, 2, 4, 32])
def test_several_proposals_carry_masses_between_far_modes(num_proposals, x64):
    share, effective = left_share(num_proposals)
    expected = expected_left_share(num_proposals, 0.3, 0.3, 0.8)
    # Of a share of so many draws, five standard errors.
    assert abs(share - expected) < 5 * np.sqrt(0.25 / NUM_DRAWS)
    assert np.all(effective >= 1 / num_proposals - 1e-9)
    assert np.all(effective <= 1 + 1e-9)


def test_a_density_that_is_not_the_samplers_shows(x64):
    share, _ = left_share(32, weighed=0.5)
    assert abs(share - expected_left_share(32, 0.3, 0.3, 0.8)) > 0.1
    assert abs(share - expected_left_share(32, 0.3, 0.5, 0.8)) < 5 * np.sqrt(0.25 / NUM_DRAWS)


def test_proposals_that_weigh_the_same_are_all_effective(x64):
    sample = refined_proposal(
        lambda sampler, x: -log_prob(sampler, x),
        propose,
        DESCENT,
        num_steps=1,
        num_proposals=7,
        log_prob=log_prob,
    )
    params = {"energy": PARAMS["sampler"], "sampler": PARAMS["sampler"]}
    assert sample(params, jax.random.key(0))[3] == pytest.approx(1.0, rel=1e-12)


def test_a_proposal_without_a_finite_weight_is_not_taken(x64):
    def broken(mean, x):
        return jnp.where(x[0] > 2.0, jnp.nan, energy_fn(mean, x))

    sample = refined_proposal(
        broken, propose, DESCENT, num_steps=1, num_proposals=16, log_prob=log_prob
    )
    keys = jax.random.split(jax.random.key(0), 100)
    _, samples, _, effective = jax.vmap(sample, (None, 0))(PARAMS, keys)
    assert np.all(samples.proposal[:, 0] <= 2.0)  # half of the proposals are beyond
    assert np.all(np.isfinite(effective))


@pytest.mark.parametrize(
    "options",
    [
        {"num_steps": 0},
        {"num_steps": 1, "sampler_weight": -1.0},
        {"num_steps": 1, "num_proposals": 0},
        {"num_steps": 1, "num_proposals": 2},
    ],
)
def test_errors_name_the_value(options):
    name, value = list(options.items())[-1]
    with pytest.raises(ValueError, match=f"{name} is {value}"):
        cooperative(energy_fn, propose, reconstruction, DESCENT, **options)

"""Flow-contrastive estimation: each player follows the gradient of its own game."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ebjax.energies.flows import Flow
from ebjax.objectives.flow_contrastive import flow_contrastive
from ebjax.objectives.noise_contrastive import noise_contrastive_loss
from ebjax.objectives.regularizers import energy_magnitude

DATA_MEAN, DATA_SCALE = 0.6, 0.7


def energy_fn(params, x):
    return 0.5 * jnp.exp(params["log_precision"]) * jnp.square(x[0] - params["mean"])


def log_normal(x, mean, log_scale):
    return (
        -0.5 * jnp.square((x - mean) * jnp.exp(-log_scale))
        - log_scale
        - 0.5 * math.log(2 * math.pi)
    )


FLOW = Flow(
    lambda key, x: {"mean": jnp.zeros(()), "log_scale": jnp.zeros(())},
    lambda params, x: log_normal(x[0], params["mean"], params["log_scale"]),
    lambda params, key: (
        params["mean"] + jnp.exp(params["log_scale"]) * jax.random.normal(key, (1,))
    ),
)


def start():
    params = {
        "energy": {"mean": 0.2, "log_precision": 0.3},
        "flow": {"mean": -0.1, "log_scale": 0.2},
        "log_z": 0.7,
    }
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, float), params)


def value_by_quadrature(params, ratio):
    """V and the mean log q of the data."""
    x = jnp.linspace(-9.0, 9.0, 361)
    step = x[1] - x[0]
    flow = params["flow"]
    log_q = log_normal(x, flow["mean"], flow["log_scale"])
    energies = jax.vmap(energy_fn, (None, 0))(params["energy"], x[:, None])
    gap = -energies - params["log_z"] - log_q
    data = jnp.exp(log_normal(x, DATA_MEAN, math.log(DATA_SCALE))) * step
    noise = jnp.exp(log_q) * step
    offset = math.log(ratio)
    value = data @ jax.nn.softplus(offset - gap) + ratio * noise @ jax.nn.softplus(gap - offset)
    return value, data @ log_q


def exact_gradients(player, ratio):
    params = start()
    of_value = jax.grad(lambda params: value_by_quadrature(params, ratio)[0])(params)
    of_likelihood = jax.grad(lambda params: -value_by_quadrature(params, ratio)[1])(params)
    flow = {
        "adversarial": jax.tree.map(jnp.negative, of_value["flow"]),
        "likelihood": of_likelihood["flow"],
    }
    return {**of_value, "flow": flow[player]}


def gradient_z_scores(player, num=20_000, ratio=3.0):
    """By player, the largest deviation of the objective's gradient in standard errors."""
    objective = flow_contrastive(energy_fn, FLOW, player=player, num_noise=2, ratio=ratio)
    params = start()
    batch = DATA_MEAN + DATA_SCALE * jax.random.normal(jax.random.key(1), (num, 1), float)
    one = lambda key, x: jax.grad(objective.loss, has_aux=True)(params, (), key[None], x[None])[0]  # noqa: E731
    gradients = jax.jit(jax.vmap(one))(jax.random.split(jax.random.key(2), num), batch)
    z = jax.tree.map(
        lambda g, e: np.abs(g.mean() - e) / (g.std() / math.sqrt(num)),
        gradients,
        exact_gradients(player, ratio),
    )
    return {name: max(jax.tree.leaves(z[name])) for name in z}


@pytest.mark.parametrize("player", ["adversarial", "likelihood"])
def test_each_player_follows_its_own_gradient(x64, player):
    assert max(gradient_z_scores(player).values()) < 5.0


@pytest.mark.parametrize("player", ["adversarial", "likelihood"])
def test_the_check_sees_gradients_that_leak(x64, player, monkeypatch):
    """Without stops the flow would help the energy; the energy's own gradient does not change."""
    monkeypatch.setattr(jax.lax, "stop_gradient", lambda tree: tree)
    z = gradient_z_scores(player)
    assert z["flow"] > 5.0
    assert z["energy"] < 5.0


def test_the_value_is_that_of_the_noise_contrastive_loss(x64):
    params, batch = start(), jnp.array([[0.3], [1.0]])
    keys = jax.random.split(jax.random.key(0), 2)
    seen = {}
    for player in ("adversarial", "likelihood"):
        objective = flow_contrastive(energy_fn, FLOW, player=player)
        loss, (carry, metrics) = objective.loss(
            params, objective.init(keys[0], params, batch), keys, batch
        )
        assert carry == ()
        seen[player] = float(loss)
        own = jax.vmap(FLOW.log_prob, (None, 0))(params["flow"], batch)
        np.testing.assert_allclose(metrics["log_prob_flow"], own.mean())
        data = -jax.vmap(energy_fn, (None, 0))(params["energy"], batch) - params["log_z"] - own
        np.testing.assert_allclose(metrics["log_ratio_data"], data.mean())
        least = jax.vmap(lambda d: noise_contrastive_loss(d, jnp.array([-1e9]), ratio=1.0))(data)
        assert loss > least.mean()
    np.testing.assert_allclose(seen["adversarial"], seen["likelihood"])


def test_penalties_move_the_energy_only(x64):
    params, batch = start(), jnp.array([[0.3], [1.0]])
    keys = jax.random.split(jax.random.key(0), 2)
    gradients = [
        jax.grad(flow_contrastive(energy_fn, FLOW, regularizers=r).loss, has_aux=True)(
            params, (), keys, batch
        )[0]
        for r in ((), (energy_magnitude(0.5),))
    ]
    np.testing.assert_allclose(gradients[0]["flow"]["mean"], gradients[1]["flow"]["mean"])
    assert abs(gradients[0]["energy"]["mean"] - gradients[1]["energy"]["mean"]) > 1e-3


@pytest.mark.parametrize("player", ["adversarial", "likelihood"])
def test_the_game_ends_at_the_law_of_the_data(player):
    objective = flow_contrastive(energy_fn, FLOW, player=player)
    num = 500

    @functools.partial(jax.jit, static_argnums=1)
    def run(params, num_steps):
        def update(carry, key):
            params, mean = carry
            data_key, loss_key = jax.random.split(key)
            batch = DATA_MEAN + DATA_SCALE * jax.random.normal(data_key, (num, 1))
            gradient, _ = jax.grad(objective.loss, has_aux=True)(
                params, (), jax.random.split(loss_key, num), batch
            )
            params = jax.tree.map(lambda p, g: p - 0.1 * g, params, gradient)
            mean = jax.tree.map(lambda m, p: 0.99 * m + 0.01 * p, mean, params)
            return (params, mean), None

        keys = jax.random.split(jax.random.key(0), num_steps)
        return jax.lax.scan(update, (params, params), keys)[0][1]

    params = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), start())
    end = run(params, 2000)
    log_scale = math.log(DATA_SCALE)
    exact_log_z = log_scale + 0.5 * math.log(2 * math.pi)
    np.testing.assert_allclose(end["energy"]["mean"], DATA_MEAN, atol=0.05)
    np.testing.assert_allclose(end["energy"]["log_precision"], -2.0 * log_scale, atol=0.1)
    np.testing.assert_allclose(end["log_z"], exact_log_z, atol=0.05)
    np.testing.assert_allclose(end["flow"]["mean"], DATA_MEAN, atol=0.05)
    np.testing.assert_allclose(end["flow"]["log_scale"], log_scale, atol=0.05)


def test_errors_name_the_value():
    with pytest.raises(ValueError, match="player is 'friendly'"):
        flow_contrastive(energy_fn, FLOW, player="friendly")
    with pytest.raises(ValueError, match="num_noise is 0"):
        flow_contrastive(energy_fn, FLOW, num_noise=0)

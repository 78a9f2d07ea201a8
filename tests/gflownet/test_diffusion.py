"""Diffusion samplers against densities written out step by step, and against what is solvable."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy import stats

from ebjax.energies import targets
from gflownet.diffusion import (
    DiffusionProcess,
    backward_path,
    controls_of,
    diffusion_objective,
    draw,
    forward_path,
    log_weight,
    target_log_weight,
)
from gflownet.diffusion_flows import PARTIAL_LOSSES, partial_losses, relative_flows
from gflownet.evaluation import bounds_of_weights
from gflownet.policies.diffusion import diffusion_flow, diffusion_policy

PROCESS = DiffusionProcess(num_steps=5, variance=1.7)


def drift(x, time):
    """Any function, not symmetric in anything."""
    return jnp.array([1.0, -0.5]) * jnp.sin(x + 2.0 * time) + 0.3 * x[::-1] ** 2


def energy_fn(params, x):
    return 0.5 * jnp.sum((x - 1.0) ** 2) + params * x[0]


def plain_weight(path, log_reward, *, shift=0):
    """log R + log P_B - log P_F from the density of each step; ``shift`` plants a bug in P_B."""
    steps, variance = PROCESS
    dt, total = 1.0 / steps, log_reward
    for i in range(steps):
        mean = path[i] + np.asarray(drift(jnp.asarray(path[i]), i * dt)) * dt
        scale = np.sqrt(variance * dt)
        total -= stats.norm.logpdf(path[i + 1], mean, scale).sum()
        if i > 0:
            share = (i + shift) / (i + 1 + shift)
            bridge = np.sqrt(variance * dt * share)
            total += stats.norm.logpdf(path[i], path[i + 1] * i / (i + 1), bridge).sum()
    return total


@pytest.mark.parametrize("exploration", [0.0, 0.4])
def test_weights_are_ratios_of_the_densities_of_all_steps(exploration, x64):
    key = jax.random.key(0)
    path, control = forward_path(key, PROCESS, drift, 2, exploration=exploration)
    energy = energy_fn(0.7, path[-1])
    found = log_weight(PROCESS, energy, path[-1], control)
    expected = plain_weight(np.asarray(path), -float(energy))
    np.testing.assert_allclose(found, expected, rtol=1e-10)
    np.testing.assert_allclose(control, controls_of(PROCESS, drift, path).sum(), rtol=1e-10)
    # The planted bug: the bridge's variance one step late.
    assert abs(plain_weight(np.asarray(path), -float(energy), shift=1) - found) > 0.05


def test_without_drift_every_path_to_the_reference_has_the_same_weight(x64):
    none = lambda x, time: jnp.zeros_like(x)  # noqa: E731
    for key in jax.random.split(jax.random.key(1), 3):
        path, control = forward_path(key, PROCESS, none, 3, exploration=0.5)
        energy = 0.5 * jnp.sum(path[-1] ** 2) / PROCESS.variance
        weight = log_weight(PROCESS, energy, path[-1], control)
        expected = 1.5 * np.log(2.0 * np.pi * PROCESS.variance)
        np.testing.assert_allclose(weight, expected, rtol=1e-12)


def test_bridges_have_the_moments_of_a_brownian_bridge():
    end = jnp.array([2.0, -1.0])
    paths = jax.jit(jax.vmap(lambda key: backward_path(key, PROCESS, end)))(
        jax.random.split(jax.random.key(2), 20_000)
    )
    times = np.arange(PROCESS.num_steps + 1) / PROCESS.num_steps
    variance = PROCESS.variance * times * (1.0 - times)
    num = len(paths)
    # Five standard errors of a mean, of a variance and of a covariance of normal numbers.
    error = np.abs(paths.mean(0) - times[:, None] * np.asarray(end))
    assert (error <= 5.0 * np.sqrt(variance / num)[:, None] + 1e-6).all()
    error = np.abs(paths.var(0) - variance[:, None])
    assert (error <= 5.0 * (variance * np.sqrt(2.0 / num))[:, None] + 1e-6).all()
    expected = PROCESS.variance * times[1] * (1.0 - times[2])
    found = np.cov(np.asarray(paths[:, 1:3, 0]).T)[0, 1]
    assert abs(found - expected) < 5.0 * np.sqrt((expected**2 + variance[1] * variance[2]) / num)


def test_both_directions_estimate_log_z_at_any_drift():
    """A Gaussian target: importance weights average to Z from the front; the back bounds it."""
    policy = diffusion_policy(2, features=8, uses_slope=True)
    params = policy.init(jax.random.key(3))
    params = jax.tree.map(
        lambda leaf: leaf + 0.05 * jnp.sin(jnp.arange(leaf.size)).reshape(leaf.shape), params
    )
    log_z = float(np.log(2.0 * np.pi)) + 0.5 * 0.7**2 - 0.7
    keys = jax.random.split(jax.random.key(4), 20_000)
    args = (PROCESS, policy, params, energy_fn, 0.7)
    _, forward = jax.jit(jax.vmap(lambda key: draw(key, *args, 2)))(keys)
    exact = jnp.array([0.3, 1.0]) + jax.random.normal(jax.random.key(5), (20_000, 2))
    back = jax.jit(jax.vmap(lambda key, x: target_log_weight(key, *args, x)))(keys, exact)
    bounds = bounds_of_weights(forward, back)
    assert abs(bounds.log_z - log_z) < 5.0 * bounds.log_z_standard_error
    assert bounds.elbo < log_z < bounds.eubo
    # From the back: the mean of exp(-w) is 1 / Z.
    inverse = bounds_of_weights(-np.asarray(back, np.float64))
    assert abs(-inverse.log_z - log_z) < 5.0 * inverse.log_z_standard_error


@pytest.mark.parametrize("loss", ["tb", "vargrad"])
def test_gradients_do_not_flow_through_paths(loss):
    """The gradient equals that of the same paths as constants, and "pis" differs from it."""
    policy = diffusion_policy(2, features=4)
    params = {"policy": policy.init(jax.random.key(0))}
    params["policy"]["Dense_4"]["kernel"] += 0.3
    if loss == "tb":
        params["log_z"] = jnp.array(0.4)
    objective = diffusion_objective(energy_fn, policy, PROCESS, 2, loss=loss, energy_params=0.7)
    keys = jax.random.split(jax.random.key(1), 6)
    batch = jnp.zeros(6)
    carry = objective.init(jax.random.key(0), params, batch)
    found = jax.jit(jax.grad(objective.loss, has_aux=True))(params, carry, keys, batch)[0]

    def plain(params):
        bound = lambda x, time: policy.drift(params["policy"], x, time, None)  # noqa: E731

        def weight(key):
            path, _ = forward_path(jax.random.split(key, 3)[0], PROCESS, bound, 2)
            path = jax.lax.stop_gradient(path)
            control = controls_of(PROCESS, bound, path).sum()
            return log_weight(PROCESS, energy_fn(0.7, path[-1]), path[-1], control)

        weights = jax.vmap(weight)(keys)
        middle = params["log_z"] if loss == "tb" else weights.mean()
        return jnp.mean((weights - middle) ** 2)

    expected = jax.jit(jax.grad(plain))(params)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-3, atol=1e-4)


def log_flow(x, time):
    """Any function."""
    return jnp.sin(x).sum() + time * x[0]


def plain_parts(path, log_z, *, looks_forward, shift=0):
    """log F_i + log P_F(i..j) - log F_j - log P_B(i..j) of all parts, from densities of each step.

    ``shift`` plants a bug: flows of the step after.
    """
    steps, variance = PROCESS
    flows, ratios = [log_z], []
    for i in range(1, steps + 1):
        x, time = path[i], i / steps
        reward = -float(energy_fn(0.7, jnp.asarray(x)))
        late = min(time + shift / steps, 1.0)
        known = stats.norm.logpdf(x, 0.0, np.sqrt(late * variance)).sum()
        if looks_forward:
            known = (1.0 - late) * known + late * reward
        flows.append(reward if i == steps else float(log_flow(jnp.asarray(x), time)) + known)
    for i in range(steps):
        mean = path[i] + np.asarray(drift(jnp.asarray(path[i]), i / steps)) / steps
        ratio = stats.norm.logpdf(path[i + 1], mean, np.sqrt(variance / steps)).sum()
        if i > 0:
            bridge = np.sqrt(variance / steps * i / (i + 1))
            ratio -= stats.norm.logpdf(path[i], path[i + 1] * i / (i + 1), bridge).sum()
        ratios.append(ratio)
    return {
        (i, j): flows[i] + sum(ratios[i:j]) - flows[j]
        for i in range(steps)
        for j in range(i + 1, steps + 1)
    }


@pytest.mark.parametrize("loss", PARTIAL_LOSSES)
def test_parts_of_paths_are_balanced_as_their_densities_say(loss, x64):
    paths = [backward_path(jax.random.key(i), PROCESS, jnp.array([1.0, -0.5])) for i in range(2)]
    kind = PARTIAL_LOSSES[loss]
    decay = 2.0 if kind.decay is None else kind.decay

    def plain(shift):
        losses = []
        for path in paths:
            parts = plain_parts(
                np.asarray(path), 0.4, looks_forward=kind.is_forward_looking, shift=shift
            )
            # Only their ratios matter; 0**0 is 1.
            weights = {(i, j): decay ** (j - i - 1) for i, j in parts}
            total = sum(weights[part] * residual**2 for part, residual in parts.items())
            losses.append(total / sum(weights.values()))
        return losses

    def flows_of(path):
        energies = jax.vmap(energy_fn, (None, 0))(0.7, path)
        return relative_flows(
            path,
            energies,
            PROCESS.variance,
            jnp.array(0.4),
            log_flow,
            is_forward_looking=kind.is_forward_looking,
        )

    controls = jnp.stack([controls_of(PROCESS, drift, path) for path in paths])
    found = partial_losses(jnp.stack([flows_of(path) for path in paths]), controls, decay=decay)
    np.testing.assert_allclose(found, plain(0), rtol=1e-9)
    assert (np.abs(found - np.array(plain(1))) > 0.01 * found).all()


def test_the_whole_path_alone_is_trajectory_balance(x64):
    policy, flow = diffusion_policy(2, features=4), diffusion_flow(2, features=4)
    params = {"policy": policy.init(jax.random.key(0)), "log_z": jnp.array(0.4)}
    keys, values = jax.random.split(jax.random.key(1), 6), {}
    for loss in ("tb", "subtb", "flsubtb"):
        if loss != "tb":
            params["flow"] = flow.init(jax.random.key(1))
        objective = diffusion_objective(
            energy_fn,
            policy,
            PROCESS,
            2,
            loss=loss,
            flow=flow,
            decay=np.inf,
            exploration=0.3,
            energy_params=0.7,
        )
        carry = objective.init(jax.random.key(2), params, jnp.zeros(6))
        values[loss], (_, metrics) = objective.loss(params, carry, keys, jnp.zeros(6))
        assert metrics["log_z"] == 0.4
    assert values["subtb"] == pytest.approx(float(values["tb"]), rel=1e-9)
    assert values["flsubtb"] == pytest.approx(float(values["tb"]), rel=1e-9)


@pytest.mark.parametrize("loss", ["tb", "vargrad", "pis", *PARTIAL_LOSSES])
def test_a_shifted_gaussian_is_learned(loss):
    """N((2, -1), I): the drift that solves it is a constant, and both bounds close on log Z."""
    target = targets.gaussian(jnp.array([2.0, -1.0]), jnp.eye(2))
    policy = diffusion_policy(2, features=16, num_layers=1)
    flow = diffusion_flow(2, features=16, num_layers=1)
    process = DiffusionProcess(num_steps=8, variance=1.0)
    objective = diffusion_objective(
        target.energy,
        policy,
        process,
        2,
        loss=loss,
        exploration=0.0 if loss == "pis" else 0.2,
        flow=flow,
    )
    params = {"policy": policy.init(jax.random.key(0))}
    if loss not in ("vargrad", "pis"):
        params["log_z"] = jnp.zeros(())
    if loss in PARTIAL_LOSSES:
        params["flow"] = flow.init(jax.random.key(4))
    optimizer = optax.adam(1e-2)
    batch = jnp.zeros(64)

    @jax.jit
    def train(params):
        carry = objective.init(jax.random.key(1), params, batch)

        def body(state, t):
            params, carry, opt_state = state
            keys = jax.random.split(jax.random.fold_in(jax.random.key(2), t), 64)
            gradient, (carry, metrics) = jax.grad(objective.loss, has_aux=True)(
                params, carry, keys, batch
            )
            updates, opt_state = optimizer.update(gradient, opt_state)
            return (optax.apply_updates(params, updates), carry, opt_state), metrics["elbo"]

        (params, _, _), elbos = jax.lax.scan(
            body, (params, carry, optimizer.init(params)), jnp.arange(400)
        )
        return params, elbos

    params, _ = train(params)
    args = (process, policy, params["policy"], target.energy, ())
    x, weights = jax.jit(jax.vmap(lambda key: draw(key, *args, 2)))(
        jax.random.split(jax.random.key(3), 4000)
    )
    bounds = bounds_of_weights(weights)
    assert target.log_z - 0.05 < bounds.elbo < target.log_z + 0.01
    assert abs(bounds.log_z - target.log_z) < 0.02
    np.testing.assert_allclose(x.mean(0), [2.0, -1.0], atol=0.15)


def test_chains_of_the_local_search_keep_what_the_policy_forgot():
    """Chains at a far mode stay there, and their paths enter the loss."""
    target = targets.gaussian_mixture(jnp.array([[6.0], [-6.0]]), 0.3**0.5)
    policy = diffusion_policy(1, features=4)
    objective = diffusion_objective(
        target.energy,
        policy,
        PROCESS,
        1,
        local_search_steps=2,
        rebirth_probability=0.0,
        local_search_step_size=0.1,
    )
    params = {"policy": policy.init(jax.random.key(0)), "log_z": jnp.zeros(())}
    carry = objective.init(jax.random.key(0), params, jnp.zeros(8))
    carry = carry._replace(position=jnp.full((8, 1), -6.0), age=jnp.ones(8, jnp.int32))
    keys = jax.random.split(jax.random.key(1), 8)
    _, (after, metrics) = jax.jit(objective.loss)(params, carry, keys, jnp.zeros(8))
    assert (jnp.abs(after.position + 6.0) < 2.5).all()
    assert (after.position != -6.0).any()
    assert (after.age == 2).all()
    assert 0.0 < float(metrics["acceptance_rate"]) <= 1.0


def test_chains_that_are_born_where_the_energy_is_steep_shorten_their_steps_until_they_move():
    """From 6 standard deviations of a quartic well no step of the first size is accepted."""
    objective = diffusion_objective(
        lambda params, x: jnp.sum(x**4),
        diffusion_policy(2, features=4),
        PROCESS,
        2,
        local_search_steps=4,
        rebirth_probability=0.0,
        local_search_step_size=0.5,
    )
    params = {"policy": diffusion_policy(2, features=4).init(jax.random.key(0))}
    params["log_z"] = jnp.zeros(())
    carry = objective.init(jax.random.key(0), params, jnp.zeros(64))
    start = carry._replace(position=jnp.full((64, 2), 6.0), age=jnp.ones(64, jnp.int32))

    @jax.jit
    def search(carry):
        def body(carry, t):
            keys = jax.random.split(jax.random.fold_in(jax.random.key(1), t), 64)
            _, (carry, metrics) = objective.loss(params, carry, keys, jnp.zeros(64))
            return carry, metrics["acceptance_rate"]

        return jax.lax.scan(body, carry, jnp.arange(400))

    carry, acceptance = search(start)
    assert float(acceptance[0]) == 0.0
    assert float(jnp.abs(carry.position).max()) < 3.0
    # What it settles at is the target, up to the noise of 64 slots over 100 updates.
    assert abs(float(acceptance[-100:].mean()) - 0.574) < 0.03


def test_the_baseline_of_vargrad_is_the_mean_over_the_policys_own_paths(x64):
    """The loss from the weights of both kinds of paths, written out."""
    policy = diffusion_policy(2, features=4)
    params = {"policy": policy.init(jax.random.key(0))}
    objective = diffusion_objective(
        energy_fn,
        policy,
        PROCESS,
        2,
        loss="vargrad",
        energy_params=0.7,
        local_search_steps=1,
        rebirth_probability=0.0,
    )
    carry = objective.init(jax.random.key(2), params, jnp.zeros(6))
    carry = carry._replace(age=jnp.full(6, 2, jnp.int32))
    keys = jax.random.split(jax.random.key(1), 6)
    value, (after, metrics) = jax.jit(objective.loss)(params, carry, keys, jnp.zeros(6))
    split = jax.vmap(lambda key: jax.random.split(key, 3))(keys)
    args = (PROCESS, policy, params["policy"], energy_fn, 0.7)
    own = [draw(split[i, 0], *args, 2)[1] for i in (0, 2, 4)]
    back = [target_log_weight(split[i, 2], *args, after.position[i]) for i in (1, 3, 5)]
    weights, mean = np.array(own + back), np.mean(own)
    np.testing.assert_allclose(metrics["elbo"], mean, rtol=1e-10)
    np.testing.assert_allclose(value, np.mean((weights - mean) ** 2), rtol=1e-10)
    # The planted bug: a mean over all paths.
    assert abs(np.var(weights) - float(value)) > 0.01 * float(value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss": "mse"}, "loss is 'mse'"),
        ({"loss": "db"}, "loss is 'db', which needs flow"),
        ({"loss": "subtb", "flow": diffusion_flow(2), "decay": -1.0}, "decay is -1"),
        ({"loss": "pis", "exploration": 0.1}, "must be 0"),
        ({"local_search_steps": -1}, "local_search_steps is -1"),
        ({"rebirth_probability": 2.0}, "rebirth_probability is 2"),
    ],
)
def test_what_cannot_be_is_named(options, message):
    with pytest.raises(ValueError, match=message):
        diffusion_objective(energy_fn, diffusion_policy(2), PROCESS, 2, **options)
    with pytest.raises(ValueError, match="num_steps is 0"):
        diffusion_objective(energy_fn, diffusion_policy(2), DiffusionProcess(0, 1.0), 2)

"""Flows as proposals of a chain: what they are taught, and that both find the law of the data."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ebjax.objectives.cooperative import cooperative
from ebjax.samplers import gibbs, mala
from gflownet.diffusion import DiffusionProcess
from gflownet.environments.sequences import SequenceState, discrete_energy
from gflownet.objectives.proposals import diffusion_proposals, flow_proposals
from gflownet.policies import mlp_policy
from gflownet.policies.diffusion import diffusion_policy

NUM_SPINS = 3
STATES = np.array(list(itertools.product((0.0, 1.0), repeat=NUM_SPINS)))
PAIRS = np.triu_indices(NUM_SPINS, 1)


def energy_fn(params, x):
    spins = 2.0 * x - 1.0
    return -(params["field"] @ spins + params["coupling"] @ (spins[PAIRS[0]] * spins[PAIRS[1]]))


TRUE = {"field": np.array([0.4, -0.2, 0.0]), "coupling": np.array([0.5, -0.3, 0.2])}
ENVIRONMENT = discrete_energy(energy_fn, num_variables=NUM_SPINS)
POLICY = mlp_policy(ENVIRONMENT.num_actions, (32,))
PROPOSALS = flow_proposals(
    ENVIRONMENT,
    POLICY,
    example_of=lambda state: state.tokens.astype(float),
    state_of=lambda x: SequenceState(x.astype(jnp.int32), jnp.zeros((), bool)),
    reward_params=TRUE,
)


def law(params):
    energies = np.array([float(energy_fn(params, x)) for x in STATES])
    mass = np.exp(-energies)
    return mass / mass.sum()


def policy_params(seed=0):
    observation = ENVIRONMENT.observe(ENVIRONMENT.initial(jax.random.key(0)))
    return POLICY.init(jax.random.key(seed), observation)


def minimise(objective, params, batches, *, num_updates, learning_rate=1e-2):
    optimizer = optax.adam(optax.cosine_decay_schedule(learning_rate, num_updates))
    first = batches(jax.random.key(0))
    num = len(first)

    @jax.jit
    def run(params):
        carry = objective.init(jax.random.key(1), params, first)

        def body(loop, t):
            params, carry, state = loop
            batch_key, key = jax.random.split(jax.random.fold_in(jax.random.key(2), t))
            keys = jax.random.split(key, num)
            gradient, (carry, metrics) = jax.grad(objective.loss, has_aux=True)(
                params, carry, keys, batches(batch_key)
            )
            updates, state = optimizer.update(gradient, state, params)
            return (optax.apply_updates(params, updates), carry, state), metrics

        loop = (params, carry, optimizer.init(params))
        (params, *_), metrics = jax.lax.scan(body, loop, jnp.arange(num_updates))
        return params, metrics

    return run(params)


def test_the_loss_is_the_likelihood_of_a_path(x64):
    """All paths to x are alike likely under P_B, so their mean exp(-loss) is q(x) / 3!."""
    params = jax.tree.map(lambda leaf: leaf.astype(float), policy_params())
    keys = jax.random.split(jax.random.key(3), 4000)
    x = jnp.array([1.0, 0.0, 1.0])
    losses = jax.jit(jax.vmap(lambda key: PROPOSALS.loss(params, key, x, x)))(keys)
    shares = np.exp(-np.asarray(losses)) * 6.0
    draws = jax.jit(jax.vmap(lambda key: PROPOSALS.propose(params, key)))(keys)
    drawn = np.asarray((draws == x).all(axis=1), float)
    error = np.hypot(shares.std(), drawn.std()) / len(keys) ** 0.5
    assert abs(shares.mean() - drawn.mean()) < 4.0 * error
    assert drawn.mean() > 0.02
    # The bound, with log P_B = -log 3! of every path.
    assert -np.log(shares.mean()) < losses.mean() - np.log(6.0)


def test_graph_energy_and_data_agree():
    probabilities = jnp.asarray(law(TRUE))

    def batches(key):
        return jnp.asarray(STATES)[jax.random.choice(key, 8, (256,), p=probabilities)]

    objective = cooperative(energy_fn, *PROPOSALS, gibbs(), num_steps=1)
    params = {
        "energy": {"field": jnp.zeros(3), "coupling": jnp.zeros(3)},
        "sampler": policy_params(),
    }
    params, _ = minimise(objective, params, batches, num_updates=400)
    learned = law(params["energy"])
    assert 0.5 * np.abs(learned - law(TRUE)).sum() < 0.03
    keys = jax.random.split(jax.random.key(5), 8000)
    draws = np.asarray(jax.jit(jax.vmap(PROPOSALS.propose, (None, 0)))(params["sampler"], keys))
    counts = np.bincount((draws @ [4, 2, 1]).astype(int), minlength=8) / len(keys)
    assert 0.5 * np.abs(counts - law(TRUE)).sum() < 0.06


def test_diffusion_energy_and_data_agree():
    mean, deviation = np.array([1.0, -0.5]), np.array([0.6, 1.2])

    def gaussian(params, x):
        return 0.5 * jnp.sum(jnp.square((x - params["mean"]) * jnp.exp(-params["log_scale"])))

    def batches(key):
        return mean + deviation * jax.random.normal(key, (256, 2))

    policy = diffusion_policy(2, features=32, num_layers=1)
    proposals = diffusion_proposals(policy, DiffusionProcess(20, 2.0), 2)
    objective = cooperative(gaussian, *proposals, mala(step_size=0.3), num_steps=5)
    params = {
        "energy": {"mean": jnp.zeros(2), "log_scale": jnp.zeros(2)},
        "sampler": policy.init(jax.random.key(0)),
    }
    params, _ = minimise(objective, params, batches, num_updates=600)
    np.testing.assert_allclose(params["energy"]["mean"], mean, atol=0.12)
    np.testing.assert_allclose(np.exp(params["energy"]["log_scale"]), deviation, rtol=0.12)
    keys = jax.random.split(jax.random.key(5), 8000)
    draws = jax.jit(jax.vmap(proposals.propose, (None, 0)))(params["sampler"], keys)
    np.testing.assert_allclose(draws.mean(0), mean, atol=0.12)
    np.testing.assert_allclose(draws.std(0), deviation, rtol=0.12)


def test_a_drift_along_a_slope_is_refused():
    policy = diffusion_policy(2, features=4, num_layers=1, uses_slope=True)
    with pytest.raises(ValueError, match="slope"):
        diffusion_proposals(policy, DiffusionProcess(4, 1.0), 2)

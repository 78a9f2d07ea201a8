"""Two small runs that share the loop and nothing else: PCD on an MLP, and trajectory balance."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ebjax.energies import mlp_energy
from ebjax.objectives import persistent_contrastive_divergence
from ebjax.samplers import langevin
from ebjax.types import Run, Source
from gflownet.environments import hypergrid
from gflownet.objectives import trajectory_balance
from gflownet.policies import mlp_policy


def _run(init, objective, source, optimizer, **options):
    return Run(
        init=init,
        objective=objective,
        optimizer=optimizer,
        source=source,
        sample=lambda key, state, num_samples: {},
        evaluate=lambda key, state: {},
        figures=lambda key, state, samples: {},
        **options,
    )


def make_pcd_run(optimizer=None, *, energy_fn=None, **options):
    """PCD of a two-dimensional law; ``energy_fn`` wraps the network's."""
    energy = mlp_energy((16,))
    data = np.asarray(jax.random.normal(jax.random.key(7), (32, 2)) + 1.0)

    def example(arrays, key, position):
        noise = jax.random.normal(jax.random.fold_in(key, position), (2,))
        return arrays[position % len(data)] + 0.1 * noise

    objective = persistent_contrastive_divergence(
        energy.apply if energy_fn is None else energy_fn(energy.apply),
        langevin(step_size=0.1),
        lambda key: jax.random.normal(key, (2,)),
        num_steps=3,
        chains_per_example=2,
        rebirth_probability=0.2,
    )
    return _run(
        lambda key: energy.init(key, jnp.zeros(2)),
        objective,
        Source(data, example),
        optax.sgd(0.1) if optimizer is None else optimizer,
        **options,
    )


def make_flow_run(optimizer=None, **options):
    """Trajectory balance on a grid of 4 x 4."""
    environment = hypergrid(dim=2, side=4)
    policy = mlp_policy(environment.num_actions, (16,))

    def init(key):
        observation = environment.observe(environment.initial(key))
        return {"policy": policy.init(key, observation), "log_z": jnp.zeros(())}

    return _run(
        init,
        trajectory_balance(environment, policy, epsilon=0.1, chunk_size=16),
        Source((), lambda arrays, key, position: position),
        optax.sgd(0.01) if optimizer is None else optimizer,
        **options,
    )


@pytest.fixture
def pcd_run():
    return make_pcd_run


@pytest.fixture
def flow_run():
    return make_flow_run


@pytest.fixture(params=["pcd", "flow"])
def any_run(request):
    return {"pcd": make_pcd_run, "flow": make_flow_run}[request.param]

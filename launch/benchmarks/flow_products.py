"""The floor of an update of a flow: what its network costs if all else is free.

A rollout evaluates the policy once a step, over all its trajectories together, and the gradient
evaluates it again at the states that they left, in chunks, and pulls back: no library that trains
this network on these states can do without. Left out are the environment, masks, random numbers,
log-probabilities, the loss and Adam.
"""

import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from gflownet.types import Environment, Policy
from launch.benchmarks.flow_tasks import own_flow
from launch.benchmarks.own import hypergrid_flow
from launch.benchmarks.workload import Workload

__all__ = ["hypergrid_products", "task_products"]


def hypergrid_products(
    *, dim: int, side: int, num_trajectories: int, length: int, num_updates: int, seed: int
) -> Workload:
    """The floor of `own.flow_hypergrid` for trajectories of ``length`` steps each."""
    flow = hypergrid_flow(dim=dim, side=side)
    return _products(
        f"hypergrid {dim}-D side {side}",
        flow.environment,
        flow.policy,
        num_trajectories=num_trajectories,
        length=length,
        num_updates=num_updates,
        seed=seed,
    )


def task_products(
    *, task: str, num_trajectories: int, length: int, num_updates: int, seed: int = 0
) -> Workload:
    """The floor of `flow_tasks.ebjax_task` for trajectories of ``length`` steps each."""
    environment, policy = own_flow(task)
    return _products(
        task,
        environment,
        policy,
        num_trajectories=num_trajectories,
        length=length,
        num_updates=num_updates,
        seed=seed,
    )


def _products(
    name: str,
    environment: Environment,
    policy: Policy,
    *,
    num_trajectories: int,
    length: int,
    num_updates: int,
    seed: int,
    chunk_size: int = 128,
) -> Workload:
    source = environment.initial(jax.random.key(seed))
    masks = environment.forward_mask(source), environment.backward_mask(source)
    observation = environment.observe(source)
    params = policy.init(jax.random.key(seed), observation)
    num_chunks = -(-num_trajectories * length // chunk_size)

    def outputs(params: Any, observations: jax.Array) -> jax.Array:
        """[] a sum of all that the network says, each number with a weight of its own."""
        output = jax.vmap(lambda x: policy.apply(params, x, *masks))(observations)
        said = [x for x in jax.tree.leaves(output) if jnp.issubdtype(x.dtype, jnp.floating)]
        terms = [jnp.vdot(jnp.sin(jnp.arange(x.size)), x.ravel()) for x in said]
        return jnp.sum(jnp.stack(terms))

    def observations(count: int, total: jax.Array) -> jax.Array:
        """What depends on the last result, so that no two evaluations are one."""
        rows = jnp.broadcast_to(observation, (count, *observation.shape))
        if jnp.issubdtype(rows.dtype, jnp.floating):
            return rows + (1e-6 * total).astype(rows.dtype)
        return jnp.where(total > jnp.inf, 0, rows)

    def update(_: jax.Array, params: Any) -> Any:
        total = jax.lax.fori_loop(
            0,
            length,
            lambda _, total: outputs(params, observations(num_trajectories, jnp.tanh(total))),
            jnp.zeros(()),
        )

        def add_gradient(_: jax.Array, carry: tuple[Any, jax.Array]) -> tuple[Any, jax.Array]:
            gradient, total = carry
            rows = observations(chunk_size, jnp.tanh(total))
            value, more = jax.value_and_grad(outputs)(params, rows)
            return jax.tree.map(jnp.add, gradient, more), value

        zeros = jax.tree.map(jnp.zeros_like, params)
        gradient, _ = jax.lax.fori_loop(0, num_chunks, add_gradient, (zeros, total))
        return jax.tree.map(lambda p, g: p - 1e-9 * g, params, gradient)

    @jax.jit
    def updates(params: Any) -> Any:
        return jax.lax.fori_loop(0, num_updates, update, params)

    return _timed(f"products of {name}", updates, params)


def _timed(name: str, updates: Callable[[Any], Any], params: Any) -> Workload:
    started = time.perf_counter()
    jax.block_until_ready(updates(params))
    compiled = time.perf_counter() - started

    def run() -> Mapping[str, float]:
        leaf = jax.tree.leaves(jax.block_until_ready(updates(params)))[0]
        return {"mean_parameter": float(leaf.mean())}

    return Workload(name, run, compiled, "the network's evaluations and gradient, nothing else")

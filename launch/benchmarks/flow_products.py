"""The floor of an update of a flow: what its network costs if all else is free.

A rollout evaluates the policy once a step, over all its trajectories together; the gradient pulls
back at the states that they left, in chunks, from what the layers put out there or, where a policy
does not remember that, from another evaluation. Left out are the environment, masks, random
numbers, log-probabilities, keeping what layers put out, the loss and Adam.
"""

import time
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from gflownet.policies.remembering import recalled, remembered
from gflownet.rollout import forward_rollout
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
    key, source = jax.random.key(seed), environment.initial(jax.random.key(seed))
    masks = environment.forward_mask(source), environment.backward_mask(source)
    params = policy.init(key, environment.observe(source))
    num_chunks = -(-num_trajectories * length // chunk_size)
    # Rows that differ, so that no product is one of a single row: states of a rollout.
    keys = jax.random.split(key, num_trajectories)
    states = forward_rollout(keys, environment, policy, params).states
    observed = jax.vmap(jax.vmap(environment.observe))(states)
    flat = observed.reshape(-1, *observed.shape[2:])
    batch, chunk = (
        jnp.resize(flat, (size, *flat.shape[1:])) for size in (num_trajectories, chunk_size)
    )

    def apply(params: Any, x: jax.Array) -> Any:
        return policy.apply(params, x, *masks)

    memory: tuple[Any, ...] = ()
    if policy.remembers:
        memory = (jax.vmap(lambda x: remembered(apply, params, x)[1])(chunk),)

    def outputs(params: Any, observations: jax.Array, *memory: Any) -> jax.Array:
        """[] a sum of all that the network says, each number with a weight of its own."""

        def one(x: jax.Array, *kept: Any) -> Any:
            return recalled(apply, *kept, params, x) if kept else apply(params, x)

        output = jax.vmap(one)(observations, *memory)
        said = [x for x in jax.tree.leaves(output) if jnp.issubdtype(x.dtype, jnp.floating)]
        terms = [jnp.vdot(jnp.sin(jnp.arange(x.size)), x.ravel()) for x in said]
        return jnp.sum(jnp.stack(terms))

    def after(tree: Any, total: jax.Array) -> Any:
        """The same rows, which depend on the last result, so that no two evaluations are one."""
        return jax.tree.map(lambda rows: jnp.where(jnp.isnan(total), 0, rows), tree)

    def update(params: Any, batch: jax.Array, chunk: jax.Array) -> Any:
        total = jax.lax.fori_loop(
            0, length, lambda _, total: outputs(params, after(batch, total)), jnp.zeros(())
        )

        def add_gradient(_: jax.Array, carry: tuple[Any, jax.Array]) -> tuple[Any, jax.Array]:
            gradient, total = carry
            value, more = jax.value_and_grad(outputs)(params, *after((chunk, *memory), total))
            return jax.tree.map(jnp.add, gradient, more), value

        zeros = jax.tree.map(jnp.zeros_like, params)
        gradient, _ = jax.lax.fori_loop(0, num_chunks, add_gradient, (zeros, total))
        return jax.tree.map(lambda p, g: p - 1e-9 * g, params, gradient)

    @jax.jit
    def updates(params: Any, batch: jax.Array, chunk: jax.Array) -> Any:
        return jax.lax.fori_loop(0, num_updates, lambda _, p: update(p, batch, chunk), params)

    started = time.perf_counter()
    jax.block_until_ready(updates(params, batch, chunk))
    compiled = time.perf_counter() - started

    def run() -> Mapping[str, float]:
        leaf = jax.tree.leaves(jax.block_until_ready(updates(params, batch, chunk)))[0]
        return {"mean_parameter": float(leaf.mean())}

    note = "the network's evaluations and gradient, nothing else"
    return Workload(f"products of {name}", run, compiled, note)

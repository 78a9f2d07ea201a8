"""Persistent contrastive divergence of a restricted Boltzmann machine, here and in scikit-learn.

Binary images of independent pixels; PCD-1, a chain an example, plain gradient descent on the mean
over the batch, no weight decay. Both keep the hidden units of a chain from one update to the next.
What no code around them can save is timed by itself: the products of matrices of an update, and its
random numbers.
"""

import time
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ebjax.data import array_source
from ebjax.energies.boltzmann import rbm
from ebjax.objectives.rbm_contrastive_divergence import rbm_persistent_contrastive_divergence
from ebjax.samplers.discrete import uniforms
from launch.benchmarks.own import training_workload
from launch.benchmarks.workload import Workload

__all__ = ["ebjax_updates", "products_and_draws", "sklearn_updates"]


def _images(num_visible: int, seed: int) -> np.ndarray:
    """[1000, V] float32, a fifth of the pixels on."""
    return (np.random.default_rng(seed).random((1000, num_visible)) < 0.2).astype(np.float32)


def ebjax_updates(
    *,
    num_visible: int,
    num_hidden: int,
    batch_size: int,
    num_updates: int,
    seed: int,
    learning_rate: float = 0.05,
    steps_per_call: int = 50,
    num_devices: int = 1,
) -> Workload:
    """Updates of the training loop's program, with its weight average.

    Args:
        num_visible: pixels V.
        num_hidden: hidden units H.
        batch_size: images, and chains, of one update.
        num_updates: updates of one `run()`.
        seed: of the images, the weights and the chains.
        learning_rate: of gradient descent.
        steps_per_call: updates in one dispatch.
        num_devices: over which images and chains are split.
    """

    def pixels(key: jax.Array) -> jax.Array:
        return jax.random.bernoulli(key, 0.2, (num_visible,)).astype(jnp.float32)

    return training_workload(
        f"ebjax RBM {num_visible} x {num_hidden}",
        lambda key: rbm(num_hidden).init(key, jnp.zeros(num_visible)),
        rbm_persistent_contrastive_divergence(pixels),
        optax.sgd(learning_rate),
        array_source(_images(num_visible, seed)),
        batch_size=batch_size,
        num_updates=num_updates,
        steps_per_call=steps_per_call,
        seed=seed,
        num_devices=num_devices,
        note="the training loop's program: data, chains, gradient, weight average; float32",
    )


def products_and_draws(
    *, num_visible: int, num_hidden: int, batch_size: int, num_updates: int, seed: int
) -> Workload:
    """The floor of `ebjax_updates`: what of an update is left if all else is free.

    A product that draws the samples, one over data and samples for their energies and the next
    hidden units, one for the gradient, and a uniform number a unit.

    Args:
        num_visible: pixels V.
        num_hidden: hidden units H.
        batch_size: images, and chains, of one update.
        num_updates: repetitions in one `run()`.
        seed: of the numbers.
    """
    images = jnp.asarray(_images(num_visible, seed)[:batch_size])

    def update(i: jax.Array, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        weights, hidden = carry
        keys = jax.random.split(jax.random.fold_in(jax.random.key(seed), i), batch_size)
        uniform = jax.vmap(lambda key: uniforms(key, (num_visible + num_hidden,), jnp.float32))(
            keys
        )
        samples = uniform[:, :num_visible] + hidden @ weights.T
        both = jnp.concatenate([images, samples])
        logits = both @ weights
        # What is computed is carried on, so that nothing can be left out.
        hidden = uniform[:, num_visible:] + 1e-12 * logits[batch_size:]
        return weights + 1e-12 * both.T @ logits, hidden

    @jax.jit
    def updates(weights: jax.Array, hidden: jax.Array) -> jax.Array:
        return jax.lax.fori_loop(0, num_updates, update, (weights, hidden))[0]

    weights = 0.01 * jax.random.normal(jax.random.key(seed), (num_visible, num_hidden))
    hidden = jnp.zeros((batch_size, num_hidden))
    started = time.perf_counter()
    jax.block_until_ready(updates(weights, hidden))

    def run() -> Mapping[str, float]:
        return {"mean_weight": float(updates(weights, hidden).mean())}

    return Workload(
        name=f"products and draws of an RBM {num_visible} x {num_hidden}",
        run=run,
        warm_up_seconds=time.perf_counter() - started,
        note="no bias, sigmoid, loss, optimizer or average; float32",
    )


def sklearn_updates(
    *,
    num_visible: int,
    num_hidden: int,
    batch_size: int,
    num_updates: int,
    seed: int,
    learning_rate: float = 0.05,
    dtype: str = "float32",
) -> Workload:
    """The same with `BernoulliRBM.partial_fit`; arguments as in `ebjax_updates`.

    Args:
        num_visible: pixels V.
        num_hidden: hidden units H.
        batch_size: images of one update.
        num_updates: calls of `partial_fit` in one `run()`.
        seed: of the images and the machine.
        learning_rate: as above.
        dtype: of the images, which scikit-learn computes in.
    """
    from sklearn.neural_network import BernoulliRBM

    started = time.perf_counter()
    images = _images(num_visible, seed).astype(dtype)
    machine: Any = BernoulliRBM(
        n_components=num_hidden,
        learning_rate=learning_rate,
        batch_size=batch_size,
        random_state=seed,
    )
    batches = images.reshape(-1, batch_size, num_visible)
    machine.partial_fit(batches[0])
    count = 0

    def run() -> Mapping[str, float]:
        nonlocal count
        for _ in range(num_updates):
            machine.partial_fit(batches[count % len(batches)])
            count += 1
        return {"mean_visible_bias": float(machine.intercept_visible_.mean())}

    return Workload(
        name=f"scikit-learn RBM {num_visible} x {num_hidden}",
        run=run,
        warm_up_seconds=time.perf_counter() - started,
        note=f"{dtype}, BLAS threads as installed",
    )

"""The only training step: gradient of an objective, mean over devices, optimizer, average.

    g = mean over devices of grad_params loss(params, carry, keys, batch)
    params <- params + f^rollbacks optimizer(g),    ema <- d ema + (1 - d) params

with ``d = min(ema_decay, (1 + step) / (10 + step))``, so that the average forgets the
initialisation at first and then settles to its decay; ``f`` is ``rollback_factor``.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from ebjax.numerics import all_finite, example_keys
from ebjax.types import Objective, PyTree, Source, TrainState

__all__ = ["initial_state", "load_arrays", "make_update", "make_update_many"]


def _stream_and_loss_keys(key):
    return jax.random.split(key)


def load_arrays(source: Source, key: jax.Array, step: int, num_steps: int, batch_size: int):
    """What ``source`` reads for the updates from ``step`` on, on the host where it streams.

    Args:
      source: where examples come from.
      key: the key of the run.
      step: the first update.
      num_steps: how many updates.
      batch_size: examples of the global batch.
    """
    if source.load is None:
        return source.arrays
    stream_key, _ = _stream_and_loss_keys(key)
    return source.load(stream_key, step * batch_size % 2**32, num_steps * batch_size)


def _example_batch(source: Source, key, step, index, batch_size, arrays):
    """Examples of the slots ``index`` at ``step``, and a key for each to be used by the loss."""
    stream_key, loss_key = _stream_and_loss_keys(key)
    position = step.astype(jnp.uint32) * jnp.uint32(batch_size) + index.astype(jnp.uint32)
    batch = jax.vmap(source.example, (None, None, 0))(arrays, stream_key, position)
    return batch, example_keys(loss_key, step, index)


def initial_state(
    key: jax.Array,
    init: Callable[[jax.Array], PyTree],
    objective: Objective,
    optimizer: optax.GradientTransformation,
    source: Source,
    batch_size: int,
) -> TrainState:
    """The state before the first update, with a global ``carry`` of ``batch_size`` slots."""
    params_key, carry_key, run_key = jax.random.split(key, 3)
    # What streams is read on the host, the rest is one program.
    arrays = load_arrays(source, run_key, 0, 1, batch_size)

    @jax.jit
    def build(params_key, carry_key, run_key, arrays):
        params = init(params_key)
        step = jnp.zeros((), jnp.int32)
        index = jnp.arange(batch_size)
        batch, _ = _example_batch(source, run_key, step, index, batch_size, arrays)
        return TrainState(
            step=step,
            params=params,
            ema=params,
            opt_state=optimizer.init(params),
            carry=objective.init(carry_key, params, batch),
            key=run_key,
            rollbacks=jnp.zeros((), jnp.int32),
        )

    return build(params_key, carry_key, run_key, arrays)


def make_update(
    objective: Objective,
    optimizer: optax.GradientTransformation,
    source: Source,
    *,
    batch_size: int,
    ema_decay: float = 0.999,
    rollback_factor: float = 0.5,
    axis_name: str | None = None,
) -> Callable[[TrainState, PyTree], tuple[TrainState, dict[str, jax.Array]]]:
    """Builds the training step.

    Args:
      objective: what is minimised.
      optimizer: turns the mean gradient into an update.
      source: where the batch comes from.
      batch_size: examples of the global batch.
      ema_decay: decay of the average, in [0, 1).
      rollback_factor: what is left of an update for each time that the run went back.
      axis_name: the mapped axis over which devices average gradients, ``None`` on one device.

    Returns:
      ``(state, arrays) -> (state, metrics)`` for the part of the batch that the device holds.
    """

    def update(state: TrainState, arrays: PyTree) -> tuple[TrainState, dict[str, jax.Array]]:
        local_size = batch_size
        index = jnp.arange(batch_size)
        if axis_name is not None:
            local_size //= jax.lax.axis_size(axis_name)
            index = jax.lax.axis_index(axis_name) * local_size + jnp.arange(local_size)
        batch, keys = _example_batch(source, state.key, state.step, index, batch_size, arrays)
        (loss, (carry, metrics)), gradient = jax.value_and_grad(objective.loss, has_aux=True)(
            state.params, state.carry, keys, batch
        )
        metrics = {"loss": loss, **metrics}
        # On one device XLA would still copy every gradient into the collective and out of it.
        if axis_name is not None and jax.lax.axis_size(axis_name) > 1:
            gradient, metrics = jax.lax.pmean((gradient, metrics), axis_name)
        updates, opt_state = optimizer.update(gradient, state.opt_state, state.params)
        share = jnp.power(rollback_factor, state.rollbacks.astype(jnp.float32))
        updates = jax.tree.map(lambda leaf: share.astype(leaf.dtype) * leaf, updates)
        params = optax.apply_updates(state.params, updates)
        count = state.step.astype(jnp.float32)
        decay = jnp.minimum(ema_decay, (1.0 + count) / (10.0 + count))
        ema = jax.tree.map(
            lambda e, p: e + (1.0 - decay).astype(p.dtype) * (p - e), state.ema, params
        )
        metrics["gradient_norm"] = optax.tree.norm(gradient)
        state = state._replace(
            step=state.step + 1, params=params, ema=ema, opt_state=opt_state, carry=carry
        )
        return state, metrics

    return update


def make_update_many(
    update: Callable, *, loss_limit: float = math.inf
) -> Callable[[PyTree, PyTree, PyTree], tuple]:
    """Many updates in one dispatch, in the form that ``data_parallel`` takes.

    Args:
      update: the step of ``make_update``.
      loss_limit: a loss of a larger size counts as one that is not finite.

    Returns:
      ``(state without carry, carry, (arrays, num_steps)) -> (state, carry, metrics)``. Metrics are
      means over the ``num_steps`` updates; ``num_steps`` is traced, so one program serves calls of
      all lengths. ``metrics["bad_step"]`` is the first step whose loss or gradient is not finite
      or whose loss is beyond its limit, or the last one if it left parameters that are not finite,
      or -1.
    """
    # The inner jit is there for its trace cache: the shapes of the metrics are asked for first,
    # and the loop body then reuses the same trace.
    update = jax.jit(update)

    def update_many(state: TrainState, carry: PyTree, constant: PyTree):
        arrays, num_steps = constant
        state = state._replace(carry=carry)
        shapes = jax.eval_shape(update, state, arrays)[1]
        totals = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)

        def body(_, loop):
            state, totals, bad_step = loop
            step = state.step
            state, metrics = update(state, arrays)
            is_bad = ~all_finite((metrics["loss"], metrics["gradient_norm"]))
            is_bad |= jnp.abs(metrics["loss"]) > loss_limit
            bad_step = jnp.where((bad_step < 0) & is_bad, step, bad_step)
            return state, jax.tree.map(jnp.add, totals, metrics), bad_step

        state, totals, bad_step = jax.lax.fori_loop(
            0, num_steps, body, (state, totals, jnp.full((), -1, jnp.int32))
        )
        # Parameters that overflow in the last update spoil no loss of this call, but are not saved.
        is_bad = (bad_step < 0) & ~all_finite(state.params)
        bad_step = jnp.where(is_bad, state.step - 1, bad_step)
        metrics = jax.tree.map(lambda total: total / num_steps, totals)
        return state._replace(carry=()), state.carry, {**metrics, "bad_step": bad_step}

    return update_many

"""A map over the first ``count`` of N items whose cost, forward and backward, follows ``count``.

``count`` is known only when the program runs. Work is done in chunks of a fixed size inside a
``while`` loop, which reverse-mode differentiation cannot pass through, so the gradient is written
out: the backward pass is a second loop over the same chunks that evaluates each one again and sums
the gradients of the parameters. Nothing is kept between the two passes but the inputs.

An accelerator takes larger chunks: there it is the number of kernels that costs time.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from ebjax.parallel import on_accelerator
from ebjax.types import Params, PyTree

__all__ = ["compact_map", "compact_order"]

LEAST_CHUNK_OF_ACCELERATORS = 1024


def compact_order(needed: jax.Array, chunk_size: int) -> jax.Array:
    """Indices of the needed items first, then the others, padded to whole chunks.

    Args:
      needed: [N] bool.
      chunk_size: items of a chunk.

    Returns:
      [M] int32 with M the next multiple of ``chunk_size``.

    >>> compact_order(jnp.array([False, True, True]), 2).tolist()
    [1, 2, 0, 0]
    """
    size = needed.shape[0]
    count = needed.sum()
    place = jnp.where(needed, jnp.cumsum(needed) - 1, count + jnp.cumsum(~needed) - 1)
    padded = -(-size // chunk_size) * chunk_size
    return jnp.zeros(padded, jnp.int32).at[place].set(jnp.arange(size, dtype=jnp.int32))


def compact_map(
    fn: Callable[[Params, PyTree], PyTree],
    params: Params,
    items: PyTree,
    needed: jax.Array,
    *,
    recorded: PyTree | None = None,
    memory: tuple[PyTree, jax.Array] | None = None,
    like: PyTree | None = None,
    chunk_size: int,
) -> PyTree:
    """``fn(params, item)`` at the needed items and 0 at the others, with gradient to ``params``.

    Args:
      fn: for one item; returns scalars.
      params: what gets gradient. Items get none.
      items: [N, ...].
      needed: [N] bool.
      recorded: the values [N], where they are known already (and are 0 where not needed); then
        the forward pass is skipped, and only the backward one evaluates ``fn``.
      memory: ``(rows [M, ...], place [N])``, with ``recorded``: a third argument of ``fn``, the row
        at the place of the item. Rows get no gradient.
      like: the tree of scalars that ``fn`` returns, needed where nothing is recorded.
      chunk_size: items evaluated at a time, on an accelerator at least 1,024.

    Returns:
      What ``fn`` returns, [N].
    """
    if on_accelerator():
        chunk_size = min(max(chunk_size, LEAST_CHUNK_OF_ACCELERATORS), needed.shape[0])
    order = compact_order(needed, chunk_size)
    count = needed.sum()
    if recorded is None:
        size = needed.shape[0]
        values = jax.tree.map(lambda leaf: jnp.zeros(size, jnp.result_type(leaf)), like)
        chunked = jax.vmap(fn, (None, 0))
        frozen = jax.lax.stop_gradient(params)

        def body(i, values):
            index, is_real = _chunk(order, count, i, chunk_size)
            out = chunked(frozen, _take(items, index))
            # Items past the count are written outside the array, which drops them.
            index = jnp.where(is_real, index, size)
            return jax.tree.map(lambda v, o: v.at[index].set(o, mode="drop"), values, out)

        recorded = _over_chunks(body, values, order, count, chunk_size)
    recorded = jax.lax.stop_gradient(recorded)
    return _with_gradient(fn, chunk_size, params, (items, memory, order, count), recorded)


def _over_chunks(body, init, order, count, chunk_size: int):
    """Runs ``body(i, value) -> value`` for each chunk that holds a needed item."""
    if len(order) == chunk_size:
        only = body(0, init)
        return jax.tree.map(lambda new, old: jnp.where(count > 0, new, old), only, init)
    return jax.lax.fori_loop(0, (count + chunk_size - 1) // chunk_size, body, init)


def _chunk(order, count, i, chunk_size):
    index = jax.lax.dynamic_slice(order, (i * chunk_size,), (chunk_size,))
    is_real = i * chunk_size + jnp.arange(chunk_size) < count
    # The rest of the last chunk repeats a needed item: others may have no finite value or gradient.
    return jnp.where(is_real, index, order[0]), is_real


def _take(items: PyTree, index: jax.Array) -> PyTree:
    return jax.tree.map(lambda leaf: jnp.take(leaf, index, axis=0, mode="clip"), items)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _with_gradient(fn, chunk_size, params, work, values):
    """``values``, which are those of ``fn`` at ``params``, with the gradient that they have."""
    del fn, chunk_size, params, work
    return values


def _forward(fn, chunk_size, params, work, values):
    del fn, chunk_size
    return values, (params, work)


def _backward(fn, chunk_size, residuals, cotangents):
    params, (items, memory, order, count) = residuals

    def body(i, gradient):
        index, is_real = _chunk(order, count, i, chunk_size)
        inputs = [_take(items, index)]
        if memory is not None:
            rows, place = memory
            inputs.append(_take(rows, place[index]))
        in_axes = (None, *[0] * len(inputs))
        chunk_cotangents = jax.tree.map(lambda leaf: jnp.where(is_real, leaf[index], 0), cotangents)
        _, pullback = jax.vjp(lambda p: jax.vmap(fn, in_axes)(p, *inputs), params)
        return jax.tree.map(jnp.add, gradient, pullback(chunk_cotangents)[0])

    zeros = jax.tree.map(jnp.zeros_like, params)
    return _over_chunks(body, zeros, order, count, chunk_size), None, None


_with_gradient.defvjp(_forward, _backward)

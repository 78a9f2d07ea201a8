"""Numerics shared by everything: masked softmax, keys by example, stateless shuffling, noise."""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.random import threefry_2x32

from ebjax.types import PyTree

__all__ = [
    "all_finite",
    "example_keys",
    "full_precision_matmul",
    "inner_product",
    "is_key",
    "masked_log_softmax",
    "neighbouring_keys",
    "random_normal_and_uniform",
    "random_normal_like",
    "random_words",
    "shuffled_index",
]


def masked_log_softmax(logits: jax.Array, mask: jax.Array) -> jax.Array:
    """Log-softmax over the allowed entries of the last axis.

    ``log p_a = logit_a - log sum_{b allowed} exp(logit_b)`` where allowed, ``-inf`` elsewhere. The
    gradient is finite everywhere, also where no entry is allowed (the row is then all ``-inf``)
    and where a forbidden logit is infinite.

    Args:
      logits: [..., A].
      mask: [..., A] bool, ``True`` where allowed.

    Returns:
      [..., A] log-probabilities.

    >>> masked_log_softmax(jnp.zeros(3), jnp.array([True, False, True])).round(3).tolist()
    [-0.6930000185966492, -inf, -0.6930000185966492]
    """
    any_allowed = mask.any(axis=-1, keepdims=True)
    logits = jnp.where(mask, logits, 0.0)
    peak = jnp.max(jnp.where(mask, logits, -jnp.inf), axis=-1, keepdims=True)
    logits = logits - jax.lax.stop_gradient(jnp.where(any_allowed, peak, 0.0))
    # The inner `where` keeps exp finite at forbidden entries, so no inf * 0 in the gradient.
    total = jnp.sum(jnp.where(mask, jnp.exp(jnp.where(mask, logits, 0.0)), 0.0), -1, keepdims=True)
    return jnp.where(mask, logits - jnp.log(jnp.where(any_allowed, total, 1.0)), -jnp.inf)


def example_keys(key: jax.Array, step: jax.Array, index: jax.Array) -> jax.Array:
    """One key for each example, ``fold_in(fold_in(key, step), index)``.

    The key depends on the global index of the example and not on the device that holds it, so one
    device and many draw the same numbers.

    Args:
      key: [] the run's key.
      step: [] integer.
      index: [B] integer, global example index.

    Returns:
      [B] keys.
    """
    return jax.vmap(jax.random.fold_in, (None, 0))(jax.random.fold_in(key, step), index)


def neighbouring_keys(key: jax.Array, index: jax.Array) -> jax.Array:
    """One key for each index, the index added to a word of ``key``: a key a chain without hashing.

    Threefry is built for regular keys: streams under neighbouring ones are independent. Two calls
    overlap where their keys do, so ``key`` must itself be the output of ``split`` or ``fold_in``.
    Other generators fold the index in.

    Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011.

    Args:
      key: [] key.
      index: [C] integer.

    Returns:
      [C] keys.
    """
    if str(jax.random.key_impl(key)) != "threefry2x32":
        return jax.vmap(jax.random.fold_in, (None, 0))(key, index)
    first, second = jax.random.key_data(key)
    second = second + index.astype(jnp.uint32)
    words = jnp.stack([jnp.broadcast_to(first, second.shape), second], axis=-1)
    return jax.random.wrap_key_data(words, impl="threefry2x32")


def is_key(leaf: Any) -> bool:
    """Whether a leaf of a tree is an array of typed random keys."""
    return isinstance(leaf, jax.Array) and jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def random_words(key: jax.Array, num: int) -> jax.Array:
    """[num] uint32, independent and uniform.

    With threefry keys both words of every block are used, which ``jax.random.bits`` leaves to the
    64-bit draws: half the work, and on few dimensions the noise is much of a sampler's step.
    """
    if str(jax.random.key_impl(key)) == "threefry2x32":
        return threefry_2x32(jax.random.key_data(key), jnp.arange(num, dtype=jnp.uint32))
    return jax.random.bits(key, (num,), jnp.uint32)


def _open_unit(words: jax.Array, dtype: Any) -> jax.Array:
    """Uniform on (0, 1), never an end; ``words`` [..., 1 or 2] are the bits of one number each."""
    if dtype == jnp.float64:
        # 52 bits, so that the half is exact: 32 high and 20 low ones.
        high, low = words[..., 0].astype(dtype), (words[..., 1] >> 12).astype(dtype)
        return (high * 2.0**20 + low + 0.5) * 2.0**-52
    return ((words[..., 0] >> 9).astype(jnp.float32) + 0.5) * np.float32(2.0**-23)


def random_normal_and_uniform(
    key: jax.Array, tree: PyTree, num_uniform: int = 1
) -> tuple[PyTree, jax.Array]:
    """Standard normal noise shaped as ``tree``, and uniforms on (0, 1), from one key in one draw.

    Args:
      key: [] key, consumed.
      tree: a pytree of real floating arrays; the noise has its shapes and dtypes.
      num_uniform: how many uniforms.

    Returns:
      ``(noise, uniform)``: a tree as ``tree``, and [num_uniform] in the widest dtype of the tree.

    Raises:
      TypeError: if a leaf is not real and floating.
    """
    leaves, treedef = jax.tree.flatten(tree)
    dtypes = [jnp.result_type(leaf) for leaf in leaves]
    for dtype in dtypes:
        if not jnp.issubdtype(dtype, jnp.floating):
            raise TypeError(
                f"a position has the dtype {dtype}; Gaussian noise needs real floating positions."
            )
    uniform_dtype = jnp.result_type(*dtypes) if dtypes else jnp.float32
    draws = [*((jnp.shape(leaf), dtype) for leaf, dtype in zip(leaves, dtypes, strict=True))]
    draws.append(((num_uniform,), uniform_dtype))
    widths = [2 if dtype == jnp.float64 else 1 for _, dtype in draws]
    sizes = [math.prod(shape) * width for (shape, _), width in zip(draws, widths, strict=True)]
    words = random_words(key, sum(sizes))
    parts, first = [], 0
    for (shape, dtype), width, size in zip(draws, widths, sizes, strict=True):
        parts.append(_open_unit(words[first : first + size].reshape(*shape, width), dtype))
        first += size
    # 2u - 1 is exact and symmetric about zero.
    noise = [
        (math.sqrt(2.0) * jax.lax.erf_inv(2.0 * part - 1.0)).astype(dtype)
        for part, dtype in zip(parts[:-1], dtypes, strict=True)
    ]
    return jax.tree.unflatten(treedef, noise), parts[-1].astype(uniform_dtype)


def random_normal_like(key: jax.Array, tree: PyTree) -> PyTree:
    """Standard normal noise with the structure, shapes and dtypes of ``tree``.

    Raises:
      TypeError: if a leaf is not real and floating.
    """
    return random_normal_and_uniform(key, tree, 0)[0]


def full_precision_matmul(first: jax.Array, second: jax.Array) -> jax.Array:
    """``first @ second`` in the precision of its factors, on every device.

    By default GPUs round the factors of float32 products to 11 bits (TF32) and TPUs to 8
    (bfloat16). Networks may be trained so; differences of near numbers, tests of acceptance and
    exact draws are not to see it.
    """
    return jnp.matmul(first, second, precision=jax.lax.Precision.HIGHEST)


# A reduction is a kernel of its own on a CPU; a sum of so few terms joins the one around it.
_MAX_WRITTEN_OUT = 4


def inner_product(first: PyTree, second: PyTree) -> jax.Array:
    """[] sum of the products of all components of two trees.

    >>> float(inner_product({"a": jnp.ones(3), "b": 2.0}, {"a": jnp.arange(3.0), "b": 5.0}))
    13.0
    """

    def of_leaf(a, b):
        terms = jnp.ravel(a * b)
        if not 0 < terms.size <= _MAX_WRITTEN_OUT:
            return jnp.sum(terms)
        return functools.reduce(jnp.add, [terms[i] for i in range(terms.size)])

    return functools.reduce(jnp.add, jax.tree.leaves(jax.tree.map(of_leaf, first, second)))


def all_finite(tree: PyTree) -> jax.Array:
    """[] bool: whether every entry of every leaf is finite."""
    return jnp.array([jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(tree)]).all()


_FEISTEL_ROUNDS = 6


def shuffled_index(key: jax.Array, position: jax.Array, size: int) -> jax.Array:
    """The index at ``position`` of an endless stream of shuffled passes over ``size`` items.

    Pass ``e = position // size`` visits every item once, in an order keyed by ``fold_in(key, e)``.
    The order is a keyed permutation of integers (a Feistel network over the next even power of
    two, walked until it falls below ``size``), so one index costs O(1) and no permutation is
    stored.

    Args:
      key: [] key of the whole stream.
      position: [] integer, up to 2^32 - 1.
      size: number of items, at least 1 and below 2^30.

    Returns:
      [] int32 in ``[0, size)``.

    >>> order = jax.vmap(lambda i: shuffled_index(jax.random.key(0), i, 5))(jnp.arange(10))
    >>> sorted(order[:5].tolist()), sorted(order[5:].tolist())
    ([0, 1, 2, 3, 4], [0, 1, 2, 3, 4])
    """
    if not 1 <= size < 2**30:
        raise ValueError(f"size is {size}; a shuffled stream takes from 1 to 2**30 - 1 items.")
    position = jnp.asarray(position).astype(jnp.uint32)
    half_bits = max(1, ((size - 1).bit_length() + 1) // 2)
    low = jnp.uint32((1 << half_bits) - 1)
    epoch_key = jax.random.fold_in(key, position // jnp.uint32(size))
    round_keys = jax.random.bits(epoch_key, (_FEISTEL_ROUNDS,), jnp.uint32)

    def permute(index):
        left, right = index >> half_bits, index & low
        for round_index in range(_FEISTEL_ROUNDS):
            mixed = (right ^ round_keys[round_index]) * jnp.uint32(0x9E3779B1)
            mixed = (mixed ^ (mixed >> 15)) * jnp.uint32(0x85EBCA77)
            left, right = right, left ^ ((mixed ^ (mixed >> 13)) & low)
        return (left << half_bits) | right

    start = permute(position % jnp.uint32(size))
    return jax.lax.while_loop(lambda i: i >= size, permute, start).astype(jnp.int32)

"""Sums and quadratic forms that are fast under ``vmap``, in full precision on every device.

On CPU, XLA vectorises a matrix product and not a sum over a short last axis.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from ebjax.numerics import full_precision_matmul

__all__ = ["half_quadratic_form", "matrix_product", "repeated", "total"]


def matrix_product(matrix: np.ndarray | jax.Array, vector: jax.Array) -> jax.Array:
    """``matrix @ vector`` in the dtype of ``vector`` and in its full precision."""
    return full_precision_matmul(jnp.asarray(matrix, vector.dtype), vector)


def total(terms: jax.Array) -> jax.Array:
    """[] the sum of ``terms`` [D], as a product with ones."""
    return full_precision_matmul(terms, jnp.ones_like(terms))


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def repeated(x: jax.Array, num: int) -> jax.Array:
    """[num] times ``x`` []. Its gradient is a sum, taken as a product with ones."""
    return jnp.full((num,), x)


@repeated.defjvp
def _repeated_jvp(num, primals, tangents):
    (x,), (tangent,) = primals, tangents
    ones = jnp.ones((1, num), tangent.dtype)
    return repeated(x, num), full_precision_matmul(tangent[None], ones)


def half_quadratic_form(precision: np.ndarray) -> Callable[[jax.Array], jax.Array]:
    """Builds ``c -> c' P c / 2`` whose value and gradient together take one product with P.

    Differentiated as it stands the form would take two, P c and P' c: nothing says that P is
    symmetric. The rule below does, and is itself differentiable, so higher orders are exact too.

    Args:
      precision: P [D, D], symmetric.
    """

    @jax.custom_jvp
    def form(centred):
        return 0.5 * jnp.sum(centred * matrix_product(precision, centred))

    @form.defjvp
    def form_jvp(primals, tangents):
        (centred,), (tangent,) = primals, tangents
        product = matrix_product(precision, centred)
        return 0.5 * jnp.sum(centred * product), jnp.sum(product * tangent)

    return form

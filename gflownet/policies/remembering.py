"""Layers that are evaluated once: what a rollout has computed, its gradient need not compute again.

Trajectories that are scored by the parameters that they were drawn under have been through the
whole forward pass already. ``remembered`` keeps the outputs of the dense layers of a function;
``recalled`` evaluates the function with these in place of the products, whose derivative stays,

    y = x W + b    known,        dy = dx W + x dW + db

so that of the three products a layer, one forward and two backward, two are left.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax

__all__ = ["recalled", "remembered"]


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _known(fn: Callable[..., jax.Array], value: jax.Array, *args: Any) -> jax.Array:
    """``value``, which is ``fn(*args)``, with the derivative that it has."""
    del fn, args
    return value


@_known.defjvp
def _known_jvp(fn, primals, tangents):
    return primals[0], jax.jvp(fn, primals[1:], tangents[1:])[1]


def _affine(x: jax.Array, params: dict[str, jax.Array]) -> jax.Array:
    return x @ params["kernel"] + params.get("bias", 0.0)


def _is_dense(context: nn.module.InterceptorContext) -> bool:
    return type(context.module) is nn.Dense and context.method_name == "__call__"


def remembered(fn: Callable[..., Any], *args: Any) -> tuple[Any, tuple[jax.Array, ...]]:
    """``(fn(*args), outputs)`` of the ``flax.linen.Dense`` layers, in the order of their calls.

    Args:
      fn: calls layers of the usual form (no precision or dtype of their own), none of them within
        a transformation that is inside of ``fn`` (``scan``, ``vmap``, ``jit``).
      *args: its arguments.
    """
    outputs = []

    def keep(next_fn, args, kwargs, context):
        output = next_fn(*args, **kwargs)
        if _is_dense(context):
            outputs.append(output)
        return output

    with nn.intercept_methods(keep):
        return fn(*args), tuple(outputs)


def recalled(fn: Callable[..., Any], outputs: tuple[jax.Array, ...], *args: Any) -> Any:
    """``fn(*args)``, given what its dense layers put out, with the gradient of all of it.

    Args:
      fn: as in ``remembered``.
      outputs: of its layers at these very arguments.
      *args: its arguments.

    Raises:
      ValueError: if ``fn`` has not as many layers as there are outputs.

    >>> import jax.numpy as jnp
    >>> layer = nn.Dense(1)
    >>> params = {"params": {"kernel": jnp.ones((2, 1)), "bias": jnp.zeros(1)}}
    >>> x = jnp.array([3.0, 4.0])
    >>> value, outputs = remembered(layer.apply, params, x)
    >>> gradient = jax.grad(lambda params: recalled(layer.apply, outputs, params, x)[0])(params)
    >>> value.tolist(), gradient["params"]["kernel"].ravel().tolist()
    ([7.0], [3.0, 4.0])
    """
    left = list(outputs)

    def look_up(next_fn, args, kwargs, context):
        if not _is_dense(context):
            return next_fn(*args, **kwargs)
        if not left:
            raise ValueError(f"fn has more than the {len(outputs)} layers that were remembered.")
        return _known(_affine, left.pop(0), args[0], dict(context.module.variables["params"]))

    with nn.intercept_methods(look_up):
        result = fn(*args)
    if left:
        raise ValueError(f"fn has {len(left)} fewer than the {len(outputs)} remembered layers.")
    return result

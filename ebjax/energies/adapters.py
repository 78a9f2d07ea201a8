"""Energies from other people's functions and modules.

    from_function   any f(params, x, *context) -> one number
    from_linen      a flax.linen module
    from_nnx        a flax.nnx module: E(params, x) = merge(graph, params)(x)

What comes out is an ``Energy`` like any other: ``init(key, x) -> params`` and
``apply(params, x, *context) -> []``, pure functions of one example.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from ebjax.types import Energy, Params, bind

if TYPE_CHECKING:
    import flax.linen as nn
    from flax import nnx

__all__ = ["as_scalar", "from_function", "from_linen", "from_nnx"]


def as_scalar(out: Any, name: str) -> jax.Array:
    """``out`` as [], if it is one number of any rank.

    Raises:
      ValueError: naming ``name`` and the shape that it returned.

    >>> as_scalar(jnp.ones((1, 1)), "f").shape
    ()
    """
    if jnp.size(out) != 1:
        raise ValueError(
            f"{name} returned shape {jnp.shape(out)} for one example; an energy returns one number."
        )
    return jnp.reshape(out, ())


def from_function(
    function: Callable[..., Any], init: Callable[[jax.Array, Any], Params] | Params
) -> Energy:
    """An energy from a plain function.

    Args:
      function: ``(params, x, *context) -> one number``, differentiable where it is to be trained
        or followed by a sampler.
      init: ``(key, x) -> params``, or the initial params themselves (then the key is not used).

    Returns:
      An ``Energy``. The output is squeezed to a scalar; more than one number is an error.

    >>> energy = from_function(lambda p, x: p["k"] * jnp.sum(x**2), {"k": jnp.array(0.5)})
    >>> float(energy.apply(energy.init(jax.random.key(0), jnp.zeros(2)), jnp.array([1.0, 3.0])))
    5.0
    """
    made = init if callable(init) else bind(_constant, params=init)
    return Energy(made, bind(_apply_function, function=function))


def _constant(key, x, *context, params):
    del key, x, context
    return params


def _apply_function(params, x, *context, function):
    return as_scalar(function(params, x, *context), getattr(function, "__name__", "The function"))


def from_linen(module: nn.Module) -> Energy:
    """An energy from any linen module that maps one example (and context) to one number.

    The module's output is squeezed to a scalar; more than one number is an error.
    """
    return Energy(bind(_init_module, module=module), bind(_apply_module, module=module))


def _init_module(key, x, *context, module: nn.Module):
    return module.init(key, x, *context)["params"]


def _apply_module(params, x, *context, module: nn.Module):
    out: Any = module.apply({"params": params}, x, *context)
    return as_scalar(out, type(module).__name__)


def from_nnx(build: Callable[[nnx.Rngs], Any]) -> Energy:
    """An energy from an NNX module, which holds its parameters, by taking them out of it.

    Args:
      build: ``rngs -> module``, and ``module(x, *context)`` is one number for one example. It is
        called once here for the structure (without computing), and once in each ``init``.

    Returns:
      An ``Energy`` whose params are a nested dict of arrays.

    Raises:
      ValueError: if the module has state beside its parameters, such as batch statistics, which
        an energy of one example cannot have.

    >>> from flax import nnx
    >>> energy = from_nnx(lambda rngs: nnx.Linear(2, 1, rngs=rngs))
    >>> params = energy.init(jax.random.key(0), jnp.zeros(2))
    >>> sorted(params), energy.apply(params, jnp.ones(2)).shape
    (['bias', 'kernel'], ())
    """
    from flax import nnx

    graph, state = nnx.split(nnx.eval_shape(lambda: build(nnx.Rngs(0))))
    kinds = {
        type(leaf).__name__
        for leaf in jax.tree.leaves(state, is_leaf=lambda node: isinstance(node, nnx.Variable))
        if not isinstance(leaf, nnx.Param)
    }
    if kinds:
        raise ValueError(
            f"The module holds {', '.join(sorted(kinds))} beside its parameters; an energy is a "
            "function of parameters and one example, so build it without (no batch "
            "normalisation, no dropout)."
        )
    return Energy(bind(_init_nnx, build=build), bind(_apply_nnx, graph=graph, state=state))


def _init_nnx(key, x, *context, build):
    from flax import nnx

    del x, context
    return nnx.to_pure_dict(nnx.state(build(nnx.Rngs(key)), nnx.Param))


def _apply_nnx(params, x, *context, graph, state):
    from flax import nnx

    # A fresh copy: the tree of shapes that the structure was read from is never filled in.
    filled = jax.tree.map(lambda leaf: leaf, state)
    nnx.replace_by_pure_dict(filled, params)
    module = nnx.merge(graph, filled)
    return as_scalar(module(x, *context), type(module).__name__)

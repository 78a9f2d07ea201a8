"""Target networks: a copy of the policy that follows it slowly, as a rule of the optimizer.

The copy is a part of ``params``, so that checkpoints, averages and devices treat it as any other;
it gets no gradient, and its update is computed from the leader's new parameters.

    every update     target <- target + rate (policy - target)
    or every K       target <- policy
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from ebjax.types import Params

__all__ = ["TargetState", "with_target"]


class TargetState(NamedTuple):
    """``step`` [] int32, updates done, and the state of the ``inner`` optimizer."""

    step: jax.Array
    inner: optax.OptState


def with_target(
    optimizer: optax.GradientTransformation,
    *,
    rate: float | None = None,
    period: int | None = None,
    leader: str = "policy",
    target: str = "target",
) -> optax.GradientTransformation:
    """An optimizer of ``params`` with a target network among its entries.

    Args:
      optimizer: of the other entries of the dict.
      rate: share of the way to the leader that the target goes at each update, in (0, 1].
      period: or the number of updates between copies, at least 1.
      leader: the entry that is followed.
      target: the entry that follows, of the same structure.

    Raises:
      ValueError: unless one of ``rate`` and ``period`` is given, in range.

    >>> rule = with_target(optax.sgd(1.0), rate=0.5)
    >>> params = {"policy": jnp.array(1.0), "target": jnp.array(0.0)}
    >>> gradient = {"policy": jnp.array(-1.0), "target": jnp.array(7.0)}
    >>> updates, _ = rule.update(gradient, rule.init(params), params)
    >>> {name: float(leaf) for name, leaf in updates.items()}
    {'policy': 1.0, 'target': 1.0}
    """
    if (rate is None) == (period is None):
        raise ValueError(f"rate is {rate} and period is {period}; give one of the two.")
    if rate is not None and not 0 < rate <= 1:
        raise ValueError(f"rate is {rate}; it must lie in (0, 1].")
    if period is not None and period < 1:
        raise ValueError(f"period is {period}; it must be at least 1.")

    def others(tree: Params) -> Params:
        return {name: subtree for name, subtree in tree.items() if name != target}

    def init(params):
        return TargetState(jnp.zeros((), jnp.int32), optimizer.init(others(params)))

    def update(gradient, state, params=None):
        if params is None:
            raise ValueError("params is None; a target network follows them.")
        updates, inner = optimizer.update(others(gradient), state.inner, others(params))
        step = state.step + 1
        new = optax.apply_updates(params[leader], updates[leader])
        share = rate if period is None else jnp.where(step % period == 0, 1.0, 0.0)
        updates[target] = jax.tree.map(
            lambda old, led: jnp.asarray(share, old.dtype) * (led - old), params[target], new
        )
        return updates, TargetState(step, inner)

    return optax.GradientTransformation(init, update)

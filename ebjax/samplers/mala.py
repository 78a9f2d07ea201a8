"""Metropolis-adjusted Langevin algorithm (MALA).

    y = x - h ∇E(x) + sqrt(2hτ) ξ,    accepted with probability min(1, exp(log a)),
    log a = (E(x) - E(y)) / τ + log q(x|y) - log q(y|x),
    log q(y|x) = -|y - x + h ∇E(x)|² / (4hτ) + constant

Leaves exp(-E/τ) exactly invariant for every h.

Roberts and Tweedie, "Exponential convergence of Langevin distributions and their discrete
approximations", Bernoulli 2 (1996).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from ebjax.numerics import all_finite, random_normal_and_uniform
from ebjax.samplers.evaluate import value_and_gradient
from ebjax.types import EnergyFn, Kernel, Params, Position, bind

__all__ = ["MALAInfo", "MALAState", "mala"]


class MALAState(NamedTuple):
    """A point with what the next step needs of it, so that a step costs one gradient.

    Attributes:
      position: the chain's point, any pytree of arrays.
      energy: [] E at the point.
      gradient: ∇E at the point, as ``position``.
      parts: what the energy function wants kept (see ``ebjax.samplers.evaluate``).
    """

    position: Position
    energy: jax.Array
    gradient: Position
    parts: Any = ()


class MALAInfo(NamedTuple):
    """Diagnosis of one step.

    Attributes:
      energy: [] energy after the step.
      gradient_norm: [] norm of the energy's gradient after the step.
      acceptance_rate: [] min(1, a), the probability with which the proposal was accepted.
      is_accepted: [] bool.
      is_finite: [] bool, whether the proposal's energy and gradient were finite and its acceptance
        could be computed (it cannot where the chain starts at NaN). If not, it is rejected.
    """

    energy: jax.Array
    gradient_norm: jax.Array
    acceptance_rate: jax.Array
    is_accepted: jax.Array
    is_finite: jax.Array


def mala(*, step_size: float | jax.Array, temperature: float | jax.Array = 1.0) -> Kernel:
    """Builds the kernel.

    Args:
      step_size: h > 0.
      temperature: τ > 0; the chain's law is exp(-E/τ).

    Returns:
      A ``Kernel`` with ``MALAState`` and ``MALAInfo``. One gradient a step.

    >>> import jax, jax.numpy as jnp
    >>> kernel = mala(step_size=0.5)
    >>> def energy_fn(params, x):
    ...     return 0.5 * jnp.sum((x - params) ** 2)
    >>> state = kernel.init(energy_fn, 1.0, jnp.zeros(2))
    >>> state, info = kernel.step(jax.random.key(0), energy_fn, 1.0, state)
    >>> bool(info.is_accepted)
    True
    """
    return Kernel(init=bind(_init), step=bind(_step, step_size=step_size, temperature=temperature))


def _init(energy_fn: EnergyFn, params: Params, position: Position) -> MALAState:
    return MALAState(position, *value_and_gradient(energy_fn, params, position))


def log_proposal(
    start: MALAState, end: Position, *, step_size: jax.Array, temperature: jax.Array
) -> jax.Array:
    """log q(end | start) without its constant: -|end - start + h ∇E(start)|² / (4hτ)."""
    squares = jax.tree.map(
        lambda y, x, g: jnp.sum(jnp.square(y - x + step_size * g)),
        end,
        start.position,
        start.gradient,
    )
    return -sum(jax.tree.leaves(squares)) / (4.0 * step_size * temperature)


def _step(
    key: jax.Array,
    energy_fn: EnergyFn,
    params: Params,
    state: MALAState,
    *,
    step_size,
    temperature,
) -> tuple[MALAState, MALAInfo]:
    scale = jnp.sqrt(2.0 * step_size * temperature)
    noise, uniform = random_normal_and_uniform(key, state.position)
    position = jax.tree.map(
        lambda x, g, xi: x + (scale * xi - step_size * g).astype(x.dtype),
        state.position,
        state.gradient,
        noise,
    )
    proposal = _init(energy_fn, params, position)
    options = {"step_size": step_size, "temperature": temperature}
    log_acceptance = (
        (state.energy - proposal.energy) / temperature
        + log_proposal(proposal, state.position, **options)
        - log_proposal(state, proposal.position, **options)
    )
    is_finite = all_finite((proposal.energy, proposal.gradient)) & ~jnp.isnan(log_acceptance)
    log_acceptance = jnp.where(is_finite, jnp.minimum(log_acceptance, 0.0), -jnp.inf)
    is_accepted = jnp.log(uniform[0]) < log_acceptance
    new = jax.tree.map(lambda a, b: jnp.where(is_accepted, a, b), proposal, state)
    info = MALAInfo(
        energy=new.energy,
        gradient_norm=optax.tree.norm(new.gradient),
        acceptance_rate=jnp.exp(log_acceptance),
        is_accepted=is_accepted,
        is_finite=is_finite,
    )
    return new, info

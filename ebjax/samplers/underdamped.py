"""Underdamped Langevin dynamics by splitting, and with a Metropolis test (generalised HMC).

    dX = M⁻¹P dt,    dP = -∇E dt - γP dt + sqrt(2γτ) M^½ dW,    law exp(-(E(x) + K(p)) / τ),
    K(p) = p' M⁻¹ p / 2

One step of size h is made of three flows, each exact:

    B(t): p -= t ∇E(x)     A(t): x += t M⁻¹p     O(t): p = c p + sqrt(τ (1 - c²)) M^½ ξ, c = e^{-γt}

    BAOAB   B(h/2) A(h/2) O(h) A(h/2) B(h/2)
    OBABO   O(h/2) B(h/2) A(h) B(h/2) O(h/2)

Each of them leaves the law invariant, but the energy changes in A and B; that change Δ is the error
of the step. Both laws of x differ from exp(-E/τ) by O(h²) (overdamped Langevin's: by O(h)); on a
Gaussian of precision λ (M = 1) BAOAB's is exact, and OBABO's variance is τ / (λ (1 - λh²/4)).
The Metropolis test accepts A and B with min(1, exp(-Δ/τ)) and reverses the momentum where it does
not: then exp(-(E + K)/τ) is exactly invariant. With γ = ∞, OBABO is MALA of step h²/2.

Leimkuhler and Matthews, "Rational construction of stochastic numerical methods for molecular
sampling", Applied Mathematics Research eXpress (2013). Bussi and Parrinello, "Accurate sampling
using Langevin dynamics", Physical Review E 75 (2007). Horowitz, "A generalized guided Monte Carlo
algorithm", Physics Letters B 268 (1991).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy.typing as npt

from ebjax.numerics import all_finite, inner_product, random_normal_and_uniform
from ebjax.samplers import decision
from ebjax.samplers.evaluate import value_and_gradient
from ebjax.samplers.langevin import check_positive
from ebjax.samplers.metric import Metric, make_metric, momentum, velocity
from ebjax.types import EnergyFn, Kernel, Params, Position, bind

__all__ = ["UnderdampedInfo", "UnderdampedState", "underdamped"]

SPLITTINGS = ("BAOAB", "OBABO")


class UnderdampedState(NamedTuple):
    """A point in phase space with what the next step needs of it: a step costs one gradient.

    Attributes:
      position: the chain's point, any pytree of arrays.
      momentum: P, as ``position``. Zero at the start; its law N(0, τM) is reached after some 1/γ.
      energy: [] E at the point.
      gradient: ∇E at the point, as ``position``.
      parts: what the energy function wants kept (see ``ebjax.samplers.evaluate``).
    """

    position: Position
    momentum: Position
    energy: jax.Array
    gradient: Position
    parts: Any = ()


class UnderdampedInfo(NamedTuple):
    """Diagnosis of one step.

    Attributes:
      energy: [] energy after the step.
      gradient_norm: [] norm of the energy's gradient after the step.
      acceptance_rate: [] min(1, exp(-Δ/τ)): the probability with which the step was accepted, or,
        without a Metropolis test, would have been. Far below 1 the step is too large.
      is_accepted: [] bool; ``True`` without a test.
      is_finite: [] bool, whether energy and gradient at the proposed point and Δ are finite (Δ may
        be -inf). If not, the test rejects; without one, no later position is finite either.
    """

    energy: jax.Array
    gradient_norm: jax.Array
    acceptance_rate: jax.Array
    is_accepted: jax.Array
    is_finite: jax.Array


def underdamped(
    *,
    step_size: float | jax.Array,
    friction: float | jax.Array,
    temperature: float | jax.Array = 1.0,
    inverse_mass: npt.ArrayLike | None = None,
    splitting: str = "BAOAB",
    metropolis: bool = False,
) -> Kernel:
    """Builds the kernel.

    Args:
      step_size: h > 0, in time: below 2 / sqrt(λ) for the largest precision λ, beyond which a
        chain without a test is unstable.
      friction: γ > 0, infinite too: the rate at which momentum is forgotten. Near twice the square
        root of the smallest precision a Gaussian mixes best.
      temperature: τ > 0; the chain's law is exp(-E/τ).
      inverse_mass: M⁻¹, ``None`` for the identity, the diagonal [D] or a positive definite [D, D]
        over the raveled position; best near the covariance of the law.
      splitting: static, "BAOAB" or "OBABO". Without a test BAOAB's positions are the more accurate;
        with one OBABO, which tests less of the step.
      metropolis: static, whether to test, so that the law is exact.

    Returns:
      A ``Kernel`` with ``UnderdampedState`` and ``UnderdampedInfo``. One gradient a step.

    Raises:
      ValueError: naming the option that is out of range.

    >>> import jax, jax.numpy as jnp
    >>> kernel = underdamped(step_size=0.5, friction=1.0)
    >>> def energy_fn(params, x):
    ...     return 0.5 * jnp.sum((x - params) ** 2)
    >>> state = kernel.init(energy_fn, 1.0, jnp.zeros(2))
    >>> state, info = kernel.step(jax.random.key(0), energy_fn, 1.0, state)
    >>> bool(info.acceptance_rate > 0.9)
    True
    """
    check_positive("step_size", step_size)
    check_positive("friction", friction)
    check_positive("temperature", temperature)
    if splitting not in SPLITTINGS:
        raise ValueError(f"splitting is {splitting!r}; it must be one of {', '.join(SPLITTINGS)}.")
    step = bind(
        _step,
        step_size=step_size,
        friction=friction,
        temperature=temperature,
        metric=make_metric(inverse_mass),
        splitting=splitting,
        metropolis=metropolis,
    )
    return Kernel(init=bind(_init), step=step)


def _init(energy_fn: EnergyFn, params: Params, position: Position) -> UnderdampedState:
    still = jax.tree.map(jnp.zeros_like, position)
    return UnderdampedState(position, still, *value_and_gradient(energy_fn, params, position))


def _move(start: Position, size: Any, direction: Position) -> Position:
    """``start + size * direction`` in the dtypes of ``start``."""
    return jax.tree.map(lambda a, b: a + (size * b).astype(a.dtype), start, direction)


def _refresh(metric: Metric, p: Position, noise: Position, decay: Any, temperature: Any):
    """O with γt = ``decay``: p = c p + sqrt(τ (1 - c²)) M^½ ξ."""
    scale = jnp.sqrt(-temperature * jnp.expm1(-2.0 * decay))
    kept = jax.tree.map(lambda leaf: (jnp.exp(-decay) * leaf).astype(leaf.dtype), p)
    return _move(kept, scale, momentum(metric, noise))


def _kick_work(metric: Metric, before: Position, after: Position, gradient: Position) -> jax.Array:
    """``-∇E' M⁻¹ (p + p')``, 4/h times the change K(p') - K(p) in a kick p' = p - h/2 ∇E."""
    total = velocity(metric, jax.tree.map(jnp.add, before, after))
    return -inner_product(gradient, total)


def _reverse(state: UnderdampedState) -> UnderdampedState:
    """The same point with time running backwards: what a refusal leads to."""
    return state._replace(momentum=jax.tree.map(jnp.negative, state.momentum))


def _step(
    key: jax.Array,
    energy_fn: EnergyFn,
    params: Params,
    state: UnderdampedState,
    *,
    step_size,
    friction,
    temperature,
    metric,
    splitting,
    metropolis,
) -> tuple[UnderdampedState, UnderdampedInfo]:
    half = 0.5 * step_size
    if splitting == "BAOAB":
        noise, uniform = random_normal_and_uniform(key, state.momentum)
    else:
        pair = (state.momentum, state.momentum)
        (noise, last_noise), uniform = random_normal_and_uniform(key, pair)
        start = _refresh(metric, state.momentum, noise, half * friction, temperature)
        state = state._replace(momentum=start)
    kicked = _move(state.momentum, -half, state.gradient)
    if splitting == "BAOAB":
        position = _move(state.position, half, velocity(metric, kicked))
        before = _refresh(metric, kicked, noise, step_size * friction, temperature)
        position = _move(position, half, velocity(metric, before))
    else:
        position = _move(state.position, step_size, velocity(metric, kicked))
        before = kicked
    energy, gradient, parts = value_and_gradient(energy_fn, params, position)
    after = _move(before, -half, gradient)
    proposal = UnderdampedState(position, after, energy, gradient, parts)
    work = _kick_work(metric, state.momentum, kicked, state.gradient)
    work += _kick_work(metric, before, after, gradient)
    log_acceptance = (state.energy - energy - 0.5 * half * work) / temperature
    is_finite = all_finite((energy, gradient)) & ~jnp.isnan(log_acceptance)
    log_acceptance = jnp.where(is_finite, log_acceptance, -jnp.inf)
    is_accepted, acceptance_rate = decision.metropolis(uniform[0], log_acceptance)
    if metropolis:
        new = decision.select(is_accepted, proposal, _reverse(state))
    else:
        new, is_accepted = proposal, jnp.ones((), bool)
    if splitting == "OBABO":
        end = _refresh(metric, new.momentum, last_noise, half * friction, temperature)
        new = new._replace(momentum=end)
    info = UnderdampedInfo(
        energy=new.energy,
        gradient_norm=jnp.sqrt(inner_product(new.gradient, new.gradient)),
        acceptance_rate=acceptance_rate,
        is_accepted=is_accepted,
        is_finite=is_finite,
    )
    return new, info

"""Hamiltonian Monte Carlo (HMC).

    ξ ~ N(0, I),    (y, η) = L leapfrog steps of size h from (x, ξ),
    y accepted with probability min(1, exp(H(x, ξ) - H(y, η))),    H(x, ξ) = E(x) + ξ'ξ / 2

Leaves exp(-E) exactly invariant for every h, L and mass matrix: the leapfrog map conserves volume
and is its own inverse after a flip of the momentum, which the next draw of ξ makes needless.

Duane, Kennedy, Pendleton and Roweth, "Hybrid Monte Carlo", Physics Letters B 195 (1987).
Neal, "MCMC using Hamiltonian dynamics", Handbook of Markov Chain Monte Carlo, 2011.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

from ebjax.numerics import inner_product, random_normal_and_uniform
from ebjax.samplers.decision import metropolis, select
from ebjax.samplers.evaluate import GradientState, init_with_gradient, value_and_gradient
from ebjax.samplers.hamiltonian import (
    Phase,
    any_chain,
    check_step_size,
    drift,
    kick,
)
from ebjax.samplers.metric import Metric, make_metric, scaled_gradient
from ebjax.types import EnergyFn, Kernel, Params, Position, bind

__all__ = ["HMCInfo", "hmc"]

_DIVERGENCE_THRESHOLD = 1000.0


class HMCInfo(NamedTuple):
    """Diagnosis of one transition.

    Attributes:
      energy: [] E after the transition.
      acceptance_rate: [] the probability with which the end of the trajectory was accepted.
      is_accepted: [] bool.
      is_finite: [] bool, whether the end of the trajectory had a finite H and its acceptance could
        be computed (it cannot where the chain starts at NaN). If not, it is rejected.
      is_divergent: [] bool, whether H grew by more than 1000 or is not finite: h is too large for
        the curvature met.
      energy_error: [] H at the end of the trajectory less H at its start.
      num_evaluations: [] int32, leapfrog steps, each of which takes one gradient.
    """

    energy: jax.Array
    acceptance_rate: jax.Array
    is_accepted: jax.Array
    is_finite: jax.Array
    is_divergent: jax.Array
    energy_error: jax.Array
    num_evaluations: jax.Array


def hmc(
    *,
    step_size: float | jax.Array,
    num_steps: int,
    inverse_mass: npt.ArrayLike | None = None,
    jitter: float | jax.Array = 0.0,
    random_length: bool = False,
) -> Kernel:
    """Builds the kernel.

    Where the lengths of trajectories are all equal, a chain on a nearly Gaussian law may come back
    to where it was, again and again; ``jitter`` and ``random_length`` prevent that.

    Args:
      step_size: h > 0, in units of the position (divided by those of F, if there is a mass).
      num_steps: L, leapfrog steps of a trajectory, static, at least 1.
      inverse_mass: M⁻¹, the diagonal [D] or a matrix [D, D] over the D components of the position
        raveled; ``None`` is the identity. Best near the covariance of the law.
      jitter: in [0, 1); the step size of each transition is ``h`` times a uniform draw from
        ``[1 - jitter, 1 + jitter]``.
      random_length: whether the number of steps of each transition is drawn uniformly from 1 to
        ``num_steps``. Chains under ``vmap`` take the time of the longest of them, and there is no
        reverse-mode gradient through such a transition.

    Returns:
      A ``Kernel`` with ``GradientState`` and ``HMCInfo``. L gradients a transition.

    Raises:
      ValueError: naming the option that is out of range.

    >>> import jax, jax.numpy as jnp
    >>> kernel = hmc(step_size=0.5, num_steps=4)
    >>> def energy_fn(params, x):
    ...     return 0.5 * jnp.sum((x - params) ** 2)
    >>> state = kernel.init(energy_fn, 1.0, jnp.zeros(2))
    >>> state, info = kernel.step(jax.random.key(0), energy_fn, 1.0, state)
    >>> bool(info.is_accepted), bool(abs(info.energy_error) < 0.1)
    (True, True)
    """
    check_step_size(step_size)
    if not isinstance(num_steps, (int, np.integer)) or num_steps < 1:
        raise ValueError(f"num_steps is {num_steps}; it must be an integer, at least 1.")
    if isinstance(jitter, (int, float)) and not 0.0 <= jitter < 1.0:
        raise ValueError(f"jitter is {jitter}; it must be at least 0 and below 1.")
    return Kernel(
        init=bind(init_with_gradient),
        step=bind(
            _step,
            step_size=step_size,
            num_steps=int(num_steps),
            metric=make_metric(inverse_mass),
            jitter=jitter,
            random_length=bool(random_length),
        ),
        num_evaluations=None if random_length else int(num_steps),
    )


def _trajectory(
    energy_fn: EnergyFn,
    params: Params,
    metric: Metric,
    phase: Phase,
    step: jax.Array,
    length: int | jax.Array,
) -> tuple[Position, GradientState]:
    """``length`` leapfrog steps, the kicks between two of them joined: momentum and state."""

    def advance(position, momentum, step):
        # The momentum is half a kick ahead of the position before and after.
        position = drift(metric, position, momentum, step)
        gradient = value_and_gradient(energy_fn, params, position)[1]
        return position, kick(momentum, scaled_gradient(metric, gradient), step)

    position, momentum = phase.position, kick(phase.momentum, phase.force, 0.5 * step)
    if isinstance(length, int):
        position, momentum = jax.lax.fori_loop(
            1, length, lambda i, loop: advance(loop[0], loop[1], step), (position, momentum)
        )
    else:
        # A chain that has reached its length stands still, its step being zero.
        def masked(loop):
            i, position, momentum = loop
            return i + 1, *advance(position, momentum, jnp.where(i < length, step, 0.0))

        _, position, momentum = jax.lax.while_loop(
            lambda loop: any_chain(loop[0] < length), masked, (jnp.int32(1), position, momentum)
        )
    end = init_with_gradient(energy_fn, params, drift(metric, position, momentum, step))
    return kick(momentum, scaled_gradient(metric, end.gradient), 0.5 * step), end


def _step(
    key: jax.Array,
    energy_fn: EnergyFn,
    params: Params,
    state: GradientState,
    *,
    step_size,
    num_steps,
    metric,
    jitter,
    random_length,
) -> tuple[GradientState, HMCInfo]:
    momentum, uniform = random_normal_and_uniform(key, state.position, 3)
    step = step_size * (1.0 + jitter * (2.0 * uniform[1] - 1.0))
    # Truncation makes it uniform on 1 ... L; the minimum guards L beyond the bits of a float.
    length = num_steps
    if random_length:
        length = jnp.minimum(1 + (uniform[2] * num_steps).astype(jnp.int32), num_steps)
    start = Phase(state.position, momentum, scaled_gradient(metric, state.gradient))
    end_momentum, proposal = _trajectory(energy_fn, params, metric, start, step, length)
    kinetic, kinetic_end = (0.5 * inner_product(xi, xi) for xi in (momentum, end_momentum))
    energy_error = (proposal.energy - state.energy) + (kinetic_end - kinetic)
    # A gradient that is not finite makes the kinetic energy so: no need to look at its components.
    is_finite = jnp.isfinite(proposal.energy + kinetic_end) & ~jnp.isnan(energy_error)
    log_acceptance = jnp.where(is_finite, -energy_error, -jnp.inf)
    is_accepted, acceptance_rate = metropolis(uniform[0], log_acceptance)
    new = select(is_accepted, proposal, state)
    info = HMCInfo(
        energy=new.energy,
        acceptance_rate=acceptance_rate,
        is_accepted=is_accepted,
        is_finite=is_finite,
        is_divergent=~(energy_error <= _DIVERGENCE_THRESHOLD),
        energy_error=energy_error,
        num_evaluations=jnp.asarray(length, jnp.int32),
    )
    return new, info

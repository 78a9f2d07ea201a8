"""Random-walk Metropolis: one evaluation a step, no gradient.

    y = x + s F ξ,    ξ ~ N(0, I),    F F' = M⁻¹,    accepted with probability
    min(1, exp((E(x) - E(y)) / τ))

Leaves exp(-E/τ) exactly invariant, also where E is not differentiable. On a smooth law of D
dimensions with covariance M⁻¹, s ≈ 2.4 / sqrt(D) accepts about a quarter and mixes best.

Metropolis et al., "Equation of state calculations by fast computing machines", Journal of Chemical
Physics 21 (1953). Roberts, Gelman and Gilks, "Weak convergence and optimal scaling of random walk
Metropolis algorithms", Annals of Applied Probability 7 (1997).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy.typing as npt

from ebjax.numerics import random_normal_and_uniform
from ebjax.samplers.decision import metropolis, select
from ebjax.samplers.evaluate import value
from ebjax.samplers.langevin import check_positive
from ebjax.samplers.metric import make_metric, scaled_noise
from ebjax.types import EnergyFn, Kernel, Params, Position, bind

__all__ = ["RandomWalkInfo", "RandomWalkState", "random_walk"]


class RandomWalkState(NamedTuple):
    """A point with its energy, so that a step costs one evaluation.

    Attributes:
      position: the chain's point, any pytree of arrays.
      energy: [] E at the point.
      parts: what the energy function wants kept (see ``ebjax.samplers.evaluate``).
    """

    position: Position
    energy: jax.Array
    parts: Any = ()


class RandomWalkInfo(NamedTuple):
    """Diagnosis of one step.

    Attributes:
      energy: [] energy after the step.
      acceptance_rate: [] the probability with which the proposal was accepted.
      is_accepted: [] bool.
      is_finite: [] bool, whether the proposal's energy was finite and its acceptance could be
        computed (it cannot where the chain starts at NaN). If not, it is rejected.
    """

    energy: jax.Array
    acceptance_rate: jax.Array
    is_accepted: jax.Array
    is_finite: jax.Array


def random_walk(
    *,
    step_size: float | jax.Array,
    temperature: float | jax.Array = 1.0,
    inverse_mass: npt.ArrayLike | None = None,
) -> Kernel:
    """Builds the kernel.

    Args:
      step_size: s > 0, the scale of the proposal: its standard deviation where M is the identity.
      temperature: τ > 0; the chain's law is exp(-E/τ).
      inverse_mass: M⁻¹, ``None`` for the identity, the diagonal [D] or a positive definite [D, D]
        over the raveled position; best near the covariance of the law.

    Returns:
      A ``Kernel`` with ``RandomWalkState`` and ``RandomWalkInfo``. One evaluation a step.

    Raises:
      ValueError: naming the option that is out of range.

    >>> import jax, jax.numpy as jnp
    >>> kernel = random_walk(step_size=1.0)
    >>> def energy_fn(params, x):  # uniform on a disc: no gradient leads anywhere
    ...     return jnp.where(jnp.sum(x**2) < params, 0.0, jnp.inf)
    >>> state = kernel.init(energy_fn, 4.0, jnp.zeros(2))
    >>> state, info = kernel.step(jax.random.key(0), energy_fn, 4.0, state)
    >>> float(info.energy)
    0.0
    """
    check_positive("step_size", step_size)
    check_positive("temperature", temperature)
    options = {
        "step_size": step_size,
        "temperature": temperature,
        "metric": make_metric(inverse_mass),
    }
    return Kernel(init=bind(_init), step=bind(_step, **options))


def _init(energy_fn: EnergyFn, params: Params, position: Position) -> RandomWalkState:
    return RandomWalkState(position, *value(energy_fn, params, position))


def _step(
    key: jax.Array,
    energy_fn: EnergyFn,
    params: Params,
    state: RandomWalkState,
    *,
    step_size,
    temperature,
    metric,
) -> tuple[RandomWalkState, RandomWalkInfo]:
    noise, uniform = random_normal_and_uniform(key, state.position)
    position = jax.tree.map(
        lambda x, xi: x + (step_size * xi).astype(x.dtype),
        state.position,
        scaled_noise(metric, noise),
    )
    proposal = _init(energy_fn, params, position)
    log_acceptance = (state.energy - proposal.energy) / temperature
    is_finite = jnp.isfinite(proposal.energy) & ~jnp.isnan(log_acceptance)
    log_acceptance = jnp.where(is_finite, log_acceptance, -jnp.inf)
    is_accepted, acceptance_rate = metropolis(uniform[0], log_acceptance)
    new = select(is_accepted, proposal, state)
    info = RandomWalkInfo(
        energy=new.energy,
        acceptance_rate=acceptance_rate,
        is_accepted=is_accepted,
        is_finite=is_finite,
    )
    return new, info

"""Metropolis-adjusted Langevin algorithm (MALA).

    y = x - h M⁻¹ ∇E(x) + sqrt(2hτ) F ξ,    ξ ~ N(0, I),    F F' = M⁻¹,

accepted with probability min(1, exp(log a)). With q(y|x) the density of y,

    log a = (E(x) - E(y)) / τ + log q(x|y) - log q(y|x),
    log q(x|y) - log q(y|x) = [(y - x)'(∇E(x) + ∇E(y)) + h (K(∇E(x)) - K(∇E(y)))] / 2τ,
    K(g) = g' M⁻¹ g / 2,

as the quadratic form of y - x in M is the same both ways: M itself is not needed.
Leaves exp(-E/τ) exactly invariant for every h and M.

Roberts and Tweedie, "Exponential convergence of Langevin distributions and their discrete
approximations", Bernoulli 2 (1996). Roberts and Stramer, "Langevin diffusions and
Metropolis-Hastings algorithms", Methodology and Computing in Applied Probability 4 (2002).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy.typing as npt

from ebjax.numerics import all_finite, inner_product, random_normal_and_uniform
from ebjax.samplers.decision import metropolis, select
from ebjax.samplers.evaluate import GradientState, init_with_gradient
from ebjax.samplers.langevin import check_positive
from ebjax.samplers.metric import Metric, kinetic_energy, make_metric, scaled_noise, velocity
from ebjax.types import EnergyFn, Kernel, Params, bind

__all__ = ["MALAInfo", "mala"]


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


def mala(
    *,
    step_size: float | jax.Array,
    temperature: float | jax.Array = 1.0,
    inverse_mass: npt.ArrayLike | None = None,
) -> Kernel:
    """Builds the kernel.

    Args:
      step_size: h > 0.
      temperature: τ > 0; the chain's law is exp(-E/τ).
      inverse_mass: M⁻¹, ``None`` for the identity, the diagonal [D] or a positive definite [D, D]
        over the raveled position; best near the covariance of the law.

    Returns:
      A ``Kernel`` with ``GradientState`` and ``MALAInfo``. One gradient a step.

    Raises:
      ValueError: naming the option that is out of range.

    >>> import jax, jax.numpy as jnp
    >>> kernel = mala(step_size=0.5)
    >>> def energy_fn(params, x):
    ...     return 0.5 * jnp.sum((x - params) ** 2)
    >>> state = kernel.init(energy_fn, 1.0, jnp.zeros(2))
    >>> state, info = kernel.step(jax.random.key(0), energy_fn, 1.0, state)
    >>> bool(info.is_accepted)
    True
    """
    check_positive("step_size", step_size)
    check_positive("temperature", temperature)
    options = {
        "step_size": step_size,
        "temperature": temperature,
        "metric": make_metric(inverse_mass),
    }
    return Kernel(init=bind(init_with_gradient), step=bind(_step, **options))


def log_proposal_ratio(
    start: GradientState, end: GradientState, *, step_size: Any, temperature: Any, metric: Metric
) -> jax.Array:
    """[] log q(start | end) - log q(end | start)."""
    move = jax.tree.map(jnp.subtract, end.position, start.position)
    work = inner_product(move, jax.tree.map(jnp.add, start.gradient, end.gradient))
    drifts = kinetic_energy(metric, start.gradient) - kinetic_energy(metric, end.gradient)
    return 0.5 * (work + step_size * drifts) / temperature


def _step(
    key: jax.Array,
    energy_fn: EnergyFn,
    params: Params,
    state: GradientState,
    *,
    step_size,
    temperature,
    metric,
) -> tuple[GradientState, MALAInfo]:
    scale = jnp.sqrt(2.0 * step_size * temperature)
    noise, uniform = random_normal_and_uniform(key, state.position)
    position = jax.tree.map(
        lambda x, g, xi: x + (scale * xi - step_size * g).astype(x.dtype),
        state.position,
        velocity(metric, state.gradient),
        scaled_noise(metric, noise),
    )
    proposal = init_with_gradient(energy_fn, params, position)
    options = {"step_size": step_size, "temperature": temperature, "metric": metric}
    log_acceptance = (state.energy - proposal.energy) / temperature
    log_acceptance += log_proposal_ratio(state, proposal, **options)
    is_finite = all_finite((proposal.energy, proposal.gradient)) & ~jnp.isnan(log_acceptance)
    log_acceptance = jnp.where(is_finite, log_acceptance, -jnp.inf)
    is_accepted, acceptance_rate = metropolis(uniform[0], log_acceptance)
    new = select(is_accepted, proposal, state)
    info = MALAInfo(
        energy=new.energy,
        gradient_norm=jnp.sqrt(inner_product(new.gradient, new.gradient)),
        acceptance_rate=acceptance_rate,
        is_accepted=is_accepted,
        is_finite=is_finite,
    )
    return new, info

"""Discrete Langevin proposal: every site at once, each from its own softmax of the gradient.

    q(y | x) = Π_i softmax_{y_i}( -β Δ_i(y_i) / τ - |y_i - x_i|² / (2α) ),
    Δ_i(y_i) = ∇_i E(x) · (y_i - x_i)

With the Metropolis test (DMALA) the law exp(-E/τ) is exactly invariant for every step size α.
Without it (DULA) the chain has a law of its own, which tends to exp(-E/τ) as α → 0 for energies
that are quadratic (and is near it where they nearly are). A changed one-hot site has
|y_i - x_i|² = 2, a changed binary one 1.

The gradient weighs a change by t^β of the ratio t = exp(-Δ/τ) that it predicts. β = 1/2 balances
small steps, and 1 large ones, where sites are drawn anew: with sites that do not interact, α → ∞
and β = 1 draws from the law itself. Between them the step size may be tuned, as ``warmup`` does
with ``metric="identity"``, to an acceptance of 0.574.

Zhang, Liu and Liu, "A Langevin-like sampler for discrete distributions", ICML 2022.
Sun, Dai, Sutton, Schuurmans and Dai, "Any-scale balanced samplers for discrete space", ICLR 2023.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from ebjax.numerics import all_finite
from ebjax.samplers.decision import select
from ebjax.samplers.discrete import (
    DiscreteInfo,
    DiscreteState,
    accept_or_stay,
    as_sites,
    check_num_categories,
    check_positive,
    choose_category,
    count_changed,
    energy_changes,
    init_with_gradient,
    uniforms,
)
from ebjax.types import EnergyFn, Kernel, Params, Position, bind

__all__ = ["discrete_langevin"]


def discrete_langevin(
    *,
    step_size: float | jax.Array,
    num_categories: int | None = None,
    temperature: float | jax.Array = 1.0,
    gradient_power: float | jax.Array = 0.5,
    is_adjusted: bool = True,
) -> Kernel:
    """Builds the kernel.

    Args:
      step_size: α > 0. At α → 0 nothing moves; at α → ∞ every site that the gradient leaves
        undecided is drawn anew.
      num_categories: ``None`` for binary positions in {0, 1}, or K for one-hot ones [..., K].
      temperature: τ > 0; the chain's law is exp(-E/τ).
      gradient_power: β > 0, from 0.5 for small steps to 1 for large ones.
      is_adjusted: static; with the Metropolis test (DMALA) or without (DULA).

    Returns:
      A ``Kernel`` with ``DiscreteState`` and ``DiscreteInfo``. One gradient a step. Unadjusted, a
      proposal is still refused where its energy or gradient is not finite.

    Raises:
      ValueError: naming the option that is out of range.

    >>> import jax, jax.numpy as jnp
    >>> kernel = discrete_langevin(step_size=0.5, num_categories=3)
    >>> def energy_fn(params, x):
    ...     return jnp.sum(params * x)
    >>> state = kernel.init(energy_fn, jnp.arange(3.0), jnp.eye(3)[jnp.array([0, 1])])
    >>> state, info = kernel.step(jax.random.key(0), energy_fn, jnp.arange(3.0), state)
    >>> state.position.sum(-1).tolist()
    [1.0, 1.0]
    """
    check_num_categories(num_categories)
    check_positive(step_size=step_size, temperature=temperature, gradient_power=gradient_power)
    return Kernel(
        init=bind(init_with_gradient),
        step=bind(
            _step,
            step_size=step_size,
            num_categories=num_categories,
            temperature=temperature,
            gradient_power=gradient_power,
            is_adjusted=is_adjusted,
        ),
    )


def site_logits(
    state: DiscreteState, *, step_size, num_categories, temperature, gradient_power=0.5
) -> jax.Array:
    """Logits of a flip [N], or of every value [N, K], up to a constant a site."""
    sites = as_sites(state.position, num_categories)[0]
    gradient = as_sites(state.gradient, num_categories)[0]
    drift = -gradient_power * energy_changes(sites, gradient, num_categories) / temperature
    if num_categories is None:
        return drift - 0.5 / step_size
    return drift - jnp.where(sites > 0.5, 0.0, 1.0 / step_size)


def log_proposal(start: DiscreteState, end: Position, *, num_categories, **options) -> jax.Array:
    """log q(end | start), a sum over sites."""
    logits = site_logits(start, num_categories=num_categories, **options)
    old, new = (as_sites(tree, num_categories)[0] for tree in (start.position, end))
    if num_categories is None:
        return jnp.sum(jax.nn.log_sigmoid(jnp.where(old != new, logits, -logits)))
    # A sum over the chosen entries and not a product, which would be NaN at a logit of -inf.
    return jnp.sum(jnp.where(new > 0.5, jax.nn.log_softmax(logits), 0.0))


def _step(
    key: jax.Array,
    energy_fn: EnergyFn,
    params: Params,
    state: DiscreteState,
    *,
    is_adjusted,
    **options,
) -> tuple[DiscreteState, DiscreteInfo]:
    num_categories, temperature = options["num_categories"], options["temperature"]
    sites, restore = as_sites(state.position, num_categories)
    uniform = uniforms(key, (len(sites) + 1,), sites.dtype)
    logits = site_logits(state, **options)
    if num_categories is None:
        moved = jnp.where(uniform[:-1] < jax.nn.sigmoid(logits), 1.0 - sites, sites)
    else:
        moved = choose_category(uniform[:-1], logits)
    proposal = init_with_gradient(energy_fn, params, restore(moved))
    if is_adjusted:
        log_acceptance = (
            (state.energy - proposal.energy) / temperature
            + log_proposal(proposal, state.position, **options)
            - log_proposal(state, proposal.position, **options)
        )
        return accept_or_stay(uniform[-1], log_acceptance, state, proposal, num_categories)
    is_finite = all_finite((state.gradient, proposal.energy, proposal.gradient))
    new = select(is_finite, proposal, state)
    info = DiscreteInfo(
        energy=new.energy,
        acceptance_rate=is_finite.astype(sites.dtype),
        is_accepted=is_finite,
        num_changed=count_changed(state.position, new.position, num_categories),
        is_finite=is_finite,
    )
    return new, info

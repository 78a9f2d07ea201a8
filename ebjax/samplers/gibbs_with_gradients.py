"""Gibbs with gradients: one site at a time, chosen where the gradient says that it pays.

    q(move | x) ∝ g(exp(-Δ_move(x) / τ)),    Δ_move(x) = ∇_i E(x) · (new x_i - old x_i)
    a = min(1, exp((E(x) - E(y)) / τ) q(move back | y) / q(move | x))

with g(t) = √t unless chosen otherwise. Leaves exp(-E/τ) exactly invariant for any differentiable
energy; the gradient only has to be a guide.

Grathwohl et al., "Oops I took a gradient: scalable sampling for discrete distributions", ICML 2021.
"""

from __future__ import annotations

import jax

from ebjax.samplers.discrete import (
    DiscreteInfo,
    DiscreteState,
    accept_or_stay,
    apply_move,
    as_sites,
    check_balancing,
    check_num_categories,
    check_positive,
    choose,
    init_with_gradient,
    move_log_weights,
    uniforms,
)
from ebjax.types import EnergyFn, Kernel, Params, bind

__all__ = ["gibbs_with_gradients"]


def gibbs_with_gradients(
    *,
    num_categories: int | None = None,
    temperature: float | jax.Array = 1.0,
    balancing: str = "sqrt",
) -> Kernel:
    """Builds the kernel.

    Args:
      num_categories: ``None`` for binary positions in {0, 1}, or K for one-hot ones [..., K].
      temperature: τ > 0; the chain's law is exp(-E/τ).
      balancing: g: ``"sqrt"``, ``"barker"`` (t/(1+t)), ``"min"`` or ``"max"`` of 1 and t.

    Returns:
      A ``Kernel`` with ``DiscreteState`` and ``DiscreteInfo``. One gradient a step.

    Raises:
      ValueError: naming the option that is out of range.

    >>> import jax, jax.numpy as jnp
    >>> kernel = gibbs_with_gradients()
    >>> def energy_fn(params, x):
    ...     return -jnp.sum(params * x) + x[0] * x[1]
    >>> params = jnp.array([1.0, -0.5, 2.0])
    >>> state = kernel.init(energy_fn, params, jnp.zeros(3))
    >>> state, info = kernel.step(jax.random.key(0), energy_fn, params, state)
    >>> int(info.num_changed) == int(info.is_accepted)
    True
    """
    check_num_categories(num_categories)
    check_positive(temperature=temperature)
    check_balancing(balancing)
    return Kernel(
        init=bind(init_with_gradient),
        step=bind(
            _step, num_categories=num_categories, temperature=temperature, balancing=balancing
        ),
    )


def log_proposal(state: DiscreteState, **options) -> jax.Array:
    """log q(move | x) of every move: [N] of the flips, or [N K] with -inf for those that stay."""
    return jax.nn.log_softmax(move_log_weights(state, **options).reshape(-1))


def _step(
    key: jax.Array, energy_fn: EnergyFn, params: Params, state: DiscreteState, **options
) -> tuple[DiscreteState, DiscreteInfo]:
    num_categories, temperature = options["num_categories"], options["temperature"]
    sites, restore = as_sites(state.position, num_categories)
    uniform = uniforms(key, (3,), sites.dtype)
    log_forward = log_proposal(state, **options)
    move = choose(uniform[:2], log_forward)
    moved, back = apply_move(sites, move, num_categories)
    proposal = init_with_gradient(energy_fn, params, restore(moved))
    log_backward = log_proposal(proposal, **options)
    log_acceptance = (
        (state.energy - proposal.energy) / temperature + log_backward[back] - log_forward[move]
    )
    return accept_or_stay(uniform[2], log_acceptance, state, proposal, num_categories)

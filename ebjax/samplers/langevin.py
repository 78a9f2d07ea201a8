"""Unadjusted Langevin algorithm (ULA).

    x' = x - h ∇E(x) + s ξ,    ξ ~ N(0, I),    s = sqrt(2 h τ) unless set apart

The Euler-Maruyama discretisation of dX = -∇E dt + sqrt(2τ) dW, whose law is proportional to
exp(-E/τ). Without a Metropolis test its own stationary law differs from that by O(h). For a
Gaussian with precision λ it is a Gaussian with variance s² / (1 - (1 - hλ)²).

Roberts and Tweedie, "Exponential convergence of Langevin distributions and their discrete
approximations", Bernoulli 2 (1996).
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from ebjax.numerics import all_finite, random_normal_like
from ebjax.samplers.evaluate import value_and_gradient
from ebjax.types import EnergyFn, Kernel, Params, Position, bind

__all__ = ["LangevinInfo", "LangevinState", "langevin"]


class LangevinState(NamedTuple):
    """``position``: the chain's point, any pytree of arrays."""

    position: Position


class LangevinInfo(NamedTuple):
    """Diagnosis of one step.

    Attributes:
      energy: [] energy before the step.
      gradient_norm: [] norm of the energy's gradient before the step, before clipping.
      is_finite: [] bool, whether the energy and its gradient before the step are finite; if they
        are not, neither is any later position.
    """

    energy: jax.Array
    gradient_norm: jax.Array
    is_finite: jax.Array


def langevin(
    *,
    step_size: float | jax.Array,
    temperature: float | jax.Array = 1.0,
    noise_scale: float | jax.Array | None = None,
    gradient_clip: float | None = None,
    bounds: tuple[float, float] | None = None,
) -> Kernel:
    """Builds the kernel.

    Args:
      step_size: h > 0, in squared units of the position (times 1/energy).
      temperature: τ >= 0; the chain's law is exp(-E/τ) as h → 0. At 0 it descends the gradient.
      noise_scale: standard deviation s of the noise of one step, in units of the position, set
        apart from h and τ as image models do. The law is then the one at temperature s²/(2h).
      gradient_clip: clips each component of the gradient to [-c, c]. It keeps chains from flying
        off where the energy is steep, and it breaks the law: where a component exceeds c the chain
        feels a linear energy of slope c, so that even as h → 0 it is not exp(-E/τ) that it draws.
      bounds: clips each component of the position to [low, high] after the step. The chain then
        piles up mass on the faces of the box, which no density on it has.

    Returns:
      A ``Kernel`` with ``LangevinState`` and ``LangevinInfo``. One gradient a step.

    >>> import jax, jax.numpy as jnp
    >>> kernel = langevin(step_size=0.1)
    >>> def energy_fn(params, x):
    ...     return 0.5 * jnp.sum((x - params) ** 2)
    >>> state = kernel.init(energy_fn, 1.0, jnp.zeros(2))
    >>> state, info = kernel.step(jax.random.key(0), energy_fn, 1.0, state)
    >>> state.position.shape, float(info.energy)
    ((2,), 1.0)
    """
    return Kernel(
        init=bind(_init),
        step=bind(
            _step,
            step_size=step_size,
            temperature=temperature,
            noise_scale=noise_scale,
            gradient_clip=gradient_clip,
            bounds=bounds,
        ),
    )


def _init(energy_fn: EnergyFn, params: Params, position: Position) -> LangevinState:
    del energy_fn, params  # the next step needs nothing but the position
    return LangevinState(position)


def _step(
    key: jax.Array,
    energy_fn: EnergyFn,
    params: Params,
    state: LangevinState,
    *,
    step_size,
    temperature,
    noise_scale,
    gradient_clip,
    bounds,
) -> tuple[LangevinState, LangevinInfo]:
    energy, gradient, _ = value_and_gradient(energy_fn, params, state.position)
    drift = gradient
    if gradient_clip is not None:
        drift = jax.tree.map(lambda g: jnp.clip(g, -gradient_clip, gradient_clip), gradient)
    scale = jnp.sqrt(2.0 * step_size * temperature) if noise_scale is None else noise_scale
    noise = random_normal_like(key, state.position)

    def move(x, g, xi):
        moved = x + (scale * xi - step_size * g).astype(x.dtype)
        return moved if bounds is None else jnp.clip(moved, *bounds)

    position = jax.tree.map(move, state.position, drift, noise)
    info = LangevinInfo(
        energy=energy,
        gradient_norm=optax.tree.norm(gradient),
        is_finite=all_finite((energy, gradient)),
    )
    return LangevinState(position), info

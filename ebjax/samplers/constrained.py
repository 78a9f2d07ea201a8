"""Laws on boxes, tori and simplices, by any kernel.

Three ways from R^D into a domain, for a law exp(-E) on it:

    fold          run on E(fold(z)), z in R^D, where fold mirrors at the walls of a box and wraps a
                  torus. The kernel sees a law that repeats in all of R^D, and the folded chain
                  leaves exp(-E) invariant exactly where the kernel does (MALA, random walk, HMC):
                  fold belongs to a group of isometries, and a kernel that they commute with
                  (identity or diagonal M⁻¹) can be folded at every step.
    unconstrain   run on E(x(y)) - log |det dx/dy|, y in R^D, for a smooth bijection x(y): exact for
                  any kernel. Bounds are at infinity, which suits laws that vanish there.
    project       x' = nearest point of the domain to x - h ∇E(x) + sqrt(2hτ) ξ. Never exact: mass
                  piles up on the boundary, an error of O(sqrt(h)) where folding without a
                  Metropolis test makes O(h).

Bubeck, Eldan and Lehec, "Sampling from a log-concave distribution with projected Langevin Monte
Carlo", Discrete and Computational Geometry 59 (2018). Egozcue et al., "Isometric logratio
transformations for compositional data analysis", Mathematical Geology 35 (2003).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

from ebjax.samplers.langevin import langevin
from ebjax.types import EnergyFn, Kernel, Params, Position, PyTree, bind

__all__ = [
    "Domain",
    "Unconstrained",
    "box",
    "folded",
    "folded_energy",
    "projected_langevin",
    "reals",
    "simplex",
    "torus",
    "unconstrain",
]


class Domain(NamedTuple):
    """Where an array lives. What a domain does not have is ``None``.

    Functions of one array; where a position is a pytree, one domain serves all of its leaves, and
    a pytree of domains that is a prefix of it serves each part with its own.

    Attributes:
      project: ``x -> x'``, the nearest point of the domain.
      fold: ``x -> x'``, by mirrors and translations; ``x`` itself inside.
      forward: ``y -> (x, log |det dx/dy|)``, from R^D onto the domain's interior.
      inverse: ``x -> y``.
    """

    project: Callable[[jax.Array], jax.Array]
    fold: Callable[[jax.Array], jax.Array] | None
    forward: Callable[[jax.Array], tuple[jax.Array, jax.Array]] | None
    inverse: Callable[[jax.Array], jax.Array] | None


Domains = Any  # a Domain or a pytree of them


def reals() -> Domain:
    """All of R^D, for the free parts of a position."""
    return Domain(bind(_same), bind(_same), bind(_same_and_zero), bind(_same))


def _same(x):
    return x


def _same_and_zero(y):
    return y, jnp.zeros((), y.dtype)


def box(low: npt.ArrayLike, high: npt.ArrayLike) -> Domain:
    """``low <= x <= high`` in each component; bounds may be infinite, then it is a half-line.

    Between two bounds x = low + (high - low) sigmoid(y), above one x = low + exp(y), below one
    x = high - exp(y).

    Args:
      low: number or array that broadcasts to the position.
      high: the same, above ``low``.

    Raises:
      ValueError: if ``low`` is not below ``high``.

    >>> domain = box(0.0, 1.0)
    >>> float(domain.fold(jnp.array(1.25))), float(domain.project(jnp.array(1.25)))
    (0.75, 1.0)
    """
    is_traced = isinstance(low, jax.core.Tracer) or isinstance(high, jax.core.Tracer)
    if not is_traced and not np.all(np.asarray(low) < np.asarray(high)):
        raise ValueError(f"low is {low!r} and high is {high!r}; low must be below high everywhere.")
    bounds = {"low": low, "high": high}
    return Domain(
        project=bind(_box_project, **bounds),
        fold=bind(_box_fold, **bounds),
        forward=bind(_box_forward, **bounds),
        inverse=bind(_box_inverse, **bounds),
    )


def _box_parts(x, low, high):
    """Bounds in the dtype and shape of x, made finite, and which of them were."""
    low, high = (jnp.broadcast_to(jnp.asarray(b, x.dtype), x.shape) for b in (low, high))
    has_low, has_high = jnp.isfinite(low), jnp.isfinite(high)
    low = jnp.where(has_low, low, 0.0)
    high = jnp.where(has_high, high, 0.0)
    width = jnp.where(has_low & has_high, high - low, 1.0)
    return low, high, width, has_low, has_high


def _box_project(x, *, low, high):
    return jnp.clip(x, jnp.asarray(low, x.dtype), jnp.asarray(high, x.dtype))


def _box_fold(x, *, low, high):
    is_inside = (x >= jnp.asarray(low, x.dtype)) & (x <= jnp.asarray(high, x.dtype))
    low, high, width, has_low, has_high = _box_parts(x, low, high)
    phase = jnp.mod((x - low) / width, 2.0)
    between = low + width * jnp.where(phase < 1.0, phase, 2.0 - phase)
    mirrored = jnp.where(
        has_low & has_high, between, jnp.where(has_low, 2.0 * low - x, 2.0 * high - x)
    )
    return jnp.where(is_inside, x, mirrored)


def _box_forward(y, *, low, high):
    low, high, width, has_low, has_high = _box_parts(y, low, high)
    is_between, is_free = has_low & has_high, ~(has_low | has_high)
    # exp only where it is used, so that no inf * 0 enters the gradient elsewhere.
    step = jnp.exp(jnp.where(is_between | is_free, 0.0, y))
    x = jnp.where(has_low, low + step, high - step)
    x = jnp.where(is_between, low + width * jax.nn.sigmoid(y), x)
    slope = jnp.log(width) + jax.nn.log_sigmoid(y) + jax.nn.log_sigmoid(-y)
    log_volume = jnp.where(is_between, slope, jnp.where(is_free, 0.0, y))
    return jnp.where(is_free, y, x), jnp.sum(log_volume)


def _box_inverse(x, *, low, high):
    low, high, _, has_low, has_high = _box_parts(x, low, high)
    is_between, is_free = has_low & has_high, ~(has_low | has_high)
    y = jnp.log(jnp.where(has_low, x - low, high - x))
    y = jnp.where(is_between, jnp.log(x - low) - jnp.log(high - x), y)
    return jnp.where(is_free, x, y)


def torus(period: npt.ArrayLike = 2.0 * math.pi) -> Domain:
    """``0 <= x < period`` in each component, its ends joined. It has no smooth map from R^D.

    Args:
      period: positive number or array that broadcasts to the position.

    Raises:
      ValueError: if a period is not positive.

    >>> float(torus(1.0).fold(jnp.array(-0.25)))
    0.75
    """
    if not isinstance(period, jax.core.Tracer) and not np.all(np.asarray(period) > 0):
        raise ValueError(f"period is {period}; it must be positive.")
    wrap = bind(_wrap, period=period)
    return Domain(project=wrap, fold=wrap, forward=None, inverse=None)


def _wrap(x, *, period):
    period = jnp.asarray(period, x.dtype)
    wrapped = jnp.mod(x, period)
    # A negative x of rounding size would come out as the period itself.
    return jnp.where(wrapped < period, wrapped, wrapped - period)


def simplex() -> Domain:
    """``x >= 0, Σ x = 1`` over the last axis [K], by isometric log-ratios y [K - 1].

    x = softmax(V y) with V [K, K - 1] orthonormal columns that sum to zero, so that no component
    is singled out. Volume is that of the first K - 1 components, as in the Dirichlet density:
    log |det dx/dy| = Σ log x + log(K) / 2.

    >>> x, _ = simplex().forward(jnp.zeros(3))
    >>> x.tolist()
    [0.25, 0.25, 0.25, 0.25]
    """
    return Domain(
        project=bind(_simplex_project),
        fold=None,
        forward=bind(_simplex_forward),
        inverse=bind(_simplex_inverse),
    )


def _simplex_project(x):
    """max(x - θ, 0) with the θ that makes it sum to 1 (Duchi et al., ICML 2008)."""
    falling = -jnp.sort(-x, axis=-1)
    count = jnp.arange(1, x.shape[-1] + 1)
    excess = (jnp.cumsum(falling, axis=-1) - 1.0) / count
    num_positive = jnp.sum(falling > excess, axis=-1, keepdims=True)
    return jnp.maximum(x - jnp.take_along_axis(excess, num_positive - 1, axis=-1), 0.0)


def _helmert_scales(num_columns, dtype):
    """[K - 1] the n and the 1 / sqrt(n (n + 1)): column n is 1 in n rows, then -n, so scaled."""
    n = jnp.arange(1, num_columns + 1, dtype=dtype)
    return n, jax.lax.rsqrt(n * (n + 1.0))


def _simplex_forward(y):
    n, scale = _helmert_scales(y.shape[-1], y.dtype)
    parts = y * scale
    above = jnp.flip(jnp.cumsum(jnp.flip(parts, axis=-1), axis=-1), axis=-1)
    nothing = jnp.zeros((*y.shape[:-1], 1), y.dtype)
    logits = jnp.concatenate([above, nothing], -1) - jnp.concatenate([nothing, n * parts], -1)
    log_x = jax.nn.log_softmax(logits, axis=-1)
    num_simplices = math.prod(y.shape[:-1])
    log_volume = jnp.sum(log_x) + 0.5 * math.log(y.shape[-1] + 1) * num_simplices
    return jnp.exp(log_x), log_volume


def _simplex_inverse(x):
    log_x = jnp.log(x)
    n, scale = _helmert_scales(x.shape[-1] - 1, x.dtype)
    return (jnp.cumsum(log_x[..., :-1], axis=-1) - n * log_x[..., 1:]) * scale


def _apply(domain: Domains, name: str, position: Position) -> PyTree:
    """Applies the function ``name`` of each domain to the leaves below it."""

    def on_part(one: Domain, part):
        function = getattr(one, name)
        if function is None:
            raise ValueError(
                f"The domain has no function {name!r}. Boxes and tori have fold; boxes and "
                "simplices have forward and inverse."
            )
        return jax.tree.map(function, part)

    return jax.tree.map(on_part, domain, position, is_leaf=lambda node: isinstance(node, Domain))


def folded_energy(energy_fn: EnergyFn, domain: Domains) -> EnergyFn:
    """``E(fold(z))`` on R^D, for kernels that are run there and folded in the end.

    Args:
      energy_fn: the energy on the domain.
      domain: boxes and tori.
    """
    return bind(_folded, energy_fn=energy_fn, domain=domain)


def _folded(params, z, *context, energy_fn, domain):
    return energy_fn(params, _apply(domain, "fold", z), *context)


def folded(kernel: Kernel, domain: Domains) -> Kernel:
    """The kernel on a box or a torus: reflected Langevin, exact reflected MALA, and so on.

    It steps on ``E(fold(z))`` and folds the position, and with it the gradient and momentum in the
    state, which a mirror reverses. Exact where the kernel is and commutes with the mirrors: with
    no M⁻¹ or a diagonal one. (On a torus any M⁻¹ will do.)

    Args:
      kernel: a kernel whose state holds, beside position and energy, vectors named ``gradient``
        and ``momentum`` at most: ``langevin``, ``mala``, ``random_walk``, ``underdamped``.
      domain: boxes and tori; a starting position is inside.

    Raises:
      ValueError: in ``init`` or ``step``, if a domain cannot be folded into (a simplex), or if the
        energy function has parts (fold those energies with ``folded_energy``).

    >>> from ebjax.samplers import mala
    >>> kernel = folded(mala(step_size=0.5), box(0.0, 1.0))
    >>> energy_fn = lambda params, x: params * jnp.sum(x)
    >>> state = kernel.init(energy_fn, 1.0, jnp.full(3, 0.5))
    >>> state, _ = kernel.step(jax.random.key(0), energy_fn, 1.0, state)
    >>> bool(jnp.all((state.position >= 0.0) & (state.position <= 1.0)))
    True
    """
    options = {"kernel": kernel, "domain": domain}
    return Kernel(
        init=bind(_folded_init, **options),
        step=bind(_folded_step, **options),
        num_evaluations=kernel.num_evaluations,
    )


def _folded_init(energy_fn: EnergyFn, params: Params, position: Position, *, kernel, domain):
    if hasattr(energy_fn, "evaluate"):
        raise ValueError(
            "The energy function has parts, which cannot be folded; compose it of energies that "
            "are folded (folded_energy), and fold the positions in the end."
        )
    return kernel.init(folded_energy(energy_fn, domain), params, position)


def _folded_step(key, energy_fn: EnergyFn, params: Params, state, *, kernel, domain):
    state, info = kernel.step(key, folded_energy(energy_fn, domain), params, state)
    # The derivative of fold is its mirror, which turns vectors at z into vectors at fold(z).
    position, turn = jax.linearize(lambda z: _apply(domain, "fold", z), state.position)
    vectors = {
        name: turn(getattr(state, name))
        for name in ("gradient", "momentum")
        if name in state._fields
    }
    return state._replace(position=position, **vectors), info


def projected_langevin(
    *,
    step_size: float | jax.Array,
    domain: Domains,
    temperature: float | jax.Array = 1.0,
) -> Kernel:
    """Projected Langevin dynamics: a step of ``langevin``, then the nearest point of the domain.

    Unadjusted, and with atoms on the boundary. Where the domain is a box or a torus
    ``folded(langevin(...), domain)`` costs the same and is nearer to the law.

    Args:
      step_size: h > 0.
      domain: any; on a simplex, E is a function of all K components.
      temperature: τ >= 0.

    Returns:
      A ``Kernel`` with the state and info of ``langevin``. One gradient a step.

    Raises:
      ValueError: naming the option that is out of range.
    """
    kernel = langevin(step_size=step_size, temperature=temperature)
    return kernel._replace(step=bind(_projected_step, kernel=kernel, domain=domain))


def _projected_step(key, energy_fn: EnergyFn, params: Params, state, *, kernel, domain):
    state, info = kernel.step(key, energy_fn, params, state)
    return state._replace(position=_apply(domain, "project", state.position)), info


class Unconstrained(NamedTuple):
    """A law carried to R^D.

    Attributes:
      energy: ``(params, y) -> E(x(y)) - log |det dx/dy|``.
      forward: ``y -> x``.
      inverse: ``x -> y``, for starting positions inside.
    """

    energy: EnergyFn
    forward: Callable[[Position], Position]
    inverse: Callable[[Position], Position]


def unconstrain(energy_fn: EnergyFn, domain: Domains) -> Unconstrained:
    """Carries ``exp(-E)`` from a box or simplex to R^D, where any kernel samples it.

    The law of ``forward(y)`` under exp(-energy(y)) is exp(-E), and both have the same log Z.

    Args:
      energy_fn: the energy on the domain.
      domain: boxes and simplices, and ``reals()`` for the free parts.

    >>> dirichlet = lambda params, x: -jnp.sum((params - 1.0) * jnp.log(x))
    >>> energy_fn, forward, inverse = unconstrain(dirichlet, simplex())
    >>> y = inverse(jnp.array([0.2, 0.3, 0.5]))
    >>> y.shape, [round(float(v), 4) for v in forward(y)]
    ((2,), [0.2, 0.3, 0.5])
    """
    return Unconstrained(
        energy=bind(_unconstrained, energy_fn=energy_fn, domain=domain),
        forward=bind(_forward_position, domain=domain),
        inverse=bind(_inverse_position, domain=domain),
    )


def _forward_pairs(domain, y):
    structure = jax.tree.structure(y)
    pairs = structure.flatten_up_to(_apply(domain, "forward", y))
    x = jax.tree.unflatten(structure, [pair[0] for pair in pairs])
    return x, sum(pair[1] for pair in pairs)


def _forward_position(y, *, domain):
    return _forward_pairs(domain, y)[0]


def _inverse_position(x, *, domain):
    return _apply(domain, "inverse", x)


def _unconstrained(params, y, *context, energy_fn, domain):
    x, log_volume = _forward_pairs(domain, y)
    return energy_fn(params, x, *context) - log_volume

"""Single-site Gibbs sampling: a site drawn anew from its conditional law, for any energy.

    x_i ~ p(x_i = k | rest) ∝ exp(-E(x with x_i = k) / τ)

The energies of the other K - 1 values are evaluated. Leaves exp(-E/τ) exactly invariant.

Geman and Geman, "Stochastic relaxation, Gibbs distributions, and the Bayesian restoration of
images", IEEE PAMI 6 (1984).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ebjax.samplers.discrete import (
    as_sites,
    check_num_categories,
    check_positive,
    choose_category,
    uniforms,
)
from ebjax.samplers.evaluate import value
from ebjax.types import EnergyFn, Kernel, Params, Position, bind

__all__ = ["GibbsInfo", "GibbsState", "gibbs"]

_SCANS = ("random", "systematic")


class GibbsState(NamedTuple):
    """A point with its energy.

    Attributes:
      position: the chain's point, binary or one-hot.
      energy: [] E at the point.
      parts: what the energy function wants kept (see ``ebjax.samplers.evaluate``).
      site: [] int32, the site that a systematic scan updates next.
    """

    position: Position
    energy: jax.Array
    parts: Any
    site: jax.Array


class GibbsInfo(NamedTuple):
    """Diagnosis of one step.

    Attributes:
      energy: [] energy after the step.
      num_changed: [] int32, updates of the step that changed their site.
      is_finite: [] bool, whether all energies were finite. Values whose energy is infinite or NaN
        are never drawn; if there is no other, the site stays.
    """

    energy: jax.Array
    num_changed: jax.Array
    is_finite: jax.Array


def gibbs(
    *,
    num_categories: int | None = None,
    scan: str = "random",
    num_updates: int = 1,
    temperature: float | jax.Array = 1.0,
) -> Kernel:
    """Single-site Gibbs sampling of any energy, by evaluating the other values of a site.

    Args:
      num_categories: ``None`` for binary positions in {0, 1}, or K for one-hot ones [..., K].
      scan: ``"random"``, a uniform site each update (reversible), or ``"systematic"``, one after
        the other in raveled order (invariant, not reversible).
      num_updates: static, sites updated in one step; the number of sites makes it a sweep.
      temperature: τ > 0; the chain's law is exp(-E/τ).

    Returns:
      A ``Kernel`` with ``GibbsState`` and ``GibbsInfo``. ``num_updates (K - 1)`` evaluations a step
      (K = 2 for binary sites), none of them with a gradient.

    Raises:
      ValueError: naming the option that is out of range.

    >>> import jax, jax.numpy as jnp
    >>> kernel = gibbs(scan="systematic", num_updates=3)
    >>> def energy_fn(params, x):
    ...     return 100.0 * jnp.sum((x - params) ** 2)
    >>> state = kernel.init(energy_fn, jnp.array([1.0, 0.0, 1.0]), jnp.zeros(3))
    >>> state, info = kernel.step(jax.random.key(0), energy_fn, jnp.array([1.0, 0.0, 1.0]), state)
    >>> state.position.tolist(), int(info.num_changed)
    ([1.0, 0.0, 1.0], 2)
    """
    check_num_categories(num_categories)
    check_positive(temperature=temperature)
    if scan not in _SCANS:
        raise ValueError(f"scan is {scan!r}; it must be one of {_SCANS}.")
    if num_updates < 1:
        raise ValueError(f"num_updates is {num_updates}; it must be at least 1.")
    step = bind(
        _gibbs_step,
        num_categories=num_categories,
        scan=scan,
        num_updates=num_updates,
        temperature=temperature,
    )
    num_alternatives = 1 if num_categories is None else num_categories - 1
    return Kernel(bind(_gibbs_init), step, num_updates * num_alternatives)


def _gibbs_init(energy_fn: EnergyFn, params: Params, position: Position) -> GibbsState:
    return GibbsState(position, *value(energy_fn, params, position), jnp.zeros((), jnp.int32))


def _gibbs_step(
    key: jax.Array,
    energy_fn: EnergyFn,
    params: Params,
    state: GibbsState,
    *,
    num_categories,
    scan,
    num_updates,
    temperature,
) -> tuple[GibbsState, GibbsInfo]:
    num_sites = len(as_sites(state.position, num_categories)[0])
    dtype = jax.tree.leaves(state.position)[0].dtype
    uniform = uniforms(key, (num_updates, 2), dtype)

    def update(state, uniform):
        site = state.site
        if scan == "random":
            site = jnp.minimum((uniform[0] * num_sites).astype(jnp.int32), num_sites - 1)
        new, is_changed, is_finite = _update_site(
            energy_fn, params, state, site, uniform[1], num_categories, temperature
        )
        next_site = (state.site + 1) % num_sites if scan == "systematic" else state.site
        return new._replace(site=next_site), (is_changed, is_finite)

    if num_updates == 1:
        state, (is_changed, is_finite) = update(state, uniform[0])
    else:
        state, (is_changed, is_finite) = jax.lax.scan(update, state, uniform)
    info = GibbsInfo(state.energy, jnp.sum(is_changed, dtype=jnp.int32), jnp.all(is_finite))
    return state, info


def _update_site(energy_fn, params, state, site, uniform, num_categories, temperature):
    """Draws one site from its conditional law. The first entry is the value that it has."""
    sites, restore = as_sites(state.position, num_categories)
    # A selection and not `.at[site].set`: XLA's CPU compiler (jaxlib 0.10.2) loses rows that are
    # rolled, updated in place and gathered again, where there is no batch.
    is_here = jnp.arange(len(sites)) == site
    if num_categories is None:
        others = jnp.where(is_here, 1.0 - sites, sites)[None]
    else:
        shifted = [jnp.roll(sites, shift, axis=-1) for shift in range(1, num_categories)]
        others = jnp.stack([jnp.where(is_here[:, None], other, sites) for other in shifted])

    def candidate(sites):
        position = restore(sites)
        return GibbsState(position, *value(energy_fn, params, position), state.site)

    candidates = jax.vmap(candidate)(others)
    candidates = jax.tree.map(lambda a, b: jnp.concatenate([a[None], b]), state, candidates)
    energies = candidates.energy
    logits = jnp.where(jnp.isfinite(energies), -energies / temperature, -jnp.inf)
    index = jnp.argmax(choose_category(uniform, logits))
    index = jnp.where(jnp.isfinite(energies).any(), index, 0)
    new = jax.tree.map(lambda leaf: leaf[index], candidates)
    return new, index != 0, jnp.isfinite(energies).all()

"""Warm-up: chains walk to the law while the step size and the mass matrix of their kernel adapt.

    step size      dual averaging of the acceptance          (every step)
    inverse mass   covariance of the positions of a window   (at the end of each window)

    | first, fast | slow | slow slow | slow slow slow slow | last, fast |

The first and last stretch adapt the step size alone; slow windows double in length, and each ends
with a new metric made from its own draws alone, so that what the chains did on their way is
forgotten. Everything that ``warmup`` returns is frozen: draws of a kernel that still adapts do not
follow the law, so its positions on the way are not kept.

Chains that share their adaptation (``pooled``) estimate one step size from their mean acceptance
and one covariance from all of their positions: a hundred chains or more are adapted within tens of
steps, where one chain needs hundreds.

Hoffman and Gelman, "The no-U-turn sampler", JMLR 15 (2014). Carpenter et al., "Stan: a
probabilistic programming language", Journal of Statistical Software 76 (2017); the windows are
described in the reference manual of Stan. Tran and Kleppe, "Tuning diagonal scale matrices for
HMC", Statistics and Computing 34 (2024), for the ratio of variances.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

from ebjax.numerics import neighbouring_keys
from ebjax.parallel import AXIS_NAME, spread
from ebjax.samplers.dual_averaging import (
    DualAveragingState,
    dual_averaging_final,
    dual_averaging_init,
    dual_averaging_update,
    search_step_size,
)
from ebjax.samplers.welford import (
    WelfordState,
    shrunk_covariance,
    welford_final,
    welford_gather,
    welford_init,
    welford_update,
)
from ebjax.samplers.windows import MANY_CHAINS, Windows, default_windows
from ebjax.types import EnergyFn, Kernel, Params, Position, join_arrays, split_arrays

__all__ = ["METRICS", "Warmup", "WarmupInfo", "warmup"]

METRICS = ("diagonal", "dense", "identity", "variance_ratio")
# From MANY_CHAINS on their mean acceptance has little noise, and the search for a step size is good
# to a factor: there is no need to try much larger ones.
OVERSHOOT = 10.0


class WarmupInfo(NamedTuple):
    """What happened, step by step; [T], or [T, C] where each chain adapts on its own.

    Attributes:
      step_size: of each step.
      acceptance_rate: of each step, mean over the chains that share their adaptation.
      energy: likewise; where it still falls at the end the warm-up was too short.
      num_evaluations: likewise, of the energy, those of the search for a step size included.
      is_finite: likewise, the part of the chains whose step was finite.
    """

    step_size: jax.Array
    acceptance_rate: jax.Array
    energy: jax.Array
    num_evaluations: jax.Array
    is_finite: jax.Array


class Warmup(NamedTuple):
    """What the warm-up found, frozen.

    Attributes:
      step_size: [], or [C] where each chain adapted on its own.
      inverse_mass: [D] or [D, D] over the raveled position, with C before if not pooled; ``None``
        for the metric ``"identity"``.
      positions: [C, ...] where the chains are.
      kernel: ``make_kernel(step_size=..., inverse_mass=...)`` with these values, ready for
        ``sample``; ``None`` if not pooled.
      info: a ``WarmupInfo``.
    """

    step_size: jax.Array
    inverse_mass: jax.Array | None
    positions: Position
    kernel: Kernel | None
    info: WarmupInfo


def warmup(
    key: jax.Array,
    make_kernel: Callable[..., Kernel],
    energy_fn: EnergyFn,
    params: Params,
    initial_positions: Position,
    *,
    num_steps: int,
    target_acceptance: float | jax.Array = 0.8,
    metric: str = "diagonal",
    pooled: bool = True,
    harmonic: bool = False,
    initial_step_size: float | jax.Array = 1.0,
    windows: Windows | None = None,
    num_devices: int = 1,
) -> Warmup:
    """Adapts step size and metric of a kernel, and moves chains to where they may be sampled.

    Compiled once for each ``make_kernel``, energy function and set of static options.

    Args:
      key: [] key.
      make_kernel: called with the keywords ``step_size`` and ``inverse_mass``: ``nuts`` or
        ``mala`` itself, or ``bind(hmc, num_steps=10)`` (``ebjax.types.bind``; a ``lambda`` is
        another function each time that it is written, and compiles again), or for discrete
        positions ``bind(discrete_langevin, num_categories=K)``. Its state must be good
        under other step sizes and masses, and its info must have an ``acceptance_rate``.
      energy_fn: E.
      params: its parameters.
      initial_positions: [C, ...].
      num_steps: T, static; 1,000 is the custom for few chains, 50 to 200 do for hundreds.
      target_acceptance: in (0, 1); 0.8 suits HMC and NUTS, 0.57 MALA and discrete Langevin.
      metric: (static) ``"identity"``, where ``make_kernel`` needs to take a ``step_size`` only;
        ``"diagonal"`` or ``"dense"``, from the covariance of the positions; ``"variance_ratio"``,
        the diagonal ``sqrt(var x_i / var ∂E/∂x_i)``, known from far fewer draws and exact where
        components are independent and Gaussian; the kernel's state must have a ``gradient``.
      pooled: (static) whether all chains share one adaptation, or each has its own.
      harmonic: (static) aim with the harmonic mean of the chains' acceptances, and not with the
        arithmetic one: a smaller step size, for laws with places that are hard to leave.
      initial_step_size: > 0, where the search for a first step size starts.
      windows: the schedule; by default ``warmup_windows(num_steps)``, and for pooled chains
        windows that start shorter.
      num_devices: (static) local devices to spread the chains over; must divide C. Chains that
        share their adaptation share it over all devices, so that the result is that of one
        device up to rounding.

    Returns:
      A ``Warmup``; sample with its ``kernel`` from its ``positions``. If not pooled, map ``sample``
      over ``step_size``, ``inverse_mass`` and ``positions``.

    Raises:
      ValueError: naming the argument that is out of range.

    >>> from ebjax.samplers import sample
    >>> from ebjax.samplers.mala import mala
    >>> scales = jnp.array([0.1, 10.0])
    >>> energy_fn = lambda params, x: 0.5 * jnp.sum((x / scales) ** 2)
    >>> start = jax.random.normal(jax.random.key(0), (100, 2))
    >>> adapted = warmup(jax.random.key(1), mala, energy_fn, (), start, num_steps=100,
    ...                  target_acceptance=0.57)
    >>> bool(jnp.all(abs(jnp.log(jnp.sqrt(adapted.inverse_mass) / scales)) < 0.3))
    True
    >>> draws = sample(jax.random.key(2), adapted.kernel, energy_fn, (), adapted.positions,
    ...                num_samples=50)
    >>> bool(abs(draws.info.acceptance_rate.mean() - 0.57) < 0.1)
    True
    """
    num_chains = _check(initial_positions, num_steps, metric, target_acceptance, initial_step_size)
    if num_devices < 1 or num_chains % num_devices:
        raise ValueError(
            f"num_devices is {num_devices}; it must be at least 1 and divide the {num_chains} "
            "chains."
        )
    if windows is None:
        windows = default_windows(num_steps, num_chains if pooled else 1)
    if any(len(flags) != num_steps for flags in windows):
        raise ValueError(
            f"windows are of {[len(flags) for flags in windows]} steps; num_steps is {num_steps}."
        )
    arrays, functions = split_arrays((make_kernel, energy_fn))
    step_size, inverse_mass, positions, info = _warmup(
        (key, params, arrays, target_acceptance, initial_step_size, tuple(windows)),
        initial_positions,
        functions=functions,
        metric=metric,
        pooled=pooled,
        harmonic=harmonic,
        num_devices=num_devices,
    )
    kernel = None
    if pooled:
        kernel = make_kernel(step_size=step_size, **_mass_option(metric, inverse_mass))
    return Warmup(step_size, inverse_mass, positions, kernel, info)


def _check(positions, num_steps, metric, target_acceptance, initial_step_size) -> int:
    shapes = [jnp.shape(leaf) for leaf in jax.tree.leaves(positions)]
    sizes = {shape[:1] for shape in shapes}
    if len(sizes) != 1 or not min(sizes) or min(sizes)[0] == 0:
        raise ValueError(
            f"initial_positions has leaves of shapes {shapes}; each must be [C, ...] with the same "
            "number of chains, at least 1."
        )
    if num_steps < 1:
        raise ValueError(f"num_steps is {num_steps}; it must be at least 1.")
    if metric not in METRICS:
        raise ValueError(f"metric is {metric!r}; it must be one of {METRICS}.")
    if isinstance(target_acceptance, (int, float)) and not 0.0 < target_acceptance < 1.0:
        raise ValueError(f"target_acceptance is {target_acceptance}; it must lie between 0 and 1.")
    if isinstance(initial_step_size, (int, float)) and not 0.0 < initial_step_size < float("inf"):
        raise ValueError(f"initial_step_size is {initial_step_size}; it must be positive.")
    return min(sizes)[0]


class _Carry(NamedTuple):
    """What passes from step to step, for chains that share their adaptation (G of them)."""

    state: Any
    averaging: DualAveragingState
    moments: WelfordState
    inverse_mass: jax.Array | None


@functools.partial(
    jax.jit, static_argnames=("functions", "metric", "pooled", "harmonic", "num_devices")
)
def _warmup(replicated, positions, *, functions, metric, pooled, harmonic, num_devices):
    index = jnp.arange(len(jax.tree.leaves(positions)[0]))
    adapt = functools.partial(
        _adapt,
        functions=functions,
        metric=metric,
        harmonic=harmonic,
        axis_name=AXIS_NAME if pooled and num_devices > 1 else None,
        num_chains=len(index) if pooled else 1,
    )

    def together(replicated, split):
        step_size, inverse_mass, positions, info = adapt(*split, replicated=replicated)
        # What is equal on all devices leaves them with an axis of its own.
        equal = jax.tree.map(lambda leaf: leaf[None], (step_size, inverse_mass, info))
        return equal, positions

    def apart(replicated, split):
        alone = jax.tree.map(lambda leaf: leaf[:, None], split)
        one = functools.partial(adapt, replicated=replicated)
        step_size, inverse_mass, positions, info = jax.vmap(one)(*alone)
        positions = jax.tree.map(lambda leaf: leaf[:, 0], positions)
        return (step_size, inverse_mass, info), positions

    run = spread(together if pooled else apart, num_devices)
    (step_size, inverse_mass, info), positions = run(replicated, (index, positions))
    if pooled:
        first = lambda tree: jax.tree.map(lambda leaf: leaf[0], tree)  # noqa: E731
        return first(step_size), first(inverse_mass), positions, first(info)
    info = jax.tree.map(lambda leaf: jnp.moveaxis(leaf, 0, 1), info)
    return step_size, inverse_mass, positions, info


def _adapt(index, positions, *, functions, metric, harmonic, axis_name, num_chains, replicated):
    """One adaptation, shared by ``num_chains`` chains.

    Those of this device are ``index`` [G], which start at ``positions`` [G, ...]; means are taken
    over ``axis_name`` as well. Every device then takes the same steps, so the branches and loops
    that hold the collectives agree.
    """
    key, params, arrays, target, initial, windows = replicated
    make_kernel, energy_fn = join_arrays(arrays, functions)
    step_key, search_key = jax.random.split(key)
    dtype = ravel_pytree(positions)[0].dtype
    initial = jnp.asarray(initial, dtype)

    def mean(values):
        local = jnp.mean(values)
        return local if axis_name is None else jax.lax.pmean(local, axis_name)

    def advance(key, state, step_size, inverse_mass):
        kernel = make_kernel(step_size=step_size, **_mass_option(metric, inverse_mass))
        step = jax.vmap(lambda key, state: kernel.step(key, energy_fn, params, state))
        state, info = step(neighbouring_keys(key, index), state)
        # An acceptance that is NaN counts as 0 and would otherwise hide those of all others.
        acceptance = jnp.nan_to_num(info.acceptance_rate).astype(dtype)
        acceptance = 1.0 / mean(1.0 / acceptance) if harmonic else mean(acceptance)
        if kernel.num_evaluations is None:
            return state, info, acceptance, mean(info.num_evaluations.astype(dtype))
        return state, info, acceptance, jnp.asarray(kernel.num_evaluations, dtype)

    def search(carry, t):
        def attempt(trial, step_size):
            key = jax.random.fold_in(jax.random.fold_in(search_key, t), trial)
            return advance(key, carry.state, step_size, carry.inverse_mass)[2:]

        step_size, cost = search_step_size(attempt, initial, target=target)
        overshoot = OVERSHOOT if num_chains < MANY_CHAINS else 1.0
        return carry._replace(averaging=dual_averaging_init(step_size, overshoot=overshoot)), cost

    def body(carry, xs):
        t, is_start, is_slow, is_end = xs
        skip = lambda carry, t: (carry, jnp.zeros((), dtype))  # noqa: E731
        carry, searched = jax.lax.cond(is_start, search, skip, carry, t)
        step_size = jnp.exp(carry.averaging.log_step_size)
        key = jax.random.fold_in(step_key, t)
        state, info, acceptance, cost = advance(key, carry.state, step_size, carry.inverse_mass)
        averaging = dual_averaging_update(carry.averaging, acceptance, target=target)
        carry = carry._replace(state=state, averaging=averaging)
        if metric != "identity":
            carry = jax.lax.cond(is_slow, _count_positions(metric), lambda carry: carry, carry)
            carry = jax.lax.cond(is_end, renew, lambda carry: carry, carry)
        history = WarmupInfo(
            step_size=step_size,
            acceptance_rate=acceptance,
            energy=mean(info.energy),
            num_evaluations=cost + searched,
            is_finite=mean(info.is_finite.astype(dtype)),
        )
        return carry, history

    first_kernel = make_kernel(step_size=initial, **_mass_option(metric, None))
    state = jax.vmap(lambda x: first_kernel.init(energy_fn, params, x))(positions)
    size = ravel_pytree(positions)[0].size // len(index)
    carry = _Carry(
        state=state,
        averaging=dual_averaging_init(initial),
        moments=_no_moments(metric, size, dtype),
        inverse_mass=_first_mass(metric, size, dtype),
    )
    renew = _renew_metric(metric, axis_name)
    steps = jnp.arange(len(windows[0]))
    carry, history = jax.lax.scan(body, carry, (steps, *windows))
    step_size = dual_averaging_final(carry.averaging)
    return step_size, carry.inverse_mass, carry.state.position, history


def _mass_option(metric: str, inverse_mass: jax.Array | None) -> dict[str, Any]:
    """None for the identity, so that kernels without a mass may adapt their step size."""
    return {} if metric == "identity" else {"inverse_mass": inverse_mass}


def _first_mass(metric: str, size: int, dtype: Any) -> jax.Array | None:
    if metric == "identity":
        return None
    return jnp.eye(size, dtype=dtype) if metric == "dense" else jnp.ones(size, dtype)


def _no_moments(metric: str, size: int, dtype: Any) -> WelfordState | None:
    if metric == "identity":
        return None
    size = 2 * size if metric == "variance_ratio" else size
    return welford_init(size, is_dense=metric == "dense", dtype=dtype)


def _count_positions(metric: str) -> Callable[[_Carry], _Carry]:
    def count(carry):
        flat = jax.vmap(lambda x: ravel_pytree(x)[0])
        points = flat(carry.state.position)
        if metric == "variance_ratio":
            points = jnp.concatenate([points, flat(carry.state.gradient)], axis=1)
        return carry._replace(moments=welford_update(carry.moments, points))

    return count


def _renew_metric(metric: str, axis_name: str | None) -> Callable[[_Carry], _Carry]:
    def renew(carry):
        moments = welford_gather(carry.moments, axis_name)
        if metric == "variance_ratio":
            of_position, of_gradient = jnp.split(welford_final(moments), 2)
            inverse_mass = jnp.sqrt(of_position / of_gradient)
            is_good = jnp.isfinite(inverse_mass) & (inverse_mass > 0.0)
            inverse_mass = jnp.where(is_good, inverse_mass, carry.inverse_mass)
        else:
            inverse_mass = shrunk_covariance(moments)
        empty = jax.tree.map(jnp.zeros_like, carry.moments)
        return carry._replace(inverse_mass=inverse_mass, moments=empty)

    return renew

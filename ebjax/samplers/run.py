"""Runs chains: many at a time, scanned, thinned, compiled once, over one device or several.

    chain c, step t:  key = fold_in(key, t) with c added to its last word

A chain's numbers depend on its index and not on how many others run, nor on what device.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ebjax.numerics import neighbouring_keys
from ebjax.parallel import spread
from ebjax.types import EnergyFn, Kernel, Params, Position

__all__ = ["Samples", "run_chain", "sample"]


class Samples(NamedTuple):
    """What ``sample`` returns.

    Attributes:
      positions: [N, C, ...] the kept positions.
      info: the kernel's info, each field [N, C], the mean over the steps that led to the sample.
      state: [C, ...] the kernel's state after the last step, to go on from.
    """

    positions: Position
    info: Any
    state: Any


def run_chain(
    key: jax.Array,
    kernel: Kernel,
    energy_fn: EnergyFn,
    params: Params,
    state: Any,
    num_steps: int,
) -> tuple[Any, Any]:
    """Runs one chain for ``num_steps`` steps and keeps the last state.

    The piece to embed in a loss or in one's own ``jit``, ``vmap`` and ``scan``; gradients flow
    through it (with respect to ``params`` and the start) unless stopped.

    Args:
      key: [] key of this chain; step ``t`` uses ``fold_in(key, t)``.
      kernel: the transition.
      energy_fn: the energy.
      params: its parameters.
      state: the kernel's state to start from.
      num_steps: static, at least 1.

    Returns:
      ``(state, info)``: the last state, and the kernel's info averaged over the steps.

    >>> import jax, jax.numpy as jnp
    >>> from ebjax.samplers import langevin
    >>> kernel = langevin(step_size=0.05)
    >>> energy_fn = lambda params, x: 0.5 * jnp.sum(x**2)
    >>> state = kernel.init(energy_fn, (), jnp.ones(3))
    >>> state, info = run_chain(jax.random.key(0), kernel, energy_fn, (), state, 100)
    >>> bool(info.is_finite == 1.0)
    True
    """

    def body(state, t):
        state, info = kernel.step(jax.random.fold_in(key, t), energy_fn, params, state)
        return state, jax.tree.map(_as_float, info)

    state, infos = jax.lax.scan(body, state, jnp.arange(num_steps))
    return state, jax.tree.map(lambda leaf: leaf.mean(axis=0), infos)


def sample(
    key: jax.Array,
    kernel: Kernel,
    energy_fn: EnergyFn,
    params: Params,
    initial_positions: Position,
    *,
    num_samples: int,
    thinning: int = 1,
    num_burn_in: int = 0,
    num_devices: int = 1,
) -> Samples:
    """Runs ``C`` chains and keeps every ``thinning``-th position after the burn-in.

    Compiled once for each kernel, energy function and set of static options; new parameters,
    keys and positions do not compile again.

    Args:
      key: [] key of the whole run.
      kernel: the transition.
      energy_fn: the energy of one example; pass the same function object to reuse its program.
      params: its parameters.
      initial_positions: [C, ...] where the chains start.
      num_samples: N, positions kept of each chain.
      thinning: steps between kept positions.
      num_burn_in: steps before the first interval; nothing of them is kept.
      num_devices: local devices to spread the chains over; must divide C. The draws are the same
        on any number, up to the last bit, which XLA rounds as it fuses.

    Returns:
      ``Samples``. Memory grows with N and C, not with ``thinning`` or ``num_burn_in``.

    Raises:
      ValueError: naming the argument that is out of range.

    >>> import jax, jax.numpy as jnp
    >>> from ebjax.samplers import mala
    >>> def energy_fn(params, x):
    ...     return 0.5 * jnp.sum((x - params) ** 2)
    >>> draws = sample(jax.random.key(0), mala(step_size=0.5), energy_fn, 3.0,
    ...                jnp.zeros((100, 2)), num_samples=50, thinning=2, num_burn_in=50)
    >>> draws.positions.shape
    (50, 100, 2)
    >>> bool(abs(draws.positions.mean() - 3.0) < 0.05)
    True
    """
    leaves = jax.tree.leaves(initial_positions)
    if not leaves or any(jnp.ndim(leaf) == 0 for leaf in leaves):
        raise ValueError("initial_positions has no leading axis of chains; give it as [C, ...].")
    num_chains = len(leaves[0])
    if num_chains == 0 or any(len(leaf) != num_chains for leaf in leaves):
        raise ValueError(
            f"initial_positions has {[len(leaf) for leaf in leaves]} chains in its leaves; "
            "all must have the same number, at least 1."
        )
    for name, value, minimum in (
        ("num_samples", num_samples, 1),
        ("thinning", thinning, 1),
        ("num_burn_in", num_burn_in, 0),
        ("num_devices", num_devices, 1),
    ):
        if value < minimum:
            raise ValueError(f"{name} is {value}; it must be at least {minimum}.")
    if num_chains % num_devices:
        raise ValueError(f"num_devices is {num_devices}; it must divide the {num_chains} chains.")
    return _sample(
        key,
        params,
        initial_positions,
        kernel=kernel,
        energy_fn=energy_fn,
        num_samples=num_samples,
        thinning=thinning,
        num_burn_in=num_burn_in,
        num_devices=num_devices,
    )


@functools.partial(
    jax.jit,
    static_argnames=(
        "kernel",
        "energy_fn",
        "num_samples",
        "thinning",
        "num_burn_in",
        "num_devices",
    ),
)
def _sample(
    key,
    params,
    initial_positions,
    *,
    kernel: Kernel,
    energy_fn: EnergyFn,
    num_samples: int,
    thinning: int,
    num_burn_in: int,
    num_devices: int,
) -> Samples:
    init = jax.vmap(lambda params, x: kernel.init(energy_fn, params, x), (None, 0))
    step = jax.vmap(
        lambda key, params, state: kernel.step(key, energy_fn, params, state), (0, None, 0)
    )

    def run(replicated, split):
        params, key = replicated
        index, positions = split
        state = init(params, positions)

        def advance(state, t):
            keys = neighbouring_keys(jax.random.fold_in(key, t), index)
            return step(keys, params, state)

        def keep(state, first):
            # The sum starts from the first step and not from zeros, which would not be typed as
            # varying over devices inside a caller's `shard_map`.
            state, info = advance(state, first)
            total = jax.tree.map(_as_float, info)

            def body(offset, loop):
                state, total = loop
                state, info = advance(state, first + offset)
                return state, jax.tree.map(lambda s, i: s + i, total, info)

            if thinning > 1:
                state, total = jax.lax.fori_loop(1, thinning, body, (state, total))
            return state, (state.position, jax.tree.map(lambda leaf: leaf / thinning, total))

        state = jax.lax.fori_loop(0, num_burn_in, lambda t, s: advance(s, t)[0], state)
        starts = num_burn_in + thinning * jnp.arange(num_samples)
        state, (positions, info) = jax.lax.scan(keep, state, starts)
        return positions, info, jax.tree.map(lambda leaf: leaf[None], state)

    index = jnp.arange(len(jax.tree.leaves(initial_positions)[0]))
    positions, info, state = spread(run, num_devices, split_axis_out=1)(
        (params, key), (index, initial_positions)
    )
    return Samples(positions, info, jax.tree.map(lambda leaf: leaf[0], state))


def _as_float(leaf: jax.Array) -> jax.Array:
    return leaf.astype(jnp.promote_types(leaf.dtype, jnp.float32))

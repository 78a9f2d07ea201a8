"""Runs chains: many at a time, scanned, thinned, compiled once, over one device or several.

    chain c, step t:  key = fold_in(key, t) with c added to its last word

A chain's numbers depend on its index and not on how many others run, in what batches, nor on what
device.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ebjax.numerics import neighbouring_keys
from ebjax.parallel import spread
from ebjax.types import EnergyFn, Kernel, Params, Position, join_arrays, split_arrays

__all__ = ["Reducer", "Samples", "run_chain", "sample"]

_MAX_REPORTS = 20


class Samples(NamedTuple):
    """What ``sample`` returns.

    Attributes:
      positions: [N, C, ...] the kept positions; ``None`` if none are kept.
      info: the kernel's info, each field [N, C], the mean over the steps that led to the sample;
        without kept positions each field [C], the mean over all of them.
      state: [C, ...] the kernel's state after the last step, to go on from.
      num_evaluations: [C] int32, how often each chain evaluated the energy (with its gradient
        or without), start and burn-in included.
      reduced: what each of the ``reducers`` made of the positions, leaves [C, ...], by its name.
    """

    positions: Position
    info: Any
    state: Any
    num_evaluations: jax.Array
    reduced: dict[str, Any]


class Reducer(NamedTuple):
    """A fold over the positions of one chain, for runs too long to keep.

    Attributes:
      init: ``position -> accumulator``, with the first position folded in.
      update: ``(accumulator, position) -> accumulator``, of the same shapes and dtypes.
      result: ``accumulator -> result``, once at the end.
    """

    init: Callable[[Position], Any]
    update: Callable[[Any, Position], Any]
    result: Callable[[Any], Any] = lambda accumulator: accumulator


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
    batch_size: int | None = None,
    keep_positions: bool = True,
    reducers: Mapping[str, Reducer] | None = None,
    on_progress: Callable[[int, int, Any], None] | None = None,
) -> Samples:
    """Runs ``C`` chains and keeps every ``thinning``-th position after the burn-in.

    Compiled once for each kernel, energy function and set of static options; new parameters,
    keys, positions and arrays among the kernel's options do not compile again.

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
      batch_size: chains that run at a time on each device, for those that do not fit at once; all
        by default.
      keep_positions: whether to return the positions, or only what the reducers make of them.
      reducers: folds over the positions that would be kept, such as those of
        ``ebjax.samplers.reducers``, by a name.
      on_progress: called as ``on_progress(samples done, N, info)`` between programs, at most
        20 times; info is the mean over chains of the last stretch. Not within ``jit``.

    Returns:
      ``Samples``. Memory grows with what is kept, and not with ``thinning``, ``num_burn_in`` or,
      without positions, with N.

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
    num_chains = _num_chains(initial_positions)
    for name, value, minimum in (
        ("num_samples", num_samples, 1),
        ("thinning", thinning, 1),
        ("num_burn_in", num_burn_in, 0),
        ("num_devices", num_devices, 1),
        ("batch_size", 1 if batch_size is None else batch_size, 1),
    ):
        if value < minimum:
            raise ValueError(f"{name} is {value}; it must be at least {minimum}.")
    if num_chains % num_devices:
        raise ValueError(f"num_devices is {num_devices}; it must divide the {num_chains} chains.")
    arrays, functions = split_arrays((kernel, energy_fn))
    named = tuple(sorted((reducers or {}).items()))
    size = num_samples if on_progress is None else -(-num_samples // _MAX_REPORTS)
    sizes = [min(size, num_samples - done) for done in range(0, num_samples, size)]
    carry, stretches, first = initial_positions, [], 0
    for i, size in enumerate(sizes):
        burn_in = num_burn_in if i == 0 else 0
        carry, stretch = _sample(
            (key, params, arrays, first),
            carry,
            functions=functions,
            reducers=named,
            options=_Options(thinning, num_devices, batch_size, keep_positions),
            num_samples=size,
            num_burn_in=burn_in,
        )
        stretches.append(stretch)
        first += burn_in + size * thinning
        if on_progress is not None:
            info = jax.device_get(jax.tree.map(jnp.mean, stretch[1]))
            on_progress(sum(sizes[: i + 1]), num_samples, info)
    return _finish(carry, stretches, named, keep_positions, sizes)


class _Options(NamedTuple):
    thinning: int
    num_devices: int
    batch_size: int | None
    keep_positions: bool


class _Carry(NamedTuple):
    """What one stretch of a run hands to the next, of one chain."""

    state: Any
    num_evaluations: jax.Array
    accumulators: Any


def _num_chains(positions: Position) -> int:
    leaves = jax.tree.leaves(positions)
    if not leaves or any(jnp.ndim(leaf) == 0 for leaf in leaves):
        raise ValueError("initial_positions has no leading axis of chains; give it as [C, ...].")
    num_chains = len(leaves[0])
    if num_chains == 0 or any(len(leaf) != num_chains for leaf in leaves):
        raise ValueError(
            f"initial_positions has {[len(leaf) for leaf in leaves]} chains in its leaves; "
            "all must have the same number, at least 1."
        )
    return num_chains


@functools.partial(
    jax.jit, static_argnames=("functions", "reducers", "options", "num_samples", "num_burn_in")
)
def _sample(
    replicated,
    start,
    *,
    functions: Any,
    reducers: tuple[tuple[str, Reducer], ...],
    options: _Options,
    num_samples: int,
    num_burn_in: int,
) -> tuple[_Carry, tuple[Position, Any]]:
    """One stretch: from positions or from the carry of the stretch before."""

    def run_one(replicated, index, start):
        key, params, arrays, first = replicated
        kernel, energy_fn = join_arrays(arrays, functions)
        if not isinstance(start, _Carry):
            state = kernel.init(energy_fn, params, start)
            accumulators = {name: reducer.init(state.position) for name, reducer in reducers}
            start = _Carry(state, _num_start_evaluations(state), accumulators)

        def advance(state, count, t):
            step_key = neighbouring_keys(jax.random.fold_in(key, t), index)
            state, info = kernel.step(step_key, energy_fn, params, state)
            return state, count if kernel.num_evaluations else count + info.num_evaluations, info

        def burn_in(t, loop):
            return advance(*loop, first + t)[:2]

        def draw(loop, t):
            """``thinning`` steps, and the sum of their infos."""
            # The sum starts from the first step and not from zeros, which would not be typed as
            # varying over devices inside a caller's `shard_map`.
            state, count, info = advance(*loop, t)

            def body(offset, loop):
                state, count, total = loop
                state, count, info = advance(state, count, t + offset)
                return state, count, jax.tree.map(lambda s, i: s + i, total, info)

            carry = (state, count, jax.tree.map(_as_float, info))
            if options.thinning > 1:
                carry = jax.lax.fori_loop(1, options.thinning, body, carry)
            return carry

        def keep(carry, t):
            state, count, total = draw((carry.state, carry.num_evaluations), t)
            accumulators = {
                name: reducer.update(carry.accumulators[name], state.position)
                for name, reducer in reducers
            }
            kept = (state.position if options.keep_positions else None, total)
            return _Carry(state, count, accumulators), kept

        def keep_sum(loop, t):
            carry, (_, total) = keep(loop[0], t)
            return (carry, jax.tree.map(jnp.add, loop[1], total)), None

        loop = (start.state, start.num_evaluations)
        state, count = jax.lax.fori_loop(0, num_burn_in, burn_in, loop)
        carry = _Carry(state, count, start.accumulators)
        starts = first + num_burn_in + options.thinning * jnp.arange(num_samples)
        if options.keep_positions:
            carry, kept = jax.lax.scan(keep, carry, starts)
        else:
            carry, (_, total) = keep(carry, starts[0])
            (carry, total), _ = jax.lax.scan(keep_sum, (carry, total), starts[1:])
            kept = (None, total)
        num_steps = num_burn_in + options.thinning * num_samples
        count = carry.num_evaluations + (kernel.num_evaluations or 0) * num_steps
        return carry._replace(num_evaluations=count), kept

    chain_axis = 1 if options.keep_positions else 0

    def run(replicated, split):
        index, start = split
        if options.batch_size is None or options.batch_size >= len(index):
            return jax.vmap(run_one, (None, 0, 0), (0, chain_axis))(replicated, index, start)
        one = functools.partial(run_one, replicated)
        carry, kept = jax.lax.map(lambda x: one(*x), split, batch_size=options.batch_size)
        return carry, jax.tree.map(lambda leaf: jnp.moveaxis(leaf, 0, chain_axis), kept)

    index = jnp.arange(len(jax.tree.leaves(start)[0]))
    run = spread(run, options.num_devices, split_axis_out=(0, chain_axis))
    carry, (positions, total) = run(replicated, (index, start))
    num_steps = options.thinning * (1 if options.keep_positions else num_samples)
    return carry, (positions, jax.tree.map(lambda leaf: leaf / num_steps, total))


def _finish(carry: _Carry, stretches, reducers, keep_positions: bool, sizes) -> Samples:
    """Joins the stretches, and takes the reducers' results."""
    reduced = {
        name: jax.vmap(reducer.result)(carry.accumulators[name]) for name, reducer in reducers
    }
    if len(stretches) == 1:
        positions, info = stretches[0]
    elif keep_positions:
        positions, info = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *stretches)
    else:
        weights = [size / sum(sizes) for size in sizes]
        positions, info = jax.tree.map(
            lambda *leaves: sum(w * leaf for w, leaf in zip(weights, leaves, strict=True)),
            *stretches,
        )
    return Samples(positions, info, carry.state, carry.num_evaluations, reduced)


def _num_start_evaluations(state: Any) -> jax.Array:
    """[] int32: 1 if the kernel keeps the energy of its start, else 0."""
    leaf = jnp.ravel(jax.tree.leaves(state.position)[0])[0]
    zero = jnp.zeros_like(leaf, jnp.int32)  # typed as the position is inside `shard_map`
    return zero + int(hasattr(state, "energy"))


def _as_float(leaf: jax.Array) -> jax.Array:
    return leaf.astype(jnp.promote_types(leaf.dtype, jnp.float32))

"""Parallel tempering (replica exchange).

    replicas x_1, ..., x_R with laws p_r ∝ exp(-E_{β_r}),   β_1 < ... < β_R = 1 (the cold one)
    E_β = β E,   or any path between a base and the target

Each step moves every replica by a kernel of its own β, then offers neighbours r, r + 1 to change
places, r even at even steps and odd at odd ones, accepted with probability min(1, exp(log a)),

    log a = E_{β_r}(x_r) + E_{β_{r+1}}(x_{r+1}) - E_{β_r}(x_{r+1}) - E_{β_{r+1}}(x_r)

Both halves leave the product of the p_r invariant. The fixed alternation of even and odd pairs
makes points travel between the ends in O(R) steps, where pairs chosen at random take O(R²).

Syed, Bouchard-Côté, Deligiannidis and Doucet, "Non-reversible parallel tempering: a scalable
highly parallel MCMC scheme", JRSS B 84 (2022).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

from ebjax.numerics import all_finite, neighbouring_keys
from ebjax.samplers.decision import metropolis
from ebjax.samplers.smc.path import power_path
from ebjax.types import EnergyFn, Kernel, Params, Position, bind

__all__ = [
    "ParallelTemperingInfo",
    "ParallelTemperingState",
    "parallel_tempering",
]


class ParallelTemperingState(NamedTuple):
    """All replicas.

    Attributes:
      position: the point of the cold replica, of which the law is the target's.
      replicas: [R, ...] the state of the inner kernel at each β.
      step: [] int32, steps done; its parity says which pairs come next.
      walkers: [R] int32, which of the R walkers is at each β.
      is_rising: [R] bool, for each walker, whether it was at the first β since it was at the last.
      num_round_trips: [] int32, journeys of a walker from the last β to the first and back.
    """

    position: Position
    replicas: Any
    step: jax.Array
    walkers: jax.Array
    is_rising: jax.Array
    num_round_trips: jax.Array


class ParallelTemperingInfo(NamedTuple):
    """Diagnosis of one step.

    Attributes:
      energy: [] energy of the cold replica after the step.
      acceptance_rate: [] mean over the replicas of that of the inner kernel, 1 if it has none.
      swap_acceptance_rate: [R - 1] probability with which each pair of neighbours would be
        exchanged, also for those not on offer at this step. Their means are the rates to look at;
        Σ (1 - rate) estimates the communication barrier.
      num_swaps: [] int32, pairs that were exchanged.
      replica_acceptance_rate: [R] that of the inner kernel at each β.
      is_finite: [] bool, whether all energies that the exchanges compare are finite.
      num_evaluations: [] int32, over all replicas.
    """

    energy: jax.Array
    acceptance_rate: jax.Array
    swap_acceptance_rate: jax.Array
    num_swaps: jax.Array
    replica_acceptance_rate: jax.Array
    is_finite: jax.Array
    num_evaluations: jax.Array


def parallel_tempering(
    kernel: Kernel | Callable[..., Kernel],
    *,
    inverse_temperatures: npt.ArrayLike,
    step_size: npt.ArrayLike | None = None,
    num_local_steps: int = 1,
    is_path: bool = False,
) -> Kernel:
    """Builds the kernel.

    Args:
      kernel: the inner ``Kernel`` of all replicas, or what makes one when called as
        ``kernel(step_size=h)``, as ``mala`` or ``bind(hmc, num_steps=10)``. Its law must be that of
        the energy that it is given, so leave its own temperature at 1.
      inverse_temperatures: β [R], increasing to 1.
      step_size: [] or [R], one for each β; with a ``kernel`` that makes kernels.
      num_local_steps: inner steps between exchanges, static, at least 1.
      is_path: whether the energy function that the kernel will be given is a path, called with
        ``(β, params)`` (see ``geometric_path``). By default it is an energy, tempered to β E.

    Returns:
      A ``Kernel`` with ``ParallelTemperingState`` and ``ParallelTemperingInfo``. All replicas
      start at the one position.

    Raises:
      ValueError: naming the option that is out of range.

    >>> import jax, jax.numpy as jnp
    >>> from ebjax.samplers import mala
    >>> kernel = parallel_tempering(mala, inverse_temperatures=(0.1, 0.3, 1.0),
    ...                             step_size=(1.0, 0.3, 0.1))
    >>> def energy_fn(params, x):
    ...     return jnp.sum((x**2 - params) ** 2)
    >>> state = kernel.init(energy_fn, 2.0, jnp.ones(1))
    >>> state, info = kernel.step(jax.random.key(0), energy_fn, 2.0, state)
    >>> state.position.shape, info.swap_acceptance_rate.shape
    ((1,), (2,))
    """
    ladder = hashable(inverse_temperatures)
    check_ladder(ladder)
    if num_local_steps < 1:
        raise ValueError(f"num_local_steps is {num_local_steps}; it must be at least 1.")
    if isinstance(kernel, Kernel) != (step_size is None):
        raise ValueError(
            f"step_size is {step_size!r}; give it where kernel makes kernels, and only there."
        )
    options = {
        "kernel": kernel,
        "inverse_temperatures": ladder,
        "step_size": None if step_size is None else hashable(step_size),
        "is_path": is_path,
    }
    made = kernel
    if not isinstance(made, Kernel):
        made = made(step_size=jnp.ravel(jnp.asarray(options["step_size"]))[0])
    count = None
    if made.num_evaluations is not None:
        count = made.num_evaluations * num_local_steps * np.shape(ladder)[0]
    return Kernel(
        init=bind(_init, **options),
        step=bind(_step, num_local_steps=num_local_steps, **options),
        num_evaluations=count,
    )


def check_ladder(ladder: npt.ArrayLike) -> None:
    """Raises ``ValueError`` for a ladder that does not increase to 1; not looked at if traced."""
    if np.ndim(ladder) != 1 or np.shape(ladder)[0] < 1:
        raise ValueError(f"inverse_temperatures has the shape {np.shape(ladder)}; it must be [R].")
    if isinstance(ladder, jax.core.Tracer):
        return
    betas = np.asarray(ladder, float)
    if betas[0] < 0.0 or np.any(np.diff(betas) <= 0.0) or abs(betas[-1] - 1.0) > 1e-6:
        raise ValueError(
            f"inverse_temperatures is {betas}; it must increase strictly, from 0 or more to 1."
        )


def hashable(numbers: npt.ArrayLike) -> Any:
    """Numbers of the host as a tuple, so that equal options give equal kernels; arrays as is."""
    if isinstance(numbers, jax.Array):
        return numbers
    host = np.asarray(numbers, float)
    return tuple(host.tolist()) if host.ndim else float(host)


class _Replicas(NamedTuple):
    """The inner kernels with their path: functions over [R] replicas."""

    path: Any  # an EnergyFn, perhaps with the methods of a path
    betas: jax.Array
    step_sizes: jax.Array | None
    kernel: Any

    def kernel_of(self, step_size: jax.Array | None) -> Kernel:
        return self.kernel if step_size is None else self.kernel(step_size=step_size)

    def init(self, params: Params, positions: Position) -> Any:
        def one(beta, step_size, x):
            return self.kernel_of(step_size).init(self.path, (beta, params), x)

        return jax.vmap(one)(self.betas, self.step_sizes, positions)

    def step(self, keys: jax.Array, params: Params, states: Any) -> tuple[Any, Any]:
        def one(key, beta, step_size, state):
            return self.kernel_of(step_size).step(key, self.path, (beta, params), state)

        return jax.vmap(one)(keys, self.betas, self.step_sizes, states)

    def energies(self, params: Params, states: Any, betas: jax.Array) -> jax.Array:
        """[R] energies of the replicas at other inverse temperatures [R]."""
        if self.keeps_parts(states):
            assemble = lambda beta, parts: self.path.assemble((beta, params), parts)[0]  # noqa: E731
            return jax.vmap(assemble)(betas, states.parts)
        return jax.vmap(lambda beta, x: self.path((beta, params), x))(betas, states.position)

    def at_their_place(self, params: Params, states: Any) -> Any:
        """States that came from other β, made those of their own."""
        if not self.keeps_parts(states):
            return self.init(params, states.position)
        assemble = lambda beta, parts: self.path.assemble((beta, params), parts)  # noqa: E731
        energy, gradient = jax.vmap(assemble)(self.betas, states.parts)
        states = states._replace(energy=energy)
        return states._replace(gradient=gradient) if hasattr(states, "gradient") else states

    def keeps_parts(self, states: Any) -> bool:
        return (
            hasattr(self.path, "assemble")
            and hasattr(states, "parts")
            and hasattr(states, "energy")
        )


def _replicas(energy_fn, params, position, *, kernel, inverse_temperatures, step_size, is_path):
    path = energy_fn if is_path else power_path(energy_fn)
    # A Python number for β, which leaves the dtype of the energy to its other arguments.
    dtype = jax.eval_shape(lambda p, x: path((0.5, p), x), params, position).dtype
    betas = jnp.asarray(inverse_temperatures, dtype)
    if step_size is not None:
        step_size = jnp.broadcast_to(jnp.asarray(step_size, dtype), betas.shape)
    return _Replicas(path, betas, step_size, kernel)


def _cold(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: leaf[-1], tree)


def _init(
    energy_fn: EnergyFn,
    params: Params,
    position: Position,
    *,
    kernel,
    inverse_temperatures,
    step_size,
    is_path,
) -> ParallelTemperingState:
    replicas = _replicas(
        energy_fn,
        params,
        position,
        kernel=kernel,
        inverse_temperatures=inverse_temperatures,
        step_size=step_size,
        is_path=is_path,
    )
    num = replicas.betas.size
    positions = jax.tree.map(lambda x: jnp.broadcast_to(x, (num, *jnp.shape(x))), position)
    states = replicas.init(params, positions)
    return ParallelTemperingState(
        position=_cold(states.position),
        replicas=states,
        step=jnp.zeros((), jnp.int32),
        walkers=jnp.arange(num, dtype=jnp.int32),
        is_rising=jnp.zeros(num, bool),
        num_round_trips=jnp.zeros((), jnp.int32),
    )


def _step(
    key: jax.Array,
    energy_fn: EnergyFn,
    params: Params,
    state: ParallelTemperingState,
    *,
    kernel,
    inverse_temperatures,
    step_size,
    is_path,
    num_local_steps,
) -> tuple[ParallelTemperingState, ParallelTemperingInfo]:
    replicas = _replicas(
        energy_fn,
        params,
        state.position,
        kernel=kernel,
        inverse_temperatures=inverse_temperatures,
        step_size=step_size,
        is_path=is_path,
    )
    num = replicas.betas.size
    move_key, swap_key = jax.random.split(key)

    def body(states, i):
        keys = neighbouring_keys(jax.random.fold_in(move_key, i), jnp.arange(num))
        states, info = replicas.step(keys, params, states)
        rate = getattr(info, "acceptance_rate", jnp.ones(num, replicas.betas.dtype))
        return states, (rate, _count(replicas, info, num))

    states, (rates, counts) = jax.lax.scan(body, state.replicas, jnp.arange(num_local_steps))
    log_ratio, energies = swap_log_ratios(replicas, params, states)
    uniform = jax.random.uniform(swap_key, (num - 1,), log_ratio.dtype)
    is_on_offer = jnp.arange(num - 1) % 2 == state.step % 2
    would_swap, swap_rate = metropolis(uniform, log_ratio)
    is_swapped = is_on_offer & would_swap
    source = swap_order(is_swapped)
    states = replicas.at_their_place(params, jax.tree.map(lambda leaf: leaf[source], states))
    walkers = state.walkers[source]
    is_rising, num_trips = _count_round_trips(state, walkers)
    new = ParallelTemperingState(
        position=_cold(states.position),
        replicas=states,
        step=state.step + 1,
        walkers=walkers,
        is_rising=is_rising,
        num_round_trips=state.num_round_trips + num_trips,
    )
    rates = rates.mean(axis=0)
    info = ParallelTemperingInfo(
        energy=replicas.energies(params, states, replicas.betas)[-1],
        acceptance_rate=rates.mean(),
        swap_acceptance_rate=swap_rate,
        num_swaps=jnp.sum(is_swapped, dtype=jnp.int32),
        replica_acceptance_rate=rates,
        is_finite=all_finite(energies),
        num_evaluations=counts.sum(dtype=jnp.int32),
    )
    return new, info


def _count(replicas: _Replicas, info: Any, num: int) -> jax.Array:
    if hasattr(info, "num_evaluations"):
        return info.num_evaluations.sum(dtype=jnp.int32)
    made = replicas.kernel_of(None if replicas.step_sizes is None else replicas.step_sizes[0])
    return jnp.array((made.num_evaluations or 0) * num, jnp.int32)


def swap_log_ratios(
    replicas: _Replicas, params: Params, states: Any
) -> tuple[jax.Array, jax.Array]:
    """``(log a [R - 1], energies [R])``; -inf where an energy makes log a undefined."""
    betas = replicas.betas
    energies = replicas.energies(params, states, betas)
    # Each replica at the β of the one above it and of the one below it.
    above = replicas.energies(params, states, jnp.roll(betas, -1))[:-1]
    below = replicas.energies(params, states, jnp.roll(betas, 1))[1:]
    log_ratio = (energies[:-1] - above) + (energies[1:] - below)
    return jnp.where(jnp.isnan(log_ratio), -jnp.inf, log_ratio), energies


def swap_order(is_swapped: jax.Array) -> jax.Array:
    """[R] which replica comes to each place, given [R - 1] disjoint pairs that are exchanged."""
    up = jnp.append(is_swapped, False).astype(jnp.int32)
    down = jnp.append(False, is_swapped).astype(jnp.int32)
    return jnp.arange(up.size, dtype=jnp.int32) + up - down


def _count_round_trips(state: ParallelTemperingState, walkers: jax.Array):
    """Flags of the walkers, and how many have now come back to the last β from the first."""
    is_back = state.is_rising[walkers[-1]]
    is_rising = state.is_rising.at[walkers[-1]].set(False).at[walkers[0]].set(True)
    if walkers.size == 1:
        return state.is_rising, jnp.zeros((), jnp.int32)
    return is_rising, is_back.astype(jnp.int32)

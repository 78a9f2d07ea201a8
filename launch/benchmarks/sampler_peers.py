"""Peers that sample: blackjax, torchebm and a minimal JAX script, on a Gaussian mixture.

All keep the final state only.
"""

import functools
import math
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ebjax.energies import targets
from launch.benchmarks.energy_peers import torchebm_model
from launch.benchmarks.workload import Workload, compile_ahead, import_peer


def torchebm_langevin(
    *,
    means: np.ndarray,
    num_chains: int,
    num_steps: int,
    seed: int,
    standard_deviation: float = 1.313,
    step_size: float = 0.1,
    num_threads: int = 2,
) -> Workload:
    """Unadjusted Langevin chains on a Gaussian mixture with torchebm's `LangevinDynamics`.

    Args:
        means: centres of the equally weighted modes, shape [M, d].
        num_chains: chains C, started uniformly on the box that holds the means.
        num_steps: steps of one `run()`.
        seed: seed of the start and of the noise.
        standard_deviation: that of every mode.
        step_size: Langevin step size.
        num_threads: torch's intra-operation threads; set again at every `run()`.

    Returns:
        A workload that reports `mean_energy`, the mean over chains of
        -log sum_m exp(-|x - mean_m|^2 / (2 standard_deviation^2)) at the final positions
        (about d/2 for modes far apart: d/2 / (1 - step_size / (2 standard_deviation^2)) for ULA).

    Raises:
        PeerMissing: if torchebm or torch cannot be imported.
    """
    torch = import_peer("torch", peer="torchebm")
    samplers = import_peer("torchebm.samplers", peer="torchebm")
    started = time.perf_counter()
    generator = torch.Generator().manual_seed(seed)
    centres = torch.as_tensor(np.asarray(means), dtype=torch.float32)
    precision = 1 / standard_deviation**2

    def energy(position: Any) -> Any:
        """Energies [C] of positions [C, d]."""
        square_distance = (position[:, None] - centres).square().sum(dim=-1)
        return -torch.logsumexp(-0.5 * precision * square_distance, dim=-1)

    sampler = samplers.LangevinDynamics(torchebm_model(energy), step_size=step_size)
    low, high = centres.amin(dim=0), centres.amax(dim=0)
    uniform = torch.rand(num_chains, centres.shape[1], generator=generator)
    position = low + (high - low) * uniform

    def run() -> Mapping[str, float]:
        nonlocal position
        torch.set_num_threads(num_threads)
        position = sampler.sample(x=position, n_steps=num_steps, generator=generator)
        return {"mean_energy": energy(position).mean().item()}

    return Workload(
        name=f"torchebm Langevin, {num_chains} chains",
        run=run,
        warm_up_seconds=time.perf_counter() - started,
        note=f"CPU, {num_threads} threads; eager, the gradient by autograd",
    )


def blackjax_langevin(
    *,
    means: np.ndarray,
    standard_deviation: float,
    num_chains: int,
    num_steps: int,
    step_size: float,
    seed: int,
) -> Workload:
    """Unadjusted Langevin chains with blackjax's SGLD kernel on the full gradient.

    blackjax has no plain Langevin kernel; SGLD with a gradient estimator that ignores its
    minibatch is one. Chains are vmapped, steps scanned. Arguments as in `torchebm_langevin`.

    Returns:
        A workload that reports `mean_energy`.

    Raises:
        PeerMissing: if blackjax cannot be imported.
    """
    blackjax = import_peer("blackjax", peer="blackjax")
    energy = _mixture_energy(means, standard_deviation)
    log_density_gradient = jax.grad(lambda position: -energy(position))
    kernel = blackjax.sgld(lambda position, minibatch: log_density_gradient(position))

    def step(key: jax.Array, position: jax.Array) -> tuple[jax.Array, jax.Array]:
        return kernel.step(key, position, 0, step_size), jnp.float32(1.0)

    return _chains_workload(
        f"blackjax SGLD kernel as ULA, {num_chains} chains",
        step,
        state=_uniform_start(means, num_chains, seed),
        energy=energy,
        num_steps=num_steps,
        seed=seed,
    )


def minimal_langevin(
    *,
    means: np.ndarray,
    standard_deviation: float,
    num_chains: int,
    num_steps: int,
    step_size: float,
    seed: int,
    own_energy: bool = True,
) -> Workload:
    """Unadjusted Langevin chains as a minimal JAX script: the baseline that a library must match.

    One jitted `scan` over positions [C, d]; one key and one `jax.random.normal` for the whole batch
    at each step; nothing is kept but the final positions. Arguments as in `torchebm_langevin`;
    `own_energy` takes the mixture of this library, and otherwise the formula as one writes it.

    Returns:
        A workload that reports `mean_energy`.
    """
    energy = (_mixture_energy if own_energy else _formula_energy)(means, standard_deviation)
    gradient_fn = jax.vmap(jax.grad(energy))
    noise_standard_deviation = math.sqrt(2 * step_size)

    def step(carry: tuple[jax.Array, jax.Array], _: None) -> tuple[Any, None]:
        position, key = carry
        key, key_noise = jax.random.split(key)
        noise = noise_standard_deviation * jax.random.normal(key_noise, position.shape)
        return (position - step_size * gradient_fn(position) + noise, key), None

    def steps(position: jax.Array, key: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        (position, key), _ = jax.lax.scan(step, (position, key), None, length=num_steps)
        return position, key, jnp.mean(jax.vmap(energy)(position))

    position, key = _uniform_start(means, num_chains, seed), jax.random.key(seed + 1)
    compiled, warm_up_seconds = compile_ahead(steps, position, key)

    def run() -> Mapping[str, float]:
        nonlocal position, key
        position, key, mean_energy = jax.block_until_ready(compiled(position, key))
        return {"mean_energy": float(mean_energy)}

    return Workload(
        name=f"minimal JAX Langevin, {num_chains} chains",
        run=run,
        warm_up_seconds=warm_up_seconds,
        note="one jitted lax.scan, one draw of noise for all chains",
    )


def _mixture_energy(
    means: np.ndarray, standard_deviation: float
) -> Callable[[jax.Array], jax.Array]:
    """The energy [d] -> [] of an equally weighted Gaussian mixture: that of this library.

    All JAX variants but one take it, so that the figures compare samplers and not energies.
    """
    return functools.partial(targets.gaussian_mixture(means, standard_deviation).energy, ())


def _formula_energy(
    means: np.ndarray, standard_deviation: float
) -> Callable[[jax.Array], jax.Array]:
    """The same law up to a constant, written as its formula is: a sum over the last axis."""
    centres = jnp.asarray(means, jnp.float32)  # [M, d]
    precision = 1 / standard_deviation**2

    def energy(position: jax.Array) -> jax.Array:
        square_distance = jnp.sum(jnp.square(position - centres), axis=-1)  # [M]
        return -jax.nn.logsumexp(-0.5 * precision * square_distance)

    return energy


def _uniform_start(means: np.ndarray, num_chains: int, seed: int) -> jax.Array:
    """Positions [C, d], uniform on the smallest box that holds all means."""
    centres = jnp.asarray(means, jnp.float32)
    shape = (num_chains, centres.shape[1])
    low, high = centres.min(axis=0), centres.max(axis=0)
    return low + (high - low) * jax.random.uniform(jax.random.key(seed), shape)


def _chains_workload(
    name: str,
    step: Callable[[jax.Array, Any], tuple[Any, jax.Array]],
    *,
    state: Any,
    energy: Callable[[jax.Array], jax.Array],
    num_steps: int,
    seed: int,
) -> Workload:
    """vmapped chains of a kernel `(key, state) -> (state, acceptance rate)`, scanned over steps.

    Args:
        state: states of all chains, every leaf [C, ...]; positions, or with a field `position`.
    """
    num_chains = jax.tree.leaves(state)[0].shape[0]

    def one_step(state: Any, key: jax.Array) -> tuple[Any, jax.Array]:
        state, acceptance_rate = jax.vmap(step)(jax.random.split(key, num_chains), state)
        return state, jnp.mean(acceptance_rate)

    def steps(state: Any, key: jax.Array) -> tuple[Any, jax.Array, jax.Array]:
        key, key_steps = jax.random.split(key)
        state, acceptance_rate = jax.lax.scan(
            one_step, state, jax.random.split(key_steps, num_steps)
        )
        mean_energy = jnp.mean(jax.vmap(energy)(getattr(state, "position", state)))
        return state, key, jnp.stack([mean_energy, jnp.mean(acceptance_rate)])

    key = jax.random.key(seed + 1)
    compiled, warm_up_seconds = compile_ahead(steps, state, key)

    def run() -> Mapping[str, float]:
        nonlocal state, key
        state, key, facts = jax.block_until_ready(compiled(state, key))
        mean_energy, acceptance_rate = np.asarray(facts)
        return {"mean_energy": float(mean_energy), "acceptance_rate": float(acceptance_rate)}

    return Workload(
        name=name,
        run=run,
        warm_up_seconds=warm_up_seconds,
        note="vmapped chains in one lax.scan, a key per chain and step",
    )

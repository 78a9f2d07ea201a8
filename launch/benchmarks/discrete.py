"""Discrete samplers: spin updates a second against thrml, and effective sample sizes on Ising.

    lattice   Ising torus, E = -K Σ s s', sweeps over all spins
    DISCS     Ising with free boundaries, E = -λ Σ s s' - Σ h_i s_i, h_i = ∓μ within and beyond a
              disc of half of the area, plus uniform noise on [-σ, σ]; 100 chains; the effective
              sample size of the Hamming distance to a random state, per step, second and evaluation

Goshvadi et al., "DISCS: a benchmark for discrete sampling", NeurIPS 2023.
"""

import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ebjax.energies.exact_lattice import kaufman_energy
from ebjax.energies.lattice import ising_lattice, lattice_edges
from ebjax.numerics import neighbouring_keys
from ebjax.samplers.block_gibbs import block_gibbs
from ebjax.samplers.checkerboard import checkerboard_blocks, checkerboard_gibbs
from ebjax.samplers.diagnostics import effective_sample_size
from ebjax.samplers.discrete_langevin import discrete_langevin
from ebjax.samplers.gibbs import gibbs
from ebjax.samplers.gibbs_with_gradients import gibbs_with_gradients
from ebjax.samplers.path_auxiliary import path_auxiliary
from ebjax.samplers.run import sample
from ebjax.types import Kernel, Target
from launch.benchmarks.workload import Workload, compile_ahead, import_peer

__all__ = ["KERNELS", "discs_ising", "discs_kernel", "lattice_sweeps", "thrml_sweeps"]


def lattice_sweeps(
    *,
    side: int,
    coupling: float,
    num_chains: int,
    num_sweeps: int,
    seed: int,
    algorithm: str = "checkerboard",
    num_devices: int = 1,
) -> Workload:
    """Gibbs sweeps of an Ising torus through `ebjax.samplers.sample`, final positions only.

    Args:
        side: sides of the square lattice, even.
        coupling: K.
        num_chains: chains C, from independent fair spins.
        num_sweeps: sweeps of one `run()`.
        seed: of the start and the noise.
        algorithm: `"checkerboard"` (packed, ten sweeps a step) or `"blocks"` (by gradients).
        num_devices: local devices that the chains are spread over.

    Returns:
        A workload that reports `energy_error`: mean energy of a spin over the runs, less the exact
        one (Kaufman's).
    """
    kernels: dict[str, Callable[[], Kernel]] = {
        "checkerboard": lambda: checkerboard_gibbs(num_sweeps=10),
        "blocks": lambda: block_gibbs(blocks=checkerboard_blocks((side, side)).tolist()),
    }
    kernel, sweeps = kernels[algorithm](), 10 if algorithm == "checkerboard" else 1
    energy_fn = ising_lattice((side, side), coupling=coupling).energy
    start_key, key = jax.random.split(jax.random.key(seed))
    position = jax.random.bernoulli(start_key, 0.5, (num_chains, side, side)).astype(jnp.float32)
    count, energies = 0, []

    def run() -> Mapping[str, float]:
        nonlocal position, count
        draws = sample(
            jax.random.fold_in(key, count),
            kernel,
            energy_fn,
            (),
            position,
            num_samples=1,
            thinning=num_sweeps // sweeps,
            num_devices=num_devices,
        )
        position, count = jax.block_until_ready(draws.positions[0]), count + 1
        energies.append(_energy_per_spin(position))
        return {"energy_error": float(np.mean(energies)) - kaufman_energy((side, side), coupling)}

    started = time.perf_counter()
    run()
    first = time.perf_counter() - started
    started = time.perf_counter()
    run()
    return Workload(
        name=f"ebjax {algorithm} Gibbs, {num_chains} chains, {num_devices} devices",
        run=run,
        warm_up_seconds=first - (time.perf_counter() - started),
        note="the runner with its default diagnostics",
    )


def thrml_sweeps(
    *, side: int, coupling: float, num_chains: int, num_sweeps: int, seed: int
) -> Workload:
    """The same with thrml: two blocks, chains by `vmap`; arguments as in `lattice_sweeps`.

    Raises:
        PeerMissing: if thrml cannot be imported.
    """
    thrml = import_peer("thrml", peer="thrml")
    models = import_peer("thrml.models", peer="thrml")
    edges = lattice_edges((side, side))
    nodes = [thrml.SpinNode() for _ in range(side * side)]
    model = models.IsingEBM(
        nodes,
        [(nodes[first], nodes[second]) for first, second in edges.tolist()],
        jnp.zeros(len(nodes)),
        jnp.ones(len(edges)),
        jnp.array(coupling),
    )
    parity = checkerboard_blocks((side, side)).reshape(-1)
    order = [np.flatnonzero(parity == color) for color in (0, 1)]
    free = [thrml.Block([nodes[i] for i in sites]) for sites in order]
    program = models.IsingSamplingProgram(model, free, clamped_blocks=[])
    schedule = thrml.SamplingSchedule(n_warmup=num_sweeps, n_samples=1, steps_per_sample=1)

    def chain(key: jax.Array, state: Any) -> Any:
        observed = thrml.sample_states(key, program, schedule, state, [], free)
        return [block[-1] for block in observed]

    key = jax.random.key(seed)
    state = [
        jax.random.bernoulli(jax.random.fold_in(key, color), 0.5, (num_chains, len(sites)))
        for color, sites in enumerate(order)
    ]
    keys = jax.random.split(key, num_chains)
    compiled, warm_up_seconds = compile_ahead(jax.vmap(chain), keys, state)
    count, energies = 0, []

    def run() -> Mapping[str, float]:
        nonlocal state, count
        keys = jax.random.split(jax.random.fold_in(key, count), num_chains)
        state, count = jax.block_until_ready(compiled(keys, state)), count + 1
        flat = np.zeros((num_chains, side * side), np.float32)
        for sites, block in zip(order, state, strict=True):
            flat[:, sites] = np.asarray(block)
        energies.append(_energy_per_spin(flat.reshape(-1, side, side)))
        return {"energy_error": float(np.mean(energies)) - kaufman_energy((side, side), coupling)}

    return Workload(
        name=f"thrml block Gibbs, {num_chains} chains",
        run=run,
        warm_up_seconds=warm_up_seconds,
        note="vmapped sample_states, two blocks",
    )


def _energy_per_spin(position: Any) -> float:
    spins = 2.0 * np.asarray(position, np.float64) - 1.0
    bonds = spins * np.roll(spins, 1, axis=1) + spins * np.roll(spins, 1, axis=2)
    return float(-bonds.mean())


def discs_ising(
    side: int = 50, *, coupling: float = 0.5, field: float = 0.5, noise: float = 1.5, seed: int = 0
) -> Target:
    """The Ising law of DISCS; its high temperature by default, (1, 1, 3) is its low one."""
    rows, columns = np.indices((side, side)) / side - 0.5
    disc = np.where(rows**2 + columns**2 < 0.5 / np.pi, 1.0, -1.0)
    noises = np.random.default_rng(seed).uniform(-noise, noise, (side, side))
    fields = -(field * disc + noises)
    return ising_lattice((side, side), coupling=coupling, field=fields, periodic=False)


def discs_kernel(
    *,
    kernel: str,
    side: int = 50,
    num_chains: int = 100,
    num_steps: int = 2_000,
    coupling: float = 0.5,
    field: float = 0.5,
    noise: float = 1.5,
    seed: int = 0,
) -> Workload:
    """Effective sample size of the Hamming distance to a random state, all chains together.

    Args:
        kernel: a name of `KERNELS`.
        side: of the lattice.
        num_chains: chains. All kernels start from draws of the law, the ends of 1,000 sweeps of
            checkerboard Gibbs from fair spins.
        num_steps: recorded steps of each chain in one `run()`, which goes on from the last.
        coupling: λ.
        field: μ.
        noise: σ.
        seed: of law, start and noise.
    """
    shape = (side, side)
    made = KERNELS[kernel](shape)
    target = discs_ising(side, coupling=coupling, field=field, noise=noise, seed=seed)
    reference_key, start_key, key = jax.random.split(jax.random.key(seed), 3)
    reference = jax.random.bernoulli(reference_key, 0.5, shape)
    position = jax.random.bernoulli(start_key, 0.5, (num_chains, *shape)).astype(jnp.float32)
    position = sample(
        jax.random.fold_in(start_key, 1),
        checkerboard_gibbs(periodic=False, num_sweeps=10),
        target.energy,
        (),
        position,
        num_samples=1,
        thinning=100,
    ).positions[0]

    @jax.jit
    def record(key: jax.Array, state: Any) -> tuple[Any, jax.Array, jax.Array]:
        def step(state: Any, t: jax.Array) -> tuple[Any, tuple[jax.Array, jax.Array]]:
            keys = neighbouring_keys(jax.random.fold_in(key, t), jnp.arange(num_chains))
            state, info = jax.vmap(lambda k, s: made.step(k, target.energy, (), s))(keys, state)
            distance = jnp.sum(state.position != reference, axis=(1, 2))
            return state, (distance, jnp.mean(getattr(info, "acceptance_rate", jnp.ones(()))))

        state, (distances, rates) = jax.lax.scan(step, state, jnp.arange(num_steps))
        return state, distances.astype(jnp.float32), jnp.mean(rates)

    state = jax.vmap(lambda x: made.init(target.energy, (), x))(position)
    started = time.perf_counter()
    state = jax.block_until_ready(record(jax.random.fold_in(key, 0), state))[0]
    warm_up_seconds = time.perf_counter() - started
    count = 0

    def run() -> Mapping[str, float]:
        nonlocal state, count
        started = time.perf_counter()
        run_key = jax.random.fold_in(jax.random.fold_in(key, 1_000_000), count)
        state, distances, rate = jax.block_until_ready(record(run_key, state))
        seconds = time.perf_counter() - started
        count += 1
        size = float(effective_sample_size(distances, method="mean"))
        steps = num_steps * num_chains
        return {
            "ess_a_step": size / steps,
            "ess_a_second": size / seconds,
            "ess_an_evaluation": size / (steps * (made.num_evaluations or 1)),
            "acceptance_rate": float(rate),
            "mean_distance": float(distances.mean()),
        }

    return Workload(
        f"ebjax {kernel}", run, warm_up_seconds, "the warm-up holds as many steps as a run"
    )


KERNELS: dict[str, Callable[[tuple[int, int]], Kernel]] = {
    "gibbs": lambda shape: gibbs(),
    "gibbs_with_gradients": lambda shape: gibbs_with_gradients(),
    "path_auxiliary_fast": lambda shape: path_auxiliary(radius=30),
    "path_auxiliary_fresh": lambda shape: path_auxiliary(radius=5, is_fast=False),
    "discrete_langevin": lambda shape: discrete_langevin(step_size=0.14),
    "discrete_langevin_unadjusted": lambda shape: discrete_langevin(
        step_size=0.14, is_adjusted=False
    ),
    "block_gibbs": lambda shape: block_gibbs(blocks=checkerboard_blocks(shape).tolist()),
    "checkerboard_gibbs": lambda shape: checkerboard_gibbs(periodic=False),
}

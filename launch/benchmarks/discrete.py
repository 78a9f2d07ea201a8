"""Discrete samplers: spin updates a second against thrml, and effective sample sizes on Ising.

    lattice   Ising torus, E = -K Σ s s', sweeps over all spins
    DISCS     Ising with free boundaries, E = -λ Σ s s' - Σ h_i s_i, h_i = ∓μ within and beyond a
              disc of half of the area, plus uniform noise on [-σ, σ]; 100 chains; the effective
              sample size of the Hamming distance to a random state, per step, second and evaluation

Goshvadi et al., "DISCS: a benchmark for discrete sampling", NeurIPS 2023.
"""

import importlib
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ebjax.energies.exact_lattice import kaufman_energy
from ebjax.energies.lattice import ising_lattice, lattice_edges
from ebjax.samplers.block_gibbs import block_gibbs
from ebjax.samplers.checkerboard import checkerboard_blocks, checkerboard_gibbs
from ebjax.samplers.discrete_langevin import discrete_langevin
from ebjax.samplers.gibbs import gibbs
from ebjax.samplers.gibbs_with_gradients import gibbs_with_gradients
from ebjax.samplers.path_auxiliary import path_auxiliary
from ebjax.samplers.run import sample
from ebjax.types import Kernel, Target
from launch.benchmarks.workload import PeerMissing, Workload, compile_ahead

__all__ = ["discs_ising", "effective_sample_sizes", "lattice_sweeps", "thrml_sweeps"]


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
        algorithm: `"checkerboard"` (packed) or `"blocks"` (gradients, any graph).
        num_devices: local devices that the chains are spread over.

    Returns:
        A workload that reports `energy_per_spin` (exact: `exact_energy_per_spin`).
    """
    kernels: dict[str, Callable[[], Kernel]] = {
        "checkerboard": checkerboard_gibbs,
        "blocks": lambda: block_gibbs(blocks=checkerboard_blocks((side, side))),
    }
    kernel = kernels[algorithm]()
    energy_fn = ising_lattice((side, side), coupling=coupling).energy
    start_key, key = jax.random.split(jax.random.key(seed))
    position = jax.random.bernoulli(start_key, 0.5, (num_chains, side, side)).astype(jnp.float32)
    count = 0

    def run() -> Mapping[str, float]:
        nonlocal position, count
        draws = sample(
            jax.random.fold_in(key, count),
            kernel,
            energy_fn,
            (),
            position,
            num_samples=1,
            thinning=num_sweeps,
            num_devices=num_devices,
        )
        position, count = jax.block_until_ready(draws.positions[0]), count + 1
        return {
            "energy_per_spin": _energy_per_spin(position),
            "exact_energy_per_spin": kaufman_energy((side, side), coupling),
        }

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
    try:
        thrml = importlib.import_module("thrml")
        models = importlib.import_module("thrml.models")
    except ImportError as error:
        raise PeerMissing("thrml", "pip install thrml") from error
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
    count = 0

    def run() -> Mapping[str, float]:
        nonlocal state, count
        keys = jax.random.split(jax.random.fold_in(key, count), num_chains)
        state, count = jax.block_until_ready(compiled(keys, state)), count + 1
        flat = np.zeros((num_chains, side * side), np.float32)
        for sites, block in zip(order, state, strict=True):
            flat[:, sites] = np.asarray(block)
        return {"energy_per_spin": _energy_per_spin(flat.reshape(-1, side, side))}

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


def discrete_kernels(shape: tuple[int, int]) -> dict[str, tuple[Kernel, int]]:
    """Rows of the table: the kernel, and how many of its steps make one recorded step."""
    return {
        "Gibbs, one random site": (gibbs(), 1),
        "Gibbs with gradients": (gibbs_with_gradients(), 1),
        "Path auxiliary, fast, radius 10": (path_auxiliary(radius=10), 1),
        "Path auxiliary, fresh, radius 5": (path_auxiliary(radius=5, is_fast=False), 1),
        "Discrete Langevin, adjusted": (discrete_langevin(step_size=0.2), 1),
        "Discrete Langevin, unadjusted (biased)": (
            discrete_langevin(step_size=0.2, is_adjusted=False),
            1,
        ),
        "Block Gibbs, two colours": (block_gibbs(blocks=checkerboard_blocks(shape)), 1),
        "Checkerboard Gibbs": (checkerboard_gibbs(periodic=False), 1),
    }


def effective_sample_sizes(
    *,
    side: int = 50,
    num_chains: int = 100,
    num_steps: int = 10_000,
    coupling: float = 0.5,
    field: float = 0.5,
    noise: float = 1.5,
    seed: int = 0,
    kernels: Mapping[str, tuple[Kernel, int]] | None = None,
) -> list[dict[str, Any]]:
    """Effective sample sizes of the Hamming distance to a random state, all kernels.

    Half of the steps are burn-in. The clock stops when the device is done; compiling is not
    counted. An evaluation with its gradient counts once.

    Args:
        side: of the lattice.
        num_chains: chains, from independent fair spins.
        num_steps: steps of each chain, the burn-in included.
        coupling: λ.
        field: μ.
        noise: σ.
        seed: of law, start and noise.
        kernels: name -> (kernel, steps between records); all of this library by default.

    Returns:
        Rows with `sampler`, `ess_per_step` (mean over chains of ESS / steps), `ess_per_second` (all
        chains together), `ess_per_evaluation`, `acceptance_rate`, `mean_distance`, `seconds`.
    """
    target = discs_ising(side, coupling=coupling, field=field, noise=noise, seed=seed)
    reference_key, start_key, key = jax.random.split(jax.random.key(seed), 3)
    shape = (side, side)
    reference = jax.random.bernoulli(reference_key, 0.5, shape)
    start = jax.random.bernoulli(start_key, 0.5, (num_chains, *shape)).astype(jnp.float32)
    rows = []
    for name, (kernel, thinning) in (kernels or discrete_kernels(shape)).items():
        row = _measure(kernel, thinning, target, reference, start, key, num_steps)
        rows.append({"sampler": name, **row})
    return rows


def _measure(
    kernel: Kernel,
    thinning: int,
    target: Target,
    reference: jax.Array,
    start: jax.Array,
    key: jax.Array,
    num_steps: int,
) -> dict[str, float]:
    num_chains, num_kept = len(start), num_steps // 2 // thinning

    def record(key: jax.Array, state: Any) -> tuple[Any, jax.Array, jax.Array]:
        def step(state: Any, t: jax.Array) -> tuple[Any, tuple[jax.Array, jax.Array]]:
            keys = jax.random.split(jax.random.fold_in(key, t), num_chains)
            advance = jax.vmap(lambda k, s: kernel.step(k, target.energy, (), s))
            for i in range(thinning):
                keys = jax.vmap(jax.random.fold_in, (0, None))(keys, i) if i else keys
                state, info = advance(keys, state)
            distance = jnp.sum(state.position != reference, axis=(1, 2))
            rate = getattr(info, "acceptance_rate", jnp.ones(()))
            return state, (distance, jnp.mean(rate))

        state, (distances, rates) = jax.lax.scan(step, state, jnp.arange(num_kept))
        return state, distances, jnp.mean(rates)

    state = jax.vmap(lambda x: kernel.init(target.energy, (), x))(start)
    compiled, _ = compile_ahead(record, key, state)
    state, _, _ = jax.block_until_ready(compiled(jax.random.fold_in(key, 0), state))
    started = time.perf_counter()
    outcome = jax.block_until_ready(compiled(jax.random.fold_in(key, 1), state))
    seconds = time.perf_counter() - started
    distances = np.asarray(outcome[1], np.float64)
    sizes = effective_sizes(distances)
    steps = num_kept * thinning
    evaluations = steps * (kernel.num_evaluations or 1)
    return {
        "ess_per_step": float(sizes.mean() / steps),
        "ess_per_second": float(sizes.sum() / seconds),
        "ess_per_evaluation": float(sizes.mean() / evaluations),
        "acceptance_rate": float(outcome[2]),
        "mean_distance": float(distances.mean()),
        "standard_error": float(distances.std() / np.sqrt(max(sizes.sum(), 1.0))),
        "seconds": seconds,
    }


def effective_sizes(values: np.ndarray) -> np.ndarray:
    """[C] effective sizes of series [N, C], each with its own mean, by Geyer's initial positive
    sequence of sums of neighbouring autocorrelations.
    """
    num = len(values)
    centred = values - values.mean(axis=0)
    spectrum = np.fft.rfft(centred, 2 * num, axis=0)
    covariance = np.fft.irfft(np.abs(spectrum) ** 2, axis=0)[:num]
    variance = np.where(covariance[0] > 0.0, covariance[0], 1.0)
    pairs = (covariance / variance)[: num - num % 2].reshape(-1, 2, values.shape[1]).sum(axis=1)
    is_positive = np.cumprod(pairs > 0.0, axis=0)
    time_constant = np.maximum(2.0 * (pairs * is_positive).sum(axis=0) - 1.0, 1.0 / num)
    return np.where(covariance[0] > 0.0, num / time_constant, 0.0)


def as_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows of `effective_sample_sizes` as a Markdown table."""
    names = list(rows[0])
    lines = ["| " + " | ".join(names) + " |", "|" + " --- |" * len(names)]
    for row in rows:
        cells = [value if isinstance(value, str) else f"{value:.4g}" for value in row.values()]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)

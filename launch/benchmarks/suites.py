"""The suites: which variants run, and which ratios have a bar."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

__all__ = ["SUITES", "Comparison", "Limit", "Suite", "Variant"]


class Variant(NamedTuple):
    """One row of a table.

    Attributes:
      name: of the row.
      module: file of ``launch.benchmarks`` that has the workload.
      function: in that file.
      options: its arguments.
      work: units of work of one run.
      num_devices: virtual CPU devices of its process.
    """

    name: str
    module: str
    function: str
    options: dict[str, Any]
    work: int
    num_devices: int = 1


class Comparison(NamedTuple):
    """A ratio of rates: ``name`` over ``peer`` must be at least ``bar``; 0 is no bar.

    The ratios of one ``group`` have no bar of their own but one of their geometric mean. With a
    ``fact`` that measured figure is compared and not the rate.
    """

    name: str
    peer: str
    bar: float = 0.0
    group: str = ""
    fact: str = ""


class Limit(NamedTuple):
    """A measured figure with a bar: ``fact`` of ``name``, after the last round, at most ``bar``."""

    name: str
    fact: str
    bar: float


class Suite(NamedTuple):
    """Variants that take turns, and what is compared.

    Attributes:
      about: a line for people.
      unit: of work.
      variants: the rows.
      comparisons: the ratios.
      limits: figures with a bar of their own.
    """

    about: str
    unit: str
    variants: tuple[Variant, ...]
    comparisons: tuple[Comparison, ...]
    limits: tuple[Limit, ...] = ()


def _langevin() -> Suite:
    means = np.random.default_rng(0).uniform(-40.0, 40.0, (40, 2)).round(3).tolist()
    rows: tuple[tuple[str, str, str, dict[str, Any], int], ...] = (
        ("ebjax", "own", "sampler", {}, 1),
        ("ebjax-2-devices", "own", "sampler", {"num_devices": 2}, 2),
        ("minimal-jax", "sampler_peers", "minimal_langevin", {}, 1),
        ("hand-written", "sampler_peers", "minimal_langevin", {"own_energy": False}, 1),
        ("blackjax", "sampler_peers", "blackjax_langevin", {}, 1),
        ("torchebm", "sampler_peers", "torchebm_langevin", {}, 1),
    )
    variants: list[Variant] = []
    comparisons: list[Comparison] = []
    for num_chains, num_steps in ((1_000, 10_000), (10_000, 2_000)):
        shared = {
            "means": means,
            "standard_deviation": 1.313,
            "num_chains": num_chains,
            "num_steps": num_steps,
            "step_size": 0.1,
            "seed": 0,
        }
        variants += [
            Variant(
                f"{name}-{num_chains}",
                module,
                function,
                {**shared, **more},
                num_chains * num_steps,
                num_devices,
            )
            for name, module, function, more, num_devices in rows
        ]
        # On the library's energy one device already keeps both cores busy; a scan with the energy
        # as its formula reads is what one would have written by hand.
        comparisons += [
            Comparison(f"ebjax-{num_chains}", f"minimal-jax-{num_chains}", 0.95),
            Comparison(f"ebjax-{num_chains}", f"hand-written-{num_chains}", 0.95),
            Comparison(f"ebjax-2-devices-{num_chains}", f"hand-written-{num_chains}", 1.6),
            Comparison(f"ebjax-{num_chains}", f"blackjax-{num_chains}", 1.0),
            Comparison(f"ebjax-{num_chains}", f"torchebm-{num_chains}", 3.0),
        ]
    return Suite(
        "Unadjusted Langevin on a 40-mode Gaussian mixture in 2-D, final positions only",
        "chain-steps",
        tuple(variants),
        tuple(comparisons),
    )


def _products(name: str, function: str, length: int, updates: int, **options: Any) -> Variant:
    """What no code around the network can save, for trajectories of ``length`` steps."""
    options |= {"num_trajectories": 16, "length": length, "num_updates": updates}
    return Variant(name, "flow_products", function, options, updates)


def _gflownet_hypergrid() -> Suite:
    # The initial networks of the three libraries differ, so the stop bias that gives the same mean
    # length does too; the length that came out is in the table. Rates are zero so that it stays.
    biases = {
        "short": {"gflownet": -0.75, "gfnx": -0.7, "torchgfn": -0.7},
        "long": {"gflownet": -2.35, "gfnx": -2.35, "torchgfn": -2.45},
    }
    bars = {"short": {"gfnx": 4.0, "torchgfn": 7.0}, "long": {"gfnx": 2.0}}
    workloads = {
        "gflownet": ("own", "flow_hypergrid", {"short": 1000, "long": 400}),
        "gfnx": ("flow_peers", "gfnx_hypergrid", {"short": 150, "long": 150}),
        "torchgfn": ("flow_peers", "torchgfn_hypergrid", {"short": 80, "long": 30}),
    }
    variants: list[Variant] = []
    comparisons: list[Comparison] = []
    for length, bias in biases.items():
        for name, (module, function, updates) in workloads.items():
            options = {
                "dim": 4,
                "side": 20,
                "num_trajectories": 16,
                "num_updates": updates[length],
                "seed": 0,
                "stop_bias": bias[name],
                "frozen": True,
            }
            variants.append(Variant(f"{name}-{length}", module, function, options, updates[length]))
        comparisons += [
            Comparison(f"gflownet-{length}", f"{peer}-{length}", bar)
            for peer, bar in bars[length].items()
        ]
        steps = {"short": 8, "long": 23}[length]
        variants.append(
            _products(
                f"products-{length}", "hypergrid_products", steps, 400, dim=4, side=20, seed=0
            )
        )
        comparisons.append(Comparison(f"products-{length}", f"gfnx-{length}"))
    return Suite(
        "Trajectory balance, hypergrid 4-D side 20, 16 trajectories, MLP 2x256, learned P_B",
        "updates",
        tuple(variants),
        tuple(comparisons),
    )


def _gflownet_small_grid() -> Suite:
    """The smallest standard grid: what an update costs, and a whole run with its compilation."""
    grid = {"dim": 2, "side": 8, "num_trajectories": 16, "seed": 0}
    rows = (
        ("gflownet", "own", "flow_hypergrid", 5000),
        ("gfnx", "flow_peers", "gfnx_hypergrid", 1000),
        ("torchgfn", "flow_peers", "torchgfn_hypergrid", 100),
    )
    return Suite(
        "Trajectory balance, hypergrid 2-D side 8, 16 trajectories, MLP 2x256, learned P_B",
        "updates",
        (
            *(
                Variant(name, module, function, {**grid, "num_updates": updates}, updates)
                for name, module, function, updates in rows
            ),
            _products("products", "hypergrid_products", 8, 1000, dim=2, side=8, seed=0),
        ),
        (
            Comparison("gflownet", "gfnx", 2.0),
            Comparison("gflownet", "torchgfn", 8.0),
            Comparison("products", "gfnx"),
        ),
    )


def _gflownet_time_to_law() -> Suite:
    options = {
        "dim": 2,
        "side": 8,
        "num_trajectories": 16,
        "seed": 0,
        "total_variation": 0.05,
        "updates_per_look": 50,
    }
    return Suite(
        "From nothing to a total variation of 0.05, hypergrid 2-D side 8, compilation included",
        "runs",
        (
            Variant("gflownet", "own", "time_to_law", options, 1),
            Variant("gfnx", "flow_peers", "gfnx_time_to_law", options, 1),
        ),
        (Comparison("gflownet", "gfnx", 2.0),),
    )


def _gflownet_tasks() -> Suite:
    # Updates of one run: each side takes about as long.
    updates = {
        "tfbind8": (500, 100),
        "ising": (20, 10),
        "dag": (300, 100),
        "bits": (20, 10),
    }
    bars = {"tfbind8": 1.5, "ising": 1.5, "dag": 1.5, "bits": 1.3}
    lengths = {"tfbind8": 8, "ising": 100, "dag": 6, "bits": 15}
    variants = []
    for task, counts in updates.items():
        for (name, function), count in zip(
            (("gflownet", "ebjax_task"), ("gfnx", "gfnx_task")), counts, strict=True
        ):
            options = {"task": task, "num_trajectories": 16, "num_updates": count}
            variants.append(Variant(f"{name}-{task}", "flow_tasks", function, options, count))
        variants.append(
            _products(f"products-{task}", "task_products", lengths[task], counts[0], task=task)
        )
    return Suite(
        "Trajectory balance, 16 trajectories, uniform P_B, same networks",
        "updates",
        tuple(variants),
        (
            *(Comparison(f"gflownet-{task}", f"gfnx-{task}", bar) for task, bar in bars.items()),
            *(Comparison(f"products-{task}", f"gfnx-{task}") for task in bars),
        ),
    )


def _pcd_step() -> Suite:
    shared = {"step_size": 0.01, "noise_scale": 1.0, "seed": 0}
    rows: tuple[tuple[str, str, str, dict[str, Any], int, int], ...] = (
        ("ebjax", "own", "pcd", {}, 80, 1),
        ("ebjax-2-devices", "own", "pcd", {"num_devices": 2}, 80, 2),
        ("minimal-jax", "energy_peers", "minimal_pcd", {}, 80, 1),
        ("torchebm", "energy_peers", "torchebm_pcd", {}, 30, 1),
    )
    return Suite(
        "One PCD update: 60 Langevin steps, MLP 2-128-128-1, batch 256, 10,000 chains",
        "updates",
        tuple(
            Variant(
                name,
                module,
                function,
                {**shared, **more, "num_updates": updates},
                updates,
                num_devices,
            )
            for name, module, function, more, updates, num_devices in rows
        ),
        (Comparison("ebjax", "minimal-jax", 0.95), Comparison("ebjax", "torchebm", 2.0)),
    )


def _dispatch() -> Suite:
    variants = [
        Variant(
            f"{backend}-{num_devices}-device{'s' if num_devices > 1 else ''}-{steps}-a-call",
            "own",
            "dispatch",
            {
                "num_updates": 2000,
                "steps_per_call": steps,
                "backend": backend,
                "num_devices": num_devices,
            },
            2000,
            num_devices,
        )
        for backend in ("pmap", "shard_map")
        for num_devices in (1, 2)
        for steps in (1, 10)
    ]
    return Suite(
        "Updates of a single parameter: what the training loop itself costs",
        "updates",
        tuple(variants),
        (),
    )


def _kernel(algorithm: str, about: str, steps: dict[tuple[str, int], int]) -> Suite:
    variants: list[Variant] = []
    comparisons: list[Comparison] = []
    rows: tuple[tuple[str, str, dict[str, Any], int], ...] = (
        ("ebjax", "ebjax_kernel", {}, 1),
        ("ebjax-2-devices", "ebjax_kernel", {"num_devices": 2}, 2),
        ("blackjax", "blackjax_kernel", {}, 1),
    )
    for (target, num_chains), num_steps in steps.items():
        shared = {
            "algorithm": algorithm,
            "target": target,
            "num_chains": num_chains,
            "num_steps": num_steps,
            "seed": 0,
        }
        case = f"{target}-{num_chains}"
        variants += [
            Variant(
                f"{name}-{case}",
                "kernels",
                function,
                {**shared, **more},
                num_chains * num_steps,
                num_devices,
            )
            for name, function, more, num_devices in rows
        ]
        comparisons += [
            Comparison(f"ebjax-{case}", f"blackjax-{case}", 1.0),
            Comparison(f"ebjax-2-devices-{case}", f"blackjax-{case}", 1.8, "ebjax-2-devices"),
        ]
    return Suite(about, "chain-steps", tuple(variants), tuple(comparisons))


def _kernels() -> dict[str, Suite]:
    abouts = {
        "ula": "Unadjusted Langevin",
        "mala": "MALA",
        "hmc": "HMC, 10 leapfrog steps",
        "nuts": "NUTS",
    }
    cases = (("mixture", 1_000), ("mixture", 10_000), ("gaussian", 1_000), ("gaussian", 10_000))
    num_steps = {
        "ula": (5_000, 600, 700, 60),
        "mala": (4_000, 500, 500, 50),
        "hmc": (500, 60, 60, 6),
        "nuts": (100, 10, 2, 1),
    }
    return {
        name: _kernel(
            name,
            f"{about}: 2-D mixture of 40 and 100-d Gaussian with condition number 1e4",
            dict(zip(cases, num_steps[name], strict=True)),
        )
        for name, about in abouts.items()
    }


def _ess() -> Suite:
    cases = {"4-chains": (4, 1_000, 1_000), "100-chains": (100, 300, 300)}
    variants, comparisons = [], []
    for case, (num_chains, num_warmup, num_samples) in cases.items():
        options = {
            "num_chains": num_chains,
            "num_warmup": num_warmup,
            "num_samples": num_samples,
        }
        # numpyro's vectorised chains take minutes where there are a hundred.
        peers = ("blackjax", "numpyro") if num_chains < 10 else ("blackjax",)
        variants += [
            Variant(f"{name}-{case}", "effective", f"{name}_nuts", options, 1)
            for name in ("ebjax", *peers)
        ]
        comparisons += [
            Comparison(f"ebjax-{case}", f"{peer}-{case}", 1.0, fact="ess_a_second")
            for peer in peers
        ]
    return Suite(
        "NUTS after adaptation on a 100-d Gaussian with condition number 1e4",
        "runs",
        tuple(variants),
        tuple(comparisons),
    )


def _ising() -> Suite:
    shared = {"side": 64, "coupling": 0.3, "num_chains": 100, "num_sweeps": 100, "seed": 0}
    rows: tuple[tuple[str, str, dict[str, Any], int], ...] = (
        ("checkerboard", "lattice_sweeps", {}, 1),
        ("checkerboard-2-devices", "lattice_sweeps", {"num_devices": 2}, 2),
        ("blocks", "lattice_sweeps", {"algorithm": "blocks"}, 1),
        ("thrml", "thrml_sweeps", {}, 1),
    )
    return Suite(
        "Gibbs sweeps of a 64 x 64 Ising torus, K = 0.3, 100 chains",
        "spin updates",
        tuple(
            Variant(name, "discrete", function, {**shared, **more}, 64 * 64 * 100 * 100, devices)
            for name, function, more, devices in rows
        ),
        (Comparison("checkerboard", "thrml", 1.5), Comparison("blocks", "thrml", 1.0)),
    )


def _discs() -> Suite:
    steps = {
        "gibbs": 20_000,
        "gibbs_with_gradients": 5_000,
        "path_auxiliary_fast": 1_000,
        "path_auxiliary_fresh": 500,
        "discrete_langevin": 1_000,
        "discrete_langevin_unadjusted": 1_000,
        "block_gibbs": 1_000,
        "checkerboard_gibbs": 1_000,
    }
    return Suite(
        "Ising 50 x 50 with random fields, 100 chains: Hamming distance to a random state",
        "chain-steps",
        tuple(
            Variant(name, "discrete", "discs_kernel", {"kernel": name, "num_steps": num}, 100 * num)
            for name, num in steps.items()
        ),
        (),
    )


# Settings of each target: leapfrog steps, jitter, ladder (T, power), and those of `smc_sample`.
_LOG_Z = {
    "conjugate": {
        "ladder": (64, 1.0),
        "num_mcmc_steps": 5,
        "step_size": 0.1,
        "target_acceptance": 0.65,
    },
    "many_well": {
        "ladder": (64, 1.0),
        "num_mcmc_steps": 10,
        "step_size": 0.1,
        "target_acceptance": 0.65,
    },
    "mixture": {
        "ladder": (256, 3.0),
        "num_leapfrog": 5,
        "num_mcmc_steps": 10,
        "step_size": 5.0,
        "target_acceptance": 0.65,
    },
    "funnel": {
        "ladder": (128, 1.5),
        "num_leapfrog": 5,
        "jitter": 0.9,
        "num_mcmc_steps": 20,
        "step_size": 0.1,
        "target_acceptance": 0.9,
    },
}


def _log_z() -> Suite:
    variants = [
        Variant(
            f"ebjax-{target}",
            "populations",
            "ebjax_log_z",
            {"target": target, "num_particles": 2_000, **options},
            1,
        )
        for target, options in _LOG_Z.items()
    ]
    many_well = {
        "target": "many_well",
        "num_particles": 2_000,
        "step_size": 0.2,
        "num_mcmc_steps": 10,
        "ladder": (64, 1.0),
    }
    variants.append(
        Variant("blackjax-many_well", "populations", "blackjax_log_z", many_well, 1),
    )
    bars = {"conjugate": 0.04, "many_well": 0.05, "mixture": 0.01, "funnel": 0.08}
    return Suite(
        "log Z by tempered SMC with HMC moves, 2,000 particles, a seed a round",
        "estimates",
        tuple(variants),
        (Comparison("ebjax-many_well", "blackjax-many_well", 1.0),),
        tuple(Limit(f"ebjax-{target}", "error", bar) for target, bar in bars.items()),
    )


def _cox() -> Suite:
    """The protocol of annealed flow transport's table, and a start that is fitted."""
    shared = {"num_particles": 2_000, "target_acceptance": 0.65, "num_mcmc_steps": 1}
    rows = {
        "prior": {"target": "cox", "ladder": (11, 2.0), "step_size": 0.2},
        "fitted": {
            "target": "cox_fitted",
            "ladder": (8, 1.0),
            "step_size": 0.3,
            "num_leapfrog": 5,
        },
    }
    return Suite(
        "log Z of a log-Gaussian Cox process, 1,600-d, simulated counts, 2,000 particles",
        "estimates",
        tuple(
            Variant(f"ebjax-{name}", "populations", "ebjax_log_z", {**shared, **options}, 1)
            for name, options in rows.items()
        ),
        (),
        (Limit("ebjax-fitted", "error", 0.194),),
    )


def _cox_reference() -> Suite:
    """What `COX_LOG_Z` comes from: other seeds and more temperatures than those of `cox`."""
    options = {
        "target": "cox_fitted",
        "num_particles": 2_000,
        "ladder": (32, 1.0),
        "step_size": 0.3,
        "target_acceptance": 0.65,
        "num_leapfrog": 5,
        "num_mcmc_steps": 1,
        "first_seed": 10_000,
    }
    return Suite(
        "The reference for log Z of the Cox process: its error is spread / sqrt(seeds)",
        "estimates",
        (Variant("ebjax-fitted", "populations", "ebjax_log_z", options, 1),),
        (),
    )


def _smc() -> Suite:
    variants, comparisons = [], []
    for target, step_size in (("conjugate", 0.2), ("many_well", 0.2)):
        shared = {
            "target": target,
            "num_particles": 2_000,
            "step_size": step_size,
            "num_mcmc_steps": 5,
            "target_ess": 0.9,
        }
        own = {**shared, "ess_threshold": 1.0}  # blackjax resamples at every temperature
        variants += [
            Variant(f"ebjax-{target}", "populations", "ebjax_log_z", own, 1),
            Variant(
                f"ebjax-2-devices-{target}",
                "populations",
                "ebjax_log_z",
                {**own, "num_devices": 2},
                1,
                2,
            ),
            Variant(f"blackjax-{target}", "populations", "blackjax_log_z", shared, 1),
        ]
        comparisons.append(Comparison(f"ebjax-{target}", f"blackjax-{target}", 1.5))
    return Suite(
        "Adaptive tempered SMC, 2,000 particles, 5 HMC(10) steps of one size a temperature",
        "estimates",
        tuple(variants),
        tuple(comparisons),
    )


def _rbm() -> Suite:
    options = {
        "num_visible": 784,
        "num_hidden": 250,
        "batch_size": 100,
        "num_updates": 200,
        "seed": 0,
    }
    return Suite(
        "Updates of a restricted Boltzmann machine, 784 x 250, PCD-1, batches of 100",
        "updates",
        (
            Variant("ebjax", "rbm", "ebjax_updates", options, 200),
            Variant(
                "ebjax-2-devices", "rbm", "ebjax_updates", options | {"num_devices": 2}, 200, 2
            ),
            Variant("products-and-draws", "rbm", "products_and_draws", options, 200),
            Variant("sklearn", "rbm", "sklearn_updates", options, 200),
        ),
        (Comparison("ebjax", "sklearn", 3.0),),
    )


SUITES: dict[str, Suite] = {
    "langevin": _langevin(),
    "gflownet_hypergrid": _gflownet_hypergrid(),
    "gflownet_small_grid": _gflownet_small_grid(),
    "gflownet_time_to_law": _gflownet_time_to_law(),
    "gflownet_tasks": _gflownet_tasks(),
    "pcd_step": _pcd_step(),
    "dispatch": _dispatch(),
    **_kernels(),
    "ess": _ess(),
    "ising": _ising(),
    "discs": _discs(),
    "log_z": _log_z(),
    "cox": _cox(),
    "cox_reference": _cox_reference(),
    "smc": _smc(),
    "rbm": _rbm(),
}

"""Suites of samplers and of log Z."""

from __future__ import annotations

from typing import Any

import numpy as np

from launch.benchmarks.suite import Comparison, Limit, Suite, Variant

__all__ = ["SAMPLER_SUITES"]


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


SAMPLER_SUITES: dict[str, Suite] = {
    "langevin": _langevin(),
    **_kernels(),
    "ess": _ess(),
    "ising": _ising(),
    "discs": _discs(),
    "log_z": _log_z(),
    "cox": _cox(),
    "cox_reference": _cox_reference(),
    "smc": _smc(),
}

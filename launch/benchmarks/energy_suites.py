"""Suites of training energies, and of the training loop itself."""

from __future__ import annotations

from typing import Any

from launch.benchmarks.suite import Comparison, Suite, Variant

__all__ = ["ENERGY_SUITES"]


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


def _rbm() -> Suite:
    """Batches of 100, which matrix products bound, and of 10, scikit-learn's own default."""
    variants: list[Variant] = []
    comparisons: list[Comparison] = []
    for batch_size, updates in ((100, 200), (10, 1000)):
        options = {
            "num_visible": 784,
            "num_hidden": 250,
            "batch_size": batch_size,
            "num_updates": updates,
            "seed": 0,
        }
        for name, function, devices in (
            ("ebjax", "ebjax_updates", 1),
            ("ebjax-2-devices", "ebjax_updates", 2),
            ("products-and-draws", "products_and_draws", 1),
            ("sklearn", "sklearn_updates", 1),
        ):
            own = options | ({"num_devices": devices} if devices > 1 else {})
            variants.append(Variant(f"{name}-{batch_size}", "rbm", function, own, updates, devices))
        sklearn = f"sklearn-{batch_size}"
        comparisons += [
            Comparison(f"ebjax-{batch_size}", sklearn, 3.0),
            Comparison(f"products-and-draws-{batch_size}", sklearn),
        ]
    return Suite(
        "Updates of a restricted Boltzmann machine, 784 x 250, PCD-1, batches of 100 and 10",
        "updates",
        tuple(variants),
        tuple(comparisons),
    )


ENERGY_SUITES: dict[str, Suite] = {
    "pcd_step": _pcd_step(),
    "dispatch": _dispatch(),
    "rbm": _rbm(),
}

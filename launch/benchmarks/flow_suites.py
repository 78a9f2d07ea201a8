"""Suites of GFlowNets."""

from __future__ import annotations

from typing import Any

from launch.benchmarks.suite import Comparison, Suite, Variant

__all__ = ["FLOW_SUITES"]


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
    bars = {"short": {"gfnx": 6.0, "torchgfn": 10.0}, "long": {"gfnx": 2.5}}
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
    """A grid so small that compilation is most of the time, and one so large that it is not."""
    rows = (
        ("small", {"dim": 2, "side": 8, "total_variation": 0.05, "updates_per_look": 50}),
        ("large", {"dim": 4, "side": 20, "total_variation": 0.1, "updates_per_look": 1000}),
    )
    peers = (("gflownet", "own", "time_to_law"), ("gfnx", "flow_peers", "gfnx_time_to_law"))
    return Suite(
        "From nothing to a total variation, compilation included: hypergrid 2-D side 8 to 0.05 "
        "(small), 4-D side 20 to 0.1 (large)",
        "runs",
        tuple(
            Variant(
                f"{name}-{size}", module, function, {"num_trajectories": 16, "seed": 0, **row}, 1
            )
            for size, row in rows
            for name, module, function in peers
        ),
        tuple(Comparison(f"gflownet-{size}", f"gfnx-{size}", 2.0) for size, _ in rows),
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
    # States that the gradient pass takes at a time where 128, as elsewhere, is not the fastest.
    chunks = {"ising": 400, "bits": 240}
    lengths = {"tfbind8": 8, "ising": 100, "dag": 6, "bits": 15}
    variants = []
    for task, counts in updates.items():
        for (name, function), count in zip(
            (("gflownet", "ebjax_task"), ("gfnx", "gfnx_task")), counts, strict=True
        ):
            options = {"task": task, "num_trajectories": 16, "num_updates": count}
            if name == "gflownet":
                options["chunk_size"] = chunks.get(task, 128)
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


FLOW_SUITES: dict[str, Suite] = {
    "gflownet_hypergrid": _gflownet_hypergrid(),
    "gflownet_small_grid": _gflownet_small_grid(),
    "gflownet_time_to_law": _gflownet_time_to_law(),
    "gflownet_tasks": _gflownet_tasks(),
}

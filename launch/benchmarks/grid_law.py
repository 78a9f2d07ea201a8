"""How long a GFlowNet on the hypergrid needs to reach its target law, compilation included."""

import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gflownet.environments.hypergrid import HypergridState, hypergrid
from launch.benchmarks.workload import Workload

__all__ = ["grid_positions", "law_of_logits", "time_to_law_workload"]

_MAX_UPDATES = 20_000


def grid_positions(dim: int, side: int) -> np.ndarray:
    """[H^D, D] int32, the last coordinate changing fastest.

    >>> grid_positions(2, 2).tolist()
    [[0, 0], [0, 1], [1, 0], [1, 1]]
    """
    return np.stack(np.unravel_index(np.arange(side**dim), (side,) * dim), -1).astype(np.int32)


def law_of_logits(logits: Any, side: int) -> np.ndarray:
    """[H^D] the law of where trajectories stop, by adding up what reaches each cell.

    Args:
      logits: [H^D, D + 1] of the forward policy, the stop last, in the order of `grid_positions`.
      side: H.

    >>> law_of_logits(np.log([[1.0, 3.0], [1.0, 1.0]]), 2).tolist()  # the last cell has to stop
    [0.75, 0.25]
    """
    dim = np.shape(logits)[1] - 1
    positions = grid_positions(dim, side)
    steps = side ** np.arange(dim)[::-1]
    weights = np.exp(np.asarray(logits, np.float64))
    weights[:, :dim] *= positions < side - 1
    probabilities = weights / weights.sum(axis=1, keepdims=True)
    reached = np.zeros(len(positions) + side**dim)  # beyond the grid nothing is added
    reached[0] = 1.0
    for cell, leaves in enumerate(probabilities):
        # Cells of smaller indices are all that lead here.
        reached[cell + steps] += reached[cell] * leaves[:dim]
    return reached[: len(positions)] * probabilities[:, dim]


def _exact_law(dim: int, side: int) -> np.ndarray:
    """[H^D] R / Z."""
    positions = jnp.asarray(grid_positions(dim, side))
    states = HypergridState(positions, jnp.ones(len(positions), bool))
    log_reward = jax.vmap(hypergrid(dim=dim, side=side).log_reward, (None, 0))((), states)
    reward = np.exp(np.asarray(log_reward, np.float64))
    return reward / reward.sum()


def time_to_law_workload(
    name: str,
    start: Callable[[int], tuple[Callable[[int], Any], Callable[[], Any]]],
    *,
    dim: int,
    side: int,
    seed: int,
    total_variation: float,
    updates_per_look: int,
) -> Workload:
    """A workload whose every `run()` trains one flow from nothing, until its law is near enough.

    Args:
      name: of the workload.
      start: `seed -> (advance, logits)`: builds what is trained; `advance(n)` does n updates,
        `logits()` gives those of `law_of_logits`. All that it compiles is part of the time.
      dim: D.
      side: H.
      seed: of the first run; each adds one.
      total_variation: where a run ends.
      updates_per_look: updates between two looks at the law.

    Raises:
      RuntimeError: in `run()`, if 20,000 updates were not enough.
    """
    exact = _exact_law(dim, side)
    count = 0

    def run() -> Mapping[str, float]:
        nonlocal count
        started = time.perf_counter()
        advance, logits = start(seed + count)
        count += 1
        for num_updates in range(updates_per_look, _MAX_UPDATES + 1, updates_per_look):
            advance(updates_per_look)
            if num_updates == updates_per_look:
                first = time.perf_counter() - started
            distance = 0.5 * np.abs(law_of_logits(logits(), side) - exact).sum()
            if distance <= total_variation:
                return {
                    "updates": num_updates,
                    "total_variation": float(distance),
                    "seconds_to_first_look": first,
                }
        raise RuntimeError(f"{name}: total variation {distance:.3g} after {_MAX_UPDATES} updates.")

    return Workload(
        name, run, 0.0, f"compilation included; a look every {updates_per_look} updates"
    )

"""Long chains from data: does the energy keep what it was trained on?

    x_0 = data,   x_{t+1} ~ kernel(· | x_t),   e(t) = mean E(x_t),   mmd²(t) = MMD²(x_t, reference)

Under a kernel that leaves p invariant, data drawn from p stays as it is: e and mmd² are flat. An
energy trained with short chains often has its modes elsewhere, and only chains longer than those of
training show it.

Nijkamp, Hill, Han, Zhu and Wu, "On the anatomy of MCMC-based maximum likelihood learning of
energy-based models", AAAI 2020.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ebjax.evaluation.checks import flat_examples
from ebjax.evaluation.likelihood import energies_of
from ebjax.samplers.diagnostics import maximum_mean_discrepancy
from ebjax.samplers.run import sample
from ebjax.types import EnergyFn, Kernel, Params, Position

__all__ = ["Drift", "long_run_drift"]


class Drift(NamedTuple):
    """Chains from data at R + 1 times.

    Attributes:
      steps: [R + 1] steps since the start, the first 0.
      energy: [R + 1] mean energy of the chains.
      energy_standard_error: [R + 1] of that mean over chains.
      mmd: [R + 1] squared MMD to the reference, one bandwidth for all times. The first is that
        of the data itself, the level to compare with.
      energy_drift: (last energy - first) over the standard deviation of the first; 0 is flat.
      is_finite: whether all positions stayed finite.
      positions: [R + 1, C, ...] the chains, for figures.
    """

    steps: np.ndarray
    energy: np.ndarray
    energy_standard_error: np.ndarray
    mmd: np.ndarray
    energy_drift: float
    is_finite: bool
    positions: Position


def _median_square(points: np.ndarray) -> float:
    points = points[:: -(-len(points) // 500)]
    squares = np.square(points[:, None] - points[None]).sum(axis=-1)
    return float(np.median(squares[np.triu_indices(len(points), 1)]))


def long_run_drift(
    key: jax.Array,
    kernel: Kernel,
    energy_fn: EnergyFn,
    params: Params,
    data: jax.Array,
    reference: jax.Array,
    *,
    num_steps: int,
    num_records: int = 20,
) -> Drift:
    """Runs a chain from each example and watches energy and distance from the data.

    Args:
      key: [] key.
      kernel: the transition; the one that samples of the model are drawn with.
      energy_fn: E.
      params: its parameters.
      data: [C, ...] where the chains start, C >= 2.
      reference: [M, ...] other examples of the same law.
      num_steps: length of the chains, a multiple of ``num_records``; several times that of
        training.
      num_records: R, times at which the chains are looked at.

    Returns:
      A ``Drift``.

    Raises:
      ValueError: if a set has fewer than two examples or is not finite, or steps do not divide.

    >>> from ebjax.samplers import mala
    >>> energy_fn = lambda params, x: 0.5 * jnp.sum(x**2)
    >>> data, reference = jax.random.normal(jax.random.key(0), (2, 300, 2))
    >>> drift = long_run_drift(jax.random.key(1), mala(step_size=0.5), energy_fn, (), data,
    ...                        reference, num_steps=40, num_records=4)
    >>> drift.steps.tolist(), abs(drift.energy_drift) < 0.5
    ([0, 10, 20, 30, 40], True)
    """
    if num_records < 1 or num_steps < num_records or num_steps % num_records:
        raise ValueError(
            f"num_steps is {num_steps} and num_records {num_records}; records must divide the "
            "steps."
        )
    flat_examples("data", data)
    flat = flat_examples("reference", reference)
    thinning = num_steps // num_records
    start = jnp.asarray(data, jnp.result_type(float))
    draws = sample(
        key, kernel, energy_fn, params, start, num_samples=num_records, thinning=thinning
    )
    positions = jnp.concatenate([start[None], draws.positions])
    bandwidth = max(_median_square(flat), 1e-12)
    mmd = [
        float(maximum_mean_discrepancy(x, jnp.asarray(reference), bandwidth=bandwidth))
        for x in positions
    ]
    energies = np.stack([energies_of(energy_fn, params, x) for x in positions])
    spread = energies.std(axis=1, ddof=1)
    return Drift(
        steps=thinning * np.arange(num_records + 1),
        energy=energies.mean(axis=1),
        energy_standard_error=spread / np.sqrt(len(data)),
        mmd=np.array(mmd),
        energy_drift=float((energies[-1].mean() - energies[0].mean()) / max(spread[0], 1e-12)),
        is_finite=bool(jnp.isfinite(positions).all()),
        positions=np.asarray(positions),
    )

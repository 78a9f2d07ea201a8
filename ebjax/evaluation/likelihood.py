"""Log-likelihood of data under an energy whose log Z is known, and what needs no log Z.

    log p(x) = -E(x) - log Z   [nats]
    bits a dimension = (mean E(x) + log Z) / (D ln 2) - log2 Δ

Δ is the width of one level where x are integer levels, scaled, with uniform noise of one level
added (dequantised): then the figure bounds the bits of the integers from above. Pixels of 256
levels in [0, 1] have Δ = 1/256, which adds 8; in [-1, 1] they have Δ = 2/256, which adds 7.

log Z comes from enumeration (here), from ``grid_law``, from ``strip_log_z`` of
``ebjax.energies.exact_lattice`` for lattices, from ``rbm_log_z``, or within bounds from
``ais_bounds``; an upper bound of log Z gives a likelihood that flatters nobody.

Shapes: ``examples`` [N, ...], ``energies`` [N], D numbers in one example.

Theis, van den Oord and Bethge, "A note on the evaluation of generative models", ICLR 2016.
"""

from __future__ import annotations

import functools
import math

import jax
import numpy as np
import numpy.typing as npt

from ebjax.energies.boltzmann import enumerate_law
from ebjax.evaluation.checks import check_scores
from ebjax.types import EnergyFn, Params, Position

__all__ = [
    "bits_per_dimension",
    "energies_of",
    "enumerated_log_likelihood",
    "held_out_energy_gap",
    "log_likelihood",
]

_EXAMPLES_AT_A_TIME = 1024


@functools.partial(jax.jit, static_argnums=0)
def _energies(energy_fn, params, examples):
    num = len(jax.tree.leaves(examples)[0])
    return jax.lax.map(
        lambda x: energy_fn(params, x), examples, batch_size=min(num, _EXAMPLES_AT_A_TIME)
    )


def energies_of(energy_fn: EnergyFn, params: Params, examples: Position) -> np.ndarray:
    """[N] float64 energies of examples [N, ...], some at a time."""
    return np.asarray(_energies(energy_fn, params, examples), np.float64)


def log_likelihood(
    energy_fn: EnergyFn, params: Params, examples: Position, log_z: float | jax.Array
) -> np.ndarray:
    """``-E(x) - log Z`` of each example.

    Args:
      energy_fn: E.
      params: its parameters.
      examples: pytree of [N, ...].
      log_z: log of the normaliser of exp(-E), over the same reference measure as the examples:
        sums over states for discrete ones, volumes for continuous ones.

    Returns:
      [N] float64, nats.

    Raises:
      ValueError: if ``log_z`` is not finite.

    >>> standard = lambda params, x: 0.5 * (x**2).sum()
    >>> logs = log_likelihood(standard, (), np.zeros((3, 2)), math.log(2.0 * math.pi))
    >>> logs.round(4).tolist()
    [-1.8379, -1.8379, -1.8379]
    """
    log_z = float(log_z)
    if not math.isfinite(log_z):
        raise ValueError(f"log_z is {log_z}; it must be finite.")
    return -energies_of(energy_fn, params, examples) - log_z


def enumerated_log_likelihood(
    energy_fn: EnergyFn,
    params: Params,
    examples: npt.ArrayLike,
    num_categories: int | None = None,
) -> np.ndarray:
    """Exact log-likelihood of a discrete energy, with log Z from all of its states.

    Args:
      energy_fn: E.
      params: its parameters.
      examples: [N, ...] in {0, 1}, or one-hot [N, ..., K].
      num_categories: ``None`` for binary variables, or K for one-hot ones.

    Returns:
      [N] float64, nats.

    Raises:
      ValueError: if there are more than 2^20 states, or examples are no states.

    >>> biased = lambda params, x: -params * x[0]
    >>> logs = enumerated_log_likelihood(biased, math.log(3.0), np.array([[0.0], [1.0]]))
    >>> np.exp(logs).round(4).tolist()
    [0.25, 0.75]
    """
    examples = np.asarray(examples)
    is_state = np.isin(examples, (0, 1)).all()
    if num_categories is not None:
        is_state &= examples.shape[-1] == num_categories and np.all(examples.sum(axis=-1) == 1)
    if not is_state or examples.ndim < 2:
        kind = "0 and 1" if num_categories is None else f"one-hot vectors of {num_categories}"
        raise ValueError(f"examples of shape {examples.shape} must be arrays of {kind}, [N, ...].")
    shape = examples.shape[1:] if num_categories is None else examples.shape[1:-1]
    law = enumerate_law(energy_fn, params, shape, num_categories)
    return log_likelihood(energy_fn, params, examples.astype(law.states.dtype), law.log_z)


def bits_per_dimension(
    energies: npt.ArrayLike,
    log_z: float | jax.Array,
    num_dimensions: int,
    *,
    level_width: float | None = None,
) -> float:
    """``(mean E + log Z) / (D ln 2)``, and of integer levels where their width is given.

    Args:
      energies: [N] of the examples.
      log_z: log of the normaliser; its upper bound for a figure that is conservative.
      num_dimensions: D.
      level_width: Δ > 0, distance of neighbouring levels in the units of the examples.

    Returns:
      Bits, lower is better. Of a density (no ``level_width``) they may be negative.

    Raises:
      ValueError: if an argument is out of range.

    >>> bits_per_dimension([0.0, 0.0], 0.0, 784, level_width=1 / 256)  # uniform on [0, 1]
    8.0
    """
    energies = check_scores("energies", energies)
    if num_dimensions < 1:
        raise ValueError(f"num_dimensions is {num_dimensions}; it must be at least 1.")
    if level_width is not None and not level_width > 0.0:
        raise ValueError(f"level_width is {level_width}; it must be positive.")
    bits = (energies.mean() + float(log_z)) / (num_dimensions * math.log(2.0))
    return float(bits - (0.0 if level_width is None else math.log2(level_width)))


def held_out_energy_gap(
    energies_training: npt.ArrayLike, energies_held_out: npt.ArrayLike
) -> dict[str, float]:
    """Overfitting without log Z: how much likelier the energy finds its training data.

        gap = mean E(held out) - mean E(training) = mean log p(training) - mean log p(held out)

    in which log Z cancels. Two samples of one law have a gap of 0 within its standard error.

    Args:
      energies_training: [N].
      energies_held_out: [M].

    Returns:
      ``energy_gap`` [nats], ``energy_gap_standard_error``, and ``energy_gap_auroc``, the chance
      that a held-out example has the higher energy: 0.5 without overfitting.

    Raises:
      ValueError: if a set has fewer than two energies or is not finite.

    >>> held_out_energy_gap([0.0, 1.0, 2.0], [1.0, 2.0, 3.0])["energy_gap"]
    1.0
    """
    from sklearn.metrics import roc_auc_score

    first = check_scores("energies_training", energies_training, 2)
    second = check_scores("energies_held_out", energies_held_out, 2)
    is_held_out = np.repeat([0, 1], [len(first), len(second)])
    error = math.hypot(*(np.std(e, ddof=1) / math.sqrt(len(e)) for e in (first, second)))
    return {
        "energy_gap": float(second.mean() - first.mean()),
        "energy_gap_standard_error": float(error),
        "energy_gap_auroc": float(roc_auc_score(is_held_out, np.concatenate([first, second]))),
    }

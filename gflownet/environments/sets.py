"""Sets: choose k of n items one by one.

    R(x) = Π_{i in x} w_i,    w = exp(-E),    Z = e_k(w),    P(i in x) = w_i e_{k-1}(w - i) / e_k(w)

e_k is the k-th elementary symmetric polynomial, w - i all weights but one. Action i takes
item i; there is no stop, a set of k items is terminal, and each of its items may have been the
last. Every prefix has an energy, the sum of its own, which forward-looking objectives use.

Pan, Malkin, Zhang and Bengio, "Better training of GFlowNets with local credit and incomplete
trajectories", ICML 2023.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np

from gflownet.types import Environment

__all__ = ["SET_BENCHMARKS", "benchmark_sets", "inclusion_probabilities", "sets"]

# Name: (items, chosen, the ten energies, each shared by a tenth of the items), as published.
SET_BENCHMARKS: dict[str, tuple[int, int, tuple[float, ...]]] = {
    "small": (
        30,
        20,
        (
            -0.4381397850674522,
            -0.40046449111789073,
            -0.2745059751263419,
            0.013149744911117978,
            0.4110535720923896,
            0.6261749162235306,
            0.6961474461702144,
            0.7442282139370466,
            0.8206350287761408,
            0.883494921538938,
        ),
    ),
    "medium": (
        80,
        60,
        (
            -0.7866830411595669,
            -0.7837872949891345,
            -0.5230497555411129,
            -0.41860806745880197,
            -0.3855205729595568,
            0.2961218224370139,
            0.5731802451199923,
            0.6009291618806774,
            0.6881812517688572,
            0.7396350970666805,
        ),
    ),
    "large": (
        100,
        80,
        (
            -0.8596854107736154,
            -0.5938789622812419,
            -0.5596177369051512,
            -0.4589997720511263,
            -0.15382957507887518,
            0.13832182722858843,
            0.3925029176153736,
            0.7231982581431591,
            0.7326989860019331,
            0.9244538380742333,
        ),
    ),
}


def _log_elementary_symmetric(log_weights: np.ndarray, order: int) -> np.ndarray:
    """[order + 1] logs of e_0, ..., e_order of the weights, one weight at a time."""
    logs = np.full(order + 1, -np.inf)
    logs[0] = 0.0
    for log_weight in log_weights:
        logs[1:] = np.logaddexp(logs[1:], logs[:-1] + log_weight)
    return logs


def inclusion_probabilities(energies: Sequence[float] | np.ndarray, num_chosen: int) -> np.ndarray:
    """[n] exact probability of each item to be in the set; they sum to k.

    >>> inclusion_probabilities([0.0, 0.0, 0.0, 0.0], 2).round(6).tolist()
    [0.5, 0.5, 0.5, 0.5]
    """
    log_weights = -np.asarray(energies, np.float64)
    log_z = _log_elementary_symmetric(log_weights, num_chosen)[-1]
    without = [
        _log_elementary_symmetric(np.delete(log_weights, i), num_chosen - 1)[-1]
        for i in range(len(log_weights))
    ]
    return np.exp(log_weights + np.asarray(without) - log_z)


def sets(
    energies: Sequence[float] | np.ndarray,
    num_chosen: int,
    *,
    max_enumerated: int = 100_000,
) -> Environment:
    """Builds the environment.

    Args:
      energies: [n] energies of the items.
      num_chosen: k, from 1 to n.
      max_enumerated: ``enumerate`` is offered up to this number of states, for at most 20 items.

    Returns:
      An ``Environment`` with n actions whose state is [n] bool and whose observation is that as
      numbers. Reward parameters, if given, are other energies [n]; ``log_z`` is that of
      ``energies``.

    Raises:
      ValueError: naming the argument that is out of range.

    >>> round(sets([0.0] * 5, 2).log_z, 4) == round(math.log(10), 4)
    True
    """
    own = np.asarray(energies, np.float64)
    num_items = own.size
    if own.ndim != 1 or not np.isfinite(own).all():
        raise ValueError(f"energies have shape {own.shape}; they must be finite numbers [n].")
    if not 1 <= num_chosen <= num_items:
        raise ValueError(
            f"num_chosen is {num_chosen}; of {num_items} items one can choose 1 to {num_items}."
        )
    num_states = sum(math.comb(num_items, count) for count in range(num_chosen + 1))
    is_small = num_items <= 20 and num_states <= max_enumerated

    def energy(params, state):
        values = params if np.ndim(params) == 1 and len(params) else jnp.asarray(own)
        return jnp.sum(jnp.where(state, values, 0.0)).astype(jnp.result_type(float))

    rows, place = _enumeration(num_items, num_chosen) if is_small else (None, None)
    return Environment(
        initial=lambda key: jnp.zeros(num_items, bool),
        step=lambda state, action: state | (jnp.arange(num_items) == action),
        undo=lambda state, action: state & (jnp.arange(num_items) != action),
        forward_mask=lambda state: ~state & (state.sum() < num_chosen),
        backward_mask=lambda state: state,
        observe=lambda state: state.astype(jnp.result_type(float)),
        num_actions=num_items,
        max_length=num_chosen,
        log_reward=lambda params, state: -energy(params, state),
        enumerate=(lambda: rows) if is_small else None,
        state_index=(
            (lambda state: jnp.asarray(place)[(state @ (2 ** jnp.arange(num_items)))])
            if is_small
            else None
        ),
        log_z=float(_log_elementary_symmetric(-own, num_chosen)[-1]),
        intermediate_energy=energy,
    )


def _enumeration(num_items: int, num_chosen: int) -> tuple[np.ndarray, np.ndarray]:
    """All sets of up to k items [S, n], and the place of each by its bits [2^n]."""
    members = [
        chosen
        for count in range(num_chosen + 1)
        for chosen in itertools.combinations(range(num_items), count)
    ]
    rows = np.zeros((len(members), num_items), bool)
    for row, chosen in zip(rows, members, strict=True):
        row[list(chosen)] = True
    place = np.full(2**num_items, -1, np.int32)
    place[rows @ 2 ** np.arange(num_items)] = np.arange(len(rows))
    return rows, place


def benchmark_sets(size: str = "medium") -> Environment:
    """The sets of the literature: "small" (20 of 30), "medium" (60 of 80), "large" (80 of 100).

    >>> round(benchmark_sets("small").log_z, 6)
    11.892389
    """
    if size not in SET_BENCHMARKS:
        raise ValueError(f"size is {size!r}; it must be one of {', '.join(SET_BENCHMARKS)}.")
    num_items, num_chosen, energies = SET_BENCHMARKS[size]
    return sets(np.repeat(energies, num_items // len(energies)), num_chosen)

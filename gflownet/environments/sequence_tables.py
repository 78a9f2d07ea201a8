"""Sequences whose reward was measured or computed for every one of them, read from a file.

    tfbind8       8 nucleotides, binding of a transcription factor    R = 10 (max(y, 10⁻³) / max)³
    qm9_strings   5 of 11 molecular blocks, HOMO-LUMO gap             R = 100 (max(y, 10⁻³) / max)⁵

y is the score in the file, max the largest of all. log Z and the law are exact sums over the table.

Barrera et al., "Survey of variation in human transcription factors reveals prevalent DNA binding
changes", Science 2016 (TFBind8). Shen et al., "Towards understanding and improving GFlowNet
training", ICML 2023 (the rewards, and sequences that grow at both ends).
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np

from gflownet.environments.sequences import sequences, table_log_reward
from gflownet.types import Environment

__all__ = ["QM9_BLOCKS", "qm9_strings", "score_table", "table_sequences", "tfbind8"]

QM9_BLOCKS = (
    "C",
    "O",
    "N",
    "CF",
    "C=O",
    "C=C",
    "C#C",
    "c1ccccc1",
    "C1CCCCC1",
    "C1CCNC1",
    "CCC",
)
SMALLEST_SCORE = 1e-3


def score_table(path: str | os.PathLike, size: int, key: str = "score") -> np.ndarray:
    """[size] float64 scores of all sequences, from an ``.npz`` (array ``key``) or ``.npy``.

    Raises:
      ValueError: naming the file, if it cannot be read or does not hold ``size`` finite numbers.
    """
    from ebjax.data import load_dataset

    name = str(path)
    if not Path(name).is_file():
        raise ValueError(f"{name}: there is no such file; it must hold {size} scores.")
    options: dict[str, Any] = {"key": key} if name.endswith(".npz") else {}
    scores = np.asarray(load_dataset(name, **options).examples, np.float64)
    if scores.shape != (size,):
        raise ValueError(f"{name}: holds scores of shape {scores.shape}; it must be ({size},).")
    return scores


def table_sequences(
    scores: np.ndarray,
    *,
    vocabulary: int,
    length: int,
    exponent: float,
    scale: float,
    order: str = "prepend_append",
    smallest_score: float = SMALLEST_SCORE,
    **options: Any,
) -> Environment:
    """Sequences with ``R = scale (max(y, smallest) / max y)^exponent``, y looked up.

    Args:
      scores: [V^L] y, at the place of a sequence read as a number in base V.
      vocabulary: V.
      length: L.
      exponent: of the score.
      scale: the largest reward.
      order: how sequences grow, see ``sequences``.
      smallest_score: what lower scores count as, > 0.
      **options: of ``sequences``.

    Raises:
      ValueError: if an argument is out of range or has the wrong shape.

    >>> table_sequences(np.array([0.5, 1.0]), vocabulary=2, length=1, exponent=1, scale=3.0).log_z
    1.5040773967762742
    """
    scores = np.asarray(scores, np.float64)
    if scores.shape != (vocabulary**length,):
        raise ValueError(
            f"scores have shape {scores.shape}; there are {vocabulary**length} sequences."
        )
    if not (np.isfinite(scores).all() and scores.max() > 0.0):
        raise ValueError("scores must be finite, and the largest of them positive.")
    if not (smallest_score > 0.0 and scale > 0.0):
        raise ValueError(
            f"smallest_score is {smallest_score} and scale {scale}; both must be positive."
        )
    share = np.maximum(scores, smallest_score) / scores.max()
    log_rewards = np.log(scale) + exponent * np.log(share)
    return sequences(
        table_log_reward(log_rewards, vocabulary),
        vocabulary=vocabulary,
        length=length,
        order=order,
        log_z=float(np.logaddexp.reduce(log_rewards)),
        **options,
    )


def tfbind8(path: str | os.PathLike, *, order: str = "prepend_append", **options: Any):
    """8 nucleotides, 65,536 sequences; A C G T are 0 to 3, the first letter leads.

    Args:
      path: an ``.npz`` with ``score`` [65536], or ``.npy``.
      order: how sequences grow, see ``sequences``.
      **options: of ``table_sequences``.
    """
    rule = {"exponent": 3.0, "scale": 10.0, **options}
    return table_sequences(score_table(path, 4**8), vocabulary=4, length=8, order=order, **rule)


def qm9_strings(path: str | os.PathLike, *, order: str = "prepend_append", **options: Any):
    """5 of 11 blocks (``QM9_BLOCKS``), 161,051 molecules.

    Args:
      path: an ``.npz`` with ``score`` [161051], or ``.npy``.
      order: how sequences grow, see ``sequences``.
      **options: of ``table_sequences``.
    """
    rule = {"exponent": 5.0, "scale": 100.0, **options}
    return table_sequences(score_table(path, 11**5), vocabulary=11, length=5, order=order, **rule)

"""Short RNA strands that bind a given one, scored by ViennaRNA (extra ``rna``).

    f(x) = E(target, x) / (E(target, complement of target) L / n)      R = 10 (max(f, 10⁻³) / f*)⁸

E is the energy of the duplex in kcal/mol, L the length of x, n = 100 that of the target: f counts
the share of a letter's even part in the best possible bond. Folding runs on the host. Up to
``MAX_TABLE_LENGTH`` letters all strands are folded once into a table, and log Z is exact; longer
strands are folded when the flow reaches them, in batches, and each only once.

Lorenz et al., "ViennaRNA package 2.0", Algorithms for Molecular Biology 6 (2011). Sinai et al.,
"AdaLead", arXiv:2010.02141 (the landscapes). Kim et al., "Local search GFlowNets", ICLR 2024 (the
reward).
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gflownet.environments.sequence_tables import SMALLEST_SCORE, table_sequences
from gflownet.environments.sequences import sequences
from gflownet.types import Environment

__all__ = ["LETTERS", "MAX_TABLE_LENGTH", "RNA_TARGETS", "rna_binding", "rna_score_fn"]

LETTERS = "UCGA"
MAX_TABLE_LENGTH = 9
RNA_TARGETS = {
    "L14_RNA1": (
        "GAACGAGGCACAUUCCGGCUCGCCCGGCCCAUGUGAGCAUGGGCCGGACC"
        "CCGUCCGCGCGGGGCCCCCGCGCGGACGGGGGCGAGCCGGAAUGUGCCUC"
    ),
    "L14_RNA2": (
        "GAGGCACAUUCCGGCUCGCCCCCGUCCGCGCGGGGGCCCCGCGCGGACGG"
        "GGUCCGGCCCGCGCGGGGCCCCCGCGCGGGAGCCGGAAUGUGCCUCGUUC"
    ),
    "L14_RNA3": (
        "CCGGUGAUACUGUUAGUGGUCACGGUGCAUUUAUAGCGCUAAAGUACAGU"
        "CUUCCCCUGUUGAACGGCGCCAUUGCAUACAGGGCCAGCCGCGUAACGCC"
    ),
}
_COMPLEMENT = str.maketrans("ACGU", "UGCA")


def rna_score_fn(target: str, length: int):
    """``tokens [N, L] -> f [N]`` float64 on the host, which remembers what it has folded.

    Raises:
      ValueError: for an unknown target, or without ViennaRNA.
    """
    try:
        import RNA
    except ImportError:
        raise ValueError(
            "ViennaRNA is not installed; pip install 'ebjax[rna]' (or viennarna) brings it."
        ) from None
    if target not in RNA_TARGETS:
        raise ValueError(f"target is {target!r}; it must be one of {', '.join(RNA_TARGETS)}.")
    strand = RNA_TARGETS[target]
    best = RNA.duplexfold(strand.translate(_COMPLEMENT)[::-1], strand).energy
    scale = best * length / len(strand)
    known: dict[bytes, float] = {}
    letters = np.frombuffer(LETTERS.encode(), np.uint8)

    def score(tokens: Any) -> np.ndarray:
        rows = letters[np.clip(np.asarray(tokens), 0, len(LETTERS) - 1)]
        values = np.empty(len(rows))
        for place, row in enumerate(rows):
            name = row.tobytes()
            if name not in known:
                known[name] = RNA.duplexfold(strand, name.decode()).energy / scale
            values[place] = known[name]
        return values

    return score


def rna_binding(
    target: str = "L14_RNA1",
    *,
    length: int = 14,
    exponent: float = 8.0,
    scale: float = 10.0,
    largest_score: float | None = None,
    order: str = "prepend_append",
    **options: Any,
) -> Environment:
    """Builds the environment.

    Args:
      target: one of ``RNA_TARGETS``.
      length: L, 1 to 50 letters of U, C, G, A (tokens 0 to 3).
      exponent: of the score.
      scale: the reward of the largest score.
      largest_score: f*, which only shifts log Z; ``None``: the largest in the table, or 1 where
        there is none.
      order: how strands grow, see ``sequences``.
      **options: of ``sequences``.

    Returns:
      An ``Environment``; up to 9 letters with log Z and, where small enough, all states.

    Raises:
      ValueError: naming the argument that is out of range, or the missing extra.
    """
    if not 1 <= length <= 50:
        raise ValueError(f"length is {length}; it must be from 1 to 50.")
    if not (scale > 0.0 and (largest_score is None or largest_score > 0.0)):
        raise ValueError(
            f"scale is {scale} and largest_score {largest_score}; both must be positive."
        )
    score = rna_score_fn(target, length)
    vocabulary = len(LETTERS)
    if length <= MAX_TABLE_LENGTH:
        powers = vocabulary ** np.arange(length)[::-1]
        table = score(np.arange(vocabulary**length)[:, None] // powers % vocabulary)
        factor = 1.0 if largest_score is None else (table.max() / largest_score) ** exponent
        return table_sequences(
            table,
            vocabulary=vocabulary,
            length=length,
            exponent=exponent,
            scale=scale * factor,
            order=order,
            **options,
        )
    log_largest = np.log(1.0 if largest_score is None else largest_score)

    def on_host(tokens):
        flat = np.asarray(tokens).reshape(-1, length)
        shares = np.log(np.maximum(score(flat), SMALLEST_SCORE)) - log_largest
        return (np.log(scale) + exponent * shares).astype(np.float32).reshape(tokens.shape[:-1])

    def log_reward(params, tokens):
        del params
        shape = jax.ShapeDtypeStruct(tokens.shape[:-1], jnp.float32)
        value = jax.pure_callback(on_host, shape, tokens, vmap_method="expand_dims")
        return value.astype(jnp.result_type(float))

    return sequences(log_reward, vocabulary=vocabulary, length=length, order=order, **options)

"""Bit sequences: n bits in words of k bits, rewarded for being near one of 60 hidden modes.

    log R(x) = -β min_m d(x, m)          d: Hamming distance

A mode is n / 8 uniform draws of the five bytes 00000000, 11111111, 11110000, 00001111, 00111100,
put one after another. Words are tokens: with k bits a vocabulary of 2^k, and n / k places.

Malkin et al., "Trajectory balance: improved credit assignment in GFlowNets", NeurIPS 2022; Tiapkin
et al., "Generative flow networks as entropy-regularized RL", AISTATS 2024 (any order).
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gflownet.environments.sequences import sequences
from gflownet.types import Environment

__all__ = ["bit_sequences", "hidden_modes", "words_to_bits"]

_BYTES = ("00000000", "11111111", "11110000", "00001111", "00111100")


def hidden_modes(num_bits: int, *, num_modes: int = 60, seed: int = 0) -> np.ndarray:
    """[M, n] int8 modes, drawn with a seed; n is a multiple of 8.

    >>> hidden_modes(16, num_modes=3).shape
    (3, 16)
    """
    if num_bits < 8 or num_bits % 8:
        raise ValueError(f"num_bits is {num_bits}; modes are made of bytes, so of 8, 16, ... bits.")
    if num_modes < 1:
        raise ValueError(f"num_modes is {num_modes}; it must be at least 1.")
    words = np.array([[int(bit) for bit in word] for word in _BYTES], np.int8)
    chosen = np.random.default_rng(seed).integers(len(words), size=(num_modes, num_bits // 8))
    return words[chosen].reshape(num_modes, num_bits)


def words_to_bits(tokens: jax.Array, bits_per_word: int) -> jax.Array:
    """[n] int32 bits of full words [n / k], the highest bit of a word first.

    >>> words_to_bits(jnp.array([2, 1]), 2).tolist()
    [1, 0, 0, 1]
    """
    shifts = np.arange(bits_per_word)[::-1]
    return ((tokens[:, None] >> shifts) & 1).reshape(-1).astype(jnp.int32)


def bit_sequences(
    *,
    num_bits: int = 120,
    bits_per_word: int = 8,
    order: str = "append",
    inverse_temperature: float = 1.0,
    modes: np.ndarray | None = None,
    **options: Any,
) -> Environment:
    """Builds the environment.

    Args:
      num_bits: n.
      bits_per_word: k, which divides n, at most 16.
      order: how sequences grow, see ``sequences``.
      inverse_temperature: β > 0; 1 as first published, 2 for the any-order variant, and β / n for
        distances that are shares.
      modes: [M, n] of 0 and 1; by default ``hidden_modes(n)``.
      **options: of ``sequences``.

    Raises:
      ValueError: naming the argument that is out of range.

    >>> environment = bit_sequences(num_bits=16, bits_per_word=4)
    >>> environment.num_actions, environment.max_length
    (16, 4)
    """
    if not 1 <= bits_per_word <= 16 or num_bits % bits_per_word or num_bits < 1:
        raise ValueError(
            f"bits_per_word is {bits_per_word} and num_bits {num_bits}; words have 1 to 16 bits, "
            "and a whole number of them makes the sequence."
        )
    if not inverse_temperature > 0.0:
        raise ValueError(f"inverse_temperature is {inverse_temperature}; it must be positive.")
    chosen = hidden_modes(num_bits) if modes is None else np.asarray(modes)
    if chosen.ndim != 2 or chosen.shape[1] != num_bits or not np.isin(chosen, (0, 1)).all():
        raise ValueError(f"modes have shape {chosen.shape}; they must be 0 and 1, [M, {num_bits}].")
    # d(x, m) = |m| + Σ x (1 - 2 m), one product with the matrix of the modes.
    signs = (1 - 2 * chosen.astype(np.float32)).T
    weights = chosen.sum(axis=1).astype(np.float32)

    def log_reward(params, tokens):
        del params
        bits = words_to_bits(tokens, bits_per_word).astype(jnp.result_type(float))
        distance = jnp.min(bits @ jnp.asarray(signs) + jnp.asarray(weights))
        return (-inverse_temperature * distance).astype(jnp.result_type(float))

    return sequences(
        log_reward,
        vocabulary=2**bits_per_word,
        length=num_bits // bits_per_word,
        order=order,
        **options,
    )

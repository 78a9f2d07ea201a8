"""Affine scaling of data, with the map that undoes it, and dequantisation.

y = (x - shift) / scale,    log p_X(x) = log p_Y(y) - Σ log scale
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ebjax.data.dataset import Dataset

__all__ = ["AffineMap", "dequantize", "standardize", "to_unit_range"]


class AffineMap(NamedTuple):
    """``y = (x - shift) / scale``, elementwise.

    Attributes:
      shift: [] or the shape of one example.
      scale: [] or the shape of one example, positive.
    """

    shift: np.ndarray
    scale: np.ndarray

    def forward(self, x: Any) -> Any:
        """``(x - shift) / scale`` of examples [..., shape of one]; NumPy or JAX arrays."""
        return (x - self.shift) / self.scale

    def inverse(self, y: Any) -> Any:
        """``y scale + shift``, the original units."""
        return y * self.scale + self.shift

    def log_scale(self, event_shape: tuple[int, ...]) -> float:
        """Σ log scale over one example: ``log p_X(x) = log p_Y(y) - log_scale``.

        >>> round(AffineMap(np.float32(0.0), np.float32(2.0)).log_scale((3,)), 4)
        2.0794
        """
        return float(np.sum(np.log(np.broadcast_to(self.scale, event_shape).astype(np.float64))))


def _scaled(dataset: Dataset, shift: Any, scale: Any) -> tuple[Dataset, AffineMap]:
    affine = AffineMap(np.asarray(shift, np.float32), np.asarray(scale, np.float32))
    examples = np.asarray(affine.forward(np.asarray(dataset.examples)), np.float32)
    return dataset._replace(examples=examples), affine


def standardize(dataset: Dataset, *, per_entry: bool = True) -> tuple[Dataset, AffineMap]:
    """Mean 0 and standard deviation 1.

    Args:
      dataset: [N, ...].
      per_entry: whether each entry of an example (column of a table) is scaled by itself; else
        one mean and one deviation for all, as images want it.

    Returns:
      ``(dataset, map)``, float32; give the map's ``forward`` to held-out data.

    Raises:
      ValueError: if an entry that is scaled by itself is constant.

    >>> dataset, affine = standardize(Dataset(np.array([[0.0], [4.0]])))
    >>> dataset.examples.tolist(), affine.inverse(dataset.examples).tolist()
    ([[-1.0], [1.0]], [[0.0], [4.0]])
    """
    examples = np.asarray(dataset.examples, np.float64)
    axis = 0 if per_entry else None
    shift, scale = examples.mean(axis=axis), examples.std(axis=axis)
    is_constant = examples.min(axis=axis) == examples.max(axis=axis)
    if np.any(is_constant):
        place = tuple(int(i) for i in np.argwhere(is_constant)[0])
        where = f"entry {place[0] if len(place) == 1 else place} is" if place else "all values are"
        raise ValueError(
            f"{dataset.name or 'dataset'}: {where} constant and has no standard deviation to "
            "divide by; drop such entries (constant='drop' of a table) or use per_entry=False."
        )
    return _scaled(dataset, shift, scale)


def to_unit_range(
    dataset: Dataset,
    *,
    low: float = -1.0,
    high: float = 1.0,
    limits: tuple[float, float] | None = None,
) -> tuple[Dataset, AffineMap]:
    """One affine map of all values, from ``limits`` to ``[low, high]``.

    Args:
      dataset: [N, ...].
      low: where the lower limit goes.
      high: where the upper limit goes, above ``low``.
      limits: lower and upper limit of the values; ``None`` takes those of the data.

    Returns:
      ``(dataset, map)``, float32; values outside the limits fall outside the range.

    Raises:
      ValueError: if a range is empty.

    >>> dataset, affine = to_unit_range(Dataset(np.array([0, 255], np.uint8)))
    >>> dataset.examples.tolist()
    [-1.0, 1.0]
    """
    if limits is None:
        limits = (float(dataset.examples.min()), float(dataset.examples.max()))
    for name, (first, last) in {"limits": limits, "low and high": (low, high)}.items():
        if not (math.isfinite(first) and math.isfinite(last) and first < last):
            raise ValueError(
                f"{dataset.name or 'dataset'}: {name} are {first} and {last}; the second must be "
                "above the first."
            )
    scale = (limits[1] - limits[0]) / (high - low)
    return _scaled(dataset, limits[0] - low * scale, scale)


def dequantize(key: jax.Array, x: jax.Array, *, num_levels: int = 256) -> jax.Array:
    """``(x + u) / num_levels`` with u uniform on [0, 1): a density in place of a mass function.

    For x of integers 0 to num_levels - 1, a density p of the result bounds the mass function P:
    ``log P(x) >= E_u log p((x + u) / num_levels) - D log num_levels``.

    Theis, van den Oord and Bethge, "A note on the evaluation of generative models", ICLR 2016.

    Args:
      key: [] key.
      x: [...] integers, one example.
      num_levels: how many values an entry can take, from 2 to 65536.

    Returns:
      [...] float32 in [0, 1).

    Raises:
      ValueError: if ``num_levels`` is out of range.

    >>> y = dequantize(jax.random.key(0), jnp.array([0, 255], jnp.uint8))
    >>> (y * 256).astype(int).tolist()
    [0, 255]
    """
    if not 2 <= num_levels <= 2**16:
        raise ValueError(f"num_levels is {num_levels}; it must be from 2 to 65536.")
    # As many random bits as float32 has left beside the level, so that the sum is never rounded up.
    num_bits = 24 - (num_levels - 1).bit_length()
    words = jax.random.bits(key, jnp.shape(x), jnp.uint32) >> (32 - num_bits)
    uniform = words.astype(jnp.float32) * np.float32(2.0**-num_bits)
    return (jnp.asarray(x).astype(jnp.float32) + uniform) / num_levels

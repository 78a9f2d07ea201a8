"""Sources of examples from datasets: in memory, or streamed from disk while training runs.

Both draw the same endless stream of shuffled passes (``ebjax.numerics.shuffled_index``), a pure
function of a key and a position, so that the step of a run is the whole state of its data:

    x_t = clip(T(x[π(t)]) + σ ξ_t)
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ebjax.data.dataset import Dataset
from ebjax.numerics import shuffled_index
from ebjax.types import Source, bind

__all__ = ["array_source", "stream_source"]

Transform = Callable[[jax.Array, jax.Array], jax.Array]

_POSITIONS = 2**32
_CHUNK = 4096  # positions whose rows are computed together


def array_source(
    dataset: Dataset | Any,
    *,
    noise: float = 0.0,
    bounds: tuple[float, float] | None = None,
    transform: Transform | None = None,
    with_labels: bool | None = None,
) -> Source:
    """A source over data in memory, which lives on the devices once each.

    Args:
      dataset: a ``Dataset``, or an array [N, ...].
      noise: σ >= 0, standard deviation of normal noise on each entry; integers become floats.
      bounds: ``(low, high)`` that examples are clipped to, after the noise.
      transform: T, ``(key, x) -> x`` on one example, before the noise; it has a key of its own at
        each position. Scaling bytes here keeps the stored data four times smaller.
      with_labels: whether an example is ``(x, label)``; ``None``: where there are labels.

    Returns:
      A ``Source``; its examples are x, or ``(x, label)`` with an int32 label.

    Raises:
      ValueError: naming what is out of range or missing.

    >>> source = array_source(np.arange(6.0).reshape(3, 2))
    >>> key, positions = jax.random.key(0), jnp.arange(3, dtype=jnp.uint32)
    >>> batch = jax.vmap(source.example, (None, None, 0))(source.arrays, key, positions)
    >>> sorted(batch[:, 0].tolist())
    [0.0, 2.0, 4.0]
    """
    dataset, with_labels = _checked(dataset, noise, bounds, with_labels)
    arrays = {"examples": jnp.asarray(np.asarray(dataset.examples))}
    if with_labels:
        arrays["labels"] = jnp.asarray(dataset.labels)
    row = bind(_shuffled_row, size=len(dataset.examples))
    return Source(arrays, bind(_example, row=row, noise=noise, bounds=bounds, transform=transform))


def stream_source(
    dataset: Dataset | Any,
    *,
    index: np.ndarray | None = None,
    noise: float = 0.0,
    bounds: tuple[float, float] | None = None,
    transform: Transform | None = None,
    with_labels: bool | None = None,
) -> Source:
    """A source over data that need not fit in memory: rows are read as they are used.

    The stream is bit for bit that of ``array_source``. The training loop calls ``load`` on the
    host before each dispatch; only the rows of one dispatch are ever on a device.

    Args:
      dataset: a ``Dataset`` or array [N, ...], such as a memory map (``load_dataset`` of ``.npy``
        or IDX files).
      index: rows that are used (``split_index``), ``None`` for all.
      noise: as in ``array_source``.
      bounds: as in ``array_source``.
      transform: as in ``array_source``.
      with_labels: as in ``array_source``.

    Returns:
      A ``Source`` with ``load``: ``(key, first, num) -> {"first": [] uint32, "examples":
      [num, ...]}`` (and ``"labels"`` [num]), the rows at the positions from ``first`` on.

    Raises:
      ValueError: naming what is out of range or missing.
    """
    dataset, with_labels = _checked(dataset, noise, bounds, with_labels)
    num_examples = len(dataset.examples)
    if index is not None:
        index = np.asarray(index)
        is_rows = index.ndim == 1 and index.size > 0 and index.dtype.kind in "iu"
        if not is_rows or index.min() < 0 or index.max() >= num_examples:
            raise ValueError(
                f"index must be a vector of at least one row number from 0 to {num_examples - 1}; "
                f"it has shape {index.shape} and dtype {index.dtype}."
            )
    load = functools.partial(_load, dataset=dataset, index=index, with_labels=with_labels)
    example = bind(_example, row=_streamed_row, noise=noise, bounds=bounds, transform=transform)
    return Source(None, example, load)


def _checked(dataset, noise, bounds, with_labels) -> tuple[Dataset, bool]:
    if not isinstance(dataset, Dataset):
        dataset = Dataset(dataset if isinstance(dataset, np.ndarray) else np.asarray(dataset))
    if np.ndim(dataset.examples) == 0 or len(dataset.examples) == 0:
        raise ValueError(
            f"dataset has shape {np.shape(dataset.examples)}; give at least one example, [N, ...]."
        )
    if not (np.isfinite(noise) and noise >= 0.0):
        raise ValueError(f"noise is {noise}; it must be a finite number of at least 0.")
    if bounds is not None and not bounds[0] < bounds[1]:
        raise ValueError(f"bounds is {bounds}; the first must be below the second.")
    if with_labels is None:
        with_labels = dataset.labels is not None
    if with_labels and dataset.labels is None:
        raise ValueError(
            f"{dataset.name or 'dataset'}: has no labels, but with_labels is True; load it with "
            "labels."
        )
    return dataset, with_labels


def _shuffled_row(arrays, key, position, *, size):
    del arrays
    return shuffled_index(key, position, size)


def _streamed_row(arrays, key, position):
    del key
    # Positions count modulo 2^32, and so does this difference.
    return position.astype(jnp.uint32) - jnp.asarray(arrays["first"]).astype(jnp.uint32)


def _example(arrays, key, position, *, row, noise, bounds, transform):
    index = row(arrays, key, position)
    x = jnp.asarray(arrays["examples"])[index]
    position_key = jax.random.fold_in(key, position)
    if transform is not None:
        x = transform(jax.random.fold_in(position_key, 1), x)
    if noise:
        dtype = x.dtype if jnp.issubdtype(x.dtype, jnp.floating) else jnp.float32
        x = x + noise * jax.random.normal(position_key, x.shape, dtype)
    if bounds is not None:
        x = jnp.clip(x, *bounds)
    return (x, jnp.asarray(arrays["labels"])[index]) if "labels" in arrays else x


@functools.partial(jax.jit, static_argnums=2)
def _rows_from(key, first, size):
    positions = first + jnp.arange(_CHUNK, dtype=jnp.uint32)
    return jax.vmap(shuffled_index, (None, 0, None))(key, positions, size)


def _load(key: jax.Array, first: int, num: int, *, dataset: Dataset, index, with_labels):
    size = len(dataset.examples) if index is None else len(index)
    cpu = jax.local_devices(backend="cpu")[0]
    key = jax.device_put(key, cpu)
    with jax.default_device(cpu):
        chunks = [
            np.asarray(_rows_from(key, np.uint32((first + offset) % _POSITIONS), size))
            for offset in range(0, num, _CHUNK)
        ]
    rows = np.concatenate(chunks)[:num]
    if index is not None:
        rows = index[rows]
    # In the order of the file, each row once: a memory map is then read forwards.
    unique, inverse = np.unique(rows, return_inverse=True)
    loaded = {
        "first": np.uint32(first % _POSITIONS),
        "examples": np.asarray(dataset.examples[unique])[inverse],
    }
    if with_labels and dataset.labels is not None:
        loaded["labels"] = dataset.labels[rows]
    return loaded

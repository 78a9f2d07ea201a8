"""Data as arrays: what a dataset is, the checks that all of them pass, and splitting.

Shape legend: ``N`` examples, ``D`` columns of a table, ``...`` the shape of one example.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

__all__ = ["CONSTANT_OPTIONS", "Dataset", "check_dataset", "from_arrays", "split", "split_index"]

CONSTANT_OPTIONS = ("error", "keep", "drop")
_CHUNK_ENTRIES = (
    1 << 22
)  # entries looked at together, so that a memory map is never whole in memory


class Dataset(NamedTuple):
    """Examples, with labels or without, in memory or mapped from a file.

    Attributes:
      examples: [N, ...] numbers.
      labels: [N] int32, or ``None``.
      name: what it is called in errors and figures.
    """

    examples: np.ndarray
    labels: np.ndarray | None = None
    name: str = ""


def from_arrays(
    examples: Any, labels: Any = None, *, name: str = "arrays", constant: str = "keep"
) -> Dataset:
    """A dataset from arrays, checked.

    Args:
      examples: [N, ...] bools, integers or floats of up to 64 bits, all finite, N >= 1.
      labels: [N] whole numbers that fit int32, or ``None``.
      name: what errors call the data.
      constant: what happens to columns of a table [N, D] that hold one value only, which no
        density on R^D has: ``"error"``, ``"keep"`` or ``"drop"``.

    Returns:
      A ``Dataset``; memory maps stay memory maps, unless columns are dropped.

    Raises:
      ValueError: naming the data, what is wrong with it and what is accepted.

    >>> dataset = from_arrays([[1.0, 2.0], [1.0, 3.0]], [0, 1], constant="drop")
    >>> dataset.examples.tolist(), dataset.labels.tolist()
    ([[2.0], [3.0]], [0, 1])
    """
    try:
        examples = np.asanyarray(examples)
        labels = None if labels is None else np.asanyarray(labels)
    except ValueError:
        raise ValueError(
            f"{name}: the examples differ in shape; all examples of a dataset have one shape."
        ) from None
    return check_dataset(Dataset(examples, labels, name), constant=constant)


def check_dataset(
    dataset: Dataset, *, constant: str = "keep", column_names: list[str] | None = None
) -> Dataset:
    """The dataset with native byte order and int32 labels, if it passes the checks of all data.

    Args:
      dataset: as read.
      constant: as in ``from_arrays``.
      column_names: what errors call the columns of a table.

    Raises:
      ValueError: as ``from_arrays``.
    """
    examples, labels, name = dataset
    if constant not in CONSTANT_OPTIONS:
        raise ValueError(
            f"constant is {constant!r}; it must be one of {', '.join(CONSTANT_OPTIONS)}."
        )
    _check_dtype(examples, name)
    if examples.ndim == 0:
        raise ValueError(f"{name}: holds a single number; examples are an array [N, ...].")
    if examples.size == 0:
        raise ValueError(
            f"{name}: is empty (shape {examples.shape}); give at least one example with at least "
            "one entry."
        )
    if not examples.dtype.isnative:
        examples = examples.astype(examples.dtype.newbyteorder("="))
    _check_finite(examples, name, column_names)
    if labels is not None:
        labels = _checked_labels(labels, len(examples), name)
    if constant != "keep":
        examples = _without_constant_columns(examples, name, constant, column_names)
    return Dataset(examples, labels, name)


def _check_dtype(array: np.ndarray, name: str) -> None:
    dtype = array.dtype
    if dtype.kind not in "biuf" or dtype.itemsize > 8:
        raise ValueError(
            f"{name}: has the dtype {dtype}; accepted are bools, integers and floats of up to 64 "
            "bits (no objects, strings or complex numbers)."
        )


def _check_finite(examples: np.ndarray, name: str, column_names: list[str] | None) -> None:
    if examples.dtype.kind != "f":
        return
    rows = max(1, _CHUNK_ENTRIES // (examples.size // len(examples)))
    for first in range(0, len(examples), rows):
        chunk = np.asarray(examples[first : first + rows])
        is_finite = np.isfinite(chunk)
        if is_finite.all():
            continue
        row, *entry = (int(i) for i in np.argwhere(~is_finite)[0])
        value = chunk[(row, *entry)]
        place = f"row {first + row}"
        if len(entry) == 1:
            named = f" ({column_names[entry[0]]!r})" if column_names else ""
            place += f", column {entry[0]}{named}"
        elif entry:
            place += f", entry {tuple(entry)}"
        raise ValueError(f"{name}: {value} in {place} (counted from 0); all values must be finite.")


def _checked_labels(labels: np.ndarray, num_examples: int, name: str) -> np.ndarray:
    if labels.ndim == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]
    if labels.ndim != 1:
        raise ValueError(
            f"{name}: the labels have shape {labels.shape}; they must be one whole number an "
            "example, [N]."
        )
    if len(labels) != num_examples:
        raise ValueError(
            f"{name}: there are {num_examples} examples but {len(labels)} labels; each example has "
            "one label."
        )
    _check_dtype(labels, f"{name}: labels")
    with np.errstate(invalid="ignore"):
        whole = labels.astype(np.int32)
    is_wrong = whole.astype(np.float64) != labels.astype(np.float64)
    if is_wrong.any():
        row = int(np.argmax(is_wrong))
        raise ValueError(
            f"{name}: the label of row {row} is {labels[row]}; labels are whole numbers that fit "
            "32 bits."
        )
    return whole


def _without_constant_columns(
    examples: np.ndarray, name: str, constant: str, column_names: list[str] | None
) -> np.ndarray:
    if examples.ndim != 2:
        raise ValueError(
            f"{name}: constant is {constant!r}, which is for tables [N, D], but the examples have "
            f"shape {examples.shape}; use 'keep'."
        )
    is_constant = examples.min(axis=0) == examples.max(axis=0)
    if not is_constant.any():
        return examples
    if constant == "drop" and not is_constant.all():
        return examples[:, ~is_constant]
    columns = [int(i) for i in np.flatnonzero(is_constant)[:10]]
    named = ", ".join(repr(column_names[i]) if column_names else str(i) for i in columns)
    more = " and more" if is_constant.sum() > len(columns) else ""
    advice = "use constant='drop' or 'keep'" if constant == "error" else "nothing would be left"
    raise ValueError(
        f"{name}: the columns {named}{more} hold one value only, which says nothing; {advice}."
    )


def split_index(num_examples: int, num_held_out: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows of the training set and of the held-out set, a random partition.

    Args:
      num_examples: N.
      num_held_out: from 1 to N - 1.
      seed: of the shuffle; the same seed gives the same partition.

    Returns:
      ``(training [N - num_held_out], held out [num_held_out])``.

    Raises:
      ValueError: if one of the two would be empty.

    >>> training, held_out = split_index(10, 3, seed=0)
    >>> sorted([*training.tolist(), *held_out.tolist()]) == list(range(10))
    True
    """
    if not 1 <= num_held_out < num_examples:
        raise ValueError(
            f"num_held_out is {num_held_out}; of {num_examples} examples from 1 to "
            f"{num_examples - 1} can be held out."
        )
    order = np.random.default_rng(seed).permutation(num_examples)
    return order[num_held_out:], order[:num_held_out]


def split(dataset: Dataset, num_held_out: int, seed: int) -> tuple[Dataset, Dataset]:
    """Two datasets ``(training, held out)``, a random partition, both in memory.

    For a memory map that does not fit, keep the rows of ``split_index`` and give them to
    ``stream_source``.

    Raises:
      ValueError: as ``split_index``.
    """
    rows = split_index(len(dataset.examples), num_held_out, seed)

    def part(index: np.ndarray, suffix: str) -> Dataset:
        labels = None if dataset.labels is None else dataset.labels[index]
        return Dataset(np.asarray(dataset.examples[index]), labels, f"{dataset.name} ({suffix})")

    return part(rows[0], "training"), part(rows[1], "held out")

"""Data that other libraries hold: scikit-learn's bundled sets, TensorFlow Datasets, Hugging Face.

The last two are not imported here: the adapters take an object that the user made with them.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ebjax.data.dataset import Dataset, from_arrays

__all__ = ["BUNDLED", "from_hugging_face", "from_sklearn", "from_tensorflow_datasets"]

BUNDLED = ("digits", "wine", "breast_cancer", "diabetes")


def from_sklearn(name: str) -> Dataset:
    """A bundled set of scikit-learn, in its own units.

    ``digits``: [1797, 8, 8] uint8 from 0 to 16, ten classes. ``wine``: [178, 13], three classes.
    ``breast_cancer``: [569, 30], two classes. ``diabetes``: [442, 10] with no labels, for its
    target is not a class.

    Raises:
      ValueError: if there is no such set.

    >>> digits = from_sklearn("digits")
    >>> digits.examples.shape, digits.examples.dtype.name, int(digits.labels.max())
    ((1797, 8, 8), 'uint8', 9)
    """
    from sklearn import datasets

    if name not in BUNDLED:
        raise ValueError(f"name is {name!r}; it must be one of {', '.join(BUNDLED)}.")
    if name == "digits":
        digits = datasets.load_digits()
        return from_arrays(digits.images.astype(np.uint8), digits.target, name=name)
    if name == "diabetes":
        return from_arrays(datasets.load_diabetes(scaled=False).data, name=name)
    table = getattr(datasets, f"load_{name}")()
    return from_arrays(table.data, table.target, name=name)


def from_tensorflow_datasets(
    source: Any,
    *,
    split: str = "train",
    key: str = "image",
    label_key: str | None = None,
    max_examples: int | None = None,
) -> Dataset:
    """A dataset in memory from TensorFlow Datasets (``pip install 'ebjax[tensorflow_datasets]'``).

    Args:
      source: a builder (``tfds.builder("mnist")``, downloaded and prepared) or a dataset of dicts
        (``tfds.load(...)``), not batched.
      split: which split of a builder.
      key: name of the examples.
      label_key: name of the labels, ``None`` for no labels.
      max_examples: read no more than this; ``None`` reads all.

    Raises:
      ValueError: naming what is missing or does not fit.
    """
    name = f"TensorFlow dataset {getattr(getattr(source, 'info', None), 'name', '')}".strip()
    if hasattr(source, "as_dataset"):
        source = source.as_dataset(split=split)
    if isinstance(source, dict):
        raise ValueError(f"{name}: has the splits {', '.join(map(str, source))}; give one of them.")
    if not hasattr(source, "as_numpy_iterator"):
        raise ValueError(
            f"source is of type {type(source).__name__}; it must be a TensorFlow Datasets builder "
            "or a tf.data.Dataset."
        )
    examples, labels = [], []
    for i, row in enumerate(source.as_numpy_iterator()):
        if i == max_examples:
            break
        if not isinstance(row, dict):
            raise ValueError(
                f"{name}: its elements are of type {type(row).__name__}; they must be dicts (load "
                "it without as_supervised)."
            )
        _check_columns(name, list(row), key, label_key)
        examples.append(row[key])
        if label_key is not None:
            labels.append(row[label_key])
    return from_arrays(examples, labels if label_key is not None else None, name=name)


def from_hugging_face(
    dataset: Any,
    *,
    key: str = "image",
    label_key: str | None = None,
    max_examples: int | None = None,
) -> Dataset:
    """A dataset in memory from Hugging Face's ``datasets`` (``pip install 'ebjax[hugging_face]'``).

    Args:
      dataset: one split, ``datasets.load_dataset(..., split="train")``. Images are decoded.
      key: name of the column of examples.
      label_key: name of the column of labels, ``None`` for no labels.
      max_examples: read no more than the first of these; ``None`` reads all.

    Raises:
      ValueError: naming what is missing or does not fit.
    """
    name = "Hugging Face dataset"
    if isinstance(dataset, dict):
        raise ValueError(
            f"{name}: has the splits {', '.join(map(str, dataset))}; give one of them."
        )
    if not hasattr(dataset, "with_format") or not hasattr(dataset, "column_names"):
        raise ValueError(
            f"dataset is of type {type(dataset).__name__}; it must be a datasets.Dataset that is "
            "not streamed."
        )
    columns = dataset.column_names
    _check_columns(name, columns, key, label_key)
    rows = dataset.with_format("numpy")[:max_examples]
    labels = None if label_key is None else rows[label_key]
    # Where shapes differ the column is an array of objects or a list; stacking says so.
    return from_arrays(list(rows[key]), labels, name=name)


def _check_columns(name: str, columns: list[str], key: str, label_key: str | None) -> None:
    for option, value in (("key", key), ("label_key", label_key)):
        if value is not None and value not in columns:
            raise ValueError(
                f"{name}: {option} is {value!r}, but its columns are {', '.join(columns)}."
            )

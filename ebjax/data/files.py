"""Data from a path: NumPy files, IDX, tables of comma-separated values, folders of images.

No format is unpickled, so a file cannot run code. Everything that is wrong with a file is a
``ValueError`` of one sentence with the file's name.

IDX, the format of MNIST's files: two zero bytes, a byte for the type, one for the number of
dimensions, the dimensions as big-endian 32-bit integers, the entries in big-endian C order.
"""

from __future__ import annotations

import csv
import gzip
import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ebjax.data.adapters import BUNDLED, from_sklearn
from ebjax.data.dataset import CONSTANT_OPTIONS, Dataset, check_dataset
from ebjax.data.images import read_image_folder

__all__ = ["load_dataset"]

FORMATS = (
    ".npz, .npy, IDX (also .gz), .csv, .tsv, a folder of .png and .jpg images, or one of the names "
    + ", ".join(BUNDLED)
)
_IDX_TYPES = {0x08: "u1", 0x09: "i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}
_TABLE_SUFFIXES = (".csv", ".tsv")


def load_dataset(
    path: str | os.PathLike[str],
    *,
    key: str | None = None,
    label_key: str | None = None,
    labels_path: str | os.PathLike[str] | None = None,
    has_header: bool | None = None,
    label_column: str | int | None = None,
    constant: str | None = None,
    memory_map: bool = True,
) -> Dataset:
    """Reads a dataset from a file or a folder.

    The format follows from the name: ``.npz``, ``.npy``, ``.csv`` (separated by commas, semicolons
    or tabs) and ``.tsv``; a folder of ``.png`` and ``.jpg`` images of one size, where subfolders
    are classes in the order of their names; else IDX by its first bytes, also compressed as
    ``.gz``. ``"digits"``, ``"wine"``, ``"breast_cancer"`` and ``"diabetes"`` are scikit-learn's
    bundled sets (a folder of such a name is ``"./digits"``).

    Args:
      path: the file, the folder or the name.
      key: name of the examples in an ``.npz``; may be left out where only one array is left.
      label_key: name of the labels in an ``.npz``; ``None`` for no labels.
      labels_path: an ``.npy`` or IDX file with the labels of another such file.
      has_header: whether the first line of a table holds names; ``None`` finds out: it does if
        not all of its entries are numbers.
      label_column: name or number (negative from the end) of the column of labels in a table.
      constant: what happens to constant columns of a table, see ``from_arrays``; ``None`` is
        ``"error"`` for tables and ``"keep"`` for all else.
      memory_map: whether ``.npy`` and uncompressed IDX files stay on disk and are read as used.

    Returns:
      A ``Dataset`` with the values as they stand in the file.

    Raises:
      ValueError: naming the file, what is wrong and what is accepted.
    """
    name = os.fspath(path)
    if constant not in (None, *CONSTANT_OPTIONS):
        raise ValueError(
            f"{name}: constant is {constant!r}; it must be one of {', '.join(CONSTANT_OPTIONS)}."
        )
    kind = _kind(name)
    options = {
        "key": (key, ("npz",)),
        "label_key": (label_key, ("npz",)),
        "labels_path": (labels_path, ("npy", "idx")),
        "has_header": (has_header, ("table",)),
        "label_column": (label_column, ("table",)),
    }
    for option, (value, kinds) in options.items():
        if value is not None and kind not in kinds:
            raise ValueError(
                f"{name}: {option} is {value!r}, which this format does not have; it is for "
                f"{' and '.join(kinds)} data."
            )
    column_names: list[str] | None = None
    labels: np.ndarray | None = None
    if kind == "bundled":
        examples, labels, _ = from_sklearn(name)
    elif kind == "folder":
        examples, labels = read_image_folder(Path(name))
    elif kind == "table":
        examples, labels, column_names = _read_table(Path(name), has_header, label_column)
    elif kind == "npz":
        examples, labels = _read_npz(Path(name), key, label_key)
    else:
        examples = _read_array(Path(name), kind, memory_map)
        if labels_path is not None:
            labels_name = os.fspath(labels_path)
            labels_kind = _kind(labels_name)
            if labels_kind not in ("npy", "idx"):
                raise ValueError(f"{labels_name}: labels are read from .npy and IDX files.")
            labels = _read_array(Path(labels_name), labels_kind, memory_map=False)
    if constant is None:
        constant = "error" if kind == "table" else "keep"
    dataset = Dataset(examples, labels, name)
    return check_dataset(dataset, constant=constant, column_names=column_names)


def _kind(name: str) -> str:
    """Which reader a path is for."""
    if name in BUNDLED:
        return "bundled"
    path = Path(name)
    try:
        if name and path.is_dir():
            return "folder"
        is_file = path.is_file()
    except (OSError, ValueError):
        is_file = False
    if not is_file:
        raise ValueError(f"{name}: there is no such file; accepted are {FORMATS}.")
    suffix = path.suffix.lower()
    if suffix in (".npz", ".npy"):
        return suffix[1:]
    if suffix in _TABLE_SUFFIXES:
        return "table"
    if suffix == ".gz" or _is_idx(_read_bytes(path, 4)):
        return "idx"
    raise ValueError(f"{name}: the format is not known; accepted are {FORMATS}.")


def _unreadable(path: Path, kind: str, error: Exception) -> ValueError:
    text = re.sub(r"\s+", " ", str(error))[:120] or type(error).__name__
    return ValueError(
        f"{path}: cannot be read as {kind} ({text}); give a whole, undamaged file without pickled "
        "objects."
    )


def _read_bytes(path: Path, size: int = -1) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(size)
    except OSError as error:
        raise _unreadable(path, "a file", error) from None


def _read_npz(
    path: Path, key: str | None, label_key: str | None
) -> tuple[np.ndarray, np.ndarray | None]:
    # A damaged archive fails in many ways (bad header, checksum, compression, sizes that no
    # memory holds), and all of them mean the same to the user.
    try:
        archive: Any = np.load(path, allow_pickle=False)
        names = list(archive.files)
    except Exception as error:
        raise _unreadable(path, ".npz", error) from None
    with archive:
        if not names:
            raise ValueError(f"{path}: holds no arrays; an .npz file needs at least one.")
        for option, value in (("key", key), ("label_key", label_key)):
            if value is not None and value not in names:
                raise ValueError(
                    f"{path}: {option} is {value!r}, but the file holds {_listed(names)}."
                )
        if key is None:
            remaining = [name for name in names if name != label_key]
            if len(remaining) != 1:
                raise ValueError(
                    f"{path}: holds the arrays {_listed(names)}; key must say which one is the "
                    "examples."
                )
            key = remaining[0]
        examples = _member(path, archive, key)
        labels = None if label_key is None else _member(path, archive, label_key)
    return examples, labels


def _member(path: Path, archive: Mapping[str, Any], name: str) -> np.ndarray:
    try:
        array = archive[name]
    except Exception as error:
        raise _unreadable(path, f".npz (array {name!r})", error) from None
    if not isinstance(array, np.ndarray):
        raise ValueError(f"{path}: {name!r} is no array, but a file of another kind.")
    return array


def _listed(names: list[str]) -> str:
    return ", ".join(repr(name) for name in names[:10]) + (" and more" if len(names) > 10 else "")


def _read_array(path: Path, kind: str, memory_map: bool) -> np.ndarray:
    array = _read_npy(path) if kind == "npy" else _read_idx(path)
    return array if memory_map else np.array(array)


def _read_npy(path: Path) -> np.ndarray:
    # Mapped also where the array is wanted in memory: a size that the file does not have is then
    # an error before anything is allocated.
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except Exception as error:
        raise _unreadable(path, ".npy", error) from None


def _is_idx(head: bytes) -> bool:
    return len(head) == 4 and head[:2] == b"\0\0" and head[2] in _IDX_TYPES and head[3] > 0


def _read_idx(path: Path) -> np.ndarray:
    is_compressed = path.suffix.lower() == ".gz"
    if is_compressed:
        try:
            content = gzip.decompress(_read_bytes(path))
        except Exception as error:
            raise _unreadable(path, "gzip", error) from None
        size = len(content)
    else:
        content = _read_bytes(path, 4 + 4 * 255)
        size = path.stat().st_size
    if not _is_idx(content[:4]):
        raise ValueError(
            f"{path}: does not start as IDX does (it starts with {content[:4].hex(' ')}); accepted "
            f"are {FORMATS}."
        )
    dtype, num_dims = np.dtype(_IDX_TYPES[content[2]]), content[3]
    offset = 4 + 4 * num_dims
    shape = tuple(int.from_bytes(content[i : i + 4], "big") for i in range(4, min(offset, size), 4))
    expected = offset + math.prod(shape) * dtype.itemsize
    if num_dims > 32 or size != expected:
        raise ValueError(
            f"{path}: holds {size} bytes, but its IDX header says {expected} (shape {shape}); the "
            "file is truncated or damaged."
        )
    if 0 in shape:
        return np.zeros(shape, dtype)
    if is_compressed:
        return np.frombuffer(content, dtype, offset=offset).reshape(shape)
    return np.memmap(path, dtype, mode="r", offset=offset, shape=shape)


def _read_table(
    path: Path, has_header: bool | None, label_column: str | int | None
) -> tuple[np.ndarray, np.ndarray | None, list[str] | None]:
    """Examples [N, D], labels and names of a table."""
    rows = _rows(path)
    if has_header is None:
        has_header = not all(map(_is_number, rows[0][1]))
    names = [entry.strip() for entry in rows[0][1]] if has_header else None
    rows = rows[has_header:]
    if not rows:
        raise ValueError(f"{path}: holds a header but no rows; give at least one row.")
    num_columns = len(names if names is not None else rows[0][1])
    values = np.empty((len(rows), num_columns))
    for i, (line, row) in enumerate(rows):
        if len(row) != num_columns:
            raise ValueError(
                f"{path}: line {line} has {len(row)} entries and not {num_columns} as the first "
                "one; all lines must have as many."
            )
        for j, entry in enumerate(row):
            if not _is_number(entry):
                named = f" ({names[j]!r})" if names else ""
                raise ValueError(
                    f"{path}: {entry[:40]!r} in line {line}, column {j}{named}; all entries below "
                    "the header must be numbers."
                )
            values[i, j] = float(entry)
    if label_column is None:
        return values, None, names
    column = _find_column(path, label_column, num_columns, names)
    if num_columns == 1:
        raise ValueError(f"{path}: has one column, the labels; give at least one more.")
    rest = [j for j in range(num_columns) if j != column]
    return values[:, rest], values[:, column], [names[j] for j in rest] if names else None


def _rows(path: Path) -> list[tuple[int, list[str]]]:
    """The lines of a table that are not empty, each with its number counted from 1."""
    try:
        text = _read_bytes(path).decode("utf-8-sig")
        first_line = text.lstrip().split("\n", 1)[0]
        delimiter = max("\t,;", key=first_line.count)
        reader = csv.reader(text.splitlines(), delimiter=delimiter, strict=True)
        rows = [(reader.line_num, row) for row in reader if any(map(str.strip, row))]
    except (UnicodeDecodeError, csv.Error) as error:
        raise _unreadable(path, "a table in UTF-8", error) from None
    if not rows:
        raise ValueError(f"{path}: is empty; a table has at least one row of numbers.")
    return rows


def _is_number(entry: str) -> bool:
    try:
        float(entry)
    except ValueError:
        return False
    return True


def _find_column(path: Path, column: str | int, num_columns: int, names: list[str] | None) -> int:
    if isinstance(column, str):
        if names is None or column not in names:
            known = _listed(names) if names else "no names, for it has no header"
            raise ValueError(f"{path}: label_column is {column!r}; the table has {known}.")
        return names.index(column)
    if not -num_columns <= column < num_columns:
        raise ValueError(
            f"{path}: label_column is {column}; the table has the columns 0 to {num_columns - 1}."
        )
    return column % num_columns

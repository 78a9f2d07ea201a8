"""Data: from files, folders, arrays and other libraries to the examples of a training run."""

from ebjax.data.adapters import from_hugging_face, from_sklearn, from_tensorflow_datasets
from ebjax.data.dataset import Dataset, from_arrays, split, split_index
from ebjax.data.files import load_dataset
from ebjax.data.scaling import AffineMap, dequantize, standardize, to_unit_range
from ebjax.data.sources import array_source, stream_source
from ebjax.data.synthetic import draws, synthetic_2d

__all__ = [
    "AffineMap",
    "Dataset",
    "array_source",
    "dequantize",
    "draws",
    "from_arrays",
    "from_hugging_face",
    "from_sklearn",
    "from_tensorflow_datasets",
    "load_dataset",
    "split",
    "split_index",
    "standardize",
    "stream_source",
    "synthetic_2d",
    "to_unit_range",
]

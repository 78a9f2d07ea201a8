"""Images of a file as recipes read them: averaged over blocks, scaled to [-1, 1], split.

Shapes are [height, width, channels].
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ebjax.data import Dataset, load_dataset, split_index
from ebjax.training import AdamConfig, check_at_least, setting
from ebjax.types import bind

__all__ = ["ImageFileConfig", "Images", "load_images"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImageFileConfig(AdamConfig):
    """Settings of a run that reads images."""

    data_path: str = setting(
        "digits", "images: .npz, .npy, IDX, a folder, or scikit-learn's 'digits'"
    )
    data_key: str = setting("", "name of the images in an .npz with several arrays")
    label_key: str = setting("", "name of the labels in an .npz")
    labels_path: str = setting("", "file with the labels of an .npy or IDX file")
    downsample: int = setting(1, "side of the blocks of pixels that are averaged to one")
    num_held_out: int = setting(297, "images that training never sees")

    def __post_init__(self) -> None:
        """Checks types and ranges."""
        super().__post_init__()
        if not self.data_path:
            raise ValueError(
                "data_path is ''; give images: .npz, .npy, IDX, a folder of .png or .jpg, or "
                "'digits'."
            )
        check_at_least(self, 1, "downsample")
        check_at_least(self, 2, "num_held_out")


class Images(NamedTuple):
    """Images of a file, and how they become what the energy sees.

    Attributes:
      raw: the dataset as it stands in the file, images [N, height, width] or with channels.
      training: rows for training.
      held_out: rows that training never sees.
      transform: ``(key, x) -> image`` [height, width, channels] in [-1, 1]; the key is not used.
      num_values: how many values a pixel can take, ``None`` where they are not whole numbers.
    """

    raw: Dataset
    training: np.ndarray
    held_out: np.ndarray
    transform: Callable[[jax.Array, jax.Array], jax.Array]
    num_values: int | None

    def take(self, rows: np.ndarray) -> np.ndarray:
        """[n, height, width, channels] images of some rows, in [-1, 1]."""
        key = jax.random.key(0)  # not used
        return np.asarray(jax.vmap(self.transform, (None, 0))(key, self.raw.examples[rows]))

    def labels(self, rows: np.ndarray) -> np.ndarray | None:
        """[n] labels of some rows, if there are any."""
        return None if self.raw.labels is None else self.raw.labels[rows]


def load_images(
    config: ImageFileConfig, *, split_seed: int = 0, memory_map: bool = False
) -> Images:
    """Reads the images of a config and splits them.

    Args:
      config: which file, and how it is read.
      split_seed: of the partition into training and held-out images.
      memory_map: leave the images on disk (.npy, IDX).

    Raises:
      ValueError: naming the file or setting that does not fit.
    """
    raw = load_dataset(
        config.data_path,
        key=config.data_key or None,
        label_key=config.label_key or None,
        labels_path=config.labels_path or None,
        memory_map=memory_map,
    )
    shape = raw.examples.shape[1:]
    is_image = len(shape) == 2 or (len(shape) == 3 and shape[2] <= 4)
    if not is_image:
        raise ValueError(
            f"{raw.name}: an example has shape {shape}; images are [height, width] or [height, "
            "width, channels] with up to 4 channels."
        )
    if shape[0] % config.downsample or shape[1] % config.downsample:
        raise ValueError(
            f"downsample is {config.downsample}; it must divide the sides of the images, "
            f"{shape[0]} and {shape[1]}."
        )
    low, high = float(raw.examples.min()), float(raw.examples.max())
    is_whole = raw.examples.dtype.kind in "ui"
    if is_whole and low >= 0 and high > 16:
        low, high = 0.0, float(2 ** int(np.ceil(np.log2(high + 1))) - 1)  # the whole range of bytes
    if low == high:
        raise ValueError(f"{raw.name}: all pixels are {low}; images must differ from their ground.")
    training, held_out = split_index(len(raw.examples), config.num_held_out, split_seed)
    transform = bind(_to_image, downsample=config.downsample, low=low, high=high, is_whole=is_whole)
    return Images(raw, training, held_out, transform, int(high - low) + 1 if is_whole else None)


def _to_image(key, x, *, downsample, low, high, is_whole):
    del key
    x = jnp.asarray(x, jnp.float32)
    x = x.reshape(x.shape[0], x.shape[1], -1)
    if downsample > 1:
        height, width, channels = x.shape
        blocks = (height // downsample, downsample, width // downsample, downsample, channels)
        x = x.reshape(blocks).mean(axis=(1, 3))
        # So that a pixel takes as many values as before.
        x = jnp.round(x) if is_whole else x
    return 2.0 * (x - low) / (high - low) - 1.0

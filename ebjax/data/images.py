"""Folders of images: PNG and JPEG files of one size, subfolders as classes."""

from __future__ import annotations

from pathlib import Path

import numpy as np

__all__ = ["read_image_folder"]

SUFFIXES = (".png", ".jpg", ".jpeg")
_FORMATS = ("PNG", "JPEG")


def read_image_folder(folder: Path) -> tuple[np.ndarray, np.ndarray | None]:
    """The images of a folder in the order of their names.

    Gray images are [N, height, width], uint8 (uint16 where a PNG has 16 bits), all others are
    converted to red, green and blue: [N, height, width, 3]; transparency is dropped. Hidden files
    are passed over.

    Args:
      folder: holds images, or subfolders of images and nothing else.

    Returns:
      ``(examples, labels)``; the label of an image is the rank of its subfolder's name, and
      ``None`` where there are no subfolders.

    Raises:
      ValueError: naming the file or folder that does not fit.
    """
    entries = _listing(folder)
    subfolders = [entry for entry in entries if entry.is_dir()]
    if subfolders and len(subfolders) != len(entries):
        stray = next(entry for entry in entries if not entry.is_dir())
        raise ValueError(
            f"{folder}: holds subfolders and also {stray.name!r}; give either images, or one "
            "subfolder of images a class."
        )
    paths: list[Path] = []
    labels: list[int] = []
    for label, place in enumerate(subfolders or [folder]):
        found = _listing(place)
        for path in found:
            if path.is_dir() or path.suffix.lower() not in SUFFIXES:
                raise ValueError(
                    f"{path}: is not an image; a folder of images holds {', '.join(SUFFIXES)} "
                    "files only."
                )
        if not found:
            raise ValueError(f"{place}: is an empty folder; it must hold at least one image.")
        paths += found
        labels += [label] * len(found)
    images = [_read_image(path) for path in paths]
    first = images[0]
    for path, image in zip(paths, images, strict=True):
        if image.shape != first.shape or image.dtype != first.dtype:
            raise ValueError(
                f"{path}: has shape {image.shape} ({image.dtype}), but {paths[0].name} has "
                f"{first.shape} ({first.dtype}); all images must have one size and kind."
            )
    return np.stack(images), np.array(labels, np.int32) if subfolders else None


def _listing(folder: Path) -> list[Path]:
    try:
        return sorted(entry for entry in folder.iterdir() if not entry.name.startswith("."))
    except OSError as error:
        raise ValueError(f"{folder}: cannot be listed ({error.strerror}).") from None


def _read_image(path: Path) -> np.ndarray:
    # Pillow comes with matplotlib.
    from PIL import Image

    try:
        # Only decoders of the two formats that the name may mean. The first pass checks checksums
        # and the end of the file, which decoding passes over.
        with Image.open(path, formats=_FORMATS) as image:
            image.verify()
        with Image.open(path, formats=_FORMATS) as image:
            if image.mode == "1":
                return np.asarray(image.convert("L"))
            if image.mode not in ("L", "I;16"):
                return np.asarray(image.convert("L" if image.mode == "LA" else "RGB"))
            return np.asarray(image)
    # Damaged images fail in many ways: bad chunks, checksums, sizes beyond any memory.
    except Exception as error:
        reason = type(error).__name__
        raise ValueError(
            f"{path}: cannot be read as a PNG or JPEG image ({reason}); give a whole, undamaged "
            "file."
        ) from None

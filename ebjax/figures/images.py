"""Images: grids, chains on their way, filters."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure

from ebjax.figures.style import INK

__all__ = ["chain_strip", "filters", "image_grids"]

_GAP = "#5f7a99"


def _tile(images: np.ndarray, num_columns: int) -> np.ndarray:
    """[N, height, width] or [N, height, width, 3] as one, a pixel apart; the gaps are NaN."""
    num_rows = math.ceil(len(images) / num_columns)
    height, width, *channels = images.shape[1:]
    shape = (num_rows * (height + 1) + 1, num_columns * (width + 1) + 1, *channels)
    canvas = np.full(shape, np.nan)
    for i, image in enumerate(images):
        top, left = (i // num_columns) * (height + 1) + 1, (i % num_columns) * (width + 1) + 1
        canvas[top : top + height, left : left + width] = image
    return canvas


def _without_single_channel(images: np.ndarray, rank: int) -> np.ndarray:
    """Drops a last axis of 1; a last axis of 3 stays."""
    images = np.asarray(images)
    channels = images.shape[rank:]
    if images.ndim not in (rank, rank + 1) or channels not in ((), (1,), (3,)):
        raise ValueError(
            f"images have shape {images.shape}; give {rank} axes, the last two height and width, "
            "or one more with 1 or 3 channels."
        )
    return images[..., 0] if channels == (1,) else images


def _show_tiles(
    axes,
    images: np.ndarray,
    num_columns: int,
    limits: tuple[float, float],
    color_map: str = "gray",
) -> None:
    import matplotlib
    from matplotlib.colors import to_rgb

    tiles = _tile(images, num_columns)
    if tiles.ndim == 3:
        low, high = limits
        shown = np.clip((tiles - low) / (high - low), 0.0, 1.0)
        axes.imshow(np.where(np.isnan(shown), to_rgb(_GAP), shown), interpolation="nearest")
    else:
        colors = matplotlib.colormaps[color_map].with_extremes(bad=_GAP)
        axes.imshow(tiles, cmap=colors, vmin=limits[0], vmax=limits[1], interpolation="nearest")
    axes.set_axis_off()


def image_grids(
    grids: Mapping[str, np.ndarray],
    *,
    num_columns: int = 12,
    num_rows: int = 8,
    limits: tuple[float, float] = (-1.0, 1.0),
) -> Figure:
    """Grids of images side by side.

    Args:
      grids: by title, each [N, height, width] or with a last axis of one or three channels; the
        first ``num_columns * num_rows`` are shown.
      num_columns: images in a row of a grid.
      num_rows: rows of a grid.
      limits: the values shown as black and as white.
    """
    figure = Figure(figsize=(5.2 * len(grids), 5.2 * num_rows / num_columns + 0.5), dpi=120)
    for axes, (title, images) in zip(
        np.atleast_1d(figure.subplots(1, len(grids))), grids.items(), strict=True
    ):
        images = _without_single_channel(images, 3)[: num_columns * num_rows]
        _show_tiles(axes, images, num_columns, limits)
        axes.set_title(title, color=INK, fontsize=12)
    figure.tight_layout()
    return figure


def chain_strip(
    chains: np.ndarray,
    steps: Sequence[int],
    *,
    limits: tuple[float, float] = (-1.0, 1.0),
    label: str = "Langevin steps from noise",
) -> Figure:
    """Chains on their way: one chain a column, time going down.

    Args:
      chains: [number of times, C, height, width], or with a last axis of one or three channels.
      steps: the step of each time.
      limits: the values shown as black and as white.
      label: what ``steps`` counts.
    """
    chains = _without_single_channel(chains, 4)
    num_times, num_chains, height, *rest = chains.shape
    figure = Figure(figsize=(0.55 * num_chains + 1.0, 0.55 * num_times + 0.6), dpi=120)
    axes = figure.subplots()
    _show_tiles(axes, chains.reshape(-1, height, *rest), num_chains, limits)
    axes.set_axis_on()
    axes.spines[:].set_visible(False)
    axes.set_xticks([])
    axes.set_yticks([(height + 1) * (i + 0.5) for i in range(num_times)], [str(s) for s in steps])
    axes.tick_params(length=0, labelsize=8, colors=INK)
    axes.set_ylabel(label, color=INK, fontsize=9)
    figure.tight_layout()
    return figure


def filters(weights: np.ndarray, *, num_columns: int = 10, title: str = "") -> Figure:
    """Weights as images, each on a scale of its own: red is positive, blue negative, white 0.

    Args:
      weights: [N, height, width]; of an RBM's W [V, H], ``W.T.reshape(H, height, width)``.
      num_columns: filters in a row.
      title: above the grid.

    Raises:
      ValueError: if the weights are no such array.
    """
    weights = np.asarray(weights, np.float64)
    if weights.ndim != 3 or not len(weights):
        raise ValueError(f"weights has shape {weights.shape}; give [N, height, width].")
    peaks = np.abs(weights).max(axis=(1, 2), keepdims=True)
    num_columns = min(num_columns, len(weights))
    num_rows = math.ceil(len(weights) / num_columns)
    figure = Figure(figsize=(0.7 * num_columns + 0.3, 0.7 * num_rows + 0.4), dpi=120)
    axes = figure.subplots()
    scaled = weights / np.where(peaks > 0.0, peaks, 1.0)
    _show_tiles(axes, scaled, num_columns, (-1.0, 1.0), "RdBu_r")
    axes.set_title(title, color=INK, fontsize=10, loc="left")
    figure.tight_layout()
    return figure

"""Figures of energies and samples; each function returns a matplotlib figure.

Figures are made without a display and without touching matplotlib's global state, so they work in
scripts, in notebooks and on servers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure

__all__ = ["chain_strip", "energy_histogram", "image_grids", "training_curves"]

_INK, _MUTED = "#1b2a41", "#8d99ae"
COLORS = ("#2a6f97", "#e07a5f", "#81b29a", "#b08968", "#6d597a", "#3d405b")


def _style(axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(_MUTED)
    axes.tick_params(colors=_INK, labelsize=8)
    axes.grid(axis="y", color=_MUTED, alpha=0.2, linewidth=0.6)


def _tile(images: np.ndarray, num_columns: int) -> np.ndarray:
    """[N, height, width] images as one, a pixel apart; the gaps are NaN."""
    num_rows = math.ceil(len(images) / num_columns)
    height, width = images.shape[1:]
    canvas = np.full((num_rows * (height + 1) + 1, num_columns * (width + 1) + 1), np.nan)
    for i, image in enumerate(images):
        top, left = (i // num_columns) * (height + 1) + 1, (i % num_columns) * (width + 1) + 1
        canvas[top : top + height, left : left + width] = image
    return canvas


def _show_tiles(axes, images: np.ndarray, num_columns: int, limits: tuple[float, float]) -> None:
    import matplotlib

    colors = matplotlib.colormaps["gray"].with_extremes(bad="#5f7a99")
    tiles = _tile(images, num_columns)
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
      grids: by title, each [N, height, width] or with a last axis of one channel; the first
        ``num_columns * num_rows`` are shown.
      num_columns: images in a row of a grid.
      num_rows: rows of a grid.
      limits: the values shown as black and as white.
    """
    figure = Figure(figsize=(5.2 * len(grids), 5.2 * num_rows / num_columns + 0.5), dpi=120)
    for axes, (title, images) in zip(
        np.atleast_1d(figure.subplots(1, len(grids))), grids.items(), strict=True
    ):
        images = np.asarray(images)[: num_columns * num_rows]
        if images.ndim == 4:
            images = images[..., 0]
        _show_tiles(axes, images, num_columns, limits)
        axes.set_title(title, color=_INK, fontsize=12)
    figure.tight_layout()
    return figure


def chain_strip(
    chains: np.ndarray, steps: Sequence[int], *, limits: tuple[float, float] = (-1.0, 1.0)
) -> Figure:
    """Chains on their way: one chain a column, time going down.

    Args:
      chains: [number of times, C, height, width], or with a last axis of one channel.
      steps: the step of each time.
      limits: the values shown as black and as white.
    """
    chains = np.asarray(chains)
    if chains.ndim == 5:
        chains = chains[..., 0]
    num_times, num_chains, height, width = chains.shape
    figure = Figure(figsize=(0.55 * num_chains + 1.0, 0.55 * num_times + 0.6), dpi=120)
    axes = figure.subplots()
    _show_tiles(axes, chains.reshape(-1, height, width), num_chains, limits)
    axes.set_axis_on()
    axes.spines[:].set_visible(False)
    axes.set_xticks([])
    axes.set_yticks([(height + 1) * (i + 0.5) for i in range(num_times)], [str(s) for s in steps])
    axes.tick_params(length=0, labelsize=8, colors=_INK)
    axes.set_ylabel("Langevin steps from noise", color=_INK, fontsize=9)
    figure.tight_layout()
    return figure


def energy_histogram(
    energies: Mapping[str, np.ndarray], *, close_up: Sequence[str] = (), num_bins: int = 50
) -> Figure:
    """Histograms of energies of several sets on one axis, and of some of them close up.

    Args:
      energies: by name, each [N].
      close_up: names of the sets whose energies lie close together; they are drawn again beside
        the whole, on a scale of their own.
      num_bins: bins of each panel.
    """
    panels = [("all", list(energies))] + ([("close up", list(close_up))] if close_up else [])
    figure = Figure(figsize=(5.2 * len(panels), 3.6), dpi=120)
    colors = dict(zip(energies, COLORS, strict=False))
    for axes, (title, names) in zip(
        np.atleast_1d(figure.subplots(1, len(panels))), panels, strict=True
    ):
        pooled = np.concatenate([np.asarray(energies[name]) for name in names])
        bins = np.linspace(pooled.min(), pooled.max(), num_bins + 1).tolist()
        for name in names:
            values, color = np.asarray(energies[name]), colors[name]
            axes.hist(values, bins=bins, density=True, alpha=0.2, color=color)
            label = f"{name} (mean {values.mean():.2f})"
            axes.hist(values, bins=bins, density=True, histtype="step", color=color, label=label)
        axes.set_title(title, fontsize=10, color=_INK, loc="left")
        axes.set_xlabel("energy E(x), lower is likelier", color=_INK, fontsize=9)
        axes.set_ylabel("density", color=_INK, fontsize=9)
        axes.legend(frameon=False, fontsize=8)
        _style(axes)
    figure.tight_layout()
    return figure


def training_curves(rows: Sequence[Mapping[str, float]]) -> Figure:
    """One small panel for each metric over the steps.

    Args:
      rows: log points, as ``read_metrics`` gives them.
    """
    names = list(dict.fromkeys(name for row in rows for name in row if name != "step"))
    num_columns = min(3, len(names))
    num_rows = math.ceil(len(names) / num_columns)
    figure = Figure(figsize=(3.6 * num_columns, 2.2 * num_rows), dpi=110)
    panels = np.atleast_1d(figure.subplots(num_rows, num_columns)).ravel()
    for axes, name in zip(panels, names, strict=False):
        points = [(row["step"], row[name]) for row in rows if name in row]
        steps, values = zip(*points, strict=True)
        marker = "o" if len(points) < 30 else None
        axes.plot(steps, values, color=COLORS[0], linewidth=1.2, marker=marker, markersize=2.5)
        axes.set_title(name.replace("_", " "), fontsize=9, color=_INK, loc="left")
        _style(axes)
    for axes in panels[len(names) :]:
        axes.set_axis_off()
    figure.tight_layout()
    return figure

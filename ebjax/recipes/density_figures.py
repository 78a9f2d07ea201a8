"""Pictures of laws in the plane: density, energy and samples side by side."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from matplotlib.figure import Figure

from ebjax.evaluation import GridLaw

__all__ = ["landscape", "laws_and_draws"]


def landscape(data: GridLaw, model: GridLaw, draws: Mapping[str, np.ndarray]) -> Figure:
    """Five panels: density of the data and of the model, the model's energy, data and samples.

    Args:
      data: the law of the data on a grid.
      model: the learned law on the same grid.
      draws: two sets of points [N, 2] by title, shown as dots.
    """
    figure = Figure(figsize=(16.0, 3.5), dpi=110)
    panels = figure.subplots(1, 5)
    extent = (*model.axes[0][[0, -1]], *model.axes[1][[0, -1]])
    largest = float(np.exp(data.log_density.max()))
    # Above this the law has no mass, and the picture no use for the differences.
    energies = np.minimum(model.energies - model.energies.min(), 20.0)
    images = [
        ("density of the data", np.exp(data.log_density), {"vmin": 0.0, "vmax": largest}),
        ("density of the model", np.exp(model.log_density), {"vmin": 0.0, "vmax": largest}),
        ("energy of the model, up to 20", energies, {}),
    ]
    for axes, (title, image, limits) in zip(panels, images, strict=False):
        colors = "viridis_r" if "energy" in title else "viridis"
        axes.imshow(image.T, origin="lower", extent=extent, cmap=colors, **limits)
        axes.set_title(title, fontsize=9)
    _dots(panels[3:], draws, extent)
    figure.tight_layout()
    return figure


def _dots(panels, draws: Mapping[str, np.ndarray], extent) -> None:
    """Points as dots, one panel a set."""
    for axes, (title, points) in zip(panels, draws.items(), strict=True):
        points = np.asarray(points)
        axes.scatter(points[:, 0], points[:, 1], s=2.0, alpha=0.5, color="#2a6f97", linewidths=0)
        axes.set_title(title, fontsize=9)
        axes.set_xlim(extent[0], extent[1])
        axes.set_ylim(extent[2], extent[3])
        axes.set_aspect("equal")
    for axes in panels[0].figure.axes:
        axes.tick_params(labelsize=7)


def laws_and_draws(laws: Mapping[str, GridLaw], draws: Mapping[str, np.ndarray]) -> Figure:
    """Densities of laws in the plane, then sets of points, one panel each.

    Args:
      laws: on one grid, by title.
      draws: sets of points [N, 2] by title, shown as dots.
    """
    figure = Figure(figsize=(2.7 * (len(laws) + len(draws)), 3.0), dpi=110)
    panels = figure.subplots(1, len(laws) + len(draws))
    axes_of_law = next(iter(laws.values())).axes
    extent = (*axes_of_law[0][[0, -1]], *axes_of_law[1][[0, -1]])
    for axes, (title, law) in zip(panels, laws.items(), strict=False):
        axes.imshow(np.exp(law.log_density).T, origin="lower", extent=extent, cmap="viridis")
        axes.set_title(title.replace("_", " "), fontsize=9)
    _dots(panels[len(laws) :], draws, extent)
    figure.tight_layout()
    return figure

"""Pictures of laws in the plane: density, energy and samples side by side."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from matplotlib.figure import Figure

from ebjax.evaluation import GridLaw

__all__ = ["landscape"]


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
    for axes, (title, points) in zip(panels[3:], draws.items(), strict=True):
        points = np.asarray(points)
        axes.scatter(points[:, 0], points[:, 1], s=2.0, alpha=0.5, color="#2a6f97", linewidths=0)
        axes.set_title(title, fontsize=9)
        axes.set_xlim(extent[0], extent[1])
        axes.set_ylim(extent[2], extent[3])
        axes.set_aspect("equal")
    for axes in panels:
        axes.tick_params(labelsize=7)
    figure.tight_layout()
    return figure

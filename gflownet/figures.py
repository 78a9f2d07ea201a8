"""Figures of what a flow has learned."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from matplotlib.figure import Figure

__all__ = ["grid_distributions"]


def grid_distributions(distributions: Mapping[str, np.ndarray], *, subtitle: str = "") -> Figure:
    """Laws over a grid side by side on one colour scale.

    Args:
      distributions: by title, each [H, H] (a law, or a marginal of it over two coordinates).
      subtitle: a line under the panels.
    """
    figure = Figure(figsize=(3.6 * len(distributions) + 0.6, 4.0), dpi=120)
    axes_of = np.atleast_1d(figure.subplots(1, len(distributions), sharey=True))
    highest = max(float(np.max(law)) for law in distributions.values())
    for axes, (title, law) in zip(axes_of, distributions.items(), strict=True):
        image = axes.imshow(np.asarray(law).T, origin="lower", cmap="magma", vmin=0, vmax=highest)
        axes.set_title(title, fontsize=11)
        axes.set_xlabel("first coordinate", fontsize=8)
        axes.tick_params(labelsize=8)
    axes_of[0].set_ylabel("second coordinate", fontsize=8)
    figure.colorbar(image, ax=list(axes_of), fraction=0.025, pad=0.02, label="probability")
    figure.text(0.5, 0.02, subtitle, ha="center", fontsize=9)
    return figure

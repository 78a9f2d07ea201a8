"""Figures of energies and samples; each function returns a matplotlib figure.

Figures are made without a display and without touching matplotlib's global state, so they work in
scripts, in notebooks and on servers.

    images   grids of images, chains on their way, filters
    curves   histograms of energies, training curves, detection, calibration, bars
    planar   laws, samples and chains in the plane
"""

from ebjax.figures.curves import (
    bars_by_group,
    energy_histogram,
    reliability_diagram,
    roc_curves,
    training_curves,
)
from ebjax.figures.images import chain_strip, filters, image_grids
from ebjax.figures.planar import chains_2d, density_2d, scatter_2d
from ebjax.figures.style import COLORS

__all__ = [
    "COLORS",
    "bars_by_group",
    "chain_strip",
    "chains_2d",
    "density_2d",
    "energy_histogram",
    "filters",
    "image_grids",
    "reliability_diagram",
    "roc_curves",
    "scatter_2d",
    "training_curves",
]

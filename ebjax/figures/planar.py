"""Laws, samples and chains in the plane."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import numpy as np
import numpy.typing as npt
from matplotlib.figure import Figure

from ebjax.evaluation.quadrature import GridLaw
from ebjax.figures.style import COLORS, INK, MUTED, color_of, style_axes

__all__ = ["chains_2d", "density_2d", "scatter_2d"]

_MAX_DOTS = 4000


def _points(name: str, points: npt.ArrayLike) -> np.ndarray:
    points = np.asarray(points)
    if points.ndim != 2 or points.shape[1] != 2:
        raise ValueError(f"{name} has shape {points.shape}; give points of the plane, [N, 2].")
    return points


def _check_planar(name: str, law: GridLaw) -> None:
    if len(law.axes) != 2:
        raise ValueError(f"{name} is a law in {len(law.axes)} dimensions; give one in two.")


def _dots(axes, points: np.ndarray, color: str) -> None:
    """Dots that stay visible whether few or many; the first 4,000."""
    shown = points[:_MAX_DOTS]
    size = float(np.clip(4000.0 / max(len(shown), 1), 2.0, 14.0))
    axes.scatter(*shown.T, s=size, color=color, alpha=0.6, linewidths=0, rasterized=True)


def _finish(axes, title: str, limits) -> None:
    axes.set_title(title, fontsize=10, color=INK, loc="left")
    axes.set(xlim=limits[0], ylim=limits[1], aspect="equal")
    style_axes(axes, grid=None)


def _heat(axes, law: GridLaw, values: np.ndarray, highest: float, color_map):
    (left, *_, right), (bottom, *_, top) = law.axes
    return axes.imshow(
        values.T,
        origin="lower",
        extent=(left, right, bottom, top),
        cmap=color_map,
        vmin=0.0,
        vmax=highest,
        interpolation="bilinear",
    )


def _limits(law: GridLaw):
    return [(axis[0], axis[-1]) for axis in law.axes]


def density_2d(
    laws: Mapping[str, GridLaw],
    *,
    samples: Mapping[str, npt.ArrayLike] | None = None,
    show: Literal["density", "energy"] = "density",
    energy_range: float = 10.0,
) -> Figure:
    """Heat maps of laws on one colour scale, and samples beside them in the same frame.

    Args:
      laws: by title, of ``ebjax.evaluation.grid_law``, such as the data's and the model's.
      samples: by title, each [N, 2]; drawn in panels of their own over contours of the first law.
      show: ``"density"``, or ``"energy"`` above each law's lowest, in nats.
      energy_range: nats above the lowest energy at which the colours end.

    Raises:
      ValueError: if there is no law, a law is not planar, or samples are not points of the plane.
    """
    samples = samples or {}
    if not laws:
        raise ValueError("laws is empty; give at least one law, of grid_law.")
    if show not in ("density", "energy"):
        raise ValueError(f"show is {show!r}; it must be 'density' or 'energy'.")
    for name, law in laws.items():
        _check_planar(name, law)
    if show == "density":
        values = {name: np.exp(law.log_density) for name, law in laws.items()}
        # A single narrow peak would leave all else dark.
        highest = max(float(np.quantile(v[v > 1e-3 * v.max()], 0.99)) for v in values.values())
        color_map, label = "magma", "density"
    else:
        values = {name: law.energies - law.energies.min() for name, law in laws.items()}
        highest, color_map, label = energy_range, "viridis_r", "E - min E  [nats]"
    num_panels = len(laws) + len(samples)
    figure = Figure(figsize=(3.3 * num_panels + 0.7, 3.4), dpi=120, layout="constrained")
    panels = np.atleast_1d(figure.subplots(1, num_panels))
    first = next(iter(laws.values()))
    for axes, (title, law) in zip(panels, laws.items(), strict=False):
        image = _heat(axes, law, values[title], highest, color_map)
        _finish(axes, title, _limits(law))
    bar = figure.colorbar(
        image, ax=list(panels[: len(laws)]), fraction=0.045, pad=0.02, extend="max"
    )
    bar.ax.tick_params(labelsize=7, colors=INK)
    bar.set_label(label, fontsize=8, color=INK)
    for axes, (title, points) in zip(panels[len(laws) :], samples.items(), strict=True):
        _dots(axes, _points(title, points), COLORS[0])
        _contours(axes, first)
        _finish(axes, title, _limits(first))
    return figure


def _contours(axes, law: GridLaw) -> None:
    """Lines around half and 95% of the mass."""
    density = np.exp(law.log_density)
    order = np.argsort(density, axis=None)[::-1]
    mass = np.cumsum(np.exp(law.log_weights + law.log_density).ravel()[order])
    levels = {float(density.ravel()[order][np.searchsorted(mass, m)]) for m in (0.5, 0.95)}
    axes.contour(*law.axes, density.T, levels=sorted(levels), colors=MUTED, linewidths=0.6)


def scatter_2d(
    sets: Mapping[str, npt.ArrayLike],
    *,
    bounds: tuple[tuple[float, float], tuple[float, float]] | None = None,
) -> Figure:
    """Sets of points side by side in one frame.

    Args:
      sets: by title, each [N, 2]; the first 4,000 points of each are drawn.
      bounds: ``((left, right), (bottom, top))``; by default what holds all but the outermost
        thousandth of the first set, with a margin, so that strays of another do not set the scale.

    Raises:
      ValueError: if a set is not of points of the plane.
    """
    clouds = {name: _points(name, points) for name, points in sets.items()}
    if not clouds or not all(len(points) for points in clouds.values()):
        raise ValueError("sets has no points; give at least one set with at least one.")
    if bounds is None:
        low, high = np.quantile(next(iter(clouds.values())), [0.001, 0.999], axis=0)
        margin = 0.15 * float((high - low).max()) + 1e-6
        low, high = low - margin, high + margin
    else:
        low, high = np.asarray(bounds, float).T
    figure = Figure(figsize=(3.3 * len(clouds) + 0.4, 3.5), dpi=120, layout="constrained")
    panels = np.atleast_1d(figure.subplots(1, len(clouds)))
    for axes, (title, points), color in zip(
        panels, clouds.items(), color_of(clouds).values(), strict=True
    ):
        _dots(axes, points, color)
        outside = int(np.sum(np.any((points < low) | (points > high), axis=1)))
        note = f"{title} ({outside} of {len(points)} outside)" if outside else title
        _finish(axes, note, list(zip(low, high, strict=True)))
    return figure


def chains_2d(
    chains: npt.ArrayLike, *, law: GridLaw | None = None, num_shown: int = 12, title: str = "chains"
) -> Figure:
    """Paths of chains in the plane, from an open circle to a full one.

    Args:
      chains: [T, C, 2] positions at T times, as ``sample`` keeps them.
      law: drawn under them.
      num_shown: the first chains, as many as are drawn.
      title: above the figure.

    Raises:
      ValueError: if the chains are no such array, or the law is not planar.
    """
    chains = np.asarray(chains)
    if chains.ndim != 3 or chains.shape[2] != 2 or not len(chains):
        raise ValueError(f"chains has shape {chains.shape}; give [T, C, 2].")
    figure = Figure(figsize=(4.6, 4.6), dpi=120, layout="constrained")
    axes = figure.subplots()
    limits = None
    if law is not None:
        _check_planar("law", law)
        density = np.exp(law.log_density)
        _heat(axes, law, density, float(np.quantile(density[density > 0], 0.999)), "Greys")
        limits = _limits(law)
    paths = chains[:, :num_shown].swapaxes(0, 1)
    for i, path in enumerate(paths):
        color = COLORS[i % len(COLORS)]
        axes.plot(*path.T, color=color, linewidth=0.7, alpha=0.8)
        axes.plot(*path[0], "o", markersize=4.5, markerfacecolor="white", markeredgecolor=color)
        axes.plot(*path[-1], "o", markersize=4.5, color=color)
    if limits is None:
        low, high = paths.min(axis=(0, 1)), paths.max(axis=(0, 1))
        margin = 0.08 * float((high - low).max()) + 1e-6
        limits = [(a - margin, b + margin) for a, b in zip(low, high, strict=True)]
    _finish(axes, title, limits)
    return figure

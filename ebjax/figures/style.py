"""Ink, colours and axes that all figures share."""

from __future__ import annotations

from collections.abc import Iterable

__all__ = ["COLORS", "INK", "MUTED", "color_of", "style_axes", "style_legend"]

INK, MUTED = "#1b2a41", "#8d99ae"
COLORS = ("#2a6f97", "#e07a5f", "#81b29a", "#b08968", "#6d597a", "#3d405b")


def color_of(names: Iterable[str]) -> dict[str, str]:
    """A colour for each name, in order; after six they come again.

    >>> list(color_of(["data", "samples"]).values())
    ['#2a6f97', '#e07a5f']
    """
    return {name: COLORS[i % len(COLORS)] for i, name in enumerate(names)}


def style_axes(axes, *, grid: str | None = "y") -> None:
    """Two thin spines, small labels and faint lines along one axis, or none."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(MUTED)
    axes.tick_params(colors=INK, labelsize=8)
    axes.xaxis.label.set(color=INK, fontsize=9)
    axes.yaxis.label.set(color=INK, fontsize=9)
    if grid:
        axes.grid(axis=grid, color=MUTED, alpha=0.2, linewidth=0.6)
        axes.set_axisbelow(True)


def style_legend(axes, **options) -> None:
    """A small legend without a frame."""
    axes.legend(frameon=False, fontsize=8, labelcolor=INK, **options)

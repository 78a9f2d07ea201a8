"""Numbers: histograms of energies, training curves, detection, calibration, bars."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
from matplotlib.figure import Figure

from ebjax.evaluation.classification import ReliabilityCurve
from ebjax.figures.style import COLORS, INK, MUTED, color_of, style_axes, style_legend

__all__ = [
    "bars_by_group",
    "energy_histogram",
    "reliability_diagram",
    "roc_curves",
    "training_curves",
]


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
    colors = color_of(energies)
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
        axes.set_title(title, fontsize=10, color=INK, loc="left")
        axes.set(xlabel="energy E(x), lower is likelier", ylabel="density")
        style_axes(axes)
        style_legend(axes)
    figure.tight_layout()
    return figure


def training_curves(rows: Sequence[Mapping[str, float]]) -> Figure:
    """One small panel for each metric over the steps.

    Args:
      rows: log points, as ``read_metrics`` gives them.
    """
    names = list(dict.fromkeys(name for row in rows for name in row if name != "step"))
    num_columns = min(3, len(names)) or 1
    num_rows = math.ceil(len(names) / num_columns) or 1
    figure = Figure(figsize=(3.6 * num_columns, 2.2 * num_rows), dpi=110)
    panels = np.atleast_1d(figure.subplots(num_rows, num_columns)).ravel()
    for axes, name in zip(panels, names, strict=False):
        points = [(row["step"], row[name]) for row in rows if name in row]
        steps, values = zip(*points, strict=True)
        marker = "o" if len(points) < 30 else None
        axes.plot(steps, values, color=COLORS[0], linewidth=1.2, marker=marker, markersize=2.5)
        axes.set_title(name.replace("_", " "), fontsize=9, color=INK, loc="left")
        style_axes(axes)
    for axes in panels[len(names) :]:
        axes.set_axis_off()
    figure.tight_layout()
    return figure


def roc_curves(scores: Mapping[str, tuple[npt.ArrayLike, npt.ArrayLike]]) -> Figure:
    """Receiver operating characteristics: outliers accepted against data accepted.

    Args:
      scores: by name ``(scores_in [N], scores_out [M])``, higher is less like the data, as for
        ``ebjax.evaluation.out_of_distribution_figures``.
    """
    from sklearn.metrics import roc_curve

    from ebjax.evaluation.detection import out_of_distribution_figures

    figure = Figure(figsize=(4.4, 4.2), dpi=120)
    axes = figure.subplots()
    axes.plot([0, 1], [0, 1], color=MUTED, linewidth=0.8, linestyle=(0, (4, 3)))
    axes.axhline(0.95, color=MUTED, linewidth=0.6, linestyle=":")
    axes.annotate("95%", (1.01, 0.95), fontsize=7, color=MUTED, va="center", annotation_clip=False)
    for (name, (inside, outside)), color in zip(
        scores.items(), color_of(scores).values(), strict=True
    ):
        figures = out_of_distribution_figures(inside, outside)
        is_in = np.repeat([1, 0], [len(np.asarray(inside)), len(np.asarray(outside))])
        # drop_intermediate drops points on straight lines only.
        false, true, _ = roc_curve(is_in, -np.concatenate([inside, outside]))
        label = f"{name}: AUROC {figures['auroc']:.3f}, FPR95 {figures['fpr95']:.3f}"
        axes.plot(false, true, color=color, linewidth=1.4, label=label, clip_on=False, zorder=3)
    axes.set(xlim=(0, 1), ylim=(0, 1), aspect="equal")
    axes.set(xlabel="share of outliers accepted", ylabel="share of data accepted")
    style_axes(axes, grid="both")
    style_legend(axes, loc="lower right")
    figure.tight_layout()
    return figure


def reliability_diagram(curves: Mapping[str, ReliabilityCurve]) -> Figure:
    """Accuracy against confidence, and below it how many predictions have which confidence.

    Args:
      curves: by name, of ``ebjax.evaluation.reliability_curve``.
    """
    figure = Figure(figsize=(4.4, 5.0), dpi=120)
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=[3.2, 1])
    upper.plot(
        [0, 1], [0, 1], color=MUTED, linewidth=0.8, linestyle=(0, (4, 3)), label="calibrated"
    )
    least = min(float(curve.confidence.min()) for curve in curves.values())
    left = math.floor(10.0 * least - 0.5) / 10.0 if least > 0.15 else 0.0
    for (name, curve), color in zip(curves.items(), color_of(curves).values(), strict=True):
        share = curve.num_examples / curve.num_examples.sum()
        error = float(np.sum(share * np.abs(curve.accuracy - curve.confidence)))
        label = f"{name}: calibration error {error:.3f}"
        style = {"color": color, "linewidth": 1.3, "marker": "o", "markersize": 3.5}
        upper.plot(curve.confidence, curve.accuracy, label=label, **style)
        lower.plot(curve.confidence, share, **style)
    lowest = min(float(curve.accuracy.min()) for curve in curves.values())
    upper.set(xlim=(left, 1.0), ylim=(min(left, lowest - 0.03), 1.02), ylabel="accuracy")
    lower.set(ylim=(0.0, None), xlabel="confidence", ylabel="share")
    for axes in (upper, lower):
        style_axes(axes, grid="both")
    style_legend(upper, loc="upper left")
    figure.tight_layout()
    return figure


def bars_by_group(
    values: Mapping[str, Mapping[str, float]],
    *,
    errors: Mapping[str, Mapping[str, float]] | None = None,
    label: str = "",
) -> Figure:
    """Bars in groups, such as a figure of merit by data set and method.

    Args:
      values: by group, then by series; a series may be missing in a group.
      errors: half lengths of error bars, of the same form.
      label: of the vertical axis.

    Raises:
      ValueError: if there is nothing to show.
    """
    series = list(dict.fromkeys(name for group in values.values() for name in group))
    if not series:
        raise ValueError("values is empty; give at least one group with one series.")
    width = 0.8 / len(series)
    figure = Figure(figsize=(max(3.6, 0.5 * len(values) * (len(series) + 1) + 1.2), 3.4), dpi=120)
    axes = figure.subplots()
    axes.axhline(0.0, color=MUTED, linewidth=0.8)
    for i, (name, color) in enumerate(color_of(series).items()):
        places = [k for k, group in enumerate(values.values()) if name in group]
        heights = [group[name] for group in values.values() if name in group]
        spread = [
            (errors or {}).get(title, {}).get(name, np.nan)
            for title, group in values.items()
            if name in group
        ]
        bars = axes.bar(
            np.array(places) + (i - 0.5 * (len(series) - 1)) * width,
            heights,
            0.92 * width,
            color=color,
            label=name,
            yerr=spread if errors else None,
            error_kw={"ecolor": INK, "elinewidth": 0.9, "capsize": 2},
        )
        axes.bar_label(bars, fmt="%.3g", fontsize=7, color=INK, padding=2)
    axes.set_xticks(range(len(values)), list(values))
    axes.set(ylabel=label)
    axes.margins(y=0.12)
    style_axes(axes)
    if len(series) > 1:
        style_legend(axes, ncols=min(len(series), 4), loc="lower left", bbox_to_anchor=(0, 1))
    figure.tight_layout()
    return figure

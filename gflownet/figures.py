"""Figures of what a flow has learned."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from matplotlib.figure import Figure

__all__ = ["grid_distributions", "probabilities_and_rewards"]


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


def probabilities_and_rewards(
    log_probability: np.ndarray,
    log_reward: np.ndarray,
    drawn_log_reward: np.ndarray,
    *,
    log_z: float | None = None,
    learned: np.ndarray | None = None,
    target: np.ndarray | None = None,
) -> Figure:
    """log p of objects against their log R, beside the rewards of what the flow draws.

    Args:
      log_probability: [N] of objects.
      log_reward: [N] of the same.
      drawn_log_reward: [M] of samples of the flow.
      log_z: where log p = log R - log Z is drawn as a line.
      learned: [N] the probabilities that the flow gives the same objects, where these are all.
      target: [N] R / Z of them.
    """
    figure = Figure(figsize=(8.6, 3.8), dpi=120, layout="constrained")
    scatter, histogram = figure.subplots(1, 2)
    if len(log_reward) > 5000:
        scatter.hexbin(log_reward, log_probability, gridsize=60, bins="log", cmap="magma_r")
    else:
        scatter.scatter(log_reward, log_probability, s=5, alpha=0.4, color="#2a6f97")
    if log_z is not None:
        ends = np.array([log_reward.min(), log_reward.max()])
        scatter.plot(ends, ends - log_z, color="#555555", lw=1, label="log R - log Z")
        scatter.legend(frameon=False, fontsize=8)
    scatter.set_xlabel("log R")
    scatter.set_ylabel("log p of the flow")
    # A few objects far below the others would squeeze them together.
    low, high = np.quantile(log_reward, 0.01), log_reward.max()
    margin = 0.03 * (high - low) + 1e-6
    scatter.set_xlim(low - margin, high + margin)
    seen = log_probability[log_reward >= low]
    scatter.set_ylim(seen.min() - 0.5, seen.max() + 0.5)
    bins = np.linspace(low, high + 1e-6, 40)
    style = {"bins": bins, "density": True, "histtype": "step"}
    if target is not None and learned is not None:
        histogram.hist(log_reward, weights=target, color="#555555", label="target", **style)
        histogram.hist(log_reward, weights=learned, color="#2a6f97", label="flow, exact", **style)
    histogram.hist(
        drawn_log_reward, bins=bins, density=True, alpha=0.3, color="#2a6f97", label="samples"
    )
    histogram.set_xlabel("log R")
    histogram.set_ylabel("density")
    histogram.legend(frameon=False, fontsize=8)
    return figure

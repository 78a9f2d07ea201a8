"""Figures show what they are given."""

import numpy as np
import pytest

from ebjax import figures
from gflownet.figures import grid_distributions


def panels(figure):
    return [axes for axes in figure.axes if axes.axison or axes.images]


def test_image_grids_hold_the_pixels():
    images = np.random.default_rng(0).uniform(-1, 1, (30, 8, 8, 1))
    figure = figures.image_grids({"a": images, "b": images[:5]}, num_columns=4, num_rows=2)
    tiles = [np.asarray(axes.images[0].get_array()) for axes in figure.axes]
    assert [axes.get_title() for axes in figure.axes] == ["a", "b"]
    assert tiles[0].shape == (2 * 9 + 1, 4 * 9 + 1)
    assert np.array_equal(tiles[0][1:9, 10:18], images[1, ..., 0])


def test_chain_strip_has_a_row_for_each_time():
    chains = np.zeros((3, 5, 8, 8, 1))
    figure = figures.chain_strip(chains, [0, 10, 20])
    labels = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert labels == ["0", "10", "20"]


def test_energy_histogram_shows_every_set_and_the_close_up():
    energies = {"data": np.zeros(10), "samples": np.ones(10), "noise": np.full(10, 50.0)}
    figure = figures.energy_histogram(energies, close_up=("data", "samples"))
    legends = [[t.get_text() for t in axes.get_legend().get_texts()] for axes in figure.axes]
    assert [len(texts) for texts in legends] == [3, 2]
    assert figure.axes[1].get_xlim()[1] < 2


def test_training_curves_have_a_panel_for_each_metric():
    rows = [{"step": s, "loss": 1.0 / s, **({"tv": 0.1} if s % 2 else {})} for s in range(1, 9)]
    figure = figures.training_curves(rows)
    assert {axes.get_title(loc="left") for axes in panels(figure)} == {"loss", "tv"}


@pytest.mark.parametrize("count", [1, 3])
def test_grid_distributions_share_one_scale(count):
    laws = {str(i): np.full((4, 4), (i + 1) / 16) for i in range(count)}
    figure = grid_distributions(laws, subtitle="note")
    limits = {axes.images[0].get_clim() for axes in figure.axes if axes.images}
    assert limits == {(0.0, count / 16)}

"""Figures show what they are given."""

import jax.numpy as jnp
import numpy as np
import pytest

from ebjax import figures
from ebjax.evaluation import GridLaw, ReliabilityCurve, grid_law
from gflownet.figures import grid_distributions


def panels(figure):
    return [axes for axes in figure.axes if axes.axison or axes.images]


def titles(figure):
    return [axes.get_title(loc="left") for axes in figure.axes if axes.get_title(loc="left")]


def legend_of(axes):
    return [text.get_text() for text in axes.get_legend().get_texts()]


@pytest.mark.parametrize("channels", [(), (1,)], ids=str)
def test_image_grids_hold_the_pixels(channels):
    images = np.random.default_rng(0).uniform(-1, 1, (30, 8, 8, *channels))
    figure = figures.image_grids({"a": images, "b": images[:5]}, num_columns=4, num_rows=2)
    tiles = [np.asarray(axes.images[0].get_array()) for axes in figure.axes]
    assert [axes.get_title() for axes in figure.axes] == ["a", "b"]
    assert tiles[0].shape == (2 * 9 + 1, 4 * 9 + 1)
    assert np.array_equal(tiles[0][1:9, 10:18], images.reshape(30, 8, 8)[1])


def test_image_grids_have_colours():
    images = np.random.default_rng(0).uniform(0.0, 2.0, (3, 4, 5, 3))
    figure = figures.image_grids({"a": images}, num_columns=3, num_rows=1, limits=(0.0, 2.0))
    tile = np.asarray(figure.axes[0].images[0].get_array())
    np.testing.assert_allclose(tile[1:5, 7:12], images[1] / 2.0)
    assert 0.0 < tile[0, 0].min() < tile[0, 0].max() < 1.0  # the gap is neither black nor white


def test_chain_strip_has_a_row_for_each_time():
    chains = np.zeros((3, 5, 8, 8, 1))
    figure = figures.chain_strip(chains, [0, 10, 20], label="steps")
    labels = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert labels == ["0", "10", "20"]
    assert figure.axes[0].get_ylabel() == "steps"


def test_filters_are_scaled_one_by_one():
    weights = np.zeros((3, 2, 2))
    weights[0, 0, 1], weights[1, 1, 0] = 5.0, -0.1
    tile = np.asarray(figures.filters(weights, title="w").axes[0].images[0].get_array())
    assert tile.shape == (4, 10)
    assert (tile[1, 2], tile[2, 4], tile[1, 7]) == (1.0, -1.0, 0.0)
    assert figures.filters(weights).axes[0].images[0].get_clim() == (-1.0, 1.0)


def test_energy_histogram_shows_every_set_and_the_close_up():
    energies = {"data": np.zeros(10), "samples": np.ones(10), "noise": np.full(10, 50.0)}
    figure = figures.energy_histogram(energies, close_up=("data", "samples"))
    assert [len(legend_of(axes)) for axes in figure.axes] == [3, 2]
    assert figure.axes[1].get_xlim()[1] < 2


def test_energy_histogram_takes_more_sets_than_colours():
    figure = figures.energy_histogram({str(i): np.arange(3.0) + i for i in range(8)})
    assert len(legend_of(figure.axes[0])) == 8


def test_training_curves_have_a_panel_for_each_metric():
    rows = [{"step": s, "loss": 1.0 / s, **({"tv": 0.1} if s % 2 else {})} for s in range(1, 9)]
    figure = figures.training_curves(rows)
    assert {axes.get_title(loc="left") for axes in panels(figure)} == {"loss", "tv"}


@pytest.mark.parametrize("rows", [[], [{"step": 5}]])
def test_training_curves_of_nothing_are_blank(rows):
    assert panels(figures.training_curves(rows)) == []


def test_roc_curves_are_those_of_the_scores():
    scores = {"noise": ([0.0, 1.0], [2.0, 3.0]), "near": ([0.0, 2.0], [1.0, 3.0])}
    axes = figures.roc_curves(scores).axes[0]
    assert legend_of(axes)[0] == "noise: AUROC 1.000, FPR95 0.000"
    assert legend_of(axes)[1] == "near: AUROC 0.750, FPR95 0.500"
    curves = {line.get_label().split(":")[0]: line for line in axes.lines}
    false, true = curves["near"].get_data()
    assert np.trapezoid(true, false) == pytest.approx(0.75)
    assert (false[-1], true[-1]) == (1.0, 1.0)


def test_reliability_diagram_draws_each_bin():
    curve = ReliabilityCurve(np.array([0.5, 0.9]), np.array([0.4, 0.95]), np.array([30, 10]))
    upper, lower = figures.reliability_diagram({"net": curve}).axes
    assert legend_of(upper) == ["calibrated", "net: calibration error 0.087"]
    np.testing.assert_array_equal(upper.lines[1].get_ydata(), [0.4, 0.95])
    np.testing.assert_array_equal(lower.lines[0].get_ydata(), [0.75, 0.25])
    assert upper.get_xlim()[0] <= 0.5
    assert upper.get_ylim()[0] < 0.4


def test_bars_stand_in_their_groups():
    values = {"a": {"one": 1.0, "two": 2.0}, "b": {"two": 3.0}}
    axes = figures.bars_by_group(values, errors={"a": {"one": 0.1}}, label="AUROC").axes[0]
    bars = {round(bar.get_x() + bar.get_width() / 2, 6): bar.get_height() for bar in axes.patches}
    assert bars == {-0.2: 1.0, 0.2: 2.0, 1.2: 3.0}
    assert [label.get_text() for label in axes.get_xticklabels()] == ["a", "b"]
    assert legend_of(axes) == ["one", "two"]


@pytest.fixture(scope="module")
def law():
    """Wider along the second axis, and off the middle along the first."""
    energy_fn = lambda params, x: 0.5 * ((x[0] - 1.0) ** 2 + (x[1] / 2.0) ** 2)  # noqa: E731
    return grid_law(energy_fn, (), bounds=[(-4.0, 4.0), (-8.0, 8.0)], num_points=41)


def test_densities_share_a_scale_and_stand_upright(law):
    flat = grid_law(lambda params, x: jnp.zeros(()), (), bounds=(-4.0, 4.0), num_points=11)
    samples = np.random.default_rng(0).normal(size=(50, 2))
    figure = figures.density_2d({"law": law, "flat": flat}, samples={"samples": samples})
    assert titles(figure) == ["law", "flat", "samples"]
    images = [axes.images[0] for axes in figure.axes[:2]]
    assert len({image.get_clim() for image in images}) == 1
    assert images[0].get_extent() == [-4.0, 4.0, -8.0, 8.0]
    # Rows of the image are the second coordinate: the peak is at x = 1, y = 0.
    row, column = np.unravel_index(np.argmax(images[0].get_array()), (41, 41))
    assert (law.axes[0][column], law.axes[1][row]) == pytest.approx((1.0, 0.0))
    np.testing.assert_allclose(figure.axes[2].collections[0].get_offsets(), samples)


def test_energies_start_at_zero(law):
    figure = figures.density_2d({"law": law}, show="energy", energy_range=5.0)
    image = figure.axes[0].images[0]
    assert image.get_clim() == (0.0, 5.0)
    assert np.min(image.get_array()) == 0.0


def test_scatter_shares_a_frame_and_counts_what_is_outside():
    near = np.random.default_rng(0).normal(size=(500, 2))
    figure = figures.scatter_2d({"data": near, "samples": np.concatenate([near, near + 1e3])})
    assert titles(figure)[1].startswith("samples (50")
    assert figure.axes[0].get_xlim() == figure.axes[1].get_xlim()
    assert figure.axes[0].get_xlim()[1] < 10.0


def test_chains_run_from_start_to_end(law):
    chains = np.cumsum(np.random.default_rng(0).normal(size=(20, 7, 2)), axis=0)
    for options in ({}, {"law": law}):
        axes = figures.chains_2d(chains, num_shown=3, **options).axes[0]
        paths = [line for line in axes.lines if len(line.get_xdata()) > 1]
        assert len(paths) == 3
        np.testing.assert_allclose(np.array(paths[1].get_data()).T, chains[:, 1])
        assert len(axes.images) == len(options)


def line_law() -> GridLaw:
    return grid_law(lambda params, x: jnp.sum(x**2), (), bounds=[(-1.0, 1.0)], num_points=5)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: figures.image_grids({"a": np.ones((3, 8, 8, 2))}), "1 or 3 channels"),
        (lambda: figures.filters(np.ones((3, 4))), "weights has shape"),
        (lambda: figures.bars_by_group({}), "values is empty"),
        (lambda: figures.density_2d({}), "laws is empty"),
        (lambda: figures.density_2d({"line": line_law()}), "line is a law in 1"),
        (lambda: figures.density_2d({"line": line_law()}, show="heat"), "show is 'heat'"),
        (lambda: figures.scatter_2d({"a": np.ones((3, 3))}), "a has shape"),
        (lambda: figures.scatter_2d({}), "sets has no points"),
        (lambda: figures.chains_2d(np.ones((3, 2))), "chains has shape"),
    ],
)
def test_wrong_calls_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("count", [1, 3])
def test_grid_distributions_share_one_scale(count):
    laws = {str(i): np.full((4, 4), (i + 1) / 16) for i in range(count)}
    figure = grid_distributions(laws, subtitle="note")
    limits = {axes.images[0].get_clim() for axes in figure.axes if axes.images}
    assert limits == {(0.0, count / 16)}

"""Figures of a search show the search: its numbers, their intervals, units and names."""

import matplotlib
import numpy as np
import pandas as pd
import pytest

from dense_rlhf.bayesopt import audit
from dense_rlhf.bayesopt.search import Search
from dense_rlhf.bayesopt.space import Space
from dense_rlhf.statistics import Interval
from dense_rlhf.view import figures, search_figures

matplotlib.use("Agg")
NAMES = ("shap", "terminal", "lime", "attention")


def searched(d, bounds=()):
    """Eleven or so noisy trials of a slope towards the first source."""
    space, rng = Space(d, bounds), np.random.default_rng(0)
    search = Search(space, initial=5)
    for point in space.anchors() + space.sobol(7, 0):
        search.observe(point, point[0] + 0.1 * rng.normal(), 0.1)
    return search


@pytest.fixture(scope="module")
def pair():
    return searched(2)


def band_of(ax):
    """x, low and high of the first shaded band."""
    corners = ax.collections[0].get_paths()[0].vertices
    x = np.unique(corners[:, 0])
    ends = [corners[np.isclose(corners[:, 0], at), 1] for at in x]
    return x, np.array([e.min() for e in ends]), np.array([e.max() for e in ends])


def test_trials_are_marked_by_who_chose_them(pair):
    phases = audit.phases(pair)
    ax = search_figures.trials(figures.axes(), pair, phases, "sd")
    drawn = {line.get_label(): line for line in ax.containers}
    assert set(drawn) == {f"{phase} ± SE" for phase in ("anchor", "quasi-random", "chosen")}
    for phase in ("anchor", "quasi-random", "chosen"):
        points, _, (bars,) = drawn[f"{phase} ± SE"].lines
        assert points.get_xdata().tolist() == [i + 1 for i, other in enumerate(phases) if other == phase]
        assert points.get_ydata().tolist() == [pair.values[i - 1] for i in points.get_xdata()]
        assert np.ptp(bars.get_segments()[0][:, 1]) == pytest.approx(0.2)
    assert ax.get_ylabel() == "value (sd)"


def test_the_trace_shows_the_incumbent_and_its_interval(pair):
    path = audit.trace(pair)
    ax = search_figures.trace(figures.axes(), path)
    np.testing.assert_allclose(ax.lines[0].get_ydata(), path["mean"])
    assert ax.lines[0].get_xdata()[-1] == len(pair.values)
    _, low, high = band_of(ax)
    assert low.min() == pytest.approx(path["low"].min()) and high.max() == pytest.approx(path["high"].max())


def test_the_band_is_the_interval():
    ax = search_figures.band(figures.axes(), Interval(0.1, -1.0, 2.0))
    assert ax.patches[0].get_bbox().y0 == -1.0 and ax.patches[0].get_bbox().y1 == 2.0
    assert ax.lines[0].get_ydata()[0] == 0.1


@pytest.mark.parametrize("bounds", [(), ((0.0, 2.0),)])
def test_two_sources_are_a_line(bounds):
    search = searched(2, bounds)
    ax = search_figures.posterior_line(figures.axes(), search, NAMES[:2], "sd")
    x, low, high = band_of(ax)
    beyond = search.incumbent()[0][2:]
    mean, sd = search.posterior([(float(w), float(1 - w), *beyond) for w in x])
    np.testing.assert_allclose(low, mean - 1.96 * sd, atol=1e-6)
    np.testing.assert_allclose(high, mean + 1.96 * sd, atol=1e-6)
    np.testing.assert_allclose(ax.lines[0].get_ydata(), mean, atol=1e-6)
    assert "shap" in ax.get_xlabel() and "terminal" in ax.get_xlabel() and ax.get_ylabel() == "value (sd)"


def test_three_sources_are_a_triangle():
    search = searched(3)
    axes = search_figures.ternary(figures.panels(["mean", "interval"]), search, NAMES[:3], "sd")
    for ax in axes:
        assert {text.get_text() for text in ax.texts} == set(NAMES[:3])
        np.testing.assert_allclose(ax.lines[0].get_xydata()[:3], search_figures.CORNERS)  # the first trials
        best = np.array(search.incumbent()[0]) @ search_figures.CORNERS
        np.testing.assert_allclose(ax.lines[1].get_xydata()[0], best)
    bars = [ax.get_ylabel() for ax in axes[0].figure.axes[2:]]
    assert bars == ["posterior mean (sd)", "half its 95 % interval (sd)"]
    corners = [tuple(float(i == k) for i in range(3)) for k in range(3)]
    mean, sd = search.posterior([*search.space.sobol(256, 1), *corners])
    for ax, shown in zip(axes, (mean, 1.96 * sd)):
        filled = ax.collections[0]
        np.testing.assert_allclose([filled.zmin, filled.zmax], [shown.min(), shown.max()], atol=0.05)
    sides = np.linalg.norm(search_figures.CORNERS - np.roll(search_figures.CORNERS, 1, 0), axis=1)
    np.testing.assert_allclose(sides, 1)


@pytest.mark.parametrize("bounds", [(), ((0.0, 2.0),)])
def test_more_sources_are_slices_through_the_incumbent(bounds):
    search = searched(4, bounds)
    axes = search_figures.slices(figures.panels(NAMES), search, NAMES, "sd")
    best, mean, _ = search.incumbent()
    assert best[0] == 1  # alone: the others have no ratio to keep, and are even
    for i, (ax, name) in enumerate(zip(axes, NAMES)):
        curve, marker = ax.lines
        assert ax.get_title("right") == name and curve.get_color() == figures.colour(name)
        assert marker.get_xdata()[0] == best[i]
        here = np.interp(best[i], curve.get_xdata(), curve.get_ydata())
        assert here == pytest.approx(mean, abs=1e-6)
        assert curve.get_xdata()[0] == 0 and curve.get_xdata()[-1] == 1
    even = tuple([0.0] + [1 / 3] * 3) + best[4:]
    assert axes[0].lines[0].get_ydata()[0] == pytest.approx(search.posterior([even])[0][0], abs=1e-6)


def test_calibration_tells_what_its_intervals_miss(pair):
    left_out = audit.leave_one_out(pair)
    left_out.loc[0, "z"] = 3.0
    ax = search_figures.calibration(figures.axes(), left_out, "sd")
    counts = {found.get_label(): len(found.lines[0].get_xdata()) for found in ax.containers}
    misses = int((left_out["z"].abs() > 1.96).sum())
    assert counts == {"interval holds it": len(left_out) - misses, "interval misses it": misses} and misses >= 1
    points, _, (bars,) = ax.containers[0].lines
    inside = left_out[left_out["z"].abs() <= 1.96]
    np.testing.assert_allclose(points.get_ydata().astype(float), inside["mean"])
    assert np.ptp(bars.get_segments()[0][:, 1]) == pytest.approx(2 * 1.96 * inside["sd"].iloc[0])


@pytest.fixture(autouse=True)
def closed():
    yield
    matplotlib.pyplot.close("all")


def test_trials_to_a_goal_that_was_not_reached_are_open_marks_above_the_most():
    needed = {"gp": {2: Interval(20, 15, 30), 4: Interval(np.inf, 40, np.inf)}}
    ax = search_figures.until_goal(figures.axes(), needed, 50, "trials")
    line, reached, beyond, most = ax.lines
    assert line.get_ydata().tolist() == [20, 53] and most.get_ydata()[0] == 50
    assert reached.get_ydata().tolist() == [20] and reached.get_markerfacecolor() == figures.colour("gp")
    assert beyond.get_ydata().tolist() == [53] and beyond.get_markerfacecolor() == "white"
    assert [np.ptp(bar[:, 1]) for bar in ax.collections[0].get_segments()] == [15, 13]


def test_shares_are_stacked_from_the_top():
    table = pd.DataFrame({"yes": [0.25, 1.0], "no": [0.75, 0.0]}, index=["a", "b"])
    ax = search_figures.shares(figures.axes(), table, {"yes": "#009E73", "no": "#999999"}, "share")
    assert [(bar.get_x(), bar.get_width()) for bar in ax.patches] == [(0, 0.25), (0, 1), (0.25, 0.75), (1, 0)]
    assert ax.get_ylim() == (1.5, -0.5) and [label.get_text() for label in ax.get_yticklabels()] == ["a", "b"]

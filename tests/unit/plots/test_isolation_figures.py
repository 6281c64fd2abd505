"""The figures show the tables: read from the drawn data, not from pixels."""

from __future__ import annotations

import subprocess
import sys
from itertools import pairwise

import numpy as np
import pytest
from matplotlib.collections import PathCollection, QuadMesh
from matplotlib.text import Text

from moe_interp import plots
from moe_interp.errors import ConfigError, DataError
from moe_interp.experiments.isolation.result import IsolationResult
from moe_interp.plots.figure import thin_ticks, whiskers
from tests.unit.experiments.planted_isolation import planted_isolation

DRAW = (plots.specialization_map, plots.calibration_scatter, plots.dominance, plots.layer_impact, plots.sorted_p)


@pytest.fixture(scope="module")
def planted() -> IsolationResult:
    return planted_isolation(n_items={"code": 12, "facts": 14, "math": 13}, cells={("math", 1, 3): 2.0})


def panels_of(figure):
    """Panels with something in them, without colour bars."""
    return [axis for axis in figure.axes if axis.get_title(loc="left") or axis.get_xlabel()]


def test_the_map_shows_every_mean_and_marks_what_is_rejected(planted):
    table = planted.specialization()
    figure = plots.specialization_map(planted)
    axes = panels_of(figure)
    assert [axis.get_title(loc="left") for axis in axes] == ["code", "facts", "math"]
    for axis in axes:
        here = table[table["domain"] == axis.get_title(loc="left")]
        (mesh,) = (c for c in axis.collections if isinstance(c, QuadMesh))
        np.testing.assert_array_equal(mesh.get_array().ravel(), here["mean"])
        marks = {c.get_label(): c.get_offsets() for c in axis.collections if isinstance(c, PathCollection)}
        for word in ("helped", "hurt"):
            rejected = here[here["direction"] == word]
            drawn = sorted(map(tuple, np.floor(marks[word]).astype(int).tolist()))
            assert drawn == sorted(zip(rejected["expert"].astype(int), rejected["layer"]))
        assert mesh.norm.vmin == -mesh.norm.vmax
    counts = table.attrs
    assert f"{counts['helped']} helped (▲) and {counts['hurt']} hurt (▼) of 192 tests" in figure.get_suptitle()


def test_the_scatter_shows_every_expert_of_every_layer(planted):
    points, rows = planted.calibration_points(), planted.calibration_by_domain().set_index("domain")
    for axis in panels_of(plots.calibration_scatter(planted)):
        name = axis.get_title(loc="left").split(":")[0]
        here = points[points["domain"] == name]
        np.testing.assert_allclose(axis.collections[0].get_offsets(), here[["routing", "quality"]])
        assert f"rho {rows.loc[name, 'rho']:.2f}" in axis.get_title(loc="left")
        assert f"corrected {rows.loc[name, 'corrected']:.2f}" in axis.get_title(loc="left")
    noisy = plots.calibration_scatter(planted_isolation(n_items={"a": 5}))
    assert "too noisy to correct" in panels_of(noisy)[0].get_title(loc="left")


def test_dominance_shows_shares_and_the_line_of_even_use(planted):
    table = planted.dominance()
    for axis in panels_of(plots.dominance(planted)):
        here = table[table["domain"] == axis.get_title(loc="left")]
        bars = [bar for bar in axis.patches if bar.get_width() == 0.8]
        np.testing.assert_allclose([bar.get_height() for bar in bars], here["share"])
        orange = [bar.get_facecolor()[0] > 0.5 for bar in bars]
        assert orange == (here["verdict"] == "above even use").tolist()
        assert (here.loc[orange, "low"] > 1 / 16).all()
        assert 1 / 16 in [line.get_ydata()[0] for line in axis.lines]


def test_impact_shows_both_estimates_with_intervals(planted):
    table = planted.layer_impact()
    (axis,) = panels_of(plots.layer_impact(planted))
    lines = {line.get_label(): line.get_ydata() for line in axis.lines}
    np.testing.assert_array_equal(lines["same items (optimistic)"], table["naive"])
    (bars,) = axis.containers
    np.testing.assert_array_equal(bars.lines[0].get_ydata(), table["impact"])
    segments = np.array([segment[:, 1] for segment in bars.lines[2][0].get_segments()])
    np.testing.assert_allclose(segments, table[["low", "high"]])
    shaded = [patch.get_x() + 0.5 for patch in axis.patches]
    assert shaded == [0, 3]


def test_sorted_p_values_stand_against_the_line(planted):
    table = planted.specialization()
    (axis,) = panels_of(plots.sorted_p(planted))
    lines = {line.get_label(): line.get_xydata() for line in axis.lines}
    drawn = np.concatenate([lines["rejected"], lines["not rejected"]])
    np.testing.assert_array_equal(drawn[:, 1], np.sort(table["p"]))
    np.testing.assert_array_equal(drawn[:, 0], np.arange(1, len(table) + 1))
    np.testing.assert_allclose(lines["alpha i / m"][:, 1], 0.05 * np.arange(1, 193) / 192)
    assert len(lines["rejected"]) == table.attrs["helped"] + table.attrs["hurt"]
    last = lines["rejected"][-1]
    assert last[1] <= 0.05 * last[0] / 192  # step-up: the last rejected one lies under the line
    assert lines["smallest attainable p"][0, 1] == pytest.approx(2 / 2**14)
    with pytest.raises(DataError, match="no domain with enough items"):
        plots.sorted_p(planted_isolation(n_items={"a": 4}))


@pytest.mark.parametrize("draw", DRAW)
def test_no_text_leaves_the_figure_or_covers_a_neighbour(draw, planted):
    figure = draw(planted)
    figure.draw_without_rendering()
    page = figure.bbox
    for axis in figure.axes:
        for labels in (axis.get_xticklabels(which="both"), axis.get_yticklabels(which="both")):
            boxes = [label.get_window_extent() for label in labels if label.get_text() and label.get_visible()]
            inside = [box for box in boxes if axis.bbox.expanded(1.2, 1.4).overlaps(box)]
            assert not any(one.overlaps(other) for one, other in pairwise(inside))
        titles = [child for child in axis.get_children() if isinstance(child, Text)]
        for text in (*titles, axis.xaxis.label, axis.yaxis.label):
            box = text.get_window_extent()
            assert not text.get_text() or (box.x0 >= 0 and box.x1 <= page.x1 and box.y0 >= 0 and box.y1 <= page.y1)


@pytest.mark.parametrize("draw", DRAW)
def test_other_shapes_are_drawn_too(draw):
    for options in (
        {"n_items": {"a": 7}, "n_experts": 48, "n_layers": 2},
        {"n_items": {"a": 6, "b": 8}, "n_layers": 1},
    ):
        plots.to_svg(draw(planted_isolation(**options)), "figure")


def test_files_are_whole_and_repeatable_and_ids_are_apart(planted, tmp_path):
    figure = plots.layer_impact(planted)
    assert plots.save_figure(figure, tmp_path / "a.svg").read_bytes().startswith(b"<svg")
    assert plots.save_figure(figure, tmp_path / "new" / "a.png").read_bytes().startswith(b"\x89PNG")
    first, second = (plots.to_svg(plots.layer_impact(planted), "impact") for _ in range(2))
    assert first == second
    assert 'id="impact-figure_1"' in first
    assert 'href="#impact-' in first
    assert 'href="#D' not in first
    with pytest.raises(ConfigError, match="a file ending in svg, png, pdf"):
        plots.save_figure(figure, tmp_path / "a.gif")


def test_helpers_by_hand():
    assert thin_ticks(["a", "b", "c", "d", "e"], 2) == ([0, 3], ["a", "d"])
    lengths = whiskers(np.array([1.0, 2.0]), np.array([0.5, -np.inf]), np.array([np.nan, 5.0]))
    np.testing.assert_array_equal(lengths, [[0.5, 0.0], [0.0, 3.0]])


def test_drawing_leaves_no_global_state():
    code = "import sys, moe_interp.plots; sys.exit('matplotlib.pyplot' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0

"""The figures of counterfactual routes show the tables: read from the drawn data, not from pixels."""

from __future__ import annotations

import numpy as np
import pytest

from moe_interp import plots
from moe_interp.errors import DataError
from moe_interp.experiments.counterfactual_result import CounterfactualResult
from tests.unit.plots.planted_routes import planted_routes


@pytest.fixture(scope="module")
def planted() -> CounterfactualResult:
    return planted_routes()


def bars_of(axis):
    """label -> (values, [low, high]) of the error bars of a panel."""
    found = {}
    for container in axis.containers:
        points, _, (whiskers,) = container.lines
        segments = np.array(whiskers.get_segments())[:, :, 1]
        found[container.get_label()] = (points.get_ydata(), segments)
    return found


def test_confidence_shows_every_class_under_every_way_of_classing(planted):
    axes = plots.confidence(planted).axes
    assert [axis.get_title(loc="left") for axis in axes] == [
        "alignment of the router with utility",
        "regret of the standard route",
    ]
    ways = {"by other routes' mean p": "resampled", "by entropy of the prediction": "entropy"}
    for axis, column in zip(axes, ("alignment", "regret")):
        drawn = bars_of(axis)
        assert len(drawn) == 3
        for label, way in ways.items():
            table = planted.by_confidence(by=way)
            values, bounds = drawn[label]
            np.testing.assert_array_equal(values, table[column])
            np.testing.assert_allclose(bounds, table[[f"{column}_low", f"{column}_high"]], atol=1e-12)
        assert [label.get_text() for label in axis.get_xticklabels()] == ["fragile", "middle", "confident"]


def test_a_way_of_classing_without_data_is_left_out():
    lacking = planted_routes(controls=False)
    assert len(plots.confidence(lacking).axes[0].containers) == 2
    with pytest.raises(DataError, match="at least one way of classing"):
        plots.confidence(lacking, by=["resampled"])


def test_layers_show_regret_with_intervals(planted):
    table = planted.by_layer()
    (axis,) = plots.layer_regret(planted).axes
    ((values, bounds),) = bars_of(axis).values()
    np.testing.assert_array_equal(values, table["regret"])
    np.testing.assert_allclose(bounds, table[["regret_low", "regret_high"]], atol=1e-12)
    assert [label.get_text() for label in axis.get_xticklabels()] == ["1", "3", "5"]


def test_the_curve_shows_the_run_and_its_controls(planted):
    table = planted.regret_curve()
    (axis,) = plots.regret_curve(planted).axes
    lines = [line for line in axis.lines if not line.get_label().startswith("_")]
    kinds = list(dict.fromkeys(table["kind"]))
    assert len(lines) == len(kinds) == 5
    assert len({(line.get_color(), line.get_linestyle()) for line in lines}) == 5
    for line, kind in zip(lines, kinds):
        here = table[table["kind"] == kind].sort_values("n")
        np.testing.assert_array_equal(line.get_xdata(), here["n"])
        np.testing.assert_array_equal(line.get_ydata(), here["regret"])


@pytest.mark.parametrize("ending", ["svg", "png", "pdf"])
def test_figures_are_saved(planted, tmp_path, ending):
    path = plots.save_figure(plots.regret_curve(planted), tmp_path / f"curve.{ending}")
    assert path.stat().st_size > 1000

"""The figures of counterfactual routes show the tables: read from the drawn data, not from pixels."""

from __future__ import annotations

import numpy as np
import pytest

from moe_interp import plots
from moe_interp.errors import DataError
from moe_interp.experiments.counterfactual.result import CounterfactualResult
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
    ways = {"by other routes' mean p": "resampled", "by entropy of other routes' mean prediction": "entropy"}
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
    assert len(plots.confidence(lacking).axes[0].containers) == 1
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
    # beside a control that compares some of the tokens stands the run's own on these
    drawn = [(kind, "regret") for kind in kinds]
    drawn.insert(drawn.index(("fresh_draw", "regret")) + 1, ("fresh_draw", "router_regret"))
    assert len(kinds) == 5
    assert len(lines) == len(drawn) == 6
    assert len({(line.get_color(), line.get_linestyle()) for line in lines}) == 6
    for line, (kind, column) in zip(lines, drawn):
        here = table[table["kind"] == kind].sort_values("n")
        np.testing.assert_array_equal(line.get_xdata(), here["n"])
        np.testing.assert_array_equal(line.get_ydata(), here[column])


def test_the_drawn_target_is_held_against_the_run_on_the_tokens_that_it_matches(planted):
    data = planted.data
    drawn = np.maximum(data["logp_own_standard"].values, -0.5)  # unlikely tokens are never drawn
    matched = CounterfactualResult(
        data.assign(
            logp_own_standard=("token", drawn),
            logp_own_null=(("token", "layer"), np.broadcast_to(drawn[:, None], data["logp_null"].shape)),
        )
    )
    table = matched.regret_curve()
    here = table[table["kind"] == "own_prediction"]
    of_all = table[table["kind"] == "router"]
    assert (here["matched"] < 0.9).all()
    assert (here["router_regret"].to_numpy() < of_all["regret"].to_numpy()).all()
    (axis,) = plots.regret_curve(matched).axes
    lines = {line.get_label(): line.get_ydata() for line in axis.lines}
    np.testing.assert_array_equal(
        lines["router's routes, on the tokens of the drawn target"], here["router_regret"].to_numpy()
    )


def test_a_run_with_one_route_has_whiskers_and_no_alignment():
    one = planted_routes(n_routes=1)
    figure = plots.regret_curve(one)
    assert len(figure.axes[0].containers) == len(set(one.regret_curve()["kind"]))
    left, right = plots.confidence(one).axes
    assert [text.get_text() for text in left.texts] == ["undefined"]
    assert not right.texts


@pytest.mark.parametrize("ending", ["svg", "png", "pdf"])
def test_figures_are_saved(planted, tmp_path, ending):
    path = plots.save_figure(plots.regret_curve(planted), tmp_path / f"curve.{ending}")
    assert path.stat().st_size > 1000

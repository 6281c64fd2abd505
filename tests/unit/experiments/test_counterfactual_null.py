"""Statistics of counterfactual runs where there is nothing to find, with routes that the real sampler drew."""

from __future__ import annotations

import numpy as np
import pytest

from moe_interp.errors import DataError
from moe_interp.experiments.counterfactual.result import CounterfactualResult
from moe_interp.results.tables import classed_by, fresh_second, unselected
from moe_interp.routes import AllSubsets
from tests.unit.experiments.planted_routers import drawn_routes

THRESHOLDS = (0.5, 0.8)


@pytest.mark.parametrize("sharpness", [1.0, 2.0])
def test_exchangeable_routes_show_no_class_effect_though_two_draws_share_routes(sharpness: float) -> None:
    result = CounterfactualResult(drawn_routes(2500, sharpness, spread=3.0, n_routes=20))
    assert (result.data["second_route"].values >= 0).mean() > 0.4  # the two draws have much in common
    for by in ("resampled", "entropy"):
        table = result.by_confidence(by, THRESHOLDS)  # type: ignore[arg-type]
        assert (table["n_cells"] > 50).all()
        assert set(table["verdict"]) == {"uninformative"}
        for measure in ("gap", "regret", "positive_rate", "inclusion_1", "inclusion_5", "alignment"):
            low, high = table[f"{measure}_low"].max(), table[f"{measure}_high"].min()
            assert low < high, (by, measure)  # the intervals of all classes overlap
    # what is wrong with the routes that both draws have: they class a token by what is compared
    data = result.data
    careless = data.assign(second_route=data["second_route"].where(data["second_route"] < 0, -1))
    fragile = CounterfactualResult(careless).by_confidence("resampled", THRESHOLDS).set_index("class").loc["fragile"]
    assert fragile["alignment_high"] < -0.03


@pytest.mark.parametrize("sharpness", [1.0, 2.0])
@pytest.mark.parametrize("slope", [0.0, 0.3, 1.0])
def test_a_standard_route_that_is_a_draw_of_the_sampler_is_no_better_than_a_fresh_one(
    slope: float, sharpness: float
) -> None:
    result = CounterfactualResult(drawn_routes(3000, sharpness, slope, standard_is_drawn=True))
    row = result.controls().set_index("kind").loc["fresh_draw"]
    for measure in ("gap", "regret"):
        low, high = row[f"excess_{measure}_low"], row[f"excess_{measure}_high"]
        assert low < 0 < high, measure
        assert high - low < 0.25 * row[f"router_{measure}"]  # zero, and not for want of data
    assert 0.5 < row["matched"] < 0.99  # the sampler draws the standard route itself now and then
    curve = result.regret_curve()
    curve = curve[curve["kind"] == "fresh_draw"]
    width = (curve["high"] - curve["low"]) / 2
    assert ((curve["regret"] - curve["router_regret"]).abs() < width).all()


def test_a_standard_route_that_is_the_routers_best_is_better_than_a_fresh_one_where_the_router_is_right() -> None:
    row = CounterfactualResult(drawn_routes(2000, 1.5, slope=1.0)).controls().set_index("kind").loc["fresh_draw"]
    assert row["excess_regret_high"] < -0.1
    row = CounterfactualResult(drawn_routes(2000, 1.5, slope=-1.0)).controls().set_index("kind").loc["fresh_draw"]
    assert row["excess_regret_low"] > 0.1


def test_where_the_main_draw_has_all_routes_tokens_have_no_class_and_no_pattern() -> None:
    data = drawn_routes(200, 1.0, sampler=AllSubsets(), n_experts=6, n_routes=14)
    assert not fresh_second(data).any()
    assert unselected(data) is None
    assert classed_by(data) == "standard"
    result = CounterfactualResult(data.assign(entropy_second=data["entropy_second"] * np.nan))
    expected = r"main draw lacks on 0% of the tokens. Expected: one on at least 5%.*\"standard\" gives the published"
    for by in ("resampled", "entropy"):
        with pytest.raises(DataError, match=expected):
            result.by_confidence(by)  # type: ignore[arg-type]
        with pytest.raises(DataError, match=expected):
            result.controls(by)  # type: ignore[arg-type]
    text = result.summary()
    assert "cannot be said: the run has a second draw that on most tokens brings no route that the first" in text
    assert "confirmed" not in text
    assert set(result.controls()["kind"]) == {"router", "fresh_draw", "null"}


def test_tokens_without_a_class_are_counted() -> None:
    data = drawn_routes(400, 1.0)
    again = data["second_route"].values.copy()
    again[:30] = 0  # a draw that only repeats the main one
    result = CounterfactualResult(data.assign(second_route=(data["second_route"].dims, again)))
    table = result.by_confidence("resampled", THRESHOLDS)
    assert set(table["n_unclassed"]) == {30}
    assert table["n_cells"].sum() + table["n_dropped"].sum() == 370
    controls = result.controls("resampled", THRESHOLDS)
    assert set(controls["n_unclassed"]) == {30}
    assert "- in no class: 7.5%, whose second draw has no route that the first one lacks." in result.summary()
    assert np.array_equal(result.by_confidence("entropy")["n_unclassed"], [0, 0, 0])


def test_routes_that_change_nothing_are_no_better_and_the_standard_one_is_the_best() -> None:
    data = drawn_routes(100, 1.0)
    rng = np.random.default_rng(0)
    exact = -rng.uniform(0, 5e-8, 100)  # in double precision, where routes are scored in single
    same = data.assign(
        logp=data["logp"] * 0,
        logp_null=data["logp_null"] * 0,
        logp_standard=("token", exact),
    )
    row = CounterfactualResult(same).by_layer().iloc[0]
    assert (row["positive_rate"], row["inclusion_1"], row["inclusion_5"], row["regret"]) == (0, 1, 1, 0)
    # nor does noise of the size of the null difference make a route a better one
    noisy = same.assign(logp=same["logp"] - 3e-8 + rng.uniform(0, 6e-8, same["logp"].shape))
    row = CounterfactualResult(noisy).by_layer().iloc[0]
    assert (row["positive_rate"], row["inclusion_1"], row["alignment_undefined"]) == (0, 1, 1)
    assert 0 < row["regret"] < 1e-7

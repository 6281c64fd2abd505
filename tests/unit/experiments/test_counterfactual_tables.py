"""Tables of counterfactual runs: by hand, against loops, and on simulations whose truth is known."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
import scipy.stats
import xarray as xr

from moe_interp import stats
from moe_interp.errors import ConfigError, DataError
from moe_interp.experiments.counterfactual.confidence import classes, confidence
from moe_interp.experiments.counterfactual.data import CounterfactualPlan, token_type
from moe_interp.experiments.counterfactual.result import CounterfactualResult
from moe_interp.experiments.counterfactual.tables import (
    ALIGNED,
    alignment,
    common_size,
    interval_verdict,
    permutation_p,
)
from tests.unit.experiments.planted_counterfactual import dataset, exchangeable


def test_two_tokens_by_hand() -> None:
    # token 0: .2 against .4 .1 .8; token 1: .95 against .5 .9 .7
    logp = np.log([[[0.4, 0.1, 0.8]], [[0.5, 0.9, 0.7]]])
    router = [[[-2.0, -1.0, -3.0]], [[-4.0, -2.0, -3.0]]]
    data = dataset(logp, np.log([0.2, 0.95]), router, [[-0.5], [-1.0]], sequence=[0, 1])
    table = CounterfactualResult(data).by_confidence("standard").set_index("class")
    fragile, confident = table.loc["fragile"], table.loc["confident"]
    assert fragile["gap"] == pytest.approx(0.6)
    assert fragile["regret"] == pytest.approx(np.log(4))
    assert (fragile["positive_rate"], fragile["inclusion_1"], fragile["inclusion_5"]) == (1, 0, 1)
    # ranks of .4 .1 .8 .2 and of -2 -1 -3 -.5: 1 - 6 * (1 + 4 + 9 + 4) / 60
    assert fragile["alignment"] == pytest.approx(-0.8)
    assert confident["gap"] == pytest.approx(-0.05)
    assert (confident["regret"], confident["positive_rate"], confident["inclusion_1"]) == (0, 0, 1)
    assert confident["alignment"] == pytest.approx(1)
    assert table.loc["middle", "n_cells"] == 0
    assert np.isnan(table.loc["middle", "gap"])
    assert table["n_distinct"].unique() == [3]
    assert table.loc["fragile", ["n_tokens", "n_sequences"]].tolist() == [1, 1]
    assert np.isnan(fragile["gap_low"])  # a single sequence has no interval


def test_groups_by_layer_type_and_position() -> None:
    rng = np.random.default_rng(0)
    logp, standard = -rng.exponential(size=(80, 2, 5)), -rng.exponential(size=80)
    result = CounterfactualResult(dataset(logp, standard))
    best = np.maximum(logp.max(-1) - standard[:, None], 0)
    layers = result.by_layer()
    np.testing.assert_allclose(layers["regret"], best.mean(0))
    assert layers["layer"].tolist() == [0, 1]
    types = result.by_token_type().set_index("token_type")
    assert types.loc["number", "regret"] == pytest.approx(best[::3].mean())
    assert types.loc["number", "n_tokens"] == 27
    positions = result.by_position().set_index("positions")
    assert positions.index.tolist() == ["0", "1-3", "4-15", "16-63"]
    assert positions.loc["1-3", "regret"] == pytest.approx(best[[1, 2, 3, 41, 42, 43]].mean())
    assert (positions["regret_low"].dropna() <= positions["regret"][positions["regret_low"].notna()]).all()


def test_one_layer_of_by_confidence_is_that_layers_rows() -> None:
    rng = np.random.default_rng(1)
    data = dataset(-rng.exponential(size=(60, 3, 4)), -rng.exponential(size=60))
    one = CounterfactualResult(data).by_confidence("standard", layer=1)
    alone = CounterfactualResult(data.isel(layer=[1])).by_confidence("standard")
    assert one.equals(alone)
    assert CounterfactualResult(data).by_confidence("standard", layer=-2).equals(alone)
    with pytest.raises(ConfigError, match=r"layer 7\. Expected: one of \[0, 1, 2\]"):
        CounterfactualResult(data).by_confidence("standard", layer=7)


def test_numbers_of_routes_are_made_equal_and_what_is_dropped_is_said() -> None:
    rng = np.random.default_rng(2)
    logp = rng.normal(-5, 1, size=(100, 1, 16))
    logp[:50, :, 8:] = np.nan  # half of the tokens have eight routes
    logp[0, :, 2:] = np.nan  # and one has two
    result = CounterfactualResult(dataset(logp, np.full(100, -5.0)))
    assert common_size(result.data) == 8
    row = result.by_confidence("standard").set_index("class").loc["fragile"]
    assert (row["n_distinct"], row["n_dropped"], row["n_cells"]) == (8, 1, 99)
    # the first eight of sixteen count: tokens alike in law have a like regret, though half have twice the routes
    halves = [CounterfactualResult(result.data.isel(token=part)) for part in (slice(1, 50), slice(50, 100))]
    few, many = (half.by_layer(8)["regret"].item() for half in halves)
    assert abs(few - many) < 0.15 < halves[1].by_layer(16)["regret"].item() - few
    assert result.by_layer(4)["n_dropped"].item() == 1


def test_exchangeable_routes_show_the_published_pattern_where_the_token_classes_itself_and_only_there() -> None:
    data = exchangeable(6000, spread=0.75, centre=1.0)
    result = CounterfactualResult(data)
    published = result.by_confidence("standard").set_index("class")
    assert published.loc["confident", "regret"] == pytest.approx(0.03, abs=0.02)
    assert published.loc["fragile", "regret"] == pytest.approx(0.77, abs=0.07)
    for by in ("resampled", "entropy"):
        thirds = tuple(np.quantile(confidence(data, by), [1 / 3, 2 / 3]))  # type: ignore[arg-type]
        table = result.by_confidence(by, thirds)  # type: ignore[arg-type]
        assert (table["n_tokens"] > 1500).all()
        for measure in ("gap", "regret", "positive_rate", "inclusion_1", "alignment"):
            low, high = table[f"{measure}_low"].max(), table[f"{measure}_high"].min()
            assert low < high, (by, measure)  # the intervals of all classes overlap
        assert (table["verdict"] == "uninformative").all()


def test_a_route_in_the_standard_ones_place_explains_all_regret_of_exchangeable_routes() -> None:
    level = np.random.default_rng(3).normal(1, 2, 4000)  # some tokens are easy whatever the route
    result = CounterfactualResult(exchangeable(4000, spread=0.8, centre=level))
    for by in ("resampled", "entropy"):
        table = result.controls(by)  # type: ignore[arg-type]
        fresh = table[table["kind"] == "fresh_draw"]
        assert (fresh["n_sequences"] > 100).all()
        # three classes of two measures at 95%: a little slack
        for measure in ("gap", "regret"):
            half = (fresh[f"excess_{measure}_high"] - fresh[f"excess_{measure}_low"]) / 2
            assert (fresh[f"excess_{measure}"].abs() < 1.3 * half).all()
    whole = result.controls().set_index("kind").loc["fresh_draw"]
    assert whole["excess_regret_low"] < 0 < whole["excess_regret_high"]


def test_a_standard_route_worse_than_its_draws_is_found() -> None:
    data = exchangeable(1000, spread=0.8, centre=1.0)
    worse = data.assign(logp_standard=data["logp_standard"] - 0.5, logp_null=data["logp_null"] - 0.5)
    row = CounterfactualResult(worse).controls().set_index("kind").loc["fresh_draw"]
    assert row["excess_regret_low"] > 0.3


def test_alignment_equals_scipy_and_is_undefined_below_twenty_null_differences() -> None:
    rng = np.random.default_rng(4)
    logp, standard, router = -rng.exponential(size=(30, 2, 6)), -rng.exponential(size=30), rng.normal(size=(30, 2, 6))
    logp[3, 1, 4:] = np.nan
    router[3, 1, 4:] = np.nan
    logp[:5, 0] = standard[:5, None] + 1e-4 * rng.normal(size=(5, 6))
    null = standard[:, None] + np.full((30, 2), 1e-5)
    own = rng.normal(size=(30, 2))
    rho, n = alignment(dataset(logp, standard, router, own, null))
    for at in np.ndindex(30, 2):
        utility = np.append(logp[at], null[at])
        present = ~np.isnan(utility)
        expected = scipy.stats.spearmanr(np.append(router[at], own[at])[present], utility[present]).statistic
        undefined = np.ptp(utility[present]) < 20e-5
        assert np.isnan(rho[at]) if undefined else rho[at] == pytest.approx(expected)
        assert n[at] == present.sum()
    table = CounterfactualResult(dataset(logp, standard, router, own, null)).by_layer()
    assert table["alignment_undefined"].tolist() == pytest.approx([np.isnan(rho[:, 0]).mean(), 0])


@pytest.mark.parametrize(("spread", "is_defined"), [(19.0, False), (21.0, True)])
def test_twenty_null_differences_are_the_bound(spread: float, is_defined: bool) -> None:
    null = np.full((4, 1), -1.0 + 1e-4)
    logp = np.broadcast_to(null[..., None] + 1e-4 * spread * np.array([0.3, 0.6, 1.0]), (4, 1, 3))
    rho, _ = alignment(dataset(logp, np.full(4, -1.0), np.broadcast_to([1.0, 2.0, 3.0], (4, 1, 3)), null=null))
    assert (~np.isnan(rho) == is_defined).all()


def test_routes_that_do_not_differ_have_no_alignment() -> None:
    data = dataset(np.full((8, 1, 4), -1.0), np.full(8, -1.0), np.random.default_rng(0).normal(size=(8, 1, 4)))
    row = CounterfactualResult(data).by_layer().iloc[0]
    assert row["alignment_undefined"] == 1
    assert np.isnan([row["alignment"], row["alignment_p"]]).all()
    assert (row["verdict"], row["regret"], row["positive_rate"], row["inclusion_1"]) == (
        "too few sequences to say (n = 0)",
        *(0, 0, 1),
    )


def test_the_permutation_null_of_the_mean_alignment() -> None:
    rng = np.random.default_rng(5)
    x, y = rng.normal(size=(40, 9)), rng.normal(size=(40, 9)) + 0.15 * np.arange(9)
    x += 0.15 * np.arange(9)
    rho = np.array([scipy.stats.spearmanr(a, b).statistic for a, b in zip(x, y)])
    ranks, other = scipy.stats.rankdata(x, axis=1), scipy.stats.rankdata(y, axis=1)
    centred, against = ranks - 5, other - 5
    null = (
        np.array([(rng.permuted(centred, axis=1) * against).sum(1).mean() for _ in range(4000)])
        / (centred[0] ** 2).sum()
    )
    assert permutation_p(rho, np.full(40, 9)) == pytest.approx((np.abs(null) >= abs(rho.mean())).mean(), abs=0.02)
    assert np.isnan(permutation_p(np.array([np.nan]), np.array([5])))
    assert np.isnan(permutation_p(np.append(np.ones(9), np.nan), np.full(10, 9)))
    assert permutation_p(np.ones(10), np.full(10, 9)) < 1e-6


def test_verdicts_go_by_the_interval_and_its_coverage() -> None:
    def verdict(low: float, high: float, n: int, covered: float = 0.95) -> str:
        ends = [np.array([value]) for value in (0.0, low, high, covered)]
        return interval_verdict(stats.Interval(*ends, n=np.array([n])), (0,), **ALIGNED)

    assert verdict(-0.05, 0.08, 10) == "uninformative"
    assert verdict(0.01, 0.09, 10) == "uninformative"  # not by a star
    assert verdict(0.01, 0.2, 10) == "aligned"
    assert verdict(-0.3, -0.01, 10) == "misaligned"
    assert verdict(-0.2, 0.3, 10) == "undecided"
    assert verdict(np.nan, np.nan, 10) == "too few sequences to say (n = 10)"
    assert verdict(0.01, 0.2, 4) == verdict(-0.05, 0.05, 4) == "too few sequences to say (n = 4)"
    assert verdict(0.01, 0.2, 10, covered=0.9) == "too few sequences to say (n = 10)"


def test_the_own_prediction_is_compared_at_equal_probability() -> None:
    rng = np.random.default_rng(6)
    level = np.repeat([np.log(0.05), np.log(0.6)], 400)
    realized = level[:, None, None] + 0.3 * rng.normal(size=(800, 1, 8))
    # the same law at equal probability, but four times as many drawn tokens are likely ones
    drawn_level = np.where(rng.random(800) < 0.8, np.log(0.6), np.log(0.05))
    own = drawn_level[:, None, None] + 0.3 * rng.normal(size=(800, 1, 8))
    own[drawn_level < -1] += 0.2
    realized[level < -1] += 0.2
    owner = rng.permutation(np.arange(800) // 8)
    result = CounterfactualResult(dataset(realized, level, sequence=owner, logp_own=own, logp_own_standard=drawn_level))
    row = result.controls().set_index("kind").loc["own_prediction"]
    assert row["matched"] == 1
    assert row["excess_regret_low"] < 0 < row["excess_regret_high"]
    # a target that the model never draws has nothing to be compared with
    unlikely = np.where(np.arange(800) < 40, np.log(1e-6), level)
    result = CounterfactualResult(
        dataset(realized, unlikely, sequence=owner, logp_own=own, logp_own_standard=drawn_level)
    )
    row = result.controls().set_index("kind").loc["own_prediction"]
    assert row["matched"] == pytest.approx(0.95)
    assert row["regret"] < result.controls().set_index("kind").loc["router", "regret"] / 2


def test_an_exhausted_token_lends_its_own_routes_to_the_fresh_draw() -> None:
    # all three other routes are known; the second draw gives the same ones
    logp = np.log([[[0.2, 0.4, 0.8]]])
    data = dataset(
        logp,
        np.log([0.5]),
        logp_second=logp,
        router_logp_second=0 * logp,
        second_route=np.array([[[0, 1, 2]]], np.int16),
    )
    table = CounterfactualResult(data).controls(n_distinct=3).set_index("kind")
    # the first of the second draw against the other two and the standard one: .8 - .2
    assert table.loc["fresh_draw", "gap"] == pytest.approx(0.6)
    assert table.loc["fresh_draw", "regret"] == pytest.approx(np.log(4))
    assert table.loc["fresh_draw", "router_gap"] == table.loc["router", "gap"] == pytest.approx(0.3)
    # at two, the first draw counts beside the first other route: .5 and .4 against .2, .2 and .4 against .5
    two = CounterfactualResult(data).controls(n_distinct=2).set_index("kind").loc["fresh_draw"]
    assert [two["gap"], two["router_gap"], two["excess_gap"]] == pytest.approx([0.3, -0.1, -0.4])
    assert table.loc["null", "regret"] == 0
    assert "random" not in table.index


@pytest.fixture
def two_classed_tokens() -> xr.Dataset:
    """Each token is classed otherwise by its realized target (fragile, confident) than by its drawn one."""
    second = np.log([[[0.95, 0.1, 0.2]], [[0.2, 0.95, 0.97]]])
    return dataset(
        np.log([[[0.5]], [[0.6]]]),
        np.log([0.4, 0.4]),
        entropy=-np.log([0.3, 0.95]),
        logp_second=second,
        router_logp_second=0 * second,
        second_route=np.full((2, 1, 3), -1, np.int16),
        logp_own=np.log([[[0.8]], [[0.9]]]),
        logp_own_standard=np.log([0.4, 0.4]),
        logp_own_second=np.log([[[0.9, 0.95, 0.95]], [[0.2, 0.3, 0.1]]]),
    )


def gaps(data: xr.Dataset, by: Any, kind: str, **options: Any) -> dict[str, float]:
    """The gaps of one kind, by class: those that there are."""
    table = CounterfactualResult(data).controls(by, **options).set_index(["kind", "class"])["gap"]
    return {str(name): round(value, 6) for name, value in table[kind].items() if not np.isnan(value)}


def test_controls_class_each_cell_by_what_it_is_compared_on(two_classed_tokens: xr.Dataset) -> None:
    data = two_classed_tokens
    # realized: means .417 and .707; a fresh route, by the others of its draw: .15 and .96; drawn: .933 and .2
    assert gaps(data, "resampled", "router") == {"fragile": 0.1, "middle": 0.2}
    assert gaps(data, "resampled", "fresh_draw") == {"fragile": -0.55, "confident": 0.2}
    own = gaps(data, "resampled", "own_prediction", thresholds=(0.45, 0.7))
    assert own == {"confident": 0.4, "fragile": 0.5}
    # by the prediction no target enters: 0.3 and 0.95
    for kind, expected in (("router", [0.1, 0.2]), ("own_prediction", [0.4, 0.5]), ("fresh_draw", [-0.55, 0.2])):
        assert gaps(data, "entropy", kind) == dict(zip(("fragile", "confident"), expected))
    table = CounterfactualResult(data).controls("resampled").set_index(["kind", "class"])
    assert table["n_cells"]["fresh_draw"].to_dict() == {"fragile": 1, "middle": 0, "confident": 1}


def test_controls_by_their_own_probability(two_classed_tokens: xr.Dataset) -> None:
    data = two_classed_tokens
    # the fresh routes have .95, a class that no standard one is in, and .2; the standard ones .4
    assert gaps(data, "standard", "router") == {"fragile": pytest.approx(0.15)}
    assert gaps(data, "standard", "fresh_draw") == {"fragile": 0.2}
    # targets of one bin, on either side of a threshold
    level = np.log([0.405, 0.4])
    drawn = data.assign(
        logp_standard=("token", level[::-1].copy()),
        logp_null=(("token", "layer"), level[::-1, None].copy()),
        logp_own_standard=("token", level),
        logp_own_null=(("token", "layer"), level[:, None]),
    )
    own = gaps(drawn, "standard", "own_prediction", thresholds=(0.402, 0.9))
    assert own == {"middle": pytest.approx(0.395), "fragile": pytest.approx(0.5)}


def test_every_draw_has_a_stream_of_its_own() -> None:
    plan = CounterfactualPlan("", "", "", (0,), "", 1, 1, 1, 3, "auto", ((0,),))
    assert plan.stream("main") == 3
    assert len({plan.stream(name) for name in ("main", "second", "random", "own")}) == 4


def test_regret_grows_with_routes_and_the_last_is_the_table() -> None:
    result = CounterfactualResult(exchangeable(300))
    curve = result.regret_curve().pivot(index="n", columns="kind", values="regret")
    assert curve.index.tolist() == [1, 2, 4, 8, 16, 32]
    assert (curve["router"].diff().dropna() > 0).all()
    table = result.controls().set_index("kind")["regret"]
    np.testing.assert_allclose(curve.loc[32, table.index], table)
    bounds = result.regret_curve()
    assert ((bounds["low"] <= bounds["regret"]) & (bounds["regret"] <= bounds["high"])).all()


def test_the_order_of_tokens_does_not_matter_and_that_of_routes_only_where_some_are_left_out() -> None:
    data = exchangeable(200)
    rng = np.random.default_rng(7)
    turned = CounterfactualResult(data.isel(route=rng.permutation(32)))
    assert turned.by_layer().equals(CounterfactualResult(data).by_layer())
    assert not turned.by_layer(8).equals(CounterfactualResult(data).by_layer(8))
    one, other = CounterfactualResult(data), CounterfactualResult(data.isel(token=rng.permutation(200)))
    for name in ("by_confidence", "by_layer", "controls", "regret_curve"):
        left, right = getattr(one, name)(), getattr(other, name)()
        for column in left.select_dtypes("number"):
            np.testing.assert_allclose(left[column], right[column], atol=1e-12, err_msg=f"{name} {column}")


def test_token_table_and_summary() -> None:
    logp = np.log([[[0.4, 0.1, 0.8]], [[0.5, np.nan, np.nan]]])
    result = CounterfactualResult(dataset(logp, np.log([0.2, 0.95]), sequence=[0, 1]))
    table = result.token_table()
    assert table["p_best"].tolist() == pytest.approx([0.8, 0.5])
    assert table["regret"].tolist() == pytest.approx([np.log(4), 0])
    assert table["gap"].tolist() == pytest.approx([0.6, -0.45])
    assert table["best_route"].tolist() == ["2 3", "0 1"]
    assert table["standard_route"].tolist() == ["7 7", "7 7"]
    assert table["n_distinct"].tolist() == [3, 1]
    assert "no controls" in result.summary()
    text = CounterfactualResult(exchangeable(400, spread=3.0)).summary()
    assert "400 tokens of 100 sequences, at 1 MoE layer, with up to 32 routes each" in text
    assert "no difference shown (difference " in text
    assert "Noise floor" in text


def test_the_summary_says_whether_the_published_pattern_is_there() -> None:
    data = exchangeable(3000, spread=0.6, centre=np.tile([-1.5, 1.0, 4.5], 1000))
    easy = data["logp_second"].mean("second") > np.log(0.9)
    aligned = data.copy()
    aligned["router_logp"] = xr.where(easy, data["logp"], data["router_logp"])
    aligned["router_logp_standard"] = xr.where(easy, data["logp_null"], data["router_logp_standard"])
    confirmed = CounterfactualResult(aligned).summary()
    assert "(the router aligned on confident tokens, uninformative on fragile ones) is confirmed" in confirmed
    assert "is not confirmed" in CounterfactualResult(data).summary()
    few = CounterfactualResult(aligned.isel(token=slice(0, 16))).summary()  # four sequences
    assert "uninformative on fragile ones) is undecided" in few
    assert "of confident tokens there are too few sequences to say (n = 4) (alignment " in few
    # nor without a second draw, by which tokens are classed
    assert "confirmed" not in CounterfactualResult(aligned.drop_vars([n for n in aligned if "second" in n])).summary()


def test_a_class_without_tokens_cannot_be_said_and_counts_are_in_the_singular() -> None:
    text = CounterfactualResult(exchangeable(40, spread=0.01, centre=9)).summary()
    assert "of fragile tokens it cannot be said (no token in the class)" in text
    assert "- fragile: no token." in text
    logp = np.log([[[0.4, 0.3]], [[0.95, 0.94]]])
    second = np.log([[[0.2, 0.2]], [[0.95, 0.95]]])
    drawn: Any = {"logp_second": second, "router_logp_second": second, "second_route": np.full((2, 1, 2), -1, np.int16)}
    one = CounterfactualResult(dataset(logp, np.log([0.2, 0.96]), sequence=[0, 1], **drawn)).summary()
    assert "- confident: 1 token of 1 sequence, regret" in one
    single = CounterfactualResult(exchangeable(40, n_routes=1))
    assert "up to 1 route each" in single.summary()
    assert "The first other route beats the standard one by" in single.summary()
    assert "alignment undefined, undefined on 100%" in single.summary()


def test_heated_tokens_are_said() -> None:
    data = exchangeable(400)
    assert "temperature" not in CounterfactualResult(data).summary()
    heating = data["heating"].copy()
    heating[:10] = 4.0
    heated = CounterfactualResult(data.assign(heating=heating)).summary()
    assert "2.5% of the tokens, counted at each layer, needed a higher temperature for some of their routes" in heated


def test_inclusion_counts_better_routes_beyond_noise() -> None:
    # four better routes, then five
    logp = np.log([[[0.5, 0.5, 0.5, 0.5, 0.1, 0.1]], [[0.5, 0.5, 0.5, 0.5, 0.5, 0.1]]])
    table = CounterfactualResult(dataset(logp, np.log([0.3, 0.3]), sequence=[0, 1])).by_layer()
    assert table[["positive_rate", "inclusion_1", "inclusion_5"]].to_numpy().tolist() == [[1, 0, 0.5]]
    # a gain of 19 null differences is none, one of 21 is
    for gain, rate in ((19e-4, 0.0), (21e-4, 1.0)):
        null = np.full((4, 1), -1.0 + 1e-4)
        row = CounterfactualResult(dataset(null[..., None] + gain, np.full(4, -1.0), null=null)).by_layer().iloc[0]
        assert (row["positive_rate"], row["inclusion_1"]) == (rate, 1 - rate)
        assert row["regret"] == pytest.approx(gain)


def test_the_layers_median_is_the_noise_of_a_token_that_has_less() -> None:
    null = np.full((9, 1), -1.0 + 1e-3)
    null[0] = -1.0  # by luck without a difference
    logp = null[..., None] + 5e-3 * np.array([0.2, 0.5, 1.0])
    rho, _ = alignment(dataset(logp, np.full(9, -1.0), np.broadcast_to([1.0, 2.0, 3.0], (9, 1, 3)), null=null))
    assert np.isnan(rho).all()


def test_classes_by_entropy_are_those_of_exp_minus_entropy() -> None:
    second = np.full((3, 1, 2), -1.0)
    drawn: Any = {"logp_second": second, "router_logp_second": second, "second_route": np.full(second.shape, -1)}
    data = dataset(np.full((3, 1, 2), -1.0), np.full(3, -1.0), **drawn)
    data["entropy_second"] = ("token", "layer"), -np.log([[0.51], [0.49], [0.91]])
    assert classes(confidence(data, "entropy"))[:, 0].tolist() == [1, 0, 2]
    # a run that has the standard prediction's entropy alone is refused: it selects
    with pytest.raises(DataError, match=r"has not kept the entropy of the second draw's mean prediction.*select"):
        confidence(data.drop_vars("entropy_second"), "entropy")


def test_classes_and_kinds_of_tokens() -> None:
    assert classes(np.array([0.1, 0.5, 0.89, 0.9, np.nan])).tolist() == [0, 1, 1, 2, -1]
    wrong: Any
    for wrong in ((0.9, 0.5), (0.1, 0.5, 0.9), 0.5, ("a", "b"), "ab", (np.nan, 0.9), (0.5, 2)):
        for refuse in (
            lambda given: classes(np.zeros(1), given),
            lambda given: CounterfactualResult(exchangeable(8)).by_confidence(thresholds=given),
            lambda given: CounterfactualResult(exchangeable(8)).controls(None, given),
        ):
            with pytest.raises(ConfigError, match=rf"thresholds={re.escape(repr(wrong))}\. Expected: two numbers"):
                refuse(wrong)
    assert classes(np.array([0.6]), np.array([0.5, 0.9])).tolist() == [1]  # type: ignore[arg-type]
    kinds = {" the": "word", "don't": "word", "12": "number", " 7": "number", "+=": "punctuation", "\n": "space"}
    assert {text: token_type(text) for text in kinds} == kinds
    assert token_type("x1") == token_type("") == token_type("\ufffd") == token_type(" \ufffd!") == "other"


def test_errors() -> None:
    data = dataset(np.zeros((4, 1, 2)) - 1, np.full(4, -1.0))
    result = CounterfactualResult(data)
    with pytest.raises(DataError, match=r"without controls.*\"standard\" gives the published classes"):
        result.by_confidence()
    for table in (result.by_layer, lambda n: result.controls(n_distinct=n)):
        for wrong in (3, 0, -1, "3", 1.5, True, [1]):
            expected = (
                rf"n_distinct={re.escape(repr(wrong))}\. Expected: a whole number from 1 to the 2 that a token has"
            )
            with pytest.raises(ConfigError, match=expected):
                table(wrong)
    for by in ("luck", ["resampled"], 3):
        for refuse in (result.by_confidence, result.controls):
            with pytest.raises(ConfigError, match=rf"by={re.escape(repr(by))}\. Expected: one of"):
                refuse(by)  # type: ignore[operator]
    for layer in ([0], "0", 1, -2, True, 0.0):
        with pytest.raises(ConfigError, match=rf"layer {re.escape(repr(layer))}\. Expected: one of \[0\], or from -1"):
            result.by_confidence("standard", layer=layer)  # type: ignore[arg-type]
    with pytest.raises(DataError, match="without the coordinate 'token_type'"):
        CounterfactualResult(data.drop_vars("token_type")).by_token_type()
    assert len(CounterfactualResult(data.drop_vars(["token_text", "token_type"])).token_table()) == 4
    with pytest.raises(DataError, match="variable 'entropy': none"):
        CounterfactualResult(data.drop_vars("entropy"))
    with pytest.raises(DataError, match="tokens without the coordinate 'pos'"):
        CounterfactualResult(data.drop_vars("pos"))
    with pytest.raises(DataError, match="1 of 4 tokens without a score"):
        CounterfactualResult(data.assign(logp_standard=("token", [-1.0, np.nan, -1.0, -1.0])))
    with pytest.raises(DataError, match="1 of 4 tokens without a score"):
        CounterfactualResult(data.assign(logp_null=(("token", "layer"), [[-1.0], [-1.0], [np.nan], [-1.0]])))
    whole = exchangeable(4)
    for name in ("second_route", "router_logp_second", "second_share"):
        with pytest.raises(DataError, match=f"controls without '{name}'. Expected: all variables of a control"):
            CounterfactualResult(whole.drop_vars(name))
    with pytest.raises(DataError, match="controls without 'logp_own_standard', 'logp_own_null', 'logp_own_second'"):
        CounterfactualResult(whole.assign(logp_own=whole["logp"]))

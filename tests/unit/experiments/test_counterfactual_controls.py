"""What controls compare, and what the summary says of them where little can be compared."""

from __future__ import annotations

import numpy as np
import pytest

from moe_interp.experiments.counterfactual.result import CounterfactualResult
from tests.unit.experiments.planted_counterfactual import dataset, exchangeable


def with_own(level: object, drawn: object, sequence: object, n_routes: int = 4, seed: int = 0) -> CounterfactualResult:
    """Tokens at given log-probabilities, realized and drawn, whose routes are a little better or worse."""
    rng = np.random.default_rng(seed)
    realized, own = np.asarray(level, float), np.asarray(drawn, float)

    def scores(of: np.ndarray) -> np.ndarray:
        return np.minimum(of[:, None, None] + 0.2 * rng.normal(size=(len(of), 1, n_routes)), -1e-6)

    return CounterfactualResult(
        dataset(scores(realized), realized, sequence=sequence, logp_own=scores(own), logp_own_standard=own)
    )


def test_all_kinds_count_the_cells_in_which_the_router_has_as_many_routes() -> None:
    rng = np.random.default_rng(0)
    standard = np.full(100, -1.0)
    standard[:5] = -9.0  # five tokens with few routes do badly
    logp = -1 + 0.1 * rng.normal(size=(100, 1, 8))
    logp[:5], logp[:5, :, 2:] = -1, np.nan
    random = np.where(np.isnan(logp), -1.0, logp)  # as good, and eight each
    null = standard[:, None].copy()
    null[:5] += 1
    result = CounterfactualResult(dataset(logp, standard, null=null, logp_random=random))
    table = result.controls().set_index("kind")
    assert set(table["n_cells"]) == {95}
    assert table.loc["random", "excess_regret"] == pytest.approx(0, abs=1e-12)
    assert table.loc["null", "regret"] == 0
    curve = result.regret_curve().set_index(["kind", "n"])["regret"]
    assert curve["null"].tolist() == [0] * 4
    np.testing.assert_allclose(curve["random"], curve["router"], atol=1e-12)


def test_the_drawn_target_is_compared_with_the_run_on_the_matched_tokens_only() -> None:
    rng = np.random.default_rng(1)
    n, owner = 400, np.arange(400) // 8
    level = np.where(rng.random(n) < 0.3, -6.0, -0.8)
    result = with_own(level, np.full(n, -0.8), owner)
    row = result.controls().set_index("kind").loc["own_prediction"]
    logp, is_likely = result.data["logp"].values[:, 0], level > -1
    expected = np.maximum(logp[is_likely].max(-1) + 0.8, 0).mean()
    assert row["router_regret"] == pytest.approx(expected)
    assert row["excess_regret"] == pytest.approx(row["router_regret"] - row["regret"])
    assert row["matched"] == pytest.approx(is_likely.mean())
    assert row["n_cells"] == n  # all that were drawn
    text = result.summary()
    assert (
        f"on the {is_likely.mean():.1%} of the tokens that can be matched, where the run's own is {expected:.3f} ["
        in text
    )


def test_one_sequence_of_matched_tokens_has_no_interval_and_is_no_finding() -> None:
    owner = np.arange(40) // 8
    level = np.where(owner == 0, -0.8, -6.0)  # only one sequence has a token that is ever drawn
    result = with_own(level, np.full(40, -0.8), owner)
    row = result.controls().set_index("kind").loc["own_prediction"]
    assert row["n_sequences"] == 1
    assert np.isnan([row["excess_regret_low"], row["regret_low"], row["router_regret_high"]]).all()
    curve = result.regret_curve().set_index("kind").loc["own_prediction"]
    assert curve[["low", "high", "router_regret_low"]].isna().all(axis=None)
    text = result.summary()
    assert "(no interval)). By itself that says nothing of the routes" in text
    assert "no difference shown" not in text


def test_where_no_token_can_be_matched_the_summary_says_so() -> None:
    result = with_own(np.full(40, -6.0), np.full(40, -0.8), np.arange(40) // 4)
    row = result.controls().set_index("kind").loc["own_prediction"]
    assert (row["n_cells"], row["n_sequences"], row["matched"]) == (0, 0, 0)
    assert np.isnan(row["regret"])
    assert (
        "- with a next token drawn from the model's own prediction, nothing can be said (no token could be matched)."
        in (result.summary())
    )


def test_the_kinds_use_their_own_scores() -> None:
    data = exchangeable(50)
    better = data.assign(logp_random=data["logp_random"] * 0 - 1e-9)
    row = CounterfactualResult(better).controls().set_index("kind")["gap"]
    level = np.exp(data["logp_standard"].values)
    assert row["random"] == pytest.approx((1 - level).mean(), abs=1e-6)
    assert row["router"] < row["random"] - 0.01


def test_a_fresh_route_counts_by_how_often_another_one_is_drawn() -> None:
    # two tokens alike but for the fresh route: .2 and .6 against .4, of which the first is drawn in a quarter
    second = np.log([[[0.2]], [[0.6]]])
    data = dataset(
        np.log([[[0.3]], [[0.3]]]),
        np.log([0.4, 0.4]),
        sequence=[0, 1],
        logp_second=second,
        router_logp_second=0 * second,
        second_route=np.full((2, 1, 1), -1, np.int16),
        second_share=[[0.25], [1.0]],
    )
    row = CounterfactualResult(data).controls().set_index("kind").loc["fresh_draw"]
    assert row["gap"] == pytest.approx((0.25 * 0.2 + 1.0 * -0.2) / 1.25)
    assert row["router_gap"] == pytest.approx((0.25 * -0.2 + 1.0 * 0.2) / 1.25)
    assert row["matched"] == pytest.approx(0.625)
    # a second draw of one route leaves none to class by
    table = CounterfactualResult(data).controls("resampled").set_index(["kind", "class"])
    assert table.loc["fresh_draw", "n_unclassed"].tolist() == [2, 2, 2]
    assert table.loc["fresh_draw", "n_cells"].tolist() == [0, 0, 0]


def test_null_is_one_alternative_at_every_number() -> None:
    data = exchangeable(40)
    rng = np.random.default_rng(2)
    noisy = data.assign(logp_null=data["logp_null"] + rng.normal(0, 1e-3, data["logp_null"].shape))
    table = CounterfactualResult(noisy).regret_curve().set_index("kind").loc["null", "regret"]
    expected = np.maximum(noisy["logp_null"].values[:, 0] - data["logp_standard"].values, 0).mean()
    np.testing.assert_allclose(table, expected)
